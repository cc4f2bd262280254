"""Training: stopped anywhere and resumed, it must give the bits of a run that never stopped."""
import collections
import json
import math
import os
import random
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import forks
from attnnas.core.errors import AttnnasError
from attnnas.core.hashes import content_hash
from attnnas.core.seeds import generator, seed_everything
from attnnas.data import synthetic
from attnnas.data.clips import Clips
from attnnas.networks.registry import create_model
from attnnas.search.differentiable import SearchConfig, insert_supergraphs, search_trainer
from attnnas.training.checkpoint import load_checkpoint, save_checkpoint
from attnnas.training.evaluation import evaluate, score
from attnnas.training.loop import AnotherTraining, Interrupted, Trainer, TrainingConfig, epoch_order, rate

def search(checkpoint):
    "Search with a checkpoint after each step; print the steps, and a hash of what was found."
    torch.set_num_threads(1)
    seed_everything(0)
    clips = synthetic.make_clips(synthetic.benchmark("A", frames=4, size=16), "train", 40)
    model = insert_supergraphs(create_model("i3d_small", num_classes=12), SearchConfig(levels=2, width=4))
    trainer = search_trainer(model, clips, SearchConfig(levels=2, width=4), TrainingConfig(epochs=3, batch_size=8), seed=0,
                             validation=clips, checkpoint=checkpoint, checkpoint_seconds=0,
                             progress=lambda step, steps: print(step, flush=True))
    trainer.fit()
    state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
    history = [{k: v for k, v in e.items()} for e in trainer.history]
    print("final", content_hash([state, history]), flush=True)


def start(checkpoint):
    "(a process that searches, the lines that it prints)."
    pipe = checkpoint.with_suffix(".pipe")
    pipe.unlink(missing_ok=True)
    os.mkfifo(pipe)
    process = forks.Forked(search, checkpoint, output=pipe)
    return process, open(pipe)


def test_killed_at_random_steps_and_resumed_equals_uninterrupted(tmp_path):
    "A search killed with SIGKILL twice at random steps ends with the same weights and history, to the bit."
    whole = start(tmp_path / "whole")[1].read().split()[-1]
    draw = random.Random(7)
    for attempt in range(3):
        process, printed = start(tmp_path / "killed")
        last = attempt == 2
        stop_after = None if last else draw.randint(1, 4)
        lines = []
        for line in printed:
            lines.append(line)
            if len(lines) == stop_after: process.send_signal(signal.SIGKILL)
        printed.close()
        assert (process.wait() == 0) == last
    assert int(lines[0]) > 1, "the last attempt began where an earlier one had stopped"
    assert lines[-1].split()[-1] == whole


def make_clips(count=20, classes=2):
    video = torch.randint(0, 256, (count, 3, 4, 6, 6), dtype=torch.uint8, generator=generator("test"))
    return Clips(video, torch.arange(count) % classes, [str(c) for c in range(classes)], {}, {}, "test")


def tiny():
    seed_everything(0)
    return nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))


def test_every_clip_is_visited_once_an_epoch_and_the_last_batch_may_be_uneven():
    seen = []
    clips = make_clips(21)
    batch, clips.batch = clips.batch, lambda indices: (seen.append(indices), batch(indices))[1]
    trainer = Trainer(tiny(), clips, TrainingConfig(epochs=2, batch_size=8))
    trainer.fit()
    assert [len(indices) for indices in seen] == [8, 8, 5] * 2
    assert torch.cat(seen[:3]).sort().values.equal(torch.arange(21))
    assert not torch.cat(seen[:3]).equal(torch.cat(seen[3:]))
    assert torch.cat(seen[3:]).equal(epoch_order(21, 0, 1))


def test_learning_rate_rises_linearly_and_falls_to_zero():
    rates = [rate(step, 100, 0.1) for step in range(100)]
    assert rates[:3] == [0.1, 0.2, pytest.approx(0.3)] and max(rates) == 1 and rates.index(1) == 9
    assert all(a >= b for a, b in zip(rates[10:], rates[11:])) and rate(100, 100, 0.1) == pytest.approx(0)
    assert rate(0, 1, 0.0) == 1


