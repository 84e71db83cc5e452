"""Reports: the folder that shows a comparison or a faithfulness curve."""

from patchlab.report.curve import summary, write_curve
from patchlab.report.files import write
from patchlab.report.findings import findings
from patchlab.report.overview import agreement_table, check_overview, headline, write_overview

__all__ = [
    "agreement_table",
    "check_overview",
    "findings",
    "headline",
    "summary",
    "write",
    "write_curve",
    "write_overview",
]
