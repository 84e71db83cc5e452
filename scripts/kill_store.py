"""Kill a process that writes to a store of runs at random moments, and count what it had acknowledged and lost.

python scripts/kill_store.py --kills 50
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from patchlab.errors import OutputError
from patchlab.store import RunStore


def expected(number: int) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Record and files of a run."""
    return {"number": number}, {"a.bin": random.Random(number).randbytes(20_000 + number), "b.json": json.dumps([number] * 100).encode()}


def work(folder: Path, runs: int) -> None:
    """Put every run that has no result, and say so after each; every seventh one fails at first."""
    print("begun", flush=True)
    with RunStore.create(folder, {}) as store:
        store.plan({f"k{number:04}": {"number": number} for number in range(runs)})
        for number, (key, status) in enumerate(store.status().items()):
            if status == "done":
                continue
            record, files = expected(number)
            store.mark(key, "running")
            if number % 7 == 0 and status != "failed":
                store.put(key, {"error": number}, {"log.txt": b"log"}, status="failed")
                print(key, "failed", flush=True)
            store.put(key, record, files)
            print(key, "done", flush=True)


def started(folder: Path, runs: int) -> "subprocess.Popen[str]":
    """A process that works on a folder."""
    return subprocess.Popen([sys.executable, __file__, "--work", str(folder), "--runs", str(runs)], stdout=subprocess.PIPE, text=True)


def killed(folder: Path, runs: int, chance: random.Random) -> list[str]:
    """Let a process work, kill it after a while, and return the runs that it said are done."""
    said: list[str] = []
    with started(folder, runs) as process:
        stream = process.stdout
        if stream is None:
            raise RuntimeError("the process has no output")
        stream.readline()
        reader = threading.Thread(target=lambda: said.extend(line.split()[0] for line in stream if line.endswith("done\n")))
        reader.start()
        wanted, until = chance.randrange(12), time.monotonic() + 60  # however busy the machine is, some die before their first result and some after
        while len(said) < wanted and process.poll() is None and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(chance.uniform(0.0, 0.03))
        process.send_signal(signal.SIGKILL)
        process.wait()
        reader.join()
    return said


def table(folder: Path) -> list[Any]:
    """Every result: key, status, record and the checksums of its files, after comparing them."""
    store = RunStore.open(folder)
    rows: list[Any] = []
    for key, status in store.status().items():
        if status != "done":
            rows.append([key, status])
            continue
        one = store.get(key)
        rows.append([key, status, one.record, {name: hashlib.sha256(one.path(name).read_bytes()).hexdigest() for name in one.files}])
    return rows


def check(folder: Path, acknowledged: set[str]) -> tuple[int, int]:
    """How many acknowledged results are lost, and whether the store cannot be read."""
    try:
        store, lost = RunStore.open(folder), 0
        status = store.status()
        for key in sorted(acknowledged):
            record, files = expected(int(key[1:]))
            try:
                found = store.get(key)
                same = found.record == record and {name: found.path(name).read_bytes() for name in found.files} == files
                lost += not (same and status[key] == "done")
            except OutputError as error:
                print(error, file=sys.stderr)
                lost += 1
    except OutputError as error:
        print(error, file=sys.stderr)
        return 0, 1
    return lost, 0


def main() -> int:
    """Kill, check, go on, and compare with a store that nobody killed anything over."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--runs", type=int, default=400, help="of one store")
    parser.add_argument("--seed", type=int, default=None, help="of the moments [default: another one each time]")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(options.work, options.runs)
        return 0
    seed = options.seed if options.seed is not None else int.from_bytes(os.urandom(4), "big")
    chance, found = random.Random(seed), {"kills": options.kills, "seed": seed, "acknowledged": 0, "lost": 0, "unreadable": 0}
    with tempfile.TemporaryDirectory() as place:
        stores, killings = 0, 0
        folder, acknowledged, same = Path(place) / "0", set[str](), True
        plain = Path(place) / "plain"
        work_quietly(plain, options.runs)
        whole = table(plain)
        while killings < options.kills:
            new = killed(folder, options.runs, chance)
            killings += 1
            acknowledged |= set(new)
            found["acknowledged"] += len(new)
            lost, unreadable = check(folder, acknowledged) if (folder / "sweep.json").exists() else (len(new), 0)
            found["lost"] += lost
            found["unreadable"] += unreadable
            if len(acknowledged) > 0.8 * options.runs or killings == options.kills:
                work_quietly(folder, options.runs)
                same = same and table(folder) == whole
                stores, acknowledged = stores + 1, set()
                folder = Path(place) / str(stores)
    result = {**found, "stores": stores, "same_table": same}
    print(json.dumps(result) if options.json else "\n".join(f"{name}: {value}" for name, value in result.items()))
    tried = 2 * found["acknowledged"] >= found["kills"]  # else nearly all were killed before they had anything to lose
    return 0 if same and tried and not found["lost"] and not found["unreadable"] else 1


def work_quietly(folder: Path, runs: int) -> None:
    """Work to the end."""
    with started(folder, runs) as process:
        process.communicate()
    if process.returncode:
        raise RuntimeError(f"a run of {folder} that nobody killed ended with {process.returncode}")


if __name__ == "__main__":
    sys.exit(main())
