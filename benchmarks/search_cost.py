"""What a search costs: a training step with a supergraph at every site, relative to the plain network's.

The full-width I3D with five supergraphs of four levels, on clips of 16x112x112; and the small one that the embedded benchmark
is searched with. Steps (forward, backward, momentum SGD) of all variants in interleaved rounds of one run on one
thread, in CPU seconds; memory is how far a process of its own grows from before the network is made, so it has
parameters, gradients and momenta in it. Each row is a ratio to the plain network. Writes results/bench/search_cost.csv.

    python benchmarks/search_cost.py
    python benchmarks/search_cost.py --networks i3d_small --rounds 3 --output small.csv
"""
import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from attnnas.networks.registry import create_model
from attnnas.core.devices import device_name
from attnnas.core.seeds import seed_everything
from attnnas.cells.fused import FusedSupergraph
from attnnas.networks.insertion import insert
from attnnas.cells.supergraph import Supergraph, level_nodes

VARIANTS = {"plain": None, "fused": FusedSupergraph, "fused, pooled keys": partial(FusedSupergraph, operations=level_nodes(keys="pooled")),
            "literal": Supergraph}
# Network: clip, batch and supergraph. The small one's is the search's default.
SETTINGS = {"i3d": ((3, 16, 112, 112), 1, dict(width=64, levels=4, activations="fixed")),
            "i3d_small": ((3, 16, 32, 32), 32, dict(width=24, levels=2, activations="mixture"))}


def stepper(network: str, variant: str, batch: int):
    "A function that makes one training step."
    seed_everything(0)
    clip, _, options = SETTINGS[network]
    model, kind = create_model(network, num_classes=400), VARIANTS[variant]
    if kind: insert(model, lambda channels: kind(channels, **options))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    video, labels = torch.randn(batch, *clip), torch.arange(batch) % 400

    def step():
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(video), labels).backward()
        optimizer.step()
    return step


def grown(**job) -> float:
    """MiB by which a process of its own grows: network, two steps.

    Call it before this process has grown itself: a child's peak starts at its parent's.
    """
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_job(job: dict) -> float:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step = stepper(**job)
    for _ in range(2): step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def measure(network: str, batch: int, rounds: int, memory: dict) -> list[dict]:
    steps = {variant: stepper(network, variant, batch) for variant in VARIANTS}
    seconds = {variant: [] for variant in VARIANTS}
    for _ in range(rounds + 1):  # the first is not counted
        for variant, step in steps.items():
            started = time.process_time()
            step()
            seconds[variant].append(time.process_time() - started)
    clip, _, options = SETTINGS[network]
    median = {variant: statistics.median(values[1:]) for variant, values in seconds.items()}
    return [dict(device=device_name(torch.device("cpu")), network=network, clip="x".join(map(str, clip)), batch=batch, **options,
                 supergraph=variant, against="plain", times_the_step=median[variant] / median["plain"],
                 times_the_memory=memory[variant] / memory["plain"], seconds=median[variant], seconds_against=median["plain"],
                 mib=memory[variant], mib_against=memory["plain"], rounds=rounds) for variant in VARIANTS if variant != "plain"]


def main():
    import pandas as pd
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--batch", type=int, help="clips a step (default: 1 for i3d, 32 for i3d_small)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=Path("results/bench/search_cost.csv"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.job: return print(run_job(arguments.job))
    batches = {network: arguments.batch or SETTINGS[network][1] for network in arguments.networks}
    memory = {network: {variant: grown(network=network, variant=variant, batch=batch) for variant in VARIANTS}
              for network, batch in batches.items()}
    rows = [row for network, batch in batches.items() for row in measure(network, batch, arguments.rounds, memory[network])]
    table = pd.DataFrame(rows)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(arguments.output, index=False, float_format="%.4g")
    print(table[["network", "batch", "supergraph", "times_the_step", "times_the_memory", "seconds_against", "mib_against"]]
          .to_string(index=False, float_format="%.3g"))


if __name__ == "__main__": main()
