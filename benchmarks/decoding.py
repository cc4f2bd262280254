"""How fast training clips come from files: VideoClips against pytorchvideo's LabeledVideoDataset, side by side.

Both read the same H.264 files and cut one random clip of 64 consecutive frames from each: once as it is, once with a random
crop of 224 pixels and a mirror by the same torchvision transform. Rounds are interleaved, the first is not counted; rates
are medians, and so is their ratio, taken round by round. Wall time moves with what else the machine does, processor time (of all processes, a clip) hardly does.

    python benchmarks/decoding.py [--videos 24] [--rounds 5]  ->  results/bench/decoding.csv
"""
import argparse
import resource
import statistics
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import pandas as pd
import torch
from torch.utils.data import DataLoader

from attnnas.core.devices import device_name
from attnnas.data.codec import pyav
from attnnas.data.cutting import ClipConfig
from attnnas.data.decode import iterate
from attnnas.data.layout import folder_manifest
from attnnas.data.synthetic import benchmark, make_clips
from attnnas.data.video import VideoClips, VideoLoader

RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench" / "decoding.csv"
HIGH, WIDE, SECONDS, RATE, FRAMES = 256, 340, 10, 25, 64


def write_videos(folder: Path, count: int):
    "Videos as Kinetics has them after the usual resizing: 10 seconds, 340 x 256, H.264 with default settings."
    av = pyav()
    for n in range(count):
        clip = make_clips(benchmark("A", frames=SECONDS * RATE, size=WIDE, noise=.03), "train", 1, seed=n).video[0, :, :, :HIGH]
        path = folder / f"class{n % 4}" / f"{n}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=RATE, options={"preset": "fast"})
            stream.height, stream.width, stream.pix_fmt = HIGH, WIDE, "yuv420p"
            for image in clip.permute(1, 2, 3, 0).numpy():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())


class Cropped:
    "torchvision's crop and mirror for pytorchvideo's samples: video (C, T, H, W)."
    def __init__(self):
        from torchvision.transforms import v2
        self.change = v2.Compose([v2.RandomResizedCrop(224, scale=(.25, 1.), antialias=True), v2.RandomHorizontalFlip()])

    def __call__(self, sample):
        return sample | {"video": self.change(sample["video"].transpose(0, 1)).transpose(0, 1)}


class AsIs:
    def __call__(self, sample): return sample


def ours(folder, crop: bool, workers: int):
    clips = VideoClips(folder, "all", ClipConfig(frames=FRAMES, size=224), training=True, workers=workers,
                       transform=None if crop else AsIs())
    return VideoLoader(clips, 1)


def theirs(folder, crop: bool, workers: int):
    from pytorchvideo.data import LabeledVideoDataset, make_clip_sampler
    data = LabeledVideoDataset(folder_manifest(folder).labelled_paths("all"), make_clip_sampler("random", Fraction(FRAMES, RATE)),
                               transform=Cropped() if crop else AsIs(), decode_audio=False)
    return DataLoader(data, batch_size=1, num_workers=workers)


def processor_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def one_epoch(loader, videos: int) -> tuple[float, float]:
    "(clips a second, processor milliseconds a clip) of an epoch, the start of the workers included."
    wall, processor = time.perf_counter(), processor_seconds()
    seen = sum(batch["video"].shape[2] >= FRAMES - 1 for batch in loader)
    if seen != videos: raise RuntimeError(f"{seen} of {videos} clips came")
    return videos / (time.perf_counter() - wall), 1e3 * (processor_seconds() - processor) / videos


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    readers = {"attnnas": ours, "pytorchvideo": theirs}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_videos(Path(folder), options.videos)
        kib = sum(path.stat().st_size for path in Path(folder).rglob("*.mp4")) / 1024 / options.videos
        assert sum(1 for _ in iterate(next(Path(folder).rglob("*.mp4")))) == SECONDS * RATE
        for crop in (False, True):
            for workers in (1, 2):
                found = {name: [] for name in readers}
                for _ in range(options.rounds + 1):
                    for name, reader in readers.items(): found[name].append(one_epoch(reader(folder, crop, workers), options.videos))
                pairs = zip(*[[rate for rate, _ in values[1:]] for values in found.values()])
                ratio = statistics.median(first / second for first, second in pairs)
                for name, values in found.items():
                    rates, costs = zip(*values[1:])
                    rows.append({"reader": name, "clip": f"{FRAMES} x {HIGH} x {WIDE}" + ", cropped to 224" * crop, "workers": workers,
                                 "clips_a_second": f"{statistics.median(rates):.2f}", "slowest": f"{min(rates):.2f}", "fastest": f"{max(rates):.2f}",
                                 "processor_ms_a_clip": f"{statistics.median(costs):.1f}",
                                 "times_pytorchvideo": f"{ratio if name == 'attnnas' else 1:.2f}", "videos": options.videos, "rounds": options.rounds,
                                 "kib_a_video": f"{kib:.0f}", "device": device_name(torch.device("cpu"))})
                    print(rows[-1], flush=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, dtype=object).to_csv(RESULTS, index=False, lineterminator="\n")


if __name__ == "__main__": main()
