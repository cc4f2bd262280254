"""bf16 beside fp32 on data set A: accuracy, and CPU seconds of the same training.

The quick tier's runs, seeds 0 to 2, each in both precisions, one after the other. Writes results/bench/precision.csv, with the
processor's name: on one without bf16 instructions (AVX512-BF16 or AMX) autocast takes several times as long.

    python benchmarks/precision.py                      # non-local blocks: six minutes of one core
    python benchmarks/precision.py --insertions none non-local
"""
import argparse
import tempfile
from pathlib import Path

import pandas as pd

from attnnas.evidence.config import load_tier
from attnnas.evidence.executor import execute
from attnnas.evidence.store import Store
from attnnas.evidence.tables.table import changed

PRECISIONS = ("fp32", "bf16")


def measured(record, insertion: str) -> dict:
    run = record.run
    return dict(data=run.data.name, backbone=run.network.backbone, insertion=insertion, precision=run.training.precision, seed=run.seed,
                top1=record.test["top1"], cpu_seconds=record.seconds["cpu"], processor=record.versions["processor"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--insertions", nargs="+", default=["non-local"], choices=["none", "non-local"])
    parser.add_argument("--results", default=None, help="folder of the records (default: a temporary one)")
    parser.add_argument("--output", type=Path, default=Path("results/bench/precision.csv"))
    a = parser.parse_args()
    tier = load_tier("quick")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = Store(a.results or folder)
        for insertion in a.insertions:
            for seed in range(3):
                run = tier.run("A", "i3d_small", insertion, seed=seed)
                runs = [changed(run, training={"precision": precision}) for precision in PRECISIONS]
                for one in runs: rows.append(measured(*execute([one], store, 1, "cpu", False), insertion))  # never side by side
    table = pd.DataFrame(rows)
    table.to_csv(a.output, index=False, float_format="%.2f", lineterminator="\n")
    print(table.groupby(["insertion", "precision"])[["top1", "cpu_seconds"]].agg(["mean", "std"]).round(1))


if __name__ == "__main__": main()
