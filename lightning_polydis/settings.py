"""The settings of an analysis, checked as soon as they are given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from lightning_polydis._checks import InputError, check_choice, check_in_range, check_positive_int, closest_names
from lightning_polydis.thumbnails import check_denormalize

if TYPE_CHECKING:
    from collections.abc import Callable

MEBIBYTE = 2**20
SWEEP_STEPS = (1 / 4, 1 / 2, 2, 4)
"""Other relevance thresholds that are tried, relative to the one in force."""


@dataclass(frozen=True)
class AnalysisSettings:
    """How to analyse; `ChannelDisentanglement` and `find_polysemantic_channels` take the same settings.

    Args:
        layers: Name or names from ``named_modules()``. `None`: the last convolution or linear layer in running order
            with at least 8 inputs per channel that neither comes first nor produces the logits; to find it, the first
            batch passes through the network twice.
        relevance_threshold: Share of an image's positive relevance from which a channel is relevant, in (0, 1].
        class_fraction: Share of a class's images that a channel must be relevant for, in (0, 1].
        similarity_threshold: Cosine similarity below which two classes count as different concepts, in (-1, 1], or
            ``"auto"``: calibrated for each layer and channel, see `calibration.CalibratedThresholds`. `None`: 0.5
            for ``"paper"``, ``"auto"`` for ``"optimized"``.
        method: ``"optimized"``: class-conditional relevance vectors and soft membership. ``"paper"``: the rules of
            arXiv:2504.12939.
        concepts: ``"classes"``: concepts are groups of classes. ``"clusters"``: they are clusters of the images that
            activate a channel most, by which sources make it fire; neither targets nor logits are needed, and targets,
            where a batch has them, only name the clusters. Relevance threshold, class fraction and attribution then
            mean nothing; with ``similarity_threshold="auto"`` centres count as different below 0.85.
        leak_weight: How much a concept channel that answers to other concepts weighs against one that differs from
            the original on its own images, above 0. For ``method="optimized"``.
        attribution: What decides which channels are relevant: ``"gradient_x_input"``, or a zennit composite or the name
            of a registered one (``"epsilon_plus_flat"``, see `replay.CompositeCollector`), for which each batch passes
            through a copy of the network once more. Direction and relevance vectors come from gradients all the same.
        num_classes: Number of classes; `None`: the width of the logits.
        class_names: Names of the classes, for reports.
        calibration_samples: Images of each class whose layer input is kept, half to choose memberships, half to judge
            them; 0: no plan; `None`: all images, all there to choose from. With clusters: images of each cluster that
            are used so; kept are those of each channel's 200 strongest images that fit into the memory.
        calibration_memory: MiB that these samples may take; lowers their number where it would not do, and says so.
            While an epoch is analysed, those of the last report are there as well. Not for `None`. Relevance vectors
            take at most a quarter as much again (with clusters half), thumbnails of the images an eighth.
        denormalize: What makes pictures in [0, 1] of the images, for the reports: a function on ``[n, C, H, W]``, or
            mean and standard deviation of each colour. `None`: those of the data set's transforms, if it has such.
        logits_module: Name of the module whose output is the logits, where it is not the outermost one.
        target_fn: Batch -> class indices ``[B]``. `None`: ``batch[1]``, or ``batch["label"]``, ``"labels"``,
            ``"target"``, ``"targets"`` or ``"y"``.
        logits_fn: Network output -> logits ``[B, K]``. `None`: the tensor itself, ``.logits`` or ``["logits"]``.
        describe_fn: Names a cluster for the reports, from its strongest images ``[n, 3, h, w]``, ``uint8``: a
            captioning model, for instance. `None`: the classes that fill it, or a number.

    Raises:
        ValueError: If a setting is out of range, or does not go with another.

    Example:
        >>> AnalysisSettings(relevance_threshold=3.0)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ...
        InputError: Expected argument `relevance_threshold` to be a number in (0, 1], but got 3.0.
    """

    layers: str | Sequence[str] | None = None
    relevance_threshold: float = 0.03
    class_fraction: float = 0.75
    similarity_threshold: float | str | None = None
    method: str = "optimized"
    concepts: str = "classes"
    leak_weight: float = 3.0
    attribution: Any = "gradient_x_input"
    num_classes: int | None = None
    class_names: Sequence[str] | None = None
    calibration_samples: int | None = 32
    calibration_memory: float = 1024
    denormalize: Any = None
    logits_module: str | None = None
    target_fn: Callable[[Any], Any] | None = None
    logits_fn: Callable[[Any], Any] | None = None
    describe_fn: Callable[[Any], str] | None = None

    @classmethod
    def named(cls, **settings: Any) -> AnalysisSettings:
        """Settings of names that nobody has checked.

        Raises:
            TypeError: If there is no setting of a name, as Python says it of an argument.
        """
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                close = closest_names(name, known) or ", ".join(f"`{other}`" for other in known)
                raise TypeError(f"Expected settings of the analysis, but got `{name}`. Closest names: {close}.")
        return cls(**settings)

    def __post_init__(self) -> None:
        self._check_layers()
        check_in_range("relevance_threshold", self.relevance_threshold, 0, 1)
        check_in_range("class_fraction", self.class_fraction, 0, 1)
        self._check_method()
        self._check_similarity_threshold()
        check_in_range("leak_weight", self.leak_weight, 0, float("inf"))
        check_in_range("calibration_memory", self.calibration_memory, 0, float("inf"))
        if self.num_classes is not None:
            check_positive_int("num_classes", self.num_classes, minimum=2)
        if self.calibration_samples is not None:
            check_positive_int("calibration_samples", self.calibration_samples, minimum=0)
        check_denormalize(self.denormalize)
        self._check_functions()

    def _check_layers(self) -> None:
        names = self.layer_names if isinstance(self.layers, Sequence | None) else [self.layers]
        if names is not None and (not names or not all(isinstance(name, str) and name for name in names)):
            raise InputError(
                "Expected argument `layers` to be a module name, a sequence of module names or None, "
                f"but got {self.layers!r}."
            )
        if names is not None and len(set(names)) < len(names):
            raise InputError(f"Expected argument `layers` to name each module once, but got {self.layers!r}.")

    def _check_method(self) -> None:
        check_choice("method", self.method, ["paper", "optimized"])
        check_choice("concepts", self.concepts, ["classes", "clusters"])
        if self.concepts == "clusters":
            self._check_clusters()
        elif self.describe_fn is not None:
            raise InputError("`describe_fn` names clusters: it needs `concepts='clusters'`.")
        if self.attribution != "gradient_x_input":
            from lightning_polydis.lrp import resolve_composite  # zennit takes its time to import

            resolve_composite(self.attribution)

    def _check_clusters(self) -> None:
        if self.method == "paper":
            raise InputError(
                "`method='paper'` knows concepts by their classes. Use `concepts='classes'`, or `method='optimized'`."
            )
        if self.attribution != "gradient_x_input":
            raise InputError(
                "`attribution` decides which channels are relevant for a class, and `concepts='clusters'` knows no "
                "classes. Leave it out, or use `concepts='classes'`."
            )

    def _check_similarity_threshold(self) -> None:
        value = self.similarity_threshold
        if value is None or (value == "auto" and self.method == "optimized"):
            return
        if value == "auto":
            raise InputError(
                "`similarity_threshold='auto'` needs the relevance vectors of `method='optimized'`; with "
                "`method='paper'` pass a number in (-1, 1] or None (0.5)."
            )
        if isinstance(value, str):
            raise InputError(
                "Expected argument `similarity_threshold` to be a number in (-1, 1], 'auto' or None, "
                f"but got {value!r}."
            )
        check_in_range("similarity_threshold", value, -1, 1)

    def _check_functions(self) -> None:
        for name in ("target_fn", "logits_fn", "describe_fn"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise InputError(f"Expected argument `{name}` to be a function or None, but got {value!r}.")
        names = self.class_names
        if isinstance(names, str) or (names is not None and not all(isinstance(name, str) for name in names)):
            raise InputError(
                f"Expected argument `class_names` to be a sequence of names, but got {self.class_names!r}."
            )

    @property
    def layer_names(self) -> list[str] | None:
        """The layers as a list; `None` if they are to be chosen."""
        if self.layers is None:
            return None
        return [self.layers] if isinstance(self.layers, str) else list(self.layers)

    @property
    def attribution_name(self) -> str:
        """What the attribution is called, for reports."""
        return self.attribution if isinstance(self.attribution, str) else type(self.attribution).__name__

    @property
    def threshold(self) -> float | str:
        """The similarity threshold in force: a number or ``"auto"``."""
        if self.similarity_threshold is None:
            return 0.5 if self.method == "paper" else "auto"
        return self.similarity_threshold if self.similarity_threshold == "auto" else float(self.similarity_threshold)

    @property
    def relevance_thresholds(self) -> list[float]:
        """The thresholds that relevances are counted at, the one in force first: one pass tells of them all."""
        near = [self.relevance_threshold * step for step in SWEEP_STEPS]
        return [self.relevance_threshold, *(value for value in near if value <= 1)]

    @property
    def vector_bytes(self) -> float:
        """Memory that the relevance vectors may take."""
        return self.calibration_memory * MEBIBYTE / 4

    @property
    def thumbnail_bytes(self) -> float:
        """Memory that the thumbnails of samples may take."""
        return self.calibration_memory * MEBIBYTE / 8

    def to_json(self) -> dict[str, Any]:
        """What defines the result, in plain types."""
        shared = {
            "method": self.method,
            "concepts": self.concepts,
            "similarity_threshold": self.threshold,
            "leak_weight": float(self.leak_weight),  # numpy's numbers are no plain types
            "calibration_samples": self.calibration_samples,
        }
        if self.concepts == "clusters":
            return shared
        return {
            **shared,
            "attribution": self.attribution_name,
            "relevance_threshold": float(self.relevance_threshold),
            "class_fraction": float(self.class_fraction),
        }
