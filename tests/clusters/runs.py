"""Searches for clusters on small networks, and parts of them."""

import torch
from torch import nn

from lightning_polydis import find_polysemantic_channels
from lightning_polydis.clusters.analysis import ClusterAnalysis
from lightning_polydis.clusters.watching import LayerWatcher
from lightning_polydis.settings import AnalysisSettings
from tests.planted import planted_images


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, 1), nn.ReLU())


def settings(layers="2", **kwargs):
    return AnalysisSettings(**{"layers": layers, "concepts": "clusters", **kwargs})


def analysed(net, batches, layers="2", check=lambda analysis: None, **kwargs):
    """An analysis that has seen some batches and is gathered."""
    analysis = ClusterAnalysis(net, settings(layers, **kwargs))
    with torch.no_grad():
        for batch in batches:
            batch = batch if isinstance(batch, tuple) else (batch,)
            analysis.start_batch(batch)
            net(batch[0])
            analysis.finish_batch()
            check(analysis)
    analysis.gather()
    return analysis


def watched(net, x, *names, **kwargs):
    layers = {name: net.get_submodule(name) for name in names}
    watcher = LayerWatcher(net, layers)
    watcher.start(**kwargs)
    with torch.no_grad():
        output = net(x)
    return watcher, watcher.finish(), output


def find(net, batches, layers="mix", **settings):
    return find_polysemantic_channels(net, batches, layers, concepts="clusters", progress=False, **settings)


def plain_batches(n=300, seed=0, size=50):
    return [(part,) for part in planted_images(n, seed)[0].split(size)]


def class_batches(n=300, seed=0, size=50):
    images, own = planted_images(n, seed)
    return list(zip(images.split(size), own.split(size), strict=True))


def boxes(images):
    return [{"boxes": torch.zeros(index % 3, 4), "labels": torch.ones(index % 3)} for index in range(len(images))]


def found_in(report):
    return {found.channel: found for found in report.channels}


def pattern_of(report, channel, number):
    """The pattern that fills a concept."""
    return found_in(report)[channel].contents[number][0][0]


def n_modes():
    """Modes in force that see every function."""
    return torch._C._len_torch_function_stack()
