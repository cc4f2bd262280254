"""How long the embedded benchmark takes to draw: milliseconds a clip, by data set, size and threads.

    python benchmarks/generation.py [--clips 960]

"wall" is elapsed time, "cpu" is processor time of all threads; the best of three runs of each.
"""
import argparse
import time

import torch

from attnnas.core.devices import device_name
from attnnas.data.synthetic import benchmark, make_clips

SIZES = ((8, 24), (16, 32), (32, 64), (64, 112))


def measure(config, clips: int, device: str) -> tuple[float, float]:
    best = (float("inf"), float("inf"))
    for repeat in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        make_clips(config, "train", clips, seed=repeat, device=device)
        if device == "cuda": torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - wall, time.process_time() - cpu))
    return tuple(1e3 * seconds / clips for seconds in best)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=960, help="clips of 16x32x32 a measurement; fewer of larger ones")
    clips, most = parser.parse_args().clips, torch.get_num_threads()
    devices = [("cpu", n) for n in sorted({1, most})] + [("cuda", most)] * torch.cuda.is_available()
    for device, threads in devices:
        torch.set_num_threads(threads)
        print(f"\n{device_name(torch.device(device))}, {threads} threads\n{'data':6}{'frames x size':16}{'wall ms':>9}{'cpu ms':>9}")
        for name in "AB":
            for frames, size in SIZES:
                count = max(16, min(clips, clips * 16 * 32 ** 2 // (frames * size ** 2)))
                wall, cpu = measure(benchmark(name, frames, size), count, device)
                print(f"{name:6}{f'{frames} x {size} x {size}':16}{wall:9.2f}{cpu:9.2f}", flush=True)


if __name__ == "__main__": main()
