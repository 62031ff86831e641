"""Polysemantic channels without labels, the whole way: plain functions, then the callback."""

import copy
import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn import functional as F

from lightning_polydis import (
    ChannelDisentanglement,
    ChannelSplit,
    PolysemanticityReport,
    SplitPlan,
    disentangle,
    evaluate_splits,
    find_polysemantic_channels,
    load_from_checkpoint,
)
from lightning_polydis.clusters.evidence import MAX_DESCRIBED
from lightning_polydis.surgery import rebuild_splits, stored_plan
from tests.planted import (
    CHANNELS,
    GROUPED_MERGED,
    MERGED,
    N_PATTERNS,
    Autoencoder,
    PlantedNet,
    planted_images,
    planted_loader,
)
from tests.runs import Recorder, make_trainer, n_hooks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval"),
    pytest.mark.filterwarnings("ignore:.*`isinstance\\(treespec, LeafSpec\\)`"),
]


def find(net, batches, layers="mix", **settings):
    return find_polysemantic_channels(net, batches, layers, concepts="clusters", progress=False, **settings)


def plain_batches(n=300, seed=0, size=50):
    return [(part,) for part in planted_images(n, seed)[0].split(size)]


def class_batches(n=300, seed=0, size=50):
    images, own = planted_images(n, seed)
    return list(zip(images.split(size), own.split(size), strict=True))


@pytest.fixture(scope="module")
def planted():
    torch.manual_seed(0)
    return PlantedNet().eval()


@pytest.fixture(scope="module")
def report(planted):
    """Found with class targets."""
    return find(planted, class_batches(), class_names=[f"pattern {index}" for index in range(N_PATTERNS)])


@pytest.fixture(scope="module")
def images():
    """New ones, and the pattern of each."""
    return planted_images(seed=1)


def found_in(report):
    return {found.channel: found for found in report.channels}


def pattern_of(report, channel, number):
    """The pattern that fills a concept."""
    return found_in(report)[channel].contents[number][0][0]


# ------------------------------------------------------------------------------------------------ what is found


def test_merged_channels_are_flagged_and_no_others_and_contents_name_their_patterns(report):
    assert sorted(found_in(report)) == MERGED
    for channel, found in found_in(report).items():
        assert len(found.concepts) == len(CHANNELS[channel])
        assert sorted(content[0][0] for content in found.contents) == list(CHANNELS[channel])
        assert all(content[0][1] > 0.95 for content in found.contents)
        assert found.stability > 0.9
        assert found.cosine_similarity < 0.1
        assert found.threshold == 0.85
        assert found.is_clear
        assert found.reliability > 0.9
    (layer,) = report.layers
    assert (layer.n_channels, layer.n_inputs, layer.n_polysemantic, layer.n_candidates) == (8, 18, 3, 3)
    assert report.n_images == 300
    assert report.has_clusters


def boxes(images):
    return [{"boxes": torch.zeros(index % 3, 4), "labels": torch.ones(index % 3)} for index in range(len(images))]


TARGETS = {
    "none": lambda images: (images,),
    "floats": lambda images: (images, images.mean((1, 2, 3))),
    "boxes": lambda images: (images, boxes(images)),
    "the images": lambda images: [images, images],
    "texts": lambda images: (images, ["a text"] * len(images)),
    "ignored ones": lambda images: (images, torch.full((len(images),), -100)),
}


@pytest.mark.parametrize("batch_of", TARGETS.values(), ids=TARGETS)
def test_targets_that_are_no_classes_or_none_change_nothing_but_names(batch_of, planted, report):
    found = find(planted, [batch_of(images) for (images,) in plain_batches()])
    assert found.pairs == report.pairs
    assert found.plan == report.plan
    assert found.quality == report.quality
    assert all(contents == [] for channel in found.channels for contents in channel.contents)
    assert found.concept_names["mix", 0] == ["cluster 1", "cluster 2"]


def test_numbers_that_name_images_are_taken_for_classes_of_their_own(planted, report):
    images, _ = planted_images()
    numbers = 10**15 + torch.arange(len(images))
    found = find(planted, [(images, numbers)])
    assert sorted(found_in(found)) == MERGED
    assert all(share < 0.05 for channel in found.channels for own in channel.contents for _, share in own)
    assert found.overviews[0].channels


def test_names_are_those_of_classes_with_their_shares(report):
    names = report.concept_names["mix", 0]
    patterns = [pattern_of(report, 0, number) for number in (0, 1)]
    assert [name.startswith(f"pattern {p} ") for name, p in zip(names, patterns, strict=True)] == [True, True]
    assert all(" %" in name for name in names)


