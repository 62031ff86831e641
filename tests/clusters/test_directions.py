"""What reads a layer tells in which direction its channels are used, and from where on they are on."""

from contextlib import nullcontext, suppress

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_polydis.clusters import watching
from lightning_polydis.clusters.watching import LayerWatcher
from lightning_polydis.forward import PassDone
from tests.clusters.runs import analysed, noise, watched
from tests.runs import n_hooks


class Reading(nn.Module):
    """A convolution and something that reads it."""

    def __init__(self, rest, read=lambda self, x: self.rest(x)):
        super().__init__()
        self.conv, self.rest, self.read = nn.Conv2d(3, 4, 3, padding=1), rest, read
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x):
        return self.head(self.read(self, self.conv(x)))


def norm(*weights):
    norm = nn.BatchNorm2d(4).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(weights))
    return norm


TURNED = (1.0, -0.5, 2.0, -3.0)
SIGNS = {
    "ReLU": (nn.ReLU(), [1, 1, 1, 1]),
    "in-place ReLU": (nn.ReLU(inplace=True), [1, 1, 1, 1]),
    "GELU": (nn.GELU(), [1, 1, 1, 1]),
    "SiLU": (nn.SiLU(inplace=True), [1, 1, 1, 1]),
    "batch norm that turns two round": (nn.Sequential(norm(*TURNED), nn.ReLU()), [1, -1, 1, -1]),
    "in-place ReLU behind batch norm": (nn.Sequential(norm(*TURNED), nn.ReLU(inplace=True)), [1, -1, 1, -1]),
    "two batch norms": (nn.Sequential(norm(*TURNED), norm(-1.0, -1.0, 1.0, 1.0), nn.ReLU()), [-1, 1, 1, -1]),
    "batch norm without weights": (nn.Sequential(nn.BatchNorm2d(4, affine=False), nn.ReLU()), [1, 1, 1, 1]),
    "batch norm alone": (norm(*TURNED), None),
    "leaky": (nn.LeakyReLU(), None),
    "tanh": (nn.Tanh(), None),
    "nothing": (nn.Identity(), None),
    "pooled before": (nn.Sequential(nn.AvgPool2d(2), nn.ReLU()), None),
}


@pytest.mark.parametrize("rehearsal", [False, True])
@pytest.mark.parametrize(("rest", "expected"), SIGNS.values(), ids=SIGNS)
def test_what_reads_the_layer_tells_in_which_direction_its_channels_are_used(rest, expected, rehearsal):
    net, x = Reading(rest), noise(2, 3, 6, 6)
    net.eval()
    layer = {"conv": net.conv}
    watcher = LayerWatcher(net, layer)
    watcher.start(rehearsal=rehearsal)
    try:
        with torch.no_grad():
            net(x)
    except PassDone:
        assert rehearsal
    assert torch.is_grad_enabled()
    seen = watcher.finish()["conv"]
    use = watcher.uses["conv"]
    signs = None if use is None else use.signs()
    assert (None if signs is None else signs.tolist()) == expected
    assert torch.equal(seen.inputs, x)
    torch.testing.assert_close(seen.outputs, net.conv(x), msg="an in-place function overwrote it")
    assert n_hooks(net) == 0


def residual(self, x):
    return self.rest(x + 1) + x


def zeroed(self, x):
    x[:, 0] = 0
    return x.relu()


def overwritten(self, x):
    rectified = F.relu(x, inplace=True)
    return x.tanh() + rectified - x


def normed(self, x):
    return F.batch_norm(x, torch.zeros(4), torch.ones(4), torch.tensor(TURNED))


def looked_at(self, x):
    assert (x.shape, x.device.type, x.dtype, x.is_contiguous(), len(x)) == ((2, 4, 6, 6), "cpu", x.dtype, True, 2)
    return x.relu()


