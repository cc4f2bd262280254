"""Channel attention against its definition, and as a part of everything that cells are part of."""
from itertools import product

import pytest
import torch
from torch import nn

from attnnas.attention.formula import ACTIVATIONS
from attnnas.cells.cell import AttentionCell
from attnnas.cells.derivation import carry_over, derive, random_cell
from attnnas.cells.fused import FusedSupergraph
from attnnas.cells.operations.base import DIMENSIONS, TYPES
from attnnas.cells.operations.registry import create_operation
from attnnas.cells.space import SearchSpace
from attnnas.cells.spec import ALL_OPERATIONS, CellSpec, OperationSpec
from attnnas.cells.supergraph import TALK, Supergraph, level_nodes
from attnnas.figures.attention import map_overlay, query_weights
from attnnas.figures.cells import draw_cell, draw_supergraph
from attnnas.figures.curves import connection_curves
from attnnas.networks.insertion import insert, inserted
from attnnas.networks.profile import count_flops
from attnnas.networks.registry import create_model
from attnnas.core.errors import AttnnasError
from attnnas.search.cost import operation_costs
from attnnas.visual.taxonomy import label
from genotypes import leave_only

NODES = ("temporal dot-product", "spatial channel", "spatiotemporal map-based", "temporal channel",
         "spatiotemporal channel")
SHAPES = [(2, 8, 3, 2, 5), (1, 8, 1, 3, 3), (1, 8, 11, 1, 1), (1, 8, 1, 1, 1)]


def make(dimension, activation, width=8):
    torch.manual_seed(0)
    operation = create_operation(dimension, "channel", activation, width, dtype=torch.float64)
    for p in operation.parameters(): nn.init.normal_(p, std=0.6)
    return operation


def clip(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(1))


def scaled(scores, activation):
    if activation == "softmax":
        powers = (scores - scores.max()).exp()
        return len(scores) * powers / powers.sum()
    return {"none": scores, "relu": scores.clamp(min=0), "sigmoid": 1 / (1 + (-scores).exp())}[activation]


def by_definition(operation, x):
    "Channel by channel: the squeezed positions of each position, one group after the other."
    p = dict(operation.named_parameters())
    y = torch.empty_like(x)
    group = {"spatial": lambda t, h, w: t, "temporal": lambda t, h, w: (h, w),
             "spatiotemporal": lambda t, h, w: 0}[operation.dimension]
    for b in range(len(x)):
        value, groups = {}, {}
        for place in product(*map(range, x.shape[2:])):
            value[place] = p["value.weight"] @ x[(b, slice(None), *place)] + p["value.bias"]
            groups.setdefault(group(*place), []).append(place)
        for places in groups.values():
            z = sum(value[place] for place in places) / len(places)
            hidden = (p["reduce.weight"] @ z + p["reduce.bias"]).clamp(min=0)
            weights = scaled(p["expand.weight"] @ hidden + p["expand.bias"], operation.activation)
            for place in places: y[(b, slice(None), *place)] = weights * value[place]
    return y


@pytest.mark.parametrize("dimension,activation", list(product(DIMENSIONS, ACTIVATIONS)))
def test_definition_and_gradients(dimension, activation):
    operation = make(dimension, activation)
    for shape in SHAPES:
        x = clip(*shape)
        for given in (x, x.contiguous(memory_format=torch.channels_last_3d)):
            torch.testing.assert_close(operation(given), by_definition(operation, x), atol=1e-12, rtol=1e-12)
    x = clip(1, 8, 2, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(operation, (x,))
    operation(x).sin().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in operation.parameters())


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_mixture_is_the_sum_of_the_four(dimension):
    mixed, x = make(dimension, "mixture"), clip(2, 8, 3, 4, 5)
    shares, total = mixed.mixture_logits.softmax(0), 0
    for share, activation in zip(shares, ACTIVATIONS):
        one = make(dimension, activation)
        one.load_state_dict({k: v for k, v in mixed.state_dict().items() if k != "mixture_logits"})
        total = total + share * one(x)
    torch.testing.assert_close(mixed(x), total, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("activations,training", list(product(("fixed", "mixture"), (True, False))))
def test_fused_is_literal(activations, training):
    torch.manual_seed(0)
    nodes = level_nodes(NODES, activations)
    literal, fused = (kind(10, 8, 3, nodes, activations=activations, dtype=torch.float64).train(training)
                      for kind in (Supergraph, FusedSupergraph))
    for p in literal.parameters(): nn.init.normal_(p, std=0.5)
    fused.load_state_dict(literal.state_dict())
    outcomes = []
    for graph in (literal, fused):
        x = clip(2, 10, 4, 3, 5).requires_grad_()
        y = graph(x)
        outcomes.append([y, *torch.autograd.grad(y.sin().sum(), [x, *graph.parameters()]), *graph.buffers()])
    for a, b in zip(*outcomes): torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)
    assert FusedSupergraph(10, 8, 3, level_nodes(NODES, activations, "pooled"), activations=activations)(x.float()).isfinite().all()