@pytest.mark.parametrize("size", [300, 37, 1])
def test_batches_of_any_size_give_the_same(size, planted, report):
    found = find(planted, class_batches(size=size))
    assert [channel.concepts for channel in found.channels] == [channel.concepts for channel in report.channels]
    assert [c.contents for c in found.channels] == [c.contents for c in report.channels]
    assert [split.channel for split in found.plan] == [split.channel for split in report.plan]
    for one, two in zip(found.plan, report.plan, strict=True):
        torch.testing.assert_close(one.membership, two.membership, atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(one.centres, two.centres, atol=1e-3, rtol=1e-3)


def test_the_layer_is_chosen_if_none_is_named_and_several_are_served_at_once(planted, report):
    chosen = find(planted, class_batches(), layers=None)
    assert [layer.name for layer in chosen.layers] == ["mix"]
    assert chosen.n_images == 300, "the first batch counts too"
    assert chosen.pairs == report.pairs
    both = find(planted, class_batches(), layers=["sources", "mix"])
    assert [layer.name for layer in both.layers] == ["sources", "mix"]
    assert [pair for pair in both.pairs if pair.layer == "mix"] == report.pairs
    assert [split for split in both.plan if split.layer == "mix"] == report.plan.splits
    assert [pair for pair in both.pairs if pair.layer == "sources"] == find(planted, class_batches(), "sources").pairs
    assert len(both.overviews) == 2
    assert n_hooks(planted) == 0


def test_thresholds_that_are_numbers_decide(planted):
    """Some images show pattern 0, some pattern 0 beside pattern 1: not all that different for channel 0."""
    images, own = planted_images()
    images[own == 1] += 0.8 * images[own == 0]
    cosines = []
    for threshold in (0.2, 0.99):
        found = find(planted, [(images[own < 2],)], similarity_threshold=threshold)
        assert all(pair.cosine_similarity < threshold for pair in found.pairs)
        assert all(channel.threshold == threshold for channel in found.channels)
        cosines.append([pair.cosine_similarity for pair in found.pairs if pair.channel == 0])
    assert cosines[0] == []
    assert 0.2 < min(cosines[1]) < 0.99


def test_the_network_and_random_numbers_are_left_as_they_were(planted):
    net = copy.deepcopy(planted).train()
    net.act.eval()
    state = copy.deepcopy(net.state_dict())
    torch.manual_seed(4)
    expected = torch.rand(2)
    torch.manual_seed(4)
    found = find(net, plain_batches(), layers=None)
    _ = found.plan, found.quality, found.cards, found.overviews, found.to_json()
    assert torch.equal(torch.rand(2), expected)
    assert net.training
    assert not net.act.training
    assert n_hooks(net) == 0
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(context, planted, report):
    with context():
        assert find(planted, class_batches()).pairs == report.pairs


def test_an_exception_in_the_data_or_the_network_leaves_nothing_behind(planted):
    class Fails(nn.Module):
        def forward(self, x):
            raise OSError("the disk is gone")

    for spoil in ("net", "data"):
        net = copy.deepcopy(planted)
        if spoil == "net":
            net.back = Fails()

        def data():
            yield from plain_batches()[:2]
            raise OSError("the disk is gone")

        with pytest.raises(OSError, match="the disk is gone"):
            find(net, data())
        assert n_hooks(net) == n_modes() == 0
        with pytest.raises(OSError, match="the disk is gone"):
            find(net, data(), layers=None)
        assert n_hooks(net) == n_modes() == 0


def test_batches_that_are_no_tuples_are_refused_in_words(planted):
    with pytest.raises(ValueError, match=r"for clusters `\(inputs,\)` will do"):
        find(planted, [planted_images(20)[0]])


def test_a_linear_layer_of_tokens_does_as_well_as_a_convolution(planted, report):
    class Tokens(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.mix, self.act = net, nn.Linear(18, 8), nn.ReLU()
            with torch.no_grad():
                self.mix.weight.copy_(net.mix.weight[..., 0, 0])
                self.mix.bias.copy_(net.mix.bias)

        def forward(self, x):
            return self.act(self.mix(self.net.relu(self.net.sources(x)).flatten(2).mT))

    found = find(Tokens(planted), class_batches())
    assert sorted(found_in(found)) == MERGED
    for split, other in zip(found.plan, report.plan, strict=True):
        torch.testing.assert_close(split.membership, other.membership, atol=1e-3, rtol=1e-3)


def test_patterns_that_a_channel_answers_to_downwards_are_found_and_split(planted, images):
    net = copy.deepcopy(planted)
    net.act = nn.Identity()
    with torch.no_grad():
        net.mix.weight.neg_()
        net.mix.bias.neg_()
    found = find(net, class_batches())
    assert set(found_in(found)) >= set(MERGED)
    splits = {split.channel: split for split in found.plan}
    for channel in MERGED:
        assert set(splits[channel].directions) == {-1}
    qualities = evaluate_splits(net, SplitPlan([splits[channel] for channel in MERGED]), [images], progress=False)
    assert all(quality.mean("leak") < 0.05 and quality.mean("distortion") < 0.05 for quality in qualities)


# -------------------------------------------------------------------------------------------------------- splits


def correlation(first, second):
    return float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]).double())[0, 1])


