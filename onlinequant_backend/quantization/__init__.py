"""Quantization: ranges of activations, 8-bit copies of weights, and whether these are still current.

``observation`` records the layers' inputs in observed calls, and ``ranges`` turns these into scales.
``weight_quantization`` quantizes weights, ``weight_copy`` holds the result, and ``weight_changes`` detects that the
float weight has changed since. ``layer_state`` is the state of one layer in this process, and ``weight_set`` all layers
of one call of a graph.
"""
