"""From floats to 8 bits: ranges of activations, 8-bit copies of weights, and whether these are still current.

``ranges`` turns what was observed into scales, ``weight_quantization`` turns weights into 8-bit weights.
``layer_state`` is one layer in this process, ``weight_set`` all layers that one call of a graph brings along.
"""
