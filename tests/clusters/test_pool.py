"""Layer inputs and pictures that are kept, within a memory."""

import pytest
import torch
from torch import nn

from lightning_polydis.clusters.analysis import MAX_IMAGES
from lightning_polydis.clusters.pool import InputPool
from tests.clusters.runs import analysed, noise, small_net

pytestmark = [
    pytest.mark.filterwarnings("ignore:The layer inputs of only"),
    pytest.mark.filterwarnings("ignore:Only the .* strongest images"),
    pytest.mark.filterwarnings("ignore:The images do not fit"),
    pytest.mark.filterwarnings("ignore:The ``compute`` method"),
]

MEBIBYTE = 2**20

PER_IMAGE = 8 * 6 * 6 * 4
"""Bytes that the input of layer "2" takes for an image of 6 x 6."""


def test_with_room_for_all_every_strong_image_is_kept_as_the_layer_read_it():
    net, images = small_net(), noise(300, 3, 6, 6)
    analysis = analysed(net, images.split(50))
    lists, pool = analysis._lists["2"], analysis._pools["2"].compute()
    assert set(pool.images.tolist()) == set(lists.images.tolist())
    assert 200 <= len(pool.images) <= 300
    with torch.no_grad():
        torch.testing.assert_close(pool.inputs, net[:2](images[pool.images]))
    assert pool.pictures.shape == (len(pool.images), 3, 6, 6)


@pytest.mark.parametrize("n_images", [3, 17, 90])
def test_the_pool_stays_within_its_memory_after_every_batch(n_images):
    sizes = []

    def check(analysis):
        kept = analysis._pools["2"]._kept.values()
        sizes.append(sum(entry.inputs.nbytes for entry in kept))

    memory = n_images * PER_IMAGE
    analysis = analysed(small_net(), noise(300, 3, 6, 6).split(25), check=check, calibration_memory=memory / MEBIBYTE)
    assert max(sizes) <= memory
    pool = analysis._pools["2"].compute()
    assert pool.inputs.nbytes <= memory
    assert len(pool.images) > 0
    notes = analysis.compute().notes
    text = "The layer inputs of only 3 images fit into" if n_images == 3 else "The layer inputs of only the"
    assert any(text in note and "`calibration_memory`" in note for note in notes)


