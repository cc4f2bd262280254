"""Cells as descriptions: what is a cell, which cells are the same, files, errors; the space, its numbers and moves."""
import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import combinations, pairwise, permutations, product
from pathlib import Path

import numpy as np
import pytest

from attnnas.core.errors import AttnnasError
from attnnas.core.files import write_json
from attnnas.cells.derivation import random_cell
from attnnas.attention.formula import ACTIVATIONS
from attnnas.cells.space import SearchSpace
from attnnas.cells.spec import ALL_OPERATIONS, CellSpec, OperationSpec

A, B = OperationSpec("spatial", "map-based", "relu"), OperationSpec("temporal", "dot-product", "none")


def subsets(numbers):
    return [c for size in range(1, len(numbers) + 1) for c in combinations(numbers, size)]


def random_spec(draw, count, kinds):
    "A random cell; the outputs are what nobody reads and some others."
    inputs = [tuple(sorted(draw.sample(range(k), draw.randint(1, k)))) for k in range(1, count + 1)]
    read = {i for read in inputs for i in read}
    outputs = tuple(k for k in range(1, count + 1) if k not in read or draw.random() < 0.4)
    return CellSpec(tuple(draw.choice(kinds) for _ in range(count)), tuple(inputs), outputs, draw.choice((16, 24)))


def renumbered(spec, order):
    "The same cell with operation order[k-1] as operation k; None where it would read a later one."
    number = {0: 0} | {old: new for new, old in enumerate(order, 1)}
    inputs = tuple(tuple(sorted(number[i] for i in spec.inputs[old - 1])) for old in order)
    if any(read[-1] >= k for k, read in enumerate(inputs, 1)): return None
    return CellSpec(tuple(spec.operations[old - 1] for old in order), inputs,
                    tuple(sorted(number[k] for k in spec.outputs)), spec.width)


def random_order(draw, spec):
    order, left = [], set(range(1, len(spec.operations) + 1))
    while left:
        order.append(draw.choice(sorted(k for k in left if not left & set(spec.inputs[k - 1]))))
        left.remove(order[-1])
    return order


def derived(seed):
    "A cell read off a supergraph: 1 to 24 operations in 4 levels, of 6 kinds or of 24."
    return random_cell(seed, alpha=1 + seed % 24, beta=1 + seed % 5, activations=("fixed", "mixture")[seed % 2]).cell


def test_canonical_form_under_renumbering():
    "1,000 relabellings of cells of all kinds, by hash as well."
    draw = random.Random(0)
    changed = 0
    for n in range(1000):
        spec = random_spec(draw, draw.randint(1, 12), draw.sample(ALL_OPERATIONS, draw.choice((1, 2, 24))))
        other = renumbered(spec, random_order(draw, spec))
        changed += other != spec
        assert other.canonical() == spec.canonical() and other.hash == spec.hash, (spec, other)
        canonical = spec.canonical()
        assert canonical.canonical() == canonical
        assert Counter(canonical.operations) == Counter(spec.operations) and canonical.width == spec.width
        assert sorted(map(len, canonical.inputs)) == sorted(map(len, spec.inputs))
    assert changed > 500


def test_canonical_form_of_derived_cells():
    draw, sizes = random.Random(5), set()
    for seed in range(96):
        spec = derived(seed)
        sizes.add(len(spec.operations))
        for n in range(3): assert renumbered(spec, random_order(draw, spec)).hash == spec.hash
        assert CellSpec.from_dict(json.loads(spec.to_json())) == spec
    assert max(sizes) == 24
    level = lambda first: tuple(range(first, first + 6))
    whole = CellSpec((A,) * 24, ((0,),) * 6 + (level(1),) * 6 + (level(7),) * 6 + (level(13),) * 6)
    assert renumbered(whole, random_order(draw, whole)).hash == whole.hash  # 6!^4 numberings of one and the same


def test_canonical_form_separates_exactly_what_no_renumbering_makes_equal():
    "Every cell of three operations of two kinds, with every choice of outputs, against all 3! numberings."
    form, smallest = {}, {}
    for ops, first, second, outputs in product(product((A, B), repeat=3), subsets((0, 1)), subsets((0, 1, 2)),
                                               subsets((1, 2, 3))):
        try: spec = CellSpec(ops, ((0,), first, second), outputs)
        except AttnnasError: continue
        same = [other for order in permutations((1, 2, 3)) if (other := renumbered(spec, order))]
        key = min(other.to_json() for other in same)
        assert form.setdefault(key, spec.canonical()) == spec.canonical()
        assert smallest.setdefault(spec.canonical(), key) == key
        assert spec.canonical() in same
    assert len(form) > 300


