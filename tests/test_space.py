"""Cells as descriptions: what is a cell, which cells are the same, files, errors, sampling."""
import json
import random
from collections import Counter
from itertools import combinations, permutations, product

import pytest

from attnnas.core import AttnnasError, write_json
from attnnas.space import ALL_OPERATIONS, CellSpec, OperationSpec, SearchSpace

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


def test_canonical_form_under_renumbering():
    draw = random.Random(0)
    changed = 0
    for n in range(200):
        spec = random_spec(draw, draw.randint(1, 12), draw.sample(ALL_OPERATIONS, draw.choice((1, 2, 24))))
        other = renumbered(spec, random_order(draw, spec))
        changed += other != spec
        assert other.canonical() == spec.canonical() and other.hash == spec.hash, (spec, other)
        canonical = spec.canonical()
        assert canonical.canonical() == canonical
        assert Counter(canonical.operations) == Counter(spec.operations) and canonical.width == spec.width
        assert sorted(map(len, canonical.inputs)) == sorted(map(len, spec.inputs))
    assert changed > 100


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


def test_round_trips(tmp_path):
    draw = random.Random(2)
    for n in range(30):
        spec = random_spec(draw, draw.randint(1, 8), ALL_OPERATIONS)
        spec.save(tmp_path / "cell.json")
        assert CellSpec.load(tmp_path / "cell.json") == spec == CellSpec.from_dict(json.loads(spec.to_json()))
        assert json.loads(spec.to_json()) == spec.to_dict()
    short = {"schema_version": 1, "operations": [vars(A)], "inputs": [[0]]}
    assert CellSpec.from_dict(short) == CellSpec((A,), ((0,),))
    assert (str(CellSpec((A, B), ((0,), (0, 1))))
            == "1: spatial map-based relu(0); 2: temporal dot-product none(0,1) -> 1,2")


good = CellSpec((A, B), ((0,), (0, 1))).to_dict()
first = good["operations"][0]


@pytest.mark.parametrize("value,says", [
    (good | {"outputz": [1]}, "'outputz'.*Did you mean 'outputs'"),
    (good | {"schema_version": 2}, "version 2.*version 1"),
    ({k: v for k, v in good.items() if k != "schema_version"}, "lacks schema_version"),
    ({k: v for k, v in good.items() if k != "inputs"}, "lacks inputs"),
    (good | {"operations": [first | {"dimension": "spatal"}] * 2}, "'spatal'.*Did you mean 'spatial'"),
    (good | {"operations": [first | {"kernel": 3}] * 2}, "operation field 'kernel'"),
    (good | {"operations": [{"type": "map-based"}] * 2}, "lacks dimension, activation"),
    (good | {"operations": ["relu"]}, "dictionary"),
    (good | {"operations": 3}, "list, got 3"),
    (good | {"operations": []}, "at least one"),
    (good | {"operations": [first | {"activation": "mixture"}] * 2}, "decided"),
    (good | {"inputs": [[0]]}, "2 operations need 2"),
    (good | {"inputs": [[0], [2]]}, "inputs of operation 2.*0 to 1"),
    (good | {"inputs": [[0], []]}, "inputs of operation 2"),
    (good | {"inputs": [[0], [1, 0]]}, "increasing"),
    (good | {"inputs": [[0], [0, 0]]}, "increasing"),
    (good | {"inputs": [[False], [0, 1]]}, "whole numbers"),
    (good | {"inputs": [0, 1]}, "list of lists"),
    (good | {"outputs": [0, 1]}, "outputs.*1 to 2"),
    (good | {"outputs": []}, "outputs"),
    (good | {"outputs": [1]}, "No output depends on operation 2"),
    (good | {"width": 0}, "width"),
    (good | {"width": "64"}, "width"),
    ([good], "dictionary"),
])
def test_faulty_cells_are_named(value, says, tmp_path):
    with pytest.raises(AttnnasError, match=says): CellSpec.from_dict(value)
    write_json(tmp_path / "cell.json", value)
    with pytest.raises(AttnnasError, match=says): CellSpec.load(tmp_path / "cell.json")


def test_files_that_are_no_cells(tmp_path):
    with pytest.raises(AttnnasError, match="Could not read"): CellSpec.load(tmp_path / "none.json")
    (tmp_path / "cell.json").write_text("{")
    with pytest.raises(AttnnasError, match="not JSON"): CellSpec.load(tmp_path / "cell.json")


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
    with pytest.raises(AttnnasError, match="at least one"): SearchSpace(0)


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
