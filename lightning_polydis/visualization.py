"""Feature visualisation: an image that drives a split channel, and one for each concept channel that it was split into.

This module alone knows horama, and imports it only when an image is made.
"""

from __future__ import annotations

import io
import math
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stderr, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from lightning_polydis._checks import InputError, check_positive_int
from lightning_polydis.forward import PassDone, default_dtype, full_precision, own_random_numbers
from lightning_polydis.plan import checked_plan
from lightning_polydis.rehearsal import is_compiled, uncompiled
from lightning_polydis.splitting import SplitConv2d, SplitLinear
from lightning_polydis.surgery import split_copy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lightning_polydis.plan import ChannelSplit, SplitPlan

# Chosen by looking at images for SqueezeNet 1.1 (`features.12.expand1x1`, photographs of 20 classes).
CANVAS = 1.25
"""Side of an image, relative to the side of the crops that the network sees: room to shift them about."""

NOISE = 0.07
"""Added to every crop. Less (0.05) lets finer patterns grow that only a network sees; with more (0.1), images of weak
channels do not get going."""

CROPS = 2
"""Crops at each step: at equal cost, twice the steps gave stronger images than twice the crops. horama fails on one."""


@dataclass(frozen=True, eq=False)  # tensors have no equality that is true or false
class ChannelVisualization:
    """What one split channel, and each of its concept channels, looks for.

    Attributes:
        layer: Name of the layer.
        channel: Index of the output channel, as numbered before the split.
        concepts: Classes of each of the ``K`` concepts, as in `ChannelSplit.concepts`.
        original: Image that drives the channel as it is without a split, ``[3, H, W]``, in [0, 1], ``float32``, on the
            CPU.
        parts: The same for each concept channel, ``[K, 3, H, W]``.
    """

    layer: str
    channel: int
    concepts: list[list[int]]
    original: Tensor
    parts: Tensor


