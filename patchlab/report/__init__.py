"""A comparison from the names of its parts to a folder that shows it: run a :class:`Job`, write its :class:`Results`."""

from patchlab.report.curve import summary, write_curve
from patchlab.report.files import write
from patchlab.report.folder import result_folder
from patchlab.report.job import Job, Results, named_task, run, scored

__all__ = ["Job", "Results", "named_task", "result_folder", "run", "scored", "summary", "write", "write_curve"]
