"""Networks whose batch norms are not where one looks for them."""

import torch
from torch import nn


class Net(nn.Module):
    """Some modules, in the order of their definition, and a function that runs them."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, images):
        return self.head(self.run(self, images).relu().mean((2, 3)))


def conv(n_in, n_out=8):
    return nn.Conv2d(n_in, n_out, 3, padding=1)


def dense(self, x):
    """Norms behind concatenations, and one inside, as in a DenseNet."""
    for block in (self.one, self.two):
        x = torch.cat([x, block.conv2(block.norm2(block.conv1(block.norm1(x).relu())).relu())], 1)
    return self.last(x)


def block_of(width):
    return nn.ModuleDict({"norm1": norm(width), "conv1": conv(width), "norm2": norm(8), "conv2": conv(8)})


def norm(width=8, **kwargs):
    return nn.BatchNorm2d(width, **kwargs)


def parts(**modules):
    return lambda: {"head": nn.Linear(8, 4), **{name: make() for name, make in modules.items()}}


def pre_activation(self, x):
    x = self.stem(x).relu()
    x = x + self.a(self.n(x).relu())
    return self.m(x + self.b(self.o(x).relu()))


NONE = "zennit has no canonizers for this network, so the composite was used without any."
ODD_NETS = {
    "in running order": (
        lambda self, x: self.m(self.b(self.n(self.a(x)).relu())),
        parts(b=lambda: conv(8), n=norm, a=lambda: conv(3), m=norm),
        [("a", "n"), ("b", "m")],
    ),
    "behind an activation": (
        lambda self, x: self.b(self.n(self.a(x).relu())),
        parts(a=lambda: conv(3), n=norm, b=lambda: conv(8)),
        [],
    ),
    "behind an activation in place": (
        lambda self, x: self.b(self.n(self.r(self.a(x)))),
        parts(a=lambda: conv(3), r=lambda: nn.ReLU(inplace=True), n=norm, b=lambda: conv(8)),
        [],
    ),
    "read twice": (
        lambda self, x: self.n(self.b(self.n(self.a(x)).relu())),
        parts(a=lambda: conv(3), n=norm, b=lambda: conv(8)),
        [],
    ),
    "of two norms": (
        lambda self, x: self.b((lambda z: self.n(z).relu() + self.m(z).relu())(self.a(x))),
        parts(a=lambda: conv(3), n=norm, m=norm, b=lambda: conv(8)),
        [],
    ),
    "of a layer that runs twice": (
        lambda self, x: self.n(self.b(self.a(x).relu())) + self.b(self.c(x).relu()),
        parts(b=lambda: conv(8), n=norm, a=lambda: conv(3), c=lambda: conv(3)),
        [],
    ),
    "reads a layer and something else": (
        lambda self, x: self.b(self.n(self.a(x)).relu() + self.n(x.repeat(1, 3, 1, 1)[:, :8])),
        parts(a=lambda: conv(3), n=norm, b=lambda: conv(8)),
        [],
    ),
    "without weights": (
        lambda self, x: self.b(self.n(self.a(x)).relu()),
        parts(a=lambda: conv(3), n=lambda: norm(affine=False), b=lambda: conv(8)),
        [],
    ),
    "without statistics": (
        lambda self, x: self.b(self.n(self.a(x)).relu()),
        parts(a=lambda: conv(3), n=lambda: norm(track_running_stats=False), b=lambda: conv(8)),
        [],
    ),
    "of groups that are transposed": (
        lambda self, x: self.b(self.n(self.t(self.a(x).relu())).relu()),
        parts(a=lambda: conv(3), t=lambda: nn.ConvTranspose2d(8, 8, 3, groups=2), n=norm, b=lambda: conv(8)),
        [],
    ),
    "of tokens": (
        lambda self, x: self.n(self.b(self.a(x).flatten(2).mT)).mT[..., None],
        parts(a=lambda: conv(3), b=lambda: nn.Linear(8, 8), n=lambda: nn.BatchNorm1d(81)),
        [],
    ),
    "dense": (
        dense,
        parts(one=lambda: block_of(3), two=lambda: block_of(11), last=lambda: conv(19)),
        [("one.conv1", "one.norm2"), ("two.conv1", "two.norm2")],
    ),
    "pre-activation": (
        pre_activation,
        parts(stem=lambda: conv(3), n=norm, a=lambda: conv(8), o=norm, b=lambda: conv(8), m=norm),
        [],
    ),
    "also read elsewhere": (
        lambda self, x: self.b((lambda z: self.n(z).relu() + z)(self.a(x))),
        parts(a=lambda: conv(3), n=norm, b=lambda: conv(8)),
        NONE,
    ),
}


def odd_net(name):
    forward, modules, expected = ODD_NETS[name]
    net = Net(forward, **modules()).eval()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for values in (*module.parameters(), *filter(torch.is_floating_point, module.buffers())):
                nn.init.uniform_(values, 0.3, 2)
    return net.double(), expected
