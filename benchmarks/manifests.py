"""How long and how much memory do manifests of full size take? Generated tables of 400,000 and 1,000,000 videos.

Every size has a process of its own, which opens the splits as a training does, draws the first
batch of an epoch (rows, paths and labels; nothing is decoded), and summarises. A step's seconds are
processor seconds, the least of some rounds; its MiB are the most that the process held while the
step ran, beyond what it held before the manifest was opened (VmHWM, so Linux only). Rows between
two sizes a and b follow by

    y(n) = y(a) + (y(b) - y(a)) * (n - a) / (b - a).

    python benchmarks/manifests.py [--rows 400000 1000000] [--rounds 3]  ->  results/bench/manifests.csv
"""
import argparse
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import torch

from attnnas.core.devices import device_name
from attnnas.data.annotations import DATASETS
from attnnas.data.manifest import Manifest, Row
from attnnas.data.splits import open_splits
from attnnas.training.loop import epoch_order

RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench" / "manifests.csv"
CLASSES, BATCH = 600, 64
REAL = ("kinetics600", "mit")


def write_manifest(path: Path, rows: int):
    "Videos as Kinetics names them, checked, of 600 classes, one in thirteen in validation."
    classes = [f"doing something {n:03}" for n in range(CLASSES)]
    draws = random.Random(0)
    listed = []
    for n in range(rows):
        label, split = classes[n % CLASSES], "train" if n % 13 else "validation"
        start = n % 90
        name = f"{split}/{label}/{draws.getrandbits(44):011x}_{start:06}_{start + 10:06}.mp4"
        listed.append(Row(name, label, split, 10 + n % 7 / 25, 250 + n % 7, 340, 256, 25.,
                          f"{draws.getrandbits(64):016x}", "ok", "pyav"))
    Manifest(listed, classes, path.parent / "videos", "generated").save(path)


def memory(name: str) -> float:
    "Return the MiB that this process holds (VmRSS), or has held at most (VmHWM)."
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith(name)) / 1024


def first_batch(manifest: Manifest) -> list:
    "Return (path, class number) of the first clips of an epoch."
    rows = manifest.split("train")
    labels = manifest.labels(rows)
    return [(manifest.path(rows[i]), int(labels[i]))
            for i in epoch_order(len(rows), seed=0, epoch=0)[:BATCH].tolist()]


def measure(path: str) -> list:
    "Take the steps on one manifest; returns a dictionary a step."
    before = memory("VmRSS")
    held = {}

    def open_all(): held.update(open_splits(path, test_split="validation").manifests)

    steps = {"open": open_all, "sample": lambda: first_batch(held["train"]),
             "summarise": lambda: held["train"].summary(),
             "fingerprint": lambda: held["train"].fingerprint("train")}
    found = []
    for step, take in steps.items():
        Path("/proc/self/clear_refs").write_text("5")       # VmHWM begins anew
        started = time.process_time()
        take()
        seconds = time.process_time() - started
        found.append({"step": step, "seconds": seconds, "mib": memory("VmHWM") - before})
    gc.collect()
    return [*found, {"step": "held", "seconds": 0., "mib": memory("VmRSS") - before}]


def between(table: pd.DataFrame, rows: int) -> pd.DataFrame:
    "Return seconds and MiB at `rows`, on the line through the smallest and the largest size."
    sizes = sorted(set(table["rows"]))
    ends = [table[table["rows"] == size].set_index("step")[["seconds", "mib"]]
            for size in (sizes[0], sizes[-1])]
    return ends[0] + (ends[1] - ends[0]) * (rows - sizes[0]) / (sizes[-1] - sizes[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[400_000, 1_000_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--of", help=argparse.SUPPRESS)     # a child: the manifest to measure
    args = parser.parse_args()
    if args.of: return print(json.dumps(measure(args.of)))
    found = []
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "generated.csv"
            write_manifest(path, rows)
            for _ in range(args.rounds):
                told = subprocess.run([sys.executable, __file__, "--of", str(path)], check=True,
                                      capture_output=True, text=True).stdout
                found += [{"rows": rows} | step for step in json.loads(told)]
    table = pd.DataFrame(found).groupby(["rows", "step"], sort=False).min().reset_index()
    table["device"] = device_name(torch.device("cpu"))
    table.to_csv(args.output, index=False, float_format="%.4g")
    print(table.to_string())
    if len(set(args.rows)) < 2: return
    for name in REAL:
        videos = sum(DATASETS[name].official.values())
        print(f"\n{name}, {videos:,} rows, by the formula:\n{between(table, videos).round(1)}")


if __name__ == "__main__": main()