def test_those_that_stay_are_the_strongest():
    net, images = small_net(), noise(300, 3, 6, 6)
    analysis = analysed(net, images.split(25), calibration_memory=60 * PER_IMAGE / MEBIBYTE)
    lists, kept = analysis._lists["2"], set(analysis._pools["2"].compute().images.tolist())
    depth = max(depth for depth in range(1, 201) if set(lists.strongest(depth).tolist()) <= kept)
    assert depth > 3
    assert kept <= set(lists.strongest(depth + depth // 4 + 2).tolist())


def test_memory_for_less_than_one_image_keeps_none_and_gives_no_plan():
    analysis = analysed(small_net(), noise(60, 3, 6, 6).split(20), calibration_memory=0.5 * PER_IMAGE / MEBIBYTE)
    assert analysis._pools["2"].compute() is None
    assert analysis.compute().plan is None


def test_shares_of_several_layers_are_within_the_memory_together():
    net = nn.Sequential(*small_net(), nn.Conv2d(6, 4, 1))
    memory = 80 * PER_IMAGE
    with pytest.warns(UserWarning, match="strongest images of each channel of `2` fit into `calibration_memory`"):
        analysis = analysed(net, noise(300, 3, 6, 6).split(50), ["2", "4"], calibration_memory=memory / MEBIBYTE)
    pools = [analysis._pools[name].compute() for name in ("2", "4")]
    assert sum(pool.inputs.nbytes for pool in pools) <= memory
    assert all(len(pool.images) > 5 for pool in pools)


def test_vectors_are_within_half_of_the_memory_and_the_note_says_what_all_would_take():
    net = small_net()
    per_image = 6 * (2 * 8 + 20)
    memory = 100 * per_image * 2 / MEBIBYTE
    with pytest.warns(UserWarning, match=rf"Only the 100 strongest images of each channel of `2`, not {MAX_IMAGES}"):
        analysis = analysed(net, noise(300, 3, 6, 6).split(50), calibration_memory=memory, calibration_samples=0)
    lists = analysis._lists["2"]
    sizes = [len(lists.images[lists.rows(side)]) for side in range(6)]
    assert max(sizes) == 100
    assert lists.vectors.nbytes + lists.strengths.nbytes + 16 * len(lists.images) <= 100 * per_image
    assert "not 200, fit into half of" in analysis.compute().notes[0]


def test_without_samples_nothing_is_kept_and_without_limit_everything_strong():
    images = noise(100, 3, 6, 6).split(50)
    none = analysed(small_net(), images, calibration_samples=0)
    assert none._pools == {}
    assert none.compute().plan is None
    unlimited = analysed(small_net(), images, calibration_samples=None, calibration_memory=0.04)
    assert len(unlimited._pools["2"].compute().images) == 100


def test_half_precision_is_counted_as_the_single_precision_that_it_becomes():
    net = small_net().half()
    memory = 30 * PER_IMAGE
    analysis = analysed(net, noise(100, 3, 6, 6).half().split(25), calibration_memory=memory / MEBIBYTE)
    assert 0 < analysis._pools["2"].compute().inputs.nbytes <= memory


def update(pool, numbers, shape=(4, 2, 2), side=80):
    numbers = list(numbers)
    inputs = torch.stack([torch.full(shape, float(number)) for number in numbers])
    pictures = torch.rand(len(numbers), 3, side, side // 2, generator=torch.Generator().manual_seed(0))
    pool.update(numbers, inputs, torch.tensor(numbers), pictures, None)


def test_thumbnails_shrink_and_then_vanish_and_never_take_more_than_they_may():
    room = 3 * 80 * 40 * 5
    pool, sides = InputPool(room), []
    for start in range(0, 120, 2):
        update(pool, range(start, start + 2))
        assert sum(entry.picture.nbytes for entry in pool._kept.values()) <= room
        sides.append(max(max(entry.picture.shape[1:]) for entry in pool._kept.values()))
    assert sides[0] == 80
    assert sides[-1] == 0
    assert sides == sorted(sides, reverse=True)
    assert len(set(sides)) > 3
    assert all(side == 0 or side >= 32 for side in sides)
    pool.join(set(range(120)))
    found = pool.compute()
    assert found.pictures is None
    assert found.inputs[:, 0, 0, 0].tolist() == found.images.tolist() == found.labels.tolist()


def test_pictures_that_shrank_at_different_times_come_out_of_one_size():
    pool = InputPool(3 * 80 * 40 * 5)
    for start in range(0, 12, 3):
        update(pool, range(start, start + 3))
    update(pool, [20], side=40)
    pool.join(set(range(30)))
    found = pool.compute()
    assert found.pictures.shape[0] == 13
    assert found.pictures.dtype == torch.uint8
    assert 32 <= found.pictures.shape[2] < 80
    assert bool((found.pictures.flatten(1).float().std(1) > 1).all())


def test_inputs_of_another_shape_are_passed_over_and_views_keep_no_batch_alive():
    pool = InputPool(0)
    update(pool, [1, 2])
    update(pool, [3], shape=(4, 3, 3))
    assert sorted(pool._kept) == [1, 2]
    assert all(entry.inputs.untyped_storage().nbytes() == entry.inputs.nbytes for entry in pool._kept.values())
    pool.keep_only({2, 9})
    pool.join({2, 9})
    assert pool.compute().images.tolist() == [2]
    pool.reset()
    assert len(pool) == 0
    pool.join(set())
    assert pool.compute() is None


def test_images_of_several_sizes_are_analysed_and_those_of_the_first_size_kept():
    images = [noise(20, 3, 6, 6), noise(20, 3, 8, 8, seed=1), noise(20, 3, 6, 6, seed=2)]
    analysis = analysed(small_net(), images)
    assert set(analysis._lists["2"].images.tolist()) == set(range(60))
    pool = analysis._pools["2"].compute()
    assert set(pool.images.tolist()) == {*range(20), *range(40, 60)}


def test_a_note_says_that_there_is_no_room_for_pictures():
    with pytest.warns(UserWarning, match="images do not fit into an eighth of `calibration_memory`"):
        analysis = analysed(small_net(), noise(60, 3, 40, 40).split(20), calibration_memory=0.5)
    assert analysis._pools["2"].compute().pictures is None
