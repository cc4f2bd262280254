"""Every template runs at the smoke tier through papermill itself; a batch that is killed, fails or has nothing to do."""
import os
import random
import shutil
import signal
import time
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest
from jupyter_client.launcher import launch_kernel
from jupyter_client.provisioning import local_provisioner

import forks
from forks import forked_kernels
from test_committed import RESULTS, stale_cells
from attnnas.core.errors import AttnnasError
from attnnas.evidence import batch, templates
from attnnas.evidence.batch import notebook_key, reproduce
from attnnas.evidence.config import load_tier
from attnnas.evidence.registry import EVIDENCE
from attnnas.evidence.run import key_of
from attnnas.evidence.store import Store
from attnnas.evidence.tables.figures import searched_run
from attnnas.evidence.templates import (
    COMMON, TYPES, check_parameters, own_kernel, run_template, template_path, unchanged)

TEMPLATES = sorted(path.stem for path in (Path(__file__).parent.parent / "nbs/paper").glob("*.ipynb")
                   if path.stem != COMMON)


def test_every_template_is_registered_and_everything_registered_has_a_template():
    assert set(TEMPLATES) <= set(EVIDENCE) and all(template_path(name).is_file() for name in EVIDENCE)


def test_a_table_without_a_template_of_its_own_is_shown_by_the_common_one(monkeypatch):
    "If this fails, a new table takes a copy of another table's notebook."
    monkeypatch.setitem(EVIDENCE, "table_9_new", EVIDENCE["table_1_nonlocal"])
    assert template_path("table_9_new").stem == COMMON


def test_the_common_template_makes_the_same_table(smoke, tmp_path, monkeypatch):
    "In a kernel that is started as for a user, and not forked as the others here."
    monkeypatch.setattr(local_provisioner, "launch_kernel", launch_kernel)
    results = shutil.copytree(smoke[0], tmp_path / "results")
    made = results / "smoke/table_1_nonlocal.csv"
    before = made.read_bytes()
    made.unlink()
    parameters = {"table": "table_1_nonlocal", "tier": "smoke", "results": str(results), "device": "cpu"}
    run_template(COMMON, parameters, tmp_path / "out.ipynb")
    assert made.read_bytes() == before


def written_times(folder: Path) -> dict: return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("name", ["figure_cells", "figure_attention_maps", COMMON])
def test_a_template_run_as_it_is_shows_the_committed_records(name, tmp_path, monkeypatch, forked_kernels):
    "Those that no batch of test_committed runs; from a folder that is not the project's, and nothing there or here changes."
    monkeypatch.chdir(tmp_path)
    before = written_times(RESULTS)
    run_template(name, {}, tmp_path / f"made/{name}.ipynb")
    assert stale_cells(name, tmp_path / "made") == [] and written_times(RESULTS) == before
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


@pytest.mark.parametrize("given, message", [({"teir": "full"}, "Unknown parameter of this notebook 'teir'. Did you mean 'tier'"),
                                            ({"rebuild": "yes"}, "rebuild of this notebook is 'yes', a str, expected a bool"),
                                            ({"tier": "quikc"}, "Did you mean 'quick'"), ({"device": "gpu"}, "device 'gpu'"),
                                            ({"table": "table_7"}, "Unknown table 'table_7'"), ({"results": None}, "expected a str")])
def test_a_template_refuses_what_papermill_hands_it_by_hand(given, message, tmp_path, forked_kernels):
    "papermill itself only warns of a name that the notebook does not have."
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        papermill.execute_notebook(str(template_path(COMMON)), str(tmp_path / "out.ipynb"), given, progress_bar=False,
                                   kernel_manager_class=own_kernel(), kernel_name="python3")


@pytest.mark.parametrize("name", [*TEMPLATES, COMMON])
def test_parameters_say_their_types(name):
    "If this fails, `papermill --help-notebook` tells other types than those that are checked."
    known = papermill.inspect_notebook(str(template_path(name)))
    assert {key: value["inferred_type_name"] for key, value in known.items()} == {key: TYPES[key].__name__ for key in known}
    assert all(value["help"] for value in known.values()) and set(known) | {"table"} == set(TYPES)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, forked_kernels):
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
    assert reproduce("smoke", results, ["figure_cells"], device="cpu") == [p for p in written if p.name.startswith(("figure_cells", "report"))]
    assert "1 finished and reused, 0 to make" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in results.glob("runs/*/record.json")}


