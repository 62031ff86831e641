"""Relevances by zennit's composites, and what a composite needs to treat split layers right.

This module and `split_rules` alone know zennit. Its rules change a network's parameters for a while, so they are
never put on a network that is in use, see `replay`.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from zennit.canonizers import AttributeCanonizer, Canonizer, NamedMergeBatchNorm
from zennit.composites import COMPOSITES
from zennit.core import BasicHook, Composite, collect_leaves
from zennit.rules import Norm
from zennit.types import BatchNorm, Linear

from lightning_polydis._checks import InputError, closest_names
from lightning_polydis.split_rules import ExpandRule, MergeRule, PartTable
from lightning_polydis.splitting import SplitLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from zennit.core import Hook

MAX_DEVIATION = 0.01
"""Deviation of a network's output, relative to the largest value, that is taken for rounding (GPUs round the inputs of
convolutions to 10 bits). A batch norm merged into the wrong layer changes it by far more."""


def resolve_composite(attribution: Any) -> Composite:
    """The composite that an argument ``attribution`` stands for.

    Args:
        attribution: A composite, or the name of one that zennit has registered.

    Raises:
        ValueError: If it is neither, or if the composite of that name needs arguments.

    Example:
        >>> type(resolve_composite("epsilon_plus")).__name__
        'EpsilonPlus'
    """
    if isinstance(attribution, Composite):
        return attribution
    if isinstance(attribution, str) and attribution in COMPOSITES:
        kind = COMPOSITES[attribution]
        try:
            return kind()
        except TypeError as error:
            raise InputError(
                f"`attribution={attribution!r}` needs arguments ({error}). "
                f"Pass an instance: `attribution=zennit.composites.{kind.__name__}(...)`."
            ) from error
    names = ["gradient_x_input", *COMPOSITES]
    hint = ""
    if isinstance(attribution, type) and issubclass(attribution, Composite):
        hint = f" Pass an instance: `{attribution.__name__}()`."
    elif isinstance(attribution, str) and (close := closest_names(attribution, names)):
        hint = f" Closest names: {close}."
    raise InputError(
        f"Expected argument `attribution` to be a zennit composite or one of {', '.join(map(repr, names))}, "
        f"but got {attribution!r}.{hint}"
    )


def with_split_rules(composite: Composite, canonizers: Sequence[Canonizer] = ()) -> SplitAwareComposite:
    """A composite that treats split layers as the given one treats the layers they were.

    The result is used like any zennit composite, on split networks and on others. ``expand`` passes relevance on as
    the composite's rule for the layer does (`split_rules.ExpandRule`), ``merge`` hands each part its portion, and a
    batch norm behind a split layer is merged into it (`SplitMergeBatchNorm`). With every rule of zennit that has
    parameters the parts' relevances add up to what the rule passes on of the channel's (all of it, but for
    stabilizers and for rules that go by sign and find nothing of that sign), and the heat map at the input is that
    of the network before the split, up to rounding. A composite that has no rule for the layer (one that changes
    the gradient at ReLUs, for instance) is left as it is; behind a rule that is no `zennit.core.BasicHook`,
    ``merge`` has the rule `Norm`, which keeps the sum, but not the heat map.

    Args:
        composite: Any zennit composite, with its canonizers.
        canonizers: Further canonizers.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from zennit.composites import EpsilonPlus
        >>> from lightning_polydis import ChannelSplit, SplitPlan, disentangle
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
        >>> plan = SplitPlan([ChannelSplit("0", 2, [[0], [1]], torch.tensor([[1.0, 1, 0], [0, 1, 1]]))])
        >>> images = torch.rand(1, 3, 4, 4, requires_grad=True)
        >>> with with_split_rules(EpsilonPlus()).context(disentangle(net, plan)) as split:
        ...     (relevance,) = torch.autograd.grad(split(images)[:, 0].sum(), images)
        >>> with EpsilonPlus().context(net):
        ...     (before,) = torch.autograd.grad(net(images)[:, 0].sum(), images)
        >>> torch.allclose(relevance, before, atol=1e-4)
        True
    """
    return SplitAwareComposite(composite, canonizers)


class SplitAwareComposite(Composite):  # type: ignore[misc]
    """What `with_split_rules` makes.

    Args:
        composite: The composite that gives the rules.
        canonizers: Further canonizers.
    """

    canonizers: list[Canonizer]

    def __init__(self, composite: Composite, canonizers: Sequence[Canonizer]) -> None:
        self._inner = composite
        self._left_out: set[nn.Module] = set()
        told = any(isinstance(canonizer, SplitMergeBatchNorm) for canonizer in canonizers)
        own = [] if told else [SplitMergeBatchNorm()]
        super().__init__(self._rule_of, [*canonizers, *own, *composite.canonizers])

    def leave_out(self, modules: set[nn.Module]) -> None:
        """Give these modules no rule and no other forward pass, as no relevance will come by."""
        self._left_out = modules
        self.canonizers = [
            _outside_of(modules, canonizer) if isinstance(canonizer, AttributeCanonizer) else canonizer
            for canonizer in self.canonizers
        ]

    def forget(self) -> None:
        """Let the tensors of the last pass go and stay registered."""
        for hook in self.hook_refs:
            hook.remove()

    def _rule_of(self, context: dict[Any, Any], name: str, module: nn.Module) -> Hook | None:
        """The rule for a module; zennit asks for containers first, then for what they contain."""
        if module in context:  # part of a split layer
            return context[module](name)
        rule = self._inner.module_map(context.setdefault("inner", {}), name, module)
        if not isinstance(module, SplitLayer):
            return None if module in self._left_out else rule

        def of_expand(name: str) -> Hook | None:
            own = self._inner.module_map(context["inner"], name, module.expand)
            wanted = own if rule is None else rule  # a rule may have been given to the layer by its name
            is_plain = isinstance(wanted, BasicHook) and type(wanted).backward is BasicHook.backward
            expand = ExpandRule(module, wanted) if is_plain else wanted
            merge = None if wanted is None else MergeRule(expand, module) if is_plain else Norm()
            context[module.merge] = lambda _: merge
            return expand

        context[module.expand] = of_expand
        return None


def _outside_of(modules: set[nn.Module], canonizer: AttributeCanonizer) -> AttributeCanonizer:
    """The same canonizer for all other modules: sums of stacked tensors, as in residual blocks, take time."""
    return AttributeCanonizer(lambda name, module: None if module in modules else canonizer.attribute_map(name, module))


class SplitMergeBatchNorm(Canonizer):  # type: ignore[misc]
    r"""Merges batch norms that come right behind split layers into these, as zennit's canonizers do for plain ones.

    With :math:`\gamma z_c + \beta` the batch norm in evaluation mode, all parts of channel :math:`c` are scaled by
    :math:`\gamma`, and their biases become that of the merged channel (the residual has it once for each concept but
    one): the split of the merged layer. ``remove`` puts back the very parameters that were there.

    Args:
        pairs: Names of split layers and of the batch norms that read them. `None`: batch norms that are defined right
            behind a split layer and have its width; zennit's go by the order of definition, too.
    """

    def __init__(self, pairs: Sequence[tuple[str, str]] | None = None) -> None:
        super().__init__()
        self._pairs = pairs

    def copy(self) -> SplitMergeBatchNorm:
        """A canonizer for the same batch norms."""
        return SplitMergeBatchNorm(self._pairs)

    def apply(self, root_module: nn.Module) -> list[SplitMergeBatchNorm]:
        """Merge the batch norms; the applied instances."""
        applied = []
        for layer, norm in self._found(root_module):
            applied.append(self.copy())
            applied[-1].register(layer, norm)
        return applied

    def _found(self, root: nn.Module) -> list[tuple[SplitLayer, Any]]:
        if self._pairs is not None:
            return [(root.get_submodule(layer), root.get_submodule(norm)) for layer, norm in self._pairs]  # type: ignore[misc]
        owners = {module.merge: module for module in root.modules() if isinstance(module, SplitLayer)}
        behind = [(owners[before], leaf) for before, leaf in pairwise(collect_leaves(root)) if before in owners]
        return [
            (layer, leaf) for layer, leaf in behind if _is_mergeable(leaf) and leaf.num_features == layer.n_channels
        ]

    def register(self, layer: SplitLayer, norm: Any) -> None:
        """Merge a batch norm into a split layer."""
        stores: list[dict[str, Any]] = [layer.expand._parameters, norm._parameters, norm._buffers]
        self._kept = [(store, dict(store)) for store in stores]
        self._norm, self._eps = norm, norm.eps
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weight, bias = _scaled(layer, scale, norm.bias - norm.running_mean * scale)
        ones, zeros = torch.ones_like(scale), torch.zeros_like(scale)
        stores[0].update(weight=nn.Parameter(weight, False), bias=nn.Parameter(bias, False))
        stores[1].update(weight=nn.Parameter(ones, False), bias=nn.Parameter(zeros, False))
        stores[2].update(running_var=ones.clone(), running_mean=zeros.clone())
        _leave_values_alone(norm)  # whose tensors are not those that are kept

    def remove(self) -> None:
        """Put everything back."""
        for store, content in self._kept:
            store.update(content)
        self._norm.eps = self._eps


def _scaled(layer: SplitLayer, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Weight and bias of ``expand`` that make channel ``c`` ``scale[c]`` times what it was, plus ``shift[c]``."""
    table, weight, bias = PartTable.of(layer), layer.expand.weight.detach(), layer.expand.bias
    rows = scale.detach()[table.channel]
    shifts = table.n_biases.to(weight) * shift.detach()[table.channel]
    return weight * rows.view(-1, *[1] * (weight.ndim - 1)), shifts if bias is None else shifts + bias.detach() * rows


