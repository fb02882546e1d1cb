"""Helpers for FX graphs, and what is known of a layer: data and pure functions.

``fx_utils`` handles nodes and copies of graphs, ``layer_info`` is what passes attach to a conv or linear node, and each
of the others answers one question about a graph.
"""
