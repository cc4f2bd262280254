"""Evidence: tables are functions of records, and a plan says all runs before any has run."""
import dataclasses
import itertools
import re
from pathlib import Path

import pandas as pd
import pytest

from attnnas.core.errors import AttnnasError
from attnnas.evidence.config import RunConfig, load_tier, tiers
from attnnas.evidence.executor import execute
from attnnas.evidence.insertions import Insertion
from attnnas.evidence.registry import EVIDENCE, planned
from attnnas.evidence.claims import TABLES
from attnnas.evidence.run import run
from attnnas.evidence.sources import Generated
from attnnas.evidence.store import Store
from attnnas.evidence.tables.figures import searched_run
from attnnas.evidence.tables.published import published
from attnnas.evidence.tables.rows import Row, check_comparable, collect
from attnnas.evidence.tables.state_of_the_art import found_cell, printed_budget
from attnnas.training.loop import TrainingConfig

ROOT = Path(__file__).parent.parent
DATA = Generated(frames=4, size=16, train_clips=16, validation_clips=8, test_clips=12)
TRAINING = TrainingConfig(epochs=1, batch_size=8)


def config(insertion=Insertion(), **changes) -> RunConfig:
    return RunConfig(data=DATA, insertion=insertion, training=TRAINING, **changes)


def test_a_diverged_run_is_recorded_and_shown_as_such(tmp_path):
    wild = dataclasses.replace(config(), training=TrainingConfig(epochs=3, batch_size=8, optimizer="sgd", learning_rate=1e8, clip_norm=1e9))
    record = run(wild, Store(tmp_path), "cpu")
    assert record.status == "diverged" and record.test is None and "epoch" in record.reason
    frame = TABLES["table_1_nonlocal"].comparison([Row("A", "i3d_small", "backbone", (record,))], ROOT / "results/reference")
    assert frame.loc[0, "note"] == "1 of 1 diverged" and frame.loc[0, "seeds"] == 0 and frame["top1"].isna().all()


def test_tables_of_unequal_rows_are_refused(tmp_path):
    store = Store(tmp_path)
    records = [run(config(seed=seed), store, "cpu") for seed in (0, 1)]
    longer = run(dataclasses.replace(config(), training=TrainingConfig(epochs=2, batch_size=8)), store, "cpu")
    plain = Row("A", "i3d_small", "backbone", (records[0],))
    for other, message in ((longer, "training recipe"), (records[1], "seeds"),
                           (dataclasses.replace(records[0], numbers=0), "numbers")):
        with pytest.raises(AttnnasError, match=message): check_comparable([plain, Row("A", "i3d_small", "non-local", (other,))])
    check_comparable([plain, plain])


@pytest.mark.parametrize("name", tiers())
def test_every_tier_is_legal_and_plans_runs(name):
    assert planned(load_tier(name))


def test_wrong_tiers_are_named(tmp_path):
    path = tmp_path / "mine.toml"
    for text, message in (("[datas]\n", "Unknown section"), ("[data\n", "not TOML"), ("[data]\nframe = 3\n[templates.figure_cells]\n"
                          'data = "A"\nbackbone = "i3d_small"\nsearch_seed = 0\n', "Unknown field.*frames")):
        path.write_text(text)
        with pytest.raises(AttnnasError, match=message): planned(load_tier(str(path)))
    with pytest.raises(AttnnasError, match="Could not read"): load_tier(str(tmp_path / "none.toml"))


def test_committed_tables_are_rebuilt_from_the_committed_records_to_the_byte(tmp_path):
    "results/quick/table_1_nonlocal.csv holds nothing that is not in results/runs."
    tier = load_tier("quick")
    plan = TABLES["table_1_nonlocal"].plan(tier)
    records = iter(execute([c for runs in plan.values() for c in runs], Store(ROOT / "results"), rebuild=True))
    rows = [Row(*name, tuple(next(records) for _ in runs)) for name, runs in plan.items()]
    check_comparable(rows)
    from attnnas.evidence.tables.text import write_table
    path = write_table(tmp_path, "table", TABLES["table_1_nonlocal"].comparison(rows, ROOT / "results/reference"), "")[0]
    assert path.read_bytes() == (ROOT / "results/quick/table_1_nonlocal.csv").read_bytes()


def test_the_committed_ablation_is_rebuilt_from_the_committed_records_to_the_byte(tmp_path, tier="ablation"):
    "results/<tier>/ablation_search.csv holds nothing that is not in results/runs."
    from attnnas.evidence.ablation import ablation_frame, ablation_plan
    from attnnas.evidence.tables.text import write_table
    plan = ablation_plan(load_tier(tier))
    frame = ablation_frame(plan, execute(plan.values(), Store(ROOT / "results"), rebuild=True))
    assert write_table(tmp_path, "table", frame, "")[0].read_bytes() == (ROOT / f"results/{tier}/ablation_search.csv").read_bytes()


# ---- tables 1 to 4

