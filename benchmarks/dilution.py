"""Why does the differentiable search not start on a task that two operations solve, one after the other?

A node of level 2 reads a mixture of all nodes of level 1. Here the connection weights are held: every node of level 2 has `share` of
its input from the spatial dot-product, and the rest in equal parts from the five others; 1/6 is where every search begins. All nodes
reach the sink equally. PatchNet, two levels, width 16, activations fixed, 4,096 clips, 3 epochs, a learning rate that rises over 20 %
of the steps; clips of seed 1, networks of seeds 100 and on, as in ladder.py. Writes results/bench/dilution.csv; rows that the file has
are kept, not made again: delete it to measure anew.

    python benchmarks/dilution.py                   # cue-relation, two shares, two seeds: four minutes of one core
"""
import argparse
import itertools
import math
from pathlib import Path

import torch

from attnnas.cells.supergraph import TALK
from attnnas.core.seeds import seed_everything
from attnnas.data.composed import RUNGS, ComposedConfig, make_clips
from attnnas.networks.patches import PatchNet
from attnnas.search.differentiable import SearchConfig, insert_supergraphs, search_trainer, supergraphs
from attnnas.training.evaluation import evaluate
from attnnas.training.loop import TrainingConfig
from planted import measure

READ, CLIPS_SEED, FIRST_SEED = "spatial dot-product", 1, 100
SHARES = (round(1 / len(TALK), 3), .9)
SEARCH = SearchConfig(levels=2, width=16, activations="fixed", connection_learning_rate=0.)
TRAINING = TrainingConfig(epochs=3, warmup=.2)


def train(task: str, share: float, seed: int) -> dict:
    "Train one supergraph whose level 2 reads `share` of READ, and test it."
    config = ComposedConfig(f"composed-{task}")
    clips = {split: make_clips(config, split, count, CLIPS_SEED) for split, count in (("train", 4096), ("test", 1024))}
    seed_everything(seed)
    net = insert_supergraphs(PatchNet(len(clips["train"].classes)), SEARCH)
    others = len(TALK) - 1
    for graph in supergraphs(net).values():
        with torch.no_grad(): graph.connections.level[..., TALK.index(READ)] = math.log(others * share / (1 - share))
    trainer = search_trainer(net, clips["train"], SEARCH, TRAINING, seed=seed)
    epochs = trainer.fit()
    return dict(task=task, share=share, seed=seed, first_epoch=epochs[0]["top1"], accuracy=evaluate(net, clips["test"])["top1"],
                cpu_seconds=trainer.seconds["cpu"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["cue-relation"], choices=[t for t in RUNGS if RUNGS[t].steps > 1])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/dilution.csv"))
    a = parser.parse_args()
    import pandas as pd
    torch.set_num_threads(1)
    jobs = list(itertools.product(a.tasks, SHARES, range(FIRST_SEED, FIRST_SEED + a.seeds)))
    rows = measure(a.output, train, jobs, ("task", "share", "seed"))
    print(pd.DataFrame(rows).pivot_table("accuracy", "share", "task").round(1).to_string())


if __name__ == "__main__": main()
