"""FX graphs, and what is known of the layers in them: data and pure functions, which run nothing.

``layer_info`` is what the passes note about a convolution or a linear layer. ``fx_utils`` copies graphs and handles
their nodes and inputs. Each of the other modules answers one question about a graph: which values share memory, which
parts repeat, which sizes vary.
"""

from .conv_geometry import ConvGeometry
from .layer_info import LayerInfo, info_of, layer_nodes, layer_reads

__all__ = ["ConvGeometry", "LayerInfo", "info_of", "layer_nodes", "layer_reads"]