class _MergeBatchNorm(NamedMergeBatchNorm):  # type: ignore[misc]
    """zennit 0.5 leaves ``eps`` in a batch norm that it has merged; with 1e-3 each makes what passes 5e-4 smaller."""

    def register(self, linears: Sequence[nn.Module], batch_norm: Any) -> None:
        self._eps = batch_norm.eps
        super().register(linears, batch_norm)
        _leave_values_alone(batch_norm)

    def remove(self) -> None:
        super().remove()
        self.batch_norm.eps = self._eps


def _leave_values_alone(norm: Any) -> None:
    """Let a merged batch norm divide by exactly 1: torch 2.10 and 2.11 refuse an ``eps`` of 0."""
    norm.running_var.data = torch.full_like(norm.running_var, 0.5)
    norm.eps = 0.5


def _is_mergeable(norm: nn.Module) -> bool:
    """Whether this is a batch norm that has all that it takes to be merged into the layer before it."""
    names = ("weight", "bias", "running_mean", "running_var")
    return isinstance(norm, BatchNorm) and all(isinstance(getattr(norm, name), Tensor) for name in names)


def fitted_composite(
    composite: Composite, model: nn.Module, run: Callable[[], Any]
) -> tuple[SplitAwareComposite, str | None]:
    """A composite with rules for split layers and with canonizers that leave a network's function as it is.

    A composite that brings canonizers keeps them; another one gets those of `canonizers_for`, or none where these
    would change what the network computes.

    Args:
        composite: Any zennit composite; it is not registered itself.
        model: In evaluation mode, left as it was.
        run: Makes a forward pass of it, the same each time, and returns the output.

    Returns:
        A composite to register, and what the user should know of it, if anything.

    Raises:
        ValueError: If the composite cannot be used on the network, or its canonizers change what that computes.
    """
    outputs: list[Any] = []
    name = f"The composite `{type(composite).__name__}` cannot be used on `{type(model).__name__}`"
    try:
        found = [] if composite.canonizers else canonizers_for(composite, model, lambda: outputs.append(run()))
        before = outputs[0] if outputs else run()
    except Exception as error:
        raise InputError(f"{name} ({type(error).__name__}: {error}). Use `attribution='gradient_x_input'`.") from error
    for canonizers in [found, [SplitMergeBatchNorm([])]] if found else [[]]:
        ready = with_split_rules(composite, canonizers)
        try:
            with ready.context(model):
                off = deviation(run(), before)
        except Exception as error:
            raise InputError(
                f"{name} ({type(error).__name__}: {error}). Pass one whose rules and canonizers suit the network, or "
                "use `attribution='gradient_x_input'`."
            ) from error
        finally:
            ready.remove()
        if off <= MAX_DEVIATION:
            none_suits = "zennit has no canonizers for this network, so the composite was used without any."
            return ready, none_suits if found and canonizers is not found else None
    raise InputError(
        f"{name}: under it the network's output changes by {off:.2g} of its largest value. Pass a composite with "
        "canonizers that suit the network (`zennit.canonizers`), or use `attribution='gradient_x_input'`."
    )


