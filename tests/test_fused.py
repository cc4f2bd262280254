"""The fused supergraph against the literal one, and against the cells that are derived from it."""
import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnnas.core.errors import AttnnasError
from attnnas.core.seeds import generator
from attnnas.cells.derivation import carry_over, derive
from attnnas.cells.fused import FusedSupergraph
from attnnas.cells.spec import OperationSpec
from attnnas.cells.supergraph import ConnectionWeights, Supergraph, level_nodes
from genotypes import leave_only

double = dict(dtype=torch.float64)
LIMIT = {torch.float64: 1e-10, torch.float32: 1e-5}


def twins(parameterisation="softmax", activations="fixed", normalise=True, levels=3, nodes=None, dtype=torch.float64, seed=0):
    "A literal and a fused supergraph in the same state, in which nothing is at a value that hides an error."
    torch.manual_seed(seed)
    nodes = level_nodes(activations=activations) if nodes is None else nodes
    connections = ConnectionWeights(levels, len(nodes), parameterisation, activations, dtype=dtype)
    for p in connections.parameters():
        if p.numel(): nn.init.normal_(p, *((0.2, 0.2) if parameterisation == "free" else (0, 1)))
    literal, fused = (kind(10, 8, levels, nodes, copy.deepcopy(connections), activations, normalise, dtype=dtype)
                      for kind in (Supergraph, FusedSupergraph))
    for p in (literal.zero_norm.weight, literal.zero_norm.bias): nn.init.normal_(p, mean=1)
    for name, b in literal.named_buffers():
        if name.endswith(("mean", "var")): nn.init.uniform_(b, 0.5, 2)
    fused.load_state_dict(literal.state_dict())
    return literal, fused


def results(graph, x):
    "Outputs, gradients of inputs, of network and of connection parameters, and buffers: a vector each."
    graph, x = copy.deepcopy(graph), x.clone().requires_grad_()
    y = graph(x)
    slope = torch.randn(y.shape, generator=generator("slope"), dtype=torch.float64).to(y)
    (y * slope).sum().backward()
    gradients = {True: [], False: []}
    for name, p in graph.named_parameters(): gradients[name.startswith("connections") or "mixture" in name].append(p)
    flat = {own: torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in group])
            for own, group in gradients.items()}
    return y.detach(), x.grad, flat[False], flat[True], torch.cat([b.flatten().to(y) for b in graph.buffers()])


def same(one, other, x):
    for a, b in zip(results(one, x), results(other, x)):
        assert a.shape == b.shape and (a - b).abs().max() <= LIMIT[x.dtype] * b.abs().max().clamp(min=1)


def clip(*shape, dtype=torch.float64): return torch.randn(shape, generator=generator("clip", *shape), **double).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("parameterisation,activations", [*product(("softmax", "free"), ("fixed", "mixture"))])
def test_fused_is_literal(parameterisation, activations, dtype):
    shapes = {1: (2, 10, 5, 3, 7), 2: (1, 10, 3, 5, 4), 3: (4, 10, 4, 3, 3), 4: (3, 10, 7, 4, 5)}
    for (levels, shape), normalise, training in product(shapes.items(), (True, False), (True, False)):
        pair = twins(parameterisation, activations, normalise, levels, dtype=dtype)
        same(*(graph.train(training) for graph in pair), clip(*shape, dtype=dtype))


@pytest.mark.parametrize("shape", [(1, 10, 1, 1, 2), (2, 10, 1, 5, 1), (1, 10, 2, 1, 1), (1, 10, 2, 2, 2)])
def test_sizes_and_memory_layouts(shape):
    literal, fused = twins()
    x = clip(*shape)
    for layout in (torch.contiguous_format, torch.channels_last_3d): same(literal, fused, x.contiguous(memory_format=layout))
    same(literal, fused, x.transpose(3, 4).contiguous().transpose(3, 4))


@pytest.mark.parametrize("kinds", [("map-based",), ("dot-product",), ("dot-product", "map-based", "dot-product")])
def test_any_nodes(kinds):
    chosen = zip(("temporal", "spatial", "spatiotemporal"), kinds, ("relu", "none", "softmax"))
    literal, fused = twins(nodes=tuple(OperationSpec(*node) for node in chosen))
    for shape in ((2, 10, 3, 4, 5), (1, 10, 1, 2, 2)): same(literal, fused, clip(*shape))


