"""Search against search: a space of chains, black-box searches of a tabular benchmark, shares at equal cost."""
import dataclasses
import math

import numpy as np
import pandas as pd
import pytest

from attnnas.cells.derivation import random_cell
from attnnas.cells.space import SearchSpace
from attnnas.cells.spec import CellSpec
from attnnas.core.errors import AttnnasError
from attnnas.evidence.claims import TABLES, searching_line
from attnnas.evidence.config import load_tier
from attnnas.evidence.registry import planned
from attnnas.evidence.tables.table_6_searches import (
    METHODS, black_box, compare_searches, needed_sentence, table_6_searches)
from attnnas.search.tabular import TabularBenchmark, different_cells, run_of

CHAINS = SearchSpace(2, 16, activations=["fixed"], chain=True)


# ---- chains

@pytest.mark.parametrize("operations", [1, 2, 3])
def test_every_chain_has_a_number_and_moves_stay_in_the_space(operations):
    space = SearchSpace(operations, 16, activations=["fixed"], chain=True)
    cells = list(space)
    assert len(cells) == space.size == len(different_cells(space)) == 6 ** operations
    for number, cell in enumerate(cells):
        assert cell.outputs == (operations,) and cell.inputs == tuple((k,) for k in range(operations))
        assert space.index(cell) == number and space.decode(space.encode(cell)) == cell
        near = space.neighbours(cell)
        assert len(near) == 3 * operations and all(cell in space.neighbours(other) for other in near)
    assert space.sample(5) in space and space.mutate(cells[0], 1) in space.neighbours(cells[0])


def test_cells_that_are_derived_with_one_output_and_one_predecessor_are_chains():
    drawn = [random_cell(seed, levels=2, alpha=1, beta=1, width=16).cell for seed in range(40)]
    sizes = {len(cell.operations) for cell in drawn}
    fixed = [dataclasses.replace(cell, operations=tuple(
        dataclasses.replace(operation, activation={"map-based": "sigmoid", "dot-product": "softmax"}[operation.type])
        for operation in cell.operations)) for cell in drawn]
    assert sizes <= {1, 2} and all(cell in SearchSpace(len(cell.operations), 16, activations=["fixed"], chain=True) for cell in fixed)


def test_what_is_no_chain_is_refused():
    parallel = CellSpec(CHAINS[0].operations, ((0,), (0,)), None, 16)
    skipping = CellSpec(CHAINS[0].operations, ((0,), (0, 1)), (2,), 16)
    for cell in (parallel, skipping, dataclasses.replace(CHAINS[0], width=8)):
        assert cell not in CHAINS
        with pytest.raises(AttnnasError, match="not one of .*the last operation an output"): CHAINS.encode(cell)
    assert CHAINS[0] not in SearchSpace(2, 16, activations=["fixed"]) and parallel in SearchSpace(2, 16, activations=["fixed"])


def test_a_table_of_a_space_that_knew_no_chains_is_read():
    "The committed tables of before have no such field."
    from attnnas.core.options import from_fields
    values = dataclasses.asdict(SearchSpace(2, 16))
    assert not values.pop("chain") and from_fields(SearchSpace, values) == SearchSpace(2, 16)


# ---- searches of a benchmark

def benchmark(right: int, seeds: int = 3) -> TabularBenchmark:
    "All chains, of which the first `right` in a mixed order solve the task with every seed."
    cells = list(different_cells(CHAINS).values())
    order = np.random.default_rng(0).permutation(len(cells))
    runs = [run_of(CHAINS, cells[place], seed, *2 * [100. if rank < right else 50.], seconds=1., multiply_adds=1)
            for rank, place in enumerate(order) for seed in range(seeds)]
    return TabularBenchmark(CHAINS, tuple(runs), {})


def test_a_search_has_solved_the_task_from_the_first_cell_that_does():
    curves = black_box(benchmark(6), trials=6, repeats=2)
    assert len(curves) == len(METHODS) * 3 * 2 * 6 and list(curves.method.unique()) == ["random", "evolution", "bandit"]
    for _, search in curves.groupby(["method", "search"]):
        assert search.solved.is_monotonic_increasing and (search.regret == np.where(search.solved, 0, 50)).all()
    pd.testing.assert_frame_equal(curves, black_box(benchmark(6), trials=6, repeats=2))
    longer = black_box(benchmark(6), trials=8, repeats=2)
    pd.testing.assert_frame_equal(curves, longer[longer.trials <= 6].reset_index(drop=True))


def test_chance_is_what_counting_says():
    "Of four different cells of 36, one of nine that are right is among them with probability 0.70."
    curves = black_box(benchmark(9), trials=4, repeats=20)
    last = curves[(curves.trials == 4) & (curves.method == "random")]
    expected = 1 - np.prod([(27 - k) / (36 - k) for k in range(4)])
    assert len(last) == 60 and abs(last.solved.mean() - expected) < 4 * np.sqrt(expected * (1 - expected) / 60)


def test_trainings_until_nine_of_ten_are_said_or_that_they_are_more():
    curves = pd.DataFrame([{"method": name, "search": search, "trials": trial, "solved": trial >= first, "regret": 0.}
                           for name, first in (("random", 5), ("bandit", 2)) for search in range(10) for trial in (1, 2, 3)])
    assert needed_sentence(curves, "d") == "d: trainings until 90% of the searches solve it: random more than 3, bandit 2."


# ---- verdicts

def lines(*solved) -> pd.DataFrame:
    names = ("differentiable", "random", "evolution", "bandit")
    return pd.DataFrame([{"data": "d", "search": name, "trainings": 4., "searches": n, "solved": k, "share": k / n}
                         for name, (k, n) in zip(names, solved)])


def test_shares_are_compared_exactly_and_corrected_for_how_many():
    found = compare_searches(lines((10, 10), (6, 15), (6, 15), (15, 15)))
    assert [one.worse for one in found] == ["random", "evolution", "bandit"]
    # Sixteen of 25 solve it. Ten, one and two of them among our ten are as rare as what was seen, or rarer.
    ways = sum(math.comb(10, k) * math.comb(15, 16 - k) for k in (10, 1, 2))
    alone = ways / math.comb(25, 16)
    assert found[0].p == pytest.approx(found[1].p) and found[0].p == pytest.approx(3 * alone)
    assert [one.verdict for one in found] == ["held", "held", "undecided"]
    assert [one.verdict for one in compare_searches(lines((0, 10), (15, 15)))] == ["not held"]
    assert searching_line(found)["verdict"] == "undecided" and searching_line([])["verdict"] == "not run"


def test_without_a_benchmark_there_are_the_differentiable_searches_alone():
    assert compare_searches(lines((10, 10))) == []


# ---- in the tiers

def test_the_table_is_made_by_the_tiers_that_name_it():
    assert TABLES["table_6_searches"] is table_6_searches
    runs = planned(load_tier("quick"), ["table_6_searches"])
    assert len(runs) == 10 and len({run.insertion.needs.hash for run in runs}) == 10
    shared = {run.hash for run in planned(load_tier("quick"), ["table_1_composed"])}
    assert sum(run.hash in shared for run in runs) == 6, "the first six are those of table 1 on composed tasks"
