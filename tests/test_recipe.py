"""Recipes: what a training adds to plain steps must do what it says, and survive a stop to the bit."""
import copy
import io
import signal
import sys
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnnas.cells.cell import AttentionCell
from attnnas.cells.derivation import random_cell
from attnnas.core.errors import AttnnasError
from attnnas.core.options import from_fields, to_plain
from attnnas.core.seeds import generator, seed_everything
from attnnas.data.clips import Clips
from attnnas.networks.insertion import insert
from attnnas.networks.registry import create_model
from attnnas.search.differentiable import SearchConfig, insert_supergraphs
from attnnas.training.averages import decay_of
from attnnas.training.evaluation import evaluate, predict
from attnnas.training.loop import Interrupted, Scored, Trainer, TrainingConfig, classify
from attnnas.training.parts import backbone_modules, own_parameters
from attnnas.training.train import train
from attnnas.training.watch import Lines, TensorBoard


def make_clips(count=12, classes=2, size=6, name="recipe"):
    video = torch.randint(0, 256, (count, 3, 4, size, size), dtype=torch.uint8, generator=generator(name))
    return Clips(video, torch.arange(count) % classes, [str(c) for c in range(classes)], {}, {}, name)


class Small(nn.Module):
    "A block, dropout and a head."
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(128, 2)

    def forward(self, x): return self.head(self.body(x).flatten(1))


def small():
    seed_everything(0)
    return Small()


def trainer_of(model=None, clips=None, validation=None, trainer=None, **options):
    settings = dict(epochs=2, batch_size=4) | options
    return Trainer(model or small(), clips or make_clips(), TrainingConfig(**settings), validation=validation, **trainer or {})


def same(ours, theirs) -> bool: return all(value.equal(theirs[name]) for name, value in ours.items())


# ---- configurations

def test_a_recipe_at_its_defaults_is_no_part_of_a_configuration():
    "If this fails, the keys of all records change."
    assert set(to_plain(TrainingConfig(optimizer="sgd"))) == {"epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "momentum",
                                                              "warmup", "clip_norm", "micro_batch"}
    assert "nesterov" not in to_plain(TrainingConfig(nesterov=True)), "it does nothing under adamw"
    config = TrainingConfig(freeze="backbone", precision="bf16", ema=0.99)
    assert config.freeze == ("backbone",) and from_fields(TrainingConfig, to_plain(config)) == config
    assert TrainingConfig(freeze="") == TrainingConfig()


@pytest.mark.parametrize("wrong, told", [(dict(precision="half"), "precision"), (dict(ema=1.0), "ema"), (dict(tf32="yes"), "tf32"),
                                         (dict(freeze=(3,)), "freeze"), (dict(label_smoothing=1.0), "label_smoothing"), (dict(patience=-1), "patience"),
                                         (dict(optimizer="sgd", nesterov=True, momentum=0.0), "momentum")])
def test_wrong_options_are_named(wrong, told):
    with pytest.raises(AttnnasError, match=told): TrainingConfig(**wrong)


@pytest.mark.parametrize("options, told", [(dict(patience=1), "validation"), (dict(keep_best=True), "validation"), (dict(freeze="bodi"), "body"),
                                           (dict(freeze=("body", "head")), "nothing"), (dict(compile=True, checkpointing=True), "together")])
def test_an_option_that_does_not_fit_is_refused_before_the_first_step(options, told):
    with pytest.raises(AttnnasError, match=told): trainer_of(**options)


# ---- stopped and resumed

RECIPES = {"average and best": dict(ema=0.8, keep_best=True), "fp16": dict(precision="fp16", clip_norm=0.5), "bf16, smoothing": dict(precision="bf16", label_smoothing=0.1),
           "frozen": dict(freeze="body.0"), "slow backbone, nesterov": dict(backbone_rate=0.1, optimizer="sgd", nesterov=True, learning_rate=0.05),
           "checkpointed": dict(checkpointing=True), "patient": dict(patience=1, epochs=5, learning_rate=0.5)}


