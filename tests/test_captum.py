"""captum on split networks: the concepts are channels of ``<layer>.expand`` like any others."""

import copy
from types import SimpleNamespace

import pytest
import torch
from captum.attr import (
    LRP,
    LayerActivation,
    LayerConductance,
    LayerDeepLift,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    LayerLRP,
    NeuronGradient,
)
from captum.attr._utils.lrp_rules import EpsilonRule, GammaRule
from torch import nn
from torch.nn import functional as F

from lightning_polydis import ChannelSplit, SplitPlan, disentangle
from lightning_polydis.collection import RelevanceCollector
from lightning_polydis.merging import MergeChannels
from tests.networks import BottleneckNet, conv_relu_net, make_images, train_briefly

pytestmark = [
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients"),
    pytest.mark.filterwarnings("ignore:Setting forward, backward hooks"),
]


def grouped_net():
    """Layer ``"2"`` has two groups, a bias, and a batch norm behind it."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 12, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(12),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def linear_net():
    """Layer ``"2"`` is linear, with two dimensions of positions."""
    return nn.Sequential(
        nn.Linear(9, 8),
        nn.ReLU(inplace=True),
        nn.Linear(8, 12),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(3 * 9 * 12, 4),
    )


NETS = {
    "convolution": (conv_relu_net, "2"),
    "grouped": (grouped_net, "2"),
    "linear": (linear_net, "2"),
    "bottleneck": (BottleneckNet, "blocks.1.conv3"),
}


def inputs():
    images, targets = make_images(n=8)
    return images.double(), targets


def collected(net, name):
    """Our own relevances, ``[B, C]``."""
    images, targets = inputs()
    collector = RelevanceCollector(net, {name: net.get_submodule(name)})
    collector.start(targets)
    with torch.no_grad():
        net(images)
    return collector.finish()[name].relevance


def make_case(kind):
    """A trained network in ``float64``, and the same with a channel of two concepts and one of three."""
    torch.manual_seed(0)
    make, name = NETS[kind]
    net = train_briefly(make()).double()
    layer = net.get_submodule(name)
    strength = collected(net, name).abs().mean(0)
    half = len(strength) // 2  # in the grouped layer: a channel of each group
    channels = [int(strength[:half].argmax()), half + int(strength[half:].argmax())]
    splits = [
        ChannelSplit(name, channels[1], [[0], [1, 3]], torch.rand(2, layer.weight.shape[1])),
        ChannelSplit(name, channels[0], [[3], [1], [2]], torch.rand(3, layer.weight.shape[1])),
    ]
    split_net = disentangle(net, SplitPlan(splits))
    return SimpleNamespace(
        net=net,
        layer=layer,
        split_net=split_net,
        split_layer=split_net.get_submodule(name),
        splits=splits,
        name=name,
        is_linear=isinstance(layer, nn.Linear),
    )


@pytest.fixture(scope="module", params=NETS)
def shared_case(request):
    return make_case(request.param)


@pytest.fixture(scope="module", params=["convolution", "grouped", "linear"])
def shared_sequential(request):
    return make_case(request.param)


@pytest.fixture
def case(shared_case):
    yield shared_case
    assert n_hooks(shared_case.split_net) == n_hooks(shared_case.net) == 0


@pytest.fixture
def sequential(shared_sequential):
    yield shared_sequential
    assert n_hooks(shared_sequential.split_net) == n_hooks(shared_sequential.net) == 0


def n_hooks(net):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in net.modules() for kind in kinds)


def flat(case, values):
    """``[B, C, positions]``, wherever the channels are."""
    return (values.movedim(-1, 1) if case.is_linear else values).detach().flatten(2)


def parts_of(case, split):
    """Row of ``expand``, sign in ``merge``, shares of the inputs and of the bias: of each concept and the residual."""
    n, share = len(split.concepts), split.membership.double()
    for concept in range(n):
        yield case.split_layer.channel_index(split.channel, concept), 1, share[concept], 1
    yield case.split_layer.channel_index(split.channel, "residual"), -1, share.sum(0) - 1, n - 1


def rows_of(case, split):
    return [row for row, *_ in parts_of(case, split)]


def signs_of(case, split):
    return torch.tensor([sign for _, sign, *_ in parts_of(case, split)]).double()


def seen(net, module, images):
    """Input and output of a module, with their graphs."""
    kept = {}

    def hook(module, args, output):
        kept.update(input=args[0].clone(), output=output.clone())  # an in-place ReLU follows

    handle = module.register_forward_hook(hook)
    net(images)
    handle.remove()
    return kept["input"], kept["output"]


def by_hand(layer, channel, share, bias_share, x):
    """One channel of a layer with its weights scaled, input by input: ``[B, positions]``."""
    weight = layer.weight[channel].detach() * share.view(-1, *[1] * (layer.weight.ndim - 2))
    bias = 0 if layer.bias is None else layer.bias[channel].detach() * bias_share
    if isinstance(layer, nn.Linear):
        return (x * weight).sum(-1).flatten(1) + bias
    group = channel // (layer.out_channels // layer.groups)
    own = x[:, group * len(weight) : (group + 1) * len(weight)]
    windows = F.unfold(own, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    return (windows * weight.flatten()[:, None]).sum(1) + bias


def close(found, expected, tolerance=1e-10):
    scale = float(expected.detach().abs().max())
    assert scale > 0
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=0, atol=tolerance * scale)


def test_activations_of_a_row_are_those_of_its_share_of_the_weights(case):
    images, _ = inputs()
    found = flat(case, LayerActivation(case.split_net, case.split_layer.expand).attribute(images))
    x = seen(case.net, case.layer, images)[0].detach()
    for split in case.splits:
        for row, _, share, bias_share in parts_of(case, split):
            close(found[:, row], by_hand(case.layer, split.channel, share, bias_share, x))


def test_activations_of_the_rows_add_up_to_the_old_channel(case):
    images, _ = inputs()
    found = flat(case, LayerActivation(case.split_net, case.split_layer.expand).attribute(images))
    expected = flat(case, LayerActivation(case.net, case.layer).attribute(images))
    for split in case.splits:
        total = (found[:, rows_of(case, split)] * signs_of(case, split)[:, None]).sum(1)
        close(total, expected[:, split.channel])
    for module in (case.split_layer, case.split_layer.merge):
        close(flat(case, LayerActivation(case.split_net, module).attribute(images)), expected)


def gradient_x_activation(case, net, layer):
    """captum's, summed over positions: ``[B, C]``."""
    images, targets = inputs()
    return flat(case, LayerGradientXActivation(net, layer).attribute(images, targets)).sum(2)


