"""Execute the notebooks, and hold what comes out against what is committed beside them.

Run it in the repository: ``python scripts/notebooks.py`` executes every ``notebooks/*.py`` into the ``.ipynb`` beside it (extra ``notebooks``, and a
Chromium or Chrome for the pictures), ``python scripts/notebooks.py notebooks/1-quickstart.py`` one of them. With ``--check`` nothing is written, no
browser is needed, and what differs from the committed outputs is listed; ``tests/test_notebooks.py`` does the same.

Compared is what a reader sees: texts, tables, and the data of figures; pictures are drawn from that data and are not. Durations are masked. Numbers
in texts may differ by one in their last digit, data of figures by ``TOLERANCE`` of the largest number beside it. Scores are computed in float32: with
other kernels of the CPU (``ATEN_CPU_CAPABILITY=default MKL_CBWR=COMPATIBLE ONEDNN_MAX_CPU_ISA=SSE41`` in the environment, instead of AVX) they move
by some millionths of the largest one. Ranks move more, by a thousandth in a Spearman correlation, since cells that do next to nothing change places.
"""

import argparse
import base64
import io
import json
import os
import re
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
import numpy as np
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
FIGURE, PICTURE = "application/vnd.plotly.v1+json", "image/png"
TOLERANCE, IN_TEXTS = 2e-3, 1e-4
"""Of the largest number of an array; of a number in a text, beside one in its last digit."""
_COLOURS = 256
"""Of a picture: enough for text, lines and a colour scale, at a third of the bytes."""
_NUMBER = re.compile(r"(?<![\w.#])[-−+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")  # no part of a name (a8.h0) or of a colour
_TIME = re.compile(r"(?:[\d.,]+ (?:ms|s|min|h)\b ?)+")


def execute(source: Path, *, pictures: bool, timeout: int = 600) -> NotebookNode:
    """A notebook's script, executed in an empty folder, with one thread and without a network.

    Args:
        source: a script in jupytext's percent format.
        pictures: draw every figure as a PNG, too.
        timeout: seconds that a cell may take.

    Raises:
        CellExecutionError: a cell raised.
    """
    notebook = jupytext.read(source)
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"  # else they are random, and every execution is another file
    renderer = "plotly_mimetype+png" if pictures else "plotly_mimetype"
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "PLOTLY_RENDERER": renderer, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=timeout, kernel_name="python3", resources={"metadata": {"path": folder}}, record_timing=False)
        client.execute(env=env)
    for cell in notebook.cells:
        kept: list[NotebookNode] = []
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":  # it speaks of the machine
                print(output["text"].rstrip(), file=sys.stderr)
            elif kept and output.output_type == kept[-1].output_type == "stream":  # a text comes in pieces, which are others every time
                kept[-1]["text"] += output["text"]
            else:
                kept.append(output)
        if "outputs" in cell:
            cell["outputs"] = kept
    for output in outputs(notebook):
        if PICTURE in output.get("data", {}):
            output["data"][PICTURE] = _smaller(output["data"][PICTURE])
    notebook.metadata = {key: notebook.metadata[key] for key in ("jupytext", "kernelspec") if key in notebook.metadata}
    return notebook


def outputs(notebook: NotebookNode) -> Iterator[NotebookNode]:
    """What the cells of a notebook show."""
    for cell in notebook.cells:
        yield from cell.get("outputs", ())


def as_text(notebook: NotebookNode) -> str:
    """A notebook as the text of its file: indented, but for figures, which would have a line for each number."""
    figures: dict[str, str] = {}

    def aside(value: Any) -> Any:
        if not isinstance(value, dict):
            return [aside(each) for each in value] if isinstance(value, list) else value
        found = {}
        for key, each in value.items():
            found[key] = aside(each)
            if key == FIGURE:
                found[key] = f"(figure {len(figures)})"
                figures[found[key]] = json.dumps(each, ensure_ascii=False, separators=(",", ":"))
        return found

    text = json.dumps(aside(notebook), indent=1, ensure_ascii=False) + "\n"
    for place, figure in figures.items():
        text = text.replace(f'"{place}"', figure)
    return text


