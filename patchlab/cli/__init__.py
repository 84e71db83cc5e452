"""The command line: thin, parse, call, print."""

from patchlab.cli.commands import app, main

__all__ = ["app", "main"]