def test_gradient_x_activation_is_our_relevance_before_and_after_the_split(case):
    expected = gradient_x_activation(case, case.net, case.layer)
    close(collected(case.net, case.name), expected)
    close(collected(case.split_net, case.name), expected)
    close(gradient_x_activation(case, case.split_net, case.split_layer), expected)


def test_gradient_x_activation_of_the_rows_adds_up_to_the_relevance_of_the_old_channel(case):
    expected = collected(case.net, case.name)
    found = gradient_x_activation(case, case.split_net, case.split_layer.expand)
    for split in case.splits:
        parts = found[:, rows_of(case, split)]
        assert (parts.abs().amax(0) > 1e-3 * expected[:, split.channel].abs().max()).all()  # none is a bystander
        close(parts.sum(1), expected[:, split.channel])


def test_our_collector_sees_the_rows_as_captum_does(case):
    found = collected(case.split_net, f"{case.name}.expand")
    close(found, gradient_x_activation(case, case.split_net, case.split_layer.expand))


def at(case, row):
    """Some position of a channel, as captum's neuron selector."""
    return (1, 4, row) if case.is_linear else (row, 2, 1)


def neuron_gradient(net, layer, selector):
    return NeuronGradient(net, layer).attribute(inputs()[0], selector)


def test_the_gradient_of_a_neuron_of_a_concept_is_autograds(case):
    images = inputs()[0].requires_grad_()
    output = seen(case.split_net, case.split_layer.expand, images)[1]
    for row in (row for split in case.splits for row in rows_of(case, split)):
        (expected,) = torch.autograd.grad(output[(slice(None), *at(case, row))].sum(), images, retain_graph=True)
        close(neuron_gradient(case.split_net, case.split_layer.expand, at(case, row)), expected)