def test_concept_channels_are_the_detectors_that_were_added_up(planted, report, images):
    split = disentangle(planted, report.plan)
    with torch.no_grad():
        parts = split.mix.expand(split.relu(split.sources(images[0]))).relu()
    for channel in MERGED:
        for number in range(len(CHANNELS[channel])):
            pattern = pattern_of(report, channel, number)
            concept = parts[:, split.mix.channel_index(channel, number)]
            assert correlation(concept, planted.detector(images[0], channel, pattern)) > 0.95
            for other in set(CHANNELS[channel]) - {pattern}:
                assert correlation(concept, planted.detector(images[0], channel, other)) < 0.3


def test_the_network_computes_the_same_before_and_after_and_undone(planted, report, images):
    split = disentangle(planted, report.plan)
    with torch.no_grad():
        torch.testing.assert_close(split(images[0]), planted(images[0]), rtol=1e-5, atol=1e-5)
    split.mix = split.mix.undo()
    assert torch.equal(split.mix.weight, planted.mix.weight)
    assert torch.equal(split.mix.bias, planted.mix.bias)
    with torch.no_grad():
        assert torch.equal(split(images[0]), planted(images[0]))


def figures(qualities, name):
    return [getattr(concept, name) for quality in qualities for concept in quality.concepts]


def test_quality_on_new_images_without_targets_is_near_the_reports(planted, report, images):
    batches = [(part,) for part in images[0].split(64)]
    qualities = evaluate_splits(planted, report.plan, batches, progress=False)
    assert [(quality.layer, quality.channel) for quality in qualities] == [(s.layer, s.channel) for s in report.plan]
    for name in ("distortion", "leak", "auroc"):
        assert figures(qualities, name) == pytest.approx(figures(report.quality, name), abs=0.05)
    assert max(figures(qualities, "distortion")) < 0.05
    assert max(figures(qualities, "leak")) < 0.05
    assert min(figures(qualities, "auroc")) > 0.95


def test_new_images_belong_to_the_concept_of_their_pattern(planted, report, images):
    """Each concept has all fifty images of its pattern: those that are strong enough; others belong to none."""
    for pattern in range(N_PATTERNS):
        own = images[0][images[1] == pattern]
        for quality in evaluate_splits(planted, report.plan, [(own,)], progress=False):
            counts = [concept.n_own for concept in quality.concepts]
            patterns = [pattern_of(report, quality.channel, number) for number in range(len(counts))]
            for other, count in zip(patterns, counts, strict=True):
                assert count >= 45 if other == pattern else count == 0


def test_targets_of_batches_do_not_matter_to_quality(planted, report, images):
    expected = evaluate_splits(planted, report.plan, [(images[0],)], progress=False)
    for batch in (images, (images[0], images[1].float()), (images[0], boxes(images[0]))):
        assert evaluate_splits(planted, report.plan, [batch], progress=False) == expected


def assert_same_quality(found, expected):
    for name in ("n_own", "n_other"):
        assert figures(found, name) == figures(expected, name)
    for name in ("distortion", "leak", "spurious"):
        assert figures(found, name) == pytest.approx(figures(expected, name), abs=1e-4)


def test_the_split_network_is_judged_as_the_network_before(planted, report, images):
    split = disentangle(planted, report.plan)
    before, after = (evaluate_splits(net, report.plan, [images], progress=False) for net in (planted, split))
    assert_same_quality(after, before)
    assert min(figures(before, "n_own")) > 0


def test_a_split_grouped_convolution_is_judged_as_before(images):
    net = PlantedNet(groups=2).eval()
    report = find(net, class_batches())
    assert sorted(found_in(report)) == GROUPED_MERGED
    split = disentangle(net, report.plan)
    before, after = (evaluate_splits(one, report.plan, [images], progress=False) for one in (net, split))
    assert max(figures(before, "leak")) < 0.05
    assert_same_quality(after, before)