def test_own_rates_are_outside_weight_decay_and_gradient_clip():
    "A parameter with a rate of its own moves by it even when the clip stills the network."
    model = tiny()
    own = nn.Parameter(torch.ones(()))
    model.forward = lambda x, forward=model.forward: forward(x) * own
    model.own = own
    before = model[0].weight.clone()
    trainer = Trainer(model, make_clips(), TrainingConfig(epochs=1, batch_size=20, optimizer="sgd", clip_norm=1e-30, weight_decay=0.0),
                      own_rates=[([own], 0.1)])
    trainer.fit()
    assert torch.equal(model[0].weight, before) and own != 1


def test_divergence_is_noticed_named_and_stops_training():
    model = tiny()
    trainer = Trainer(model, make_clips(40), TrainingConfig(epochs=50, batch_size=8, optimizer="sgd", learning_rate=1e6, clip_norm=1e9))
    history = trainer.fit()
    assert trainer.diverged and len(history) < 50
    assert all(entry["loss"] is None or math.isfinite(entry["loss"]) for entry in history)
    json.dumps(history, allow_nan=False)


def test_interrupt_between_steps_keeps_a_checkpoint(tmp_path):
    def stop(step, steps):
        if step == 2: os.kill(os.getpid(), signal.SIGTERM)
    trainer = Trainer(tiny(), make_clips(), TrainingConfig(epochs=3, batch_size=8), checkpoint=tmp_path / "c", progress=stop)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="step 2 of 9"): trainer.fit()
    assert load_checkpoint(tmp_path / "c")["position"]["step"] == 2
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_clip_norm_of_zero_clips_nothing():
    "Zero means 'no clipping' elsewhere; here it once threw every gradient away."
    trained = []
    for clip_norm in (0.0, 1e9):
        trainer = Trainer(tiny(), make_clips(), TrainingConfig(epochs=1, batch_size=8, clip_norm=clip_norm))
        trainer.fit()
        trained.append(trainer.model[0].weight)
    assert trained[0].equal(trained[1])


def half_trained(path, seed=0, own=1.0, clips=None, model=None, **options):
    "A trainer that stops after two steps, or goes on where another one has stopped."
    def stop(step, steps):
        if step == 2: signal.raise_signal(signal.SIGTERM)
    model = model or tiny()
    options = dict(epochs=3, batch_size=8) | options
    return Trainer(model, clips or make_clips(), TrainingConfig(**options), seed=seed, checkpoint=path, progress=stop,
                   own_rates=[([model[1].weight], own)])


@pytest.mark.parametrize("other, told", [
    (dict(batch_size=10), "training batch_size is 8 there and 10 here"), (dict(epochs=4), "training epochs is 3 there and 4 here"),
    (dict(learning_rate=1e-3), "learning_rate"), (dict(optimizer="sgd"), "optimizer"), (dict(micro_batch=4), "micro_batch"),
    (dict(seed=1), "seed is 0 there and 1 here"), (dict(own=2.0), "own rates"), (dict(clips=make_clips(19)), "clips count is 20 there and 19 here"),
    (dict(clips=Clips(make_clips().video, make_clips().labels, ["0", "1"], fingerprint="other")), "fingerprint"),
    (dict(model=nn.Sequential(nn.Conv3d(3, 5, 3), nn.BatchNorm3d(5), nn.ReLU(), nn.Flatten(), nn.Linear(160, 2))), "network 0.bias is .4,. there")])
def test_a_checkpoint_of_another_training_is_refused(tmp_path, other, told):
    "The same number of steps is another place in another training: its epochs would be cut short, its rates wrong."
    with pytest.raises(Interrupted): half_trained(tmp_path / "c").fit()
    before = (tmp_path / "c").read_bytes()
    trainer = half_trained(tmp_path / "c", **other)
    with pytest.raises(AnotherTraining, match=told): trainer.fit()
    assert trainer.step == 0 and (tmp_path / "c").read_bytes() == before
    assert len(half_trained(tmp_path / "c").fit()) == 3


def test_a_checkpoint_that_does_not_say_what_it_was_made_for_is_refused(tmp_path):
    with pytest.raises(Interrupted): half_trained(tmp_path / "c").fit()
    state = load_checkpoint(tmp_path / "c")
    del state["made_for"]
    save_checkpoint(tmp_path / "c", state)
    with pytest.raises(AnotherTraining, match="delete it"): half_trained(tmp_path / "c").fit()


