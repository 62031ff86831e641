"""Polysemantic channels without labels, found by the plain function."""

import copy

import pytest
import torch
from torch import nn

from lightning_polydis import SplitPlan, evaluate_splits
from tests.clusters.runs import boxes, class_batches, find, found_in, n_modes, pattern_of, plain_batches
from tests.planted import CHANNELS, MERGED, planted_images
from tests.runs import n_hooks


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


@pytest.mark.parametrize("as_batch", [lambda images: images, lambda images: {"pixel_values": images}])
def test_images_need_no_tuple_around_them(planted, report, as_batch):
    batches = [as_batch(images) for (images,) in plain_batches()]
    found = find(planted, batches)
    assert found.to_json() == find(planted, plain_batches()).to_json()
    quality = evaluate_splits(planted, found.plan, batches, progress=False)
    assert quality == evaluate_splits(planted, found.plan, plain_batches(), progress=False)


def test_batches_without_images_are_refused_in_words(planted):
    with pytest.raises(ValueError, match=r"one of the entries image, .* but got the keys \['photo'\]"):
        find(planted, [{"photo": planted_images(20)[0]}])


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