def test_grouped_convolutions_are_split_within_their_groups(images):
    net = PlantedNet(groups=2).eval()
    report = find(net, class_batches())
    assert sorted(found_in(report)) == GROUPED_MERGED
    split = disentangle(net, report.plan)
    with torch.no_grad():
        torch.testing.assert_close(split(images[0]), net(images[0]), rtol=1e-5, atol=1e-5)
    qualities = evaluate_splits(net, report.plan, [images], progress=False)
    assert max(figures(qualities, "leak")) < 0.05
    assert min(figures(qualities, "n_own")) > 40


def test_without_samples_there_is_no_plan_and_with_all_of_them_nothing_is_held_out(planted, report):
    none = find(planted, plain_batches(), calibration_samples=0)
    assert none.plan is None
    assert none.quality == []
    assert none.cards == []
    assert none.pairs == report.pairs
    with pytest.raises(ValueError, match="A plan needs calibration samples"):
        none.plan_pairs([("mix", 0, 0, 1)])
    every = find(planted, plain_batches(), calibration_samples=None)
    assert every.quality == []
    assert [split.channel for split in every.plan] == [split.channel for split in report.plan]
    few = find(planted, plain_batches(), calibration_samples=4)
    assert all(concept.n_own == 2 for quality in few.quality for concept in quality.concepts)


def test_pairs_of_clusters_can_be_planned_flagged_or_not(planted, report):
    plan = report.plan_pairs([("mix", 5, 2, 0), ("mix", 0, 0, 1)])
    assert [(split.channel, split.concepts) for split in plan] == [(5, [[2], [0]]), (0, [[0], [1]])]
    whole = {split.channel: split for split in report.plan}
    torch.testing.assert_close(plan.splits[0].centres, whole[5].centres[[2, 0]])
    assert plan.splits[0].floors == [whole[5].floors[number] for number in (2, 0)]
    assert plan.splits[1] == whole[0]
    disentangle(planted, plan)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("nix", 0, 0, 1), r"Expected an analysed layer \(mix\), but got 'nix'"),
        (("mix", 8, 0, 1), r"Expected a channel in \[0, 8\), but got 8"),
        (("mix", 0, 1, 1), "Expected two different classes, but got 1 twice"),
        (("mix", 0, 0, 2), "Expected one of its clusters, 0 to 1, but got 2 for channel 0, which has 2"),
        (("mix", 0, -1, 0), "Expected one of its clusters, 0 to 1, but got -1 for channel 0"),
        (("mix", 1, 0, 1), "Expected a channel with clusters, but got 0 for channel 1, which has 0"),
    ],
)
def test_pairs_that_cannot_be_planned_are_refused_in_words(pair, message, report):
    with pytest.raises(ValueError, match=message):
        report.plan_pairs([pair])


def test_settings_are_not_suggested_for_clusters(report):
    with pytest.raises(ValueError, match="`suggest_settings` is about classes, and this report's concepts are clus"):
        report.suggest_settings()
    assert report.sweeps == []


def test_a_plan_of_classes_and_clusters_is_refused_in_words(planted, report, images):
    of_classes = ChannelSplit("mix", 3, [[0], [1]], report.plan.splits[0].membership[:2])
    mixed = SplitPlan([*report.plan, of_classes])
    with pytest.raises(ValueError, match="splits some channels by classes and some by clusters. Judge them one after"):
        evaluate_splits(planted, mixed, [images], progress=False)
    split = disentangle(planted, mixed)
    kept = {one.channel: one for one in stored_plan(split)}
    assert kept[3].centres is None
    assert kept[3].floors is None
    assert SplitPlan([kept[one.channel] for one in report.plan]) == report.plan


def test_centres_and_floors_have_to_fit(report):
    split = report.plan.splits[0]
    arguments = (split.layer, split.channel, split.concepts, split.membership, None, None)
    with pytest.raises(ValueError, match="Expected `centres`, and with them `floors` for 3 concepts, or neither"):
        ChannelSplit(*arguments, split.centres, None)
    with pytest.raises(ValueError, match="Expected `centres`, and with them `floors` for 3 concepts, or neither"):
        ChannelSplit(*arguments, split.centres, [1.0])
    with pytest.raises(ValueError, match=r"`centres` to be finite and as large as `membership`, \[3, 18\], but got"):
        ChannelSplit(*arguments, split.centres[:, :5], split.floors)
    with pytest.raises(ValueError, match="`centres` to be finite"):
        ChannelSplit(*arguments, split.centres * float("nan"), split.floors)


