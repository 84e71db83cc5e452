"""What a store of runs costs per run beyond writing the files: run.json, the folder, and the row of the index."""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from patchlab.store import RunStore, writing


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--runs", type=int, default=100, help="of each kind, interleaved")
    parser.add_argument("--kilobytes", type=int, default=100, help="of each of the two files of a run")
    parser.add_argument("--stored", type=int, default=0, help="runs that the store holds already")
    parser.add_argument("--folder", type=Path, default=None, help="where, since disks differ [default: the system's temporary folder]")
    options = parser.parse_args()
    files = {name: os.urandom(options.kilobytes * 1000) for name in ("scores.nc", "log.txt")}
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place)
        with RunStore.create(folder / "store", {}) as store:
            store.plan({f"k{number}": {} for number in range(options.runs + options.stored)})
            keys = list(store.planned())
            for key in keys[options.runs :]:
                store.put(key, {}, {})
            bare, whole = list[float](), list[float]()
            for key in keys[: options.runs]:
                (folder / key).mkdir()
                started = time.perf_counter()
                for name, data in files.items():
                    with writing(folder / key / name) as temporary:
                        temporary.write_bytes(data)
                between = time.perf_counter()
                store.mark(key, "running")
                store.put(key, {"seconds": 1.0}, files)
                bare.append(between - started)
                whole.append(time.perf_counter() - between)
    beyond = [1000 * (one - other) for one, other in zip(whole, bare, strict=True)]
    found = {
        "runs": options.runs,
        "stored": options.stored,
        "files_ms": round(1000 * statistics.median(bare), 2),
        "store_ms": round(1000 * statistics.median(whole), 2),
        "beyond_ms": round(statistics.median(beyond), 2),
        "beyond_ms_90": round(sorted(beyond)[int(0.9 * len(beyond))], 2),
    }
    print(f"median of {found['runs']} runs: the files {found['files_ms']} ms, with mark() and put() {found['store_ms']} ms")
    print(f"beyond the files: {found['beyond_ms']} ms (nine in ten below {found['beyond_ms_90']} ms), goal 20 ms")
    if options.json:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
