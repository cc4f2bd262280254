"""What is counted: work against closed forms, saved memory by hand and on a real device, time where it is spent."""
import re
import time
from itertools import product
from math import prod

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from attnnas.attention import kernels
from attnnas.networks import profile as module
from attnnas.attention.formula import ACTIVATIONS, attend
from attnnas.networks.registry import create_model
from attnnas.cells.cell import AttentionCell
from attnnas.core.errors import AttnnasError
from attnnas.cells.fused import FusedSupergraph
from attnnas.networks.insertion import insert
from attnnas.networks.non_local import NonLocalBlock
from attnnas.cells.operations.base import DIMENSIONS
from attnnas.cells.operations.registry import create_operation
from attnnas.networks.profile import (activation_bytes, costliest, count_flops, profile,
                                      profile_modules, profile_sites, profile_table)
from attnnas.cells.spec import CellSpec, OperationSpec
from attnnas.cells.supergraph import Supergraph

WIDTH = 4
SHAPES = {"small": (2, WIDTH, 3, 4, 5), "deep": (1, WIDTH, 9, 2, 2), "large": (1, WIDTH, 6, 33, 33)}
CELL = CellSpec((OperationSpec("temporal", "dot-product", "softmax"),
                 OperationSpec("spatiotemporal", "map-based", "sigmoid")), inputs=((0,), (0, 1)), width=8)


# Closed forms, in multiply-adds

def sizes(dimension, shape):
    "(clips, positions P, features R) of an operation."
    b, d, t, h, w = shape
    return {"spatial": (b, h * w, t * d), "temporal": (b, t, h * w * d), "spatiotemporal": (b, t * h * w, d)}[dimension]


def path_of(dimension, activation, shape):
    q = torch.empty(sizes(dimension, shape), device="meta")
    return kernels.best_path(q, q, q, activation if activation != "mixture" else torch.ones(4))


def products(dimension, activation, shape):
    b, p, r = sizes(dimension, shape)
    return 2 * b * p * r * (r if path_of(dimension, activation, shape) == "associative" else p)