def _smaller(picture: str) -> str:
    """A PNG (base64) with a palette."""
    from PIL import Image

    with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
        small = image.convert("RGB").quantize(_COLOURS, Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    written = io.BytesIO()
    small.save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def differences(committed: NotebookNode, executed: NotebookNode) -> list[str]:
    """What a reader of the committed notebook would see that is no longer so: a line each, with the cell."""
    found: list[str] = []
    if len(committed.cells) != len(executed.cells):
        return [f"{len(committed.cells)} cells are committed, the script has {len(executed.cells)}"]
    for number, (old, new) in enumerate(zip(committed.cells, executed.cells, strict=True)):
        if (old.cell_type, old.source) != (new.cell_type, new.source):
            found.append(f"cell {number}: the source is another one")
            continue
        shown = [[(output.get("name", output.output_type), _data(output)) for output in cell.get("outputs", ())] for cell in (old, new)]
        kinds = [[(name, *sorted(data)) for name, data in one] for one in shown]
        if kinds[0] != kinds[1]:
            found.append(f"cell {number}: committed shows {kinds[0]}, executed {kinds[1]}")
            continue
        for (_, before), (_, after) in zip(*shown, strict=True):
            for kind in before:
                compare = _unlike_figures if kind == FIGURE else _unlike_texts
                found += [f"cell {number}, {kind}: {line}" for line in compare(before[kind], after[kind])]
    return found


def _data(output: NotebookNode) -> dict[str, Any]:
    """An output by MIME type, without pictures, and without the plain text beside a table or figure that says the same again."""
    data = dict(output["data"]) if "data" in output else {"text/plain": output.get("text", "\n".join(output.get("traceback", ())))}
    data.pop(PICTURE, None)
    return {kind: value for kind, value in data.items() if kind != "text/plain" or len(data) == 1}


def _unlike_texts(before: str, after: str, scale: float = 0.0) -> list[str]:
    """Where two texts differ; numbers may by one in the last digit, and by ``IN_TEXTS`` of themselves or of ``scale``."""
    texts = [_TIME.sub("(time)", text) for text in (before, after)]
    words = [re.sub(r"[\s─-]+", " ", _NUMBER.sub("#", text)) for text in texts]
    if words[0] != words[1]:
        at = next((i for i, pair in enumerate(zip(*words, strict=False)) if pair[0] != pair[1]), min(map(len, words)))
        return [f"{words[0][max(0, at - 30) : at + 30]!r} is now {words[1][max(0, at - 30) : at + 30]!r}"]
    pairs = zip(*(_NUMBER.findall(text) for text in texts), strict=True)
    return [f"{old} is now {new}" for old, new in pairs if not _near(old, new, scale)]


def _near(old: str, new: str, scale: float) -> bool:
    values = [float(text.replace("−", "-").replace(",", "")) for text in (old, new)]
    if all(re.fullmatch(r"[-−+]?[\d,]+", text) for text in (old, new)):
        return values[0] == values[1]  # a count or an index
    unit = max(_unit(old), _unit(new))
    return abs(values[0] - values[1]) <= 1.01 * unit + IN_TEXTS * max(scale, *map(abs, values))


def _unit(text: str) -> float:
    """One in the last digit of a number."""
    mantissa, _, exponent = text.partition("e")
    return 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))


def _unlike_figures(before: Any, after: Any) -> list[str]:
    """Where two figures (plotly's JSON) differ in data, words or layout."""
    arrays = [array for value in (before, after) for array in _arrays(value.get("data", []))]
    scale = max((float(np.nanmax(np.abs(array))) for array in arrays if np.isfinite(array).any()), default=0.0)
    return list(_unlike(before, after, "", scale))


def _arrays(value: Any) -> Iterator[np.ndarray]:
    array = _array(value)
    if array is not None:
        yield array
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _arrays(each)


def _array(value: Any) -> np.ndarray | None:
    """Numbers as plotly writes them: in base64, or as a list (None where there is none)."""
    if isinstance(value, dict) and "bdata" in value:
        return np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"]).astype(np.float64)
    if isinstance(value, list) and value and all(each is None or (isinstance(each, int | float) and not isinstance(each, bool)) for each in value):
        return np.array([np.nan if each is None else each for each in value], dtype=np.float64)
    return None


def _unlike(before: Any, after: Any, place: str, scale: float) -> Iterator[str]:
    arrays = [_array(value) for value in (before, after)]
    if arrays[0] is not None and arrays[1] is not None:
        yield from _unlike_arrays(arrays[0], arrays[1], place)
    elif isinstance(before, dict) and isinstance(after, dict) and before.keys() == after.keys():
        for key in before:
            yield from _unlike(before[key], after[key], f"{place}.{key}", scale)
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for index, pair in enumerate(zip(before, after, strict=True)):
            yield from _unlike(*pair, f"{place}[{index}]", scale)
    elif isinstance(before, str) and isinstance(after, str):
        yield from (f"{place}: {line}" for line in _unlike_texts(before, after, scale))
    elif isinstance(before, int | float) and isinstance(after, int | float):
        yield from _unlike_arrays(np.array([before], dtype=float), np.array([after], dtype=float), place)
    elif before != after:
        yield f"{place}: {str(before)[:60]} is now {str(after)[:60]}"


def _unlike_arrays(before: np.ndarray, after: np.ndarray, place: str) -> Iterator[str]:
    if before.shape != after.shape:
        yield f"{place}: {before.size} numbers are now {after.size}"
    elif not np.array_equal(np.isnan(before), np.isnan(after)):
        yield f"{place}: other numbers are missing"
    else:
        apart = np.nan_to_num(np.abs(before - after))
        if apart.size and apart.max() > TOLERANCE * np.nanmax(np.abs(before), initial=0.0):
            at = int(apart.argmax())
            yield f"{place}[{at}]: {before[at]:.6g} is now {after[at]:.6g}"


def main() -> int:
    """Execute notebooks, and write or compare them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", type=Path, default=SOURCES, help="scripts in notebooks/; all of them unless named")
    parser.add_argument("--check", action="store_true", help="write nothing, and list what differs from what is committed")
    arguments = parser.parse_args()
    stale = 0
    for source in arguments.sources:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        executed = execute(source, pictures=not arguments.check)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        written = source.with_suffix(".ipynb")
        if arguments.check:
            found = differences(nbformat.read(written, as_version=4), executed)
            stale += bool(found)
            verdict = f"{len(found)} differences" if found else "as committed"
            print("\n".join([f"{source.name}: {verdict}, {seconds:.0f} s of CPU", *found]), flush=True)
        else:
            written.write_text(as_text(executed), encoding="utf-8")
            print(f"{source.name}: {written.stat().st_size / 1000:.0f} kB, {seconds:.0f} s of CPU with the pictures", flush=True)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
