"""Identity: a run's key is configuration, data and NUMBERS; digests of tiny runs guard NUMBERS from both sides."""
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from attnnas.core.numbers import NUMBERS
from attnnas.evidence.config import NetworkConfig, RunConfig
from attnnas.evidence.insertions import (
    DerivedCell, GivenCell, Insertion, NonLocal, RandomCell, Search)
from attnnas.evidence.run import key_of, run
from attnnas.evidence.sources import Generated
from attnnas.evidence.store import RunRecord, Store, upgrade
from attnnas.search.differentiable import SearchConfig
from attnnas.search.methods import search_config
from attnnas.training.loop import TrainingConfig

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).with_name("golden.json")  # written by: python tests/test_identity.py

# ---- golden digests: one tiny run of each kind

TINY = dict(frames=4, size=16, train_clips=24, validation_clips=8, test_clips=12)
A = Generated("A", **TINY)
ONCE = TrainingConfig(epochs=2, batch_size=8)
SMALL = dict(levels=2, width=8)
SEARCH = RunConfig(A, insertion=Search(SearchConfig(**SMALL)), training=ONCE)


def tiny(data=A, insertion=Insertion(), training=ONCE, **network) -> RunConfig:
    return RunConfig(data, NetworkConfig(**network), insertion, training)


def one_of_each_kind() -> dict:
    "{name: configuration}: every kind of data set, insertion, training, network."
    cell = next(iter(RandomCell(**SMALL).cells(NetworkConfig().create(2, 3), seed=7).values()))
    sgd = dataclasses.replace(ONCE, optimizer="sgd", learning_rate=0.05, weight_decay=1e-4)
    fixed = SearchConfig(**SMALL, activations="fixed", connections="per-site", cost_weight=0.1)
    free = SearchConfig(**SMALL, parameterisation="free", keys="pooled", connection_learning_rate=5e-3)
    gentle = dataclasses.replace(sgd, learning_rate=1e-5)  # more, and six steps magnify what another processor rounds otherwise
    streams = {"options": {"width": 0.35, "output_stride": 8}}
    picture = Generated("pictures", **TINY | {"frames": 1, "size": 32})
    return {
        "backbone": tiny(), "MLP head": tiny(head="mlp"), "s3d_small": tiny(backbone="s3d_small"),
        "data set B": tiny(Generated("B", **TINY)),
        "flow": tiny(Generated("A", modality="flow", **TINY)),
        "two streams": tiny(Generated("A", modality="rgb+flow", **TINY | {"frames": 8}),
                            training=gentle, backbone="mobilenetv2_two_stream", **streams),
        "pictures": tiny(picture, training=gentle, backbone="mobilenetv2_frames",
                         options={"width": 0.35, "output_stride": 16, "mechanism": "cbam"}),
        "sgd, in parts": tiny(training=dataclasses.replace(sgd, micro_batch=4)),
        "non-local": tiny(insertion=NonLocal()), "given cell": tiny(insertion=GivenCell(cell)),
        "random cell": tiny(insertion=RandomCell(**SMALL)), "search": SEARCH,
        "search, fixed, per site, with a cost": tiny(insertion=Search(fixed)),
        "search, free, pooled keys": tiny(insertion=Search(free)),
        "derived cell": tiny(insertion=DerivedCell(SEARCH)),
        "search by evolution": tiny(insertion=Search(search_config(
            {"method": "evolution", "trials": 2, "operations": 2, "width": 8}))),
    }


def digest(record: RunRecord) -> dict:
    "What a run came to, in few numbers."
    common = {"status": record.status, "parameters": record.parameters, "gflops": record.gflops,
              "cells": sorted(json.dumps(cell, sort_keys=True) for cell in record.cells.values())}
    if record.test is None:  # a search that tries cells
        trials = [{"cell": json.dumps(trial["cell"], sort_keys=True), "score": trial["score"], "loss": trial["metrics"]["loss"]}
                  for trial in record.history]
        return common | {"trials": trials}
    return common | {"loss": [epoch["loss"] for epoch in record.history], "test": record.test["loss"],
                     "validation": record.history[-1]["validation"]["loss"]}


def flat(value) -> list:
    if isinstance(value, dict): return [n for key in sorted(value) for n in flat(value[key])]
    return [n for item in value for n in flat(item)] if isinstance(value, list) else [value]


def same(ours: dict, golden: dict) -> bool:
    "Equal, but for what another processor rounds otherwise (1e-3 of a loss, after six steps)."
    pairs = list(zip(flat(ours), flat(golden), strict=True))
    return all(math.isclose(a, b, rel_tol=1e-3) if isinstance(a, float) else a == b for a, b in pairs)


