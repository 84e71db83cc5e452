"""Reports: the folder that shows a comparison or a faithfulness curve."""

from patchlab.report.curve import write_curve
from patchlab.report.files import write

__all__ = ["write", "write_curve"]
