"""What attention and search cost: a training step of the small backbones, relative to the plain one.

The talk says that a search costs as much as training one network. That is a claim about large backbones; this measures
it for the small ones, in one process and one run, so that the ratios mean something on a noisy machine.

    python benchmarks/training_step.py
"""
import statistics
import time

import torch

from attnnas.networks.registry import create_model
from attnnas.core.seeds import seed_everything
from attnnas.data.synthetic import benchmark, make_clips
from attnnas.cells.derivation import random_cell
from attnnas.networks.insertion import insert
from attnnas.networks.non_local import NonLocalBlock
from attnnas.search.differentiable import SearchConfig, insert_supergraphs
from attnnas.training.loop import Trainer, TrainingConfig

ROUNDS, WIDTH, LEVELS = 5, 24, 2


def models(backbone: str) -> dict:
    "Each variant of `backbone`, freshly made."
    def new(what=None):
        seed_everything(0)
        model = create_model(backbone, num_classes=12)
        return insert(model, what) if what else model

    cells = {f"random cell {seed}": new(random_cell(seed, LEVELS, width=WIDTH).cell) for seed in range(2)}
    searches = {f"supergraph, {kind} activations": insert_supergraphs(new(), SearchConfig(levels=LEVELS, width=WIDTH, activations=kind))
                for kind in ("fixed", "mixture")}
    return {"backbone": new(), "non-local": new(NonLocalBlock)} | cells | searches


def main():
    torch.set_num_threads(1)
    clips = make_clips(benchmark("A"), "train", 64)
    for backbone in ("i3d_small", "s3d_small"):
        trainers = {name: Trainer(model, clips, TrainingConfig(epochs=1000)) for name, model in models(backbone).items()}
        seconds = {name: [] for name in trainers}
        for _ in range(ROUNDS + 1):  # interleaved, the first round not counted
            for name, trainer in trainers.items():
                started = time.process_time()
                trainer.train_batch(torch.arange(32))
                seconds[name].append(time.process_time() - started)
        plain = statistics.median(seconds["backbone"][1:])
        print(f"{backbone}, batch 32 of 16x32x32, one thread: CPU-milliseconds a training step, and times the backbone")
        for name, values in seconds.items():
            step = statistics.median(values[1:])
            print(f"  {name:32} {1000 * step:7.0f} {step / plain:6.2f}x")


if __name__ == "__main__": main()
