"""One graph as Dynamo has traced it, before anything is observed.

``tracing`` sets Dynamo up so that it makes few graphs for many sizes. ``graph_key`` computes what identifies a graph:
the key of its cache entry. ``traced_graph`` keeps the graph with all that does not change while it is used.
"""
