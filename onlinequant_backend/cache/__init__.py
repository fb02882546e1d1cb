"""The directory on disk in which calibrations, statistics and compiled graphs are kept. Imports no torch.

``cache_store`` is its layout, and what other rooms call to read and write entries. ``atomic_files`` and ``locks`` hold
the protocol that keeps an entry whole whatever happens to a process. ``calibration_file`` is the format of one entry.
``eviction`` and ``listing`` find what there is to remove and to show. ``source_digest`` says for which version of this
package an entry is.
"""

from .cache_store import ENVIRONMENT_VARIABLES, Cache
from .calibration_checks import InvalidEntryError
from .calibration_file import STATS_FILE, Calibration, LayerCalibration

__all__ = ["ENVIRONMENT_VARIABLES", "STATS_FILE", "Cache", "Calibration", "InvalidEntryError", "LayerCalibration"]
