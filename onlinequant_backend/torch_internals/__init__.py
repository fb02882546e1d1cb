"""All code that reads or patches private parts of torch, so that only this package is affected by a new release.

Each module is about one part of torch: Dynamo, Inductor, global settings, weak references, and hardware support. None
depends on quantized layers. Nothing is exported here, so that only modules that need Dynamo or Inductor import these.
"""
