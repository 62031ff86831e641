import copy
import json
import warnings

import pytest
import torch
from torch import nn

from lightning_polydis import (
    ChannelSplit,
    SplitPlan,
    concept_heatmaps,
    disentangle,
    evaluate_splits,
    find_polysemantic_channels,
    load_from_checkpoint,
    visualize_channels,
)
from lightning_polydis.plan import check_fits, fingerprints
from lightning_polydis.split_state import split_state_dict
from lightning_polydis.surgery import rebuild_splits, stored_plan
from tests.networks import Classifier, conv_relu_net, make_batches, train_briefly


@pytest.fixture
def plan():
    hard = torch.tensor([[1.0, 0, 1, 1], [0, 1, 1, 0]])
    soft = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    return SplitPlan(
        [
            ChannelSplit("a.conv", 3, [[0], [2, 5]], hard, rho=0.35),
            ChannelSplit("b", 0, [[1], [2], [3]], soft),
            ChannelSplit("a.conv", 1, [[7], [2]], hard, rho=1.0),
        ]
    )


def test_a_plan_comes_back_from_its_file_exactly(plan, tmp_path):
    plan.save(tmp_path / "deep" / "plan.json")
    loaded = SplitPlan.load(tmp_path / "deep" / "plan.json")
    assert loaded == plan
    for mine, other in zip(plan, loaded, strict=True):
        assert torch.equal(mine.membership, other.membership)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["plan.json"], "no temporary file is left"


def test_a_plan_lists_its_layers(plan):
    assert plan.layers == ["a.conv", "b"]
    assert [split.channel for split in plan.of_layer("a.conv")] == [3, 1]
    assert len(plan) == 3


def test_splits_differ_if_a_membership_does(plan):
    other = ChannelSplit("a.conv", 3, [[0], [2, 5]], torch.ones(2, 4), rho=0.35)
    assert other != plan.splits[0]
    assert plan.splits[0] != "a.conv"


