"""Pictures. These modules alone know matplotlib, and import it only when a picture is drawn."""

from lightning_polydis.figures.canvas import CONCEPT_COLOURS, OTHER_COLOUR
from lightning_polydis.figures.card import card_figure
from lightning_polydis.figures.course import history_figure, quality_figure
from lightning_polydis.figures.heatmap import heatmap_figure
from lightning_polydis.figures.overview import class_similarity_figure, relevance_figure, similarity_figure
from lightning_polydis.figures.split import split_figure
from lightning_polydis.figures.sweep import sweep_figure
from lightning_polydis.figures.visualization import visualization_figure

__all__ = [
    "CONCEPT_COLOURS",
    "OTHER_COLOUR",
    "card_figure",
    "class_similarity_figure",
    "heatmap_figure",
    "history_figure",
    "quality_figure",
    "relevance_figure",
    "similarity_figure",
    "split_figure",
    "sweep_figure",
    "visualization_figure",
]