def test_a_fresh_start_makes_the_runs_again(smoke):
    results, _ = smoke
    record = Store(results).path(key_of(searched_run(load_tier("smoke"))))
    before = record.stat().st_mtime_ns
    reproduce("smoke", results, ["figure_cells"], device="cpu", fresh=True, show=False)
    assert record.stat().st_mtime_ns > before


def batch_of(results, names):
    "Be a batch of two workers."
    reproduce("smoke", results, names, device="cpu", workers=2, show=False)


def test_a_batch_killed_at_ten_random_moments_ends_with_the_same_tables(smoke, tmp_path):
    "Runs or notebooks, whatever it was at: its whole process group gets SIGKILL."
    names, draw = ["table_0_benchmark", "table_1_nonlocal"], random.Random(0)
    start = lambda: forks.Forked(batch_of, tmp_path / "killed", names, output=tmp_path / "output.txt")
    for _ in range(10):
        process = start()
        time.sleep(draw.uniform(.5, 2.5))
        try: os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError: pass
        process.wait()
    assert start().wait(300) == 0, (tmp_path / "output.txt").read_text()
    for name in names:
        killed, whole = (pd.read_csv(folder / "smoke" / f"{name}.csv") for folder in (tmp_path / "killed", smoke[0]))
        timed = [column for column in whole if "seconds" in column]
        pd.testing.assert_frame_equal(killed.drop(columns=timed), whole.drop(columns=timed))
        assert (tmp_path / "killed/smoke" / f"{name}.png").stat().st_size > 5000
    assert not list(tmp_path.glob("killed/runs/*/checkpoint.safetensors"))


def test_what_has_not_changed_is_left_alone_and_what_has_is_made_again(smoke, tmp_path, monkeypatch, capsys):
    results = shutil.copytree(smoke[0], tmp_path / "results")
    again = lambda: (reproduce("smoke", results, ["figure_cells"], device="cpu"), capsys.readouterr().out)[1]
    assert "figure_cells               made" in again(), "results that were moved are other parameters"
    assert "figure_cells               unchanged" in again()
    (results / "smoke/figure_cells.json").write_text("{}")
    assert "figure_cells               made" in again(), "what the notebook wrote has changed"
    output, tier = results / "smoke/figure_cells.ipynb", load_tier("smoke")
    parameters, store = {"tier": "smoke", "results": str(results), "device": "cpu", "rebuild": False}, Store(results)
    key = lambda **other: notebook_key("figure_cells", parameters | other, tier, store)
    assert unchanged(output, key()) and key(device="auto") != key()
    record, before = Store(results).path(key_of(searched_run(tier))), key()
    record.write_text(record.read_text().replace('"finished": "2', '"finished": "3'))
    assert key() != before, "another record"
    before = key()
    monkeypatch.setattr(batch, "package_source", lambda: "another source")
    assert key() != before


def test_a_failed_notebook_is_kept_and_the_others_finish(smoke, tmp_path, monkeypatch, capsys):
    results = shutil.copytree(smoke[0], tmp_path / "results")
    broken = nbformat.read(template_path("figure_cells"), as_version=4)
    broken.cells.append(nbformat.v4.new_code_cell("1 / 0"))
    nbformat.write(broken, tmp_path / "figure_cells.ipynb")

    def path_of(name: str) -> Path:
        return tmp_path / "figure_cells.ipynb" if name == "figure_cells" else template_path(name)

    for module in (batch, templates): monkeypatch.setattr(module, "template_path", path_of)
    (results / "smoke/table_0_benchmark.csv").unlink()
    with pytest.raises(AttnnasError, match="1 of 2 parts failed: figure_cells failed in cell .*ZeroDivisionError"):
        reproduce("smoke", results, ["figure_cells", "table_0_benchmark"], device="cpu")
    assert "figure_cells               FAILED" in (out := capsys.readouterr().out) and "table_0_benchmark          made" in out
    assert "ZeroDivisionError" in (results / "smoke/figure_cells.ipynb").read_text() and (results / "smoke/table_0_benchmark.csv").exists()


def test_mistyped_parameters_end_before_a_kernel_starts(tmp_path):
    with pytest.raises(AttnnasError, match="Unknown parameter.*'teir'.*'tier'"): check_parameters(template_path("figure_cells"), {"teir": "quick"})


@pytest.mark.parametrize("tags", [[], ["parameters", "parameters"]])
def test_a_template_without_its_one_parameters_cell_is_refused(tmp_path, tags):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("tier = 1", metadata={"tags": [tag]}) for tag in tags])
    nbformat.write(notebook, tmp_path / "t.ipynb")
    with pytest.raises(AttnnasError, match=f"{len(tags)} cells tagged"): check_parameters(tmp_path / "t.ipynb", {})
