"""Everything that reads or patches private parts of torch, so that a new release of torch is looked at in one place.

Each module is about one part of torch: Dynamo, Inductor, global settings, weak references, and the processors that it
knows. Nothing here knows what a quantized layer is. Nothing is handed out either, so that only those load Dynamo or
Inductor that need it.
"""
