"""Images drive the channels that they were made for, and nothing of the user's is touched."""

import copy
import random
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("horama")
pytest.importorskip("matplotlib")
from PIL import Image

from lightning_polydis import ChannelSplit, SplitPlan, disentangle, visualization
from lightning_polydis.figures.visualization import visualization_figure
from lightning_polydis.visualization import visualize_channels
from tests.networks import Classifier, conv_relu_net

QUICK = {"input_size": 12, "steps": 8, "progress": False}
LAYER = "2"


def halves(n_inputs):
    """The first half of the sources for one concept, the second for the other."""
    return torch.eye(2).repeat_interleave(n_inputs // 2, dim=1)


def split_of(channel, *, layer=LAYER, n_inputs=8, directions=None):
    return ChannelSplit(layer, channel, [[0, 2], [1]], halves(n_inputs), directions=directions)


PLAN = SplitPlan([split_of(4)])


@pytest.fixture(scope="module")
def planted():
    """Channel 0 of layer "2" adds up what answers to vertical edges and what answers to horizontal ones."""
    net = nn.Sequential(nn.Conv2d(3, 4, 2, bias=False), nn.ReLU(), nn.Conv2d(4, 2, 1, bias=False), nn.ReLU())
    vertical, horizontal = torch.tensor([[-1.0, 1], [-1, 1]]), torch.tensor([[-1.0, -1], [1, 1]])
    with torch.no_grad():
        net[0].weight.copy_(torch.stack([vertical, -vertical, horizontal, -horizontal])[:, None])
        net[2].weight.fill_(1)
    return net.eval()


@pytest.fixture(scope="module")
def quick(net):
    (shown,) = visualize_channels(net, PLAN, **QUICK)
    return shown


def driven(net, split, concept, image):
    """Mean activation of a concept's channel by the middle of an image, which is what most crops have shown."""
    layer = disentangle(net, SplitPlan([split])).get_submodule(split.layer)
    with torch.no_grad():
        module = layer if concept == "original" else layer.expand
        row = split.channel if concept == "original" else layer.channel_index(split.channel, concept)
        return float(module(net[: int(split.layer)](image[None, :, 2:-2, 2:-2]))[0, row].mean())


def equal(shown, other):
    return torch.equal(shown.original, other.original) and torch.equal(shown.parts, other.parts)


def shuffled(image, n=20):
    """Noise of the same colours and contrast: the image's pixels in other places."""
    generator = torch.Generator().manual_seed(3)
    return [image.flatten(1)[:, torch.randperm(image[0].numel(), generator=generator)].view_as(image) for _ in range(n)]


def test_images_are_what_the_docstring_says(quick):
    assert (quick.layer, quick.channel, quick.concepts) == (LAYER, 4, [[0, 2], [1]])
    assert quick.original.shape == (3, 16, 16)  # 15, made even
    assert quick.parts.shape == (2, 3, 16, 16)
    for images in (quick.original, quick.parts):
        assert images.dtype == torch.float32
        assert images.device == torch.device("cpu")
        assert not images.requires_grad
        assert 0 <= images.min() < images.max() <= 1


def test_planted_concepts_show_what_was_planted(planted):
    split = split_of(0, n_inputs=4)
    (shown,) = visualize_channels(planted, SplitPlan([split]), input_size=16, steps=60, progress=False)
    across, down = (shown.parts.diff(dim=dim).square().mean((1, 2, 3)) for dim in (3, 2))
    assert across[0] > 3 * down[0]
    assert down[1] > 3 * across[1]
    for concept in (0, 1):
        own, other = (driven(planted, split, concept, shown.parts[place]) for place in (concept, 1 - concept))
        assert own > 1.5 * other


def test_images_drive_their_own_channel_most(net):
    split = split_of(4)
    (shown,) = visualize_channels(net, SplitPlan([split]), input_size=16, steps=40, progress=False)
    for concept in (0, 1):
        own = driven(net, split, concept, shown.parts[concept])
        assert own > driven(net, split, concept, shown.parts[1 - concept])
        assert own > max(driven(net, split, concept, noise) for noise in shuffled(shown.parts[concept]))
    own = driven(net, split, "original", shown.original)
    assert own > max(driven(net, split, "original", noise) for noise in shuffled(shown.original))


@pytest.mark.parametrize(("directions", "of_original"), [([-1, 1], 1), ([1, -1], 1), ([-1, -1], -1), (None, 1)])
def test_images_follow_the_directions(net, directions, of_original):
    split = split_of(4, directions=directions)
    (shown,) = visualize_channels(net, SplitPlan([split]), input_size=16, steps=30, progress=False)
    signs = {"original": of_original, **dict(enumerate(directions or [1, 1]))}
    for concept, image in (("original", shown.original), (0, shown.parts[0]), (1, shown.parts[1])):
        usual = max(signs[concept] * driven(net, split, concept, noise) for noise in shuffled(image))
        assert signs[concept] * driven(net, split, concept, image) > usual


def test_linear_layers():
    """Of a network that cuts images into patches; the mean is over patches."""

    class Patches(nn.Module):
        def forward(self, images):
            return F.unfold(images, 4, stride=4).transpose(1, 2)

    torch.manual_seed(0)
    net = nn.Sequential(Patches(), nn.Linear(48, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    split = split_of(2, layer="3")
    (shown,) = visualize_channels(net, SplitPlan([split]), input_size=16, steps=30, progress=False)
    layer = disentangle(net, SplitPlan([split]))[3].expand

    def mean(image, row):
        with torch.no_grad():
            return float(layer(net[:3](image[None, :, 2:18, 2:18]))[0, :, row].mean())

    for image, row in zip(shown.parts, [2, 6], strict=True):
        assert mean(image, row) > max(mean(noise, row) for noise in shuffled(image))


def test_the_same_seed_gives_the_same_images(net, quick):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)  # these do not matter
    (again,) = visualize_channels(net, PLAN, **QUICK)
    assert equal(again, quick)
    (other,) = visualize_channels(net, PLAN, **QUICK, seed=1)
    assert not torch.equal(other.original, quick.original)


def test_a_device_can_be_named(net, quick):
    (shown,) = visualize_channels(net, PLAN, **QUICK, device="cpu")
    assert equal(shown, quick)


def test_other_splits_make_no_difference(net, quick):
    plan = SplitPlan([split_of(1), ChannelSplit("4", 3, [[0], [1]], halves(12)), split_of(4), split_of(7)])
    shown = visualize_channels(net, plan, **QUICK)
    assert [(one.layer, one.channel) for one in shown] == [("2", 1), ("4", 3), ("2", 4), ("2", 7)]
    torch.testing.assert_close(shown[2].original, quick.original)  # the merge adds up in another order
    torch.testing.assert_close(shown[2].parts, quick.parts)


def test_all_images_start_from_the_same_noise_in_the_same_crops(net):
    seen = []
    visualize_channels(net, PLAN, **QUICK | {"steps": 1}, transform=lambda images: seen.append(images) or images)
    rehearsal, *first = [images.detach() for images in seen]
    assert rehearsal.unique().tolist() == [0.5]
    assert len(first) == 3
    assert all(torch.equal(images, first[0]) for images in first)


def test_a_split_model_gives_the_same_images(net, quick):
    (shown,) = visualize_channels(disentangle(net, PLAN), PLAN, **QUICK)
    assert equal(shown, quick)


def test_a_model_trained_since_its_split_is_shown_as_it_is(net, quick):
    split = disentangle(net, PLAN)
    with torch.no_grad():
        split[2].expand.weight[split[2].channel_index(4, 1)] *= -1
    (shown,) = visualize_channels(split, PLAN, **QUICK)
    assert torch.equal(shown.parts[0], quick.parts[0])
    assert not torch.allclose(shown.parts[1], quick.parts[1])


def test_transform_makes_what_the_network_takes():
    torch.manual_seed(0)
    grey = conv_relu_net(in_channels=1)
    (shown,) = visualize_channels(grey, PLAN, **QUICK, transform=lambda images: images.mean(1, keepdim=True))
    assert shown.parts.shape == (2, 3, 16, 16)


def test_networks_and_transforms_that_work_in_place(net):
    in_place = nn.Sequential(nn.ReLU(inplace=True), *net)
    (shown,) = visualize_channels(
        in_place, SplitPlan([split_of(4, layer="3")]), **QUICK, transform=lambda images: images.sub_(0.5)
    )
    assert shown.channel == 4


def test_lightning_modules(net, quick):
    (shown,) = visualize_channels(Classifier(net), SplitPlan([split_of(4, layer="net.2")]), **QUICK)
    assert shown.layer == "net.2"
    assert equal(shown, quick)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_small_images(net, size):
    (shown,) = visualize_channels(net, PLAN, input_size=size, steps=2, progress=False)
    assert shown.original.shape[1] == shown.original.shape[2] >= size
    assert bool(torch.isfinite(shown.parts).all())


def test_the_network_runs_up_to_the_layer(net):
    class Bomb(nn.Module):
        def forward(self, inputs):
            raise AssertionError("ran behind the layer")

    (shown,) = visualize_channels(nn.Sequential(*net[:3], Bomb()), PLAN, **QUICK)
    assert shown.channel == 4


def test_precisions_and_modes_of_the_caller_make_no_difference(net, quick):
    def shown(net=net):
        return visualize_channels(net, PLAN, **QUICK)[0]

    for mode in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16)):
        before = torch.is_grad_enabled()
        with mode:
            assert equal(shown(), quick)
        assert torch.is_grad_enabled() is before
    torch.set_default_dtype(torch.float64)
    try:
        assert equal(shown(), quick)
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert equal(shown(copy.deepcopy(net).double()), quick)
    torch.testing.assert_close(shown(copy.deepcopy(net).bfloat16()).parts, quick.parts, rtol=0, atol=0.2)


