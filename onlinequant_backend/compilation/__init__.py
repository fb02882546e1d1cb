"""From a selection of layers to a compiled 8-bit graph.

``build`` runs the rewriting passes on a copy of the graph and has Inductor compile it; ``inductor_job`` is one such
compile, which ``compile_process`` can do in another process. ``compiled_graph`` is the result with the inputs of its
calls, and ``cuda_graphs`` replays it as a CUDA graph. Nothing is exported here: the other process imports single
modules, and should not load the rest.
"""
