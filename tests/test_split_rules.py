"""Split networks under zennit's rules, against the network before the split and against rules written out by hand."""

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from zennit import composites as zc
from zennit import rules as zr
from zennit.core import Composite, Hook
from zennit.torchvision import ResNetCanonizer
from zennit.types import Convolution, Linear

from lightning_polydis import ChannelSplit, disentangle
from lightning_polydis.layers import channel_count
from lightning_polydis.lrp import SplitMergeBatchNorm, with_split_rules
from lightning_polydis.merging import MergeChannels
from lightning_polydis.splitting import SplitLayer, split_layer
from tests.architectures import enliven
from tests.networks import SPLIT_KINDS, BottleneckNet, PlainResNet, memberships, plain_vgg, plan_for
from tests.reference import parts_by_hand

TINY = 1e-12  # a stabilizer


def everywhere(rule, **kwargs):
    return zc.LayerMapComposite([*zc.layer_map_base(TINY), (Linear, rule)], **kwargs)


RULES = {
    "epsilon_plus": lambda tiny=TINY: zc.EpsilonPlus(tiny, tiny),
    "epsilon_plus_flat": lambda tiny=TINY: zc.EpsilonPlusFlat(tiny, tiny),
    "epsilon_alpha2_beta1": lambda tiny=TINY: zc.EpsilonAlpha2Beta1(tiny, tiny),
    "epsilon_alpha2_beta1_flat": lambda tiny=TINY: zc.EpsilonAlpha2Beta1Flat(tiny, tiny),
    "epsilon_gamma_box": lambda tiny=TINY: zc.EpsilonGammaBox(low=-3.0, high=3.0, epsilon=tiny, stabilizer=tiny),
    "excitation_backprop": lambda tiny=TINY: zc.ExcitationBackprop(tiny),
    "z_plus": lambda tiny=TINY: everywhere(zr.ZPlus(tiny)),
    "z_plus without biases": lambda tiny=TINY: everywhere(zr.ZPlus(tiny, zero_params="bias")),
    "epsilon": lambda tiny=TINY: everywhere(zr.Epsilon(tiny)),
    "gamma": lambda tiny=TINY: everywhere(zr.Gamma(stabilizer=tiny)),
    "alpha2_beta1": lambda tiny=TINY: everywhere(zr.AlphaBeta(2, 1, tiny)),
    "w_square": lambda tiny=TINY: everywhere(zr.WSquare(tiny)),
    "flat": lambda tiny=TINY: everywhere(zr.Flat(tiny)),
}
BY_SIGN = [
    name for name in RULES if any(word in name for word in ("plus", "alpha", "excitation"))
]  # they lose a little
OTHERS = {
    "guided_backprop": lambda tiny: zc.GuidedBackprop(),
    "deconvnet": lambda tiny: zc.DeconvNet(),
    "beta_smooth": lambda tiny: zc.BetaSmooth(),
}


def linear_layers(net):
    return [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def explained(net, composite, images, keep=None):
    """Heat map of the first logits, and relevances by layer: of its input, of its output and, if split, of its parts.

    ``keep``: layer -> what each row of ``expand`` keeps of its relevance.
    """
    found, handles = {}, []

    def watch(key, factor=None):
        def hook(gradient):
            found[key] = gradient.detach()
            return None if factor is None else gradient * factor

        return hook

    def entering(name):
        def hook(module, args):
            own = args[0].clone()  # what others read of the same tensor does not count
            own.register_hook(watch((name, "input")))
            return own

        return hook

    def leaving(key, factor=None):
        return lambda module, args, output: output.register_hook(watch(key, factor)) and None

    images = images.clone().requires_grad_()
    layers = {name: m for name, m in net.named_modules() if isinstance(m, SplitLayer | Linear)}
    for name, module in layers.items():
        handles.append(module.register_forward_pre_hook(entering(name)))  # before zennit changes what is passed back
    with composite.context(net):
        for name, module in layers.items():
            handles.append(module.register_forward_hook(leaving((name, "output"))))
            if isinstance(module, SplitLayer):
                factor = (keep or {}).get(name)
                handles.append(module.expand.register_forward_hook(leaving((name, "parts"), factor)))
        logits = net(images)
        start = torch.zeros_like(logits)
        start[:, 0] = logits.detach()[:, 0]
        (heat_map,) = torch.autograd.grad(logits, images, start)
    for handle in handles:
        handle.remove()
    return heat_map, found


def folded(layer, parts):
    """Relevance of the parts of each channel, added up one by one."""
    parts, (own, _) = parts.movedim(layer.channel_dim, 0), layer._rows()
    split = layer.channels.tolist()
    rows = [layer.part_rows(channel) if channel in split else [int(own[channel])] for channel in range(len(own))]
    return torch.stack([sum(parts[row] for row in some) for some in rows]).movedim(0, layer.channel_dim)


def assert_close(found, expected, tolerance):
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def images_for(dtype=torch.float64, size=8, n=3):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1)


