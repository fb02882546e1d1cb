"""From floats to 8 bits: ranges of activations, 8-bit copies of weights, and whether these are still current.

``observation`` is what one observed call tells about a layer's inputs, and ``ranges`` turns it into scales.
``weight_quantization`` is the arithmetic for weights, ``weight_copy`` holds the result, and ``weight_changes`` notices
that the float weight has changed since. ``layer_state`` is one layer in this process, ``weight_set`` all layers that
one call of a graph brings along.
"""
