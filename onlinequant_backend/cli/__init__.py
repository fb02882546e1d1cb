"""The command ``onlinequant``."""

from .commands import main as main
