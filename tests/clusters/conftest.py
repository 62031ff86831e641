import pytest
import torch

from tests.clusters.runs import class_batches, find
from tests.planted import N_PATTERNS, PlantedNet, planted_images


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