@pytest.mark.parametrize("activations", ["fixed", "mixture"])
def test_derived_cell_carries_the_weights_over(activations):
    torch.manual_seed(0)
    graph = FusedSupergraph(10, 8, 3, level_nodes(NODES, activations), activations=activations, dtype=torch.float64)
    for p in graph.parameters(): nn.init.normal_(p, std=0.5)
    c = graph.connections
    found = derive(c.level_weights(), c.sink_weights(), graph.nodes, width=8,
                   activation_weights=c.activation_weights())
    leave_only(graph, found)
    graph.eval()
    x = clip(2, 10, 3, 4, 5)
    assert any(operation.type == "channel" for operation in found.cell.operations)
    torch.testing.assert_close(carry_over(graph, found)(x), graph(x), atol=1e-9, rtol=1e-9)


def test_random_cells_of_these_nodes_hold_it():
    cells = [random_cell(seed, 3, level_nodes(NODES)).cell for seed in range(9)]
    assert any(operation.type == "channel" for cell in cells for operation in cell.operations)
    assert cells == [random_cell(seed, 3, level_nodes(NODES)).cell for seed in range(9)]


def test_the_talk_does_not_contain_it():
    assert not any("channel" in name for name in (*TALK, *TYPES, *SearchSpace(4).types, *map(str, ALL_OPERATIONS)))
    assert tuple(f"{node.dimension} {node.type}" for node in Supergraph(10, 8).nodes) == TALK
    assert SearchSpace(1).size == len(ALL_OPERATIONS) == 24


def test_a_space_contains_it_where_it_is_named():
    space = SearchSpace(2, types=["channel", "map-based"])
    assert space.types == ("map-based", "channel") and space.size == 24**2 * 3
    cell = next(c for c in map(space.sample, range(50)) if c.operations[0].type == "channel")
    assert space[space.index(cell)] == cell and cell in space and cell not in SearchSpace(2)
    assert all(near in space for near in space.neighbours(cell))


def test_cell_is_saved_inserted_trained_and_profiled(tmp_path):
    spec = CellSpec((OperationSpec("spatial", "channel", "sigmoid"), OperationSpec("temporal", "dot-product", "none")),
                    ((0,), (0, 1)), width=8)
    spec.save(tmp_path / "cell.json")
    assert CellSpec.load(tmp_path / "cell.json") == spec and CellSpec.load(tmp_path / "cell.json").hash == spec.hash
    model = insert(create_model("i3d_small", num_classes=3), spec)
    x = clip(2, 3, 8, 32, 32, dtype=torch.float32)
    model(x).sum().backward()
    added = [cell for cell in inserted(model).values() if isinstance(cell, AttentionCell)]
    assert added and all(cell.zero_norm.weight.grad.any() for cell in added)
    n, d, frames = 4 * 5 * 6, 8, 4
    work = n * d * d + frames * 2 * d * (d // 4)  # the convolution; two layers on one vector a frame
    assert count_flops(create_operation("spatial", "channel", "relu", d), (1, d, 4, 5, 6)) == 2 * work
    assert operation_costs(level_nodes(["spatial channel"]), d, (4, 5, 6)).tolist() == [[work] * 4]


def test_pictures_and_label():
    import matplotlib
    matplotlib.use("agg")
    nodes = level_nodes(NODES)
    spec = CellSpec((nodes[1], nodes[4]), ((0,), (1,)), width=8)
    texts = [t.get_text() for t in draw_cell(spec).axes[0].texts]
    assert "f1  spatial\nchannel sigmoid" in texts
    level, sink = torch.rand(2, 5, 5), torch.rand(3, 5)
    draw_supergraph(level, sink, nodes, kept=derive(level, sink, nodes))
    history = [{"connections": {"site": {"level": level.tolist(), "sink": sink.tolist(), "activation": None}}}]
    connection_curves(history * 3, nodes)
    assert label(create_operation("spatial", "channel", "relu", 8)).representations == "multidimensional"
    video = torch.randint(0, 256, (3, 8, 12, 12), dtype=torch.uint8)
    for dimension in DIMENSIONS:
        operation, x = create_operation(dimension, "channel", "sigmoid", 8), torch.randn(1, 8, 4, 6, 6)
        map_overlay(video, operation.weights(x)[0, 3])
    with pytest.raises(AttnnasError, match="no queries"): query_weights(operation, x[0], (0, 0, 0), video)
