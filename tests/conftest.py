import copy
import os

import pytest
import torch
from hypothesis import Phase, settings

from tests.networks import Classifier, conv_relu_net, train_briefly

quick = [Phase.explicit, Phase.generate]  # to make a failing example smaller takes minutes: nightly
settings.register_profile("ci", max_examples=15, deadline=None, derandomize=True, phases=quick)
settings.register_profile("nightly", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """The tests' networks are so small that more threads only wait for each other, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def net():
    """A small network, trained; whoever changes it takes a copy."""
    torch.manual_seed(0)
    return train_briefly(conv_relu_net())


@pytest.fixture(scope="module")
def state(net):
    return copy.deepcopy(net.state_dict())


@pytest.fixture
def module(state):
    module = Classifier()
    module.net.load_state_dict(state)
    return module
