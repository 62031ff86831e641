"""Relevances by composites: what they are, which canonizers suit a network, and what is refused in words."""

import copy
import threading

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from zennit import composites as zc
from zennit import rules as zr
from zennit.canonizers import Canonizer, NamedMergeBatchNorm, SequentialMergeBatchNorm
from zennit.core import Hook
from zennit.torchvision import ResNetCanonizer
from zennit.types import Linear

from lightning_polydis import ChannelDisentanglement, disentangle, evaluate_splits, find_polysemantic_channels
from lightning_polydis.collection import RelevanceCollector
from lightning_polydis.lrp import canonizers_for, deviation, fitted_composite, resolve_composite, with_split_rules
from lightning_polydis.replay import CompositeCollector
from lightning_polydis.settings import AnalysisSettings
from tests.architectures import NETWORKS, enliven, linear_net
from tests.networks import (
    BottleneckNet,
    Classifier,
    conv_relu_net,
    loader,
    make_batches,
    make_images,
    plain_vgg,
    plan_for,
    train_briefly,
)
from tests.norm_networks import NONE, ODD_NETS, odd_net
from tests.reference import composite_relevance
from tests.runs import SETTINGS, HeadOfBackbone, callback_for, make_trainer, n_hooks

TINY = 1e-12
ZENNIT_1 = "kwargs" in Hook.pre_forward.__code__.co_varnames
SETTINGS = {**SETTINGS, "progress": False}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


def all_epsilon():
    return zc.LayerMapComposite([*zc.layer_map_base(TINY), (Linear, zr.Epsilon(TINY))])


def records_of(net, layers, images, targets, composite=None):
    """What one pass says of some layers, collected as validation collects it."""
    modules = {name: net.get_submodule(name) for name in layers}
    keep = {"observe": lambda name, inputs: inputs.clone()}
    if composite is None:
        collector = RelevanceCollector(net, modules, **keep)
    else:
        collector = CompositeCollector(net, modules, composite=composite, **keep)
    collector.start(targets)
    with torch.no_grad():
        net(images)
    return collector.finish()


# --------------------------------------------------------------------------------------------- what relevance is


def bottleneck_net():
    net = BottleneckNet()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0  # zennit 0.5 leaves it in batch norms that it has merged
    return net.eval()


WHERE = {
    "conv": (conv_relu_net, ["2", "4"], (3, 9, 9), []),
    "bottleneck": (bottleneck_net, ["blocks.1.conv3", "blocks.0.downsample.0"], (3, 9, 9), [ResNetCanonizer]),
    "linear": (linear_net, ["3", "5"], (3, 5, 6), []),
}
COMPOSITES = {
    "epsilon_plus": zc.EpsilonPlus,
    "epsilon_plus_flat": zc.EpsilonPlusFlat,
    "epsilon_alpha2_beta1": zc.EpsilonAlpha2Beta1,
    "excitation_backprop": zc.ExcitationBackprop,
    "guided_backprop": zc.GuidedBackprop,
    "epsilon_gamma_box": lambda **kwargs: zc.EpsilonGammaBox(low=-3.0, high=3.0, **kwargs),
}


@pytest.mark.parametrize("name", COMPOSITES)
@pytest.mark.parametrize("where", WHERE)
def test_relevance_is_the_composites_gradient_at_the_layer_started_from_the_logit(where, name):
    make, layers, shape, canonizers = WHERE[where]
    net, targets = make().double().eval(), torch.arange(5) % 4
    images = torch.randn(5, *shape, dtype=torch.float64)
    own = name if name != "epsilon_gamma_box" else COMPOSITES[name]()
    found = records_of(net, layers, images, targets, resolve_composite(own))
    for layer in layers:
        none_needed = name == "guided_backprop"  # a merged batch norm would be a part of the layer
        by_hand = COMPOSITES[name](canonizers=[] if none_needed else [make() for make in canonizers])
        expected = composite_relevance(net, layer, by_hand, images, targets, starts_from_one=none_needed)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(found[layer].relevance, expected, rtol=1e-9, atol=1e-12)


