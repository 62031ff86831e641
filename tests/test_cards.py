"""Cards and overviews against plain re-derivations on the samples."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_polydis import PolysemanticityReport, find_polysemantic_channels
from lightning_polydis.card_builder import CROP
from tests.networks import BottleneckNet, make_batches, make_images, train_briefly

LAYER = "blocks.1.conv3"
SETTINGS = {"relevance_threshold": 0.02, "class_fraction": 0.5, "similarity_threshold": 0.6, "progress": False}


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return train_briefly(BottleneckNet())


@pytest.fixture(scope="module")
def report(network):
    return find_polysemantic_channels(network, make_batches(n=96), LAYER, **SETTINGS)


@pytest.fixture(scope="module")
def samples(report):
    return report._evidence[LAYER].samples


def parts_by_hand(network, samples, split):
    """Outputs of the channel and its concepts on all samples, ``[N, K + 1, P]``, in ``float64``."""
    layer = network.get_submodule(LAYER)
    own = layer.weight[split.channel].detach().double()
    shares = [torch.ones(split.membership.shape[1]), *split.membership]
    outputs = [
        torch.nn.functional.conv2d(samples.inputs.double(), (share.double()[:, None, None] * own)[None])
        for share in shares
    ]
    signs = split.signs()
    directions = torch.tensor([1 if sum(signs) >= 0 else -1, *signs])
    return (torch.cat(outputs, 1) * directions[:, None, None]).clamp(min=0)


def test_one_card_for_each_flagged_channel(report):
    assert 2 < len(report.channels) < 20
    assert [card.channel for card in report.cards] == [found.channel for found in report.channels]


def test_images_are_those_that_activate_each_row_most(network, report, samples):
    for card, split in zip(report.cards, report.plan, strict=True):
        activations = parts_by_hand(network, samples, split).sum((2, 3))
        for row, own in zip(card.rows, activations.T, strict=True):
            order = own.argsort(descending=True)[: len(row.images)]
            assert [image.target for image in row.images] == samples.targets[order].tolist()
            found = [image.activation for image in row.images]
            np.testing.assert_allclose(found, own[order], rtol=1e-4)
            assert len(row.images) == min(8, int((own > 0).sum()))


def test_pictures_are_those_of_the_images(report, samples):
    image = report.cards[0].rows[0].images[0]
    assert any(torch.equal(image.pixels, picture) for picture in samples.thumbnails)


def test_activations_are_those_on_each_concepts_images(network, report, samples):
    card, split = report.cards[0], report.plan.splits[0]
    activations = parts_by_hand(network, samples, split).sum((2, 3))
    for row, own in zip(card.rows, activations.T, strict=True):
        for values, concept in zip(row.activations, card.concepts, strict=True):
            expected = own[torch.isin(samples.targets, torch.tensor(concept))].sort().values
            assert len(values) == min(64, len(expected))
            np.testing.assert_allclose([values[0], values[-1]], expected[[0, -1]], rtol=1e-3, atol=1e-6)


def test_sources_are_those_that_add_most(network, report, samples):
    layer = network.get_submodule(LAYER)
    for card, split in zip(report.cards, report.plan, strict=True):
        for index, concept in enumerate(card.concepts):
            inputs = samples.of_classes(concept).inputs.double().sum((2, 3)).mean(0)
            weight = layer.weight[card.channel, :, 0, 0].detach().double()
            strength = split.signs()[index] * split.membership[index].double() * weight * inputs
            order = strength.argsort(descending=True)[: len(card.sources[index])]
            assert [source.source for source in card.sources[index]] == order.tolist()
            np.testing.assert_allclose([s.strength for s in card.sources[index]], strength[order], rtol=1e-4)


def test_similarities_interval_and_threshold(report):
    for card, found in zip(report.cards, report.channels, strict=True):
        matrix = np.array(card.class_similarities)
        assert matrix.min() == pytest.approx(found.cosine_similarity, abs=1e-4)
        assert np.allclose(matrix, matrix.T)
        assert card.interval[0] <= card.interval[1]
        assert card.threshold == 0.6
        assert sorted(card.classes) == found.classes


def test_crops_show_where_the_channel_is_active():
    """One bright spot in each image; the layer sees it where it is."""
    torch.manual_seed(0)
    images = torch.zeros(40, 3, 64, 64)
    targets = torch.arange(40) % 2
    for index, target in enumerate(targets.tolist()):
        images[index, target, 4:12, 44:52] = 1.0  # at the top on the right
    net = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Conv2d(8, 2, 4, 4, bias=False), nn.ReLU())
    net = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        net[0][0].weight.zero_()
        net[0][0].weight[0, 0] = net[0][0].weight[1, 1] = 1
        net[0][2].weight.zero_()
        net[0][2].weight[0, :2] = 1  # the first channel adds both colours up
        net[3].weight.fill_(1)
    batches = list(zip(images.split(8), targets.split(8), strict=True))
    report = find_polysemantic_channels(net, batches, "0.2", similarity_threshold=0.5, progress=False)
    crop = report.cards[0].rows[0].images[0].pixels
    side = round(CROP * 64)
    assert crop.shape == (3, side, side)
    assert torch.equal(crop, (255 * images[0, :, :side, -side:]).byte())


def test_without_images_there_are_cards_without_pictures():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    targets = torch.arange(90) % 3
    inputs = torch.randn(90, 6) + 2 * nn.functional.one_hot(targets, 6)
    place = {**SETTINGS, "relevance_threshold": 0.001, "class_fraction": 0.1, "similarity_threshold": 0.999}
    report = find_polysemantic_channels(net, [(inputs, targets)], "2", **place)
    assert report.cards
    assert all(row.images == [] for card in report.cards for row in card.rows)
    assert any(row.activations[0] for card in report.cards for row in card.rows)


def test_without_samples_there_are_no_cards(network):
    report = find_polysemantic_channels(network, make_batches(), LAYER, calibration_samples=0, **SETTINGS)
    assert report.cards == []
    assert report.overviews[0].layer == LAYER


def test_the_overview_counts_all_candidate_pairs(network, report):
    overview, summary = report.overviews[0], report.layers[0]
    assert sum(overview.n_candidate_pairs) == summary.n_candidate_pairs
    assert sum(overview.n_flagged_pairs) == summary.n_pairs
    assert all(f <= c for f, c in zip(overview.n_flagged_pairs, overview.n_candidate_pairs, strict=True))
    assert overview.thresholds == (0.6, 0.6)
    assert overview.channels[: len(report.channels)] == [found.channel for found in report.channels]
    assert len(overview.channels) == min(40, summary.n_candidates)


def test_the_overviews_relevance_is_a_share_of_images(report):
    overview, statistics = report.overviews[0], report._evidence[LAYER].statistics
    for channel, row in zip(overview.channels, overview.relevance, strict=True):
        expected = [
            float(statistics.counts[0, label, channel] / statistics.n_images[label]) for label in overview.classes
        ]
        np.testing.assert_allclose(row, expected, atol=1e-4)


def test_near_misses_come_nearest_first(network):
    report = find_polysemantic_channels(
        network, make_batches(n=96), LAYER, **{**SETTINGS, "similarity_threshold": -0.99}
    )
    assert not report.channels
    overview = report.overviews[0]
    assert len(overview.near_misses) == min(10, report.layers[0].n_candidates)
    missed_by = [miss.cosine_similarity - miss.threshold for miss in overview.near_misses]
    assert missed_by == sorted(missed_by)
    assert missed_by[0] >= 0
    assert overview.near_misses[0].cosine_similarity == pytest.approx(report.layers[0].min_cosine)
    assert report.cards == []


def test_layers_without_candidates_have_an_overview(network):
    place = {**SETTINGS, "relevance_threshold": 1.0, "class_fraction": 1.0}
    report = find_polysemantic_channels(network, make_batches(n=96), LAYER, **place)
    overview = report.overviews[0]
    assert report.layers[0].n_candidates == 0
    assert (overview.channels, overview.classes, overview.near_misses) == ([], [], [])


def test_cards_and_overviews_come_back_from_a_file(report, tmp_path):
    _ = report.cards, report.overviews
    report.save(tmp_path / "report.json")
    loaded = PolysemanticityReport.load(tmp_path / "report.json")
    assert loaded.overviews == report.overviews
    for found, card in zip(loaded.cards, report.cards, strict=True):
        assert {**vars(found), "rows": None} == {**vars(card), "rows": None}
        for ours, theirs in zip(found.rows, card.rows, strict=True):
            assert (ours.classes, ours.activations) == (theirs.classes, theirs.activations)
            for one, other in zip(ours.images, theirs.images, strict=True):
                assert (one.target, one.activation) == (other.target, other.activation)
                difference = (one.pixels.float() - other.pixels.float()).abs().mean()
                assert difference < 40  # JPEG of noise


def test_a_file_without_cards(report, network, tmp_path):
    fresh = find_polysemantic_channels(network, make_batches(), LAYER, **SETTINGS)
    fresh.save(tmp_path / "report.json")
    loaded = PolysemanticityReport.load(tmp_path / "report.json")
    assert (loaded.cards, loaded.overviews, loaded.history) == ([], [], [])


def test_pictures_are_denormalised(network):
    images, targets = make_images(96)
    report = find_polysemantic_channels(
        network, [(images, targets)], LAYER, denormalize=lambda batch: torch.full_like(batch, 0.5), **SETTINGS
    )
    assert report.cards[0].rows[0].images[0].pixels.unique().tolist() == [128]


def test_a_card_speaks_of_its_lowest_flagged_pair(report):
    for card in report.cards:
        own = [pair for pair in report.pairs if (pair.layer, pair.channel) == (card.layer, card.channel)]
        lowest = min(own, key=lambda pair: pair.cosine_similarity)
        assert (card.cosine_similarity, card.interval) == (lowest.cosine_similarity, lowest.interval)


def test_cards_show_so_many_concepts_and_classes_and_say_how_many_there_are(network, monkeypatch):
    monkeypatch.setattr("lightning_polydis.card_builder.MAX_CONCEPTS", 1)
    monkeypatch.setattr("lightning_polydis.card_builder.MAX_CLASSES", 1)
    found = find_polysemantic_channels(network, make_batches(n=96), LAYER, **SETTINGS)
    for card, channel in zip(found.cards, found.channels, strict=True):
        assert card.concepts == channel.concepts[:1]
        assert len(card.rows) == 2
        assert (card.classes, card.class_similarities) == (channel.concepts[0][:1], [[1.0]])
        assert (card.n_concepts, card.n_classes) == (len(channel.concepts), len(channel.classes))


def test_classes_are_taken_from_all_concepts(network, monkeypatch):
    monkeypatch.setattr("lightning_polydis.card_builder.MAX_CLASSES", 2)
    place = {**SETTINGS, "relevance_threshold": 0.001, "class_fraction": 0.1, "similarity_threshold": 0.9}
    found = find_polysemantic_channels(network, make_batches(n=96), LAYER, **place)
    cut = [card for card in found.cards if card.n_classes is not None]
    assert cut
    for card in cut:
        assert card.classes == [concept[0] for concept in card.concepts]
        assert len(card.class_similarities) == len(card.classes)


def test_near_misses_say_what_was_measured_and_what_was_compared(network):
    """With "auto" the noise is taken out first, and what may be noise alone is no near miss."""
    place = {"relevance_threshold": 0.02, "class_fraction": 0.3, "progress": False}
    found = find_polysemantic_channels(network, make_batches(n=32), LAYER, **place)
    evidence, misses = found._evidence[LAYER], found.overviews[0].near_misses
    assert misses
    flagged = {channel.channel for channel in found.channels}
    for miss in misses:
        assert miss.channel not in flagged
        classes = evidence.relevant()[:, miss.channel].nonzero()[:, 0].tolist()
        similarities = evidence.similarities(miss.channel, classes)
        a, b = classes.index(miss.class_a), classes.index(miss.class_b)
        assert miss.cosine_similarity == pytest.approx(similarities.cosine[a, b])
        assert miss.compared == pytest.approx(similarities.corrected[a, b])
        assert miss.compared < 1
