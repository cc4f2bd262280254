"""Runs a notebook in a process of its own, forked from one that has imported what takes long."""
import multiprocessing
import os
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600  # that a notebook may take

# Importing these takes 5 of the 7 CPU-seconds of a short notebook.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "matplotlib.pyplot", "pandas", "nbdev.test"])


class Done(NamedTuple):
    "How a notebook ended: the exit code, and what it wrote."
    returncode: int
    output: str


def _run(path: Path, scratch: Path, output: Path):
    "Be the process of one notebook: what it leaves behind in torch or sys.modules ends with it."
    os.chdir(ROOT)
    os.environ |= {"IPYTHONDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    with open(output, "w") as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    from nbdev.config import get_config
    from nbdev.test import test_nb
    passed, _ = test_nb(path, skip_flags=get_config().tst_flags.split(), basepath=ROOT)
    sys.exit(not passed)


def run_notebook(path: Path, scratch: Path) -> Done:
    "Run the cells of the notebook at `path` from top to bottom, as `nbdev_test` does."
    output = scratch / "output.txt"
    process = FORKS.Process(target=_run, args=(path, scratch, output))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    return Done(process.exitcode, output.read_text(errors="replace"))
