"""Which layers are quantized, decided once, after observing.

``layer_timing`` measures on a GPU which layers are faster quantized, and ``sensitivity`` how much of the output's error
each of them causes. ``layer_choice`` decides by these measurements and the options. Nothing is exported here: each
module has one user, and timing loads the kernels.
"""