@pytest.mark.parametrize("table,data,backbone,model,top1,delta", [
    ("table_1_nonlocal", "A", "i3d_small", "derived cell", 77.86, 2.28), ("table_1_nonlocal", "B", "s3d", "non-local", 29.52, 1.83),
    ("table_2_modalities", "data/mit", "i3d", "derived cell", 21.94, 1.93), ("table_2_modalities", "A", "s3d_small", "backbone", 62.46, None),
    ("table_3_backbones", "A", "i3d_r50", "cell from i3d", 79.83, 1.73), ("table_3_backbones", "B", "s3d_small", "cell from i3d_small", 29.67, 1.98),
    ("table_3_backbones", "A", "i3d_r50", "backbone", 78.10, None), ("table_3_backbones", "A", "i3d_small", "derived cell", None, None),
    ("table_4_datasets", "A", "i3d_small", "cell from B", 77.85, 2.27), ("table_4_datasets", "B", "s3d_small", "cell from A", 29.33, 1.64),
    ("table_4_datasets", "B", "i3d_small", "derived cell", None, None), ("table_1_nonlocal", "A", "i3d_small", "random cell", None, None),
    ("table_1_nonlocal", "A", "c3d", "backbone", None, None)])
def test_published_numbers_stand_beside_the_rows_that_are_theirs(table, data, backbone, model, top1, delta):
    found = TABLES[table].published.cells(published(ROOT / "results/reference", table), Row(data, backbone, model, ()))
    assert found["published_top1"] == top1 and bool(found["published"]) == (top1 is not None)
    assert found["published_delta_top1"] == delta or delta is None and found["published_delta_top1"] != found["published_delta_top1"] or top1 is None


def test_a_missing_published_row_is_named():
    reference = published(ROOT / "results/reference", "table_3_backbones")
    gone = reference[reference["cell_searched_on"] != "S3D"]
    with pytest.raises(AttnnasError, match="no row I3D-R50, cell_searched_on S3D"):
        TABLES["table_3_backbones"].published.cells(gone, Row("A", "i3d_r50", "cell from s3d", ()))


def test_a_cell_from_elsewhere_is_searched_there_and_on_colours():
    "Table 2's searches see colours; table 3's the other backbone; table 4's the other data set: and all else is the row's."
    tier = load_tier("full")
    flow = TABLES["table_2_modalities"].plan(tier)["B", "s3d_small", "derived cell"][1]
    assert flow.data.modality == "flow" and flow.insertion.search == tier.run("B", "s3d_small", "search", 1)
    moved = TABLES["table_3_backbones"].plan(tier)["A", "i3d_r50", "cell from s3d_small"][4]
    assert moved.insertion.search == tier.run("A", "s3d_small", "search", 1) and moved.network.options == {"width": 8, "dropout": 0.0}
    other = TABLES["table_4_datasets"].plan(tier)["B", "i3d_small", "cell from A"][0]
    assert other.insertion.search == tier.run("A", "i3d_small", "search", 0) and other.data.name == "B"
    shared = [len({run.hash for run in planned(tier, names)}) for names in (["table_1_nonlocal"], ["table_1_nonlocal", "table_4_datasets"])]
    assert shared == [100, 120], "only the moved cells are new in table 4"


def test_rows_without_records_are_named_when_a_table_is_rebuilt(tmp_path):
    "And nothing is run for them."
    plan = TABLES["table_1_nonlocal"].plan(load_tier("quick"))
    extra = {("B", "s3d_small", "backbone"): [load_tier("quick").run("B", "s3d_small", "none", 77)]}
    rows, searches, missing = collect(plan | extra, Store(ROOT / "results"), rebuild=True)
    assert missing == list(extra) and len(rows) == len(plan) and len(searches) == 3
    with pytest.raises(AttnnasError, match="no records of this table"): collect(extra, Store(tmp_path), rebuild=True)


def test_a_finished_record_without_a_number_is_refused():
    row = collect(TABLES["table_1_nonlocal"].plan(load_tier("quick")), Store(ROOT / "results"), rebuild=True)[0][0]
    bad = dataclasses.replace(row.records[0], test=row.records[0].test | {"top1": float("nan")})
    with pytest.raises(AttnnasError, match=f"Record {bad.key} of row 'backbone' on A is finished with accuracy nan"):
        check_comparable([dataclasses.replace(row, records=(bad, *row.records[1:]))])


def test_the_readme_says_no_more_than_its_tables():
    "If this fails, the README's sentences on results and the committed tables tell different stories."
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert "all lift the backbone by 23 to 24 points" in text
    full = pd.read_csv(ROOT / "results/full/table_1_nonlocal.csv").set_index("model")["top1"]
    lifts = (full.drop("backbone") - full["backbone"]).round()
    assert len(lifts) == 4 and set(lifts) == {23, 24}
    claims = (ROOT / "results/quick/claims.md").read_text(encoding="utf-8").splitlines()
    elsewhere = [line for line in claims if " helps" in line]
    places = re.findall(r"seeds: ([+-][\d.]+) \([^)]*\) (held|not held|undecided)", " ".join(elsewhere))
    means = [round(float(mean)) for mean, _ in places]
    clear = sum(verdict == "held" for _, verdict in places)
    assert len(elsewhere) == 3 and f"on average {min(means)} to {max(means)} points better than no cell" in text
    assert f"this is clear in {clear} of {len(places)} places" in text
    duels = _lines_below("found above random", "results/ablation/ablation_search.md")
    assert len(duels) == 2 and all((line[2], line[7]) == ("4", "undecided") for line in duels)
    (_, _, _, _, a, _, cells_of_a, _), (_, _, _, _, b, _, cells_of_b, _) = _lines_below("other cells", "results/ablation/ablation_search.md")
    assert f"{a} points on A and {b} on B, where cells at one seed lie {cells_of_a} and {cells_of_b} apart" in text