def test_state_goes_both_ways_and_so_does_the_seed():
    literal, fused = twins(activations="mixture")
    assert list(literal.state_dict()) == list(fused.state_dict())
    other = twins(activations="mixture", seed=1)[0]
    other.load_state_dict(fused.state_dict())
    same(other, fused, clip(2, 10, 3, 4, 5))
    torch.manual_seed(3); literal = Supergraph(10, 8)
    torch.manual_seed(3); fused = FusedSupergraph(10, 8)
    assert all(a.equal(b) for a, b in zip(literal.state_dict().values(), fused.state_dict().values()))


@pytest.mark.parametrize("training,normalise", [*product((True, False), repeat=2)])
def test_new_fused_supergraph_is_the_identity_to_the_last_bit(training, normalise):
    for shape, activations in product(((2, 10, 4, 3, 5), (1, 10, 1, 2, 2)), ("fixed", "mixture")):
        x = torch.randn(shape)
        graph = FusedSupergraph(10, 8, activations=activations, normalise=normalise).train(training)
        for y in (x, x.contiguous(memory_format=torch.channels_last_3d)): assert graph(y).equal(y)


def test_shared_connections_gather_the_gradients_of_their_sites():
    def gradients(kind):
        torch.manual_seed(0)
        shared = ConnectionWeights(2, 6, "free", "mixture", **double)
        graphs = [kind(c, 4, 2, connections=shared, activations="mixture", **double) for c in (6, 10)]
        for graph in graphs: graph.zero_norm.weight.data.fill_(1)
        sum(graph(clip(2, graph.channels, 3, 2, 2)).sin().sum() for graph in graphs).backward()
        return torch.cat([p.grad.flatten() for p in shared.parameters()])
    torch.testing.assert_close(gradients(FusedSupergraph), gradients(Supergraph), rtol=1e-10, atol=1e-10)