FUNCTIONS = {
    "residual": (residual, None),
    "method": (lambda self, x: x.relu(), [1] * 4),
    "in-place method": (lambda self, x: x.relu_(), [1] * 4),
    "function": (lambda self, x: F.relu(x), [1] * 4),
    "in-place function": (lambda self, x: F.relu_(x), [1] * 4),
    "function told to be in-place": (lambda self, x: F.relu(x, inplace=True), [1] * 4),
    "torch": (lambda self, x: torch.relu(x), [1] * 4),
    "GELU": (lambda self, x: F.gelu(x), [1] * 4),
    "after a look at its shape": (lambda self, x: x.view(x.shape).relu() if x.ndim == 9 else x.relu(), [1] * 4),
    "leaky": (lambda self, x: F.leaky_relu(x), None),
    "both directions": (lambda self, x: torch.cat([x.relu(), (-x).relu()], 1)[:, 2:6], None),
    "beside itself": (lambda self, x: x.relu() + x, None),
    "beside itself by name": (lambda self, x: torch.add(x.relu(), other=x), None),
    "before and after": (lambda self, x: x.tanh() + x.relu(), None),
    "twice": (lambda self, x: x.relu() + F.gelu(x), [1] * 4),
    "behind batch norm and without": (lambda self, x: normed(self, x).relu() + x.relu(), None),
    "behind batch norm, beside itself": (lambda self, x: normed(self, x).relu() + x, None),
    "behind batch norm, beside that": (lambda self, x: (y := normed(self, x)).relu() + y, None),
    "behind batch norm twice": (lambda self, x: normed(self, x).relu() + F.silu(normed(self, x)), [1, -1, 1, -1]),
    "batch norm that nobody reads": (lambda self, x: (normed(self, x), x.relu())[1], None),
    "after it was overwritten": (overwritten, [1] * 4),
    "in place, by something else": (lambda self, x: F.leaky_relu(x, 0.1, True).relu(), None),
    "partly zeroed": (zeroed, None),
    "after looks at its properties": (looked_at, [1] * 4),
    "handed on": (lambda self, x: F.dropout(x.contiguous(), 0.5, False).relu(), [1] * 4),
    "pooled": (lambda self, x: F.max_pool2d(x, 2).relu(), None),
}


@pytest.mark.parametrize(("read", "expected"), FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_tell_as_much_as_modules(read, expected):
    net, x = Reading(nn.ReLU(), read), noise(2, 3, 6, 6)
    watcher, seen, _ = watched(net, x, "conv")
    use = watcher.uses["conv"]
    signs = None if use is None else use.signs()
    assert (None if signs is None else signs.tolist()) == expected
    with torch.no_grad():
        torch.testing.assert_close(seen["conv"].outputs, net.conv(x))


def late(self, x):
    y = self.rest(x)
    for _ in range(3):
        y = y * 0.5
    return y + x


@pytest.mark.parametrize("rehearsal", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_somebody_who_reads_the_output_much_later_counts_too(context, rehearsal):
    net = Reading(nn.ReLU(), late)
    watcher = LayerWatcher(net, {"conv": net.conv})
    watcher.start(rehearsal=rehearsal)
    with context(), suppress(PassDone):
        net(noise(2, 3, 6, 6))
    watcher.finish()
    assert watcher.uses["conv"] is None


def test_in_inference_mode_readers_are_seen_too():
    for read, expected in ((looked_at, [1] * 4), (FUNCTIONS["in place, by something else"][0], None), (zeroed, None)):
        net = Reading(nn.ReLU(), read)
        watcher = LayerWatcher(net, {"conv": net.conv})
        watcher.start()
        with torch.inference_mode():
            net(noise(2, 3, 6, 6))
        watcher.finish()
        use = watcher.uses["conv"]
        signs = None if use is None else use.signs()
        assert (None if signs is None else signs.tolist()) == expected


def test_a_batch_norm_of_something_else_than_channels_disturbs_nobody():
    """Without a batch dimension ``[C, L]`` looks like ``[B, C]``."""
    net = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(6).eval(), nn.ReLU())
    watcher, _, output = watched(net, noise(3, 6), "0")
    assert watcher.uses["0"] is None
    with torch.no_grad():
        assert torch.equal(output, net(noise(3, 6)))


def test_what_goes_wrong_in_looking_at_readers_is_told_after_the_pass(monkeypatch):
    def fail(values):
        raise OSError("on purpose")

    monkeypatch.setattr(watching, "_wide", fail)
    net = Reading(nn.Sequential(norm(*TURNED), nn.ReLU()))
    watcher = LayerWatcher(net, {"conv": net.conv})
    watcher.start()
    net(noise(2, 3, 6, 6))
    with pytest.raises(OSError, match="on purpose"):
        watcher.finish()
    assert watcher.uses["conv"] is None
    assert torch._C._len_torch_function_stack() == n_hooks(net) == 0


def test_another_default_device_does_not_matter():
    net, x = Reading(nn.Sequential(norm(*TURNED), nn.ReLU())), noise(2, 3, 6, 6)
    with torch.device("meta"):
        watcher, _, _ = watched(net, x, "conv")
    assert watcher.uses["conv"].signs().tolist() == [1, -1, 1, -1]
    assert watcher.uses["conv"].signs().dtype == torch.long
    assert torch._C._len_torch_function_stack() == 0


class Counting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.append(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", [False, True])
def test_modes_that_the_network_enters_and_leaves_are_its_own(device):
    """A mode takes off the top one when it is left, whatever that is."""
    inner, outer, early = Counting(), Counting(), Counting()

    def around_the_layer(self, x):
        with outer:
            x = self.conv(x)
        with torch.device("cpu") if device else nullcontext(), inner:
            x = self.rest(x)
        return x

    class Entering(Reading):
        def forward(self, x):
            return self.head(around_the_layer(self, x))

    net = Entering(nn.ReLU())
    watcher = LayerWatcher(net, {"conv": net.conv})
    with early, torch.device("cpu") if device else nullcontext():
        watcher.start()
        net(noise(2, 3, 6, 6))
        n_modes = torch._C._len_torch_function_stack()
        watcher.finish()
        assert torch._C._len_torch_function_stack() == n_modes - 1 == 1 + device
        torch.ones(1).add(1)
    assert torch._C._len_torch_function_stack() == 0
    assert watcher.uses["conv"].signs().tolist() == [1] * 4
    assert outer.names == ["conv2d"], "not what watching takes"
    assert inner.names == ["relu"]
    assert early.names[-1] == "add"


def test_two_watchers_of_a_layer_are_no_readers_of_its_output():
    net = Reading(nn.ReLU())
    watchers = [LayerWatcher(net, {"conv": net.conv}) for _ in range(2)]
    for watcher in watchers:
        watcher.start()
    net(noise(2, 3, 6, 6))
    for watcher in watchers:
        watcher.finish()
        assert watcher.uses["conv"].signs().tolist() == [1] * 4
    assert torch._C._len_torch_function_stack() == 0


def test_a_batch_norm_over_tokens_says_nothing_about_features():
    """On ``[B, T, C]`` a batch norm normalises tokens, not the channels of a linear layer."""
    norm = nn.BatchNorm1d(5).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-1.0, 1, 1, 1, 1]))
    for n_channels in (3, 5):
        net = nn.Sequential(nn.Linear(4, n_channels), norm, nn.ReLU())
        watcher, _, _ = watched(net, noise(2, 5, 4), "0")
        assert watcher.uses["0"] is None
        analysed(net, [noise(30, 5, 4)], "0")


