"""Concepts are named by descriptions, where there is a function for them."""

import pytest
import torch
from torch import nn

from lightning_polydis import PolysemanticityReport
from lightning_polydis.clusters.evidence import MAX_DESCRIBED
from tests.clusters.runs import class_batches, find, plain_batches
from tests.planted import CHANNELS, MERGED, planted_images


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
