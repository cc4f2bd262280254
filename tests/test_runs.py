"""Runs: a record is a function of its configuration, and nothing finished is lost."""
import dataclasses
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import time

import pytest

from attnnas.core.errors import AttnnasError
from attnnas.core.numbers import NUMBERS
from attnnas.evidence.config import RunConfig
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


KILLED = """
import sys
from attnnas.evidence.executor import execute
from attnnas.evidence.config import load_tier
from attnnas.evidence.store import Store
if __name__ == "__main__":
    tier = load_tier("smoke")
    search = tier.run("A", "i3d_small", "search", 0)
    derived = tier.run("A", "i3d_small", "derived", 0, source=search)
    records = execute([derived], Store(sys.argv[1]), 1, "cpu", False)
    print(*[(r.key, r.test) for r in records])
"""


def test_a_killed_batch_continues_and_ends_with_the_same_records(tmp_path):
    "The whole process group of a batch is killed with SIGKILL half way; the rerun equals an undisturbed one."
    script = tmp_path / "batch.py"
    script.write_text(KILLED)

    def start(folder):
        return subprocess.Popen([sys.executable, script, tmp_path / folder], stdout=subprocess.PIPE, text=True, start_new_session=True)

    process = start("killed")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("killed/runs/*/checkpoint.safetensors")) and time.monotonic() < deadline: time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert list(tmp_path.glob("killed/runs/*/checkpoint.safetensors")), "the batch was killed under way"
    resumed, whole = (start(folder).communicate(timeout=120)[0] for folder in ("killed", "whole"))
    assert resumed == whole and "top1" in whole


@pytest.mark.skipif(sys.platform != "linux", reason="another C library")
def test_workers_keep_their_memory():
    "Page faults of twenty blocks of 64 MiB, one after the other: a worker clears the memory for the first one only."
    script = """
import resource, sys, torch
from attnnas.evidence.executor import _keep_memory
if sys.argv[1] == "kept": _keep_memory()
for _ in range(20): torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)"""
    faults = {how: int(subprocess.run([sys.executable, "-c", script, how], capture_output=True, text=True, check=True).stdout)
              for how in ("kept", "given back")}
    assert faults["given back"] - faults["kept"] > 10 * 2**26 / 4096, faults


def test_workers_end_when_their_parent_is_killed(tmp_path):
    "If this fails, a killed batch leaves processes behind that hold its locks."
    script = tmp_path / "batch.py"
    script.write_text(KILLED)
    process = subprocess.Popen([sys.executable, script, tmp_path / "killed"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               start_new_session=True)
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
    from attnnas.evidence import executor
    executor._start_worker(queue.SimpleQueue(), dict(os.environ))
    training = TrainingConfig(epochs=10**5, batch_size=8)
    executor._work("key", RunConfig(data=DATA, training=training), folder, "cpu", 1)


def test_a_worker_that_is_told_to_stop_ends(tmp_path):
    "If this fails, a batch of which an idle worker was killed waits for ever for the others."
    worker = multiprocessing.get_context("spawn").Process(target=train_for_long, args=(tmp_path,))
    worker.start()
    deadline = time.monotonic() + 100
    while not list(tmp_path.glob("runs/*/checkpoint.safetensors")) and time.monotonic() < deadline: time.sleep(0.05)
    worker.terminate()
    worker.join(60)
    assert worker.exitcode == 0 and list(tmp_path.glob("runs/*/checkpoint.safetensors"))
