"""Runs of the callback on small networks."""

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from lightning_polydis import ChannelDisentanglement
from tests.networks import conv_relu_net

SETTINGS = {"relevance_threshold": 0.05, "class_fraction": 0.5, "similarity_threshold": 0.9}


def make_trainer(tmp_path, *callbacks, **kwargs):
    kwargs = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1, **kwargs}
    return pl.Trainer(
        callbacks=list(callbacks),
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        enable_model_summary=False,
        **kwargs,
    )


def callback_for(layers="net.2", **kwargs):
    return ChannelDisentanglement(layers, **{**SETTINGS, **kwargs})


def as_loader(batches):
    return torch.utils.data.DataLoader(batches, batch_size=None)


def n_hooks(net: nn.Module) -> int:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_load_state_dict_pre_hooks", "_backward_hooks")
    return sum(len(getattr(module, name)) for module in net.modules() for name in hooks)


class Recorder(Callback):
    """Keeps every logged number and what the step saw."""

    def __init__(self):
        self.seen = []

    def on_validation_epoch_end(self, trainer, pl_module):
        self.seen.append({k: v.clone() for k, v in trainer.callback_metrics.items() if not k.startswith("polydis")})

    on_test_epoch_end = on_validation_epoch_end


class HeadOfBackbone(pl.LightningModule):
    def __init__(self):
        super().__init__()
        net = conv_relu_net()
        self.backbone, self.head = net[:8], net[8]

    def validation_step(self, batch, batch_idx):
        self.head(self.backbone(batch[0]))