# -------------------------------------------------------------------------------- heat maps and sums are kept


@pytest.mark.parametrize(("dtype", "tiny", "tolerance"), [(torch.float64, TINY, 1e-12), (torch.float32, 1e-6, 1e-4)])
@pytest.mark.parametrize("name", [*RULES, *OTHERS])
@pytest.mark.parametrize("make", [plain_vgg, PlainResNet, lambda: plain_vgg(bias=True)], ids=["vgg", "resnet", "bias"])
def test_the_heat_map_is_that_of_the_network_before_the_split(make, name, dtype, tiny, tolerance):
    net, images, composite = make().to(dtype), images_for(dtype), {**RULES, **OTHERS}[name]
    split = disentangle(net, plan_for(net, *linear_layers(net)[:-1]))
    before, _ = explained(net, composite(tiny), images)
    after, _ = explained(split, with_split_rules(composite(tiny)), images)
    assert_close(after, before, tolerance)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("make", [plain_vgg, PlainResNet], ids=["vgg", "resnet"])
def test_the_sum_is_kept_across_merge_and_across_the_layer(make, name):
    net, images = make().double(), images_for()
    layers = linear_layers(net)[:-1]
    split = disentangle(net, plan_for(net, *layers))
    _, before = explained(net, RULES[name](), images)
    _, found = explained(split, with_split_rules(RULES[name]()), images)
    for layer in layers:
        own, parts = split.get_submodule(layer), found[layer, "parts"]
        assert_close(found[layer, "output"], before[layer, "output"], 1e-9)
        assert_close(found[layer, "input"], before[layer, "input"], 1e-9)
        assert_close(parts.flatten(1).sum(1), found[layer, "input"].flatten(1).sum(1), 1e-9)
        if layer != "down" or name not in BY_SIGN:
            assert_close(folded(own, parts), found[layer, "output"], 1e-9)
            assert_close(found[layer, "input"].flatten(1).sum(1), found[layer, "output"].flatten(1).sum(1), 1e-9)


def test_where_the_rule_loses_relevance_itself_the_parts_get_what_it_passes_on():
    """The shortcut of a residual block: a channel may be negative and have relevance, which z+ gives to nobody."""
    net, images = PlainResNet().double(), images_for()
    split = disentangle(net, plan_for(net, "down"))
    _, before = explained(net, RULES["epsilon_plus"](), images)
    _, found = explained(split, with_split_rules(RULES["epsilon_plus"]()), images)
    whole, parts, passed = (found["down", key].sum() for key in ("output", "parts", "input"))
    assert abs(whole - passed) > 1e-5 * abs(whole)
    torch.testing.assert_close(parts, passed)
    torch.testing.assert_close(passed, before["down", "input"].sum())


