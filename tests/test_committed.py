"""What lies in results/ is a function of the records in results/runs, to the byte."""
import shutil
from pathlib import Path

import pytest

from attnnas.evidence.batch import reproduce
from attnnas.evidence.config import tiers
from forks import forked_kernels

RESULTS = Path(__file__).parent.parent / "results"
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


def test_every_committed_table_is_rebuilt_somewhere():
    for tier in tiers():
        for path in (RESULTS / tier).glob("*.csv"): assert path.stem.startswith((*MADE.get(tier, []), *OTHERWISE)), path
