"""What does a cell lose that must cost half as much?

A search is the differentiable one of table 1 on composed tasks: two levels, width 16, activations fixed. Two cells are derived from
its weights (alpha = beta = 1): the one that is found, whatever it costs, and one within half of that one's multiply-adds. A third is
found, without a budget, by a search whose dot-products may pool their keys. All are trained from scratch in PatchNet with the recipe of
that table; clips of seed 1, networks of seeds 100 and on, as in ladder.py. The seconds of a search stand in all rows that are derived from
it. Writes results/bench/afforded.csv; rows that the file has are kept, not made again: delete it to measure anew.

    python benchmarks/afforded.py                   # place-relation, three seeds: five minutes of one core
    python benchmarks/afforded.py --tasks moment-relation --seeds 6
"""
import argparse
import itertools
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from attnnas.core.seeds import seed_everything
from attnnas.data.composed import RUNGS, ComposedConfig, make_clips
from attnnas.evidence.tables.table_1_composed import in_words
from attnnas.networks.insertion import insert
from attnnas.networks.patches import PatchNet
from attnnas.search.budget import site_budget
from attnnas.search.differentiable import SearchConfig, differentiable
from attnnas.training.evaluation import evaluate
from attnnas.training.loop import Trainer, TrainingConfig
from ladder import CLIPS_SEED, COUNTS, FIRST_SEED, WIDTH
from planted import measure

TRAINING = TrainingConfig(epochs=3, warmup=.2)
KEYS = {"as found": "all", "within half": "all", "as found, any keys": "any"}  # those of the search, for each cell


@lru_cache
def clips_of(task: str) -> dict:
    config = ComposedConfig(f"composed-{task}")
    return {split: make_clips(config, split, count, CLIPS_SEED) for split, count in COUNTS.items()}


@lru_cache
def search(task: str, seed: int, keys: str):
    "The log of one search, from which all cells of this task, seed and choice of keys are derived."
    config = SearchConfig(levels=2, width=WIDTH, activations="fixed", keys=keys)
    clips = clips_of(task)["train"]
    seed_everything(seed)
    return differentiable(PatchNet(len(clips.classes)), clips, config, TRAINING, seed=seed).log


def train(task: str, seed: int, cell: str) -> dict:
    "Derive a cell, and train a network with it."
    clips = clips_of(task)
    log = search(task, seed, KEYS[cell])
    seed_everything(seed)
    net = PatchNet(len(clips["train"].classes))
    budget = site_budget("", net)
    found = log.derive(alpha=1, beta=1).cell
    if cell == "within half":
        half = replace(budget, most=budget.cost(found) // 2)
        found = replace(log, budget=half).derive(alpha=1, beta=1).cell
    trainer = Trainer(insert(net, found), clips["train"], TRAINING, seed=seed)
    trainer.fit()
    return dict(task=task, seed=seed, cell=cell, multiply_adds=budget.cost(found),
                accuracy=evaluate(net, clips["test"])["top1"], found=in_words(found),
                search_cpu_seconds=log.seconds["cpu"], cpu_seconds=trainer.seconds["cpu"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["place-relation"], choices=[t for t in RUNGS if RUNGS[t].steps > 1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/bench/afforded.csv"))
    a = parser.parse_args()
    import pandas as pd
    torch.set_num_threads(1)
    jobs = list(itertools.product(a.tasks, range(FIRST_SEED, FIRST_SEED + a.seeds), KEYS))
    rows = measure(a.output, train, jobs, ("task", "seed", "cell"))
    print(pd.DataFrame(rows).pivot_table(["multiply_adds", "accuracy"], ["task", "cell"], "seed").round(1).to_string())


if __name__ == "__main__": main()