@pytest.fixture(scope="module")
def store(tmp_path_factory): return Store(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", one_of_each_kind())
def test_the_same_configuration_gives_the_numbers_that_it_gave(name, store):
    "If this fails, change the code so that the numbers stay, or raise NUMBERS, say why in CHANGELOG.md, and write the digests anew."
    golden = json.loads(GOLDEN.read_text())
    assert golden["numbers"] == NUMBERS, "NUMBERS was raised: python tests/test_identity.py"
    assert same(digest(run(one_of_each_kind()[name], store, "cpu")), golden["digests"][name])


def test_a_raise_that_was_not_needed_is_refused(tmp_path):
    "If this fails, NUMBERS can be raised, and all evidence lost, for nothing."
    golden = json.loads(GOLDEN.read_text())
    with pytest.raises(SystemExit, match="give the same numbers"):
        write_golden({"numbers": golden["numbers"] - 1, "digests": golden["digests"]}, golden["digests"])


def write_golden(before: dict, digests: dict):
    "Write the digests, where NUMBERS was raised for a reason or kinds were added."
    unchanged = all(name in digests and same(digests[name], was) for name, was in before["digests"].items())
    if before["numbers"] != NUMBERS and unchanged:
        sys.exit("NUMBERS was raised, and the runs give the same numbers: take the raise back.")
    if before["numbers"] == NUMBERS and not unchanged:
        sys.exit("The runs give other numbers: raise NUMBERS first, if that is meant.")
    GOLDEN.write_text(json.dumps({"numbers": NUMBERS, "digests": digests}, indent=1) + "\n")


# ---- what is no part of a key

KEY = """
from attnnas.evidence.config import RunConfig, NetworkConfig
from attnnas.evidence.insertions import Search
from attnnas.evidence.run import key_of
print(*(key_of(config) for config in (RunConfig(), RunConfig(network=NetworkConfig(backbone="s3d_small")), RunConfig(insertion=Search()))))
"""


def keys_of(package: Path) -> list:
    environment = dict(os.environ, PYTHONPATH=str(package))
    done = subprocess.run([sys.executable, "-c", KEY], env=environment, cwd=package, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def package(tmp_path):
    shutil.copytree(ROOT / "attnnas", tmp_path / "attnnas", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def edit(path: Path, old: str, new: str):
    text = path.read_text(encoding="utf-8")
    assert old in text, f"{path} does not have {old!r} any more: choose another line for this test"
    path.write_text(text.replace(old, new), encoding="utf-8")


def edit_a_message(attnnas: Path):
    edit(attnnas / "training/checkpoint.py", "Delete it to start afresh", "Remove it and begin again")
    edit(attnnas / "training/loop.py", "passes over the training clips", "how often the training clips are seen")


def move_a_module(attnnas: Path):
    (attnnas / "training/checkpoint.py").rename(attnnas / "training/saving.py")
    edit(attnnas / "training/loop.py", "from .checkpoint import", "from .saving import")


def register_a_model(attnnas: Path):
    edit(attnnas / "networks/registry.py", '"networks.inception": (', '"networks.another": ("another",), "networks.inception": (')


def test_changes_of_the_code_that_change_no_number_change_no_key(package):
    "If this fails, all evidence is lost whenever the code is tidied; leave out one change after the other to see which."
    expected = [key_of(RunConfig()), key_of(RunConfig(network=NetworkConfig(backbone="s3d_small"))), key_of(RunConfig(insertion=Search()))]
    for change in (edit_a_message, move_a_module, register_a_model): change(package / "attnnas")
    assert keys_of(package) == expected


@pytest.mark.parametrize("one,other", [
    ({"training": {"momentum": 0.5}}, {"training": {"momentum": 0.9}}),
    ({"data": {"name": "A", "test_frames": 250}}, {"data": {"name": "A"}}),
    ({"data": {"name": "clips", "train_clips": 10}}, {"data": {"name": "clips", "train_clips": 20}}),
    ({"data": {"name": "a.csv", "flow": "there"}}, {"data": {"name": "a.csv"}})],
    ids=["momentum of adamw", "test frames of a generated set", "training clips of a folder", "flow folder of colours"])
def test_fields_that_cannot_matter_split_no_runs(one, other):
    assert RunConfig.from_dict(one).hash == RunConfig.from_dict(other).hash


@pytest.mark.parametrize("one,other", [
    ({"training": {"optimizer": "sgd", "momentum": 0.5}}, {"training": {"optimizer": "sgd"}}),
    ({"data": {"name": "a.csv", "test_frames": 250}}, {"data": {"name": "a.csv"}}),
    ({"data": {"name": "A", "train_clips": 10}}, {"data": {"name": "A"}}),
    ({"data": {"name": "a.csv", "flow": "there", "modality": "flow"}}, {"data": {"name": "a.csv", "modality": "flow"}})])
def test_fields_that_matter_tell_runs_apart(one, other):
    assert RunConfig.from_dict(one).hash != RunConfig.from_dict(other).hash


# ---- records of the first schema

FIRST = sorted(path for path in (ROOT / "results/runs").glob("*/record.json")
               if json.loads(path.read_text())["schema_version"] == 1)


def test_records_of_the_first_schema_are_there_to_be_read():
    assert FIRST, "results/runs holds none any more: keep some beside the tests"


@pytest.mark.parametrize("path", FIRST, ids=lambda path: path.parent.name)
def test_a_record_of_the_first_schema_is_read_as_the_run_that_it_is(path):
    "Each of these was made again later: the two are one run, with equal numbers."
    old = RunRecord.load(path)
    new = Store(ROOT / "results").get(old.key)
    assert new.schema_version == 2 and new.config == old.config and new.source != old.source
    assert (old.history, old.test, old.cells, old.parameters) == (new.history, new.test, new.cells, new.parameters)


def test_an_edited_record_of_the_first_schema_is_refused():
    from attnnas.core.errors import AttnnasError
    values = json.loads(FIRST[0].read_text())
    with pytest.raises(AttnnasError, match="edited"): upgrade(values | {"config": values["config"] | {"seed": 99}})


def test_every_committed_record_is_found_under_its_key():
    records = [RunRecord.load(path) for path in (ROOT / "results/runs").glob("*/record.json") if path not in FIRST]
    assert len(records) > 150
    for record in records:
        assert record.key == Store(ROOT / "results").path(record.key).parent.name and record.numbers == 1
        assert record.run.to_dict() == record.config


if __name__ == "__main__":
    import tempfile

    import torch
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: digest(run(config, Store(folder), "cpu")) for name, config in one_of_each_kind().items()}
    write_golden(json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {"numbers": NUMBERS, "digests": {}}, found)
