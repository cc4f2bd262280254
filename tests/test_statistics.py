"""What tables conclude: intervals, verdicts and p-values against numbers known by hand, and costs that are costs."""
import dataclasses
import itertools
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from attnnas.core.errors import AttnnasError
from attnnas.core.variance import two_way
from attnnas.evidence.ablation import ablation_frame, ablation_plan, clips_note, finalists
from attnnas.evidence.ablation_tables import (accuracies, best_runs, chance_table, duel_table, duels, found_table, luck_table,
                                              rank_text)
from attnnas.evidence.config import load_tier
from attnnas.evidence.executor import execute
from attnnas.evidence.registry import planned
from attnnas.evidence.run import search_result, training_cost
from attnnas.evidence.store import Store
from attnnas.evidence.tables.rows import Row, cpu_seconds, in_trainings, note_of, own_seconds, seconds_note
from attnnas.evidence.tables.statistics import (family_note, holm, interval, p_above, rank_correlation, share, shares_differ,
                                                verdicts)
from attnnas.evidence.tables.table import BACKBONE, DERIVED, Pair, sentences
from attnnas.search.tabular import TabularBenchmark

ROOT = Path(__file__).parent.parent
STORE = Store(ROOT / "results")


# ---- two-way analysis

def by_definition(values) -> tuple:
    "Variances of rows, columns and the rest of a full table, from its mean squares."
    rows, columns = values.shape
    rest = values - values.mean(1, keepdims=True) - values.mean(0) + values.mean()
    left = (rest**2).sum() / ((rows - 1) * (columns - 1))
    return (columns * values.mean(1).var(ddof=1) - left) / columns, (rows * values.mean(0).var(ddof=1) - left) / rows, left


def test_a_full_table_is_analysed_as_by_definition():
    values = np.random.default_rng(1).normal(size=(7, 4)) + 3 * np.arange(7)[:, None] + 5 * np.arange(4)
    found = two_way(values)
    assert np.allclose((found.rows**2, found.columns**2, found.residual**2), by_definition(values))
    assert found.degrees == 18
    turned = two_way(values.T)
    assert np.allclose((turned.columns, turned.rows, turned.residual), (found.rows, found.columns, found.residual))


def test_what_moves_all_rows_alike_is_not_chance():
    "If this fails, a seed that is lucky for all cells counts as noise of each."
    values = np.random.default_rng(2).normal(size=(6, 3))
    assert np.isclose(two_way(values + [0, 100, -300]).residual, two_way(values).residual)
    assert np.isclose(two_way(values + [0, 100, -300]).p, two_way(values).p)


def test_missing_numbers_are_left_out_of_the_fit():
    "The residual is that of least squares with indicators of rows and columns, written out."
    values = np.random.default_rng(3).normal(size=(9, 4))
    values[[0, 3, 3, 8], [1, 0, 2, 3]] = np.nan
    row, column = np.nonzero(~np.isnan(values))
    design = np.hstack([np.eye(9)[row], np.eye(4)[column]])
    fitted = design @ np.linalg.lstsq(design, values[row, column])[0]
    left = ((values[row, column] - fitted)**2).sum() / (32 - 12)
    found = two_way(values)
    assert found.degrees == 20 and np.isclose(found.residual**2, left)
    assert np.isclose(two_way(np.vstack([values, np.full(4, np.nan)])).residual, found.residual), "a row of no numbers counts"


@pytest.mark.parametrize("values", [[[1., 2., 3.]], [[1.], [2.]], [[1., np.nan], [np.nan, 2.]], [[np.nan, np.nan]]])
def test_too_few_numbers_leave_nothing_to_chance(values):
    with pytest.raises(AttnnasError, match="at least two rows and two columns"): two_way(values)


def finals(tier: str, seeds=None) -> dict:
    "{(data, contestant): {seed: percent}} of the committed finalists, with the tier's seeds or others."
    setting = load_tier(tier)
    plan = ablation_plan(setting)
    best = best_runs(plan, ablation_frame(plan, execute(plan.values(), STORE, rebuild=True)))
    runs = finalists(setting, best)
    if seeds: runs = {name: [dataclasses.replace(run, seed=seed) for seed in seeds] for name, run in best.items()}
    return accuracies({name: execute(group, STORE, rebuild=True) for name, group in runs.items()})


