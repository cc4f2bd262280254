"""Runs a notebook in a process of its own, forked from one that has imported what takes long."""
import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

from forks import FORKS, adopt

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 600  # that a notebook may take


class Done(NamedTuple):
    """How a notebook ended: the exit code, what went to the terminal, and {cell id: outputs} of the cells that ran."""
    returncode: int
    output: str
    made: dict


def _run(path: Path, scratch: Path):
    "Be the process of one notebook: what it leaves behind in torch or sys.modules ends with it."
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what runs in the background
    for name in ("COLUMNS", "LINES"): os.environ.pop(name, None)  # readline, which pytest imports, leaves them for what it starts
    os.environ |= {"IPYTHONDIR": str(scratch), "OMP_NUM_THREADS": "1", "IN_TEST": "1"}
    with open(scratch / "output.txt", "w") as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    sys.path.insert(0, str(ROOT))
    os.chdir(path.parent)
    adopt()
    import pandas
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    pandas.options.display.max_columns = 20  # as in Jupyter; this is a terminal
    shell = CaptureShell(path)
    made = {}
    for cell in read_nb(path).cells:
        if cell.cell_type != "code": continue
        shell._cell_idx = cell.idx_ + 1
        outputs = shell.run(cell.source + "\n#")  # a semicolon at the end would drop what was printed
        quiet = cell.source.rstrip().endswith(";")
        made[cell.id] = [output for output in outputs if not (quiet and output["output_type"] == "execute_result")]
        if shell.exc: sys.exit(shell.prettytb(path))
    (scratch / "made.json").write_text(json.dumps(made))


def run_notebook(path: Path, scratch: Path) -> Done:
    "Run the cells of the notebook at `path` from top to bottom."
    process = FORKS.Process(target=_run, args=(path, scratch))
    process.start()
    process.join(SECONDS)
    if process.is_alive():
        process.kill()
        process.join()
    output = (scratch / "output.txt").read_text(errors="replace")
    made = json.loads((scratch / "made.json").read_text()) if process.exitcode == 0 else {}
    return Done(process.exitcode, output, made)
