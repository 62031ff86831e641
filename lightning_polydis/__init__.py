"""Find the channels of a vision network that stand for several concepts, and split them without changing its output."""

from lightning_polydis._version import __version__
from lightning_polydis.callback import ChannelDisentanglement
from lightning_polydis.checkpoint import load_from_checkpoint
from lightning_polydis.detection import PolysemanticChannel, PolysemanticPair
from lightning_polydis.evaluation import ConceptQuality, SplitQuality
from lightning_polydis.functional import evaluate_splits, find_polysemantic_channels
from lightning_polydis.heatmaps import ConceptHeatmaps, concept_heatmaps
from lightning_polydis.plan import ChannelSplit, SplitPlan
from lightning_polydis.report import PolysemanticityReport
from lightning_polydis.splitting import SplitConv1d, SplitConv2d, SplitConv3d, SplitLinear
from lightning_polydis.surgery import disentangle
from lightning_polydis.visualization import ChannelVisualization, visualize_channels

__all__ = [
    "ChannelDisentanglement",
    "ChannelSplit",
    "ChannelVisualization",
    "ConceptHeatmaps",
    "ConceptQuality",
    "PolysemanticChannel",
    "PolysemanticPair",
    "PolysemanticityReport",
    "SplitConv1d",
    "SplitConv2d",
    "SplitConv3d",
    "SplitLinear",
    "SplitPlan",
    "SplitQuality",
    "__version__",
    "concept_heatmaps",
    "disentangle",
    "evaluate_splits",
    "find_polysemantic_channels",
    "load_from_checkpoint",
    "visualize_channels",
]