GEOMETRIES = [
    nn.Conv2d(6, 9, 1, bias=False),
    nn.Conv2d(6, 9, 3, stride=2, padding=1),
    nn.Conv2d(6, 9, 3, dilation=2, padding=2, padding_mode="reflect"),
    nn.Conv2d(6, 9, (3, 2), padding="same", padding_mode="circular"),
    nn.Conv2d(6, 9, 3, stride=(2, 1), padding=(0, 1), padding_mode="replicate"),
    nn.Conv2d(18, 9, 3, padding="same", groups=3),
    nn.Conv1d(6, 9, 3, padding=1),
    nn.Conv1d(18, 9, 1, groups=3, bias=False),
    nn.Conv3d(6, 9, 2, bias=False),
    nn.Conv3d(6, 9, (1, 3, 2), stride=(1, 2, 1)),
    nn.Linear(6, 9),
    nn.Linear(6, 9, bias=False),
]
SOME_RULES = [
    "epsilon_plus_flat",
    "epsilon_gamma_box",
    "z_plus",
    "epsilon_alpha2_beta1",
    "epsilon",
    "w_square",
    "gamma",
]


class Around(nn.Module):
    """A layer as it is, or behind another, and a head on all its positions."""

    def __init__(self, layer, shape, first):
        super().__init__()
        self.before = nn.Identity() if first else nn.Sequential(anew(layer), nn.ReLU(), nn.Flatten())
        if not first:
            size = self.before(torch.zeros(1, *shape)).shape[1]
            self.before.extend([nn.Linear(size, shape.numel()), nn.ReLU(), nn.Unflatten(1, shape)])
        self.layer, self.relu = layer, nn.ReLU()
        self.head = nn.Linear(layer(torch.zeros(1, *shape)).numel(), 3)

    def forward(self, x):
        return self.head(self.relu(self.layer(self.before(x))).flatten(1))


def anew(layer):
    """The same layer with weights of this test's own."""
    layer = copy.deepcopy(layer)
    layer.reset_parameters()
    return layer


def shapes_for(layer):
    if isinstance(layer, nn.Linear):
        return [torch.Size([6]), torch.Size([4, 6]), torch.Size([2, 3, 6])]
    return [torch.Size([layer.in_channels, *[5] * len(layer.kernel_size)])]


@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("name", SOME_RULES)
@pytest.mark.parametrize("layer", GEOMETRIES, ids=str)
def test_every_kind_of_layer_is_explained_as_before_the_split(layer, name, first):
    for shape in shapes_for(layer):
        net = Around(anew(layer), shape, first).double()
        x = torch.rand(2, *shape, dtype=torch.float64)
        split = disentangle(net, plan_for(net, "layer"))
        before, _ = explained(net, RULES[name](), x)
        after, found = explained(split, with_split_rules(RULES[name]()), x)
        assert_close(after, before, 1e-10)
        if name in ("epsilon", "w_square"):  # the others may have nothing to give relevance to
            assert_close(folded(split.layer, found["layer", "parts"]), found["layer", "output"], 1e-8)


def test_a_split_that_was_trained_on_is_explained_as_the_layer_it_folds_to():
    net = plain_vgg(bias=True).double()
    split = disentangle(net, plan_for(net, "2", "5"))
    with torch.no_grad():
        for name in ("2", "5"):
            for parameter in split.get_submodule(name).expand.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    whole = copy.deepcopy(split)
    whole[2], whole[5] = whole[2].undo(), whole[5].undo()
    for name in RULES:
        before, _ = explained(whole, RULES[name](), images_for())
        after, found = explained(split, with_split_rules(RULES[name]()), images_for())
        assert_close(after, before, 1e-10)
        if name not in BY_SIGN:
            assert_close(folded(split[2], found["2", "parts"]), found["2", "output"], 1e-9)


