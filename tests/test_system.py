"""Other systems: what macOS or Windows lack is done without, or refused in one line; a pause is no time-out."""
import errno
import importlib
import pkgutil
import subprocess
import sys
import threading
import time

import pytest
import torch

import attnnas
from attnnas.core import system
from attnnas.core.devices import device_name, peak_memory, pick_device
from attnnas.core.errors import AttnnasError
from attnnas.core.system import Patience, check_system, core_count, lock_file, peak_resident
from attnnas.data.unreadable import Unreadable, limited

HIDDEN = """
import os, sys
for name in ("fcntl", "resource"): sys.modules[name] = None
del os.sched_getaffinity
import importlib, pkgutil
import attnnas
for module in pkgutil.walk_packages(attnnas.__path__, "attnnas."):
    if not module.name.endswith("attention.triton"): importlib.import_module(module.name)
from attnnas.core.devices import peak_memory
from attnnas.core.system import core_count
from attnnas.data.splits import readers
import torch
assert core_count() == os.cpu_count() and readers() >= 1 and peak_memory(torch.device("cpu")) is None
from attnnas.core.errors import AttnnasError
from attnnas.evidence.store import Store
try:
    with Store(sys.argv[1]).lock("key"): pass
except AttnnasError as error: print(error)
"""


def test_without_the_names_of_linux_everything_imports_and_a_run_is_refused_in_one_line(tmp_path):
    "Without locks two processes could make the same run."
    done = subprocess.run([sys.executable, "-c", HIDDEN, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "has no file locks" in done.stdout


def test_a_mac_has_locks_and_no_list_of_cores(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: None)
    assert core_count() == 1
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    assert core_count() == 8
    held = peak_resident()
    monkeypatch.setattr(sys, "platform", "darwin")  # whose unit is the byte
    assert peak_resident() == pytest.approx(held / 1024, rel=.1)


def test_windows_is_refused_in_one_line(monkeypatch, capsys):
    from attnnas.cli.main import main
    check_system("linux"), check_system("darwin")
    monkeypatch.setattr(system.check_system, "__defaults__", ("win32",))
    assert main(["list", "models"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and "WSL" in told[0]


def test_an_apple_gpu_is_offered_where_torch_has_it(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(AttnnasError, match="no Apple GPU"): pick_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("mps").type == "mps"
    assert device_name(torch.device("mps")).startswith("mps (") and peak_memory(torch.device("mps")) > 0
    with pytest.raises(AttnnasError, match="auto, cpu, cuda, cuda:N, mps"): pick_device("tpu")
    from attnnas.training.processes import shared_device
    with pytest.raises(AttnnasError, match="cannot share"): shared_device("mps", 2)


def test_no_module_uses_them_but_one():
    "A name that a system lacks is used in one place, which has the fallback."
    for module in pkgutil.walk_packages(attnnas.__path__, "attnnas."):
        if module.name in ("attnnas.core.system", "attnnas.attention.triton"): continue
        names = vars(importlib.import_module(module.name))
        assert not {"fcntl", "resource"} & names.keys(), module.name
        source = importlib.util.find_spec(module.name).origin
        with open(source, encoding="utf-8") as file: assert "sched_getaffinity" not in file.read(), module.name


def test_locks(tmp_path, monkeypatch):
    path = tmp_path / "lock"
    with open(path, "w") as first, open(path) as second, open(path) as third:
        assert lock_file(first)
        assert not lock_file(second, wait=False) and not lock_file(second, shared=True, wait=False)
        first.close()
        assert lock_file(second, shared=True) and lock_file(third, shared=True, wait=False)

    def refuse(*arguments): raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(system.fcntl, "flock", refuse)
    with open(path) as file, pytest.raises(AttnnasError, match="cannot be locked .No locks available."): lock_file(file)


def test_a_pause_is_no_time_out(monkeypatch):
    "A clock that jumps by an hour is a process that was stopped: Ctrl-Z, a closed lid, a paused container."
    clock, jumps = time.monotonic, [0.]
    monkeypatch.setattr(system.time, "monotonic", lambda: clock() + jumps[0])
    patience = Patience(10)
    jumps[0] += 3600
    assert 7 < patience.left() <= 8
    for _ in range(5):
        jumps[0] += 2
        patience.left()
    assert patience.left() <= 0

    def work(stop):
        jumps[0] += 3600
        return "read"
    assert limited(30, "video", work) == "read"
    with pytest.raises(Unreadable, match="nothing after 0.1 seconds"): limited(.1, "video", lambda stop: threading.Event().wait(1))