# ------------------------------------------------------------------------------------------------ saved and loaded


def test_report_and_plan_survive_files(planted, report, images, tmp_path):
    report.save(tmp_path / "report.json")
    report.plan.save(tmp_path / "plan.json")
    json.loads((tmp_path / "plan.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    loaded, plan = PolysemanticityReport.load(tmp_path / "report.json"), SplitPlan.load(tmp_path / "plan.json")
    assert loaded.channels == report.channels
    assert loaded.pairs == report.pairs
    assert loaded.concept_names == report.concept_names
    assert loaded.settings == report.settings
    assert loaded.to_markdown() == report.to_markdown()
    assert loaded.has_clusters
    assert plan == report.plan
    for split, own in zip(plan, report.plan, strict=True):
        assert torch.equal(split.centres, own.centres)
        assert split.floors == own.floors
        torch.testing.assert_close(split.centres.norm(dim=1), torch.ones(len(split.concepts)))
    found, expected = (evaluate_splits(planted, one, [images], progress=False) for one in (plan, report.plan))
    assert found == expected
    with pytest.raises(ValueError, match="loaded from a file, which holds no calibration samples"):
        _ = loaded.plan


def test_the_state_of_a_split_network_tells_its_clusters(planted, report, images):
    split = disentangle(planted, report.plan)
    assert stored_plan(split) == report.plan
    again = PlantedNet().eval()
    assert rebuild_splits(again, split.state_dict()) == ["mix"]
    again.load_state_dict(split.state_dict())
    assert stored_plan(again) == report.plan
    with torch.no_grad():
        assert torch.equal(again(images[0]), split(images[0]))
    qualities = evaluate_splits(again, stored_plan(again), [images], progress=False)
    assert_same_quality(qualities, evaluate_splits(split, report.plan, [images], progress=False))
    assert stored_plan(copy.deepcopy(split)) == report.plan


def test_a_split_network_in_half_precision_is_still_judged(planted, report, images):
    split = disentangle(planted, report.plan).bfloat16()
    qualities = evaluate_splits(split, report.plan, [(images[0].bfloat16(),)], progress=False)
    assert max(figures(qualities, "leak")) < 0.05
    assert min(figures(qualities, "n_own")) > 40
    assert all(one.centres is not None for one in stored_plan(split))


# --------------------------------------------------------------------------------------------------- descriptions


class Describe:
    def __init__(self, answer=lambda pictures: f"{len(pictures)} pictures"):
        self.answer, self.seen = answer, []

    def __call__(self, pictures):
        self.seen.append(pictures)
        return self.answer(pictures)


def test_descriptions_are_asked_for_with_small_pictures_and_name_the_concepts(planted, report, tmp_path):
    describe = Describe()
    found = find(planted, class_batches(), describe_fn=describe)
    names = found.concept_names
    assert names == {("mix", c): [f"{MAX_DESCRIBED} pictures"] * len(CHANNELS[c]) for c in MERGED}
    assert {(p.dtype, *p.shape) for p in describe.seen} == {(torch.uint8, MAX_DESCRIBED, 3, 16, 16)}
    assert len(describe.seen) == 7
    _ = found.to_json(), found.to_markdown(), found.cards
    assert len(describe.seen) == 7, "once for each concept"
    assert found.cards[0].names == names["mix", found.cards[0].channel]
    found.save(tmp_path / "report.json")
    assert PolysemanticityReport.load(tmp_path / "report.json").concept_names == names


def test_descriptions_see_the_strongest_images_of_their_concept(planted):
    images, own = planted_images()
    seen = Describe()
    found = find(planted, [(images, own)], describe_fn=seen, denormalize=lambda x: (x - x.min()) / (x.max() - x.min()))
    _ = found.concept_names
    shown = ((images - images.min()) / (images.max() - images.min()) * 255).round().to(torch.uint8)
    for channel in found.channels:
        for number in range(len(channel.concepts)):
            pictures = seen.seen.pop(0)
            places = (pictures[:, None] == shown).flatten(2).all(2).int().argmax(1)
            assert torch.equal(shown[places], pictures)
            assert own[places].unique().tolist() == [channel.contents[number][0][0]]
            with torch.no_grad():
                strength = planted.mix(planted.relu(planted.sources(images)))[:, channel.channel].relu().sum((1, 2))
            same = strength[own == own[places[0]]].sort(descending=True).values[: len(places)]
            torch.testing.assert_close(strength[places], same)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda pictures: 1 / 0, "`describe_fn` raised ZeroDivisionError: division by zero"),
        (lambda pictures: None, "Expected `describe_fn` to return a text, but got `NoneType`"),
        (lambda pictures: ["a", "b"], "Expected `describe_fn` to return a text, but got `list`"),
    ],
)
def test_mistakes_of_descriptions_are_told_in_words(answer, message, planted):
    found = find(planted, plain_batches(), describe_fn=Describe(answer))
    with pytest.raises(ValueError, match=message):
        _ = found.concept_names


