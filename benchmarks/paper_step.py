"""What a training step of the paper tier takes on this device: each network, 64 frames at 224x224, forward and backward.

A step is that of `Trainer`: forward, backward, clipping, update. `clips` a step are doubled until memory ends. The median of
five steps after two; the clips are noise. `attnnas doctor` multiplies these times by the clips of a tier. Writes
results/bench/paper_step.csv.

    python benchmarks/paper_step.py                      # needs a CUDA device
    python benchmarks/paper_step.py --frames 4 --size 64 --most 1 --device cpu --output small.csv
"""
import argparse
import statistics
import time
from pathlib import Path

import pandas as pd
import torch

from attnnas.networks.registry import create_model
from attnnas.core.devices import device_name, pick_device
from attnnas.core.seeds import seed_everything
from attnnas.evidence.config import load_tier
from attnnas.networks.insertion import insert
from attnnas.networks.non_local import NonLocalBlock
from attnnas.search.differentiable import SearchConfig, insert_supergraphs
from attnnas.cells.spec import CellSpec
from attnnas.training.loop import TrainingConfig, make_optimizer, train_step

CELL = Path(__file__).parent.parent / "results/quick/figure_cells.json"


def network(backbone: str, what: str):
    "`backbone` with 600 classes, and at its sites what the tier `paper` puts there."
    seed_everything(0)
    model, search = create_model(backbone, num_classes=600), SearchConfig(**load_tier("paper").search)
    if what == "supergraph": return insert_supergraphs(model, search)
    if what == "non-local": return insert(model, NonLocalBlock)
    if what == "cell": return insert(model, CellSpec.from_dict(CellSpec.load(CELL).to_dict() | {"width": search.width}))
    return model


def seconds_a_step(model, clips: int, frames: int, size: int, device) -> float:
    "Median seconds of a training step on `clips` clips."
    config = TrainingConfig(**load_tier("paper").training)
    optimizer, took = make_optimizer(model, config), []
    video = torch.randint(0, 256, (clips, 3, frames, size, size), dtype=torch.uint8, device=device)
    labels = torch.arange(clips, device=device)
    for _ in range(7):
        started = time.perf_counter()
        train_step(model.train(), optimizer, [(video, labels)], clips, 1e-3, config.clip_norm).tolist()   # waits for the device
        took.append(time.perf_counter() - started)
    return statistics.median(took[2:])


def measure(backbone: str, what: str, options, device) -> dict:
    "The largest number of clips that fits, up to `options.most`, and its step."
    clips, row = 1, {}
    while clips <= options.most:
        model = network(backbone, what).to(device)
        if device.type == "cuda": torch.cuda.reset_peak_memory_stats()
        try: took = seconds_a_step(model, clips, options.frames, options.size, device)
        except torch.cuda.OutOfMemoryError: break
        memory = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
        row = {"backbone": backbone, "inserted": what, "clips": clips, "frames": options.frames, "size": options.size,
               "seconds": round(took, 5), "seconds_a_clip": round(took / clips, 5), "gib": round(memory, 2),
               "device": device_name(device), "torch": torch.__version__}
        clips *= options.factor
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbones", nargs="+", default=["i3d", "s3d", "i3d_r50"])
    parser.add_argument("--inserted", nargs="+", default=["none", "non-local", "cell", "supergraph"])
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--most", type=int, default=8, help="clips a step at most (default: %(default)s)")
    parser.add_argument("--factor", type=int, default=2, help="clips grow by this factor (default: %(default)s)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", default=Path(__file__).parent.parent / "results/bench/paper_step.csv")
    options, rows = parser.parse_args(), []
    for backbone in options.backbones:
        for what in options.inserted:
            row = measure(backbone, what, options, pick_device(options.device))
            if not row: continue
            rows.append(row)
            print(*row.values(), flush=True)
            table = pd.DataFrame(rows, dtype=object)
            table.to_csv(options.output, index=False, lineterminator="\n")     # what was measured stays, were the rest cut off


if __name__ == "__main__": main()
