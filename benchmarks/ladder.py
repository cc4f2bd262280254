"""Which compositions of two operations solve a composed task? Every operation alone, every chain of two, every two side by side;
as controls the backbone with a linear and with an MLP head, and one and two non-local blocks.

PatchNet with one cell, 4,096 clips, 4 epochs, a learning rate that rises over 20 % of the steps, once a seed. The clips and seeds
are others than those of table 1 on these tasks: clips of seed 1, networks of seeds 100 and on. Writes results/bench/ladder.csv; rows that
the file has are kept, not made again: delete it to measure anew.

    python benchmarks/ladder.py                                        # one task, one seed: a quarter of an hour of one core
    python benchmarks/ladder.py --tasks cue-relation --kinds controls alone beside
    python benchmarks/ladder.py --tasks place-relation moment-relation cue-relation --seeds 3
"""
import argparse
import itertools
from pathlib import Path

import torch

from attnnas.cells.spec import CellSpec
from attnnas.cells.supergraph import TALK, level_nodes
from attnnas.core.seeds import seed_everything
from attnnas.data.composed import RUNGS, ComposedConfig, make_clips
from attnnas.evidence.insertions import NonLocal
from attnnas.networks.insertion import insert
from attnnas.networks.patches import PatchNet
from attnnas.training.evaluation import evaluate
from attnnas.training.loop import Trainer, TrainingConfig
from planted import measure

WIDTH, CLIPS_SEED, FIRST_SEED = 16, 1, 100
COUNTS = {"train": 4096, "test": 1024}
TRAINING = TrainingConfig(epochs=4, warmup=.2)
NODES = dict(zip(TALK, level_nodes(TALK, "fixed")))


CONTROLS = {"backbone": 0, "backbone, MLP head": 0, "non-local": 1, "two non-local blocks": 2}  # blocks


def compositions() -> dict:
    "{kind: {name: its cell}}: one operation, one after another, and two side by side."
    alone = {name: CellSpec((node,), ((0,),), (1,), WIDTH) for name, node in NODES.items()}
    chains = {f"{first} > {second}": CellSpec((NODES[first], NODES[second]), ((0,), (1,)), (2,), WIDTH)
              for first, second in itertools.product(NODES, repeat=2)}
    beside = {f"{one} + {other}": CellSpec((NODES[one], NODES[other]), ((0,), (0,)), (1, 2), WIDTH)
              for one, other in itertools.combinations_with_replacement(NODES, 2)}
    return {"alone": alone, "chains": chains, "beside": beside}


KINDS = compositions()
CELLS = KINDS["alone"] | KINDS["chains"] | KINDS["beside"]


def network(name: str, classes: int):
    "PatchNet with the cell or the control of this name."
    net = PatchNet(classes, head="mlp" if "MLP" in name else "linear")
    if name in CELLS: return insert(net, CELLS[name])
    return NonLocal(blocks=CONTROLS[name]).build(net, {}) if CONTROLS[name] else net


def train(task: str, name: str, seed: int) -> dict:
    "Train one network, and test it."
    config = ComposedConfig(f"composed-{task}")
    clips = {split: make_clips(config, split, count, CLIPS_SEED) for split, count in COUNTS.items()}
    seed_everything(seed)
    net = network(name, len(clips["train"].classes))
    trainer = Trainer(net, clips["train"], TRAINING, seed=seed)
    trainer.fit()
    return dict(task=task, composition=name, seed=seed, accuracy=evaluate(net, clips["test"])["top1"],
                cpu_seconds=trainer.seconds["cpu"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=["place-moment-relation"], choices=[t for t in RUNGS if RUNGS[t].steps > 1])
    parser.add_argument("--kinds", nargs="+", default=["controls", *KINDS], choices=["controls", *KINDS])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("results/bench/ladder.csv"))
    a = parser.parse_args()
    import pandas as pd
    torch.set_num_threads(1)
    seeds = range(FIRST_SEED, FIRST_SEED + a.seeds)
    names = [name for kind in a.kinds for name in (KINDS | {"controls": CONTROLS})[kind]]
    jobs = [(task, name, seed) for seed, task, name in itertools.product(seeds, a.tasks, names)]
    rows = measure(a.output, train, jobs, ("task", "composition", "seed"))
    table = pd.DataFrame(rows).pivot_table("accuracy", "composition", "task", aggfunc="median")
    print(table.round(0).sort_values(list(table), ascending=False).to_string())


if __name__ == "__main__": main()
