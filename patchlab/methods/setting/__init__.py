"""Settings of runs, and the unpatched runs that methods start from."""