# --------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("kind", SPLIT_KINDS, ids=str)
@pytest.mark.parametrize(
    ("name", "bias"), [("epsilon", 0.4), ("z_plus", 0.4), ("alpha2_beta1", 0.4), ("alpha2_beta1", -0.4)]
)
def test_parts_get_and_pass_on_what_the_definitions_say(name, bias, kind):
    generator = torch.Generator().manual_seed(4)
    layer, x = nn.Linear(5, 3).double(), torch.randn(2, 5, generator=generator, dtype=torch.float64)
    nn.init.constant_(layer.bias, bias)
    membership = memberships(kind[0], 5, kind[1], generator).double()
    split = split_layer(layer, [ChannelSplit("", 0, [[i] for i in range(kind[0])], membership)])
    net, rows = nn.Sequential(split), split.part_rows(0)
    relevance = net(x)[:, 0].tolist()
    portions, passed = parts_by_hand(layer, x, relevance, membership, name)
    for i, row in enumerate(rows):
        only = F.one_hot(torch.tensor(row), channel_count(split.expand))
        heat_map, found = explained(net, with_split_rules(RULES[name]()), x, {"0": only})
        torch.testing.assert_close(found["0", "parts"][:, rows].T, portions, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(heat_map, passed[i], rtol=1e-8, atol=1e-9)
    heat_map, _ = explained(net, with_split_rules(RULES[name]()), x)
    torch.testing.assert_close(heat_map, passed.sum(0), rtol=1e-8, atol=1e-9)


# ------------------------------------------------------------------------------------------- masks, other hooks


@pytest.mark.parametrize("name", ["epsilon_plus", "epsilon_alpha2_beta1", "epsilon", "gamma", "flat"])
def test_what_passes_through_single_parts_adds_up_to_the_whole(name):
    net, images = plain_vgg(bias=True).double(), images_for()
    split = disentangle(net, plan_for(net, "5"))
    whole, _ = explained(split, with_split_rules(RULES[name]()), images)
    eye = torch.eye(channel_count(split[5].expand), dtype=torch.float64)[..., None, None]
    maps = [explained(split, with_split_rules(RULES[name]()), images, {"5": row})[0] for row in eye]
    assert_close(sum(maps), whole, 1e-9)
    assert sum(bool(single.any()) for single in maps) > 20
    nothing = split[5].channel_index(6, 0)  # the row of a concept without sources
    assert not maps[nothing].any()
    without, _ = explained(split, with_split_rules(RULES[name]()), images, {"5": 1 - eye[0]})
    assert_close(without, whole - maps[0], 1e-9)


@pytest.mark.parametrize("kind", SPLIT_KINDS[:-1], ids=str)
def test_a_part_passes_on_its_share_of_what_the_rule_gives_to_each_source(kind):
    """Of the unsplit channel's relevance at source k part i passes on ``m[i, k]``, and the residual takes the rest."""
    layer, x = nn.Conv2d(6, 1, 3, padding=1).double(), torch.rand(2, 6, 5, 5, dtype=torch.float64)
    membership = memberships(kind[0], 6, kind[1], torch.Generator().manual_seed(0))
    split = split_layer(layer, [ChannelSplit("", 0, [[i] for i in range(kind[0])], membership)])
    alone, net = (nn.Sequential(each, nn.Flatten()) for each in (layer, split))
    shares = [*membership.double(), 1 - membership.double().sum(0)]
    for name in ("z_plus", "gamma", "flat", "epsilon"):
        whole, _ = explained(alone, RULES[name](), x)
        for row, share in zip(split.part_rows(0), shares, strict=True):
            only = F.one_hot(torch.tensor(row), channel_count(split.expand))[:, None, None]
            part, _ = explained(net, with_split_rules(RULES[name]()), x, {"0": only})
            assert_close(part, whole * share[:, None, None], 1e-9)


class Doubled(Hook):
    """No `BasicHook`: twice the gradient."""

    def backward(self, module, grad_input, grad_output):
        return (2 * grad_input[0],)


def test_behind_a_rule_of_another_kind_merge_keeps_the_sum():
    net, images = plain_vgg().double(), images_for()
    split = disentangle(net, plan_for(net, "2"))
    composite = zc.LayerMapComposite([(Convolution, Doubled()), (nn.Linear, zr.Epsilon(TINY))])
    _, found = explained(split, with_split_rules(composite), images)
    assert_close(folded(split[2], found["2", "parts"]), found["2", "output"], 1e-3)  # `Norm` has a stabilizer of 1e-6


@pytest.mark.parametrize("name", ["2", "2.expand"])
def test_a_rule_that_is_given_by_name_finds_the_split_layer(name):
    net, images = plain_vgg().double(), images_for()
    split = disentangle(net, plan_for(net, "2"))
    before, _ = explained(net, zc.NameMapComposite([(("2",), zr.Gamma(stabilizer=TINY))]), images)
    after, _ = explained(split, with_split_rules(zc.NameMapComposite([((name,), zr.Gamma(stabilizer=TINY))])), images)
    plain, _ = explained(net, Composite(), images)
    assert_close(after, before, 1e-12)
    assert not torch.allclose(before, plain)


@pytest.mark.parametrize(("layer", "heat_map_off", "sum_off"), [("2", 0.16, 0.36), ("5", 0.26, 0.11)])
def test_the_plain_alternative_keeps_the_sum_but_not_the_heat_map(layer, heat_map_off, sum_off):
    """z+ on ``expand`` as if parts were channels: with `Norm` on ``merge`` the sum is kept, and the heat map is off.

    Off by 0.16 and 0.26 of the largest value. Without a rule on ``merge`` the sum is lost there too, by 0.36 and 0.11.
    """
    net, images = plain_vgg().double(), images_for()
    split = disentangle(net, plan_for(net, layer))

    def deviations(make, **kwargs):
        before, _ = explained(net, make(), images)
        after, found = explained(split, make(**kwargs), images)
        parts, whole = (found[layer, which].sum() for which in ("parts", "output"))
        return float((after - before).abs().max() / before.abs().max()), float(abs(parts / whole - 1))

    def z_plus(layer_map=()):
        return zc.EpsilonPlus(TINY, TINY, list(layer_map))

    def epsilon(layer_map=()):
        return zc.LayerMapComposite([*layer_map, *RULES["epsilon"]().layer_map])

    norm = {"layer_map": [((MergeChannels,), zr.Norm(TINY))]}
    assert deviations(z_plus, **norm) == pytest.approx((heat_map_off, 0), abs=0.01)
    assert deviations(epsilon, **norm) == pytest.approx((0, 0), abs=1e-8)
    assert deviations(z_plus)[1] == pytest.approx(sum_off, abs=0.01)


# --------------------------------------------------------------------------------------------------- batch norms


NORMS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d, nn.Linear: nn.BatchNorm1d}


