"""From a selection of layers to a compiled graph: rewrite, compile with Inductor here or in another process, and replay
as a CUDA graph.
"""