def test_without_pictures_nothing_is_described(planted):
    describe = Describe()
    for settings in ({"calibration_samples": 0}, {}):
        net = nn.Sequential(nn.Unflatten(1, (3, 16, 16)), planted) if not settings else planted
        batches = [(images.flatten(1) if not settings else images,) for (images,) in plain_batches()]
        found = find(net, batches, "mix" if settings else "1.mix", describe_fn=describe, **settings)
        assert next(iter(found.concept_names.values())) == ["cluster 1", "cluster 2", "cluster 3"]
    assert describe.seen == []


# ---------------------------------------------------------------------------------------------------- the callback


def callback_for(layers="net.mix", **settings):
    return ChannelDisentanglement(layers, concepts="clusters", **{"strict": True, **settings})


def n_modes():
    """Modes in force that see every function."""
    return torch._C._len_torch_function_stack()


def same_findings(found, expected):
    keys = ("channel", "concepts", "contents", "stability")
    one, two = ([[getattr(c, key) for key in keys] for c in report.channels] for report in (found, expected))
    assert one == two
    assert len(one) > 0


@pytest.mark.parametrize(("loop", "layers"), [("validate", "net.mix"), ("test", None)])
def test_the_loops_find_what_the_plain_function_finds(loop, layers, tmp_path):
    module, callback = Autoencoder(), callback_for(layers)
    getattr(make_trainer(tmp_path, callback), loop)(module, planted_loader(), verbose=False)
    expected = find(module, plain_batches(), "net.mix")
    assert callback.report.pairs == expected.pairs
    assert callback.plan == expected.plan
    assert callback.report.quality == expected.quality
    assert sorted(found_in(callback.report)) == MERGED
    assert n_hooks(module) == 0


class Noisy(PlantedNet):
    """Draws random numbers in validation too, so that a pass too many would show."""

    def forward(self, images):
        return super().forward(images + 0.01 * torch.randn_like(images))


@pytest.mark.parametrize(
    ("loop", "layers"), [("fit", "net.mix"), ("fit", None), ("validate", None), ("test", "net.mix")]
)
def test_losses_and_metrics_are_bit_for_bit_those_without_the_callback(loop, layers, tmp_path):
    results, weights, draws = [], [], []
    for callbacks in ([], [callback_for(layers)]):
        module, recorder = Autoencoder(Noisy()), Recorder()
        module.load_state_dict(Autoencoder().state_dict())
        torch.manual_seed(3)
        trainer = make_trainer(tmp_path, recorder, *callbacks, max_epochs=2)
        data = planted_loader(120)
        if loop == "fit":
            trainer.fit(module, data, data)
        else:
            getattr(trainer, loop)(module, data, verbose=False)
        results.append(recorder.seen)
        weights.append(module.state_dict())
        draws.append(torch.rand(3))
    assert results[0]
    for plain, watched in zip(*results, strict=True):
        assert plain.keys() == watched.keys()
        assert all(torch.equal(value, watched[name]) for name, value in plain.items())
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert torch.equal(*draws)


class Failing(Autoencoder):
    fail_at = 0

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        if batch_idx == self.fail_at:
            raise RuntimeError("on purpose")


@pytest.mark.parametrize("inference_mode", [True, False])
def test_an_exception_in_the_step_leaves_nothing_behind(inference_mode, tmp_path):
    module, callback = Failing(), callback_for()
    trainer = make_trainer(tmp_path, callback, inference_mode=inference_mode)
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.validate(module, planted_loader(), verbose=False)
    assert n_hooks(module) == n_modes() == 0
    assert torch.is_grad_enabled()
    assert trainer.validate_loop.inference_mode is inference_mode
    assert callback.report is None
    module.fail_at = None
    trainer = make_trainer(tmp_path, callback, inference_mode=inference_mode)
    trainer.validate(module, planted_loader(), verbose=False)
    assert trainer.validate_loop.inference_mode is inference_mode
    assert callback.report.n_images == 300


