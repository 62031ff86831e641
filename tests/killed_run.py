"""A training run that kills itself where it is told to, and can be started again from its last checkpoint."""

import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_polydis import ChannelDisentanglement
from tests.networks import Classifier, conv_relu_net, loader


class Mortal(Classifier):
    """Dies in a step of an epoch."""

    def __init__(self, where: str) -> None:
        super().__init__(conv_relu_net())
        self.where = where

    def die_at(self, where: str) -> None:
        if not self.trainer.sanity_checking and where == self.where:
            os.kill(os.getpid(), signal.SIGKILL)

    def training_step(self, batch, batch_idx):
        self.die_at(f"train-{self.current_epoch}-{batch_idx}")
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.die_at(f"validate-{self.current_epoch}-{batch_idx}")


def main(folder: Path, where: str, every_n_epochs: int) -> None:
    torch.manual_seed(0)
    module = Mortal(where)
    callback = ChannelDisentanglement(
        None,
        relevance_threshold=0.05,
        class_fraction=0.3,
        similarity_threshold=0.9,
        every_n_epochs=every_n_epochs,
        dirpath=folder,
    )
    last = folder / "last.ckpt"
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=5,
        callbacks=[callback, ModelCheckpoint(folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(), loader(), ckpt_path=last if last.exists() else None)
    (evidence,) = callback.report._evidence.values()
    known = [(label, channel) for channel in range(10) for label in evidence.vectors.classes(channel)]
    torch.save(
        {
            "n_validations": callback._n_validations,
            "counts": evidence.statistics.counts,
            "n_images": evidence.statistics.n_images,
            "vectors": {key: evidence.vectors.means(key[1], [key[0]]) for key in known},
        },
        folder / "statistics.pt",
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
