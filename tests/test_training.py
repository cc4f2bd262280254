"""Training: stopped anywhere and resumed, it must give the bits of a run that never stopped."""
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from attnnas.core.errors import AttnnasError
from attnnas.core.seeds import generator, seed_everything
from attnnas.data.clips import Clips
from attnnas.training.checkpoint import load_checkpoint, save_checkpoint
from attnnas.training.evaluation import evaluate, score
from attnnas.training.loop import Interrupted, Trainer, TrainingConfig, epoch_order, rate

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from attnnas.networks.registry import create_model
from attnnas.core.hashes import content_hash
from attnnas.core.seeds import seed_everything
from attnnas.data.synthetic import benchmark, make_clips
from attnnas.search.differentiable import SearchConfig, insert_supergraphs, search_trainer
from attnnas.training.loop import TrainingConfig
seed_everything(0)
clips = make_clips(benchmark("A", frames=4, size=16), "train", 40)
model = insert_supergraphs(create_model("i3d_small", num_classes=12), SearchConfig(levels=2, width=4))
trainer = search_trainer(model, clips, SearchConfig(levels=2, width=4), TrainingConfig(epochs=3, batch_size=8), seed=0,
                         validation=clips, checkpoint=sys.argv[1], checkpoint_seconds=0,
                         progress=lambda step, steps: print(step, flush=True))
trainer.fit()
state = {name: tensor.tolist() for name, tensor in model.state_dict().items()}
history = [{k: v for k, v in e.items()} for e in trainer.history]
print("final", content_hash([state, history]), flush=True)
"""


def start(checkpoint):
    return subprocess.Popen([sys.executable, "-c", SCRIPT, str(checkpoint)], stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_killed_at_random_steps_and_resumed_equals_uninterrupted(tmp_path):
    "A search killed with SIGKILL twice at random steps ends with the same weights and history, to the bit."
    whole = start(tmp_path / "whole").communicate()[0].split()[-1]
    draw = random.Random(7)
    for attempt in range(3):
        process = start(tmp_path / "killed")
        last = attempt == 2
        stop_after = None if last else draw.randint(1, 4)
        lines = []
        for line in process.stdout:
            lines.append(line)
            if len(lines) == stop_after: process.send_signal(signal.SIGKILL)
        process.wait()
        assert (process.returncode == 0) == last
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
    trainer = Trainer(model, make_clips(), TrainingConfig(epochs=1, batch_size=20, optimizer="sgd", clip_norm=0.0, weight_decay=0.0),
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