def visualize_channels(
    model: nn.Module,
    plan: SplitPlan,
    *,
    input_size: int = 224,
    steps: int = 256,
    transform: Callable[[Tensor], Any] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> list[ChannelVisualization]:
    """Make images that drive the channels of a plan, before the split and concept by concept.

    Each image starts as noise and is optimised in Fourier space (C. Olah et al., *Feature Visualization*, Distill
    2017; horama's ``fourier``) to raise ``mean over crops and positions of s * z``: ``z`` is the output of the concept
    channel and ``s`` the concept's direction. The image of the original channel follows the direction of most of its
    concepts, +1 where they are even. All images start from the same noise and are shown in the same crops, so what
    differs between them is the channels' doing.

    Nothing is downloaded. The network runs as a copy, in evaluation mode and in ``float32``, up to the layer in
    question; the model and all random number generators are left as they were.

    Args:
        model: The network, called as ``model(images)``; split by this plan already, or not.
        plan: The splits to look at; a channel that is not split yet is split in the copy.
        input_size: Side of the images that the network is shown. The images that come back are a quarter larger.
        steps: Optimisation steps for each image.
        transform: From images ``[n, 3, input_size, input_size]`` in [0, 1] to what the network takes, differentiable;
            torchvision's ``Normalize``, for instance, or ``lambda x: x.mean(1, keepdim=True)`` for a network that takes
            grey images. `None`: the images themselves.
        seed: Of the noise; with the same seed the images are the same, bit for bit on the CPU.
        device: Where to run; `None`: where the network's parameters are.
        progress: Show a progress bar.

    Returns:
        One entry for each split, in the plan's order; ``H`` and ``W`` are ``1.25 * input_size``, rounded up to an even
        number.

    Raises:
        ValueError: If an argument is out of range, the plan does not fit the network (one that is split otherwise,
            for instance), a layer is no 2-d convolution or linear layer, or the network cannot take the images or gives
            NaN for them.
        ModuleNotFoundError: If horama or einops are missing; they come with the extra ``viz``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_polydis import ChannelSplit, SplitPlan
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU())
        >>> plan = SplitPlan([ChannelSplit("2", 6, [[1], [7]], torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))])
        >>> [channel] = visualize_channels(net, plan, input_size=16, steps=4, progress=False)
        >>> channel.original.shape, channel.parts.shape
        (torch.Size([3, 20, 20]), torch.Size([2, 3, 20, 20]))
    """
    check_positive_int("input_size", input_size)
    check_positive_int("steps", steps)
    check_positive_int("seed", seed, minimum=0)
    if transform is not None and not callable(transform):
        raise InputError(f"Expected argument `transform` to be callable or None, but got {transform!r}.")
    if not len(checked_plan(plan)):
        return []
    fourier = _fourier()
    n_images = sum(1 + len(split.concepts) for split in plan)
    with _own_surroundings(model), _progress_bar(n_images * steps, progress) as advance:
        network = split_copy(model, plan).float()
        if device is not None:
            network.to(device)
        layers = {name: _image_layer(network, name) for name in plan.layers}
        painter = _Painter(network, fourier, input_size, steps, transform, seed, _device_of(network), advance)
        for name, layer in layers.items():  # before the first image: each takes a while
            painter.rehearse(name, layer)
        return [painter.channel(layers[split.layer], split) for split in plan]


def _fourier() -> Callable[..., tuple[Tensor, Tensor]]:
    try:
        from horama import fourier  # its `maco` would download a file
    except ModuleNotFoundError as error:  # einops too: horama needs it and does not declare it
        raise ModuleNotFoundError(
            "`visualize_channels` needs horama and einops: pip install 'lightning-polydis[viz]'."
        ) from error
    return fourier  # type: ignore[no-any-return]


@contextmanager
def _own_surroundings(model: nn.Module) -> Iterator[None]:
    """Gradients, ``float32`` and random numbers for ourselves, whatever the caller's modes are."""
    eager = uncompiled() if is_compiled(model) else nullcontext()  # hooks are of no use in compiled code
    modes = (torch.inference_mode(False), torch.enable_grad(), full_precision(), default_dtype(torch.float32), eager)
    with own_random_numbers(), ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


@contextmanager
def _progress_bar(total: int, shown: bool) -> Iterator[Callable[[], None]]:
    if not shown or not Console().is_terminal:
        yield lambda: None  # a disabled bar writes a line in older versions of rich
        return
    with Progress(transient=True) as bar:
        task = bar.add_task("Drawing channels", total=total)
        yield lambda: bar.advance(task)


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _image_layer(network: nn.Module, name: str) -> SplitConv2d | SplitLinear:
    layer = network.get_submodule(name)
    if not isinstance(layer, SplitConv2d | SplitLinear):
        raise InputError(
            f"Expected layer `{name}` to be an `nn.Conv2d` or `nn.Linear` of a network that takes images, but got "
            f"`{layer._get_name()}`. Leave it out of the plan."
        )
    return layer


@dataclass(frozen=True)
class _Target:
    """One channel of a module's output, in one direction."""

    name: str
    module: nn.Module
    row: int
    dim: int
    sign: int

    def score(self, output: Tensor) -> Tensor:
        """How much the output drives the channel.

        The mean of all positions, negative ones too: it has a gradient where the channel is silent everywhere, as it
        often is on noise. On SqueezeNet, positive parts alone left some images as they began; a softmax over positions
        made one glaring spot for each concept, hard to tell apart; weights towards the centre changed little.
        """
        activation = output.select(self.dim, self.row).mean()
        if not bool(torch.isfinite(activation)):
            raise InputError(
                f"Expected finite activations for images in [0, 1], but {self.name} gives {activation.item()}. Look "
                "for NaN in the network's weights and in what `transform` returns."
            )
        return self.sign * activation


@dataclass(frozen=True)
class _Painter:
    """Optimises images for the channels of one network, whose only hooks are there while it runs."""

    network: nn.Module
    fourier: Callable[..., tuple[Tensor, Tensor]]
    input_size: int
    steps: int
    transform: Callable[[Tensor], Any] | None
    seed: int
    device: torch.device
    advance: Callable[[], None]

    def rehearse(self, name: str, layer: SplitConv2d | SplitLinear) -> None:
        """Raise `ValueError` unless images can be optimised for the layer."""
        grey = torch.full((CROPS, 3, self.input_size, self.input_size), 0.5, device=self.device, requires_grad=True)
        output = self._output(layer, grey.clone())  # a network may begin in place
        if output is None:
            raise InputError(f"Layer `{name}` had no part in the forward pass. Leave it out of the plan.")
        if not output.requires_grad:
            raise InputError(
                f"Expected `transform` and the network to be differentiable up to layer `{name}`, but its output has "
                "no gradient with respect to the images. Do without `torch.no_grad` and `detach` there."
            )

    def channel(self, layer: SplitConv2d | SplitLinear, split: ChannelSplit) -> ChannelVisualization:
        """The images of one split channel."""
        name, signs, dim = f"channel {split.channel} of layer `{split.layer}`", split.signs(), layer.channel_dim
        original = self._image(_Target(name, layer, split.channel, dim, 1 if sum(signs) >= 0 else -1))
        parts = []
        for number, sign in enumerate(signs):
            row = layer.channel_index(split.channel, number)
            parts.append(self._image(_Target(f"concept {number + 1} of {name}", layer.expand, row, dim, sign)))
        return ChannelVisualization(split.layer, split.channel, split.concepts, original, torch.stack(parts))

    def _image(self, target: _Target) -> Tensor:
        """The image ``[3, H, W]`` that drives a channel."""
        side = 2 * math.ceil(self.input_size * CANVAS / 2)  # horama's inverse Fourier transform wants an even one
        torch.manual_seed(self.seed)
        with ExitStack() as quiet:
            quiet.enter_context(redirect_stderr(io.StringIO()))

            def objective(images: Tensor) -> Tensor:
                quiet.close()  # tqdm keeps to the stream it began with; what others have to say from here on is heard
                self.advance()
                output = self._output(target.module, images)
                assert output is not None  # `rehearse` has seen to it
                return target.score(output)

            image, _ = self.fourier(
                objective,
                total_steps=self.steps,
                image_size=side,
                model_input_size=self.input_size,
                noise=NOISE,
                values_range=(0, 1),
                crops_per_iteration=CROPS,
                box_size=(self.input_size / side,) * 2,  # crops at their own scale
                device=self.device,
            )
        return image.detach().cpu()

    def _output(self, module: nn.Module, images: Tensor) -> Tensor | None:
        """What a module makes of images; the network is stopped there."""
        inputs = images if self.transform is None else self.transform(images)
        outputs: list[Tensor] = []

        def stop(module: nn.Module, args: Any, output: Tensor) -> None:
            outputs.append(output)
            raise PassDone

        handle = module.register_forward_hook(stop)
        try:
            with suppress(PassDone):
                self.network(inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise InputError(_refusal(inputs, error)) from error
        finally:
            handle.remove()
        return outputs[0] if outputs else None


def _refusal(inputs: Any, error: Exception) -> str:
    what = f"images of shape {list(inputs.shape)}" if isinstance(inputs, Tensor) else f"`{type(inputs).__name__}`"
    reason = str(error).partition("\n")[0]
    return (
        f"Expected a network that takes {what}, but it failed with {type(error).__name__}: {reason}. Pass `transform`, "
        "which turns RGB images in [0, 1] into what the network takes (for grey ones, "
        "`lambda x: x.mean(1, keepdim=True)`), or another `input_size`."
    )
