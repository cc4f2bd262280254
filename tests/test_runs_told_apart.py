"""Runs told apart: listed, compared and made again from a file of settings; several seeds, weights to start from, and epochs that are told."""
import argparse
import csv
import dataclasses
import json
import re
import shutil
import tomllib
import warnings
from pathlib import Path

import pytest
import torch

from commands import attnnas
from attnnas.cli import main as cli
from attnnas.cli import train
from attnnas.cli.options import OWN_RUNS, add_fields
from attnnas.cli.show import _fitted
from attnnas.cells.derivation import random_cell
from attnnas.cells.space import SearchSpace
from attnnas.cells.spec import CellSpec
from attnnas.core.errors import AttnnasError
from attnnas.core.options import option
from attnnas.evidence import settings
from attnnas.evidence.config import NetworkConfig, RunConfig
from attnnas.evidence.insertions import DerivedCell, GivenCell, Insertion, NonLocal, RandomCell, Search
from attnnas.evidence.run import key_of, run
from attnnas.evidence.runs import COLUMNS, arrange, as_frame, compare, history_rows, list_cells, list_runs
from attnnas.evidence.settings import read_settings, run_of, settings_text, without_effect
from attnnas.evidence.sources import Generated, Videos
from attnnas.evidence.start import start_from
from attnnas.evidence.store import Store
from attnnas.networks.insertion import insert
from attnnas.networks.registry import create_model
from attnnas.networks.weights import save_weights
from attnnas.search.differentiable import SearchConfig
from attnnas.search.methods import search_config
from attnnas.search.random import random
from attnnas.training.loop import TrainingConfig
from attnnas.training.watch import TensorBoard

