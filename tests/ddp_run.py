"""One run with two processes; Lightning starts the second by running this file again."""

import json
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_polydis import ChannelDisentanglement, SplitConv2d, SplitPlan, disentangle
from tests.networks import Classifier, conv_relu_net, loader, make_images, train_briefly
from tests.planted import Autoencoder, planted_images, planted_loader


def make_trainer(folder: Path, callback: ChannelDisentanglement, **kwargs: Any) -> pl.Trainer:
    return pl.Trainer(
        **{"strategy": "ddp", "max_epochs": 1, **kwargs},
        accelerator="cpu",
        devices=2,
        callbacks=[callback],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )


def shared_classes() -> tuple[Tensor, Tensor]:
    """Class by class, so that each process sees every other image of each class."""
    images, targets = make_images(n=64)
    order = targets.argsort(stable=True)
    return images[order], targets[order]


def analyse(folder: Path) -> None:
    """The settings that a user who sets nothing gets, but for two thresholds that suit so small a network."""
    torch.manual_seed(5)
    module = Classifier(train_briefly(conv_relu_net()))
    callback = ChannelDisentanglement("net.2", relevance_threshold=0.02, class_fraction=0.3)
    trainer = make_trainer(folder, callback)
    trainer.validate(module, DataLoader(TensorDataset(*shared_classes()), 8), verbose=False)
    callback.report.save(folder / f"shared_report_{trainer.global_rank}.json")
    callback.plan.save(folder / f"shared_plan_{trainer.global_rank}.json")


def decide_by_composite(folder: Path) -> None:
    """Validate the trained module again, where zennit tells which channels are relevant."""
    torch.manual_seed(0)
    module = Classifier(train_briefly(conv_relu_net()))
    callback = ChannelDisentanglement(
        "net.2",
        relevance_threshold=0.05,
        class_fraction=0.5,
        similarity_threshold=0.9,
        attribution="epsilon_plus_flat",
        strict=True,
    )
    trainer = make_trainer(folder, callback)
    trainer.validate(module, loader(batch_size=8, n=40), verbose=False)
    _ = callback.report.cards, callback.report.overviews
    callback.report.save(folder / f"composite_report_{trainer.global_rank}.json")
    callback.plan.save(folder / f"composite_plan_{trainer.global_rank}.json")


def one_process_sees_nothing_but_nan(folder: Path) -> None:
    """Validate where every batch of rank 1 has to be left out."""
    torch.manual_seed(0)
    module = Classifier(train_briefly(conv_relu_net()))
    callback = ChannelDisentanglement(
        "net.2", relevance_threshold=0.05, class_fraction=0.5, similarity_threshold=0.9, strict=True
    )
    trainer = make_trainer(folder, callback, use_distributed_sampler=False)
    images, targets = make_images()
    images = images if trainer.global_rank == 0 else images * float("nan")
    trainer.validate(module, DataLoader(TensorDataset(images, targets), 16), verbose=False)
    callback.report.save(folder / f"report_{trainer.global_rank}.json")


def clusters(folder: Path) -> None:
    """Without labels: validate, judge the split module, validate where rank 1 sees NaN and where memory is short."""

    def validated(name: str, data: DataLoader, module: Autoencoder, **kwargs: Any) -> dict[str, float]:
        callback = ChannelDisentanglement("net.mix", concepts="clusters", strict=True, **kwargs)
        trainer = make_trainer(folder, callback, use_distributed_sampler=name != "nan")
        (metrics,) = trainer.validate(module, data, verbose=False)
        if callback.report is not None:
            _ = callback.report.quality, callback.report.cards, callback.report.overviews
            callback.report.save(folder / f"{name}_report_{trainer.global_rank}.json")
            callback.plan.save(folder / f"{name}_plan_{trainer.global_rank}.json")
        return metrics

    images, own = planted_images(240)
    data = DataLoader(TensorDataset(images, own), 20)
    validated("plain", data, Autoencoder())
    rank = torch.distributed.get_rank()
    split = disentangle(Autoencoder(), SplitPlan.load(folder / f"plain_plan_{rank}.json"))
    metrics = validated("split", planted_loader(240), split)
    (folder / f"metrics_{rank}.json").write_text(json.dumps(metrics))
    validated("short", data, Autoencoder(), calibration_memory=40 * 18 * 16 * 4 / 2**20)
    spoilt = images if rank == 0 else images * float("nan")
    validated("nan", DataLoader(TensorDataset(spoilt, own), 20), Autoencoder())


def main(folder: Path, loop: str) -> None:
    if loop == "nan":
        one_process_sees_nothing_but_nan(folder)
        return
    if loop == "clusters":
        clusters(folder)
        return
    torch.manual_seed(0)
    module = Classifier(train_briefly(conv_relu_net()))
    callback = ChannelDisentanglement(
        "net.2",
        relevance_threshold=0.05,
        class_fraction=0.5,
        similarity_threshold=0.9,
        split=loop == "fit",
    )
    trainer = make_trainer(folder, callback)
    if loop == "fit":
        trainer.fit(module, loader(), loader(batch_size=8))
        assert isinstance(module.net[2], SplitConv2d)
    else:
        getattr(trainer, loop)(module, loader(batch_size=8), verbose=False)
        judge(trainer, module, callback.plan, folder)
        analyse(folder)
        decide_by_composite(folder)
    rank = trainer.global_rank
    callback.report.save(folder / f"report_{rank}.json")
    callback.plan.save(folder / f"plan_{rank}.json")
    torch.save(module.state_dict(), folder / f"weights_{rank}.pt")
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    assert sum(hooks) == 0


def judge(trainer: pl.Trainer, module: Classifier, plan: SplitPlan, folder: Path) -> None:
    """Validate the split module where rank 1 sees no image of the first split's first concept."""
    disentangle(module, plan, inplace=True)
    (label,) = plan.splits[0].concepts[0][:1]
    images, targets = make_images()
    seen = targets == label if trainer.global_rank == 0 else targets != label
    batches = list(zip(images[seen].split(12)[:1], targets[seen].split(12)[:1], strict=True))
    data = DataLoader(batches, batch_size=None)
    trainer = make_trainer(
        folder, ChannelDisentanglement("net.2", relevance_threshold=0.05), use_distributed_sampler=False
    )
    (metrics,) = trainer.validate(module, data, verbose=False)
    (folder / f"metrics_{trainer.global_rank}.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
