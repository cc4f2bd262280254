"""Runs: a record is a function of its configuration, and nothing finished is lost."""
import dataclasses
import os
import queue
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

import forks
from attnnas.core.errors import AttnnasError
from attnnas.core.numbers import NUMBERS
from attnnas.evidence import executor
from attnnas.evidence.config import RunConfig, load_tier
from attnnas.evidence.executor import execute, with_sources
from attnnas.evidence.insertions import DerivedCell, Insertion, NonLocal, RandomCell, Search
from attnnas.evidence.run import key_of, load_model, run
from attnnas.evidence.sources import Generated
from attnnas.evidence.store import Store, run_key
from attnnas.training.evaluation import evaluate
from attnnas.training.loop import TrainingConfig

DATA = Generated(frames=4, size=16, train_clips=16, validation_clips=8, test_clips=12)
TRAINING = TrainingConfig(epochs=1, batch_size=8)


def config(insertion=Insertion(), **changes) -> RunConfig:
    return RunConfig(data=DATA, insertion=insertion, training=TRAINING, **changes)


def test_the_same_configuration_gives_the_same_record_in_another_store(tmp_path):
    "Everything but seconds, memory and the date is a function of the configuration."
    first, second = (run(config(RandomCell(), seed=3), Store(tmp_path / name), "cpu") for name in "ab")
    varying = dict(seconds=None, peak_memory=None, finished=None)
    assert dataclasses.replace(first, **varying) == dataclasses.replace(second, **varying)


def test_finished_runs_are_reused_and_their_weights_are_those_that_were_tested(tmp_path):
    store = Store(tmp_path)
    record = run(config(NonLocal()), store, "cpu")
    changed = store.path(record.key).stat().st_mtime_ns
    assert run(config(NonLocal()), store, "cpu") == record and store.path(record.key).stat().st_mtime_ns == changed
    assert evaluate(load_model(record, store), DATA.open()["test"], TRAINING.batch_size) == record.test
    assert not store.path(record.key, "checkpoint.safetensors").exists()


def test_changed_configuration_data_or_numbers_is_another_run():
    keys = {key_of(config()), key_of(config(seed=1)), key_of(config(NonLocal())),
            key_of(dataclasses.replace(config(), data=dataclasses.replace(DATA, name="B"))),
            key_of(dataclasses.replace(config(), training=TrainingConfig(epochs=2, batch_size=8)))}
    assert len(keys | {run_key(config().to_dict(), DATA.fingerprint, NUMBERS + 1)}) == 6


def test_an_edited_truncated_or_foreign_record_is_refused(tmp_path):
    store = Store(tmp_path)
    record = run(config(), store, "cpu")
    path = store.path(record.key)
    text = path.read_text()
    for wrong, message in ((text.replace('"seed": 0', '"seed": 1'), "edited"), (text[:100], "not JSON"),
                           (text.replace('"schema_version": 2', '"schema_version": 9'), "version 9"),
                           (text.replace('"status"', '"state"'), "Unknown field")):
        path.write_text(wrong)
        with pytest.raises(AttnnasError, match=message): store.get(record.key)


def test_sources_run_first_and_once():
    search = config(Search())
    runs = [config(DerivedCell(search), seed=seed) for seed in range(3)]
    ordered = list(with_sources([config(), *runs]).values())
    assert ordered[0] == search and ordered.count(search) == 1 and len(ordered) == 5


def test_a_wrong_configuration_ends_before_any_run(tmp_path):
    broken = dataclasses.replace(config(), insertion=NonLocal(sites=("Mixed_4x",)))
    with pytest.raises(AttnnasError, match="Mixed_4x"): execute([config(), broken], Store(tmp_path), 1, "cpu", False)
    assert not Store(tmp_path).records()


def test_one_failing_run_does_not_stop_the_others(tmp_path):
    "A damaged checkpoint fails its run by name; the other record is there, and a repaired one is made."
    store = Store(tmp_path)
    broken = store.path(key_of(config(seed=1)), "checkpoint.safetensors")
    broken.parent.mkdir(parents=True)
    broken.write_bytes(b"damaged")
    with pytest.raises(AttnnasError, match="1 of 2 runs failed.*seed 1.*checkpoint.*kept"):
        execute([config(seed=1), config()], store, 1, "cpu", False)
    assert store.get(key_of(config())).status == "finished"
    broken.unlink()
    assert execute([config(seed=1)], store, 1, "cpu", False)[0].status == "finished"


def batch(results):
    tier = load_tier("smoke")
    search = tier.run("A", "i3d_small", "search", 0)
    derived = tier.run("A", "i3d_small", "derived", 0, source=search)
    records = execute([derived], Store(results), 1, "cpu", False)
    print(*[(r.key, r.test) for r in records])


def test_a_killed_batch_continues_and_ends_with_the_same_records(tmp_path):
    "The whole process group of a batch is killed with SIGKILL half way; the rerun equals an undisturbed one."
    process = forks.Forked(batch, tmp_path / "killed")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("killed/runs/*/checkpoint.safetensors")) and time.monotonic() < deadline: time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("killed/runs/*/checkpoint.safetensors")), "the batch was killed under way"
    told = []
    for folder in ("killed", "whole"):
        output = tmp_path / f"{folder}.txt"
        assert forks.Forked(batch, tmp_path / folder, output=output).wait(120) == 0, output.read_text()
        told.append(output.read_text())
    assert told[0] == told[1] and "top1" in told[1]


def count_faults(keep: bool):
    if keep: executor._keep_memory()
    for _ in range(20): torch.zeros(2**24)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)


@pytest.mark.skipif(sys.platform != "linux", reason="another C library")
def test_workers_keep_their_memory(tmp_path):
    "Page faults of twenty blocks of 64 MiB, one after the other: a worker clears the memory for the first one only."
    faults = {}
    for keep in (True, False):
        output = tmp_path / f"{keep}.txt"
        assert forks.Forked(count_faults, keep, output=output).wait(60) == 0, output.read_text()
        faults[keep] = int(output.read_text())
    assert faults[False] - faults[True] > 10 * 2**26 / 4096, faults


KILLED = """
import sys
from test_runs import batch
if __name__ == "__main__": batch(sys.argv[1])
"""


def test_workers_end_when_their_parent_is_killed(tmp_path):
    "If this fails, a killed batch leaves processes behind that hold its locks. Its fork server must end too, so that it has one."
    script = tmp_path / "batch.py"
    script.write_text(KILLED)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, filter(None, sys.path)))}
    process = subprocess.Popen([sys.executable, script, tmp_path / "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True, env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("killed/runs/*/lock")) and time.monotonic() < deadline: time.sleep(0.05)
    process.kill()
    process.wait()
    with pytest.raises(ProcessLookupError):
        for _ in range(300):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def train_for_long(folder):
    "Be a worker of a batch, and start a run that takes hours."
    executor._start_worker(queue.SimpleQueue(), dict(os.environ))
    training = TrainingConfig(epochs=10**5, batch_size=8)
    executor._work("key", RunConfig(data=DATA, training=training), folder, "cpu")


def test_a_worker_that_is_told_to_stop_ends(tmp_path):
    "If this fails, a batch of which an idle worker was killed waits for ever for the others."
    worker = forks.FORKS.Process(target=train_for_long, args=(tmp_path,))
    worker.start()
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("runs/*/checkpoint.safetensors")) and time.monotonic() < deadline: time.sleep(0.05)
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0 and list(tmp_path.glob("runs/*/checkpoint.safetensors"))