def test_the_trained_module_is_split_and_later_validations_judge_it(tmp_path):
    module, callback = Autoencoder(), callback_for(split=True)
    x = planted_images(seed=2)[0]
    trainer = make_trainer(tmp_path, callback, max_epochs=2)
    trainer.fit(module, planted_loader(), planted_loader())
    assert module.net.mix.channels.tolist() == [split.channel for split in callback.plan]
    assert sorted(found_in(callback.report)) == MERGED
    unsplit = copy.deepcopy(module)
    unsplit.net.mix = unsplit.net.mix.undo()
    with torch.no_grad():
        torch.testing.assert_close(module.eval()(x), unsplit.eval()(x), rtol=1e-5, atol=1e-5)
    report, other = callback.report, callback_for()
    for own in (callback, other):
        (metrics,) = make_trainer(tmp_path, own).validate(module, planted_loader(), verbose=False)
        assert metrics["polydis/net.mix/split_leak"] < 0.05
        assert metrics["polydis/net.mix/split_distortion"] < 0.05
        assert metrics["polydis/net.mix/split_auroc"] > 0.95
    assert callback.report is report
    assert other.plan == callback.plan
    expected = evaluate_splits(unsplit, callback.plan, plain_batches(), progress=False)
    assert metrics["polydis/net.mix/split_auroc"] == pytest.approx(
        sum(quality.mean("auroc") for quality in expected) / len(expected), abs=1e-5
    )


class Stop(Callback):
    """Ends a run between the last validation and the split."""

    def on_train_end(self, trainer, pl_module):
        raise RuntimeError("power cut")


def test_a_run_that_ended_before_the_split_is_split_when_it_is_taken_up_again(tmp_path):
    callback = callback_for(split=True)
    checkpoint = ModelCheckpoint(tmp_path, save_last=True)
    trainer = make_trainer(tmp_path, callback, checkpoint, Stop(), max_epochs=2, enable_checkpointing=True)
    module = Autoencoder()
    with pytest.raises(RuntimeError, match="power cut"):
        trainer.fit(module, planted_loader(), planted_loader())
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"][callback.state_key]
    restored = callback_for()
    restored.load_state_dict(state)
    assert restored.plan == callback.plan
    assert restored.report.concept_names == callback.report.concept_names
    assert restored.report.channels == callback.report.channels
    fresh, again = Autoencoder(), callback_for(split=True)
    with torch.no_grad():
        fresh.net.mix.weight.zero_()
    trainer = make_trainer(tmp_path, again, max_epochs=2)
    trainer.fit(fresh, planted_loader(), planted_loader(), ckpt_path=tmp_path / "last.ckpt")
    assert stored_plan(fresh).splits[0].centres is not None
    assert fresh.net.mix.channels.tolist() == [split.channel for split in callback.plan]
    trainer.save_checkpoint(tmp_path / "split.ckpt")
    loaded = load_from_checkpoint(Autoencoder, tmp_path / "split.ckpt")
    assert stored_plan(loaded) == stored_plan(fresh) == again.plan
    x = planted_images(20)[0]
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), fresh.eval()(x))


@pytest.mark.parametrize("layers", ["net.mix", None])
def test_a_compiled_module_gives_what_an_eager_one_gives(layers, tmp_path):
    torch._dynamo.reset()
    eager, compiled = Autoencoder(), Autoencoder()
    compiled.net.compile(backend="eager")
    callbacks = [callback_for(layers), callback_for(layers)]
    metrics = []
    for module, callback in zip((eager, compiled), callbacks, strict=True):
        metrics += make_trainer(tmp_path, callback).validate(module, planted_loader(), verbose=False)
    assert metrics[0] == metrics[1]
    same_findings(callbacks[1].report, callbacks[0].report)
    assert callbacks[0].report.pairs == callbacks[1].report.pairs
    assert callbacks[0].plan == callbacks[1].plan
    assert n_hooks(compiled) == 0
    torch._dynamo.reset()


class Attentive(nn.Module):
    """Attention in the form that has a faster path without gradients, before and after the layer that mixes sources."""

    def __init__(self):
        super().__init__()
        self.before = nn.TransformerEncoderLayer(48, 2, 16, batch_first=True)
        self.planted = PlantedNet()
        self.attention = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.last, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(16)

    def forward(self, images):
        net = self.planted
        images = images + 1e-3 * self.before(
            images.flatten(2).unflatten(2, (16, 16)).reshape(len(images), 16, 48)
        ).view_as(images)
        tokens = self.attention(net.act(net.mix(net.relu(net.sources(images)))).flatten(2).mT)
        return net.back(self.last(self.norm(tokens)).relu().mT.unflatten(2, (4, 4)))


