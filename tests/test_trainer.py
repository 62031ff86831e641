"""What Lightning's Trainer can be asked for, with the callback in it."""

import contextlib
import copy
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import IterableDataset

from lightning_polydis import SplitConv2d, find_polysemantic_channels
from lightning_polydis._trainer import check_strategy
from tests.networks import Classifier, loader, make_batches
from tests.runs import SETTINGS, as_loader, callback_for, make_trainer, n_hooks

ROOT = Path(__file__).parent.parent


@pytest.fixture
def module(net):
    return Classifier(copy.deepcopy(net))


def cosines(report):
    return [(pair.channel, pair.class_a, pair.class_b, pair.cosine_similarity) for pair in report.pairs]


def expected_for(net, batches):
    return find_polysemantic_channels(net, batches, "2", progress=False, **SETTINGS)


# ------------------------------------------------------------------------------------------------ validation loaders


class SeveralLoaders(Classifier):
    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", F.cross_entropy(self(batch[0]), batch[1]))


FIRST, SECOND = make_batches(), make_batches(seed=7, n=64)


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("loop", ["fit", "validate"])
@pytest.mark.parametrize("dataloader", [None, 0, 1, "second"])
def test_all_loaders_are_analysed_or_the_one_named(net, named, loop, dataloader, tmp_path):
    if dataloader == "second" and not named:
        pytest.skip("lists have no names")
    module = SeveralLoaders(copy.deepcopy(net))
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), 0.0)
    loaders = {"first": as_loader(FIRST), "second": as_loader(SECOND)}
    loaders = loaders if named else list(loaders.values())
    callback = callback_for(dataloader=dataloader)
    trainer = make_trainer(tmp_path, callback)
    if loop == "fit":
        trainer.fit(module, loader(), loaders)
    else:
        trainer.validate(module, loaders, verbose=False)
    batches = {None: FIRST + SECOND, 0: FIRST, 1: SECOND, "second": SECOND}[dataloader]
    assert cosines(callback.report) == cosines(expected_for(net, batches))
    assert callback.report.n_images == sum(len(targets) for _, targets in batches)


@pytest.mark.parametrize(
    ("loaders", "dataloader", "message"),
    [
        ([as_loader(FIRST), as_loader(SECOND)], 2, r"`dataloader` to be a place in \[0, 2\) of .* but got 2"),
        (as_loader(FIRST), 1, r"a place in \[0, 1\) of a validation loader, but got 1"),
        ({"a": as_loader(FIRST)}, "b", r"to be one of \['a'\] or a place in \[0, 1\) .* but got 'b'"),
    ],
)
def test_a_loader_that_is_not_there_is_refused_in_words(net, loaders, dataloader, message, tmp_path):
    module = SeveralLoaders(net)
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(tmp_path, callback_for(dataloader=dataloader)).validate(module, loaders, verbose=False)
    assert n_hooks(module) == 0


@pytest.mark.parametrize(
    ("loaders", "message"),
    [
        ({"a": [as_loader(FIRST), as_loader(FIRST)], "b": as_loader(SECOND)}, "but got nested ones. Leave it out"),
        (CombinedLoader([as_loader(FIRST), as_loader(SECOND)], "max_size_cycle"), "a `CombinedLoader` of another mode"),
    ],
)
def test_a_loader_cannot_be_chosen_from_nested_or_parallel_ones(net, loaders, message, tmp_path):
    with pytest.raises(MisconfigurationException, match=message):
        make_trainer(tmp_path, callback_for(dataloader=1)).validate(SeveralLoaders(net), loaders, verbose=False)


class Fetching(Classifier):
    def validation_step(self, dataloader_iter):
        self(next(dataloader_iter)[0][0])


def test_a_step_that_fetches_its_batches_is_refused_in_words(net, tmp_path):
    with pytest.raises(MisconfigurationException, match="Expected a step that takes a batch, but it takes `datal"):
        make_trainer(tmp_path, callback_for()).validate(Fetching(net), as_loader(FIRST), verbose=False)


class Empty(IterableDataset):
    def __iter__(self):
        return iter([])


def test_an_empty_stream_is_a_warning(module, tmp_path):
    callback = callback_for()
    data = torch.utils.data.DataLoader(Empty(), batch_size=None)
    with pytest.warns(UserWarning, match="No batch was analysed in this epoch"):
        make_trainer(tmp_path, callback, num_sanity_val_steps=0).fit(module, loader(), data)
    assert callback.report is None