@pytest.fixture(autouse=True)
def heard():
    "A shell ignores SIGINT in what runs in the background, and a training leaves it so."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("name", RECIPES)
def test_stopped_at_every_second_step_and_resumed_equals_uninterrupted(name, tmp_path):
    def stop(step, steps):
        if step % 2 == 0: signal.raise_signal(signal.SIGINT)
    clips, validation = make_clips(), make_clips(name="validation")
    whole = trainer_of(clips=clips, validation=validation, **RECIPES[name])
    whole.fit()
    for attempt in range(12):
        again = trainer_of(clips=clips, validation=validation, trainer=dict(checkpoint=tmp_path / "c", progress=stop), **RECIPES[name])
        try: again.fit()
        except Interrupted: continue
        break
    assert attempt and same(whole.model.state_dict(), again.model.state_dict())
    assert whole.history == again.history and len(again.epoch_seconds) == len(again.history)


# ---- precision

def network(what):
    seed_everything(0)
    if what == "cell": return AttentionCell(8, random_cell(3, 2, width=8).cell), torch.randn(2, 8, 4, 6, 6)
    model = create_model("i3d_small", num_classes=4)
    if what == "cells": insert(model, random_cell(3, 2, width=8).cell)
    else: insert_supergraphs(model, SearchConfig(levels=2, width=8))
    return model, torch.randn(4, 3, 4, 32, 32)


def gradients(model, x, precision) -> tuple:
    "Output and gradients; what starts as nothing is given weights, and normalisation its running statistics."
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.05 * torch.randn_like(p))
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    with torch.autocast("cpu", dtype, enabled=precision != "fp32"): y = model.eval()(x)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return y.float(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("what", ["cell", "cells", "supergraph"])
def test_bf16_gives_the_gradients_of_fp32_but_for_rounding(what):
    "A bf16 number has a relative error of 2**-9; a kernel that summed in it, or lost a scale, would be far off."
    model, x = network(what)
    exact, rounded = (gradients(copy.deepcopy(model), x, precision) for precision in ("fp32", "bf16"))
    for a, b in zip(exact, rounded):
        assert a.shape == b.shape and not a.equal(b)
        assert (a - b).norm() < 0.05 * a.norm()


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_and_scores_in_float32(precision):
    clips = make_clips(24)
    trainer = trainer_of(clips=clips, validation=clips, epochs=6, precision=precision)
    history = trainer.fit()
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]
    scores = predict(trainer.model, clips, precision=precision)
    assert scores.dtype == torch.float32 and not scores.equal(predict(trainer.model, clips))
    assert history[-1]["validation"]["loss"] == F.cross_entropy(scores, clips.labels).item()


def test_a_step_of_fp16_that_is_not_finite_is_skipped_and_the_scaler_lowered():
    trainer = trainer_of(precision="fp16")
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=1e30)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train_batch(torch.arange(4))
    assert same(before, dict(trainer.model.named_parameters())) and trainer.precision.scaler.get_scale() == pytest.approx(5e29)
    trainer.precision.scaler = torch.amp.GradScaler("cpu")
    trainer.train_batch(torch.arange(4))
    assert not same(before, dict(trainer.model.named_parameters()))


# ---- parts

def test_a_frozen_backbone_stands_still_with_its_statistics_while_cells_and_head_learn():
    seed_everything(0)
    model = insert(create_model("i3d_small", num_classes=2), random_cell(1, 2, width=8).cell)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer_of(model, make_clips(4, size=16), epochs=1, freeze="backbone", checkpointing=True).fit()
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert moved and all(".added." in name or name.startswith("head.") for name in moved)
    assert {"head.weight", "head.bias"} < moved and all(p.requires_grad for p in model.parameters())


def test_the_head_is_the_whole_chain_that_ends_in_the_classes():
    model = create_model("i3d_small", num_classes=2, head="mlp")
    backbone = set(map(id, own_parameters(backbone_modules(model))))
    assert not backbone & set(map(id, model.head.parameters())) and backbone