DATA = Generated(frames=4, size=16, train_clips=16, validation_clips=8, test_clips=12)
ONCE = TrainingConfig(epochs=1, batch_size=8)
CELL = random_cell(0, 1, alpha=1, beta=1, width=4).cell
PLAIN = RunConfig(DATA, training=ONCE)
SEARCH = RunConfig(DATA, insertion=Search(SearchConfig(levels=1, width=4)), training=ONCE)
TINY = ["--tier", "none", "--frames", "4", "--size", "16", "--train-clips", "16", "--validation-clips", "8", "--test-clips", "12",
        "--epochs", "1", "--batch-size", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    "Two seeds without a cell, one with, a search by trials."
    store = Store(tmp_path_factory.mktemp("runs"))
    twice = dataclasses.replace(ONCE, epochs=2)
    tried = Search(search_config({"method": "random", "trials": 2, "operations": 2, "width": 4}))
    for config in (PLAIN, dataclasses.replace(PLAIN, seed=1), RunConfig(DATA, insertion=GivenCell(CELL), training=twice),
                   RunConfig(DATA, insertion=tried, training=ONCE)):
        run(config, store, "cpu")
    return store


# ---- listed and compared

def test_rows_are_filtered_and_sorted_and_an_unknown_column_is_named(store):
    rows = list_runs(store)
    assert len(rows) == 4 and {row["insertion"] for row in rows} == {"none", "cell", "search (random)"}
    assert [row["seed"] for row in list_runs(store, [("insertion", "no*")], sort="seed")] == [0, 1]
    scored = [row["accuracy"] for row in list_runs(store, sort="accuracy")]
    assert scored[:3] == sorted(scored[:3], reverse=True) and scored[3] is None, "a search by trials has none, and comes last"
    assert len(list_runs(store, top=2)) == 2
    for wrong in ({"sort": "accurcy"}, {"filters": [("accurcy", "*")]}):
        with pytest.raises(AttnnasError, match="Did you mean 'accuracy'"): list_runs(store, **wrong)
        with pytest.raises(AttnnasError, match="Did you mean 'accuracy'"): arrange(rows, **wrong)


def test_a_leaderboard_has_a_line_for_seeds_and_another_for_other_settings(store):
    "Mean and spread by hand. If this fails, runs of different trainings are taken for seeds of one."
    rows = list_cells(store)
    assert [row["runs"] for row in sorted(rows, key=lambda row: row["cell"] == "none")] == [1, 2]
    plain = next(row for row in rows if row["cell"] == "none")
    first, second = (row["accuracy"] for row in list_runs(store, [("insertion", "none")]))
    assert plain["accuracy"] == pytest.approx((first + second) / 2)
    assert plain["spread"] == pytest.approx(abs(first - second) / 2**.5)
    other = dataclasses.replace(PLAIN, training=dataclasses.replace(ONCE, learning_rate=1e-3))
    run(other, store, "cpu")
    assert sorted(row["runs"] for row in list_cells(store) if row["cell"] == "none") == [1, 2]
    assert CELL.hash in {row["cell"] for row in rows} and list(as_frame(rows)["cell"]) == [row["cell"] for row in rows]


def test_a_comparison_has_what_differs_and_nothing_else(store):
    records = {record.run.label: record for record in store.records() if record.run.training.learning_rate == 5e-3}
    plain, cell = records["A i3d_small none seed 0"], records["A i3d_small cell seed 0"]
    found = compare([plain, cell])
    differing = {row["setting"]: [row[name] for name in found.names] for row in found.settings}
    assert differing == {"insertion.kind": ["none", "cell"], "insertion.cell": [None, CELL.hash], "training.epochs": [1, 2]}
    results = {row["result"]: row[found.names[1]] for row in found.results}
    assert results["accuracy"] == cell.test["top1"] and results["epochs"] == 2
    for wrong in ([plain], [plain, plain], [plain, cell, plain]):
        with pytest.raises(AttnnasError, match="two different runs"): compare(wrong)


def test_a_history_has_a_line_an_epoch_or_a_trial(store):
    for record in store.records():
        rows = history_rows(record)
        assert len(rows) == len(record.history)
        tries = record.run.is_search
        assert [row["trial" if tries else "epoch"] for row in rows] == list(range(1, len(rows) + 1))
        if not tries: assert rows[-1]["validation top1"] == record.history[-1]["validation"]["top1"]


def test_the_command_line_lists_shows_and_compares(store, tmp_path, capsys):
    code, out, _ = attnnas(capsys, "list", "runs", "--results", store.folder, "--filter", "insertion=none,seed=1", "--csv", tmp_path / "r.csv")
    with open(tmp_path / "r.csv") as file: row, = csv.DictReader(file)
    assert code == 0 and row["seed"] == "1" and row["key"][:8] in out and str(store.folder) in out
    _, out, _ = attnnas(capsys, "list", "runs", "--results", store.folder, "--filter", "insertion=none,seed=1", "--csv", "-")
    assert out == (tmp_path / "r.csv").read_text() and not Path("-").exists()
    first, second, *_ = attnnas(capsys, "list", "cells", "--results", store.folder)[1].splitlines()
    assert " cells in " in first and second.startswith(("cell", "all with"))
    plain, cell = (list_runs(store, [("insertion", kind), ("seed", "0")], top=1)[0]["key"] for kind in ("none", "cell"))
    tried = list_runs(store, [("insertion", "search*")])[0]["key"]
    for key, options in ((plain, ["--picture"]), (cell, ["--picture", "--history"]), (tried, ["--picture", "--history"])):
        given = [word for name in options for word in (name, tmp_path / f"{key}{name}.png")]
        code, out, _ = attnnas(capsys, "show", key, "--results", store.folder, *given)
        assert code == 0 and ("epoch" in out or "trial" in out)
        assert all((tmp_path / f"{key}{name}.png").stat().st_size > 5000 for name in options)
    code, out, _ = attnnas(capsys, "compare", plain, cell, "--results", store.folder, "--picture", tmp_path / "both.png")
    assert code == 0 and "insertion.kind" in out and "batch_size" not in out and (tmp_path / "both.png").stat().st_size > 5000


def test_tables_fit_the_terminal_and_say_what_they_leave_out(store, capsys, monkeypatch):
    "If this fails, a line is wider than the terminal, or a column is gone without a word."
    keys = [row["key"] for row in list_runs(store)]
    of_runs = [["list", "runs"], ["list", "cells"], ["show", keys[0]], ["compare", *keys[:2]]]
    others = [["list", "models"], ["list", "operations"], ["doctor"]]
    for width, asked in ((100, of_runs), (60, of_runs + others)):
        monkeypatch.setenv("COLUMNS", str(width))
        for words in asked:
            code, out, _ = attnnas(capsys, *words, "--results", store.folder)
            wide = [line for line in out.splitlines() if len(line) > width and str(store.folder) not in line]
            assert code == 0 and not wide, (words, wide)
            if words == ["list", "runs"]: assert all(column in out for column in COLUMNS), out


def test_columns_that_are_empty_in_all_rows_are_said_to_be(store):
    rows = [{"data": "A" * 40, "settings": "", "accuracy": accuracy} for accuracy in (1.0, 2.0)]
    assert _fitted(rows, 40)[0].split() == ["all", "with", "data", "A" * 40 + ",", "settings", "-"]


def test_runs_of_one_name_are_told_apart(store):
    "If this fails, a comparison has two lines with one label, and a picture takes them for seeds."
    other = dataclasses.replace(PLAIN, training=dataclasses.replace(ONCE, learning_rate=1e-3))
    run(other, store, "cpu")
    first, second = (store.get(key_of(config)) for config in (PLAIN, other))
    assert first.run.label == second.run.label
    assert compare([first, second]).labels == tuple(f"{first.run.label} (learning_rate {rate})" for rate in (0.005, 0.001))
    settings = {row["key"]: row["settings"] for row in list_runs(store)}
    seed = settings[key_of(dataclasses.replace(PLAIN, seed=1))]
    assert settings[first.key] == seed != settings[second.key], "seeds have equal settings, and nothing else has"


def test_a_damaged_record_is_named_and_left_out(store, tmp_path, capsys):
    "Cut off, with a cell or a history that is none. If this fails, one bad file stops every list."
    shutil.copytree(store.folder, tmp_path / "r")
    place = Store(tmp_path / "r")
    rows = {row["insertion"]: row["key"] for row in list_runs(place, [("settings", "*")], sort="insertion")}
    bad = [rows["none"], rows["cell"], rows["search (random)"]]
    values = [json.loads(place.path(key).read_text()) for key in bad]
    values[1]["cells"] = {"Mixed_4b": {"operations": 3}}
    values[2]["history"][0]["cell"] = "none"
    for key, value in zip(bad, values): place.path(key).write_text(json.dumps(value))
    place.path(bad[0]).write_text("{")
    left = len(list(place.folder.glob("runs/*/record.json"))) - 3
    for what in ("runs", "cells"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            code, out, _ = attnnas(capsys, "list", what, "--results", place.folder)
        assert code == 0 and len(told) == 3 and all(str(place.path(key)) in " ".join(str(one.message) for one in told) for key in bad)
        assert what == "cells" or out.startswith(f"{left} run")
    for words in (["show", bad[0]], ["show", bad[1]], ["show", bad[2]], ["compare", bad[1], bad[0]]):
        code, _, err = attnnas(capsys, *words, "--results", place.folder)
        assert code == 2 and err.count("\n") == 1 and words[-1] in err, err
    with pytest.warns(UserWarning, match="left out"): place.known([PLAIN])
    assert place.find(bad[0][:10]) == place.path(bad[0]), "a file that is damaged is still found by its name"


def test_a_search_by_trials_tells_of_each_cell(tmp_path, capsys):
    "In the terminal, by a callback and for TensorBoard; each once, and those of the journal when it goes on."
    code, out, _ = attnnas(capsys, "search", *TINY, "--method", "random", "--trials", "3", "--operations", "2", "--width", "4",
                           "--results", tmp_path, "--output", tmp_path / "c.json")
    lines = [line.split() for line in out.splitlines() if re.match(r" +\d/3 ", line)]
    record, = Store(tmp_path).records()
    best = [max(trial["score"] for trial in record.history[:n + 1]) for n in range(3)]
    assert code in (0, 3) and [line[0] for line in lines] == ["1/3", "2/3", "3/3"]
    assert [line[1] for line in lines] == [CellSpec.from_dict(trial["cell"]).hash[:8] for trial in record.history]
    assert [line[3] for line in lines] == [f"{value:.1f}" for value in best]
    told = []
    options = dict(journal=tmp_path / "j.jsonl", show=False, callbacks=[told.append, TensorBoard(tmp_path / "board")])
    for trials in (2, 3): random(SearchSpace(1, 4), _score, trials, **options)
    assert [row.number for row in told] == [1, 2, 1, 2, 3] and told[-1].seconds_left == 0
    assert list((tmp_path / "board").glob("events.*"))


def _score(cell, seed): return {"score": float(int(cell.hash[:4], 16))}


@pytest.mark.parametrize("line, message", [
    ("list runs --sort accurcy", "Did you mean 'accuracy'"), ("list runs --filter seed", "COLUMN=PATTERN"), ("list runs --top 0", "at least 1"),
    ("list models --sort key", "not for models"), ("compare 00 11", "0 runs in"), ("train --seeds 1 1", "named twice"),
    ("train --settings none.toml", "none.toml"), ("train --init nowhere", "nowhere"), ("train --insertion non-local --sites Mixd_4b", "Mixed_4b")])
def test_bad_input_is_one_line_before_any_work(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = line.split()
    code, _, err = attnnas(capsys, *words[:1], *(TINY if words[0] == "train" else []), *words[1:])
    assert code == 2 and message in err and not list(tmp_path.iterdir())


def test_one_class_is_refused_before_any_work(tmp_path):
    av = pytest.importorskip("av")
    for split in ("train", "validation", "test"):
        (tmp_path / split / "only").mkdir(parents=True)
        with av.open(str(tmp_path / split / "only" / "a.mp4"), "w") as container:
            stream = container.add_stream("mpeg4", rate=25, width=32, height=32)
            for _ in range(20): container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
            container.mux(stream.encode())
    with pytest.raises(AttnnasError, match="1 class .*two or more"): RunConfig(Videos(str(tmp_path))).check()


# ---- settings

@pytest.mark.parametrize("insertion", [Insertion(), NonLocal(blocks=2), GivenCell(CELL, ("Mixed_4b",)), RandomCell(levels=2), DerivedCell(SEARCH),
                                       Search(SearchConfig(nodes=("temporal map-based",))), Search(search_config({"method": "evolution"}))],
                         ids=lambda insertion: insertion.label)
def test_written_settings_give_the_same_run(insertion, tmp_path):
    "Of every kind of run, also where a value is not that of any tier."
    network = NetworkConfig(options={"width": 0.5, "a name": [1, True]}, head="mlp")
    sgd = TrainingConfig(optimizer="sgd", momentum=0.5, learning_rate=1e-5)
    config = RunConfig(dataclasses.replace(DATA, name="B"), network, insertion, sgd, seed=7)
    path = tmp_path / "settings.toml"
    path.write_text(settings_text(config))
    assert run_of(read_settings(path)).to_dict() == config.to_dict()


@pytest.mark.parametrize("text, message", [
    ("[training]\nepoch = 1", "Did you mean 'epochs'"), ("[training]\nepochs = '1'", "epochs = '1': expected int"), ("epochs = 1", "section"),
    ("seed = 'one'", "seed = 'one'.*a whole number"), ("[insertion]\nkind = 'cel'", "Did you mean 'cell'"), ("training = 3", r"\[training\]"),
    ("[insertion]\nkind = 'non-local'\nalpha = 3", "Unknown setting"), ("[search]\nlevel = 3", "Did you mean 'levels'"), ("a = ", "not TOML"),
    ("[network]\nbackbone = true", "backbone = True"), ("[insertion]\nkind='derived'\nsearch={}\n[search]\nlevels = 2", "cannot change")])
def test_settings_are_strict(text, message, tmp_path):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(AttnnasError, match=message): run_of(read_settings(tmp_path / "mine.toml"))


def test_options_have_the_last_word(tmp_path, capsys):
    "Tier below file below command line; a number without a point is one for a setting that has one."
    (tmp_path / "mine.toml").write_text("tier = 'quick'\nseed = 3\n[training]\nepochs = 5\nlearning_rate = 1\n")
    code, out, _ = attnnas(capsys, "train", "--settings", tmp_path / "mine.toml", "--epochs", "6", "--print-settings")
    found = tomllib.loads(out)
    assert code == 0 and found["seed"] == 3 and found["training"]["epochs"] == 6 and found["training"]["learning_rate"] == 1
    assert found["training"]["batch_size"] == 32 and '"learning_rate":1.0' in json.dumps(run_of(found).to_dict(), separators=(",", ":"))


def test_what_has_no_effect_is_said():
    given = {"search": {"levels": 2}, "training": {"momentum": 0.5, "epochs": 4}, "insertion": {"kind": "none", "sites": ("a",)}}
    assert without_effect(run_of(given), given) == ["sites", "levels", "momentum"]
    assert without_effect(run_of(given, "search"), given) == ["momentum"]


def test_help_shows_defaults_and_flags_come_in_pairs(monkeypatch):
    One = dataclasses.make_dataclass("One", [("nesterov", bool, option(False, "look ahead")), ("freeze", tuple, option(("a", "b"), "parts")),
                                             ("epochs", int, option(7, "passes"))], frozen=True)
    monkeypatch.setitem(settings.GROUPS, "training", (One,))
    parser = argparse.ArgumentParser()
    add_fields(parser)
    text = " ".join(parser.format_help().split())
    assert "(tier quick: 4)" in text and "--no-nesterov" in text and "look ahead (default: no)" in text and "parts (default: a b)" in text
    args = parser.parse_args(["--no-nesterov", "--freeze", "x", "y"])
    assert args.nesterov is False and args.freeze == ["x", "y"]


def test_one_s_own_runs_have_a_folder_of_their_own():
    parser = cli.parser()
    for line in ("train", "search", "list runs", "show x", "compare x y"): assert parser.parse_args(line.split()).results == OWN_RUNS
    assert parser.parse_args(["reproduce"]).results == "reproduced"


# ---- seeds, epochs, weights to start from

def test_seeds_epochs_and_a_start_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, _ = attnnas(capsys, "train", *TINY, "--seeds", "0", "1")
    told = [line.split() for line in out.splitlines() if line.startswith("seed ")]
    assert code == 0 and [line[:3] for line in told] == [["seed", "0", "1/1"], ["seed", "1", "1/1"]] and "2 seeds: test accuracy" in out
    records = Store(OWN_RUNS).records()
    for record in records:
        path = tmp_path / OWN_RUNS / "runs" / record.key
        assert run_of(read_settings(path / "settings.toml")).hash == record.run.hash
    code, out, _ = attnnas(capsys, "train", *TINY, "--init", records[0].key[:8], "--seed", "5")
    assert code == 0 and "matched" in out and "100.00%" in out
    started = next(record for record in Store(OWN_RUNS).records() if record.run.network.init)
    text = settings_text(run_of(read_settings(tmp_path / OWN_RUNS / "runs" / started.key / "settings.toml")))
    assert "weights.safetensors" in text
    with pytest.raises(AttnnasError, match="Give the file: --init"): started.run.check()


def test_a_search_at_chance_has_its_own_exit_code(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "_believe", lambda record, derivation: train.AT_CHANCE)
    code, out, _ = attnnas(capsys, "search", *TINY, "--levels", "1", "--width", "4", "--results", tmp_path, "--output", tmp_path / "c.json")
    assert code == 3 and "GFLOPs a clip (+" in out and (tmp_path / "c.json").exists()


def test_weights_go_between_networks_with_and_without_cells(tmp_path):
    trained = insert(create_model("i3d_small", num_classes=3), CELL, ["Mixed_4b"])
    save_weights(trained, tmp_path / "w.safetensors")
    source = trained.state_dict()
    for classes, sites in ((3, []), (5, []), (5, ["Mixed_4b"]), (5, ["Mixed_3b"])):
        model = create_model("i3d_small", num_classes=classes)
        if sites: insert(model, CELL, sites)
        head = next(value.clone() for name, value in model.state_dict().items() if name.endswith("head.weight"))
        start_from(model, tmp_path / "w.safetensors")
        plain = {name.replace(".original", ""): value for name, value in source.items() if ".added." not in name}
        for name, value in model.state_dict().items():
            name = name.replace(".original", "")
            if name in plain and "head" not in name: assert torch.equal(value, plain[name]), name
        kept = next(value for name, value in model.state_dict().items() if name.endswith("head.weight"))
        assert torch.equal(kept, head) == (classes == 5)
        if sites == ["Mixed_4b"]: assert torch.equal(model.Mixed_4b.added.combine.weight, trained.Mixed_4b.added.combine.weight)
    with pytest.raises(AttnnasError, match="another network's"): start_from(create_model("s3d_small", num_classes=3), tmp_path / "w.safetensors")


def test_a_start_is_its_content_and_no_start_is_no_part_of_a_key(tmp_path):
    plain = create_model("i3d_small", num_classes=3)
    for name in ("a", "b"): save_weights(plain, tmp_path / f"{name}.safetensors")
    first, second = (RunConfig(DATA, NetworkConfig().starting_from(tmp_path / f"{name}.safetensors")) for name in "ab")
    assert first.hash == second.hash != RunConfig(DATA).hash and "init" not in RunConfig(DATA).to_dict()["network"]
    with torch.no_grad(): next(plain.parameters()).add_(1)
    save_weights(plain, tmp_path / "a.safetensors")
    with pytest.raises(AttnnasError, match="has changed"): first.check()


def test_epochs_of_a_run_that_goes_on_are_told_once(tmp_path):
    "In this process, stopped after the second epoch: the first one is on disk, and is not told again."
    config = dataclasses.replace(PLAIN, training=dataclasses.replace(ONCE, epochs=3))
    told = []

    def stop(metrics):
        told.append(metrics["epoch"])
        if metrics["epoch"] == 1: raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): run(config, Store(tmp_path), "cpu", watch=stop)
    again = []
    record = run(config, Store(tmp_path), "cpu", watch=again.append)
    assert told == [0, 1] and again == record.history[1:] and len(record.history) == 3