"""What lies in results/ is a function of the records in results/runs, to the byte."""
import shutil
from pathlib import Path

import nbformat
import pytest

from attnnas.evidence.batch import reproduce
from attnnas.evidence.config import tiers
from forks import forked_kernels
from test_notebooks import alike

RESULTS = Path(__file__).parent.parent / "results"
PAPER = Path(__file__).parent.parent / "nbs/paper"
MADE = {"quick": ["table_0_benchmark", "table_1_composed", "table_1_nonlocal", "table_2_modalities", "table_3_backbones", "table_4_datasets", "table_6_searches", "figure_composed_attention",
                  "figure_visual_attention", "figure_two_stream"], "full": ["table_1_nonlocal"]}
OTHERWISE = {"ablation_search", "table_5_state_of_the_art"}     # rebuilt in test_experiments.py; counted, not trained


@pytest.mark.parametrize("tier", MADE)
def test_committed_tables_are_rebuilt_from_their_records_to_the_byte(tier, tmp_path, forked_kernels):
    shutil.copytree(RESULTS / "runs", tmp_path / "runs", ignore=shutil.ignore_patterns("*.safetensors", "lock"))
    reproduce(tier, tmp_path, MADE[tier], device="cpu", rebuild=True, show=False)
    committed = [path for path in sorted((RESULTS / tier).iterdir()) if path.suffix in (".csv", ".md")
                 and (path.stem.startswith(tuple(MADE[tier])) or path.stem == "claims")]
    assert len(committed) >= 2 * len(MADE[tier])
    for path in committed: assert (tmp_path / tier / path.name).read_bytes() == path.read_bytes(), path.name
    if tier == "quick": assert {name: stale_cells(name, tmp_path / "quick") for name in MADE[tier]} == dict.fromkeys(MADE[tier], [])


def texts_of(cell) -> list:
    "What a cell printed and wrote as Markdown."
    outputs = cell.get("outputs", [])
    printed = "".join(output["text"] for output in outputs if output.get("name") == "stdout")
    return [printed, *(output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {}))]


def stale_cells(name: str, made: Path) -> list:
    "The cells of a committed template whose outputs are not those of the executed one in the folder `made`."
    committed, fresh = (nbformat.read(folder / f"{name}.ipynb", as_version=4).cells for folder in (PAPER, made))
    fresh = {cell.id: texts_of(cell) for cell in fresh}
    shown = {cell.id: texts_of(cell) for cell in committed if cell.cell_type == "code"}
    needing_weights = {key for key, texts in shown.items() if "trained weights are not in the repository" in "".join(texts)}
    assert any(map(any, shown.values())), f"{name} is committed without outputs"
    return [key for key in shown.keys() - needing_weights
            if len(shown[key]) != len(fresh[key]) or not all(map(alike, shown[key], fresh[key]))]


def test_every_committed_table_is_rebuilt_somewhere():
    for tier in tiers():
        for path in (RESULTS / tier).glob("*.csv"): assert path.stem.startswith((*MADE.get(tier, []), *OTHERWISE)), path
