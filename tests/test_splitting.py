import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from lightning_polydis import ChannelSplit, SplitConv2d, SplitLinear, SplitPlan, disentangle
from lightning_polydis.merging import MergeChannels
from lightning_polydis.surgery import rebuild_splits, split_checked, split_deviation, split_layer, stored_plan
from tests.networks import BottleneckNet, conv_relu_net, make_images

LAYERS = [
    nn.Conv2d(6, 9, 1, bias=False),
    nn.Conv2d(6, 9, 3, stride=2, padding=1),
    nn.Conv2d(6, 9, 3, dilation=2, padding=2, padding_mode="reflect"),
    nn.Linear(6, 9),
    nn.Linear(6, 9, bias=False),
    nn.Conv1d(6, 9, 3, padding=1),
    nn.Conv3d(6, 9, 2, bias=False),
    nn.Conv2d(18, 9, 3, padding="same", groups=3),
    nn.Conv1d(18, 9, 1, groups=3, bias=False),
]


def inputs_for(layer, n=4, dtype=torch.float32):
    shape = (n, 3, 6) if isinstance(layer, nn.Linear) else (n, layer.in_channels, *[8] * len(layer.kernel_size))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def some_splits(n_inputs=6, soft=False, name="layer"):
    """Channels 7 and 2, two and three concepts."""
    generator = torch.Generator().manual_seed(1)
    shares = [torch.rand(count, n_inputs, generator=generator) for count in (2, 3)]
    shares = shares if soft else [(share > 0.5).float() for share in shares]
    return [
        ChannelSplit(name, 7, [[0], [1, 3]], shares[0], rho=0.35),
        ChannelSplit(name, 2, [[5], [1], [2]], shares[1]),
    ]


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_output_before_during_and_after(layer, soft, dtype, tolerance):
    layer = copy.deepcopy(layer).to(dtype)
    x = inputs_for(layer, dtype=dtype)
    before = layer(x)
    split = split_layer(layer, some_splits(soft=soft))
    during = split(x)
    after = split.undo()(x)
    scale = float(before.abs().max())
    torch.testing.assert_close(during, before, rtol=0, atol=tolerance * scale)
    assert torch.equal(after, before)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_undo_gives_every_weight_back(layer, soft):
    split = split_layer(layer, some_splits(soft=soft))
    restored = split.undo()
    assert torch.equal(restored.weight, layer.weight)
    assert layer.bias is None or torch.equal(restored.bias, layer.bias)
    assert repr(restored) == repr(layer)
    assert restored.weight.requires_grad


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_undo_folds_what_was_trained_since(layer):
    layer = copy.deepcopy(layer).double()
    split = split_layer(layer, some_splits(soft=True))
    optimizer = torch.optim.SGD(split.parameters(), 0.1)
    x = inputs_for(layer, dtype=torch.float64)
    split(x).square().mean().backward()
    optimizer.step()
    trained = split(x)
    assert not torch.allclose(trained, layer(x))
    torch.testing.assert_close(split.undo()(x), trained, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", [LAYERS[1], LAYERS[3], LAYERS[5], LAYERS[7]], ids=str)
def test_expand_holds_each_concept_where_channel_index_says(layer):
    splits = some_splits(soft=True)
    split = split_layer(layer, splits)
    x = inputs_for(layer)
    expanded = split.expand(x)
    channel_dim = -1 if isinstance(layer, nn.Linear) else 1
    grouped = getattr(layer, "groups", 1) > 1  # then each group gets as many as the one that needs most
    assert expanded.shape[channel_dim] == 9 + (3 * 3 if grouped else 2 + 3)
    for wanted in splits:
        for concept, share in enumerate([*wanted.membership, wanted.membership.sum(0) - 1]):
            alone = copy.deepcopy(layer)
            with torch.no_grad():
                alone.weight[wanted.channel] *= share.view(-1, *[1] * (layer.weight.ndim - 2))
                if concept == len(wanted.concepts):
                    alone.bias[wanted.channel] *= len(wanted.concepts) - 1
            name = "residual" if concept == len(wanted.concepts) else concept
            found = expanded.select(channel_dim, split.channel_index(wanted.channel, name))
            torch.testing.assert_close(found, alone(x).select(channel_dim, wanted.channel), rtol=1e-5, atol=1e-5)
    untouched = [channel for channel in range(9) if channel not in (2, 7)]
    index = torch.tensor(untouched)
    rows = torch.tensor([channel + channel // 3 * 3 for channel in untouched]) if grouped else index
    assert torch.equal(split.expand.weight[rows], layer.weight[index])


@pytest.mark.parametrize("n_concepts", [2, 3, 4, 5, 9])
@pytest.mark.parametrize("soft", [False, True])
def test_many_concepts_pass_the_check_in_float64(n_concepts, soft):
    shares = torch.rand(n_concepts, 6, generator=torch.Generator().manual_seed(n_concepts))
    shares = shares if soft else (shares > 0.3).float()
    net = nn.Sequential(copy.deepcopy(LAYERS[1]))
    split = ChannelSplit("0", 4, [[index] for index in range(n_concepts)], shares)
    assert split_checked(net, SplitPlan([split]), {"0": inputs_for(LAYERS[1])})["0"] < 1e-5
    assert torch.equal(net[0].undo().weight, LAYERS[1].weight)


def test_three_shared_sources_are_counted_off_by_the_residual():
    layer = nn.Conv2d(3, 8, 1, bias=False)
    split = split_layer(layer, [ChannelSplit("x", 4, [[0], [1], [2]], torch.ones(3, 3))])
    residual = split.expand.weight[split.channel_index(4, "residual")]
    assert torch.equal(residual, 2 * layer.weight[4])


@pytest.mark.parametrize(
    ("channel", "concept", "message"),
    [
        (3, 0, r"one of the split channels \[7, 2\], but got 3"),
        (7, 2, r"`concept` to be in \[0, 2\) or 'residual' for channel 7, but got 2"),
        (7, -1, "but got -1"),
        (2, "rest", "but got 'rest'"),
    ],
)
def test_an_unknown_concept_is_refused(channel, concept, message):
    with pytest.raises(ValueError, match=message):
        split_layer(LAYERS[0], some_splits()).channel_index(channel, concept)


def test_merge_is_a_leaf_and_adds_gradients_as_the_unsplit_layer_has_them():
    layer = copy.deepcopy(LAYERS[1]).double()
    split = split_layer(layer, some_splits(soft=True))
    assert isinstance(split.merge, MergeChannels)
    assert not list(split.merge.children())
    assert not list(split.merge.parameters())
    x = inputs_for(layer, dtype=torch.float64)
    gradients = []
    for module in (layer, split):
        own = x.clone().requires_grad_()
        module(own).square().sum().backward()
        gradients.append(own.grad)
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_state_dict_tells_the_whole_structure(layer):
    splits = some_splits(soft=True, name="0")
    net = nn.Sequential(split_layer(layer, splits))
    fresh = nn.Sequential(copy.deepcopy(layer))
    nn.init.zeros_(fresh[0].weight)
    assert rebuild_splits(fresh, net.state_dict()) == ["0"]
    fresh.load_state_dict(net.state_dict())
    x = inputs_for(layer)
    assert torch.equal(fresh(x), net(x))
    assert stored_plan(fresh).splits == splits
    assert torch.equal(fresh[0].undo().weight, layer.weight)
    assert rebuild_splits(fresh, net.state_dict()) == [], "what is split already stays as it is"


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_unsplit_layers_state_dict_is_accepted(layer):
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.mul_(-2).add_(0.1)
    net = nn.Sequential(split_layer(layer, some_splits(soft=True)))
    state = nn.Sequential(other).state_dict()
    before = dict(state)
    net.load_state_dict(state, strict=True)
    assert state.keys() == before.keys(), "the caller's state dict is not changed"
    x = inputs_for(layer)
    torch.testing.assert_close(net(x), other(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(net[0].undo().weight, other.weight)


def test_a_state_dict_of_another_split_brings_its_structure_along():
    layer = LAYERS[1]
    first, second = some_splits(soft=True, name="0")
    other = ChannelSplit("0", 4, [[8], [9, 6]], first.membership.flip(0))
    net = nn.Sequential(split_layer(layer, [other]))
    state = nn.Sequential(split_layer(layer, [first])).state_dict()
    x = inputs_for(layer)
    net.load_state_dict(state)  # of equal shapes
    torch.testing.assert_close(net(x), layer(x), rtol=1e-5, atol=1e-5)
    assert stored_plan(net).splits == [first]
    for target in (net, nn.Sequential(split_layer(layer, [other]))):
        state = nn.Sequential(split_layer(layer, [second])).state_dict()
        rebuild_splits(target, state)
        target.load_state_dict(state)
        torch.testing.assert_close(target(x), layer(x), rtol=1e-5, atol=1e-5)
        assert stored_plan(target).splits == [second]


def test_unbatched_inputs_and_autocast():
    layer = LAYERS[1]
    split, x = split_layer(layer, some_splits()), inputs_for(LAYERS[1])
    torch.testing.assert_close(split(x[0]), layer(x[0]), rtol=1e-5, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = split(x), layer(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_a_state_dict_of_another_shape_is_refused_by_torch():
    net = nn.Sequential(split_layer(LAYERS[0], some_splits()))
    with pytest.raises(RuntimeError, match="Missing key.*expand.weight"):
        net.load_state_dict({"0.weight": torch.zeros(3, 6, 1, 1)})


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_split_layers_can_be_copied(clone):
    layer = LAYERS[1]
    split = clone(split_layer(layer, some_splits()))
    x = inputs_for(layer)
    torch.testing.assert_close(split(x), layer(x), rtol=1e-5, atol=1e-5)
    split.load_state_dict(layer.state_dict())
    assert torch.equal(split.undo().weight, layer.weight)


def test_mode_and_frozen_parameters_carry_over():
    layer = nn.Conv2d(6, 9, 1).eval()
    layer.weight.requires_grad_(False)
    split = SplitConv2d(layer, some_splits())
    assert not split.training
    assert not split.expand.weight.requires_grad
    assert split.expand.bias.requires_grad
    restored = split.undo()
    assert (restored.training, restored.weight.requires_grad, restored.bias.requires_grad) == (False, False, True)


def test_a_layer_without_splits_is_the_layer():
    x = inputs_for(LAYERS[3])
    assert torch.equal(SplitLinear(LAYERS[3], [])(x), LAYERS[3](x))


@pytest.mark.parametrize(("make", "layer"), [(conv_relu_net, "2"), (BottleneckNet, "blocks.1.conv3")])
def test_disentangle_preserves_the_network(make, layer):
    torch.manual_seed(0)
    net = make().double().eval()
    images = make_images(n=6)[0].double()
    before = net(images)
    n_inputs = net.get_submodule(layer).in_channels
    plan = SplitPlan(some_splits(n_inputs, soft=True, name=layer))
    state = copy.deepcopy(net.state_dict())
    split = disentangle(net, plan)
    torch.testing.assert_close(split(images), before, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items()), "the original is left alone"
    assert stored_plan(split) == plan
    same = disentangle(net, plan, inplace=True)
    assert same is net
    torch.testing.assert_close(net(images), before, rtol=1e-12, atol=1e-12)


def test_a_layer_with_two_names_is_replaced_under_both():
    shared = nn.Linear(6, 9)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    disentangle(net, SplitPlan(some_splits(name="a")), inplace=True)
    assert net["a"] is net["b"][0]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (SplitPlan([*some_splits(6, name="0"), *some_splits(6, name="1")]), "but got `ReLU`"),
        (
            SplitPlan([*some_splits(6, name="0"), *some_splits(6, name="9")]),
            "to name modules of the model, but got '9'",
        ),
        (SplitPlan([*some_splits(6, name="0"), *some_splits(6, name="2")]), "expected memberships of 9 inputs"),
        (SplitPlan([*some_splits(6, name="0"), *some_splits(6, name="0")]), "channel 7 is split twice"),
    ],
)
def test_a_plan_that_does_not_fit_changes_nothing(plan, message):
    net = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 9))
    with pytest.raises(ValueError, match=message):
        disentangle(net, plan, inplace=True)
    assert [type(module) for module in net] == [nn.Linear, nn.ReLU, nn.Linear]


def test_splitting_a_channel_twice_is_refused_in_words():
    net = disentangle(nn.Sequential(nn.Linear(6, 9)), SplitPlan(some_splits(name="0")))
    with pytest.raises(ValueError, match=r"Channels \[2, 7\] of layer `0` are split already. Leave them out"):
        disentangle(net, SplitPlan(some_splits(name="0")))
    with pytest.raises(ValueError, match="Layer `0.expand` is part of the split layer `0`. Split further channels of"):
        disentangle(net, SplitPlan(some_splits(name="0.expand")))


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("layer", [LAYERS[1], LAYERS[3], LAYERS[7]], ids=str)
def test_further_channels_can_be_split(layer, trained):
    first, second = some_splits(soft=True, name="0")
    further = replace(first, channel=5)
    net = disentangle(nn.Sequential(copy.deepcopy(layer)).double(), SplitPlan([first, second]))
    if trained:
        with torch.no_grad():
            net[0].expand.weight.mul_(1 + 0.1 * torch.rand_like(net[0].expand.weight))
    x = inputs_for(layer, dtype=torch.float64)
    again = disentangle(net, SplitPlan([further]))
    torch.testing.assert_close(again(x), net(x), rtol=1e-9, atol=1e-9)
    assert [split.channel for split in again[0].splits("0")] == [7, 2, 5]
    for split in (first, second):
        old, new = (part[0].expand.weight[part[0].part_rows(split.channel)] for part in (net, again))
        assert torch.equal(old, new)
    torch.testing.assert_close(again[0].undo()(x), net(x), rtol=1e-9, atol=1e-9)
    if not trained:
        assert torch.equal(again[0].undo().weight, layer.weight.double())


def test_the_check_passes_and_reports_the_runs_own_precision():
    net = nn.Sequential(copy.deepcopy(LAYERS[1]))
    deviations = split_checked(net, SplitPlan(some_splits(soft=True, name="0")), {"0": inputs_for(LAYERS[1])})
    assert isinstance(net[0], SplitConv2d)
    assert 0 < deviations["0"] < 1e-5


def test_a_split_that_fails_the_check_leaves_the_model_as_it_was(monkeypatch):
    net = nn.Sequential(copy.deepcopy(LAYERS[1]), nn.ReLU(), copy.deepcopy(LAYERS[0]))
    before = list(net)
    plan = SplitPlan([*some_splits(name="0"), *some_splits(name="2")])

    def broken(layer, splits):
        split = split_layer(layer, splits)
        if layer.kernel_size == (1, 1):
            split.expand.weight.data[0] += 1e-6
        return split

    monkeypatch.setattr("lightning_polydis.surgery.split_layer", broken)
    x = inputs_for(LAYERS[0])
    with pytest.raises(
        RuntimeError, match="split of layer `2` would change its output by .*The model was left unsplit"
    ):
        split_checked(net, plan, {"0": x, "2": x})
    assert list(net) == before


def test_the_deviation_is_relative_to_the_largest_output(monkeypatch):
    layer = copy.deepcopy(LAYERS[0])

    def broken(layer, splits):
        split = split_layer(layer, splits)
        split.expand.weight.data[0] *= 1.5  # channel 0 is not split
        return split

    monkeypatch.setattr("lightning_polydis.surgery.split_layer", broken)
    x = inputs_for(layer)
    expected = float(0.5 * layer(x)[:, 0].abs().max() / layer(x).abs().max())
    assert split_deviation(layer, some_splits(), x, torch.float64) == pytest.approx(expected, rel=1e-4)


def test_the_representation_names_the_split_channels():
    assert "split_channels=[7, 2]" in repr(split_layer(LAYERS[0], some_splits()))
