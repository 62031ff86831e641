"""Clusters where memory is short, on other dtypes and devices, and where parts of the evidence are missing."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18

from lightning_polydis import ChannelSplit, find_polysemantic_channels
from lightning_polydis.clusters.pool import InputPool
from lightning_polydis.clusters.top_images import TopImages, sides_of
from lightning_polydis.evaluation import nearest_concepts
from lightning_polydis.layers import flat_weight
from tests.planted import PlantedNet, planted_images


def analysed(model, images, **settings):
    batches = [(part,) for part in images.split(16)]
    return find_polysemantic_channels(model, batches, "mix", concepts="clusters", progress=False, **settings)


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def test_the_default_dtype_changes_nothing(default_dtype):
    torch.set_default_dtype(torch.float32)
    model, images = PlantedNet().eval(), planted_images()[0]
    expected = analysed(model, images)
    torch.set_default_dtype(default_dtype)
    found = analysed(model, images)
    assert len(expected.channels) > 0
    assert [one.channel for one in found.channels] == [one.channel for one in expected.channels]
    assert found.plan == expected.plan


def test_a_metric_that_saw_nothing_exchanges_on_its_own_device(monkeypatch):
    """NCCL takes no tensors of the CPU."""
    devices, make_room = [], TopImages._make_room

    def on_the_cpu(top, device):
        devices.append(device.type)
        make_room(top, torch.device("cpu"))

    monkeypatch.setattr(TopImages, "_make_room", on_the_cpu)
    TopImages(sides_of(3, None), n_inputs=2, limit=4).to("meta").trim()
    assert devices == ["meta"]


def test_too_little_memory_for_any_cluster_is_told():
    model, images = PlantedNet().eval(), planted_images()[0]
    with pytest.warns(UserWarning, match="fewer than 24 show no clusters, which takes"):
        report = analysed(model, images, calibration_memory=0.002)
    assert not report.channels
    assert any("would hold them all" in note and " 0 MiB" not in note for note in report.notes)


def test_without_a_limit_inputs_of_weak_images_are_let_go():
    """Images come weakest first, so each batch drives earlier ones out of the lists."""
    layer = nn.Linear(1, 1, bias=False)
    nn.init.ones_(layer.weight)
    images = torch.linspace(0.1, 1, 2000)[:, None]
    batches = [(part,) for part in images.split(20)]
    sizes = []
    keep_only = InputPool.keep_only

    def counted(pool, wanted):
        sizes.append(len(pool))
        keep_only(pool, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputPool, "keep_only", counted)
        find_polysemantic_channels(
            nn.Sequential(layer), batches, "0", concepts="clusters", calibration_samples=None, progress=False
        )
    assert len(sizes) > 3
    assert max(sizes) <= 450  # twice 200, and a batch


def test_a_concept_whose_pictures_are_gone_keeps_its_plain_name():
    model, images = PlantedNet().eval(), planted_images()[0]
    shown = []

    def describe(pictures):
        shown.append(len(pictures))
        return "described"

    report = analysed(model, images, describe_fn=describe)
    evidence = report._evidence["mix"]
    found = report.channels[0]
    rows = [evidence.members(found.channel).rows[number] for number in found.concepts[0]]
    gone = torch.isin(evidence.pool.images, evidence.lists.images[torch.cat(rows)])
    assert bool(gone.any())
    evidence.__dict__.pop("_by_number", None)
    for name in ("images", "labels", "inputs", "pictures"):
        setattr(evidence.pool, name, getattr(evidence.pool, name)[~gone])
    names = report.concept_names[found.layer, found.channel]
    assert names[0] == "cluster 1"
    assert set(names[1:]) == {"described"}
    assert 0 not in shown


def test_pictures_of_some_processes_alone_are_left_out():
    pools = []
    for picture_bytes in (2**20, 0):
        pool = InputPool(picture_bytes)
        pool.update([len(pools)], torch.ones(1, 4), None, torch.rand(1, 3, 40, 40), None)
        pool.join({0, 1})
        pools.append(pool)
    for name in ("images", "labels", "inputs", "pictures"):
        setattr(pools[0], name, getattr(pools[0], name) + getattr(pools[1], name))  # as after an exchange
    assert pools[0].compute().pictures is None


@pytest.mark.parametrize(("kernel", "size", "warned"), [(3, 2, True), (3, 3, False), (1, 2, False)])
def test_maps_that_read_padding_everywhere_are_told(kernel, size, warned):
    layer = nn.Conv2d(3, 4, kernel, padding="same")
    batches = [(torch.randn(30, 3, size, size),)]
    report = find_polysemantic_channels(nn.Sequential(layer), batches, "0", concepts="clusters", progress=False)
    assert any("Every position of `0` reads padding" in note for note in report.notes) is warned


@pytest.mark.filterwarnings("ignore:Every position of `layer4")
@pytest.mark.parametrize("size", [48, 96])
def test_padding_makes_no_clusters_on_small_maps(size):
    """Maps of 2 x 2 to 6 x 6 positions of a network that has learned nothing; with padding a third is flagged."""
    torch.manual_seed(0)
    model, layers = resnet18().eval(), ["layer3.0.conv2", "layer4.1.conv2"]
    batches = [(torch.randn(30, 3, size, size),) for _ in range(4)]
    report = find_polysemantic_channels(
        model, batches, layers, concepts="clusters", progress=False, calibration_samples=0
    )
    assert sum(layer.n_channels for layer in report.layers) == 768
    assert len(report.channels) <= 0.02 * 768
    assert report.n_images == 120


def nearest_slowly(layer, inputs, split):
    """Image by image, position by position, offset by offset, in ``float64``, for a 3 x 3 layer with padding 1."""
    weight, found = layer.weight[split.channel].double(), []
    for image in inputs.double():
        vectors = torch.zeros(2, len(weight), dtype=torch.float64)
        totals = [0.0, 0.0]
        for i, j in product(range(1, image.shape[1] - 1), range(1, image.shape[2] - 1)):
            added = (image[:, i - 1 : i + 2, j - 1 : j + 2] * weight).sum((1, 2))
            above = float(added.sum() + layer.bias[split.channel]) - split.zero
            for concept, sign in enumerate(split.directions):
                if sign * above > 0:
                    vectors[concept] += sign * added
                    totals[concept] += sign * above
        able = [concept for concept in (0, 1) if totals[concept] >= split.floors[concept]]
        likeness = [float(F.cosine_similarity(vectors[one], split.centres[one].double(), dim=0)) for one in able]
        found.append(able[likeness.index(max(likeness))] if able else -1)
    return found


@pytest.mark.parametrize("directions", [[1, 1], [1, -1]])
def test_concepts_of_images_are_told_by_positions_that_read_no_padding(directions):
    torch.manual_seed(3)
    layer = nn.Conv2d(6, 3, 3, padding=1).requires_grad_(False)
    centres = F.normalize(torch.randn(2, 6), dim=1)
    split = ChannelSplit(
        "0", 1, [[0], [1]], torch.full((2, 6), 0.5), directions=directions, centres=centres, floors=[2.5, 2.5], zero=0.1
    )
    inputs = torch.randn(60, 6, 5, 4)
    outputs = layer(inputs)[:, 1].flatten(1)
    found = nearest_concepts(layer, inputs, flat_weight(layer)[1], outputs, split, 1)
    assert found.tolist() == nearest_slowly(layer, inputs, split)
    assert set(found.tolist()) == {-1, 0, 1}