def test_a_backbone_has_its_share_of_the_rate():
    "Plain SGD without a clip moves a weight by rate times gradient."
    moved = {}
    for factor in (1.0, 0.25):
        model = small().eval()
        before = copy.deepcopy(model)
        trainer = trainer_of(model, epochs=1, batch_size=12, optimizer="sgd", momentum=0.0, weight_decay=0.0, clip_norm=0.0, warmup=0.0,
                             learning_rate=0.1, backbone_rate=factor)
        torch.manual_seed(3)
        trainer.train_batch(torch.arange(12))
        moved[factor] = [(a - b).detach() for a, b in zip(model.parameters(), before.parameters())]
    for whole, part, factor in zip(moved[1.0], moved[0.25], (0.25, 0.25, 0.25, 0.25, 1, 1)):
        torch.testing.assert_close(part, factor * whole, rtol=1e-4, atol=1e-7)


def test_the_average_is_what_is_validated_and_kept():
    seen, clips = [], make_clips()
    model = small()
    values = model.head.weight.detach().clone()
    trainer = trainer_of(model, clips, clips, trainer=dict(progress=lambda step, steps: seen.append(model.head.weight.detach().clone())), ema=0.5)
    history = trainer.fit()
    for step, weight in enumerate(seen): values = values.lerp(weight, 1 - decay_of(step, 0.5))
    assert model.head.weight.equal(values)
    assert evaluate(model, clips)["loss"] == history[-1]["validation"]["loss"]