def test_merged_batch_norms_divide_by_exactly_one():
    """Not by the root of 1 + ``eps``; and torch 2.10 and 2.11 refuse an ``eps`` of 0, in evaluation too."""
    torch.manual_seed(0)
    net, images = BottleneckNet().eval(), torch.randn(2, 3, 9, 9)
    split = disentangle(net, plan_for(net, "blocks.1.conv3"))
    for network in (net, split):
        norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        before = [(norm.eps, norm.running_var.clone()) for norm in norms]
        canonizers = canonizers_for(zc.EpsilonPlus(), network, lambda own=network: own(images))
        with with_split_rules(zc.EpsilonPlus(), canonizers).context(network):
            assert all(norm.eps > 0 and bool((norm.running_var + norm.eps == 1).all()) for norm in norms)
        for norm, (eps, variance) in zip(norms, before, strict=True):
            assert norm.eps == eps
            assert torch.equal(norm.running_var, variance)


@pytest.mark.parametrize("layer", ["2", "5", "9"])
def test_all_epsilon_is_gradient_x_input_where_the_network_is_piecewise_linear(layer):
    net = train_briefly(plain_vgg(), size=8).double()
    images, targets = make_images(size=8)
    plain, found = (records_of(net, [layer], images.double(), targets, c)[layer] for c in (None, all_epsilon()))
    torch.testing.assert_close(found.relevance, plain.relevance, rtol=1e-6, atol=1e-9)
    batches = [(images.double(), targets)]
    reports = [
        find_polysemantic_channels(net, batches, layer, attribution=attribution, **SETTINGS)
        for attribution in ("gradient_x_input", all_epsilon())
    ]
    assert reports[0].pairs == reports[1].pairs
    assert reports[0].channels == reports[1].channels
    assert reports[0].layers == reports[1].layers
    assert reports[0].layers[0].n_candidates > 2
    assert [report.settings["attribution"] for report in reports] == ["gradient_x_input", "LayerMapComposite"]


def test_nothing_but_relevance_changes(net):
    images, targets = make_images()
    plain, found = (records_of(net, ["2", "4"], images, targets, c) for c in (None, zc.EpsilonPlusFlat()))
    for name, record in plain.items():
        assert torch.equal(found[name].gradient, record.gradient)
        assert torch.equal(found[name].seen, record.seen)
    assert not torch.allclose(found["2"].relevance, plain["2"].relevance)
    reports = [
        find_polysemantic_channels(net, make_batches(), "2", attribution=attribution, **SETTINGS)
        for attribution in ("gradient_x_input", "epsilon_plus_flat")
    ]
    ordinary, other = (report._evidence["2"] for report in reports)
    assert torch.equal(ordinary.statistics.directions, other.statistics.directions)
    assert not torch.equal(ordinary.statistics.counts, other.statistics.counts)
    assert torch.equal(ordinary.samples.inputs, other.samples.inputs)
    assert torch.equal(ordinary.samples.targets, other.samples.targets)
    for channel in range(12):
        vectors = [evidence.vectors.groups(channel, range(4)) for evidence in (ordinary, other)]
        assert all(map(torch.equal, *vectors))


def test_the_paper_with_a_composite_is_gradient_x_input_but_for_who_is_relevant(net):
    reports = [
        find_polysemantic_channels(net, make_batches(), "2", attribution=attribution, method="paper", **SETTINGS)
        for attribution in ("gradient_x_input", "epsilon_plus_flat")
    ]
    pairs = [{(p.channel, p.class_a, p.class_b): p.cosine_similarity for p in report.pairs} for report in reports]
    common = pairs[0].keys() & pairs[1].keys()
    assert common
    assert pairs[0].keys() != pairs[1].keys()
    assert [pairs[0][key] for key in common] == [pairs[1][key] for key in common]