# ------------------------------------------------------------------------------------------------------- the trainer


@pytest.mark.parametrize("loop", ["fit", "validate"])
def test_limited_batches_are_those_that_are_analysed(module, loop, tmp_path):
    callback = callback_for()
    trainer = make_trainer(tmp_path, callback, limit_val_batches=2)
    arguments = (loader(), loader()) if loop == "fit" else (loader(),)
    getattr(trainer, loop)(module, *arguments)
    assert callback.report.n_images == 32


class Counting(Classifier):
    def __init__(self, net):
        super().__init__(net)
        self.steps = []

    def on_validation_end(self):
        self.steps.append(self.trainer.global_step)


@pytest.mark.parametrize(
    ("kwargs", "steps"),
    [
        ({"val_check_interval": 1, "max_epochs": 1}, [1, 2, 3]),
        ({"val_check_interval": 2, "check_val_every_n_epoch": None, "max_steps": 6, "max_epochs": -1}, [2, 4, 6]),
        ({"accumulate_grad_batches": 3, "max_epochs": 2}, [1, 2]),
    ],
)
def test_validation_may_come_at_any_step(net, kwargs, steps, tmp_path):
    module, callback = Counting(copy.deepcopy(net)), callback_for(split=True)
    trainer = make_trainer(tmp_path, callback, num_sanity_val_steps=0, **kwargs)
    trainer.fit(module, loader(), loader())
    assert module.steps == steps
    assert callback._analysed_step == steps[-1]
    assert isinstance(module.net[2], SplitConv2d)


class Skipping(Classifier):
    """Goes on after a forward pass that failed."""

    def validation_step(self, batch, batch_idx):
        self.net[4].register_forward_pre_hook(self._fail if batch_idx == 1 else lambda *_: None)
        with contextlib.suppress(ArithmeticError):
            self(batch[0])
        self.net[4]._forward_pre_hooks.clear()

    def _fail(self, module, args):
        raise ArithmeticError("a bad batch")


def test_a_step_that_survives_its_own_failure_survives_ours(net, tmp_path):
    module, callback = Skipping(copy.deepcopy(net)), callback_for()
    with pytest.warns(UserWarning, match="(?s)is dropped:.*forward pass ended by an exception"):
        make_trainer(tmp_path, callback).validate(module, loader(), verbose=False)
    assert callback.report is None
    assert n_hooks(module) == 0
    assert torch.is_grad_enabled()


class LeavingOut(Classifier):
    def validation_step(self, batch, batch_idx):
        if batch_idx != 1:
            super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_step_may_leave_batches_out(net, compiled, tmp_path):
    module, callback = LeavingOut(copy.deepcopy(net)), callback_for(strict=True)
    if compiled:
        module.net.compile(backend="eager")
    make_trainer(tmp_path, callback).validate(module, as_loader(FIRST), verbose=False)
    assert cosines(callback.report) == cosines(expected_for(net, [FIRST[0], FIRST[2]]))


def test_logits_fn_runs_in_the_precision_of_the_step(net, tmp_path):
    weight = torch.randn(4, 4)
    callback = callback_for(logits_fn=lambda logits: logits @ weight)
    make_trainer(tmp_path, callback, precision="bf16-mixed").validate(Classifier(net), loader(), verbose=False)
    assert callback.report.n_images == 48


class Beside(Classifier):
    """Modules beside the network that cannot be hooked or have no shape yet."""

    def __init__(self, net):
        super().__init__(net)
        self.script, self.lazy = torch.jit.script(nn.Linear(2, 2)), nn.LazyBatchNorm2d()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script", "ignore:.*Uninitialized")
@pytest.mark.parametrize("layers", ["net.2", None])
def test_scripted_and_lazy_modules_beside_the_network_do_no_harm(net, layers, tmp_path):
    callback = callback_for(layers, strict=True)
    make_trainer(tmp_path, callback).validate(Beside(net), loader(), verbose=False)
    assert callback.report.n_images == 48


def test_files_of_several_callbacks_with_many_layers_have_names_of_their_own(tmp_path):
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Linear(16, 16), nn.ReLU())]
    module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(243, 16), nn.ReLU(), *layers, nn.Linear(16, 4)))
    names = [[f"net.{index}" for index in range(start, 15, 4)] for start in (3, 5)]
    names[1].append("net.1")
    callbacks = [callback_for(own, dirpath=tmp_path) for own in names]
    make_trainer(tmp_path, *callbacks).validate(module, loader(), verbose=False)
    found = {path.name for path in tmp_path.glob("*.json")}
    assert {"net.3+net.7+net.11.report.json", "net.5+3.report.json"} <= found