class Keeping(Autoencoder):
    def validation_step(self, batch, batch_idx):
        self.kept = [*getattr(self, "kept", []), self(batch[0])]


@pytest.mark.parametrize("layers", ["net.planted.mix", "net.last", ["net.planted.mix", "net.last"], None])
def test_attention_keeps_its_fast_path_and_its_results(layers, tmp_path):
    torch.manual_seed(0)
    net = Attentive().eval()
    without, module = Keeping(copy.deepcopy(net)), Keeping(copy.deepcopy(net))
    callback = callback_for(layers)
    make_trainer(tmp_path).validate(without, planted_loader(), verbose=False)
    make_trainer(tmp_path, callback).validate(module, planted_loader(), verbose=False)
    assert len(module.kept) == 6
    assert all(map(torch.equal, module.kept, without.kept))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in module.net.state_dict().items())
    assert n_modes() == 0
    expected = find(module, plain_batches(), callback.report.settings["layers"])
    assert [channel.channel for channel in callback.report.channels] == [c.channel for c in expected.channels]
    if layers == "net.planted.mix":
        same_findings(callback.report, expected)
        assert sorted(found_in(callback.report)) == MERGED


def test_two_callbacks_watch_at_once(tmp_path):
    module, callbacks = Autoencoder(), [callback_for(name) for name in ("net.mix", "net.sources")]
    make_trainer(tmp_path, *callbacks).validate(module, planted_loader(), verbose=False)
    for callback, name in zip(callbacks, ("net.mix", "net.sources"), strict=True):
        assert callback.report.pairs == find(module, plain_batches(), name).pairs
    assert sorted(found_in(callbacks[0].report)) == MERGED
    assert n_modes() == 0


class Regressor(Autoencoder):
    """Batches are dictionaries; the target is a number."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", F.mse_loss(self(batch["image"]).mean((1, 2, 3)), batch["y"]))


def test_dictionaries_with_numbers_as_targets_are_fine(tmp_path):
    images, _ = planted_images()
    batches = [{"image": part, "y": part.mean((1, 2, 3))} for part in images.split(50)]
    callback = callback_for()
    data = torch.utils.data.DataLoader(batches, batch_size=None)
    make_trainer(tmp_path, callback).validate(Regressor(), data, verbose=False)
    assert sorted(found_in(callback.report)) == MERGED
    assert callback.report.cards[0].rows[0].images[0].pixels is not None


def test_mistakes_in_descriptions_and_functions_for_targets_end_the_run_in_words(tmp_path):
    for settings, message in (
        ({"describe_fn": lambda pictures: 3}, "Expected `describe_fn` to return a text, but got `int`"),
        ({"target_fn": lambda batch: batch["nope"]}, "`target_fn` raised TypeError"),
    ):
        module = Autoencoder()
        trainer = make_trainer(tmp_path, callback_for(dirpath=tmp_path, **settings))
        with pytest.raises(MisconfigurationException, match=message):
            trainer.validate(module, planted_loader(), verbose=False)
        assert n_hooks(module) == n_modes() == 0


class TwoPasses(Autoencoder):
    def validation_step(self, batch, batch_idx):
        self(batch[0])
        super().validation_step(batch, batch_idx)


def test_a_layer_that_runs_twice_in_a_step_is_refused_in_words(tmp_path):
    module = TwoPasses()
    with pytest.raises(MisconfigurationException, match="`net.mix` to run once in each forward pass, but it ran twice"):
        make_trainer(tmp_path, callback_for()).validate(module, planted_loader(), verbose=False)
    assert n_hooks(module) == n_modes() == 0


def test_clusters_behind_a_shifting_batch_norm_are_found_split_and_judged():
    """The same channels as without, moved away from 0 and back again by a batch norm."""
    net = PlantedNet(activation=nn.Sequential(nn.BatchNorm2d(8), nn.ReLU())).eval().requires_grad_(False)
    net.mix.bias -= 3
    net.act[0].running_mean.fill_(-3.0)
    batches = [(part,) for part in planted_images()[0].split(50)]
    report = find_polysemantic_channels(net, batches, "mix", concepts="clusters", progress=False)
    assert sorted(found.channel for found in report.channels) == MERGED
    assert all(split.zero == pytest.approx(-3, abs=1e-2) for split in report.plan)
    split = disentangle(net, report.plan)
    assert list(stored_plan(split)) == list(report.plan)
    assert SplitPlan.from_json(report.plan.to_json()) == report.plan
    judged = evaluate_splits(split, report.plan, batches, progress=False)
    assert all(concept.n_own > 20 for quality in judged for concept in quality.concepts)
