"""How long `import attnnas` takes beyond `import torch`, which it needs.

Each import has an interpreter of its own, the two by turns, so that what else the machine does meets both; the first
round, which reads the files from disk, does not count. Medians of seconds by the wall clock and by the process's CPU
clock, and the medians of the rounds' differences. Writes results/bench/import_time.csv. The goal: less than 0.3 s over
torch.

    python benchmarks/import_time.py
    python benchmarks/import_time.py --rounds 3 --output small.csv
"""
import argparse
import statistics
import subprocess
import sys
from pathlib import Path

from attnnas.core.devices import device_name, versions

MODULES, GOAL = ("torch", "attnnas"), 0.3
CHILD = """
import sys, time
wall, cpu = time.perf_counter(), time.process_time()
import {module}
print(time.perf_counter() - wall, time.process_time() - cpu, len(sys.modules))
"""


def imported(module: str) -> tuple[float, ...]:
    "Wall seconds, CPU seconds and loaded modules of the import, in a new interpreter."
    command = [sys.executable, "-c", CHILD.format(module=module)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return tuple(map(float, done.stdout.split()))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("results/bench/import_time.csv"))
    options = parser.parse_args()

    import pandas as pd
    import torch
    rounds = [{module: imported(module) for module in MODULES} for _ in range(options.rounds + 1)][1:]
    def median(module, i, without=None):
        return statistics.median(each[module][i] - (each[without][i] if without else 0) for each in rounds)
    table = pd.DataFrame([dict(
        device=device_name(torch.device("cpu")), python=versions()["python"], torch=torch.__version__, module=module,
        seconds=median(module, 0), cpu_seconds=median(module, 1), seconds_over_torch=median(module, 0, "torch"),
        cpu_seconds_over_torch=median(module, 1, "torch"), modules=int(median(module, 2)), rounds=options.rounds)
        for module in MODULES])
    options.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.output, index=False, float_format="%.4g")
    print(table.to_string(float_format="%.3g"))
    over = median("attnnas", 0, "torch")
    print(f"attnnas takes {over:.3f} s over torch, {'less' if over < GOAL else 'MORE'} than {GOAL} s.")


if __name__ == "__main__": main()