def with_norm(layer):
    norm = NORMS[type(layer)](9)
    for name, values in norm.named_parameters():
        nn.init.normal_(values, mean=0.2 if name == "weight" else 0)  # negative ones among them
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.2, 3)
    return nn.Sequential(anew(layer), norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).double().eval()


@pytest.mark.parametrize("layer", GEOMETRIES, ids=str)
def test_a_batch_norm_behind_a_split_layer_is_merged_for_a_while(layer):
    net, shape = with_norm(layer), shapes_for(layer)[0]
    x = torch.rand(2, *shape, dtype=torch.float64)
    expected = net(x).detach()
    split = disentangle(net, plan_for(net, "0")).eval()
    stores = [store for m in split.modules() for store in (m._parameters, m._buffers)]
    tensors = [dict(store) for store in stores]
    state = copy.deepcopy(split.state_dict())
    (applied,) = SplitMergeBatchNorm().apply(split)
    torch.testing.assert_close(split(x), expected)
    torch.testing.assert_close(split[0](x), split[1](split[0](x)), rtol=0, atol=0)
    applied.remove()
    assert [{name: id(t) for name, t in store.items()} for store in stores] == [
        {name: id(t) for name, t in kept.items()} for kept in tensors
    ]
    assert split.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in split.state_dict().items() if "rho" not in name)
    torch.testing.assert_close(split(x), expected)
    for name in ("z_plus", "epsilon", "gamma"):
        before, _ = explained(nn.Sequential(merged(net[0], net[1]), *net[2:]), RULES[name](), x)
        after, _ = explained(split, with_split_rules(RULES[name]()), x)
        assert_close(after, before, 1e-9)


