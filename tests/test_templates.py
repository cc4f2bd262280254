"""Every template runs at the smoke tier through papermill itself, and wrong parameters never start a kernel."""
from pathlib import Path

import nbformat
import pytest

from attnnas.core import AttnnasError
from attnnas.experiments.batch import check_parameters, reproduce, template_path
from attnnas.experiments.config import load_tier
from attnnas.experiments.plans import PLANS, figure_cells
from attnnas.experiments.run import key_of
from attnnas.experiments.store import Store

TEMPLATES = sorted(path.stem for path in (Path(__file__).parent.parent / "nbs/paper").glob("*.ipynb"))


def test_every_template_has_a_plan_and_every_plan_a_template():
    assert set(TEMPLATES) == set(PLANS)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    "The smoke tier, made once: runs in worker processes, then all notebooks through papermill."
    results = tmp_path_factory.mktemp("smoke")
    return results, reproduce("smoke", results, device="cpu", show=False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_runs_at_the_smoke_tier(smoke, name):
    results, written = smoke
    notebook = nbformat.read(results / "smoke" / f"{name}.ipynb", as_version=4)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code" and cell.source)
    pictures = [path for path in written if path.name.startswith(name) and path.suffix == ".png"]
    assert pictures and all(path.stat().st_size > 5000 for path in pictures)


def test_the_table_is_written_with_seeds_and_published_rows(smoke):
    folder = smoke[0] / "smoke"
    header, *lines = (folder / "table_1_nonlocal.csv").read_text().splitlines()
    assert {"seeds", "top1_sd", "single", "relation", "published_top1"} <= set(header.split(",")) and len(lines) == 5
    text = (folder / "table_1_nonlocal.md").read_text()
    assert "76.87" in text and "bag ceiling 75.0 %" in text and "MLP head" in text


def test_a_second_call_reuses_all_runs(smoke, capsys):
    results, written = smoke
    before = {path: path.stat().st_mtime_ns for path in results.glob("runs/*/record.json")}
    assert reproduce("smoke", results, ["figure_cells"], device="cpu") == [p for p in written if p.name.startswith("figure_cells")]
    assert "1 finished and reused, 0 to make" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in results.glob("runs/*/record.json")}


def test_a_fresh_start_makes_the_runs_again(smoke):
    results, _ = smoke
    record = Store(results).path(key_of(figure_cells(load_tier("smoke"))))
    before = record.stat().st_mtime_ns
    reproduce("smoke", results, ["figure_cells"], device="cpu", fresh=True, show=False)
    assert record.stat().st_mtime_ns > before


def test_mistyped_parameters_end_before_a_kernel_starts(tmp_path):
    with pytest.raises(AttnnasError, match="Unknown parameter.*'teir'.*'tier'"): check_parameters(template_path("figure_cells"), {"teir": "quick"})


@pytest.mark.parametrize("tags", [[], ["parameters", "parameters"]])
def test_a_template_without_its_one_parameters_cell_is_refused(tmp_path, tags):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("tier = 1", metadata={"tags": [tag]}) for tag in tags])
    nbformat.write(notebook, tmp_path / "t.ipynb")
    with pytest.raises(AttnnasError, match=f"{len(tags)} cells tagged"): check_parameters(tmp_path / "t.ipynb", {})