def test_seeds_move_finalists_together():
    "The residual of committed finalists, all five seeds: 2.5 (1.5 to 7.3) on A, 1.0 (0.6 to 2.8) on B."
    known = finals("ablation", range(5))
    for data, numbers in {"A": (2.53, 1.51, 7.26), "B": (0.97, 0.58, 2.79)}.items():
        found = two_way(pd.DataFrame([known[data, name] for name in ("found", "random")]))
        assert np.allclose((found.residual, found.low, found.high), numbers, atol=.01) and found.degrees == 4


def test_the_noise_of_the_committed_table_is_what_cell_and_seed_do_not_explain():
    noise = TabularBenchmark.load(ROOT / "results/tabular/composed-place-relation.json.gz").noise["test"]
    assert (round(noise.residual, 1), round(noise.rows, 1), round(noise.columns, 1)) == (9.7, 22.3, 0.0)
    assert noise.p < 1e-20


# ---- verdicts

def differences(t: float, count: int = 5) -> list:
    "Differences whose mean is `t` standard errors above zero."
    draw = np.arange(count) - (count - 1) / 2
    return list(draw / draw.std(ddof=1) + t / count**.5)


def test_a_verdict_is_corrected_for_how_many_were_made():
    "t = 4 with five seeds is p = 0.016: it holds alone and as one of three, and not as one of four."
    for others, verdict in ((0, "held"), (2, "held"), (3, "undecided")):
        family = [differences(4), *[differences(0.1)] * others]
        assert verdicts(family)[0].verdict == verdict
        assert verdicts(reversed(family))[-1].verdict == verdict
    down = [-value for value in differences(4)]
    assert [finding.verdict for finding in verdicts([down, differences(9)])] == ["not held", "held"]


def test_a_single_difference_is_no_verdict_and_does_not_count():
    found = verdicts([[5.0], differences(4), [1.0], [2.0], [3.0]])
    assert [finding.verdict for finding in found] == ["undecided", "held", *["undecided"] * 3]
    assert found[0].low is None and found[0].spread == ""
    assert family_note(found) == "1 verdict: it takes a 95 % interval without zero."
    assert verdicts([]) == [] and "No verdict" in family_note([])


def test_the_interval_stays_that_of_one_difference():
    for finding in verdicts([differences(2), differences(4)]):
        assert (finding.low, finding.high) == interval(differences(2 if finding.mean < 1 else 4))


def test_holm_is_as_published():
    "Holm 1979: the smallest p times m, the next times m - 1, and never less than one before it."
    assert np.allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, None, 0.8]) == [1.0, None, 1.0]


def test_equal_differences_are_clear():
    assert [verdicts([[value] * 3])[0].verdict for value in (2.0, 0.0, -2.0)] == ["held", "undecided", "not held"]


def made_up(model: str, *tops, kind="A"):
    def values(group="all", metric="top1"): return dict(enumerate(tops))
    return SimpleNamespace(data=kind, backbone="i3d_small", model=model, values=values, records=())


def test_a_table_says_how_many_verdicts_it_made():
    "If this fails, a table that asks many questions prints the chance findings among them as held."
    rows = []
    for data in "ABCD":
        rows += [made_up("backbone", *[70.0] * 5, kind=data), made_up("derived cell", *np.add(differences(4 * (data == "A")), 70), kind=data)]
    pairs = (Pair(DERIVED.name, BACKBONE.name),)
    alone = sentences(rows[:2], pairs)
    together = sentences(rows, pairs)
    assert "**held**" in alone[0] and alone[-1].startswith("1 verdict:")
    assert "**undecided**" in together[0] and together[-1].startswith("4 verdicts, corrected for their number")
    assert "a 98.75 % interval" in together[-1]


# ---- shares, ranks

def test_shares_have_the_intervals_of_clopper_and_pearson():
    "Known: 5 of 5 is at least 47.8 %, 0 of 5 at most 52.2 %, 4 of 20 is 5.7 to 43.7 %."
    assert np.allclose(share(5, 5), (1, .47818, 1), atol=1e-5) and np.allclose(share(0, 5), (0, 0, .52182), atol=1e-5)
    assert np.allclose(share(4, 20), (.2, .05733, .43661), atol=1e-5)
    for k, n in ((6, 5), (-1, 5), (0, 0), (.5, 2)):
        with pytest.raises(AttnnasError, match="is no share"): share(k, n)


def test_shares_are_compared_by_fishers_exact_test():
    "The lady tasting tea: three of four against one of four is p = 34/70."
    assert np.isclose(shares_differ(3, 4, 1, 4), 34 / 70) and np.isclose(shares_differ(5, 5, 0, 5), 2 / 252)
    assert shares_differ(5, 5, 5, 5) == 1
    with pytest.raises(AttnnasError, match="is no share"): shares_differ(1, 2, 3, 2)


