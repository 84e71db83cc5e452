"""Jobs of a comparison."""

import pytest

from patchlab.comparison import job as jobs
from patchlab.errors import MethodError, SiteError


def test_job_checks_its_names_when_it_is_made():
    with pytest.raises(MethodError, match="unknown method"):
        jobs.Job("m", "t", ("exact", "x"), ("z",))
    with pytest.raises(SiteError, match="no sites given"):
        jobs.Job("m", "t", ("exact", "atp"), ())
