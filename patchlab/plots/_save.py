"""Figures as files: HTML that needs no network, or an image where kaleido and a Chromium are there."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from patchlab.errors import OutputError
from patchlab.store.files import writing

HTML = (".html", ".htm")
IMAGES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
DARK = "@media screen and (prefers-color-scheme: dark) { .plotly-graph-div { filter: invert(0.92) hue-rotate(180deg); } }"
"""In a dark page lightness is turned round and hues stay: blue still supports, and methods keep their colours."""
_HEAD = f'<meta name="color-scheme" content="light dark"><style>{DARK}</style>'


def save(
    figure: go.Figure,
    path: str | os.PathLike[str],
    *,
    include_plotlyjs: Literal[True, "directory"] = True,
    overwrite: bool = False,
    scale: float | int = 2,
    timeout: float | int = 60,
) -> Path:
    """Write a figure as ``.html`` or as an image (``.png``, ``.svg``, ``.pdf``, ``.jpg``, ``.webp``).

    Args:
        figure: what a function of :mod:`patchlab.plots` returned, or any plotly figure.
        path: the ending says the format.
        include_plotlyjs: for HTML; True puts plotly's JavaScript into the file (5 MB, stands alone), ``"directory"`` puts it
            once beside the files of a folder, as ``plotly.min.js``. Neither needs a network.
        overwrite: replace an existing file.
        scale: pixels of an image per pixel of the figure.
        timeout: seconds after which an image is given up (browsers hang at times).

    Returns:
        The file written: ``path``, or the HTML beside it where an image could not be made (a warning says why).

    Raises:
        OutputError: unknown ending, existing file, or a place that cannot be written to.

    Example:
        >>> pl.plots.save(pl.plots.heatmaps(relp), "relp.png")  # doctest: +SKIP
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind not in (*HTML, *IMAGES):
        raise OutputError(f"cannot tell the format of {path.name!r} from its ending {kind!r}; use one of {', '.join((*HTML, *IMAGES))}.")
    if include_plotlyjs not in (True, "directory"):
        raise OutputError(f'include_plotlyjs is {include_plotlyjs!r}; expected True (one file) or "directory" (one copy per folder).')
    if kind in IMAGES:
        try:
            image = _image(figure, kind, scale, timeout)
        except Exception as error:  # whatever keeps the browser from drawing, the figure is not lost
            path = path.with_suffix(".html")
            _write_html(figure, path, include_plotlyjs, overwrite)
            warnings.warn(
                f"wrote {path} instead of a {kind} image, which needs kaleido and Chromium or Chrome "
                f"(pip install 'patchlab[images]', and a browser from your system's packages): {_first_line(error)}",
                UserWarning,
                stacklevel=2,
            )
            return path
        with writing(path, overwrite=overwrite) as temporary:
            temporary.write_bytes(image)
        return path
    _write_html(figure, path, include_plotlyjs, overwrite)
    return path


def _image(figure: go.Figure, kind: str, scale: float | int, timeout: float | int) -> bytes:
    """The bytes of an image."""
    if figure.layout.sliders or figure.layout.updatemenus:  # nobody can move them in an image
        figure = go.Figure(figure)
        figure.layout.sliders = figure.layout.updatemenus = None
    own = figure.layout.meta if isinstance(figure.layout.meta, dict) else {}
    return _drawn(figure, {"format": kind.lstrip("."), "scale": scale, "width": figure.layout.width or own.get("width")}, timeout)


def _drawn(figure: go.Figure, options: dict[str, Any], timeout: float | int) -> bytes:
    """What plotly's ``write_image`` makes, in a process of its own, which can be ended with its browser when it hangs."""
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "figure.json", Path(folder) / f"image.{options['format']}"
        given.write_text(figure.to_json() or "", encoding="utf-8")
        command = [sys.executable, "-c", _DRAW, str(given), str(made), json.dumps(options)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
            try:
                _, said = process.communicate(timeout=timeout)
            except BaseException as error:
                _end(process)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise TimeoutError(f"the browser drew nothing in {timeout:g} s") from error
                raise
        if process.returncode or not made.exists():
            raise RuntimeError(said.rpartition(_REASON)[2].strip() or "no image was made")
        return made.read_bytes()


_REASON = "reason: "
_DRAW = f"""
import json, sys
import plotly.io as pio
try:
    figure = pio.from_json(open(sys.argv[1], encoding="utf-8").read())
    figure.write_image(sys.argv[2], **json.loads(sys.argv[3]))
except Exception as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    sys.exit({_REASON!r} + (lines or [type(error).__name__])[0])
"""


def _end(process: "subprocess.Popen[str]") -> None:
    """End a process and the browser that it started."""
    if hasattr(os, "killpg"):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()


def _write_html(figure: go.Figure, path: Path, include_plotlyjs: Literal[True, "directory"], overwrite: bool) -> None:
    text = figure.to_html(include_plotlyjs=include_plotlyjs, **page_options(figure))
    text = text.replace("<head>", f"<head>{_HEAD}", 1)
    with writing(path, overwrite=overwrite) as temporary:
        temporary.write_text(text, encoding="utf-8")
    script = path.parent / "plotly.min.js"
    if include_plotlyjs == "directory" and not script.exists():
        with writing(script) as temporary:
            temporary.write_text(get_plotlyjs(), encoding="utf-8")


def page_options(figure: go.Figure) -> dict[str, Any]:
    """What ``to_html`` needs beside the figure: the configuration, and for circuits the script that answers clicks."""
    own = figure.layout.meta if isinstance(figure.layout.meta, dict) else {}
    script = files("patchlab.plots").joinpath("circuit.js").read_text(encoding="utf-8") if own.get("figure") == "circuit" else None
    return {"config": {"displaylogo": False, "responsive": True}, "post_script": script}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