def test_ranks_are_compared_exactly_with_ties_and_without():
    "Against all ways to choose which of the numbers are ours, written out."
    for ours, theirs in (([3., 5., 8., 9.], [1., 2., 4., 6., 7.]), ([3., 5., 5., 9.], [1., 5., 4., 3., 7.])):
        both = np.array(ours + theirs)
        above = lambda some: sum((a > b) + (a == b) / 2 for a in both[list(some)] for b in np.delete(both, list(some)))
        ways = [above(some) for some in itertools.combinations(range(9), 4)]
        assert np.isclose(p_above(ours, theirs), np.mean(np.array(ways) >= above(range(4))))


def test_three_points_have_no_p_value():
    assert p_above([7., 8., 9.], range(16)) is None and p_above(range(16), [7., 8., 9.]) is None
    assert rank_correlation([1, 2, 3], [1, 2, 3])[1] is None
    rho, p = rank_correlation([1, 2, 3, 4, 5], [2, 1, 3, 4, 5])
    assert np.isclose(rho, .9) and np.isclose(p, 2 * 5 / 120), "1 + 4 of the 120 orders are as close"
    for path in (ROOT / "results").glob("*/ablation_search.md"):
        for line in path.read_text(encoding="utf-8").splitlines():
            if " cells." in line and "rho" in line: assert ("(p" in line) == (int(line.split()[-2]) > 3)
            cells = [cell.strip() for cell in line.split("|")]
            if len(cells) == 10 and cells[3] in ("1", "2", "3"): assert cells[6] == cells[7] == ""


# ---- costs

def record_of(tier: str, *what, **options):
    return execute([load_tier(tier).run(*what, **options)], STORE, rebuild=True)[0]


def test_seconds_are_costs_where_nothing_else_was_in_the_way():
    "If this fails, a table says that a derived cell costs less than the plain backbone, because they shared a GPU."
    on_gpu = record_of("full", "A", "i3d_small", "none", 0)
    alone = record_of("quick", "A", "i3d_small", "none", 0)
    assert own_seconds(on_gpu) is None and own_seconds(alone) == alone.seconds["cpu"]
    for seconds, fields in (({"cpu": 89.0, "wall": 100.0}, {}), ({"cpu": 100.0, "wall": 100.0}, {"threads": 2}),
                            ({"cpu": 100.0, "wall": 100.0}, {"processes": 2}), ({"cpu": 100.0, "wall": 100.0}, {"device": "mps (M3)"})):
        assert own_seconds(dataclasses.replace(alone, seconds=seconds, **fields)) is None
    assert own_seconds(dataclasses.replace(alone, seconds={"cpu": 90.0, "wall": 100.0})) == 90.0
    assert cpu_seconds(Row("A", "i3d_small", "backbone", (alone, on_gpu))) is None, "one of two is not known"
    other_day = dataclasses.replace(alone, source="another")
    assert cpu_seconds(Row("A", "i3d_small", "backbone", (alone, alone))) == alone.seconds["cpu"]
    assert cpu_seconds(Row("A", "i3d_small", "backbone", (alone, other_day))) is None, "two batches"
    assert seconds_note([1.0, 2.0]) == "" and "multiply-adds" in seconds_note([1.0, None])


def test_a_search_is_counted_in_multiply_adds_of_a_training():
    "1 forward, 2 backward a trained clip, 1 a validation clip: the ratio of the networks where clips and epochs are equal."
    search = record_of("full", "A", "i3d_small", "search", 0)
    plain = Row("A", "i3d_small", "backbone", tuple(record_of("full", "A", "i3d_small", "none", seed) for seed in (0, 1)))
    assert training_cost(plain.records[0]) == round(plain.records[0].gflops * 1e9 / 2) * 6 * (3 * 6000 + 500)
    assert training_cost(search) == search_result(search).multiply_adds
    found = in_trainings(search, plain)
    assert found.multiply_adds == pytest.approx(search.gflops / plain.records[0].gflops) and found.seconds is None
    diverged = dataclasses.replace(plain.records[0], status="diverged", test=None, history=[])
    assert in_trainings(search, dataclasses.replace(plain, records=(diverged,))) is None