@pytest.mark.parametrize("count", [4, 12])
def test_canonical_form_of_symmetric_cells(count):
    "What colour refinement alone cannot tell apart: rings of equal operations, one large or two small."
    def rings(*lengths):
        reads, start = [], 1
        for length in lengths:
            reads += [tuple(sorted((start + i, start + (i + 1) % length))) for i in range(length)]
            start += length
        n = sum(lengths)
        return CellSpec((A,) * 2 * n, ((0,),) * n + tuple(reads))
    draw, ring = random.Random(1), rings(count)
    for cell in (ring, rings(3, count - 1)):
        for n in range(8): assert renumbered(cell, random_order(draw, cell)).hash == cell.hash
    if count == 12: assert rings(6, 6).hash != ring.hash != rings(4, 8).hash
    twins = CellSpec((A,) * count, ((0,),) * count)
    assert twins.canonical() == twins


def test_hash_is_stable():
    "A pinned value: searches and run records of other machines and releases refer to it."
    spec = CellSpec((A, B), ((0,), (0, 1)), (2,), 24)
    assert spec.hash == "0752986337191700"
    others = (((A, B), ((0,), (1,)), (2,), 24), ((A, B), ((0,), (0, 1)), (2,), 32),
              ((A, B), ((0,), (0, 1)), (1, 2), 24), ((B, A), ((0,), (0, 1)), (2,), 24))
    assert len({spec.hash, *(CellSpec(*other).hash for other in others)}) == 5


def test_hash_is_the_same_in_another_process():
    "1,000 cells, in a process that orders its sets and dictionaries of strings differently."
    draw = random.Random(3)
    specs = [random_spec(draw, draw.randint(1, 8), ALL_OPERATIONS) for n in range(1000)]
    code = ("import json, sys; from attnnas.cells.spec import CellSpec\n"
            "for line in sys.stdin: print(CellSpec.from_dict(json.loads(line)).hash)\n"
            "print(hash('attnnas'))")
    environment = dict(os.environ, PYTHONHASHSEED="12345", PYTHONPATH=str(Path(__file__).resolve().parent.parent))
    done = subprocess.run([sys.executable, "-c", code], input="\n".join(spec.to_json() for spec in specs), text=True,
                          env=environment, check=True, capture_output=True)
    *hashes, other = done.stdout.split()
    assert hashes == [spec.hash for spec in specs] and len(set(hashes)) > 900
    assert int(other) != hash("attnnas") or os.environ.get("PYTHONHASHSEED") == "12345"


def test_round_trips(tmp_path):
    draw = random.Random(2)
    for n in range(1000):
        spec = random_spec(draw, draw.randint(1, 8), ALL_OPERATIONS)
        assert CellSpec.from_dict(json.loads(spec.to_json())) == spec
        assert json.loads(spec.to_json()) == spec.to_dict()
    for n in range(30):
        spec = random_spec(draw, draw.randint(1, 8), ALL_OPERATIONS)
        spec.save(tmp_path / "cell.json")
        assert CellSpec.load(tmp_path / "cell.json") == spec
    short = {"schema_version": 1, "operations": [vars(A)], "inputs": [[0]]}
    assert CellSpec.from_dict(short) == CellSpec((A,), ((0,),))
    assert (str(CellSpec((A, B), ((0,), (0, 1))))
            == "1: spatial map-based relu(0); 2: temporal dot-product none(0,1) -> 1,2")


def test_size_is_the_number_of_cells():
    assert SearchSpace(4).size == 3 * 7 * 15 * 24**4 == 104_509_440
    assert len(ALL_OPERATIONS) == len(set(ALL_OPERATIONS)) == 24
    space = SearchSpace(2, width=8)
    cells = {CellSpec(ops, (first, second), outputs, width) for ops in product(ALL_OPERATIONS, repeat=2)
             for first in ((0,),) for second in subsets((0, 1)) for outputs in (None,) for width in (8,)}
    assert len(cells) == space.size and all(cell in space for cell in cells)


def test_membership():
    space, cell = SearchSpace(2, width=8), CellSpec((A, B), ((0,), (0, 1)), width=8)
    assert cell in space
    for other in (CellSpec((A, B), ((0,), (0, 1)), (2,), 8), CellSpec((A, B), ((0,), (0, 1)), width=16),
                  CellSpec((A,), ((0,),), width=8), "cell"): assert other not in space
    part = SearchSpace(2, width=8, dimensions=["temporal"])
    assert cell not in part and CellSpec((B, B), ((0,), (0, 1)), width=8) in part


