"""The command line: thin, parse, call, print."""

from patchlab.cli.app import app, main

__all__ = ["app", "main"]
