"""The figure that all pictures are drawn on. It needs matplotlib, and is imported when a picture is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.text import Text

if TYPE_CHECKING:
    from matplotlib.backend_bases import RendererBase


class LiteralFigure(Figure):
    """A figure that shows texts as they are: in names of classes and layers, ``$`` begins no formula.

    Whatever draws or saves the figure comes through `draw`, and all texts, tick labels too, are there by then.
    """

    def draw(self, renderer: RendererBase) -> None:
        """Draw the figure."""
        for text in self.findobj(Text):
            assert isinstance(text, Text)
            text.set_parse_math(False)
        super().draw(renderer)