def test_splits_are_judged_by_the_composites_relevance(net):
    images, targets = make_images()
    plan = plan_for(net, "2")
    arguments = {"attribution": "epsilon_plus_flat", "progress": False, "relevance_threshold": 0.05}
    judged = evaluate_splits(net, plan, make_batches(), **arguments)
    assert judged == evaluate_splits(disentangle(net, plan), plan, make_batches(), **arguments)
    ordinary = evaluate_splits(net, plan, make_batches(), progress=False, relevance_threshold=0.05)
    assert judged != ordinary
    relevances = records_of(net, ["2"], images, targets, zc.EpsilonPlusFlat())["2"].relevance
    total = relevances.clamp(min=0).sum(1, keepdim=True)
    relevant = (relevances > 0) & (relevances >= 0.05 * total)
    for quality in judged:
        for concept in quality.concepts:
            own = torch.isin(targets, torch.tensor(concept.classes))
            assert (concept.kept is None) == (not relevant[own, quality.channel].any())


# ------------------------------------------------------------------------------------------------- canonizers


def merged_pairs(net, composite, images):
    """Names of layers and of the batch norms that are merged into them."""
    found = canonizers_for(composite, net, lambda: net(images))
    return [pair for each in found if isinstance(each, NamedMergeBatchNorm) for pair in each.name_map]


@pytest.mark.parametrize("name", ODD_NETS)
def test_batch_norms_are_merged_into_the_layers_that_they_read(name):
    net, expected = odd_net(name)
    images, targets = make_images(8)
    images = images.double()
    state = copy.deepcopy(net.state_dict())
    with torch.no_grad():
        if expected != NONE:
            assert merged_pairs(net, zc.EpsilonPlus(), images) == [((layer,), norm) for layer, norm in expected]
        ready, note = fitted_composite(zc.EpsilonPlus(), net, lambda: net(images))
        assert note == (NONE if expected == NONE else None)
        logits = net(images)
        with ready.context(net):
            assert deviation(net(images), logits) < 1e-9
    assert n_hooks(net) == 0
    assert torch.equal(net(images), logits)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    pairs = [] if expected == NONE else [((layer,), norm) for layer, norm in expected]
    layer = "one.conv2" if name == "dense" else "a"
    by_hand = zc.EpsilonPlus(canonizers=[NamedMergeBatchNorm(pairs)])
    found = records_of(net, [layer], images, targets, zc.EpsilonPlus())[layer].relevance
    expected = composite_relevance(net, layer, by_hand, images, targets)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "layer"),
    [("dense", "one.conv2"), ("pre-activation", "a"), ("in running order", "b"), ("also read elsewhere", "a")],
)
def test_a_split_network_has_the_relevances_of_the_network_before(name, layer):
    net, _ = odd_net(name)
    images, targets = make_images(8)
    other = "two.conv1" if name == "dense" else layer
    split = disentangle(net, plan_for(net, layer)).eval()
    before, after = (
        records_of(each, [other], images.double(), targets, zc.EpsilonAlpha2Beta1())[other].relevance
        for each in (net, split)
    )
    torch.testing.assert_close(after, before, rtol=1e-7, atol=1e-9 * float(before.abs().max()))


def test_the_report_says_that_no_canonizers_suit():
    net, _ = odd_net("also read elsewhere")
    with pytest.warns(UserWarning, match="no canonizers for this network"):
        report = find_polysemantic_channels(net.float(), make_batches(), "b", attribution="epsilon_plus", **SETTINGS)
    assert report.notes[0] == NONE


def test_what_has_no_rules_for_layers_needs_no_canonizers():
    net = bottleneck_net()
    assert canonizers_for(zc.GuidedBackprop(), net, lambda: 1 / 0) == []


