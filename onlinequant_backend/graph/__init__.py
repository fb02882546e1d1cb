"""FX graphs and the properties of their layers: data and pure functions, which run no graph.

``layer_info`` and ``attention_info`` hold what the passes record about a convolution, a linear layer or attention.
``fx_utils`` copies graphs and handles their nodes and inputs. Each of the other modules analyses one property of a
graph: which values share memory, which parts repeat, which sizes vary.
"""

from .attention_info import AttentionInfo
from .conv_geometry import ConvGeometry
from .layer_info import LayerInfo, info_of, layer_nodes, layer_reads

__all__ = [
    "AttentionInfo",
    "ConvGeometry",
    "LayerInfo",
    "info_of",
    "layer_nodes",
    "layer_reads",
]