def merged(layer, norm):
    """A layer that does what a batch norm does, too."""
    layer = copy.deepcopy(layer)
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    bias = torch.zeros_like(scale) if layer.bias is None else layer.bias.detach()
    layer.weight.data = layer.weight.data * scale.view(-1, *[1] * (layer.weight.ndim - 1))
    layer.bias = nn.Parameter(norm.bias.detach() + (bias - norm.running_mean) * scale)
    return layer


@pytest.mark.parametrize("layer", ["blocks.1.conv3", "blocks.0.downsample.0", "stem.0", "blocks.0.conv2"])
@pytest.mark.parametrize("name", ["EpsilonPlusFlat", "EpsilonAlpha2Beta1"])
def test_a_split_resnet_is_explained_as_before_the_split(name, layer):
    net, images = BottleneckNet().double().eval(), images_for()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.0  # zennit 0.5 leaves it in batch norms that it has merged
    split = disentangle(net, plan_for(net, layer)).eval()
    composite = getattr(zc, name)(canonizers=[ResNetCanonizer()])
    before, _ = explained(copy.deepcopy(net), composite, images)
    outputs = [split(images)]
    after, _ = explained(split, with_split_rules(composite), images)
    assert_close(after, before, 1e-9)
    torch.testing.assert_close(split(images), outputs[0], rtol=0, atol=0)


def test_batch_norms_that_are_merely_defined_next_are_left_alone():
    """Of another width, or because it is told so; else the order of definition decides, as it does in zennit."""
    net = enliven(nn.Sequential(nn.Conv2d(3, 9, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 9, 1), nn.BatchNorm2d(9)))
    split = disentangle(net, plan_for(net, "0", "2"))
    (applied,) = SplitMergeBatchNorm().apply(split)
    assert applied._norm is split[3]
    applied.remove()
    assert SplitMergeBatchNorm([]).apply(split) == []


# ------------------------------------------------------------------------------------------------- coming and going


def n_hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_a_composite_is_used_again_and_on_other_networks_and_leaves_nothing():
    net, images = plain_vgg().double(), images_for()
    others = [disentangle(net, plan_for(net, *names)) for names in (["2"], ["5", "9"])]
    plain = zc.EpsilonPlusFlat()
    composite = with_split_rules(plain)
    expected, _ = explained(net, zc.EpsilonPlusFlat(), images)
    for split in [others[0], *others, net]:
        found, _ = explained(split, composite, images)
        assert_close(found, expected, 1e-9)
        assert n_hooks(split) == 0
    assert not plain.handles
    assert not plain.hook_refs
    assert not composite.handles


def test_no_hook_and_no_tensor_outlives_the_context():
    net, images = plain_vgg().double(), images_for()
    split = disentangle(net, plan_for(net, "2"))
    composite = with_split_rules(zc.EpsilonPlus())
    with composite.context(split):
        rules = [{hook.__self__ for hook in m._forward_hooks.values()}.pop() for m in (split[2].expand, split[2].merge)]
        torch.autograd.grad(split(images.requires_grad_()).sum(), images)
        assert "input" in rules[0].stored_tensors
        assert "grad_output" in rules[1].stored_tensors
    assert not any(rule.stored_tensors for rule in rules)
    references = [weakref.ref(rule) for rule in rules]
    del rules
    gc.collect()
    assert [reference() for reference in references] == [None, None]


def test_inactive_rules_leave_the_gradient_alone():
    net, images = plain_vgg().double(), images_for().requires_grad_()
    split = disentangle(net, plan_for(net, "2"))
    composite = with_split_rules(zc.EpsilonPlus())
    with composite.context(split):
        logits = split(images)[:, 0].sum()
        with composite.inactive():
            (gradient,) = torch.autograd.grad(logits, images, retain_graph=True)
        (relevance,) = torch.autograd.grad(logits, images)
    (expected,) = torch.autograd.grad(net(images)[:, 0].sum(), images)
    assert_close(gradient, expected, 1e-12)
    assert not torch.allclose(relevance, expected)
