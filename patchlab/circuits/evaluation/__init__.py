"""Evaluation of circuits: they are run, and what they explain is measured."""
