"""FX graphs and the properties of their layers: data and pure functions, which run no graph.

``layer_info`` holds what the passes record about a convolution or a linear layer. ``fx_utils`` copies graphs and
handles their nodes and inputs. Each of the other modules analyses one property of a graph: which values share memory,
which parts repeat, which sizes vary.
"""

from .conv_geometry import ConvGeometry
from .layer_info import LayerInfo, info_of, layer_nodes, layer_reads

__all__ = ["ConvGeometry", "LayerInfo", "info_of", "layer_nodes", "layer_reads"]