def test_the_gradient_of_a_whole_concept_is_autograds(case):
    images = inputs()[0].requires_grad_()
    output = seen(case.split_net, case.split_layer.expand, images)[1]
    output = output.movedim(-1, 1) if case.is_linear else output
    row = case.split_layer.channel_index(case.splits[0].channel, 1)
    (expected,) = torch.autograd.grad(output[:, row].sum(), images)

    def summed(output):
        return (output[..., row] if case.is_linear else output[:, row]).sum((1, 2))

    close(neuron_gradient(case.split_net, case.split_layer.expand, summed), expected)


def test_gradients_of_the_concepts_minus_the_residuals_are_the_old_neurons(case):
    for split in case.splits:
        expected = neuron_gradient(case.net, case.layer, at(case, split.channel))
        parts = [
            sign * neuron_gradient(case.split_net, case.split_layer.expand, at(case, row))
            for row, sign, *_ in parts_of(case, split)
        ]
        assert all(float(part.abs().max()) > 1e-3 * float(expected.abs().max()) for part in parts)
        close(sum(parts), expected)


def out_of_place(net):
    """captum's integrated gradients refuse layers with an in-place ReLU behind them, split or not."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return net


@pytest.mark.parametrize(
    ("method", "settings"),
    [(LayerConductance, {"n_steps": 5}), (LayerIntegratedGradients, {"n_steps": 5}), (LayerDeepLift, {})],
)
def test_other_attributions_of_the_rows_add_up_too(method, settings, case):
    images, targets = inputs()
    nets = [out_of_place(net) for net in (case.net, case.split_net)]
    layers = [nets[0].get_submodule(case.name), nets[1].get_submodule(f"{case.name}.expand")]
    expected, found = (
        flat(case, method(net, layer).attribute(images, target=targets, **settings))
        for net, layer in zip(nets, layers, strict=True)
    )
    for split in case.splits:
        close(found[:, rows_of(case, split)].sum(1), expected[:, split.channel])
    assert [n_hooks(net) for net in nets] == [0, 0]


@pytest.mark.parametrize("part", ["", ".merge"])
def test_integrated_gradients_want_no_in_place_relu_behind_the_whole_layer(part):
    case = make_case("convolution")
    images, targets = inputs()
    message = "leaf Variable that requires grad is being used in an in-place operation"
    for net, name in ((case.net, case.name), (case.split_net, case.name + part)):
        with pytest.raises(RuntimeError, match=message):
            LayerIntegratedGradients(net, net.get_submodule(name)).attribute(images, target=targets, n_steps=2)


def test_integrated_gradients_of_the_rows_do_not_mind_an_in_place_relu():
    case = make_case("convolution")
    images, targets = inputs()
    found, expected = (
        LayerIntegratedGradients(net, net.get_submodule("2.expand")).attribute(images, target=targets, n_steps=3)
        for net in (case.split_net, out_of_place(case.split_net))
    )
    close(found, expected)


def give_rules(net):
    """To the modules that captum has none for; it takes them away after each attribution."""
    for module in net.modules():
        if isinstance(module, nn.Flatten | MergeChannels):
            module.rule = EpsilonRule()
    return net


def lrp(net, layer):
    """Relevances by captum's epsilon rule, at a module or the module of a name."""
    layer = net.get_submodule(layer) if isinstance(layer, str) else layer
    return LayerLRP(give_rules(net), layer).attribute(*inputs())


LRP_TOLERANCE = 1e-6  # captum's epsilons are 1e-9, some divisors small


def test_lrp_relevances_of_the_rows_add_up_to_those_of_the_old_channel(sequential):
    case = sequential
    expected = flat(case, lrp(case.net, case.layer))
    found = flat(case, lrp(case.split_net, case.split_layer.expand))
    for split in case.splits:
        parts = found[:, rows_of(case, split)]
        assert (parts.abs().amax((0, 2)) > 1e-3 * expected[:, split.channel].abs().max()).all()
        close(parts.sum(1), expected[:, split.channel], LRP_TOLERANCE)
    close(flat(case, lrp(case.split_net, case.split_layer.merge)), expected, LRP_TOLERANCE)


