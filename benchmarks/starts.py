"""How long must a task be trained until chains that can solve it do, and until a search finds one of them?

PatchNet, width 16, 4,096 clips, a learning rate that rises over 20 % of the steps; clips of seed 1, networks of seeds 100 and on, as in
ladder.py. A search is the differentiable one, two levels, activations fixed: the chain that is derived from it (alpha = beta = 1) and
the accuracy of its own network are noted. Writes results/bench/starts.csv; rows that the file has are kept, not made again: delete it
to measure anew.

    python benchmarks/starts.py                     # five epochs, three seeds: ten minutes of one core
    python benchmarks/starts.py --tasks cue-relation --epochs 3 --seeds 10
"""
import argparse
import itertools
from pathlib import Path

import torch

from attnnas.core.seeds import seed_everything
from attnnas.data.composed import RUNGS, ComposedConfig, make_clips
from attnnas.evidence.tables.table_1_composed import in_words
from attnnas.networks.insertion import insert
from attnnas.networks.patches import PatchNet
from attnnas.search.differentiable import SearchConfig, differentiable
from attnnas.training.evaluation import evaluate
from attnnas.training.loop import Trainer, TrainingConfig
from ladder import CELLS, CLIPS_SEED, COUNTS, FIRST_SEED
from planted import measure

CHAINS = ("spatial dot-product > spatiotemporal dot-product", "spatial dot-product > temporal map-based")
SEARCH = SearchConfig(levels=2, width=16, activations="fixed")


def train(task: str, what: str, epochs: int, seed: int) -> dict:
    "Train a network with a chain, or search one."
    config = ComposedConfig(f"composed-{task}")
    clips = {split: make_clips(config, split, count, CLIPS_SEED) for split, count in COUNTS.items()}
    recipe = TrainingConfig(epochs=epochs, warmup=.2)
    seed_everything(seed)
    net = PatchNet(len(clips["train"].classes))
    found = ""
    if what == "search":
        result = differentiable(net, clips["train"], SEARCH, recipe, seed=seed)
        found = in_words(result.log.derive(alpha=1, beta=1).cell)
        seconds = result.seconds
    else:
        trainer = Trainer(insert(net, CELLS[what]), clips["train"], recipe, seed=seed)
        trainer.fit()
        seconds = trainer.seconds
    return dict(task=task, what=what, epochs=epochs, seed=seed, accuracy=evaluate(net, clips["test"])["top1"], found=found,
                cpu_seconds=seconds["cpu"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["half-place-moment-relation"], choices=[t for t in RUNGS if RUNGS[t].steps > 1])
    parser.add_argument("--what", nargs="+", default=[*CHAINS, "search"], choices=[*CELLS, "search"])
    parser.add_argument("--epochs", type=int, nargs="+", default=[5])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/bench/starts.csv"))
    a = parser.parse_args()
    import pandas as pd
    torch.set_num_threads(1)
    jobs = list(itertools.product(a.tasks, a.what, a.epochs, range(FIRST_SEED, FIRST_SEED + a.seeds)))
    rows = measure(a.output, train, jobs, ("task", "what", "epochs", "seed"))
    print(pd.DataFrame(rows).pivot_table("accuracy", ["task", "what", "epochs"], "seed").round(1).to_string())


if __name__ == "__main__": main()
