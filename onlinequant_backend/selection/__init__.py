"""Which layers run in 8 bit, decided once, when observing is over.

``layer_timing`` measures on a GPU which layers are faster in 8 bit, and ``sensitivity`` how much of the output's error
each of them causes. ``layer_choice`` decides from these figures and the options. Nothing is handed out here: each
module has one user, and timing loads the kernels.
"""
