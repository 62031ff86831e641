"""Clusters where memory is short, on other dtypes and devices, and where parts of the evidence are missing."""

import pytest
import torch
from torch import nn

from lightning_polydis import find_polysemantic_channels
from lightning_polydis.clusters.pool import InputPool
from lightning_polydis.clusters.top_images import TopImages, sides_of
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


@pytest.mark.parametrize(("kernel", "size", "warned"), [(3, 2, True), (3, 8, False), (1, 2, False)])
def test_maps_of_few_positions_are_told(kernel, size, warned):
    layer = nn.Conv2d(3, 4, kernel, padding="same")
    batches = [(torch.randn(30, 3, size, size),)]
    report = find_polysemantic_channels(nn.Sequential(layer), batches, "0", concepts="clusters", progress=False)
    assert any("sees other padding" in note for note in report.notes) is warned