def operation(op, shape):
    b, d, t, h, w = shape
    n, hidden = b * t * h * w, max(1, d // 4)
    if op.type == "dot-product": return 3 * n * d * d + products(op.dimension, op.activation, shape)
    scored = {"spatial": b * h * w * 9, "temporal": b * t * 3, "spatiotemporal": n * 27}[op.dimension]
    return n * d * (d + hidden) + scored * hidden


def at_width(shape, width): return (shape[0], width, *shape[2:])


def cell(spec, shape):
    n, c = prod(shape) // shape[1], shape[1]
    inner = sum(operation(op, at_width(shape, spec.width)) for op in spec.operations)
    return n * c * spec.width + inner + n * len(spec.outputs) * spec.width * c


def graph(supergraph, shape):
    n, c = prod(shape) // shape[1], shape[1]
    width, levels, nodes = supergraph.width, supergraph.levels, len(supergraph.nodes)
    ops = levels * sum(operation(op, at_width(shape, width)) for op in supergraph.nodes)
    return n * c * width + ops + (levels - 1) * nodes * nodes * n * width + levels * nodes * n * width * c


class Attend(nn.Module):
    def __init__(self, activation, path):
        super().__init__()
        self.activation, self.path = activation, path

    def forward(self, x): return attend(x, x, x, self.activation, path=self.path)


# Work

@pytest.mark.parametrize("size", SHAPES)
@pytest.mark.parametrize("dimension, activation", [*product(DIMENSIONS, (*ACTIVATIONS, "mixture"))])
def test_every_dot_product_operation_is_counted(dimension, activation, size):
    op, shape = OperationSpec(dimension, "dot-product", activation), SHAPES[size]
    assert count_flops(create_operation(dimension, "dot-product", activation, WIDTH), shape) == 2 * operation(op, shape)


def test_those_shapes_take_every_path_that_meta_has():
    taken = {path_of(*case) for case in product(DIMENSIONS, (*ACTIVATIONS, "mixture"), SHAPES.values())}
    assert taken == {"materialised", "fused", "chunked", "associative"}


@pytest.mark.parametrize("dimension, activation", [*product(DIMENSIONS, (*ACTIVATIONS, "mixture"))])
def test_every_map_based_operation_is_counted(dimension, activation):
    op, shape = OperationSpec(dimension, "map-based", activation), (2, 8, 3, 4, 5)
    assert count_flops(create_operation(dimension, "map-based", activation, 8), shape) == 2 * operation(op, shape)


def on_cpu(model, shape, dtype=torch.float32):
    "FLOPs of a real pass on the CPU; PyTorch's counter has to be told of the CPU's fused kernel."
    def attention(query, key, value, *rest, **options):
        return 2 * (prod(query) * key[-2] + prod(query[:-1]) * prod(value[-2:]))
    known = module._FORMULAS | {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=known) as counter:
        model.eval()(torch.rand(shape, dtype=dtype))
    return counter.get_total_flops()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("activation, path", [("none", "associative"), ("softmax", "fused"),
                                              *product(ACTIVATIONS, ("materialised", "chunked"))])
def test_every_path_is_counted_alike_on_meta_and_on_cpu(activation, path, dtype):
    p, r = 600, 8  # more than a tile, and no multiple of it
    model = nn.Sequential(nn.Linear(r, r, bias=False, dtype=dtype), Attend(activation, path))
    expected = 2 * 2 * (p * r * r + 2 * p * r * (r if path == "associative" else p))
    assert count_flops(model, (2, p, r)) == expected == on_cpu(model, (2, p, r), dtype)


@pytest.mark.parametrize("shape", [(2, 6, 3, 4, 5), (1, 6, 4, 12, 12)])
@pytest.mark.parametrize("pool", [False, True])
def test_non_local_blocks_are_counted(shape, pool):
    block, n, d = NonLocalBlock(6, pool_keys=pool), prod(shape[2:]), 3
    keys = prod(-(-side // 2) for side in shape[2:]) if pool else n
    assert count_flops(block, shape) == 2 * shape[0] * (4 * n * 6 * d + 2 * n * keys * d) == on_cpu(block, shape)


@pytest.mark.parametrize("shape", [(2, 6, 3, 4, 5), (1, 6, 8, 20, 20)])
def test_cells_and_supergraphs_are_counted(shape):
    kinds = product(DIMENSIONS, ("map-based", "dot-product"))
    operations = tuple(OperationSpec(d, t, a) for (d, t), a in zip(kinds, ACTIVATIONS * 2))
    spec = CellSpec(operations, inputs=tuple((k,) for k in range(6)), outputs=(2, 5, 6), width=8)
    assert count_flops(AttentionCell(6, spec), shape) == 2 * cell(spec, shape)
    for kind, activations in product((Supergraph, FusedSupergraph), ("fixed", "mixture")):
        supergraph = kind(6, 8, levels=3, activations=activations)
        assert count_flops(supergraph, shape) == 2 * graph(supergraph, shape), kind
    if prod(shape) < 1000: assert on_cpu(AttentionCell(6, spec), shape) == 2 * cell(spec, shape)
    if prod(shape) < 1000: assert on_cpu(supergraph, shape) == 2 * graph(supergraph, shape)


@pytest.mark.parametrize("layer, shape, multiply_adds", [
    (nn.LSTM(4, 8, batch_first=True), (2, 5, 4), 2 * 5 * 4 * 8 * (4 + 8)),
    (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (2, 5, 8),
     2 * (5 * 8 * (3 * 8 + 8 + 2 * 16) + 2 * 5 * 5 * 8)),
])
def test_layers_with_kernels_of_their_own_are_counted(layer, shape, multiply_adds):
    assert count_flops(layer, shape) == 2 * multiply_adds


def test_a_module_that_is_used_twice_costs_twice_and_adds_up():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.weight = nn.Linear(4, 4, bias=False), nn.Parameter(torch.ones(4, 4))
            self.again = nn.Sequential(self.inner, nn.ReLU())

        def forward(self, x): return self.again(self.inner(x)) @ self.weight
    rows = {row["module"]: row["gflops"] * 1e9 for row in costliest(Twice(), (3, 4), top=None)}
    assert rows == {"inner": 2 * 2 * 48, "": 2 * 48} and count_flops(Twice(), (3, 4)) == 3 * 2 * 48
    inclusive = {row["module"]: row["multiply_adds"] for row in profile_modules(Twice(), (3, 4))}
    assert inclusive == {"": 3 * 48, "inner": 2 * 48, "again": 48, "again.1": 0}


# Memory

def test_saved_memory_by_hand():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    own = {row["module"]: row["activation_bytes"] for row in profile_modules(model, (7, 10))}
    assert own == {"": 4 * 210, "0": 4 * 70, "1": 4 * 140, "2": 0}  # a storage counts once, for the first that saves it
    assert activation_bytes(model, (14, 10)) == 2 * activation_bytes(model, (7, 10))
    assert activation_bytes(model.double(), (7, 10)) == 8 * 210
    assert activation_bytes(model.requires_grad_(False), (7, 10)) == 0


@pytest.mark.parametrize("activation, path, bytes", [
    ("softmax", "materialised", 4 * (3 * 600 * 8 + 600 * 600)),  # the scaled queries and the matrix
    ("relu", "chunked", 4 * 2 * 600 * 8),  # nothing more
    ("softmax", "fused", 4 * (3 * 600 * 8 + 600)),  # the output and a sum a row
])
def test_saved_memory_of_attention_by_hand(activation, path, bytes):
    "The linear layer's input; its output, which is query, key and value in one; and what the path adds."
    assert activation_bytes(nn.Sequential(nn.Linear(8, 8), Attend(activation, path)), (1, 600, 8)) == bytes


class ByRows(nn.Module):
    "Softmax attention of a clip with itself on the path that recomputes rows."
    def forward(self, x):
        tokens = x.flatten(2).mT * 2
        return attend(tokens * 3, tokens * 5, tokens * 7, "softmax", path="chunked")


def test_a_recomputed_function_hides_what_it_closes_over():
    "The note in the docstring: attention by rows keeps keys and values too, 2 n d numbers, and autograd does not tell."
    n, d = 6 * 33 * 33, WIDTH
    model = nn.Sequential(nn.Conv3d(d, d, 1), ByRows())
    saved = activation_bytes(model, (1, d, 6, 33, 33)) - activation_bytes(model[0], (1, d, 6, 33, 33))
    assert 4 * n * d <= saved < 4 * 2 * n * d


def operations_of_all_kinds(activation):
    kinds = product(DIMENSIONS, ("map-based", "dot-product"))
    return nn.ModuleList(create_operation(d, t, activation, WIDTH) for d, t in kinds)


class Chain(nn.Module):
    def __init__(self, modules):
        super().__init__()
        self.parts = modules

    def forward(self, x):
        for part in self.parts: x = part(x)
        return x


@pytest.mark.parametrize("make, shape", [
    *((lambda a=a: Chain(operations_of_all_kinds(a)), (2, WIDTH, 3, 4, 5)) for a in (*ACTIVATIONS, "mixture")),
    *((lambda a=a: nn.Sequential(nn.Linear(8, 8), Attend(a, "chunked")), (2, 600, 8)) for a in ACTIVATIONS),
    (lambda: NonLocalBlock(6, pool_keys=True), (2, 6, 3, 4, 5)), (lambda: AttentionCell(6, CELL), (2, 6, 3, 4, 5)),
    (lambda: FusedSupergraph(6, 8, levels=2), (2, 6, 3, 4, 5)),
    (lambda: Supergraph(6, 8, levels=2, activations="mixture"), (2, 6, 3, 4, 5)),
    (lambda: insert(create_model("i3d_small", 5), CELL), (2, 3, 8, 24, 24)),
    (lambda: create_model("s3d_small", 5), (2, 3, 8, 24, 24)), (lambda: create_model("i3d", 5), (2, 3, 8, 32, 32)),
])
def test_saved_memory_on_meta_is_that_of_a_real_pass(make, shape):
    model = make()
    real = module._totals(module._saved(model, shape, "cpu"))[""]
    assert activation_bytes(model, shape) == real > prod(shape) * 4


def test_saved_memory_adds_up_over_modules():
    model, shape = insert(create_model("i3d_small", 5), CELL), (2, 3, 8, 24, 24)
    own = module._totals(module._saved(model, shape), own=True)
    assert sum(own.values()) == activation_bytes(model, shape) and min(own.values()) >= 0


def test_a_shape_on_which_a_network_cannot_train():
    model, shape = create_model("i3d", 5), (1, 3, 8, 32, 32)  # one position in Mixed_5b
    numbers = profile(model, shape)
    assert numbers["activation_bytes"] is None and numbers["gflops"] > 0
    with pytest.raises(AttnnasError, match="InceptionVideo failed.*more than 1 value per channel when training"):
        activation_bytes(model, shape)
    assert re.search(r"^\(whole\).* -$", profile_table(model, shape, depth=0), re.M)


# Rows, sites, time, table

def with_cells(): return insert(create_model("i3d_small", 5), CELL)


SHAPE = (1, 3, 8, 24, 24)


def test_rows_and_sites():
    model = with_cells()
    rows = {row["module"]: row for row in profile_modules(model, SHAPE)}
    assert list(rows) == [name for name, _ in model.named_modules()]
    whole = {name: rows[""][name] for name in ("parameters", "multiply_adds", "gflops", "activation_bytes")}
    assert profile(model, SHAPE) == whole
    assert whole["multiply_adds"] * 2 == count_flops(model, SHAPE) == round(whole["gflops"] * 1e9)
    assert rows[""]["share"] == 1 and whole["parameters"] == sum(p.numel() for p in model.parameters())
    for name in ("multiply_adds", "parameters", "activation_bytes"):
        assert sum(rows[child][name] for child, _ in model.named_children()) == rows[""][name]
    sites = profile_sites(model, SHAPE)
    assert {site: row["multiply_adds"] for site, row in sites.items()} == {
        "MaxPool3d_4a_3x3": cell(CELL, (1, 48, 8, 3, 3)), "Mixed_4b": cell(CELL, (1, 64, 8, 3, 3))}
    assert sites["Mixed_4b"] == rows["Mixed_4b.added"] and profile_sites(create_model("i3d_small", 5), SHAPE) == {}


def test_nothing_is_timed_unless_asked_for_and_the_model_stays_as_it_is():
    model = with_cells()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    assert "seconds" not in profile(model, SHAPE) and "seconds" in profile(model, SHAPE, device="cpu", repeats=1)
    assert model.training and all(t.equal(before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_time_belongs_to_the_module_that_takes_it():
    class Sleep(nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds = seconds

        def forward(self, x):
            if x.device.type != "meta": time.sleep(self.seconds)
            return x
    model = nn.Sequential(Sleep(0.03), nn.Sequential(Sleep(0.01), Sleep(0.0)))
    seconds = {row["module"]: row["seconds"] for row in profile_modules(model, (2, 2), device="cpu", repeats=3)}
    assert seconds["0"] >= 0.03 and seconds["1"] >= seconds["1.0"] >= 0.01 and seconds[""] >= 0.04


def test_a_table_shows_modules_to_a_depth_and_all_cells():
    model = insert(create_model("i3d_small", 5), CELL, ["Mixed_4b", "Mixed_4c.Branch_0"])
    names = lambda depth: [line.split()[0] for line in profile_table(model, SHAPE, depth).split("\n\n")[0].splitlines()]
    cells = ["Mixed_4b.added", "Mixed_4c.Branch_0.added"]
    assert names(0) == ["module", "(whole)", *cells, "inserted"]
    assert [name for name in names(1) if "." in name] == cells and len(names(1)) == 2 + len(list(model.children())) + 3
    assert "Mixed_4b.original" in names(2)
    assert "Mixed_4b.added.stem" not in names(2) and "Mixed_4b.added.stem" in names(3)
    lines, sites = profile_table(model, SHAPE, 1).splitlines(), profile_sites(model, SHAPE)
    added = next(line for line in lines if line.startswith("inserted at 2 sites"))
    assert f"{sum(row['parameters'] for row in sites.values()):,}" in added
    assert f"{sum(row['gflops'] for row in sites.values()):.4g}" in added and "ms" not in lines[0]
    timed = profile_table(create_model("i3d_small", 5), SHAPE, 1, device="cpu", repeats=1)
    assert timed.splitlines()[0].split()[-1] == "ms" and "inserted" not in timed and "median of 1 forward pass" in timed
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize("function", [count_flops, activation_bytes, profile, costliest, profile_modules,
                                      profile_table])
def test_a_wrong_shape_is_told(function):
    with pytest.raises(AttnnasError, match="Conv3d failed in a dry run on an input of shape .1, 2, 4, 4, 4.*Give a shape that"):
        function(nn.Conv3d(3, 4, 3), (1, 2, 4, 4, 4))


def test_no_passes_is_told():
    with pytest.raises(AttnnasError, match="repeats must be at least 1, got 0"):
        profile(nn.ReLU(), (1, 2), device="cpu", repeats=0)
