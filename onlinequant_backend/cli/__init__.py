"""The command ``onlinequant``. Imports no torch before a command needs it.

``commands`` reads the arguments and holds what shows and changes the cache. ``transfer`` carries calibrations to other
machines. ``doctor`` and ``kernel_check`` say whether this machine can run in 8 bit. ``demo`` draws pictures.
"""

from .commands import main

__all__ = ["main"]