def test_the_header_says_what_the_file_is(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    assert (document["kind"], document["format_version"]) == ("lightning_polydis.split_plan", 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{not json", "cannot be read"),
        ("\xff", "kind|cannot be read"),
        ("[1]", "of kind `lightning_polydis.split_plan`, but got `list`"),
        ('{"kind": "lightning_polydis.report", "format_version": 1}', "but got `lightning_polydis.report`"),
        ('{"kind": "lightning_polydis.split_plan", "format_version": 2}', "newer lightning_polydis"),
        ('{"kind": "lightning_polydis.split_plan"}', "format_version of at most 1, but got None"),
        ('{"kind": "lightning_polydis.split_plan", "format_version": 1}', "is damaged: KeyError: 'splits'"),
        (
            '{"kind": "lightning_polydis.split_plan", "format_version": 1, "splits": [{"layer": "a"}]}',
            "is damaged: KeyError",
        ),
        (
            '{"kind": "lightning_polydis.split_plan", "format_version": 1, "splits": [{"layer": "a", "channel": 1, '
            '"concepts": [[1], [2]], "membership": [[1, 0]], "rho": null}]}',
            r"is damaged: InputError: Expected `membership` to have shape \[2, inputs\]",
        ),
    ],
)
def test_files_that_are_no_plan_are_refused_in_words(text, message, tmp_path):
    (tmp_path / "plan.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        SplitPlan.load(tmp_path / "plan.json")


def test_a_failed_write_leaves_the_old_file(plan, tmp_path):
    path = tmp_path / "plan.json"
    plan.save(path)
    before = path.read_text()
    broken = SplitPlan([ChannelSplit("a", 0, [[0], [b"no number"]], torch.ones(2, 2))])
    with pytest.raises(TypeError, match="not JSON serializable"):
        broken.save(path)
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]


@pytest.mark.parametrize(
    ("concepts", "membership", "message"),
    [
        ([[0]], torch.ones(1, 4), r"at least two concepts, but got \[\[0\]\]"),
        ([[0], [1]], torch.ones(3, 4), r"shape \[2, inputs\], one row for each concept, but got \[3, 4\]"),
        ([[0], [1]], torch.full((2, 4), float("nan")), "to be finite"),
        ([[0], []], torch.ones(2, 4), "at least one class each"),
        ([[0], [1, 0]], torch.ones(2, 4), "no class in two of them"),
    ],
)
def test_splits_that_make_no_sense_are_refused(concepts, membership, message):
    with pytest.raises(ValueError, match=message):
        ChannelSplit("layer", 0, concepts, membership)


@pytest.mark.parametrize(
    ("channels", "n_inputs", "message"),
    [
        ([8], 4, r"layer `x`: expected a channel in \[0, 8\), but got 8"),
        ([-1], 4, r"but got -1"),
        ([3], 5, "expected memberships of 5 inputs, but channel 3 has 4"),
        ([3, 3], 4, "channel 3 is split twice"),
    ],
)
def test_plans_that_do_not_fit_are_refused(channels, n_inputs, message):
    splits = [ChannelSplit("x", channel, [[0], [1]], torch.ones(2, 4)) for channel in channels]
    with pytest.raises(ValueError, match=message):
        check_fits(splits, 8, n_inputs)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("split_plan.json", r"Expected argument `plan` to be a `SplitPlan`, but got `str`. `SplitPlan.load\(path\)`"),
        ({"splits": []}, "but got `dict`. A report has one as `.plan`"),
    ],
)
def test_what_is_no_plan_is_refused_everywhere(wrong, message):
    net, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), torch.rand(2, 3, 8, 8)
    for call in (
        lambda: disentangle(net, wrong),
        lambda: evaluate_splits(net, wrong, [(images, torch.zeros(2, dtype=torch.long))]),
        lambda: concept_heatmaps(net, wrong, images),
        lambda: visualize_channels(net, wrong),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_the_representation_is_short(plan):
    assert repr(plan) == "SplitPlan(channels to split: 2 of 'a.conv', 1 of 'b')"
    assert repr(SplitPlan([])) == "SplitPlan(channels to split: none)"
    assert repr(plan.splits[1]) == "ChannelSplit('b', channel 0, concepts [[1], [2], [3]])"


# Plans and the weights that they were chosen for

LAYERS = ["2", "4"]  # a kernel of 3 x 3 with a bias, one of 1 x 1 without


@pytest.fixture(scope="module", params=["optimized", "paper"])
def chosen(request):
    """A network and a plan that was chosen for it: two channels of one layer, one of another."""
    torch.manual_seed(0)
    net = train_briefly(conv_relu_net(), steps=20)
    report = find_polysemantic_channels(net, make_batches(), LAYERS, method=request.param, progress=False)
    return net, report.plan_pairs([("2", 5, 0, 1), ("4", 3, 1, 2), ("2", 0, 0, 3)])


def told(call):
    """What a call warns of about the weights, and what it returns."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = call()
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "the plan was chosen for" in text], found


def with_other_weights(net, *layers):
    """A copy with fresh weights in some layers."""
    torch.manual_seed(1)
    net = copy.deepcopy(net)
    for name in layers:
        net.get_submodule(name).reset_parameters()
    return net


def test_a_split_remembers_up_to_eight_weights_of_its_channel(chosen):
    net, plan = chosen
    for split in plan:
        row = net.get_submodule(split.layer).weight[split.channel].flatten().tolist()
        assert split.fingerprint == [row[int(place * (len(row) - 1) / 7)] for place in range(8)]
    narrow = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
    batches = [(images[:, :, 0, 0], targets) for images, targets in make_batches()]
    report = find_polysemantic_channels(narrow, batches, "0", progress=False)
    (split,) = report.plan_pairs([("0", 5, 0, 1)])
    assert split.fingerprint == narrow[0].weight[5].tolist(), "of a channel with fewer inputs, all"


def test_a_plan_for_other_weights_is_noticed_once(chosen):
    net, plan = chosen
    texts, split = told(lambda: disentangle(with_other_weights(net, "2"), plan))
    assert len(texts) == 1
    assert "got others in 2 channels of layer `2`. The network's output stays" in texts[0]
    assert "Analyse this network" in texts[0]
    assert stored_plan(split).layers == LAYERS, "it is applied all the same"
    texts, _ = told(lambda: disentangle(with_other_weights(net, *LAYERS), plan))
    assert len(texts) == 1
    assert "2 channels of layer `2`, 1 channel of layer `4`." in texts[0]
    texts, _ = told(lambda: disentangle(with_other_weights(net, "0", "8"), plan))
    assert texts == [], "of layers that are not split nothing is known"


def test_a_little_training_is_noticed(chosen):
    net, plan = chosen
    trained = train_briefly(copy.deepcopy(net), steps=5, lr=1e-3)
    assert len(told(lambda: disentangle(trained, plan))[0]) == 1


def remembering(layer, channel, n_inputs):
    """A split of a layer named `"0"` that knows the channel's weights."""
    membership = torch.ones(2, n_inputs)
    return ChannelSplit("0", channel, [[0], [1]], membership, fingerprint=fingerprints(layer.weight, [channel])[0])


def test_a_kernel_of_another_size_is_noticed():
    small, large = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        small.weight.fill_(0.5)
        large.weight.fill_(0.5)
    plan = SplitPlan([remembering(small, 2, 3)])
    assert len(told(lambda: disentangle(nn.Sequential(large), plan))[0]) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_same_weights_in_any_precision_are_no_others(chosen, dtype):
    net, plan = chosen
    cast = copy.deepcopy(net).to(dtype)
    assert told(lambda: disentangle(cast, plan))[0] == []
    assert told(lambda: disentangle(cast.float(), plan))[0] == []
    report = find_polysemantic_channels(cast, make_batches(), LAYERS, progress=False)
    rounded = report.plan_pairs([(split.layer, split.channel, 0, 1) for split in plan])
    assert told(lambda: disentangle(net, rounded))[0] == []
    assert told(lambda: disentangle(copy.deepcopy(net).bfloat16(), rounded))[0] == []


def test_weights_too_small_for_half_precision_are_no_others():
    net = nn.Sequential(nn.Conv2d(3, 8, 1))
    with torch.no_grad():
        net[0].weight.mul_(1e-5)
    plan = SplitPlan([remembering(net[0], 2, 3)])
    assert told(lambda: disentangle(net.half(), plan))[0] == []


def test_a_file_keeps_what_weights_a_plan_was_chosen_for(chosen, tmp_path):
    net, plan = chosen
    plan.save(tmp_path / "plan.json")
    loaded = SplitPlan.load(tmp_path / "plan.json")
    assert [split.fingerprint for split in loaded] == [split.fingerprint for split in plan]
    assert told(lambda: disentangle(net, loaded))[0] == []
    assert len(told(lambda: disentangle(with_other_weights(net, "4"), loaded))[0]) == 1


def test_a_file_from_before_says_nothing_of_weights(chosen, tmp_path):
    net, plan = chosen
    plan.save(tmp_path / "plan.json")
    document = json.loads((tmp_path / "plan.json").read_text())
    for split in document["splits"]:
        del split["fingerprint"]
    (tmp_path / "plan.json").write_text(json.dumps(document))
    loaded = SplitPlan.load(tmp_path / "plan.json")
    assert loaded == plan, "two splits are equal by what they split, and how"
    assert told(lambda: disentangle(with_other_weights(net, *LAYERS), loaded))[0] == []


def test_split_again_after_undo_and_further_channels(chosen):
    net, plan = copy.deepcopy(chosen[0]), chosen[1]
    first, second = SplitPlan(plan.splits[:1]), SplitPlan(plan.splits[1:])
    texts, split = told(lambda: disentangle(disentangle(net, first), second))
    assert texts == []
    split[2] = split[2].undo()
    split[4] = split[4].undo()
    assert told(lambda: disentangle(split, plan))[0] == []
    other = disentangle(with_other_weights(net, "2"), SplitPlan([ChannelSplit("2", 7, [[0], [1]], torch.ones(2, 8))]))
    assert "2 channels of layer `2`." in told(lambda: disentangle(other, plan))[0][0]


def test_further_channels_of_a_grouped_convolution_are_found_in_their_group():
    net = nn.Sequential(nn.Conv2d(6, 8, 1, groups=2))
    first, second = (SplitPlan([remembering(net[0], channel, 3)]) for channel in (1, 6))
    split = disentangle(net, first)  # rows of the second group have moved
    assert told(lambda: disentangle(split, second))[0] == []


def test_loading_what_was_split_says_nothing_of_weights(chosen, tmp_path):
    split = disentangle(*chosen)
    fresh, module = conv_relu_net(), Classifier(split)
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": "2.0"}, tmp_path / "split.ckpt")
    assert told(lambda: rebuild_splits(fresh, split.state_dict()))[0] == []
    texts, loaded = told(lambda: load_from_checkpoint(Classifier, tmp_path / "split.ckpt"))
    assert texts == []
    assert stored_plan(loaded.net) == stored_plan(split)


def test_a_state_dict_with_other_weights_is_noticed(chosen):
    net, plan = chosen
    assert told(lambda: split_state_dict(net.state_dict(), plan))[0] == []
    texts, _ = told(lambda: split_state_dict(with_other_weights(net, "4").state_dict(), plan))
    assert len(texts) == 1
    assert "1 channel of layer `4`." in texts[0]
