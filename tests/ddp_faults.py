"""Two processes in which not everything goes well; Lightning starts the second by running this file again."""

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_polydis import ChannelDisentanglement, SplitConv2d, vectors
from lightning_polydis.analysis import ChannelAnalysis
from lightning_polydis.processes import _gloo_beside
from lightning_polydis.vectors import ClassVectors
from tests.ddp_run import make_trainer
from tests.networks import Classifier, conv_relu_net, loader, make_batches, train_briefly

SETTINGS = {"relevance_threshold": 0.05, "class_fraction": 0.5, "similarity_threshold": 0.9}


def trained() -> Classifier:
    torch.manual_seed(0)
    return Classifier(train_briefly(conv_relu_net()))


def own_batches(rank: int) -> DataLoader:
    """Two batches for the first process, the last, smaller one for the second."""
    batches = make_batches(n=40)
    return DataLoader(batches[:2] if rank == 0 else batches[2:], batch_size=None)


class Epochs(Callback):
    """Notes after each validation what the callback has."""

    def __init__(self, callback: ChannelDisentanglement) -> None:
        self.callback, self.has_report = callback, []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.has_report.append(self.callback.report is not None)


def one_process_fails(folder: Path) -> None:
    """Rank 1 fails in collection, in computation, and in a metric; the fourth epoch is analysed by both."""
    callback = ChannelDisentanglement("net.2", **SETTINGS)
    epochs = Epochs(callback)
    trainer = make_trainer(folder, callback, max_epochs=4)
    trainer.callbacks.append(epochs)
    finish, compute = ChannelAnalysis.finish_batch, ChannelAnalysis.compute

    def failing_batch(self):
        if trainer.global_rank == 1 and trainer.current_epoch == 0:
            raise ArithmeticError("only here")
        finish(self)

    def failing_compute(self):
        report = compute(self)
        if trainer.global_rank == 1 and trainer.current_epoch == 1:
            raise ArithmeticError("only here")
        return report

    def failing_vectors(*args):
        if trainer.global_rank == 1 and trainer.current_epoch == 2:
            raise ArithmeticError("only here")
        return ClassVectors(*args)

    ChannelAnalysis.finish_batch, ChannelAnalysis.compute = failing_batch, failing_compute
    vectors.ClassVectors = failing_vectors
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(trained(), loader(), loader(batch_size=8))
    ChannelAnalysis.finish_batch, ChannelAnalysis.compute = finish, compute
    vectors.ClassVectors = ClassVectors
    assert epochs.has_report == [False, False, False, True], epochs.has_report
    texts = [str(warning.message) for warning in caught]
    wanted = "it failed in another process" if trainer.global_rank == 0 else "ArithmeticError: only here"
    assert sum(wanted in text for text in texts) == 3, texts
    assert callback.report.n_images == 48


def uneven_batches(folder: Path) -> None:
    """The processes have different numbers of batches, of different sizes; samples go through a group of their own."""
    backend = torch.distributed.get_backend
    torch.distributed.get_backend = lambda group=None: "nccl" if group is None else backend(group)
    callback = ChannelDisentanglement("net.2", strict=True, **SETTINGS)
    trainer = make_trainer(folder, callback, use_distributed_sampler=False)
    trainer.validate(trained(), own_batches(trainer.global_rank), verbose=False)
    torch.distributed.get_backend = backend
    callback.report.save(folder / f"uneven_{trainer.global_rank}.json")
    assert _gloo_beside.cache_info().misses == 1


def compiled(folder: Path) -> None:
    module = trained()
    module.net.compile(backend="eager")
    callback = ChannelDisentanglement("net.2", strict=True, **SETTINGS)
    trainer = make_trainer(folder, callback)
    trainer.validate(module, loader(batch_size=8), verbose=False)
    callback.report.save(folder / f"compiled_{trainer.global_rank}.json")


def a_split_module_is_trained_on(folder: Path) -> None:
    module, callback = trained(), ChannelDisentanglement("net.2", split=True, **SETTINGS)
    make_trainer(folder, callback).fit(module, loader(), loader(batch_size=8))
    assert isinstance(module.net[2], SplitConv2d)
    before = module.net[2].expand.weight.detach().clone()
    trainer = make_trainer(folder, ChannelDisentanglement("net.2", **SETTINGS))
    trainer.fit(module, loader(), loader(batch_size=8))
    assert not torch.equal(module.net[2].expand.weight, before)
    assert "polydis/net.2/split_auroc" in trainer.callback_metrics
    torch.save(module.state_dict(), folder / f"trained_{trainer.global_rank}.pt")


def other_sizes(folder: Path) -> None:
    """The second process sees larger images, of which less fit into the memory for samples."""
    torch.manual_seed(0)
    callback = ChannelDisentanglement("net.2", strict=True, calibration_memory=0.05, **SETTINGS)
    trainer = make_trainer(folder, callback, use_distributed_sampler=False)
    batches = make_batches(size=9 if trainer.global_rank == 0 else 15)
    trainer.validate(trained(), DataLoader(batches, batch_size=None), verbose=False)
    (evidence,) = callback.report._evidence.values()
    assert evidence.samples.inputs.shape[2:] == (9, 9), "those of the first process"
    counts = torch.bincount(evidence.samples.targets).tolist()
    assert 0 < max(counts) < 12, counts
    callback.plan.save(folder / f"sizes_{trainer.global_rank}.json")


class Stream(IterableDataset):
    """Batches for one process, nothing for the others (Lightning refuses empty loaders that tell their length)."""

    def __init__(self, has_some: bool) -> None:
        self.has_some = has_some

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(make_batches() if self.has_some else [])


def one_process_has_nothing(folder: Path) -> None:
    callback = ChannelDisentanglement("net.2", **SETTINGS)
    trainer = make_trainer(folder, callback, use_distributed_sampler=False)
    batches = Stream(trainer.global_rank == 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.validate(trained(), DataLoader(batches, batch_size=None), verbose=False)
    assert callback.report is None
    wanted = "it failed in another process" if trainer.global_rank == 0 else "No batch was analysed in this epoch"
    assert any(wanted in str(warning.message) for warning in caught)


def spawned(folder: Path) -> None:
    """Processes that Lightning spawns: report and plan are in files, the module comes back trained."""
    module = trained()
    before = module.net[2].weight.detach().clone()
    callback = ChannelDisentanglement("net.2", dirpath=folder / "spawned", **SETTINGS)
    make_trainer(folder, callback, strategy="ddp_spawn").fit(module, loader(), loader(batch_size=8))
    assert not torch.equal(module.net[2].weight, before)
    torch.save(module.state_dict(), folder / "spawned.pt")


SCENARIOS = [one_process_fails, uneven_batches, compiled, a_split_module_is_trained_on, one_process_has_nothing]
SCENARIOS.append(other_sizes)

if __name__ == "__main__":
    if sys.argv[2] == "spawned":
        spawned(Path(sys.argv[1]))
    else:
        for scenario in SCENARIOS:
            scenario(Path(sys.argv[1]))
