"""A differentiable search that is killed twenty times ends with the bits of one that never stopped."""
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import forks
from attnnas.networks.base import Backbone
from attnnas.core.hashes import source_hash
from attnnas.core.seeds import generator, seed_everything
from attnnas.data.clips import Clips
from attnnas.search.differentiable import SearchConfig, cost_of, differentiable, insert_supergraphs
from attnnas.training.checkpoint import load_checkpoint, save_checkpoint
from attnnas.training.loop import TrainingConfig

KILLS, SEED = 20, 5
SEARCH = SearchConfig(levels=2, width=4, connections="per-site", activations="mixture", cost_weight=.1)
TRAINING = TrainingConfig(epochs=5, batch_size=4)  # of 22 clips: six steps an epoch, the last with half a batch
STEPS = 30
EACH_STEP, EACH_EPOCH = 0, 1e9  # seconds between checkpoints: one is also written at the end of each epoch


class Tiny(Backbone):
    "Two sites, batch norm and dropout: what a search can lose when it is stopped is in weights, buffers and random states."
    def __init__(self):
        super().__init__(3, (4, 8, 8), default_sites=("early", "late"))
        layer = lambda inputs, channels: nn.Sequential(nn.Conv3d(inputs, channels, 2, 2), nn.BatchNorm3d(channels), nn.ReLU())
        self.early, self.late, self.dropout, self.head = layer(3, 6), layer(6, 8), nn.Dropout(.3), nn.Linear(8, 3)

    def scores(self, x): return self.head(self.dropout(self.late(self.early(x)).mean((2, 3, 4))))


def clips(name: str, count: int) -> Clips:
    video = torch.randint(0, 256, (count, 3, 4, 8, 8), dtype=torch.uint8, generator=generator("test", name))
    return Clips(video, torch.arange(count) % 3, ["a", "b", "c"], {}, {}, name)


def search(folder: Path, seed=SEED, **options):
    "Search with a checkpoint in `folder`, and write there what was found."
    seed_everything(seed)
    model = Tiny()
    result = differentiable(model, clips("train", 22), SEARCH, TRAINING, seed=seed, validation=clips("validation", 12),
                            checkpoint=folder / "checkpoint", **options)
    cells = {site: cell.to_json() for site, cell in result.cells().items()}
    save_checkpoint(folder / "found", {"weights": model.state_dict(), "history": list(result.log.epochs), "cells": cells})


# The processes. They are forked from a parent that has trained nothing, so that they lack no thread.

def forked(work) -> int:
    "A child process that does `work` and ends; its exit status is 0 if that went well."
    if not (pid := os.fork()):
        status = 1
        try:
            work()
            status = 0
        finally: os._exit(status)
    return pid


def killed(folder: Path, after: int, delay: float, checkpoint_seconds: float) -> dict:
    """Search until step `after` or a later one, go on for `delay` seconds (None: not at all), and kill with SIGKILL.

    The search reports each step and waits for leave to go on, so it is never further than one step from where it is wanted.
    """
    (reports, report), (leaves, leave) = os.pipe(), os.pipe()

    def progress(step, steps):
        os.write(report, bytes([step]))
        os.read(leaves, 1)

    pid, first, step = forked(lambda: search(folder, progress=progress, checkpoint_seconds=checkpoint_seconds)), None, 0
    os.close(report)
    while step < after:
        if not (said := os.read(reports, 1)): break
        step = said[0]
        first = first or step
        if step < after: os.write(leave, b"+")
    if delay is not None:
        os.write(leave, b"+")
        time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    for end in (reports, leaves, leave): os.close(end)
    return dict(after=after, first=first, step=step, killed=os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)


def main(folder: Path):
    torch.set_num_threads(1)
    # What torch loads late, costs and the hash of the source are had once for all children.
    cost_of(insert_supergraphs(Tiny(), SEARCH), (1, 3, 4, 8, 8))
    source_hash("search.differentiable")
    for name, seed in (("whole", SEED), ("again", SEED), ("other", SEED + 1)):
        started = time.perf_counter()
        os.waitpid(forked(lambda: search(folder / name, seed, checkpoint_seconds=EACH_EPOCH)), 0)
        step_seconds = (time.perf_counter() - started) / STEPS
    draw = random.Random(SEED)
    moments = sorted(draw.sample(range(1, STEPS), KILLS))
    how = [(None if draw.random() < .3 else draw.uniform(0, 1.5 * step_seconds), draw.choice((EACH_STEP, EACH_STEP, EACH_EPOCH)))
           for _ in moments]
    deaths = [killed(folder / "killed", after, *rest) for after, rest in zip(moments, how)]
    pid = forked(lambda: search(folder / "killed", checkpoint_seconds=EACH_STEP))
    assert os.waitpid(pid, 0)[1] == 0, "the last process could not finish the search"
    (folder / "deaths.json").write_text(json.dumps(deaths))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    "Where `main` has been at work."
    folder = tmp_path_factory.mktemp("searches")
    assert forks.Forked(main, folder, output=folder / "output.txt").wait(600) == 0, (folder / "output.txt").read_text()
    return folder


def differences(a, b, path="") -> list:
    "Where two nested states are not the same to the bit."
    if type(a) is not type(b): return [path]
    if isinstance(a, torch.Tensor): return [] if a.dtype == b.dtype and a.equal(b) else [path]
    if isinstance(a, dict):
        if list(a) != list(b): return [path]
        return [found for key in a for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b): return [path]
        return [found for i, (x, y) in enumerate(zip(a, b)) for found in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def final(folder: Path) -> tuple[dict, dict]:
    "What a search found, and its last checkpoint without the clock."
    checkpoint = load_checkpoint(folder / "checkpoint")
    assert checkpoint["position"].pop("seconds").keys() == {"wall", "cpu"}
    assert len(checkpoint["position"].pop("epoch_seconds")) == len(checkpoint["position"]["history"])
    return load_checkpoint(folder / "found"), checkpoint


def test_twenty_processes_were_killed_all_over_the_search(folder):
    deaths = json.loads((folder / "deaths.json").read_text())
    assert len(deaths) == KILLS and all(death["killed"] for death in deaths), deaths
    assert all(death["first"] <= death["after"] <= death["step"] for death in deaths), deaths
    assert deaths[0]["after"] < STEPS / 4 and deaths[-1]["after"] > 3 / 4 * STEPS
    resumed = [death["first"] - 1 for death in deaths[1:]]
    assert any(step % 6 for step in resumed), "some went on in the middle of an epoch"
    assert any(now < before["step"] for now, before in zip(resumed, deaths)), "some had to do steps again"


def test_killed_search_ends_as_the_one_that_never_stopped(folder):
    "Weights, history and derived cells; and optimizer, random states and position, so that it would also go on alike."
    for killed_one, whole in zip(final(folder / "killed"), final(folder / "whole")):
        assert not differences(killed_one, whole), differences(killed_one, whole)[:10]
    found = load_checkpoint(folder / "killed" / "found")
    assert len(found["history"]) == TRAINING.epochs and found["cells"].keys() == {"early", "late"}
    assert all(tensor.isfinite().all() for tensor in found["weights"].values())


def test_same_seed_same_bits_and_another_seed_others(folder):
    whole, again, other = (load_checkpoint(folder / name / "found") for name in ("whole", "again", "other"))
    assert not differences(again, whole)
    different = differences(other, whole)
    assert {"/history/0/loss", "/weights/head.weight", "/weights/early.original.1.running_mean"} <= set(different), different

