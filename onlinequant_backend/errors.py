"""One exception class per user mistake; every message names what was wrong, what is allowed and what to do."""

from __future__ import annotations


class OnlineQuantError(ValueError):
    """Base of every error that this package raises for a mistake that its user can correct."""


class UnknownOptionError(OnlineQuantError):
    """An option name that does not exist."""


class InvalidPercentageError(OnlineQuantError):
    """A percentage that is not a number in [0, 100]."""


class InvalidThresholdError(OnlineQuantError):
    """A density threshold that is not a number in [0, inf)."""


class UnknownPrecisionError(OnlineQuantError):
    """A ``precision`` that is not one of the known ones."""


class InvalidCalibrationStepsError(OnlineQuantError):
    """A ``calibration_steps`` that is not an integer of at least 1."""


class InvalidOptionError(OnlineQuantError):
    """Any other option whose value is not allowed."""


class OffloadHooksError(OnlineQuantError):
    """A model's offload hooks that cannot be replaced."""


class PrecisionUnavailableError(OnlineQuantError):
    """A precision asked for by name that this device has no kernels for."""


class FreedWeightsError(OnlineQuantError):
    """Float weights are needed that were freed with ``free_float_weights=True``."""


class StatsFileError(OnlineQuantError):
    """A statistics file that is missing or cannot be read."""


class InsecureCacheDirectoryError(OnlineQuantError):
    """A cache directory that somebody else could put code into."""


class NoReportError(OnlineQuantError, IndexError):
    """A report is asked for before there is one."""


class CalibrationFileError(OnlineQuantError):
    """A calibration that cannot be exported or imported."""
