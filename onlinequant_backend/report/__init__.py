"""What was decided for every layer and why: as data, as a table, as a picture. Imports torch only to compare pictures.

``report`` holds what the runtime keeps up to date for each graph, and ``decision`` one layer of it. ``schema`` checks
the JSON file in which both are saved. ``table`` and ``plot`` show a report. ``image_quality`` measures how much two
pictures differ.
"""

from .decision import NodeDecision
from .report import Report, reports

__all__ = ["NodeDecision", "Report", "reports"]
