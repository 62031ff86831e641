"""What the plain functions take for a batch."""

import copy
from dataclasses import dataclass

import pytest
import torch

from lightning_polydis import evaluate_splits, find_polysemantic_channels
from lightning_polydis.batches import images_of
from tests.networks import conv_relu_net, make_batches, make_images, train_briefly

SETTINGS = {"relevance_threshold": 0.05, "class_fraction": 0.5, "similarity_threshold": 0.9, "progress": False}


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return train_briefly(conv_relu_net())


@dataclass(slots=True)
class Batch:
    images: torch.Tensor
    y: torch.Tensor


def looked_up(images):
    """The classes of images of `make_batches`, which come without them."""
    known, targets = (torch.cat(parts) for parts in zip(*make_batches(), strict=True))
    return targets[(images[:, None] == known).flatten(2).all(2).int().argmax(1)]


NAMED = {
    "dictionary": (lambda images, targets: {"image": images, "label": targets}, None),
    "dataclass": (Batch, None),
    "targets elsewhere": (
        lambda images, targets: {"x": images, "info": {"species": targets}},
        lambda batch: batch["info"]["species"],
    ),
    "images alone": (lambda images, targets: images, looked_up),
}


@pytest.mark.parametrize(("as_batch", "target_fn"), NAMED.values(), ids=NAMED)
def test_batches_with_names_are_read_as_pairs_are(trained, as_batch, target_fn):
    pairs = make_batches()
    batches = [as_batch(*pair) for pair in pairs]
    found = find_polysemantic_channels(trained, batches, "2", target_fn=target_fn, **SETTINGS)
    expected = find_polysemantic_channels(trained, pairs, "2", **SETTINGS)
    assert found.layers[0].n_candidates > 0
    assert found.to_json() == expected.to_json()
    plan = expected.plan_pairs([("2", 3, 0, 1)])
    judged, as_pairs = (
        evaluate_splits(trained, plan, data, target_fn=fn, progress=False)
        for data, fn in ((batches, target_fn), (pairs, None))
    )
    assert judged == as_pairs


IMAGES, TARGETS = make_images(n=8)
BAD_BATCHES = [
    ([], "at least one batch to analyse, but the data was empty"),
    ([IMAGES], r"but got `Tensor`. Pass `target_fn`"),
    ([(IMAGES,)], "but got `tuple` of length 1. Pass `target_fn`.* `concepts='clusters'` needs none"),
    (
        [{"picture": IMAGES, "y": TARGETS}],
        r"one of the entries image, .* but got the keys \['picture', 'y'\]. Turn yours into pairs: .* or use the callb",
    ),
    ([3], "a tensor of inputs, or a dictionary or dataclass .* but got `int`"),
    ([{"image": IMAGES}], r"one of the entries label, .* but got the keys \['image'\]"),
    ([(IMAGES, TARGETS.float())], "integer class indices, but got torch.float32"),
    ([(IMAGES, TARGETS > 1)], "integer class indices, but got torch.bool"),
    ([(IMAGES, torch.nn.functional.one_hot(TARGETS))], r"shape \[batch size\].* but got \[8, 4\]"),
    ([(IMAGES, TARGETS.tolist())], "tensor of class indices, but got `list`"),
    ([(IMAGES, TARGETS + 1)], r"class indices in \[0, 4\), but got values from 1 to 4"),
    ([(IMAGES, TARGETS - 100)], r"but got values from -100 to"),
    ([(IMAGES, TARGETS[:0])], r"but got \[0\]"),
    ([(IMAGES, TARGETS[:3])], r"logits of shape \[3, num_classes\], but got \[8, 4\]"),
]


@pytest.mark.parametrize(("batches", "message"), BAD_BATCHES)
@pytest.mark.parametrize("layers", ["2", None])
def test_bad_batches_are_refused_in_words(trained, batches, message, layers):
    net = copy.deepcopy(trained).train()
    with pytest.raises(ValueError, match=message):
        find_polysemantic_channels(net, batches, layers, **SETTINGS)
    assert net.training
    assert torch.is_grad_enabled()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


IMAGES = torch.rand(2, 3, 5, 4)


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        (IMAGES, 1),
        [IMAGES],
        {"pixel_values": IMAGES, "labels": 1},
        {"image": IMAGES},
        Batch(IMAGES, torch.zeros(2)),
    ],
    ids=["tensor", "tuple", "list", "huggingface", "dictionary", "dataclass"],
)
def test_images_are_found(batch):
    assert images_of(batch) is IMAGES


@pytest.mark.parametrize(
    "batch",
    [(torch.rand(2, 7), 1), (torch.rand(2, 4, 5, 5),), {"x": [1]}, "text", (), None],
    ids=["features", "four colours", "list", "text", "empty", "nothing"],
)
def test_what_is_no_image_is_none(batch):
    assert images_of(batch) is None