def deviation(found: Any, expected: Any) -> float:
    """Largest difference between two outputs of a network, relative to the largest value."""
    pairs = zip(_numbers(found), _numbers(expected), strict=True)
    return max((_relative(own, other) for own, other in pairs), default=0.0)


def _numbers(output: Any) -> list[Tensor]:
    leaves = tree_leaves(output)
    return [leaf.detach().float() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _relative(own: Tensor, other: Tensor) -> float:
    if own.shape != other.shape or not other.numel():
        return float("inf") if own.shape != other.shape else 0.0
    difference = float((own - other).abs().max() / other.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
    return difference if difference == difference else float("inf")  # NaN


def canonizers_for(composite: Composite, model: nn.Module, run: Callable[[], Any]) -> list[Canonizer]:
    """The canonizers that suit a network: for residual blocks of torchvision's ResNets, and for batch norms.

    A batch norm is merged into the convolution or linear layer whose output it reads, as seen in one pass. So it
    does not matter in which order modules are defined, and batch norms that read something else (a DenseNet's, behind
    a concatenation) are left to the composite's own rule.

    Args:
        composite: What the network is prepared for; one that has no rules for linear layers needs no canonizers.
        model: In evaluation mode.
        run: Makes one forward pass of it.
    """
    found: list[Canonizer] = []
    context: dict[Any, Any] = {}
    rules = [(module, composite.module_map(context, name, module)) for name, module in model.named_modules()]
    if not any(isinstance(module, Linear) for module, rule in rules if rule is not None):
        return found
    pairs = _norms_behind_layers(model, run)
    is_split = {name: isinstance(model.get_submodule(name), SplitLayer) for name, _ in pairs}
    found.append(SplitMergeBatchNorm([(layer, norm) for layer, norm in pairs if is_split[layer]]))
    if not all(is_split.values()):
        found.append(_MergeBatchNorm([((layer,), norm) for layer, norm in pairs if not is_split[layer]]))
    from zennit.torchvision import ResNetBasicBlockCanonizer, ResNetBottleneckCanonizer

    return [*found, ResNetBottleneckCanonizer(), ResNetBasicBlockCanonizer()]


def _norms_behind_layers(model: nn.Module, run: Callable[[], Any]) -> list[tuple[str, str]]:
    """Names of linear and split layers, and of the batch norms that read their outputs as they are; all run once."""
    outputs: dict[int, tuple[str, Tensor, int]] = {}  # the tensor is kept, or another could get its id
    runs: Counter[str] = Counter()
    pairs: list[tuple[str, str]] = []
    handles = []

    def made_by(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            runs[name] += 1
            if _takes_a_norm(module, output):
                outputs[id(output)] = (name, output, output._version)

        return hook

    def read_by(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            runs[name] += 1
            layer, output, version = outputs.get(id(args[0]) if args else 0, ("", None, 0))
            if output is not None and output._version == version:  # an activation may have overwritten it
                pairs.append((layer, name))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, Linear | SplitLayer):
            handles.append(module.register_forward_hook(made_by(name)))
        elif _is_mergeable(module):
            handles.append(module.register_forward_pre_hook(read_by(name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    readers = Counter(layer for layer, _ in pairs)
    return [(layer, norm) for layer, norm in pairs if runs[layer] == runs[norm] == readers[layer] == 1]


def _takes_a_norm(layer: nn.Module, output: Tensor) -> bool:
    """Whether a batch norm that reads the output scales the layer's channels, and zennit can merge it."""
    plain: Any = getattr(layer, "expand", layer)
    return output.ndim == 2 if isinstance(plain, nn.Linear) else not (plain.transposed and plain.groups > 1)
