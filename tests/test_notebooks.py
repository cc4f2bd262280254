"""The library notebooks run from top to bottom: their examples and assertions are this package's first tests."""
import pytest

from lessons import ROOT, run_notebook

NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb")
                   if not {"paper", ".ipynb_checkpoints"} & set(path.parts))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.relative_to(ROOT / "nbs").as_posix())
def test_a_reader_can_run_the_notebook_from_top_to_bottom(path, tmp_path):
    "If this fails, a lesson is wrong: a cell raises, or an assertion in it does not hold."
    done = run_notebook(path, tmp_path)
    assert done.returncode == 0, f"{path.name}\n{done.output}"


def test_a_notebook_with_a_false_assertion_is_noticed(tmp_path):
    "If this fails, the runner above passes anything, and the notebooks are not tested at all."
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    notebook = new_notebook(cells=[new_code_cell("assert 1 + 1 == 3")], metadata=kernel)
    nbformat.write(notebook, tmp_path / "wrong.ipynb")
    done = run_notebook(tmp_path / "wrong.ipynb", tmp_path)
    assert done.returncode == 1 and "assert 1 + 1 == 3" in done.output