def test_training_ends_with_the_best_epoch_and_when_patience_ends():
    clips = make_clips(name="other")
    trainer = trainer_of(validation=clips, epochs=9, learning_rate=0.05, keep_best=True, patience=2)
    history = trainer.fit()
    tops = [entry["validation"]["top1"] for entry in history]
    assert len(history) < 9 and trainer.best == len(history) - 3 and tops[trainer.best] == max(tops)
    assert evaluate(trainer.model, clips, 4)["loss"] == history[trainer.best]["validation"]["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_checkpointed_blocks_give_the_same_bits(precision):
    trainers = []
    for checkpointing in (False, True):
        trainers.append(trainer_of(precision=precision, checkpointing=checkpointing))
        trainers[-1].fit()
    plain, again = trainers
    assert plain.history == again.history and same(plain.model.state_dict(), again.model.state_dict())
    assert "forward" not in again.model.body.__dict__


def test_label_smoothing_is_that_of_the_definition_and_never_dropped():
    model, clips = small().eval(), make_clips()
    scores, loss = classify(model, clips.video, clips.labels, smoothing=0.2)
    logs = scores.log_softmax(1)
    own = logs[torch.arange(12), clips.labels]
    torch.testing.assert_close(loss, -(0.8 * own + 0.2 * logs.mean(1)).mean())
    with pytest.raises(AttnnasError, match="smoothing"): trainer_of(label_smoothing=0.2, trainer=dict(loss=lambda m, v, y: Scored(m(v), 0)))


def test_a_compiled_network_is_the_one_that_learns(monkeypatch):
    calls = []
    def backend(graph, inputs):
        calls.append(graph)
        return graph.forward
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    plain, compiled = (trainer_of(nn.Sequential(nn.Flatten(), nn.Linear(432, 2)), compile=on) for on in (False, True))
    compiled.model.load_state_dict(plain.model.state_dict())
    assert plain.fit() == compiled.fit() and calls
    assert same(plain.model.state_dict(), compiled.model.state_dict())


# ---- one call

def test_train_tells_callbacks_and_leaves_notes_on_the_network(tmp_path):
    seen, clips, model = [], make_clips(), small()
    state = torch.get_rng_state()
    board = TensorBoard(tmp_path)
    history = train(model, clips, make_clips(name="validation"), config=TrainingConfig(epochs=2, batch_size=4), progress=lambda *at: None,
                    callbacks=[seen.append, board], seed=3, device="cpu")
    assert seen[-1] == history[-1] and [row.number for row in history] == [1, 2] and history.best in history.rows
    assert model.classes == ["0", "1"] and model.preprocessing == {"frames": 4, "stride": 1, "size": 6, "stream": "rgb"}
    assert model.made_from["seed"] == 3 and model.made_from["data"]["fingerprint"] == "recipe" and not model.training
    assert torch.get_rng_state().equal(state), "the caller's random numbers are its own"
    assert list(tmp_path.glob("events.*")) and "val. top-1" in str(history) and "<table>" in history._repr_html_()


def test_train_resumes_with_its_whole_history(tmp_path):
    def stop(step, steps):
        if step == 4: signal.raise_signal(signal.SIGINT)
    config = TrainingConfig(epochs=2, batch_size=4)
    with pytest.raises(Interrupted): train(small(), make_clips(), config=config, checkpoint=tmp_path / "c", progress=stop, device="cpu")
    model, whole = small(), small()
    history = train(model, make_clips(), config=config, checkpoint=tmp_path / "c", progress=False, device="cpu")
    train(whole, make_clips(), config=config, progress=False, device="cpu")
    assert len(history) == 2 and all(row.seconds is not None for row in history) and same(model.state_dict(), whole.state_dict())


def silent(model=None, clips=None, validation=None, **options):
    return train(model or small(), make_clips() if clips is None else clips, validation, progress=False, device="cpu", **options)


def broken_labels(change):
    clips = make_clips()
    clips.labels = change(clips.labels)
    return clips


@pytest.mark.parametrize("arguments, told", [
    (dict(clips=broken_labels(lambda labels: None)), "none labels"), (dict(clips=broken_labels(lambda labels: labels[:3])), "have 3 labels"),
    (dict(clips=broken_labels(lambda labels: labels - 1)), "reach from -1"), (dict(clips=broken_labels(lambda labels: labels * 0)), "nothing to learn"),
    (dict(clips=make_clips(classes=3)), "num_classes=3"), (dict(model=nn.Conv3d(3, 2, 3)), "expected class scores"),
    (dict(model=nn.Linear(7, 2)), "does not take a clip"), (dict(validation=make_clips(classes=3)), "same, in one order"),
    (dict(clips=make_clips().subset([])), "no training clips"), (dict(callbacks=[3]), "no callback"),
    (dict(example=torch.full((1, 3, 4, 6, 6), float("nan"))), "not finite"), (dict(data=3), "no data of clips")])
def test_train_refuses_what_cannot_be_trained_before_the_first_step(arguments, told):
    model = arguments.get("model") or small()
    before = copy.deepcopy(model.state_dict())
    if "data" in arguments: call = partial(train, model, 3)
    else: call = partial(silent, **arguments | {"model": model})
    with pytest.raises(AttnnasError, match=told): call()
    assert same(before, model.state_dict())


def test_a_terminal_gets_a_line_an_epoch(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr("attnnas.training.train.watcher", lambda progress: Lines(file))
    train(small(), make_clips(), make_clips(name="validation"), config=TrainingConfig(epochs=3, batch_size=4), device="cpu")
    lines = file.getvalue().splitlines()
    assert len(lines) == 5 and lines[0].split()[:2] == ["epoch", "loss"] and lines[3].split()[0] == "3/3" and lines[4].startswith("Best epoch")


def test_without_tensorboard_the_package_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(AttnnasError, match="pip install tensorboard"): TensorBoard(tmp_path)


def test_a_cpu_without_half_precision_is_told_before_the_training(monkeypatch):
    "If this fails, somebody waits ten times as long for a run and does not know why."
    from attnnas.training import precision
    monkeypatch.setattr(precision, "_is_native", lambda name: False)
    with pytest.warns(UserWarning, match="no fast convolutions in bf16.*Use precision fp32"): precision.Precision("bf16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision.Precision("fp32")
        monkeypatch.setattr(precision, "_is_native", lambda name: True)
        precision.Precision("bf16")
