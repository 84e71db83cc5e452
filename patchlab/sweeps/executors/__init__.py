"""Executors: who does the runs of a sweep."""