REFUSED = {("vit", "encoder.layers.encoder_layer_0.mlp.3")}  # by zennit 0.5, which knows attention by one input only


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("which", [0, None])
def test_real_architectures(name, which):
    network = NETWORKS[name]
    net, layer = enliven(network.make()), None if which is None else network.layers[which]
    state = {key: (value, value.clone()) for key, value in net.state_dict(keep_vars=True).items()}
    batches = [(torch.rand(5, *network.shape), torch.arange(5)) for _ in range(2)]
    arguments = (net, batches, layer)
    if (name, layer) in REFUSED and not ZENNIT_1:
        with pytest.raises(ValueError, match=r"`EpsilonPlusFlat` .* on `VisionTransformer` .*Pass one whose rules"):
            find_polysemantic_channels(*arguments, attribution="epsilon_plus_flat", **SETTINGS)
    else:
        report = find_polysemantic_channels(*arguments, attribution="epsilon_plus_flat", **SETTINGS)
        assert (report.n_images, report.notes) == (10, [])
        assert report.layers[0].name == (layer or network.chosen)
    now = net.state_dict(keep_vars=True)
    assert now.keys() == state.keys()
    assert all(now[key] is tensor and torch.equal(tensor, value) for key, (tensor, value) in state.items())
    assert n_hooks(net) == 0


def test_batch_norms_with_a_large_epsilon_are_merged_exactly():
    net = enliven(NETWORKS["mobilenet"].make()).double()
    assert max(getattr(module, "eps", 0) for module in net.modules()) == 1e-3
    images = torch.rand(2, *NETWORKS["mobilenet"].shape, dtype=torch.float64)
    with torch.no_grad():
        before = net(images)
        composite = with_split_rules(zc.EpsilonPlus(), canonizers_for(zc.EpsilonPlus(), net, lambda: net(images)))
        with composite.context(net):
            torch.testing.assert_close(net(images), before, rtol=0, atol=1e-9)
        assert torch.equal(net(images), before)


# ---------------------------------------------------------------------------------------------- refused in words


BAD = [
    (
        "epsilon_pluss",
        r"`attribution` to be a zennit composite or one of .*'epsilon_pluss'. Closest names: .*epsilon_plus",
    ),
    (zc.EpsilonPlus, r"but got <class .*EpsilonPlus'>. Pass an instance: `EpsilonPlus\(\)`"),
    (
        "epsilon_gamma_box",
        r"`attribution='epsilon_gamma_box'` needs arguments .*'low' and 'high'.*EpsilonGammaBox\(...\)`",
    ),
    (3.0, "`attribution` to be a zennit composite or one of 'gradient_x_input', .*, but got 3.0"),
    (None, "`attribution` to be a zennit composite or one of 'gradient_x_input', .*, but got None"),
    (["epsilon_plus"], r"`attribution` to be a zennit composite .*, but got \['epsilon_plus'\]"),
]


@pytest.mark.parametrize(("attribution", "message"), BAD, ids=str)
def test_what_is_no_composite_is_refused_everywhere(attribution, message, net):
    with pytest.raises(MisconfigurationException, match=message):
        ChannelDisentanglement(attribution=attribution)
    for call in (
        lambda: AnalysisSettings(attribution=attribution),
        lambda: find_polysemantic_channels(net, make_batches(), attribution=attribution),
        lambda: evaluate_splits(net, plan_for(net, "2"), make_batches(), attribution=attribution),
    ):
        with pytest.raises(ValueError, match=message):
            call()


class Nothing(Hook):
    def backward(self, module, grad_input, grad_output):
        return (0 * grad_input[0],)


class Failing(Hook):
    def backward(self, module, grad_input, grad_output):
        raise ArithmeticError("in the backward pass")


class FailingCanonizer(Canonizer):
    def apply(self, root_module):
        raise ArithmeticError("in the canonizer")

    def register(self):
        pass

    def remove(self):
        pass