@pytest.mark.parametrize("fields,says", [
    ({"operations": 0}, "operations.*at least one"), ({"operations": 2.0}, "operations.*2.0"),
    ({"width": 0}, "width.*at least one"), ({"width": True}, "width.*True"),
    ({"dimensions": ["temporl"]}, "dimension 'temporl'.*Did you mean 'temporal'"),
    ({"types": []}, "types.*at least one of map-based"), ({"types": "map-based"}, "types must be a list"),
    ({"activations": ["relu", "mixture"]}, "activation 'mixture'"),
    ({"activations": ["relu", "none", "relu"]}, "activations name one twice"),
])
def test_faulty_spaces_are_named(fields, says):
    with pytest.raises(AttnnasError, match=says): SearchSpace(**fields)


SMALL = [SearchSpace(2, dimensions=["temporal", "spatiotemporal"], activations=["softmax", "relu"]),
         SearchSpace(2, types=["dot-product"], activations=["none", "softmax", "sigmoid"]),
         SearchSpace(3, width=8, dimensions=["temporal"], activations=["softmax"]),
         SearchSpace(4, dimensions=["spatial"], types=["map-based"], activations=["relu"]),
         SearchSpace(1), SearchSpace(1, dimensions=["spatial"], types=["map-based"], activations=["relu"])]


@pytest.mark.parametrize("space", SMALL, ids=lambda space: f"{space.size} cells")
def test_small_spaces_hold_every_cell_once(space):
    "Against all cells of as many operations, written down and filtered by what the space allows."
    kinds = [o for o in ALL_OPERATIONS if o.dimension in space.dimensions and o.type in space.types
             and o.activation in space.activations]
    k = range(1, space.operations + 1)
    expected = {CellSpec(ops, reads, width=space.width) for ops in product(kinds, repeat=space.operations)
                for reads in product(*(subsets(range(i)) for i in k))}
    cells = list(space.enumerate())
    assert len(cells) == len(set(cells)) == space.size == len(expected) and set(cells) == expected
    assert list(space) == cells and all(cell in space for cell in cells)
    assert [space.index(cell) for cell in cells] == list(range(space.size))


def test_size_of_the_benchmark_spaces():
    assert [space.size for space in SMALL] == [3 * 8**2, 3 * 9**2, 21 * 2**3, 315, 24, 1]
    assert SearchSpace(activations=["relu", "none"]) == SearchSpace(activations=("none", "relu"))


def test_numbers_and_digits_are_the_cells_of_large_spaces():
    "Exact beyond 64 bits; the first cell, the last, and some between."
    for space in (SearchSpace(4), SearchSpace(12, width=8), SearchSpace(24, types=["dot-product"])):
        draw = random.Random(4)
        for number in (0, 1, space.size - 1, *(draw.randrange(space.size) for n in range(30))):
            cell = space[number]
            assert cell in space and space.index(cell) == number
            digits = space.encode(cell)
            assert len(digits) == len(space.parameters) and space.decode(digits) == cell
            assert all(value in values for value, values in zip(digits, space.parameters.values()))
    assert SearchSpace(12).size > 2**100


def test_every_vector_of_values_is_a_cell_of_its_own():
    for space in SMALL:
        cells = [space.decode(values) for values in product(*space.parameters.values())]
        assert cells == list(space) and len(set(cells)) == len(cells)
        assert all(len(values) > 1 for values in space.parameters.values())
    assert list(SearchSpace(2).parameters) == ["dimension_1", "type_1", "activation_1", "dimension_2", "type_2",
                                               "activation_2", "inputs_2"]
    assert SearchSpace(2).decode(np.array([2, 0, 1, 1, 1, 2, 0])) == SearchSpace(2).decode([2, 0, 1, 1, 1, 2, 0])


@pytest.mark.parametrize("count", range(1, 9))
def test_neighbouring_values_of_inputs_differ_in_one_feature(count):
    space = SearchSpace(count, dimensions=["temporal"], types=["dot-product"], activations=["relu"])
    last = [space.decode((*(0,) * (len(space.parameters) - 1), value)).inputs[-1] for value in range(2**count - 1)
            ] if count > 1 else [(0,)]
    assert sorted(last) == sorted(subsets(range(count)))
    assert all(len(set(a) ^ set(b)) == 1 for a, b in pairwise(last))