def test_linear_layers_in_front_of_batch_norm_are_turned_too():
    norm = nn.BatchNorm1d(3).eval()
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([-1.0, 1, -1]))
    watcher, _, _ = watched(nn.Sequential(nn.Linear(4, 3), norm, nn.ReLU()), noise(2, 4), "0")
    assert watcher.uses["0"].signs().tolist() == [-1, 1, -1]


def test_a_batch_norm_tells_from_where_on_a_channel_is_on():
    """Before the shift the output is never positive; behind it, half of the time."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).eval().requires_grad_(False)
    net[0].bias.fill_(-5.0)
    net[1].running_mean.fill_(-5.0)
    net[1].running_var.uniform_(0.5, 2)
    net[1].weight.copy_(torch.tensor([1.0, -0.5, 2.0, -1.0]))
    net[1].bias.copy_(torch.tensor([0.1, 0.0, -0.2, 0.3]))
    x = noise(60, 3, 4, 4)
    analysis = analysed(net, [x], "0")
    lists = analysis._lists["0"]
    outputs, rectified = net[0](x).double().flatten(2), net(x).flatten(2)
    for side in range(4):
        assert lists.sides.signs[side] == net[1].weight[side].sign()
        above = lists.sides.signs[side] * (outputs[:, side] - lists.sides.zero(side))
        assert torch.equal(above > 1e-5, rectified[:, side] > 1e-5)
        strengths = above.clamp(min=0).sum(1)
        rows = lists.rows(side)
        torch.testing.assert_close(lists.strengths[rows], strengths[lists.images[rows]].float(), rtol=1e-4, atol=1e-4)
        assert rows.stop - rows.start == int((strengths > 1e-6).sum())


def test_only_the_used_direction_of_a_turned_channel_is_collected():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), norm(*TURNED), nn.ReLU())
    analysis = analysed(net, [noise(30, 3, 4, 4)], "0")
    sides = analysis._lists["0"].sides
    assert (sides.channels.tolist(), sides.signs.tolist()) == ([0, 1, 2, 3], [1, -1, 1, -1])
