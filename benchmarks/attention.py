"""Dot-product attention without its matrix, against the stored matrix: time and memory, forward and backward.

The matrix is stored in two ways: "equation" is A(q, K, V) word for word, scaled and divided position by position;
"materialised" is the package's own, which scales queries and values instead and so makes two matrices fewer.

Each row is a ratio of two ways that were measured side by side, in interleaved rounds of one run on one thread: CPU seconds
of the process, and growth of its peak memory, for which every way gets a process of its own (Linux). pytorchvideo's non-local
block joins where it is installed. With a CUDA device, the same there in bf16 and fp32. Writes
results/bench/attention.csv.

    python benchmarks/attention.py                            # N = 6272, d = 128, and memory up to N = 50,000
    python benchmarks/attention.py --positions 1024 --linear 2000 4000 --output small.csv
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from attnnas.attention.formula import ACTIVATIONS, attend, attention_weights
from attnnas.core.devices import device_name
from attnnas.attention.kernels import best_path
from attnnas.networks.non_local import NonLocalBlock

CPU, MIB = device_name(torch.device("cpu")), 2**20


def step(path: str, activation: str, tensors: list):
    query, key, value = tensors
    if path == "equation": y = attention_weights(query, key, activation) @ value
    else: y = attend(*tensors, activation, path=path)
    return torch.autograd.grad(y, tensors, torch.ones_like(y))


def make(positions: int, features: int, device="cpu", dtype=torch.float32, batch=1) -> list:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, positions, features, generator=generator).to(device, dtype).requires_grad_() for _ in range(3)]


def cpu_seconds(functions: dict, rounds: int) -> dict:
    "Median CPU seconds of each function, in interleaved rounds, the first of which is not counted."
    seconds = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            started = time.process_time()
            function()
            seconds[name].append(time.process_time() - started)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def grown(job: dict) -> float:
    "MiB by which peak memory grows in one step of the job, in a process of its own."
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def run_job(job: dict) -> float:
    "MiB of peak memory in a step beyond what was there before it, after a small step has loaded what any step loads."
    torch.set_num_threads(1)
    if job["path"] == "block": function, small = (block_step(job["whose"], n) for n in (job["positions"], 32))
    else:
        tensors, few = make(job["positions"], job["features"]), make(64, job["features"])
        function, small = (lambda t=t: step(job["path"], job["activation"], t) for t in (tensors, few))
    small()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew: importing torch had one of its own
    function()
    return (resident("VmHWM") - before) / 1024


def resident(field: str) -> int:
    "KiB of this process: VmRSS now, VmHWM at most."
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def block_step(whose: str, positions: int):
    "A step of a whole non-local block on 8 frames of 256 channels, of which 128 are compared."
    if whose == "ours": block = NonLocalBlock(256, 128)
    else:
        from pytorchvideo.layers.nonlocal_net import create_nonlocal
        block = create_nonlocal(dim_in=256, dim_inner=128)
    side = round((positions / 8) ** 0.5)
    x = torch.randn(1, 256, 8, side, side, requires_grad=True)
    return lambda: block(x).sum().backward()


def on_cpu(positions: int, features: int, rounds: int) -> list[dict]:
    rows = []
    for activation in ACTIVATIONS:
        tensors = make(positions, features)
        best = best_path(*tensors, activation)
        ways = dict.fromkeys(("equation", "materialised", best))
        seconds = cpu_seconds({way: lambda way=way: step(way, activation, tensors) for way in ways}, rounds)
        mib = {way: grown(dict(path=way, activation=activation, positions=positions, features=features)) for way in ways}
        rows += [dict(device=CPU, dtype="float32", activation=activation, path=best, against=way, positions=positions,
                      features=features, times_as_fast=seconds[way] / seconds[best], times_less_memory=mib[way] / mib[best],
                      seconds=seconds[best], seconds_against=seconds[way], mib=mib[best], mib_against=mib[way])
                 for way in ("equation", "materialised")]
    return rows


def linear(sizes: list[int], features: int) -> list[dict]:
    "How memory grows from the smallest N to the others, relative to N: 1 is linear, N x N would be the ratio of the Ns."
    rows = []
    for activation in ACTIVATIONS:
        job = dict(path="auto", activation=activation, features=features)
        first, *others = [grown(job | dict(positions=n)) for n in sizes]
        for n, mib in zip(sizes[1:], others):
            rows.append(dict(device=CPU, dtype="float32", activation=activation, path="auto", positions=n, features=features,
                             against=f"N = {sizes[0]}", mib=mib, mib_against=first,
                             growth_over_linear=(mib / first) / (n / sizes[0])))
    return rows


def against_pytorchvideo(positions: int, rounds: int) -> list[dict]:
    if not find_spec("pytorchvideo"): return []
    seconds = cpu_seconds({"theirs": block_step("pytorchvideo", positions), "ours": block_step("ours", positions)}, rounds)
    mib = {name: grown(dict(path="block", whose=name, positions=positions)) for name in ("pytorchvideo", "ours")}
    return [dict(device=CPU, dtype="float32", activation="softmax", path="non-local block", against="pytorchvideo",
                 positions=positions, features=128, times_as_fast=seconds["theirs"] / seconds["ours"],
                 times_less_memory=mib["pytorchvideo"] / mib["ours"], seconds=seconds["ours"],
                 seconds_against=seconds["theirs"], mib=mib["ours"], mib_against=mib["pytorchvideo"])]


def on_gpu(positions: int, features: int, rounds: int) -> list[dict]:
    "Times by the device's own clock; the fraction of the matrix rate counts the six products that cannot be avoided."
    def milliseconds(function):
        times = []
        for _ in range(rounds + 3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return statistics.median(times[3:])

    rows, name, batch = [], device_name(torch.device("cuda")), 8
    for dtype in (torch.bfloat16, torch.float32):
        square = torch.randn(8192, 8192, device="cuda", dtype=dtype)
        rate = 2 * 8192**3 / milliseconds(lambda: square @ square)
        for activation in ACTIVATIONS:
            tensors = make(positions, features, "cuda", dtype, batch)
            for path in dict.fromkeys((best_path(*tensors, activation), *(["chunked"] if activation != "softmax" else []))):
                ways, result = ("materialised", path), {}
                for way in ways:
                    torch.cuda.reset_peak_memory_stats()
                    before = torch.cuda.memory_allocated()
                    took = milliseconds(lambda: step(way, activation, tensors))
                    result[way] = took / 1000, (torch.cuda.max_memory_allocated() - before) / MIB
                (seconds, mib), (plain, plain_mib) = result[path], result["materialised"]
                products = 12 * batch * positions * features * (features if path == "associative" else positions)
                rows.append(dict(device=name, dtype=str(dtype).removeprefix("torch."), activation=activation, path=path,
                                 against="materialised", positions=positions, features=features, times_as_fast=plain / seconds,
                                 times_less_memory=plain_mib / mib, seconds=seconds, seconds_against=plain, mib=mib,
                                 mib_against=plain_mib, of_matrix_rate=products / (1000 * seconds) / rate))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--positions", type=int, default=6272)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--linear", type=int, nargs="*", default=[12_500, 50_000])
    parser.add_argument("--output", type=Path, default=Path("results/bench/attention.csv"))
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job: return print(run_job(options.job))

    import pandas as pd
    torch.set_num_threads(1)
    rows = on_cpu(options.positions, options.features, options.rounds)
    rows += against_pytorchvideo(options.positions, options.rounds)
    if len(options.linear) > 1: rows += linear(options.linear, 64)
    if torch.cuda.is_available(): rows += on_gpu(options.positions, options.features, 10)
    table = pd.DataFrame(rows)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(options.output, index=False, float_format="%.4g")
    print(table.to_string(float_format="%.3g"))


if __name__ == "__main__": main()
