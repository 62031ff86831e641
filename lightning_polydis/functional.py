"""The analysis for a plain network and a plain iterable of batches."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from lightning_polydis._checks import InputError
from lightning_polydis.analyses import Analysis, Judgement, analysis_for, judgement_for
from lightning_polydis.batches import inputs_of
from lightning_polydis.plan import checked_plan
from lightning_polydis.rehearsal import is_compiled, uncompiled
from lightning_polydis.settings import AnalysisSettings
from lightning_polydis.thumbnails import normalisation_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from lightning_polydis.evaluation import SplitQuality
    from lightning_polydis.plan import SplitPlan
    from lightning_polydis.report import PolysemanticityReport


def find_polysemantic_channels(
    model: nn.Module,
    batches: Iterable[Any],
    layers: str | Sequence[str] | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    **settings: Any,
) -> PolysemanticityReport:
    """Find the polysemantic channels of a network.

    One pass over the data; each forward pass is followed by one backward pass from the logits to the layers, but not
    with ``concepts="clusters"``, which needs neither targets nor logits. The network runs in evaluation mode and is
    left as it was.

    Args:
        model: The network, called as ``model(inputs)``.
        batches: Any iterable of ``(inputs, targets)``, a ``DataLoader`` for instance, or of dictionaries or dataclasses
            with the network's input as ``"image"``, ``"images"``, ``"pixel_values"``, ``"input"``, ``"inputs"`` or
            ``"x"``. For clusters the inputs alone will do: targets that are classes only name them.
        layers: Name or names from ``model.named_modules()``; `None`: see `AnalysisSettings`.
        device: Where to run; `None`: where the network's parameters are.
        progress: Show a progress bar.
        **settings: The settings of `ChannelDisentanglement` that concern the analysis, see `AnalysisSettings`.

    Returns:
        The report; ``report.plan`` is the plan that follows from it.

    Raises:
        ValueError: If a setting, a layer, a batch or the network's output is not as expected.
        TypeError: If there is no setting of a name.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> batches = [(torch.randn(32, 4), torch.randint(3, (32,))) for _ in range(4)]
        >>> report = find_polysemantic_channels(net, batches, class_fraction=0.2, progress=False)
        >>> report.layers[0].name
        '2'
    """
    checked = AnalysisSettings.named(layers=layers, **settings)
    analysis = analysis_for(model, checked, normalisation=normalisation_of(batches))
    _run(model, batches, analysis, device, "Looking for polysemantic channels" if progress else None)
    analysis.gather()
    return analysis.compute()


def evaluate_splits(
    model: nn.Module,
    plan: SplitPlan,
    batches: Iterable[Any],
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
    relevance_threshold: float = 0.03,
    attribution: Any = "gradient_x_input",
    num_classes: int | None = None,
    logits_module: str | None = None,
    target_fn: Callable[[Any], Any] | None = None,
    logits_fn: Callable[[Any], Any] | None = None,
) -> list[SplitQuality]:
    """Judge a plan's splits on images of your choice, best on images that did not choose the memberships.

    Args:
        model: The network, split or not; called as ``model(inputs)``, left as it was.
        plan: The splits to judge; the same channel may appear more than once.
        batches: As for `find_polysemantic_channels`. For a plan of clusters the inputs alone will do: targets, and all
            arguments from ``relevance_threshold`` on, are not looked at.
        device: Where to run; `None`: where the network's parameters are.
        progress: Show a progress bar.
        relevance_threshold: When a channel is relevant for an image, in (0, 1]; all as in `AnalysisSettings`.
        attribution: ``"gradient_x_input"``, a zennit composite or the name of one.
        num_classes: Number of classes; `None`: the width of the logits.
        logits_module: Name of the module whose output is the logits, where it is not the outermost one.
        target_fn: Batch -> class indices ``[B]``.
        logits_fn: Network output -> logits ``[B, K]``.

    Returns:
        One entry for each split, layer by layer; see `SplitQuality` for the figures. Batches that hold NaN or infinity
        do not count.

    Raises:
        ValueError: If the plan does not fit the network (a split network can only be judged by the plan it was split
            by), or a batch or the network's output is not as expected.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_polydis import ChannelSplit, SplitPlan
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> plan = SplitPlan([ChannelSplit("0", 5, [[0], [2]], torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]]))])
        >>> batches = [(torch.rand(30, 4), torch.arange(30) % 3)]
        >>> [concept.n_own for concept in evaluate_splits(net, plan, batches, progress=False)[0].concepts]
        [10, 10]
    """
    if not len(checked_plan(plan)):
        return []
    settings = AnalysisSettings(
        relevance_threshold=relevance_threshold,
        attribution=attribution,
        num_classes=num_classes,
        logits_module=logits_module,
        target_fn=target_fn,
        logits_fn=logits_fn,
    )
    analysis = judgement_for(model, plan, settings)
    n_batches = _run(model, batches, analysis, device, "Evaluating splits" if progress else None)
    if not n_batches:
        raise InputError("Expected at least one batch to evaluate splits on, but the data was empty.")
    analysis.gather()
    return analysis.compute()


def _run(
    model: nn.Module,
    batches: Iterable[Any],
    analysis: Analysis | Judgement,
    device: torch.device | str | None,
    description: str | None,
) -> int:
    """Show every batch to the network and the analysis; the number of batches."""
    shown = batches
    if description is not None and Console().is_terminal:  # a disabled bar writes a line in older versions of rich
        shown = track(batches, description, total=_length(batches), transient=True)
    count = 0
    eager = uncompiled() if is_compiled(model) else nullcontext()  # hooks are of no use in compiled code
    with _evaluating(model, device) as where, torch.inference_mode(False), torch.no_grad(), eager:
        try:
            for batch in shown:
                batch = apply_to_collection(batch, Tensor, lambda tensor: tensor.to(where), allow_frozen=True)
                inputs = inputs_of(batch)
                analysis.start_batch(batch)
                model(inputs)
                analysis.finish_batch()
                count += 1
        finally:
            analysis.close()
    return count


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]  # a DataLoader may have no length and then raises
    except TypeError:
        return None


@contextmanager
def _evaluating(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    """Evaluation mode on a device, and everything back as it was."""
    training = [module for module in model.modules() if module.training]
    home = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    where = home if device is None else torch.device(device)
    try:
        model.eval()
        if where != home:
            model.to(where)
        yield where
    finally:
        for module in training:
            module.training = True
        if where != home:
            model.to(home)
