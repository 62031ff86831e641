"""What a layer reads and gives is seen while the network runs, which takes no notice."""

import pytest
import torch
from torch import nn

from lightning_polydis.clusters.watching import LayerWatcher
from lightning_polydis.forward import PassDone
from tests.clusters.runs import noise, small_net, watched
from tests.runs import n_hooks


def test_the_output_of_the_network_is_bit_for_bit_the_same_and_later_passes_too():
    net, x = small_net().train(), noise(3, 3, 6, 6)
    plain = net(x)
    watcher = LayerWatcher(net, {"2": net[2], "0": net[0]})
    for _ in range(3):
        watcher.start()
        output = net(x)
        seen = watcher.finish()
        assert torch.equal(output, plain)
        assert output.requires_grad
        assert output.grad_fn.name() == plain.grad_fn.name()
        assert not any(part.requires_grad for one in seen.values() for part in one)
        assert watcher.uses["2"].signs().tolist() == [1] * 6
        assert n_hooks(net) == 0


def test_a_layer_that_runs_twice_is_refused_in_words():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    net.append(net[0])
    watcher = LayerWatcher(net, {"0": net[0]})
    watcher.start()
    net(noise(2, 4))
    with pytest.raises(ValueError, match="layer `0` to run once in each forward pass, but it ran twice"):
        watcher.finish()
    assert n_hooks(net) == 0
    assert watcher._seen == {}


def test_layers_that_do_not_run_are_named_unless_they_ran_before():
    class Choosy(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.use = nn.Linear(4, 4), nn.Linear(4, 4), {"first"}

        def forward(self, x):
            for name in sorted(self.use):
                x = getattr(self, name)(x)
            return x

    net, x = Choosy(), noise(2, 4)
    watcher = LayerWatcher(net, {"first": net.first, "second": net.second})
    watcher.start()
    net(x)
    with pytest.raises(ValueError, match="`second` did not run, or in a function that is compiled"):
        watcher.finish()
    net.use = {"first", "second"}
    watcher.start()
    net(x)
    assert list(watcher.finish()) == ["first", "second"]
    net.use = set()
    watcher.start()
    net(x)
    assert watcher.finish() == {}, "a pass that leaves all of them out, as every other step may"
    net.use = {"first"}
    watcher.start()
    net(x)
    with pytest.raises(ValueError, match="`second` did not run"):
        watcher.finish()


def test_an_exception_in_the_network_leaves_hooks_that_close_takes_off():
    class Fails(nn.Module):
        def forward(self, x):
            raise KeyError("the user's own")

    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), Fails())
    watcher = LayerWatcher(net, {"0": net[0]})
    watcher.start()
    with pytest.raises(KeyError, match="the user's own"):
        net(noise(2, 4))
    assert torch._C._len_torch_function_stack() == 1
    watcher.close()
    assert torch._C._len_torch_function_stack() == n_hooks(net) == 0
    assert watcher._outputs == []


def test_a_rehearsal_stops_behind_the_layers_and_what_reads_them():
    ran = []

    class Note(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def forward(self, x):
            ran.append(self.name)
            return x * 1

    net = nn.Sequential(nn.Linear(4, 4), Note("between"), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    net.extend([nn.Linear(4, 4), Note("after")]).eval()
    watcher = LayerWatcher(net, {"0": net[0], "2": net[2]})
    for _ in range(2):
        watcher.start(rehearsal=True)
        with pytest.raises(PassDone), torch.no_grad():
            net(noise(2, 4))
        assert list(watcher.finish()) == ["0", "2"]
        assert watcher.uses["2"].signs().tolist() == [1] * 4
    assert ran == ["between"] * 2
    assert n_hooks(net) == 0


def test_after_a_stopped_rehearsal_work_on_the_way_out_is_done_undisturbed():
    """Gradients are turned on again, buffers put back: functions too, which must not stop anything once more."""
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    watcher = LayerWatcher(net, {"0": net[0]})
    watcher.start(rehearsal=True)
    try:
        with torch.no_grad():
            net(noise(2, 4))
    except PassDone:
        buffer = torch.zeros(3).copy_(torch.ones(3))
    assert torch.is_grad_enabled()
    assert buffer.tolist() == [1, 1, 1]
    assert list(watcher.finish()) == ["0"]
    assert torch._C._len_torch_function_stack() == 0


def test_nothing_watches_functions_before_the_layer_or_after_the_first_pass():
    """Where something does, attention computes by another kernel."""

    class Ask(nn.Module):
        def forward(self, x):
            asked.append(torch.overrides.has_torch_function((x,)))
            return x

    asked = []
    net = nn.Sequential(Ask(), nn.Linear(4, 4), Ask())
    watcher = LayerWatcher(net, {"1": net[1]})
    for _ in range(2):
        watcher.start()
        net(noise(2, 4))
        watcher.finish()
    assert asked == [False, True, False, False]


def test_inputs_that_the_network_overwrites_later_are_seen_as_they_were():
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            read = x * 1
            y = self.fc(read)
            read.zero_()
            return y

    x = noise(2, 4)
    _, seen, _ = watched(Overwrites(), x, "fc")
    assert torch.equal(seen["fc"].inputs, x)


def test_keyword_inputs_are_seen():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x):
            return self.fc(input=x)

    _, seen, output = watched(Named(), noise(2, 4), "fc")
    assert torch.equal(seen["fc"].outputs, output)