class Manual(Classifier):
    def __init__(self, net):
        super().__init__(net)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
        optimizer.step()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(make_batches())


@pytest.mark.parametrize("kind", [Classifier, Manual])
def test_any_way_to_train_gives_the_weights_it_gives_without_the_callback(kind, net, tmp_path):
    results = []
    for callbacks in ([], [callback_for(every_n_epochs=2)]):
        torch.manual_seed(0)
        module = kind(copy.deepcopy(net))
        data = torch.utils.data.DataLoader(Stream(), batch_size=None)
        make_trainer(tmp_path, *callbacks, max_epochs=3).fit(module, data, data)
        results.append([parameter.detach() for parameter in module.parameters()])
    assert all(map(torch.equal, *results))
    assert callbacks[0].report.n_images == 48


class Data(pl.LightningDataModule):
    def train_dataloader(self):
        return loader()

    val_dataloader = test_dataloader = train_dataloader


@pytest.mark.parametrize("loop", ["fit", "validate", "test"])
def test_a_data_module_will_do(module, loop, tmp_path):
    callback = callback_for()
    getattr(make_trainer(tmp_path, callback), loop)(module, datamodule=Data())
    assert callback.report.n_images == 48


def test_averaged_weights_at_the_end_of_training_are_noted_and_warned_about(module, tmp_path):
    callback = callback_for(split=True)
    trainer = make_trainer(tmp_path, callback, StochasticWeightAveraging(1e-2, swa_epoch_start=1), max_epochs=3)
    with pytest.warns(UserWarning, match="The weights have changed since the analysis"):
        trainer.fit(module, loader(), loader())
    assert "`StochasticWeightAveraging` replaces them by their average" in callback.report.notes[0]
    assert isinstance(module.net[2], SplitConv2d)


# ------------------------------------------------------------------------------------------------ batches and outputs


@dataclass
class Batch:
    image: Tensor
    label: Tensor
    weight: float = 1.0


@dataclass
class Output:
    logits: Tensor
    features: Tensor


class Structured(Classifier):
    def __init__(self, net, unpack, wrap):
        super().__init__(net)
        self.unpack, self.wrap = unpack, wrap

    def forward(self, images):
        features = self.net[:8](images)
        return self.wrap(self.net[8](features), features)

    def validation_step(self, batch, batch_idx):
        self(self.unpack(batch))


@pytest.mark.parametrize(
    ("pack", "unpack"),
    [
        (lambda x, y: {"image": x, "target": y}, lambda batch: batch["image"]),
        (lambda x, y: Batch(x, y), lambda batch: batch.image),
        (lambda x, y: SimpleNamespace(x=x, y=y), lambda batch: batch.x),
        (lambda x, y: (x, y, ["extra"] * len(y)), lambda batch: batch[0]),
    ],
    ids=["dictionary", "dataclass", "namespace", "extras"],
)
@pytest.mark.parametrize(
    ("wrap", "logits_fn"),
    [
        (lambda logits, features: {"logits": logits, "features": features}, None),
        (Output, None),
        (lambda logits, features: (features, logits), lambda output: output[1]),
    ],
    ids=["dictionary", "dataclass", "tuple"],
)
def test_batches_and_outputs_of_any_kind(net, pack, unpack, wrap, logits_fn, tmp_path):
    module, callback = Structured(net, unpack, wrap), callback_for(logits_fn=logits_fn)
    data = as_loader([pack(x, y) for x, y in FIRST])
    make_trainer(tmp_path, callback).validate(module, data, verbose=False)
    assert cosines(callback.report) == cosines(expected_for(net, FIRST))


def test_a_dataclass_without_targets_is_refused_in_words(net, tmp_path):
    module = Structured(net, lambda batch: batch.logits, lambda logits, _: logits)
    data = as_loader([Output(x, y) for x, y in FIRST])
    with pytest.raises(MisconfigurationException, match="or a dictionary or dataclass with .* but got `Output`"):
        make_trainer(tmp_path, callback_for()).validate(module, data, verbose=False)


