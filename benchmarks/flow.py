"""What it costs to keep optical flow: size, error and reading time of the ways to store it.

The flow of moving pictures (TV-L1, 224 pixels) is stored as float32 arrays, as JPEG and PNG frames, and as video by the
stores of attnnas.data.flow and by FFV1. Read: a clip of 32 consecutive flows from a random place. Errors are in pixels
against the estimate clipped to the bound; milliseconds are processor time.

The second table has what each method takes a frame, and how far it is off where noise that is smooth over three pixels
moves by a known step, in the mean and in the median over the picture without its borders.

    python benchmarks/flow.py [--clips 3]  ->  results/bench/flow.csv, flow_methods.csv
"""
import argparse
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import torch

from attnnas.core.devices import device_name
from attnnas.data.flow import (BOUND, METHODS, STORES, from_bytes, optical_flow, read_flow,
                               to_bytes, write_flow)
from attnnas.data.synthetic import benchmark, make_clips

RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench"
STEP = (2.5, -1.25)
FRAMES, SIZE, READ = 96, 224, 32


class Pictures:
    "A picture a flow, in a folder, horizontal above vertical."
    def __init__(self, ending: str, *options): self.ending, self.options = ending, options

    def write(self, place: Path, flow):
        place.mkdir()
        for k, image in enumerate(to_bytes(flow).transpose(0, 1).flatten(1, 2).numpy()):
            cv2.imwrite(str(place / f"{k:06d}.{self.ending}"), image, list(self.options))

    def read(self, place: Path, numbers):
        images = np.stack([cv2.imread(str(place / f"{k:06d}.{self.ending}"), cv2.IMREAD_GRAYSCALE) for k in numbers])
        return from_bytes(torch.from_numpy(images).unflatten(1, (2, -1))).transpose(0, 1)


class Floats:
    "The estimate itself."
    def write(self, place: Path, flow): np.save(place, flow.transpose(0, 1).numpy())

    def read(self, place: Path, numbers):
        stored = np.load(place.with_name(place.name + ".npy"), mmap_mode="r")
        return torch.from_numpy(stored[list(numbers)]).transpose(0, 1).clamp(-BOUND, BOUND)


class Video:
    "A store of attnnas.data.flow."
    def __init__(self, store: str): self.store = store

    def write(self, place: Path, flow): write_flow(place, flow.unbind(1), store=self.store)

    def read(self, place: Path, numbers): return read_flow(place, numbers)


def ways() -> dict:
    return {"float32 array": Floats(), "PNG frames": Pictures("png"), "JPEG frames, quality 95": Pictures("jpg", cv2.IMWRITE_JPEG_QUALITY, 95),
            **{f"video, {store} (H.264, qp {options['qp']})": Video(store) for store, options in STORES.items()}}


def size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.parent.rglob("*") if path.is_file())


def measure(way, flow, draw) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "flow")
        started = time.process_time()
        way.write(place, flow)
        written = 1e3 * (time.process_time() - started) / FRAMES
        seconds = []
        for first in draw.integers(0, FRAMES - READ, 8):
            started = time.process_time()
            way.read(place, range(first, first + READ))
            seconds.append(time.process_time() - started)
        error = (way.read(place, range(FRAMES)) - flow.clamp(-BOUND, BOUND)).abs()
        return {"kib_a_frame": size(place) / FRAMES / 1024, "error_mean": error.mean().item(), "error_max": error.max().item(),
                "write_ms_a_frame": written, "read_ms_a_clip": 1e3 * statistics.median(seconds)}


def moving(count: int, seed: int = 0) -> torch.Tensor:
    "Smooth noise that moves by STEP a frame, shifted exactly by its Fourier phases: uint8 (3, count, SIZE, SIZE)."
    noise = np.fft.fft2(np.random.default_rng(seed).standard_normal((SIZE, SIZE)))
    v, u = np.meshgrid(np.fft.fftfreq(SIZE), np.fft.fftfreq(SIZE), indexing="ij")
    noise *= np.exp(-2 * (np.pi * 3)**2 * (u**2 + v**2)) * (abs(u) < .5) * (abs(v) < .5)
    frames = np.stack([np.fft.ifft2(noise * np.exp(-2j * np.pi * k * (u * STEP[0] + v * STEP[1]))).real for k in range(count)])
    images = (128 + 50 * frames / frames.std()).round().clip(0, 255).astype(np.uint8)
    return torch.from_numpy(images).expand(3, -1, -1, -1)


def methods(count: int):
    "Rows for each method: time and error on `count` pairs of frames."
    video, truth = moving(count + 1), torch.tensor(STEP)[:, None, None, None]
    for name in METHODS:
        started = time.process_time()
        flow = optical_flow(video, name)
        taken = 1e3 * (time.process_time() - started) / count
        error = (flow - truth)[:, :count, 24:-24, 24:-24].norm(dim=0)
        yield {"method": name, "ms_a_frame": f"{taken:.4g}", "error_mean": f"{error.mean():.4g}", "error_median": f"{error.median():.4g}",
               "error_max": f"{error.max():.4g}", "step": f"{STEP[0]}, {STEP[1]}", "frames": count, "size": f"{SIZE} x {SIZE}",
               "device": device_name(torch.device("cpu"))}


def save(name: str, rows: list):
    RESULTS.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, dtype=object).to_csv(RESULTS / name, index=False, lineterminator="\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=3)
    count = parser.parse_args().clips
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    videos = make_clips(benchmark("A", frames=FRAMES, size=SIZE, noise=.03), "train", count).video
    estimates, draw, rows = [optical_flow(video) for video in videos], np.random.default_rng(0), []
    for name, way in ways().items():
        found = [measure(way, flow, draw) for flow in estimates]
        rows.append({"stored_as": name} | {key: f"{statistics.mean(f[key] for f in found):.4g}" for key in found[0]}
                    | {"bound": BOUND, "flow": f"tvl1, {FRAMES} x {SIZE} x {SIZE}", "clips": count, "read": READ, "device": device_name(torch.device("cpu"))})
        print(rows[-1], flush=True)
    save("flow.csv", rows)
    rows = list(methods(12))
    print(*rows, sep="\n", flush=True)
    save("flow_methods.csv", rows)


if __name__ == "__main__": main()
