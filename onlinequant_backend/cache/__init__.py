"""The directory on disk in which calibrations, statistics and compiled graphs are kept. Imports no torch.

``cache_store`` is its layout, and what other rooms call to read and write entries. ``atomic_files`` and ``locks`` hold
the protocol that keeps an entry whole whatever happens to a process. ``calibration_file`` is the format of one entry.
"""