def test_committed_tables_print_seconds_of_processors_alone():
    full = pd.read_csv(ROOT / "results/full/table_1_nonlocal.csv")
    assert full.cpu_seconds.isna().all() and full.gflops.notna().all()
    assert "CPU-s are empty" in (ROOT / "results/full/table_1_nonlocal.md").read_text(encoding="utf-8")
    quick = pd.read_csv(ROOT / "results/quick/table_1_nonlocal.csv").set_index("model")
    assert quick.cpu_seconds.isna().sum() == 1 and pd.isna(quick.cpu_seconds["derived cell"]), "its searches are of two batches"
    ablation = pd.read_csv(ROOT / "results/ablation/ablation_search.csv")
    assert ablation.multiply_adds.notna().all() and 0 < ablation.cpu_seconds.isna().sum() < len(ablation)


# ---- finalists, and what is carried along

def with_finalists(seeds) -> object:
    tier = load_tier("ablation")
    section = tier.templates["ablation_search"] | {"finalist_seeds": seeds}
    return dataclasses.replace(tier, templates={"ablation_search": section})


@pytest.mark.parametrize("seeds", [[0, 1, 2], [3, 0], [1, 1]])
def test_the_seed_of_the_choice_is_refused_before_anything_runs(seeds):
    "If this fails, a cell that was chosen for its luck with a seed is compared by that seed."
    with pytest.raises(AttnnasError, match="finalist_seeds of tier ablation.*from 1 on"): planned(with_finalists(seeds), ["ablation_search"])
    with pytest.raises(AttnnasError, match="finalist_seeds"): finalists(with_finalists(seeds), {})
    assert planned(with_finalists([1, 5]), ["ablation_search"])


def test_committed_finalists_are_compared_without_the_seed_of_their_choice():
    "A: +1.2 (-5.2 to +7.6), one cell moves by 3.3 over seeds; with the seed of the choice it was +1.6 and 4.9."
    known = finals("ablation")
    assert all(list(group) == [1, 2, 3, 4] for group in known.values())
    found = duels(known)["A"]
    assert (found.count, round(found.mean, 1), found.spread, found.verdict) == (4, 1.2, "-5.2 to +7.6", "undecided")
    frame = pd.DataFrame({"data": ["A", "B"] * 2, "kind": "space", "top1": [80., 70., 82., 72.]})
    assert list(luck_table(frame, known)["one cell, other seeds"]) == ["3.3", "4.8"]


def test_the_committed_text_of_the_ablation_is_that_of_its_records(tier="ablation"):
    text = (ROOT / f"results/{tier}/ablation_search.md").read_text(encoding="utf-8")
    setting = load_tier(tier)
    plan = ablation_plan(setting)
    frame = ablation_frame(plan, execute(plan.values(), STORE, rebuild=True))
    known = finals(tier)
    ranks = pd.read_csv(ROOT / f"results/{tier}/ablation_search_ranks.csv")
    for table in (found_table(frame), chance_table(frame), duel_table(known), luck_table(frame, known)):
        assert table.to_markdown(index=False) in text
    for said in (clips_note(setting), family_note(duels(known).values()), rank_text(ranks)):
        assert said in text


def test_fewer_clips_than_the_backbone_needs_are_said():
    assert clips_note(load_tier("ablation")) == ("On B, networks are trained on 3,000 clips, where the quick tier takes 4,500 to "
                                                 "train the backbone enough.")
    assert clips_note(load_tier("full")) == "" and "64 clips" in clips_note(load_tier("smoke"))


def test_claims_carry_the_notes_of_their_rows():
    "If this fails, claims.md says of networks that were hardly trained what their table would not say."
    claims = (ROOT / "results/quick/claims.md").read_text(encoding="utf-8")
    lines = {line.split("|")[1].strip(): line for line in claims.split("###")[0].splitlines() if line.startswith("|")}
    table = pd.read_csv(ROOT / "results/quick/table_2_modalities.csv").set_index("model")
    assert table.note["derived cell"] == "not trained enough" and "one search" not in claims
    assert "(not trained enough)" in lines["a cell searched on colours helps on optical flow"]
    assert "(not trained enough)" not in lines["a searched cell is better than nothing"]
    assert note_of(made_up("backbone", 84.9, 84.9)) == "not trained enough" and note_of(made_up("backbone", 85.0, 85.0)) == ""
    verdicts_made = len(re.findall(r"[+-]\d+\.\d\) (?:held|not held|undecided)", claims))
    assert f"{verdicts_made} verdicts, corrected for their number" in claims