@pytest.mark.parametrize("count, batch_size, micro_batch, fits", [(5, 4, 0, False), (5, 4, 1, False), (1, 4, 0, False), (6, 4, 0, True), (5, 5, 3, True)])
def test_a_batch_that_normalisation_cannot_take_is_refused_before_the_first_step(count, batch_size, micro_batch, fits):
    "One clip of one value a channel has no variance: the training would end in its last batch."
    pooled = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Dropout(0.5), nn.BatchNorm3d(3), nn.Flatten(), nn.Linear(3, 2))
    state = torch.get_rng_state()
    make = lambda model: Trainer(model, make_clips(count), TrainingConfig(epochs=1, batch_size=batch_size, micro_batch=micro_batch))
    if fits: make(pooled).fit()
    else:
        with pytest.raises(AttnnasError, match="single value has no variance"): make(pooled)
        assert torch.get_rng_state().equal(state)
    make(tiny()).fit()  # its normalisation sees many positions of a clip


@pytest.mark.parametrize("wrong", [dict(epochs=0), dict(batch_size=0), dict(optimizer="adam"), dict(learning_rate="fast"), dict(warmup=-1.0)])
def test_wrong_training_options_are_named(wrong):
    with pytest.raises(AttnnasError, match=next(iter(wrong)).replace("_", ".")): TrainingConfig(**wrong)


def test_checkpoints_hold_nested_state_and_refuse_damage(tmp_path):
    state = {"a": [1, (2.5, None)], 3: {"t": torch.arange(4)}, "b": True, "bf16": torch.ones(2, dtype=torch.bfloat16)}
    save_checkpoint(tmp_path / "c", state)
    back = load_checkpoint(tmp_path / "c")
    assert back["a"] == state["a"] and back[3]["t"].equal(state[3]["t"]) and back["bf16"].dtype == torch.bfloat16
    content = (tmp_path / "c").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    for name in ("cut", "missing"):
        with pytest.raises(AttnnasError, match=name): load_checkpoint(tmp_path / name)


Genotype = collections.namedtuple("Genotype", "normal concat")


@pytest.mark.parametrize("value", [
    Genotype([("sep", 0)], [2, 3]), torch.zeros(2, 3).shape, collections.OrderedDict(a=1), {1: "a", "1": "b", None: 2, True: 3, 2.5: 4}, 10**30,
    -0.0, math.inf, float("-inf"), "\ud800", (), {}, [[]], {"a/b": 1, "a": {"b": 2}}])
def test_what_a_checkpoint_holds_comes_back_equal(tmp_path, value):
    save_checkpoint(tmp_path / "c", {"value": value})
    assert load_checkpoint(tmp_path / "c")["value"] == value


def test_tensors_of_a_checkpoint_come_back_equal(tmp_path):
    "Names that read alike are two tensors, and a view is its values and not its memory."
    state = {"a/b": torch.tensor(1), "a": {"b": torch.tensor(2)}, 1: torch.tensor(3), "1": torch.tensor(4),
             "view": torch.arange(6).view(2, 3).T, "conjugate": torch.tensor([1 + 2j]).conj(), "none": torch.empty(0, 3)}
    save_checkpoint(tmp_path / "c", state)
    back = load_checkpoint(tmp_path / "c")
    assert back["a"]["b"].equal(state["a"]["b"])
    assert all(back[name].equal(value) for name, value in state.items() if name != "a")


@pytest.mark.parametrize("value", [b"bytes", {1, 2}, 1j, np.int64(3), Path("here"), {(1, 2): 3}, object(), torch.eye(2).to_sparse(),
                                   torch.empty(2, device="meta"), torch.ones(2, dtype=torch.complex128)], ids=lambda value: type(value).__name__)
def test_what_would_not_come_back_is_refused(tmp_path, value):
    with pytest.raises(AttnnasError, match="cannot hold .*/value"): save_checkpoint(tmp_path / "c", {"value": value})
    assert not (tmp_path / "c").exists()


def test_evaluation_counts_every_clip_once_and_restores_the_mode():
    clips, model = make_clips(21), tiny()
    model.train()
    found = evaluate(model, clips, batch_size=8)
    assert found["count"] == 21 and model.training
    assert found["top5"] == 100
    with pytest.raises(AttnnasError, match="not finite"): score(torch.full((2, 3), float("nan")), torch.zeros(2).long(), {})
    with pytest.raises(AttnnasError, match="empty"): evaluate(model, clips.subset(torch.arange(0)))


def test_ties_do_not_flatter():
    "Equal scores rank classes by number, so a constant network is right about class 0 alone."
    found = score(torch.zeros(10, 10), torch.arange(10), {})
    assert found["top1"] == 10 and found["top5"] == 50