class Locked(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.lock = conv_relu_net(), threading.Lock()

    def forward(self, images):
        return self.net(images)


class Generating(Locked):
    def __init__(self):
        super().__init__()
        self.lock, self.names = None, (name for name in "ab")


class Different(nn.Module):
    """Something else at each call."""

    def __init__(self):
        super().__init__()
        self.net = conv_relu_net()

    def forward(self, images):
        return self.net(images + 0.5 * torch.randn_like(images))


class Stubborn(Different):
    """Fails when it is called again."""

    def forward(self, images):
        if hasattr(self, "called"):
            raise ArithmeticError("once only")
        self.called = True
        return self.net(images)


def dense_net():
    return odd_net("dense")[0].float()


def merging(*pairs):
    return zc.EpsilonPlus(canonizers=[NamedMergeBatchNorm([((layer,), norm) for layer, norm in pairs])])


FAULTS = {
    "zero": (
        conv_relu_net,
        "2",
        zc.LayerMapComposite([(nn.Linear, Nothing())]),
        "`LayerMapComposite` gives all channels of",
    ),
    "wrong order": (
        dense_net,
        "one.conv1",
        zc.EpsilonPlus(canonizers=[SequentialMergeBatchNorm()]),
        "cannot be used on",
    ),
    "wrong pair": (dense_net, "one.conv1", merging(("one.conv1", "two.norm2")), "output changes by .* of its largest"),
    "no such pair": (dense_net, "one.conv1", merging(("one.conv1", "norm")), "cannot be used on .* .KeyError: 'norm'"),
    "canonizer": (
        conv_relu_net,
        "2",
        zc.EpsilonPlus(canonizers=[FailingCanonizer()]),
        "ArithmeticError: in the canonizer",
    ),
    "backward": (
        conv_relu_net,
        "2",
        zc.LayerMapComposite([(nn.Linear, Failing())]),
        "ArithmeticError: in the backward",
    ),
    "lock": (Locked, "net.2", "epsilon_plus", "a network that can be copied, .* `.*` cannot .TypeError: cannot pickle"),
    "generator": (
        Generating,
        "net.2",
        "epsilon_plus",
        "a network that can be copied, .* `.*` cannot .TypeError: cannot pickle",
    ),
    "random": (Different, "net.2", "epsilon_plus", "computes the same at each call, but the logits .* deviate by"),
    "once": (Stubborn, "net.2", "epsilon_plus", "ArithmeticError: once only"),
}


class Direct(Classifier):
    def validation_step(self, batch, batch_idx):
        self.net(batch[0])


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_used_is_refused_in_words_and_leaves_nothing_behind(name, tmp_path):
    make, layer, attribution, message = FAULTS[name]
    net = make().eval()
    module = Direct(make())
    module.net.load_state_dict(net.state_dict())
    tensors = {key: (value, value.clone()) for key, value in module.state_dict(keep_vars=True).items()}
    net.train()
    random_state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        find_polysemantic_channels(net, make_batches(), layer, attribution=attribution, **SETTINGS)
    assert torch.equal(torch.get_rng_state(), random_state) or name == "random"
    assert all(part.training for part in net.modules())
    trainer = make_trainer(tmp_path, callback_for(f"net.{layer}", attribution=attribution, dirpath=tmp_path))
    with pytest.raises(MisconfigurationException, match=message):
        trainer.validate(module, loader(), verbose=False)
    for each in (net, module):
        assert n_hooks(each) == 0
        assert all(parameter.requires_grad for parameter in each.parameters())
    now = module.state_dict(keep_vars=True)
    assert all(now[key] is tensor and torch.equal(tensor, value) for key, (tensor, value) in tensors.items())
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert trainer.validate_loop.inference_mode
    assert not list(tmp_path.rglob("*.json"))
    if not isinstance(attribution, str):
        assert not attribution.handles


def test_a_head_that_runs_by_itself_is_refused_in_words(tmp_path):
    module = HeadOfBackbone()
    trainer = make_trainer(tmp_path, callback_for("backbone.2", attribution="epsilon_plus", logits_module="head"))
    with pytest.raises(
        MisconfigurationException, match=r"`head` does not run within the `Sequential` .*gradient_x_input"
    ):
        trainer.validate(module, loader(), verbose=False)
    assert n_hooks(module) == 0
