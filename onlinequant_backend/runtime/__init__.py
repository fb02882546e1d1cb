"""The callable that Dynamo gets for a graph: it observes, compiles, and then runs the 8-bit graph.

``quantized_graph`` is that callable: it observes, has layers selected, compiles, and then runs the 8-bit or the float
graph. ``background`` does this work in another thread, ``cache_entry`` restores the results from disk and saves them,
and ``drift_watch`` checks that later calls still fit the observed ranges. ``sampling`` is for callers that know when a
sampling run begins and ends. Only that module is exported here: the other packages need no more, and it imports no
heavy modules.
"""

from .sampling import SamplingRun, current_run, sampling_run

__all__ = ["SamplingRun", "current_run", "sampling_run"]