def test_compiled_networks(net, quick):
    compiled = torch.compile(copy.deepcopy(net), backend="eager")
    plan = SplitPlan([split_of(4, layer=f"_orig_mod.{LAYER}")])
    assert equal(visualize_channels(compiled, plan, **QUICK)[0], quick)
    inside = copy.deepcopy(net)
    inside.compile(backend="eager")
    assert equal(visualize_channels(inside, PLAN, **QUICK)[0], quick)


# Nothing of the user's is touched.


class Stop(BaseException):
    pass


def failing_at(call, error):
    """A transform that raises ``error`` at a certain call."""
    calls = iter(range(100))

    def transform(images):
        if next(calls) == call:
            raise error
        return images

    return transform


def condition(net):
    modules = [
        (id(module), module.training, len(module._forward_hooks), len(module._forward_pre_hooks))
        for module in net.modules()
    ]
    parameters = [(id(one), one.requires_grad, one.grad, one._version) for one in net.parameters()]
    return modules, parameters, {name: value.nan_to_num().clone() for name, value in net.state_dict().items()}


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("error", [None, RuntimeError("no more"), KeyboardInterrupt(), Stop()])
def test_the_model_is_left_as_it_was(net, split, error):
    model = disentangle(net, PLAN) if split else copy.deepcopy(net)
    model.train()
    model[4].eval().requires_grad_(False)
    model[0].register_forward_hook(lambda module, args, output: seen.append(output))
    seen = []
    modules, parameters, state = condition(model)
    if error is None:
        visualize_channels(model, PLAN, **QUICK)
    else:
        with pytest.raises(type(error)):
            visualize_channels(model, PLAN, **QUICK, transform=failing_at(5, error))
    new_modules, new_parameters, new_state = condition(model)
    assert (new_modules, new_parameters) == (modules, parameters)
    assert all(torch.equal(new_state[name], value) for name, value in state.items())
    assert seen == []


