"""The library notebooks run from top to bottom, and what they show is what they give: this package's first tests."""
import math
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from lessons import ROOT, run_notebook

NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb")
                   if not {"paper", ".ipynb_checkpoints"} & set(path.parts))
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
ASIDE = {"PATH": re.compile(r"(/[\w.+-]+){2,}"), "FOLDER": re.compile(r"\btmp\w{8}\b"),
         "TIME": re.compile(r"[\d.]+(?= (s|ms|microseconds|CPU-seconds)\b)")}
VARIES = "varies"  # the tag of a cell whose output is a fact about the machine, or a table of times
TOLERANCE = 1e-3   # relative, of numbers: processors round in their own ways


def shown(outputs: list) -> list:
    "The texts of a cell's outputs, paths and times aside: what it printed, and then what it showed."
    printed = "".join("".join(output["text"]) for output in outputs if output.get("name") == "stdout")
    displayed = ["".join(output["data"].get("text/plain", "")) for output in outputs if "data" in output]
    return [_aside(text) for text in (printed, *displayed)]


def _aside(text: str) -> str:
    for name, pattern in ASIDE.items(): text = pattern.sub(name, text)
    return text


def alike(ours: str, theirs: str) -> bool:
    "Whether two texts have the same words, and numbers that are equal but for rounding."
    numbers = [[float(number.replace(",", "")) for number in NUMBER.findall(text)] for text in (ours, theirs)]
    if len(numbers[0]) != len(numbers[1]): return False
    if NUMBER.sub("#", ours).split() != NUMBER.sub("#", theirs).split(): return False
    return all(math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=1e-6) for a, b in zip(*numbers))


def stale(path, made: dict) -> dict:
    "{cell id: (committed texts, fresh texts)} of the cells whose committed outputs are not those of a fresh run."
    found = {}
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type != "code" or VARIES in cell.metadata.get("tags", []): continue
        ours, theirs = shown(cell.outputs), shown(made[cell.id])
        if len(ours) != len(theirs) or not all(map(alike, ours, theirs)): found[cell.id] = ours, theirs
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT / "nbs").as_posix())
def test_a_reader_can_run_the_notebook_from_top_to_bottom(path, tmp_path):
    "If this fails, a lesson is wrong: a cell raises, an assertion does not hold, or an output belongs to other code."
    done = run_notebook(path, tmp_path)
    assert done.returncode == 0, f"{path.name}\n{done.output}"
    assert stale(path, done.made) == {}, f"run {path.name} again and keep its outputs"


def test_a_notebook_with_a_false_assertion_or_a_stale_output_is_noticed(tmp_path):
    "If this fails, the runner above passes anything, and the notebooks are not tested at all."
    def run(source: str, printed: str):
        output = nbformat.v4.new_output("stream", name="stdout", text=printed)
        kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
        notebook = new_notebook(cells=[new_code_cell(source, outputs=[output])], metadata=kernel)
        nbformat.write(notebook, tmp_path / "lesson.ipynb")
        return run_notebook(tmp_path / "lesson.ipynb", tmp_path)

    done = run("assert 1 + 1 == 3", "")
    assert done.returncode == 1 and "assert 1 + 1 == 3" in done.output
    for printed, as_it_is in (("loss 1.2500 at step 3\n", True), ("loss 1.2501 at step 3\n", True),
                              ("loss 1.26 at step 3\n", False), ("losses 1.25 at step 3\n", False), ("", False)):
        done = run("print('loss', 1.25, 'at step', 3)", printed)
        assert (stale(tmp_path / "lesson.ipynb", done.made) == {}) == as_it_is, printed
