"""Heat maps and relevances of concept channels, against autograd on a network that is split by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zennit.composites import EpsilonPlus, LayerMapComposite, layer_map_base
from zennit.rules import Epsilon
from zennit.types import Linear

from lightning_polydis import ChannelSplit, SplitPlan, concept_heatmaps, disentangle
from lightning_polydis.heatmaps import CHUNK, concept_relevances
from tests.networks import BottleneckNet, conv_relu_net, make_images, train_briefly

LAYER, CHANNEL = "2", 5


def make_plan(n_inputs=8, layer=LAYER, directions=None):
    membership = torch.rand(2, n_inputs, generator=torch.Generator().manual_seed(3))
    return SplitPlan([ChannelSplit(layer, CHANNEL, [[0, 2], [1]], membership, directions=directions)])


@pytest.fixture(scope="module")
def images():
    return make_images(20)[0]


@pytest.fixture(scope="module")
def targets():
    return make_images(20)[1]


def parts_by_hand(net, plan, images, targets):
    """Outputs of the parts, and gradient of the logit at the channel, with a graph to the images, in ``float64``."""
    net, images = copy.deepcopy(net).double(), images.double().requires_grad_()
    layer, membership = net[2], plan.splits[0].membership.double()
    features = net[1](net[0](images))
    shares = [*membership, membership.sum(0) - 1]
    own = layer.weight[CHANNEL]
    biases = [layer.bias[CHANNEL]] * 3  # two concepts: the residual holds the bias once
    parts = [
        F.conv2d(features, (share[:, None, None] * own)[None], bias[None], layer.stride, layer.padding, layer.dilation)
        for share, bias in zip(shares, biases, strict=True)
    ]
    z = layer(features).detach().requires_grad_()
    logits = net[3:](z.clone())
    (gradient,) = torch.autograd.grad(logits.gather(1, targets[:, None]).sum(), z)
    return images, [part[:, 0] for part in parts], gradient[:, CHANNEL]


def test_gradient_x_input_through_each_concept(net, images, targets):
    plan = make_plan()
    found = concept_heatmaps(net, plan, images, targets, attribution="gradient_x_input")[0]
    inputs, parts, gradient = parts_by_hand(net, plan, images, targets)
    expected = [
        (torch.autograd.grad(part, inputs, gradient, retain_graph=True)[0] * inputs).detach().sum(1) for part in parts
    ]
    torch.testing.assert_close(found.parts, torch.stack(expected[:2], 1).float(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.original, (expected[0] + expected[1] - expected[2]).float(), rtol=1e-4, atol=1e-6)


def test_relevances_of_parts(net, images, targets):
    plan = make_plan()
    (found,) = concept_relevances(net, plan, images, targets, attribution="gradient_x_input")
    _, parts, gradient = parts_by_hand(net, plan, images, targets)
    expected = [(sign * part * gradient).detach().sum((1, 2)) for sign, part in zip((1, 1, -1), parts, strict=True)]
    torch.testing.assert_close(found, torch.stack(expected, 1).float(), rtol=1e-4, atol=1e-6)


def test_epsilon_is_gradient_x_input_without_biases(images, targets):
    torch.manual_seed(0)
    net = train_briefly(conv_relu_net())
    for module in net.modules():
        if getattr(module, "bias", None) is not None:
            module.bias.data.zero_()
    net = net.double()
    epsilon = LayerMapComposite([*layer_map_base(1e-12), (Linear, Epsilon(1e-12))])
    both = [
        concept_heatmaps(net, make_plan(), images, targets, attribution=attribution)[0]
        for attribution in (epsilon, "gradient_x_input")
    ]
    scale = both[1].original.abs().max()
    torch.testing.assert_close(both[0].parts, both[1].parts, rtol=1e-3, atol=1e-4 * float(scale))
    torch.testing.assert_close(both[0].original, both[1].original, rtol=1e-3, atol=1e-4 * float(scale))


def test_maps_add_up_to_the_relevance_that_passes_through_the_channel(images, targets):
    """Bias-free, so that z+ keeps what arrives at a part on its way down."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 12, 3, bias=False), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4, bias=False)),
    )
    net = train_briefly(net)
    found = concept_heatmaps(net, make_plan(), images, targets, attribution="epsilon_plus")[0]
    (relevances,) = concept_relevances(net, make_plan(), images, targets, attribution=EpsilonPlus())
    assert relevances.abs().max() > 0.01
    torch.testing.assert_close(found.parts.sum((2, 3)), relevances[:, :2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.original.sum((1, 2)), relevances.sum(1), rtol=1e-3, atol=1e-4)


def test_activation_maps_have_the_direction_of_their_concept(net, images):
    plan = make_plan(directions=[-1, 1])
    found = concept_heatmaps(net, plan, images, attribution="activation")[0]
    split = disentangle(net, plan)
    rows = [split[2].channel_index(CHANNEL, concept) for concept in (0, 1)]
    with torch.no_grad():
        z, expanded = net[:3](images)[:, [CHANNEL]], split[2].expand(split[:2](images))[:, rows]
    expected = (expanded * torch.tensor([-1.0, 1.0])[:, None, None]).clamp(min=0)
    size = images.shape[2:]
    torch.testing.assert_close(found.parts, F.interpolate(expected, size, mode="bilinear"))
    whole = F.interpolate(z.clamp(min=0), size, mode="bilinear")[:, 0]  # a tie: as in the paper, positive
    torch.testing.assert_close(found.original, whole)


def test_the_plans_order_and_several_layers(net, images, targets):
    plan = SplitPlan([ChannelSplit("4", 3, [[0], [1]], torch.rand(2, 12)), *make_plan()])
    found = concept_heatmaps(net, plan, images, targets, attribution="gradient_x_input")
    assert [(maps.layer, maps.channel) for maps in found] == [("4", 3), (LAYER, CHANNEL)]
    alone = concept_heatmaps(net, make_plan(), images, targets, attribution="gradient_x_input")[0]
    torch.testing.assert_close(found[1].parts, alone.parts, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("attribution", ["gradient_x_input", "epsilon_plus_flat", "activation"])
def test_split_and_unsplit_models_give_the_same(net, images, targets, attribution):
    plan = make_plan()
    both = [
        concept_heatmaps(model, plan, images, targets, attribution=attribution)[0]
        for model in (net, disentangle(net, plan))
    ]
    torch.testing.assert_close(both[0].parts, both[1].parts, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attribution", ["gradient_x_input", "epsilon_plus", "activation"])
def test_more_images_than_pass_at_once(net, attribution):
    images, targets = make_images(CHUNK + 3)
    whole = concept_heatmaps(net, make_plan(), images, targets, attribution=attribution)[0]
    last = concept_heatmaps(net, make_plan(), images[-3:], targets[-3:], attribution=attribution)[0]
    torch.testing.assert_close(whole.parts[-3:], last.parts, rtol=1e-4, atol=1e-6)


def test_without_targets_the_largest_logit_is_explained(net, images):
    with torch.no_grad():
        targets = net(images).argmax(1)
    named, found = (
        concept_heatmaps(net, make_plan(), images, wanted, attribution="gradient_x_input")[0]
        for wanted in (targets, None)
    )
    assert torch.equal(named.parts, found.parts)


def test_residual_connections_and_batch_norms(images, targets):
    torch.manual_seed(0)
    net = train_briefly(BottleneckNet())
    plan = make_plan(8, "blocks.1.conv3")
    found = concept_heatmaps(net, plan, images, targets, attribution="epsilon_plus")[0]
    assert found.original.abs().sum() > 0
    (relevances,) = concept_relevances(net, plan, images, targets, attribution="epsilon_plus")
    assert relevances.shape == (20, 3)


def test_linear_layers(images, targets):
    torch.manual_seed(0)
    net = train_briefly(
        nn.Sequential(nn.Flatten(), nn.Linear(243, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    )
    plan = make_plan(16, "3")
    assert concept_heatmaps(net, plan, images, targets, attribution="epsilon_plus")[0].parts.shape == (20, 2, 9, 9)
    with pytest.raises(ValueError, match=r"Expected layer `3` to put out maps .* but got \[16, 10\]"):
        concept_heatmaps(net, plan, images, attribution="activation")


def test_logits_module_and_logits_fn(net, images, targets):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(net)

        def forward(self, x):
            return {"features": x, "scores": self.net(x)}

    plan = SplitPlan([ChannelSplit("net.2", CHANNEL, [[0, 2], [1]], make_plan().splits[0].membership)])
    expected = concept_heatmaps(net, make_plan(), images, targets)[0]
    for place in ({"logits_module": "net"}, {"logits_fn": lambda output: output["scores"]}):
        found = concept_heatmaps(Two(), plan, images, targets, **place)[0]
        torch.testing.assert_close(found.parts, expected.parts)


@pytest.mark.parametrize("attribution", ["gradient_x_input", "epsilon_plus", "activation"])
def test_the_network_is_left_alone(net, images, targets, attribution):
    net = copy.deepcopy(net).train()
    before = {name: (value, value.clone(), value.requires_grad) for name, value in net.named_parameters()}
    calls = []
    net[2].register_forward_hook(lambda *_: calls.append(1))
    random = torch.get_rng_state()
    with torch.no_grad():
        concept_heatmaps(net, make_plan(), images, targets, attribution=attribution)
        assert not torch.is_grad_enabled()
    assert not calls
    assert torch.equal(random, torch.get_rng_state())
    assert all(module.training for module in net.modules())
    for name, value in net.named_parameters():
        assert value is before[name][0]
        assert torch.equal(value, before[name][1])
        assert value.requires_grad == before[name][2]
        assert value.grad is None


def test_under_inference_mode(net, images, targets):
    with torch.inference_mode():
        found = concept_heatmaps(net, make_plan(), images, targets, attribution="epsilon_plus")[0]
    assert found.parts.abs().sum() > 0


WRONG = {
    "images of integers": ({"images": torch.zeros(2, 3, 9, 9, dtype=torch.uint8)}, r"`images` .*uint8 of shape \[2, 3"),
    "flat images": ({"images": torch.zeros(2, 27)}, r"floating point tensor \[N, C, H, W\], but got .* \[2, 27\]"),
    "no image": ({"images": torch.zeros(0, 3, 9, 9)}, "Expected at least one image, but got none"),
    "too few targets": ({"targets": torch.zeros(3, dtype=torch.long)}, r"`targets` to hold 20 class indices.*\[3\]"),
    "targets out of range": ({"targets": torch.full((20,), 9)}, r"class indices in \[0, 4\), but got values from 9"),
    "unknown name": ({"attribution": "epsilon_plos"}, "Closest names: .*`epsilon_plus`"),
    "no such channel": (
        {"plan": SplitPlan([ChannelSplit(LAYER, 99, [[0], [1]], torch.rand(2, 8))])},
        r"expected a channel in \[0, 12\), but got 99",
    ),
    "unknown module": ({"logits_module": "head"}, "`logits_module` to name a module"),
    "no logits": ({"logits_module": "0"}, r"Expected `0` to return logits of shape \[16, num_classes\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input(net, images, targets, case):
    changed, message = WRONG[case]
    arguments = {"plan": make_plan(), "images": images, "targets": targets, **changed}
    with pytest.raises(ValueError, match=message):
        concept_heatmaps(net, arguments.pop("plan"), arguments.pop("images"), arguments.pop("targets"), **arguments)


def test_activation_is_no_relevance(net, images, targets):
    with pytest.raises(ValueError, match="to be a relevance, but got 'activation'"):
        concept_relevances(net, make_plan(), images, targets, attribution="activation")


def test_a_layer_that_does_not_matter(images, targets):
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x):
            self.idle(x)
            return self.head(self.used(x).mean((2, 3)))

    plan = make_plan(3, "idle")
    with pytest.raises(ValueError, match="The logits do not depend on layer `idle`"):
        concept_heatmaps(Idle(), plan, images, targets, attribution="gradient_x_input")


def test_a_layer_that_does_not_run(images, targets):
    net = conv_relu_net()
    net.add_module("spare", nn.Conv2d(3, 8, 3))
    net.forward = lambda x: nn.Sequential(*list(net.children())[:-1])(x)
    with pytest.raises(ValueError, match="Expected every layer of the plan to run, but `spare` did not"):
        concept_heatmaps(net, make_plan(3, "spare"), images, targets, attribution="gradient_x_input")


def test_an_empty_plan_shows_nothing(net, images, targets):
    assert concept_heatmaps(net, SplitPlan([]), images, targets) == []
    assert concept_relevances(net, SplitPlan([]), images, targets) == []


def test_random_numbers_are_put_back_after_an_error(images, targets):
    class Draws(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            torch.rand(3)
            raise RuntimeError("no luck")

    draws, before = Draws(), torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no luck"):
        concept_heatmaps(draws, make_plan(3, "conv"), images, targets, attribution="gradient_x_input")
    assert torch.equal(before, torch.get_rng_state())