@pytest.mark.parametrize("error", [None, RuntimeError("no more"), KeyboardInterrupt()])
def test_global_states_are_left_as_they_were(net, error, capsys):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    stderr, grad, dtype = sys.stderr, torch.is_grad_enabled(), torch.get_default_dtype()
    if error is None:
        visualize_channels(net, PLAN, **QUICK)
    else:
        with pytest.raises(type(error)):
            visualize_channels(net, PLAN, **QUICK, transform=failing_at(5, error))
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert (sys.stderr, torch.is_grad_enabled(), torch.get_default_dtype()) == (stderr, grad, dtype)
    assert capsys.readouterr() == ("", "")


def test_hooks_are_gone_from_the_copy_too(net, monkeypatch):
    copies = []

    def split_copy(model, plan):
        copies.append(visualization_split_copy(model, plan))
        return copies[-1]

    visualization_split_copy = visualization.split_copy
    monkeypatch.setattr(visualization, "split_copy", split_copy)
    with pytest.raises(RuntimeError, match="no more"):
        visualize_channels(net, PLAN, **QUICK, transform=failing_at(5, RuntimeError("no more")))
    visualize_channels(net, PLAN, **QUICK)
    assert len(copies) == 2
    assert not any(module._forward_hooks for one in copies for module in one.modules())


# Progress.


def test_progress_is_shown_on_a_terminal_and_only_there(net, monkeypatch):
    bars = []

    class Bar(visualization.Progress):
        def __init__(self, **kwargs):
            bars.append(kwargs)
            super().__init__(**kwargs | {"disable": True})

        def add_task(self, description, **kwargs):
            bars[-1].update(description=description, total=kwargs["total"], done=0)
            return super().add_task(description, **kwargs)

        def advance(self, task, advance=1):
            bars[-1]["done"] += advance

    monkeypatch.setattr(visualization, "Progress", Bar)
    for progress, terminal in ((True, False), (True, True), (False, True)):
        monkeypatch.setattr(visualization.Console, "is_terminal", terminal)
        visualize_channels(net, PLAN, **QUICK | {"progress": progress})
    (bar,) = bars
    assert bar["transient"]
    assert bar["done"] == bar["total"] == 3 * QUICK["steps"]


def test_what_others_write_to_stderr_is_not_swallowed(net, capsys):
    def transform(images):
        print("from the transform", file=sys.stderr)
        return images

    visualize_channels(net, PLAN, **QUICK, transform=transform)
    assert capsys.readouterr().err == "from the transform\n" * (1 + 3 * QUICK["steps"])