class Checkpointed(Classifier):
    """Recomputes a part of the network in the backward pass, in validation too."""

    def __init__(self, net, part, reentrant):
        super().__init__(net)
        self.part, self.reentrant = part, reentrant

    def forward(self, images):
        start, stop = self.part
        hidden = self.net[:start](images)
        hidden = checkpoint(lambda x: self.net[start:stop](x), hidden, use_reentrant=self.reentrant)
        return self.net[stop:](hidden)


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
@pytest.mark.parametrize("layers", ["net.2", "net.4", ["net.2", "net.4"]])
@pytest.mark.parametrize(("part", "reentrant"), [((2, 6), False), ((4, 7), False), ((0, 5), False), ((0, 2), True)])
def test_gradient_checkpointing_changes_nothing(net, layers, part, reentrant, tmp_path):
    module, callback = Checkpointed(net, part, reentrant), callback_for(layers)
    make_trainer(tmp_path, callback).validate(module, as_loader(FIRST), verbose=False)
    names = [name.removeprefix("net.") for name in ([layers] if isinstance(layers, str) else layers)]
    expected = find_polysemantic_channels(net, FIRST, names, progress=False, **SETTINGS)
    assert cosines(callback.report) == cosines(expected)
    assert n_hooks(module) == 0


@pytest.mark.filterwarnings("ignore:.*None of the inputs have requires_grad")
@pytest.mark.parametrize("part", [(2, 6), (4, 7)])
def test_reentrant_checkpointing_around_or_behind_a_layer_is_refused_in_words(net, part, tmp_path):
    module = Checkpointed(net, part, True)
    with pytest.raises(MisconfigurationException, match="`use_reentrant=True`"):
        make_trainer(tmp_path, callback_for()).validate(module, as_loader(FIRST), verbose=False)
    assert n_hooks(module) == 0
    assert torch.is_grad_enabled()


class Lazy(Classifier):
    def __init__(self):
        layers = [nn.LazyConv2d(16, 3), nn.ReLU(), nn.LazyConv2d(12, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(4)]
        super().__init__(nn.Sequential(*layers))


def test_lazy_layers_are_analysed_once_they_have_run(tmp_path):
    with pytest.raises(MisconfigurationException, match="shape is not known before its first forward pass"):
        make_trainer(tmp_path, callback_for()).validate(Lazy(), loader(), verbose=False)
    callback = callback_for()
    make_trainer(tmp_path, callback).fit(Lazy(), loader(), loader())
    assert callback.report.layers[0].n_inputs == 16


# ---------------------------------------------------------------------------------------------------------- strategies


@pytest.mark.parametrize("strategy", [FSDPStrategy, DeepSpeedStrategy])
def test_sharded_strategies_are_refused_in_words(strategy):
    sharded = SimpleNamespace(strategy=strategy.__new__(strategy))
    with pytest.raises(ValueError, match=f"needs whole layers in each process, which `{strategy.__name__}` does not"):
        check_strategy(sharded, split=False)


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn", "ddp_notebook"])
def test_a_split_that_another_process_would_keep_is_refused_in_words(module, strategy, tmp_path):
    trainer = make_trainer(tmp_path, callback_for(), strategy=strategy, devices=2)
    check_strategy(trainer, split=False)
    with pytest.raises(ValueError, match="`split=True` needs a strategy that trains in this process"):
        check_strategy(trainer, split=True)
    assert isinstance(trainer.strategy, DDPStrategy)
    callback = callback_for(split=True)
    for stage in ("validate", "test", "predict"):  # nothing is split there
        callback.setup(trainer, module, stage)
        callback.teardown(trainer, module, stage)


# ----------------------------------------------------------------------------------------------------------------- CLI


CONFIG = """
trainer:
  accelerator: cpu
  max_epochs: 1
  enable_progress_bar: false
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_polydis.ChannelDisentanglement
      init_args:
        layers: [net.2]
        similarity_threshold: {threshold}
        relevance_threshold: 0.05
        class_fraction: 0.5
        calibration_samples: 16
        dirpath: {folder}
"""

PROGRAM = """
from lightning.pytorch.cli import LightningCLI
from tests.networks import Classifier
from tests.test_trainer import Data

LightningCLI(Classifier, Data, seed_everything_default=0)
"""


@pytest.mark.parametrize("threshold", [0.9, "auto"])
def test_lightning_cli_builds_the_callback_from_yaml(threshold, tmp_path):
    (tmp_path / "settings.yaml").write_text(CONFIG.format(folder=tmp_path, threshold=threshold))
    command = [sys.executable, "-c", PROGRAM, "fit", "--config", str(tmp_path / "settings.yaml")]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert (tmp_path / "report.json").exists()