def test_table_5_counts_the_cell_that_was_found_and_the_one_within_the_budget():
    "If this fails, the last row of table 5 is not of the cells that its note names, or its cell within the budget is over it."
    search, = execute([searched_run(load_tier("quick"))], Store(ROOT / "results"), rebuild=True)
    budget = printed_budget(ROOT / "results/reference")
    assert budget.most == 48e9 and len(budget.sites) == 5
    found = {"as found": found_cell(search), "within +96 GFLOPs": found_cell(search, budget)}
    assert [budget.fits(cell) for cell in found.values()] == [False, True]
    rows = pd.read_csv(ROOT / "results/quick/table_5_state_of_the_art.csv").dropna(subset="cell")
    said = (ROOT / "results/quick/table_5_state_of_the_art.md").read_text(encoding="utf-8")
    halves = [rows for _, rows in rows.groupby("half")]
    assert len(halves) == 2 and all(half.cell.tolist() == list(found) for half in halves)
    for counted, cell in zip(halves[0].itertuples(), found.values()):
        assert counted.multiply_adds == budget.whole + budget.cost(cell)
        assert f"({cell.hash}: {cell}) adds {2 * budget.cost(cell) / 1e9:.1f} GFLOPs" in said
    costs = [f"{cost:,.0f}" for cost in halves[0].counted]
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"I3D-R50 costs {costs[0]} GFLOPs instead of the published 1,034" in readme
    assert f"within the 96 GFLOPs of the talk's cells, {costs[1]}." in readme


def test_the_readme_says_what_the_composed_tasks_say():
    "If this fails, the first sentences on results and the committed table tell different stories."
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    table = pd.read_csv(ROOT / "results/quick/table_1_composed.csv")
    runs = table.groupby("model")[["solved", "runs"]].sum()
    without = ["backbone", "backbone, MLP head", "non-local", "two non-local blocks"]
    assert runs.loc[without, "solved"].sum() == 0 and "solves either of them in any of six runs" in text and set(table.runs) == {6}
    assert f"the cells of {runs.solved['derived cell']} of {runs.runs['derived cell']} searches do" in text
    assert f"of random cells of that size {runs.solved['random cell']} of {runs.runs['random cell']} do" in text
    found = [line for line in (ROOT / "results/quick/table_1_composed.md").read_text(encoding="utf-8").splitlines() if "searches found" in line]
    place, moment = (re.findall(r"(spatial|temporal|spatiotemporal) (?:dot-product|map-based)(?:, then| \()", line)[0] for line in found)
    assert (place, moment) == ("spatial", "temporal") and all(len(re.findall("solved it", line)) == 1 for line in found)
    solved = table.set_index(["data", "model"]).solved
    assert solved["composed-place-relation", "spatial alone"] == solved["composed-moment-relation", "temporal alone"] == 6
    searches = pd.read_csv(ROOT / "results/quick/table_6_searches.csv").set_index("search")
    found, chance = searches.loc["differentiable"], searches.loc["random"]
    assert chance.trainings == 4 and "searches of four cells each" in text
    assert (f"in {chance.solved} of {chance.searches} searches of four cells each, against {found.solved} of {found.searches} "
            "differentiable ones") in text
    told = (ROOT / "results/quick/table_6_searches.md").read_text(encoding="utf-8")
    solving = int(re.search("of 36 cells, (\\d+) solve it with every seed", told)[1])
    assert 1 / 4 < solving / 36 < 5 / 12 and "a third of all chains of two operations solve that task" in text
    assert all("undecided" in line for line in told.splitlines() if "solves it more often than" in line)
    told = (ROOT / "results/quick/figure_composed_attention.md").read_text(encoding="utf-8")
    counts = re.findall(r"operation (\d) tells .* in (\d) of 6; .* in (\d) of 6", told)
    badges = sum(int(count) for number, _, count in counts if number == "2")
    target = sum(int(count) for number, count, _ in counts if number == "1")
    assert f"tells badges from pictures by a factor of two in {badges} of 12 runs" in text
    assert f"from the decoys' in {target} of 12" in text


def _lines_below(head: str, path: str) -> list:
    "The cells of each line of the committed table that has a column `head`."
    lines = itertools.dropwhile(lambda line: head not in line or "|" not in line, (ROOT / path).read_text(encoding="utf-8").splitlines())
    table = list(itertools.takewhile(bool, lines))
    return [[cell.strip() for cell in line.split("|")] for line in table[2:]]
