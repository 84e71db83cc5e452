"""Circuit files."""
