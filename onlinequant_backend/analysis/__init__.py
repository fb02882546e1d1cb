"""One graph as traced by Dynamo, before observing.

``tracing`` sets Dynamo up so that it makes few graphs for many sizes. ``graph_key`` computes the key of a graph's cache
entry. ``traced_graph`` holds the graph and its constant properties.
"""
