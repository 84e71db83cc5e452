"""A comparison from the names of its parts to a folder that shows it: run a :class:`Job`, write its :class:`Results`."""

from patchlab.report.curve import write_curve
from patchlab.report.files import write
from patchlab.report.findings import findings
from patchlab.report.folder import result_folder
from patchlab.report.job import Job, Results, announced, cost_line, named_task, run, scored
from patchlab.report.overview import agreement_table, check_overview, headline, write_overview

__all__ = [
    "Job",
    "Results",
    "agreement_table",
    "announced",
    "check_overview",
    "cost_line",
    "findings",
    "headline",
    "named_task",
    "result_folder",
    "run",
    "scored",
    "write",
    "write_curve",
    "write_overview",
]