@pytest.mark.parametrize("call,says", [
    (lambda space, cell: space[space.size], "from 0 to 1727"), (lambda space, cell: space[-1], "from 0 to 1727"),
    (lambda space, cell: space["0"], "whole number"), (lambda space, cell: space.decode([0] * 6), "7 values.*got 6"),
    (lambda space, cell: space.decode([0, 0, 0, 3, 0, 0, 0]), "dimension_2.*from 0 to 2, got 3"),
    (lambda space, cell: space.decode([0, 0, 0, 0, 0, 0, 0.5]), "inputs_2.*got 0.5"),
    (lambda space, cell: space.encode(SearchSpace(3)[0]), "not one of SearchSpace.operations=2"),
    (lambda space, cell: space.index(CellSpec(cell.operations, cell.inputs, width=7)), "width 7"),
    (lambda space, cell: space.index("cell"), "not one of"),
    (lambda space, cell: space.neighbours(SearchSpace(3)[0]), "not one of"),
    (lambda space, cell: SearchSpace(2, types=["dot-product"]).mutate(cell, 0), "not one of"),
    (lambda space, cell: SMALL[-1].mutate(SMALL[-1][0], 0), "one cell only"),
])
def test_faulty_questions_to_a_space_are_named(call, says):
    space = SearchSpace(2)
    with pytest.raises(AttnnasError, match=says): call(space, space[0])


def apart(a, b):
    "How many names and how many inputs two cells differ in."
    names = sum(x != y for p, q in zip(a.operations, b.operations) for x, y in zip(vars(p).values(), vars(q).values()))
    return names + sum(len(set(p) ^ set(q)) for p, q in zip(a.inputs, b.inputs))


@pytest.mark.parametrize("space", SMALL, ids=lambda space: f"{space.size} cells")
def test_neighbours_are_exactly_the_cells_one_change_away(space):
    "Complete, each once, symmetric, and every cell can be reached."
    cells = list(space)
    near = {cell: space.neighbours(cell) for cell in cells}
    for cell in cells:
        assert len(near[cell]) == len(set(near[cell]))
        assert set(near[cell]) == {other for other in cells if apart(cell, other) == 1}
        assert all(cell in near[other] for other in near[cell])
    reached, frontier = {cells[0]}, [cells[0]]
    while frontier:
        new = set(near[frontier.pop()]) - reached
        reached |= new
        frontier += new
    assert reached == set(cells)


def test_number_of_neighbours_in_the_whole_space():
    "2 + 1 + 3 names an operation; each input may come or go, but not the last one."
    space = SearchSpace(5)
    for seed in range(50):
        cell = space.sample(seed)
        expected = 5 * 6 + sum(k - (len(read) == 1) for k, read in enumerate(cell.inputs, 1))
        near = space.neighbours(cell)
        assert len(set(near)) == len(near) == expected
        assert all(other in space and apart(cell, other) == 1 for other in near)
        assert all(other.hash != cell.hash for other in near)  # nor the same cell in another numbering


def test_mutations_are_uniform_neighbours_and_repeatable():
    space = SearchSpace(3)
    cell = space.sample("parent")
    near = space.neighbours(cell)
    counts = Counter(space.mutate(cell, seed) for seed in range(1500))
    expected = 1500 / len(near)
    assert set(counts) == set(near) and space.mutate(cell, 7) == space.mutate(cell, 7)
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < len(near) - 1 + 5 * (2 * len(near)) ** 0.5
    for seed in range(300): assert (cell := space.mutate(cell, seed)) in space


def test_samples_of_small_and_of_huge_spaces_are_uniform():
    space = SMALL[2]
    counts = Counter(space.index(space.sample(seed)) for seed in range(5000))
    expected = 5000 / space.size
    assert len(counts) == space.size
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < space.size - 1 + 5 * (2 * space.size) ** 0.5
    huge = SearchSpace(12)  # more cells than fit into 64 bits: the quarters of the numbers are drawn alike
    quarters = Counter(huge.index(huge.sample(seed)) * 4 // huge.size for seed in range(400))
    assert set(quarters) == {0, 1, 2, 3} and all(abs(n - 100) < 45 for n in quarters.values())
    part = SearchSpace(6, width=8, dimensions=["temporal"], activations=["softmax", "none"])
    drawn = {(o.dimension, o.activation) for seed in range(50) for o in part.sample(seed).operations}
    assert drawn == {("temporal", "softmax"), ("temporal", "none")} and set(part.activations) < set(ACTIVATIONS)


def test_samples_are_uniform_and_repeatable():
    space = SearchSpace(3, width=8)
    cells = [space.sample(seed) for seed in range(3000)]
    assert all(cell in space for cell in cells) and cells[:50] == [space.sample(seed) for seed in range(50)]
    for k in range(3):
        for counts, kinds in ((Counter(c.operations[k] for c in cells), 24),
                              (Counter(c.inputs[k] for c in cells), 2 ** (k + 1) - 1)):
            expected = len(cells) / kinds
            chi2 = sum((n - expected) ** 2 / expected for n in counts.values())
            assert len(counts) == kinds and chi2 < kinds - 1 + 5 * (2 * kinds) ** 0.5
    pairs = Counter((c.operations[0].dimension, c.operations[1].dimension) for c in cells)
    assert all(abs(n - 3000 / 9) < 90 for n in pairs.values())