# Errors.


def test_an_empty_plan_gives_nothing(net, monkeypatch):
    monkeypatch.setitem(sys.modules, "horama", None)
    assert visualize_channels(net, SplitPlan([])) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_size": 0}, "`input_size` to be an integer of at least 1, but got 0"),
        ({"input_size": 224.0}, "`input_size` to be an integer of at least 1, but got 224.0"),
        ({"steps": -1}, "`steps` to be an integer of at least 1, but got -1"),
        ({"steps": True}, "`steps` to be an integer of at least 1, but got True"),
        ({"seed": -1}, "`seed` to be an integer of at least 0, but got -1"),
        ({"transform": "normalize"}, "`transform` to be callable or None, but got 'normalize'"),
    ],
)
def test_bad_arguments(net, arguments, message):
    for plan in (PLAN, SplitPlan([])):
        with pytest.raises(ValueError, match=message):
            visualize_channels(net, plan, **arguments)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (split_of(99), r"expected a channel in \[0, 12\), but got 99"),
        (split_of(4, n_inputs=6), "expected memberships of 8 inputs, but channel 4 has 6"),
        (split_of(4, layer="conv"), "Expected layers to name modules of the model, but got 'conv'"),
        (split_of(4, layer="1"), "Expected layer `1` to be a convolution or `nn.Linear`, but got `ReLU`"),
    ],
)
def test_a_plan_that_does_not_fit(net, split, message):
    with pytest.raises(ValueError, match=message):
        visualize_channels(net, SplitPlan([split]), **QUICK)


@pytest.mark.parametrize("other", [split_of(3), ChannelSplit(LAYER, 4, [[0, 2], [1]], 1 - halves(8))])
def test_a_model_split_in_another_way(net, other):
    with pytest.raises(ValueError, match=r"channels \[4\] are not split there, or in another way"):
        visualize_channels(disentangle(net, SplitPlan([other])), PLAN, **QUICK)


@pytest.mark.parametrize(("kind", "size"), [(nn.Conv1d, 1), (nn.Conv3d, 3)])
def test_layers_that_see_no_images(kind, size):
    net = nn.Sequential(kind(2, 2, 1))
    plan = SplitPlan([split_of(0, layer="0", n_inputs=2)])
    with pytest.raises(ValueError, match=f"`0` to be an `nn.Conv2d` or `nn.Linear` .* but got `SplitConv{size}d`"):
        visualize_channels(net, plan, **QUICK)


def test_a_network_that_cannot_take_the_images():
    grey = conv_relu_net(in_channels=1)
    message = (
        r"takes images of shape \[2, 3, 12, 12\], but it failed with RuntimeError: .*expected input.* to have 1 "
        r"channels, but got 3.*Pass `transform`"
    )
    with pytest.raises(ValueError, match=message) as caught:
        visualize_channels(grey, PLAN, **QUICK)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(ValueError, match=r"takes `list`, but it failed with .*Pass `transform`"):
        visualize_channels(grey, PLAN, **QUICK, transform=list)


def test_out_of_memory_is_not_blamed_on_the_images(net):
    class Full(nn.Module):
        def forward(self, inputs):
            raise torch.OutOfMemoryError("no memory")

    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        visualize_channels(nn.Sequential(Full(), *net[1:]), PLAN, **QUICK)


def test_a_layer_that_does_not_run(net):
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = net[:2], net[2]

        def forward(self, images):
            return self.used(images)

    plan = SplitPlan([split_of(4, layer="unused")])
    with pytest.raises(ValueError, match="`unused` had no part in the forward pass"):
        visualize_channels(Half(), plan, **QUICK)


def test_no_gradient(net):
    with pytest.raises(ValueError, match=r"differentiable up to layer `2`, but its output has no gradient"):
        visualize_channels(net, PLAN, **QUICK, transform=torch.Tensor.detach)


def test_activations_that_are_not_finite(net):
    broken = copy.deepcopy(net)
    with torch.no_grad():
        broken[0].bias.fill_(torch.nan)
    with pytest.raises(
        ValueError, match=r"finite activations for images in \[0, 1\], but channel 4 of layer `2` gives nan"
    ):
        visualize_channels(broken, PLAN, **QUICK)


@pytest.mark.parametrize("missing", ["horama", "einops"])
def test_a_missing_extra_is_explained(net, monkeypatch, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == "horama"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ModuleNotFoundError, match=r"`visualize_channels` needs .* 'lightning-polydis\[viz\]'"):
        visualize_channels(net, PLAN, **QUICK)


def test_real_images_become_a_file(quick, tmp_path):
    visualization_figure([quick]).savefig(tmp_path / "picture.png", dpi=50)
    assert Image.open(tmp_path / "picture.png").width > 200


def test_no_warnings(net):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        visualize_channels(net, PLAN, **QUICK)
