"""How each of Lightning's loggers takes tables and pictures. What a logger has no place for is left out."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from PIL import Image

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from lightning.pytorch.loggers import Logger
    from matplotlib.figure import Figure

DPI, SMALLEST_DPI = 100, 70

PANEL = 975
"""Pixels that TensorBoard has for an image in a window 1400 wide; it cuts off what is beyond."""


@dataclass(frozen=True)
class LogTable:
    """A table, for loggers that take tables and for those that take text.

    Attributes:
        columns: Headings.
        rows: A value for each heading: text, number, truth value or `None`.
        markdown: The same in words and as markdown.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    markdown: str

    def as_csv(self) -> str:
        r"""Heading and rows, separated by commas.

        Example:
            >>> LogTable(["channel", "concepts"], [[3, "cat, dog"]], "").as_csv()
            'channel,concepts\n3,"cat, dog"\n'
        """
        stream = io.StringIO()
        csv.writer(stream, lineterminator="\n").writerows([self.columns, *self.rows])
        return stream.getvalue()


@dataclass(frozen=True)
class LogItem:
    """Something to log.

    Attributes:
        tag: Its name.
        make: Makes it: a `LogTable` or a figure. Called at most once, and only if a logger takes it.
        is_figure: Whether it is a figure.
    """

    tag: str
    make: Callable[[], Any]
    is_figure: bool = False

    @cached_property
    def content(self) -> Any:
        """What ``make`` makes; `None` for a figure without matplotlib."""
        try:
            return self.make()
        except ModuleNotFoundError:
            if self.is_figure:  # tables have to do
                return None
            raise


class Adapter(Protocol):
    """What one class of loggers can take, and how."""

    takes_every_epoch: ClassVar[bool]
    """Whether a table under a tag that it knows replaces or follows the older one in good order."""

    def table(self, logger: Any, tag: str, table: LogTable, step: int) -> None:
        """Log a table."""

    def figure(self, logger: Any, tag: str, figure: Figure, step: int) -> None:
        """Log a figure."""


class _TensorBoard:
    takes_every_epoch: ClassVar[bool] = True

    def table(self, logger: Any, tag: str, table: LogTable, step: int) -> None:
        logger.experiment.add_text(tag, table.markdown, step)

    def figure(self, logger: Any, tag: str, figure: Figure, step: int) -> None:
        figure.set_dpi(min(DPI, max(SMALLEST_DPI, PANEL / figure.get_figwidth())))
        logger.experiment.add_figure(tag, figure, step)


class _Wandb:
    takes_every_epoch: ClassVar[bool] = True

    def table(self, logger: Any, tag: str, table: LogTable, step: int) -> None:
        # A key holds a table or a picture, not both.
        logger.log_table(f"{tag}_table", columns=list(table.columns), data=[list(row) for row in table.rows], step=step)

    def figure(self, logger: Any, tag: str, figure: Figure, step: int) -> None:
        logger.log_image(tag, [rendered(figure)], step=step)


class _MLFlow:
    takes_every_epoch: ClassVar[bool] = True

    def table(self, logger: Any, tag: str, table: LogTable, step: int) -> None:
        # Not `log_table`, which adds to the rows of earlier epochs; MLflow shows CSV files as tables as well.
        logger.experiment.log_text(logger.run_id, table.as_csv(), f"{tag}.csv")

    def figure(self, logger: Any, tag: str, figure: Figure, step: int) -> None:
        logger.experiment.log_figure(logger.run_id, figure, f"{tag}.png")


class _Comet:
    takes_every_epoch: ClassVar[bool] = False  # each call adds a file

    def table(self, logger: Any, tag: str, table: LogTable, step: int) -> None:
        rows = [list(row) for row in table.rows]
        logger.experiment.log_table(f"{tag}.csv", tabular_data=rows, headers=list(table.columns))

    def figure(self, logger: Any, tag: str, figure: Figure, step: int) -> None:
        logger.experiment.log_figure(figure_name=tag, figure=figure, step=step)


class _Neptune:
    takes_every_epoch: ClassVar[bool] = True

    def table(self, logger: Any, tag: str, table: LogTable, step: int) -> None:
        from neptune.types import File  # type: ignore[import-not-found, unused-ignore]

        logger.experiment[f"{tag}_table"].upload(File.from_content(table.as_csv(), extension="csv"))

    def figure(self, logger: Any, tag: str, figure: Figure, step: int) -> None:
        logger.experiment[tag].upload(figure)


ADAPTERS: Mapping[str, Adapter] = {
    "TensorBoardLogger": _TensorBoard(),
    "WandbLogger": _Wandb(),
    "MLFlowLogger": _MLFlow(),
    "CometLogger": _Comet(),
    "NeptuneLogger": _Neptune(),
}
"""By the name of the logger's class: none of these packages need be there, nor a class that Lightning has dropped."""


def adapter_of(logger: Logger) -> Adapter | None:
    """The adapter of a logger's class or of the class that it inherits from; `None`: it takes numbers only.

    Example:
        >>> from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
        >>> adapter_of(CSVLogger(".")) is None, adapter_of(TensorBoardLogger(".")) is None
        (True, False)
    """
    return next((ADAPTERS[kind.__name__] for kind in type(logger).__mro__ if kind.__name__ in ADAPTERS), None)


def rendered(figure: Figure) -> Image.Image:
    """The figure as an image."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=DPI)
    return Image.open(stream)
