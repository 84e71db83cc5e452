"""The ``patchlab`` command as ``python -m patchlab``."""

from patchlab.cli import main

if __name__ == "__main__":
    main()