def test_lrp_gives_each_row_its_share_of_the_old_channels_output(sequential):
    case = sequential
    relevance = flat(case, lrp(case.net, case.layer))
    found = flat(case, lrp(case.split_net, case.split_layer.expand))
    x, z = (values.detach() for values in seen(case.net, case.layer, inputs()[0]))
    for split in case.splits:
        whole, own = flat(case, z)[:, split.channel], relevance[:, split.channel]
        for row, sign, share, bias_share in parts_of(case, split):
            part = sign * by_hand(case.layer, split.channel, share, bias_share, x)
            close(found[:, row], own * part / whole, LRP_TOLERANCE)


def test_lrp_at_the_input_is_that_of_the_unsplit_network(sequential):
    case, (images, targets) = sequential, inputs()
    expected, found = (LRP(give_rules(net)).attribute(images, targets) for net in (case.net, case.split_net))
    close(found, expected, LRP_TOLERANCE)


def refused(net):
    images, targets = inputs()
    with pytest.raises(TypeError, match="MergeChannels.*has no rule defined"):
        LRP(net).attribute(images, targets)


def test_lrp_needs_a_rule_for_merge_each_time():
    net = make_case("convolution").split_net
    refused(copy.deepcopy(net))
    lrp(net, net[2].expand)
    assert not any(hasattr(module, "rule") for module in net.modules())
    refused(net)


def test_a_refusal_of_lrp_leaves_rules_behind_until_they_are_deleted():
    """captum's slip, not ours: it happens to unsplit networks too (which lack a rule for `nn.Flatten`)."""
    case = make_case("convolution")
    expected = lrp(copy.deepcopy(case.split_net), "2.expand")
    refused(case.split_net)
    with pytest.raises(TypeError, match="Flatten.*has no rule defined"):
        LRP(case.net).attribute(*inputs())
    for net, name in ((case.split_net, "2.expand"), (case.net, "2")):
        with pytest.raises(AttributeError, match="'NoneType' object has no attribute 'relevance_input'"):
            lrp(net, name)
        for module in net.modules():
            module.__dict__.pop("rule", None)
        lrp(net, name)
    close(lrp(case.split_net, "2.expand"), expected)


def test_lrp_of_the_whole_layer_is_found_at_merge_only():
    case = make_case("convolution")
    with pytest.raises(AttributeError, match="'SplitConv2d' object has no attribute 'rule'"):
        lrp(case.split_net, case.split_layer)
    assert n_hooks(case.split_net) == 0


def test_lrp_of_captum_loses_relevance_at_residual_connections_split_or_not():
    case, (images, targets) = make_case("bottleneck"), inputs()
    lost = []
    for net in (case.net, case.split_net):
        _, delta = LRP(give_rules(net)).attribute(images, targets, return_convergence_delta=True)
        lost.append(delta)
    close(lost[1], lost[0], LRP_TOLERANCE)
    scores = case.net(images).gather(1, targets[:, None])[:, 0]
    assert float((lost[0].abs() / scores.abs()).detach().median()) > 0.3


def test_lrp_gives_weights_rules_and_hooks_back():
    case = make_case("convolution")
    before = copy.deepcopy(case.split_net.state_dict())
    plain = LRP(give_rules(case.split_net)).attribute(*inputs())
    case.split_layer.expand.rule = GammaRule()  # writes into the weights
    assert not torch.allclose(LRP(give_rules(case.split_net)).attribute(*inputs()), plain)
    after = case.split_net.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) or key == "2.rho" for key in before)  # NaN, here
    assert torch.equal(case.split_layer.undo().weight, case.layer.weight)
    assert not any(hasattr(module, "rule") for module in case.split_net.modules())
    assert n_hooks(case.split_net) == 0


@pytest.mark.parametrize(
    "attribute",
    [
        lambda net, layer, x: LayerGradientXActivation(net, layer).attribute(x, 99),
        lambda net, layer, x: LayerConductance(net, layer).attribute(x, target=99, n_steps=2),
        lambda net, layer, x: LayerDeepLift(net, layer).attribute(x, target=99),
        lambda net, layer, x: NeuronGradient(net, layer).attribute(x, (99, 0, 0)),
        lambda net, layer, x: LayerLRP(give_rules(net), layer).attribute(x, 99),
    ],
)
def test_no_hook_stays_after_a_failure(attribute):
    case = make_case("convolution")
    with pytest.raises(IndexError, match="index 99 is out of bounds"):
        attribute(case.split_net, case.split_layer.expand, inputs()[0])
    assert n_hooks(case.split_net) == 0