def derived_alone(seed):
    "A fused supergraph that a derivation leaves nothing out of, and the derivation."
    chance = generator("genotype", seed)
    levels, alpha, beta = (int(torch.randint(low, high, (), generator=chance)) for low, high in ((1, 5), (1, 5), (1, 4)))
    parameterisation, activations = ("softmax", "free")[seed % 2], ("fixed", "mixture")[seed // 2 % 2]
    graph = twins(parameterisation, activations, bool(seed % 3), levels, seed=seed)[1].train(bool(seed // 4 % 2))
    connections = graph.connections
    found = derive(connections.level_weights(), connections.sink_weights(), graph.nodes, alpha, beta, 8,
                   connections.activation_weights())
    leave_only(graph, found)
    return graph, found


@pytest.mark.parametrize("start", range(0, 200, 50))
def test_what_derivation_leaves_is_the_cell(start):
    for seed in range(start, start + 50):
        graph, found = derived_alone(seed)
        x = clip(2, 10, 1 + seed % 4, 3, 2)
        cell = carry_over(graph, found)
        assert cell.spec == found.cell and cell.training == graph.training
        y = graph(x)
        assert (cell(x) - y).abs().max() <= 1e-6 * y.abs().max() and not torch.allclose(y, x)


def test_pooled_keys_by_definition():
    "The literal operations with keys and values pooled after their projection."
    node = {d: OperationSpec(d, "dot-product", "softmax") for d in ("spatial", "temporal", "spatiotemporal")}
    x = clip(2, 10, 3, 5, 4)
    for dimension, size in (("spatial", (1, 2, 2)), ("temporal", (2, 1, 1)), ("spatiotemporal", (2, 2, 2))):
        torch.manual_seed(0)
        graph = FusedSupergraph(10, 8, 1, (replace(node[dimension], pool_keys=True),), normalise=False, **double).eval()
        graph.zero_norm.weight.data.fill_(1)
        op, f = graph.operations[0][0], graph.stem(x).movedim(1, -1)
        q, k, v = (layer(f).movedim(-1, 1) for layer in (op.query, op.key, op.value))
        if size: k, v = (F.max_pool3d(y, size, ceil_mode=True) for y in (k, v))
        positions = {"spatial": "bcthw->bhwtc", "temporal": "bcthw->bthwc", "spatiotemporal": "bcthw->bthwc"}[dimension]
        end = {"spatial": 3, "temporal": 2, "spatiotemporal": 4}[dimension]
        q, k, v = (torch.einsum(positions, y).flatten(end).flatten(1, end - 1) for y in (q, k, v))
        y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        y = {"spatial": lambda y: y.view(2, 5, 4, 3, 8).permute(0, 4, 3, 1, 2),
             "temporal": lambda y: y.view(2, 3, 5, 4, 8).movedim(-1, 1),
             "spatiotemporal": lambda y: y.view(2, 3, 5, 4, 8).movedim(-1, 1)}[dimension](y)
        torch.testing.assert_close(graph(x), x + graph.zero_norm(graph.combine(y)), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(graph(x), copy_without_pooling(graph)(x))


def copy_without_pooling(graph):
    graph = copy.deepcopy(graph)
    for operation in graph.operations[0]: operation.pool_keys = False
    return graph


def test_errors_are_those_of_the_literal_one():
    with pytest.raises(AttnnasError, match="decided"): FusedSupergraph(12, 8, operations=level_nodes(activations="mixture"))
    with pytest.raises(AttnnasError, match="T, H, W"): FusedSupergraph(12, 8)(torch.zeros(0, 12, 2, 2, 2))


# ---- norms in rare modes, lower precision

def replaced(make):
    def change(graph, i): graph.norms[i] = make()
    return change


def norm_of(attribute, value):
    def change(graph, i): setattr(graph.norms[i], attribute, value)
    return change


def after_seven(graph, i):
    graph.norms[i].momentum = None
    graph.norms[i].num_batches_tracked.fill_(7)


def without_statistics(graph, i): graph.norms[i].running_mean = graph.norms[i].running_var = None


def doubled(graph, i): graph.norms[i].register_forward_hook(lambda module, inputs, output: 2 * output)


RARE = {
    "evaluation": lambda graph, i: graph.norms[i].eval(), "momentum": norm_of("momentum", 0.3),
    "mean over batches": after_seven, "eps": norm_of("eps", 0.1), "no statistics": without_statistics, "hook": doubled,
    "none": replaced(nn.Identity), "scaled": replaced(lambda: nn.BatchNorm3d(8, **double)),
    "untracked": replaced(lambda: nn.BatchNorm3d(8, affine=False, track_running_stats=False, **double)),
    "of places": replaced(lambda: nn.InstanceNorm3d(8, **double))}


@pytest.mark.parametrize("which", ["stem", "one", "all"])
@pytest.mark.parametrize("name", RARE)
def test_norms_may_differ(name, which):
    "If this fails, a graph with a frozen norm, or after update_bn, is silently another function than the literal one."
    for training in (True, False):
        pair = [graph.train(training) for graph in twins(levels=2)]
        for graph, i in product(pair, {"stem": [0], "one": [3], "all": range(13)}[which]): RARE[name](graph, i)
        same(*pair, clip(2, 10, 3, 4, 5))


def test_update_bn_gives_both_the_same_statistics():
    "If this fails, weights averaged over training cannot be tested in the fused graph."
    loader = [clip(2, 10, 3, 4, 5), clip(3, 10, 3, 4, 5)]
    pair = twins(levels=2)
    for graph in pair: torch.optim.swa_utils.update_bn(loader, graph)
    for one, other in zip(*(graph.buffers() for graph in pair)): torch.testing.assert_close(one, other)
    assert pair[1].norms[1].num_batches_tracked == 2


@pytest.mark.parametrize("kind", [Supergraph, FusedSupergraph])
@pytest.mark.parametrize("dtype,tolerance", [(torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_half_precision_is_close_to_double(kind, dtype, tolerance):
    "If this fails, a search under autocast raises, or computes something else. Outputs and the gradient of the input."
    for levels, activations, training in product((1, 3), ("fixed", "mixture"), (True, False)):
        literal = twins(activations=activations, levels=levels)[0].train(training)
        exact, slope, *_ = results(literal, clip(2, 10, 3, 4, 5))
        single = kind(10, 8, levels, level_nodes(activations=activations), activations=activations).train(training)
        single.load_state_dict(literal.state_dict())
        half = copy.deepcopy(single).to(dtype)
        x = clip(2, 10, 3, 4, 5, dtype=torch.float32)
        with torch.autocast("cpu", dtype): both = results(single, x), results(half, x.to(dtype))
        for y, gradient, *_ in (*both, results(half, x.to(dtype))):
            assert (y - exact).norm() <= tolerance * exact.norm()
            assert (gradient - slope).norm() <= 4 * tolerance * slope.norm()
