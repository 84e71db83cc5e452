"""Run the Python blocks of pages, and write what they print into the blocks of text below them.

Run it in the repository: ``python scripts/pages/outputs.py`` (a minute; ``docs/howto/result.md`` does one page). A page's blocks run in order in one
namespace, in an empty folder; one with ``<!-- not run -->`` above it is left out. The tests run the pages with :func:`with_outputs` too.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", DOCS / "index.md", DOCS / "concepts.md", *sorted(DOCS.glob("howto/*.md")))
_BLOCK = re.compile(
    r"^(?P<mark><!-- not run -->\n)?```python\n(?P<code>.*?)^```\n(?P<below>\n```text\n(?P<output>.*?)^```\n)?", re.MULTILINE | re.DOTALL
)


def blocks(text: str) -> Iterator[tuple[re.Match[str], bool]]:
    """The blocks of Python on a page, and whether each is run."""
    for match in _BLOCK.finditer(text):
        yield match, match["mark"] is None


def with_outputs(text: str, name: str) -> str:
    """The page with what its blocks print, in the working directory; ``name`` is what tracebacks call it.

    Raises:
        Exception: whatever a block raises.
    """
    module, parts, end = ModuleType("page"), [], 0
    before = sys.modules.get("page")
    sys.modules["page"] = module  # where dataclasses look for the module that they are defined in
    try:
        for match, runs in blocks(text):
            if not runs:
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile("\n" * text.count("\n", 0, match.start("code")) + match["code"], name, "exec"), vars(module))
            if match["below"] is not None:
                lines = [line.rstrip() for line in printed.getvalue().splitlines()]
                parts += [text[end : match.start("output")], "\n".join(lines).strip("\n") + "\n"]
                end = match.end("output")
    finally:
        del sys.modules["page"]
        if before is not None:
            sys.modules["page"] = before
    return "".join([*parts, text[end:]])


def main() -> None:
    """Run pages, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=Path, default=PAGES)
    for page in [path.resolve() for path in parser.parse_args().pages]:
        print(page.name, flush=True)
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            page.write_text(with_outputs(page.read_text(encoding="utf-8"), str(page)), encoding="utf-8")


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    main()
