import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from torchvision.transforms import v2

from lightning_polydis.thumbnails import (
    LARGEST,
    SMALLEST,
    UNCOUNTED,
    check_denormalize,
    exchanged,
    normalisation_of,
    thumbnail_side,
    thumbnails,
    to_exchange,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGES = torch.rand(2, 3, 5, 4)


def test_values_between_0_and_1_are_taken_as_they_are():
    images = torch.tensor([0.0, 0.5, 1.0]).view(1, 3, 1, 1).expand(1, 3, 4, 4)
    assert thumbnails(images, 96, None)[0, :, 0, 0].tolist() == [0, 128, 255]


def test_bytes_are_taken_as_they_are():
    images = torch.randint(256, (2, 3, 6, 6), dtype=torch.uint8)
    assert torch.equal(thumbnails(images, 96, None), images)


def test_grey_images_get_three_colours():
    shown = thumbnails(torch.rand(2, 1, 6, 6), 96, None)
    assert shown.shape == (2, 3, 6, 6)
    assert torch.equal(shown[:, 0], shown[:, 2])


@pytest.mark.parametrize("how", ["mean and std", "function"])
def test_normalisation_is_undone(how):
    pictures = torch.rand(2, 3, 6, 6)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    undo = (MEAN, STD) if how == "mean and std" else lambda images: images * std + mean
    expected = (255 * pictures).round().to(torch.uint8)
    found = thumbnails((pictures - mean) / std, 96, undo)
    assert (found.int() - expected.int()).abs().max() <= 1


def test_unknown_ranges_are_stretched_image_by_image():
    images = torch.stack([torch.linspace(-2, 3, 27).view(3, 3, 3), torch.linspace(10, 20, 27).view(3, 3, 3)])
    shown = thumbnails(images, 96, None)
    assert shown.amin((1, 2, 3)).tolist() == [0, 0]
    assert shown.amax((1, 2, 3)).tolist() == [255, 255]


@pytest.mark.parametrize("normalisation", [None, (MEAN, STD)], ids=["stretched", "mean and std"])
def test_small_pictures_show_the_values_of_large_ones(normalisation):
    """A bright pixel that vanishes in the small picture counts all the same."""
    images = torch.rand(2, 3, 200, 100) * 3 - 1
    images[0, :, 70, 30] = 20
    if normalisation is None:
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        large = (images - low) / (high - low)
    else:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in normalisation)
        large = images * std + mean
    small = torch.nn.functional.interpolate(large, (50, 25), mode="bilinear", antialias=True)
    expected = (255 * small.clamp(0, 1)).round()
    assert (thumbnails(images, 50, normalisation).float() - expected).abs().max() <= 1


def test_large_images_become_small_and_keep_their_shape():
    assert thumbnails(torch.rand(1, 3, 200, 100), 50, None).shape == (1, 3, 50, 25)


def test_side_follows_from_the_memory():
    assert thumbnail_side(10, 2**20) == LARGEST
    side = thumbnail_side(1000, 128 * 2**20 / 10)
    assert SMALLEST < side < LARGEST
    assert 3 * side**2 * 1000 <= 128 * 2**20 / 10


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "a function, a pair of means .* but got 3"),
        ("imagenet", "but got 'imagenet'"),
        (((0.5,), (0.5, 0.5)), "a pair of means and standard deviations"),
        (((0.5, 0.5), (0.5, 0.5)), "of the 1 or 3 colours"),
        ((("a",), ("b",)), "a pair of means"),
        (
            ((0.5, 0.5, 0.5), (0.2, 0, 0.2)),
            r"standard deviations of `denormalize` to be above 0, but got \(0.2, 0, 0.2\)",
        ),
        (((0.5,), (float("nan"),)), r"to be above 0, but got \(nan,\)"),
    ],
)
def test_bad_denormalize(value, message):
    with pytest.raises(ValueError, match=message):
        check_denormalize(value)


def test_a_function_may_work_in_place():
    images = torch.rand(2, 3, 5, 4)
    before = images.clone()
    thumbnails(images, 96, lambda own: own.mul_(0.5))
    assert torch.equal(images, before)


def test_failing_functions():
    def fails(images):
        raise KeyError("mean")

    with pytest.raises(ValueError, match="`denormalize` raised KeyError: 'mean'"):
        thumbnails(IMAGES, 96, fails)
    with pytest.raises(ValueError, match=r"Expected `denormalize` to return images .* but got \[2, 5, 4\]"):
        thumbnails(IMAGES, 96, lambda images: images[:, 0])


class Photos(Dataset):
    def __init__(self, transform):
        self.transform = transform

    def __len__(self):
        return 4


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, [0, 1])], ids=["plain", "subset"])
@pytest.mark.parametrize("place", [lambda loader: loader, lambda loader: [loader], lambda loader: {"val": loader}])
def test_the_data_sets_normalisation_is_found(wrap, place):
    transform = v2.Compose([v2.ToImage(), v2.Compose([v2.ToDtype(torch.float32), v2.Normalize(MEAN, STD)])])
    found = normalisation_of(place(DataLoader(wrap(Photos(transform)))))
    assert found == (list(MEAN), list(STD))


@pytest.mark.parametrize(
    "loader", [None, [], [(IMAGES, 1)], DataLoader(Photos(None)), DataLoader(Photos(v2.ToImage()))]
)
def test_data_without_normalisation(loader):
    assert normalisation_of(loader) is None


@pytest.mark.parametrize("shape", [(3,), (1, 3, 1, 1), (3, 1, 1)])
def test_mean_and_standard_deviation_as_tensors(shape):
    class Own:
        mean, std = torch.tensor(MEAN).view(shape), torch.tensor(STD).view(shape)

    found = normalisation_of(DataLoader(ConcatDataset([Photos(Own()), Photos(None)])))
    assert torch.tensor(found).allclose(torch.tensor([MEAN, STD]))


@pytest.mark.parametrize("mean", [torch.tensor(0.5), torch.zeros(4), "0.5", object()])
def test_what_is_no_normalisation_is_passed_over(mean):
    class Own:
        std = torch.ones(2)

    Own.mean = mean
    assert normalisation_of(DataLoader(Photos(Own()))) is None


def test_a_data_set_that_refuses_to_be_asked():
    class Refuses:
        def __getattr__(self, name):
            raise RuntimeError("do not touch")

    assert normalisation_of(Refuses()) is None


def test_the_loader_that_is_analysed_is_asked():
    loaders = [DataLoader(Photos(None)), DataLoader(Photos(v2.Normalize(MEAN, STD)))]
    assert normalisation_of(loaders) is None
    assert normalisation_of(loaders, 1) == (list(MEAN), list(STD))


def test_no_thumbnails_where_they_would_be_too_small():
    assert thumbnail_side(10**6, 2**20) == 0
    assert thumbnail_side(None, 2**20) == UNCOUNTED


def test_thumbnails_of_no_size_can_be_padded_by_whoever_exchanges_them():
    nothing = torch.empty(4, 3, 0, 0, dtype=torch.uint8)
    sent = to_exchange(nothing)
    assert (sent.numel() > 0, len(sent)) == (True, 4)
    assert exchanged(sent).shape == nothing.shape


def test_thumbnails_are_exchanged_as_they_are():
    pictures = torch.randint(256, (2, 3, 5, 4), dtype=torch.uint8)
    assert torch.equal(exchanged(to_exchange(pictures)), pictures)
