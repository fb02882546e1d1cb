"""The callable that Dynamo gets for a graph, from the first observed call to the last one in 8 bit.

``quantized_graph`` is that callable: it observes, has layers selected, compiles, and then runs in 8 bit or in float.
``background`` does such work in another thread, ``cache_entry`` restores it from disk and saves it there, and
``drift_watch`` checks that later calls still fit what was observed. ``sampling`` is for callers that know when a
sampling run begins and ends. Only that is handed out here, since it is all that other rooms need, and loads nothing.
"""

from .sampling import SamplingRun, current_run, sampling_run

__all__ = ["SamplingRun", "current_run", "sampling_run"]
