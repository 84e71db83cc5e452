"""How soon the report of a large sweep can be read: its size, the time to write it, and the time until Chromium shows its first rows."""

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from _common import quietly

from patchlab.report.sweep import PAGE, write_sweep
from patchlab.store import RunStore
from patchlab.sweeps.driver import planned, run_sweep
from patchlab.sweeps.executors.local import Local
from patchlab.sweeps.file import read, runs_of
from patchlab.sweeps.results import Sweep
from patchlab.sweeps.spec import RunSpec

PER_SEED = 10
FILE = """
version: 1
name: synthetic
models: demo-gpt2-4l
tasks: [{{name: ioi, n: 12, seed: {seeds}}}]
runs:
  - {{kind: score, methods: [exact, atp, 'ig:5', relp, relp-ah, attnlrp, gim], sites: [resid_pre, attn_out, z]}}
  - {{kind: verify, screen: relp, sites: z, k: 2, sample: 0}}
  - {{kind: circuit, methods: [atp, relp], smallest: true, random: 1}}
"""
SEEN = """
(function look() {
  const row = document.querySelector("tbody tr");
  if (row && row.offsetHeight) requestAnimationFrame(() => { window.firstRows ??= performance.now(); });
  else requestAnimationFrame(look);
})();
"""
"""Notes when the first frame with a row of a table has been drawn."""
TIMES = """JSON.stringify({
  load: performance.getEntriesByType("navigation")[0].loadEventEnd,
  rows: window.firstRows ?? null,
  cells: document.querySelectorAll("td").length,
  figures: document.querySelectorAll(".js-plotly-plot").length,
})"""


def specs(folder: Path, seeds: int) -> list[RunSpec]:
    """The runs of a file with so many seeds."""
    file = folder / "sweep.yaml"
    file.write_text(FILE.format(seeds=list(range(seeds))), encoding="utf-8")
    return runs_of(read(file))


def synthetic(folder: Path, runs: int) -> Path:
    """A sweep of so many runs: those of one seed are done, and the others have copies of their results; in a hundred, one has failed."""
    if (folder / "many").exists():
        return folder / "many"
    done = quietly(lambda: run_sweep(specs(folder, 1), folder / "one", Local(), progress=False, about={"name": "one"}))
    assert done["failed"] == 0, done
    first = {plan["fields"]["kind"] + plan["fields"]["method"]: stored for stored, plan in Sweep(folder / "one").done()}
    wanted = specs(folder, max(1, runs // PER_SEED))
    error = {"type": "MethodError", "message": "synthetic failure", "traceback": "Traceback (most recent call last):\n  synthetic failure"}
    with RunStore.create(folder / "many", {"name": f"{len(wanted)} synthetic runs"}) as store:
        store.plan({run.key: planned(run) for run in wanted})
        for number, run in enumerate(wanted):
            plan = store.planned()[run.key]
            template = first[plan["fields"]["kind"] + plan["fields"]["method"]]
            record = {**template.record, "label": plan["label"], "spec": plan["spec"], "fields": plan["fields"]}
            if number % 100 == 99:
                store.put(run.key, {**record, "error": error}, {}, status="failed")
            else:
                store.put(run.key, record, {name: template.path(name).read_bytes() for name in template.files})
    return folder / "many"


async def opened(page: Path, browser: str | None) -> dict[str, Any]:
    """Milliseconds until a new browser has loaded the page, and until its first rows are there."""
    import choreographer

    async with choreographer.Browser(path=browser, headless=True, enable_sandbox=False) as running:
        tab = await running.create_tab("about:blank")
        await tab.send_command("Page.enable")
        await tab.send_command("Page.addScriptToEvaluateOnNewDocument", {"source": SEEN})
        await tab.send_command("Page.navigate", {"url": page.resolve().as_uri()})
        for _ in range(300):
            await asyncio.sleep(0.1)
            answer = await tab.send_command("Runtime.evaluate", {"expression": TIMES, "returnByValue": True})
            found = json.loads(answer["result"]["result"]["value"])
            if found["load"] and found["rows"] is not None:
                return found
    raise TimeoutError(f"{page} was not there within 30 s")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--runs", type=int, default=500, help=f"of the sweep, in steps of {PER_SEED}")
    parser.add_argument("--repeats", type=int, default=5, help="times that the page is opened, each in a new browser")
    parser.add_argument("--keep", type=Path, default=None, help="leave the sweep with its report in this folder, and take the one that is there")
    options = parser.parse_args()
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    with tempfile.TemporaryDirectory() as place:
        folder = options.keep or Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        sweep = synthetic(folder, options.runs)
        seconds = []
        for _ in range(2):  # the second time agreements are there already
            started = time.perf_counter()
            written = write_sweep(Sweep(sweep))
            seconds.append(time.perf_counter() - started)
        times = [asyncio.run(opened(sweep / "report" / PAGE, browser)) for _ in range(options.repeats)]
    found = {
        "runs": written["counts"]["planned"],
        "page_kilobytes": round(written["bytes"][PAGE] / 1000),
        "folder_megabytes": round(sum(written["bytes"].values()) / 1e6, 1),
        "figures": written["figures"],
        "write_s": round(seconds[0], 1),
        "write_again_s": round(seconds[1], 1),
        "load_ms": round(statistics.median(one["load"] for one in times)),
        "rows_ms": round(statistics.median(one["rows"] for one in times)),
        "slowest_ms": round(max(max(one["load"], one["rows"]) for one in times)),
        "cells": times[0]["cells"],
    }
    print(f"{found['runs']} runs: a page of {found['page_kilobytes']:,} kB with {found['cells']:,} cells, {found['figures']} figures beside it")
    print(f"written in {found['write_s']} s, again in {found['write_again_s']} s ({found['folder_megabytes']} MB)")
    print(f"Chromium, median of {options.repeats}: loaded after {found['load_ms']} ms, first rows after {found['rows_ms']} ms; goal 2,000 ms")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main())
