"""Reports of clusters in all their kinds, for tests of what shows them."""

import pytest

from tests.sample_reports import DESCRIBED

LAYER = "net.layer4.2.conv3"
LONG_NAMES = [f"a very long name of a class of dogs or of sailing boats {index}" for index in range(10)]
ONE_LINE = " ".join(DESCRIBED.split())
VARIANTS = {
    "labels": {},
    "long names": {"class_names": LONG_NAMES},
    "no labels": {"labels": False},
    "described": {"described": True},
    "described without labels": {"described": True, "labels": False},
}

variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
