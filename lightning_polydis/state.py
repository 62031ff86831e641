"""What a callback keeps in checkpoints: plain types, readable by ``torch.load(weights_only=True)``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lightning_polydis._checks import InputError
from lightning_polydis.plan import SplitPlan
from lightning_polydis.report import PolysemanticityReport

FORMAT_VERSION = 1


@dataclass(frozen=True)
class CallbackState:
    """Where an analysis stands.

    Attributes:
        report: Of the last analysed epoch, with its plan if that was chosen already.
        analysed_step: Global step of that epoch, -1 if there is none.
        n_validations: Validations of the ``fit`` under way.
        chosen: The layers that were chosen where the user named none.
    """

    report: PolysemanticityReport | None = None
    analysed_step: int = -1
    n_validations: int = 0
    chosen: list[str] | None = None

    def to_dict(self) -> dict[str, Any]:
        """In plain types."""
        plan = None if self.report is None else self.report.known_plan
        return {
            "format_version": FORMAT_VERSION,
            "report": None if self.report is None else self.report.to_json(),
            "plan": None if plan is None else plan.to_json(),
            "analysed_step": self.analysed_step,
            "n_validations": self.n_validations,
            "chosen": self.chosen,
        }

    @staticmethod
    def from_dict(content: dict[str, Any]) -> CallbackState:
        """What `to_dict` wrote, or an older version did: what is missing has its default.

        Raises:
            ValueError: If a newer version wrote it, or it is damaged.
        """
        version = content.get("format_version", FORMAT_VERSION)
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise InputError(
                f"Expected a callback state with a format_version of at most {FORMAT_VERSION}, but got {version!r}. It "
                "was written by a newer lightning_polydis: update the package."
            )
        report, plan = content.get("report"), content.get("plan")
        try:
            if not isinstance(version, int):
                raise TypeError(f"a format_version of {version!r}")
            return CallbackState(
                None if report is None else _report(report, plan),
                content.get("analysed_step", -1),
                content.get("n_validations", 0),
                content.get("chosen"),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise InputError(f"The callback state is damaged: {type(error).__name__}: {error}.") from error


def _report(report: dict[str, Any], plan: dict[str, Any] | None) -> PolysemanticityReport:
    restored = PolysemanticityReport.from_json(report)
    return restored if plan is None else replace(restored, _saved_plan=SplitPlan.from_json(plan))
