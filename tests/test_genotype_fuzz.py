"""Genotypes that are none: every faulty file ends in an AttnnasError that names the field, never in a wrong cell."""
import copy
import json
import random
import re

import pytest

from attnnas.core.errors import AttnnasError
from attnnas.core.files import write_json
from attnnas.core.hashes import canonical_json
from attnnas.cells.derivation import random_cell
from attnnas.cells.space import SearchSpace
from attnnas.cells.spec import CellSpec, OperationSpec

A, B = OperationSpec("spatial", "map-based", "relu"), OperationSpec("temporal", "dot-product", "none")

good = CellSpec((A, B), ((0,), (0, 1))).to_dict()
first = good["operations"][0]


@pytest.mark.parametrize("value,says", [
    (good | {"outputz": [1]}, "'outputz'.*Did you mean 'outputs'"),
    (good | {"schema_version": 2}, "schema_version 2.*version 1"),
    (good | {"schema_version": "1"}, "schema_version '1'"),
    (good | {"schema_version": True}, "schema_version True"),
    (good | {"schema_version": None}, "schema_version None"),
    ({k: v for k, v in good.items() if k != "schema_version"}, "lacks schema_version"),
    ({k: v for k, v in good.items() if k != "inputs"}, "lacks inputs"),
    (good | {"operations": [first | {"dimension": "spatal"}] * 2}, "'spatal'.*Did you mean 'spatial'"),
    (good | {"operations": [first, first | {"type": "dot_product"}]}, "Operation 2 .*type.*Did you mean 'dot-product'"),
    (good | {"operations": [first | {"activation": ["relu"]}] * 2}, "activation"),
    (good | {"operations": [first | {"kernel": 3}] * 2}, "operation field 'kernel'"),
    (good | {"operations": [{"type": "map-based"}] * 2}, "lacks dimension, activation"),
    (good | {"operations": ["relu"]}, "dictionary"),
    (good | {"operations": 3}, "list, got 3"),
    (good | {"operations": {"0": first, "1": first}}, "operations are a list"),
    (good | {"operations": []}, "operations must be at least one"),
    (good | {"operations": [first | {"activation": "mixture"}] * 2}, "decided"),
    (good | {"inputs": [[0]]}, "2 operations need 2"),
    (good | {"inputs": [[0], [2]]}, "inputs of operation 2.*0 to 1"),
    (good | {"inputs": [[2], [1]]}, "inputs of operation 1.*0 to 0"),
    (good | {"inputs": [[0], [-1, 0]]}, "inputs of operation 2.*0 to 1"),
    (good | {"inputs": [[0], ["0"]]}, "inputs of operation 2.*whole numbers"),
    (good | {"inputs": [[0], [0.0, 1.0]]}, "inputs of operation 2.*whole numbers"),
    (good | {"inputs": None}, "inputs are a list"),
    (good | {"inputs": [[0], []]}, "inputs of operation 2"),
    (good | {"inputs": [[0], [1, 0]]}, "increasing"),
    (good | {"inputs": [[0], [0, 0]]}, "increasing"),
    (good | {"inputs": [[False], [0, 1]]}, "whole numbers"),
    (good | {"inputs": [0, 1]}, "list of lists"),
    (good | {"outputs": [0, 1]}, "outputs.*1 to 2"),
    (good | {"outputs": []}, "outputs"),
    (good | {"outputs": None}, "outputs are a list"),
    (good | {"outputs": "12"}, "outputs are a list"),
    (good | {"outputs": [1]}, "No output depends on operation 2"),
    (good | {"width": 0}, "width"),
    (good | {"width": "64"}, "width"),
    (good | {"width": 64.0}, "width"),
    (good | {"width": None}, "width"),
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
    (tmp_path / "cell.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(AttnnasError, match="not JSON"): CellSpec.load(tmp_path / "cell.json")
    with pytest.raises(AttnnasError, match="Could not read"): CellSpec.load(tmp_path)


@pytest.mark.parametrize("depth", [100, 900, 3000, 100_000])
@pytest.mark.parametrize("text", [
    "%s", '{"schema_version":1,"operations":%s,"inputs":[[0]]}',
    '{"schema_version":1,"inputs":[[0]],"operations":[{"type":"map-based","activation":"relu","dimension":%s}]}',
], ids=["file", "operations", "dimension"])
def test_files_nested_without_end(text, depth, tmp_path):
    (tmp_path / "cell.json").write_text(text % ("[" * depth + "]" * depth))
    with pytest.raises(AttnnasError): CellSpec.load(tmp_path / "cell.json")


# ---- fuzzing

JUNK = [None, True, False, -1, 0, 1, 2, 10**30, 1.0, 0.5, float("nan"), "", "0", "relu", "temporal", "softmaxx",
        [], {}, [[]], [0], [0, 1], [[0]], {"0": 0}, dict(first), ["map-based"]]
FIELDS = ["schema_version", "operation", "inputs", "outputs", "width", "dimension", "type", "activation"]


CELLS = [*(SearchSpace(k, width=w).sample(seed) for seed in range(4) for k, w in ((1, 64), (2, 8), (4, 64), (6, 16))),
         *(random_cell(seed, alpha=2 + seed, activations="mixture").cell for seed in range(6))]


def places(value, path=()):
    "Every (container, key) below a value, with the names on the way."
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key, (*path, key)
        if isinstance(value[key], (dict, list)): yield from places(value[key], (*path, key))


def damage(draw, value):
    "Change a JSON value in one place."
    container, key, _ = draw.choice(list(places(value)))
    junk = copy.deepcopy(draw.choice(JUNK))
    kind = draw.choice(["replace", "replace", "remove", "add", "swap", "wrap", "number"])
    if kind == "replace": container[key] = junk
    elif kind == "wrap": container[key] = draw.choice([[container[key]], {"value": container[key]}])
    elif kind == "remove": del container[key]
    elif kind == "number" and isinstance(container[key], int): container[key] += draw.choice([-1, 1, 5])
    elif kind == "swap":
        other = draw.choice(list(container) if isinstance(container, dict) else range(len(container)))
        container[key], container[other] = container[other], container[key]
    elif isinstance(container, dict): container[draw.choice(["name", f"{key}s", "", "kernel"])] = junk
    else: container.insert(key, draw.choice([copy.deepcopy(container[key]), junk]))


def corrupt(draw, data: bytes) -> bytes:
    "Change a file in one place."
    at, other = draw.randrange(len(data)), draw.randrange(len(data))
    low, high = min(at, other), max(at, other)
    digit = draw.choice([m.start() for m in re.finditer(rb"\d", data)] or [at])
    return {"flip": data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1:],
            "remove": data[:at] + data[at + 1:], "insert": data[:at] + bytes([draw.randrange(256)]) + data[at:],
            "digit": data[:digit] + b"%d" % draw.randrange(10) + data[digit + 1:], "truncate": data[:at + 1],
            "cut": data[:low] + data[high:] or b" ",
            }[draw.choice(["flip", "flip", "remove", "insert", "digit", "truncate", "cut"])]


def load(path, data: bytes, names) -> bool:
    "Whether `data` is a cell: then it must be the one that the file describes, else the error names what is wrong."
    path.write_bytes(data)
    try: cell = CellSpec.load(path)
    except AttnnasError as error:
        assert any(name.lower() in str(error).lower() for name in names), (data, error)
        return False
    described = json.loads(data)
    described = {"outputs": list(range(1, len(described["operations"]) + 1)), "width": 64} | described
    assert canonical_json(described) == cell.to_json() and cell.hash == CellSpec.from_dict(cell.to_dict()).hash
    return True


def test_fuzzed_structures(tmp_path):
    "1,000 valid files with 1 to 3 changes of their structure."
    draw, accepted = random.Random(10), 0
    for n in range(1000):
        value = draw.choice(CELLS).to_dict()
        for _ in range(draw.choice([1, 1, 2, 3])): damage(draw, value)
        accepted += load(tmp_path / "cell.json", json.dumps(value).encode(), FIELDS)
    assert 20 < accepted < 300


def test_fuzzed_bytes(tmp_path):
    "1,000 valid files with 1 to 3 corruptions of their bytes."
    draw, accepted = random.Random(11), 0
    for n in range(1000):
        data = json.dumps(draw.choice(CELLS).to_dict()).encode()
        for _ in range(draw.choice([1, 1, 2, 3])): data = corrupt(draw, data)
        accepted += load(tmp_path / "cell.json", data, [*FIELDS, "not JSON", "describes one cell"])
    assert 20 < accepted < 300


def test_wrong_values_are_called_by_the_name_of_their_field(tmp_path):
    "Every field of a cell, replaced by everything that it cannot be."
    original, refused = CellSpec((A, B), ((0,), (0, 1)), (2,), 16).to_dict(), 0
    for container, key, path in places(original):
        name = next(part for part in reversed(path) if isinstance(part, str)).rstrip("s")
        kept = container[key]
        for junk in JUNK:
            container[key] = junk
            refused += not load(tmp_path / "cell.json", json.dumps(original).encode(), [name])
        container[key] = kept
    assert refused > 250
