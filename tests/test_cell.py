"""Cells, supergraphs and derivation against their formulas, written out."""
from itertools import product

import pytest
import torch
from torch import nn

from attnnas.cells.cell import AttentionCell
from attnnas.core.errors import AttnnasError
from attnnas.core.seeds import generator
from attnnas.cells.derivation import carry_over, derive, random_cell
from attnnas.attention.formula import ACTIVATIONS
from attnnas.cells.operations.base import DIMENSIONS
from attnnas.cells.space import SearchSpace
from attnnas.cells.spec import CellSpec, OperationSpec
from attnnas.cells.supergraph import ConnectionWeights, Supergraph, level_nodes
from genotypes import leave_only

double = dict(dtype=torch.float64)
st_dot = OperationSpec("spatiotemporal", "dot-product", "softmax")


def clip(*shape, seed=1): return torch.randn(shape, **double, generator=generator("test clip", seed))


def scramble(module, seed=0):
    "Random parameters and running statistics: nothing is left at a value that hides an error."
    torch.manual_seed(seed)
    for name, p in module.named_parameters():
        if "connections" not in name: nn.init.normal_(p, std=0.5)
    for name, b in module.named_buffers():
        if name.endswith("mean"): nn.init.normal_(b)
        if name.endswith("var"): nn.init.uniform_(b, 0.5, 2)
    return module


def standard(norm, y):
    "What a norm without scale and shift does to y (B, d, T, H, W), from its definition."
    if isinstance(norm, nn.Identity): return y
    mean, var = ((y.mean((0, 2, 3, 4)), y.var((0, 2, 3, 4), unbiased=False)) if norm.training
                 else (norm.running_mean, norm.running_var))
    shape = (1, -1, 1, 1, 1)
    return (y - mean.view(shape)) / (var.view(shape) + norm.eps) ** 0.5


def convolve(layer, weight, y):
    y = torch.einsum("oi,bithw->bothw", weight, y)
    return y if layer.bias is None else y + layer.bias.view(1, -1, 1, 1, 1)


def residual(module, x, y):
    norm = module.zero_norm
    return x + standard(norm, y) * norm.weight.view(1, -1, 1, 1, 1) + norm.bias.view(1, -1, 1, 1, 1)


def cell_by_definition(cell, x):
    f = [standard(cell.norms[0], convolve(cell.stem, cell.stem.weight, x))]
    for k, inputs in enumerate(cell.spec.inputs, 1):
        total = 0
        for n, i in enumerate(inputs): total = total + cell.input_weights[k - 1][n] * f[i]
        f.append(standard(cell.norms[k], cell.operations[k - 1](total)))
    outputs = torch.cat([f[k] for k in cell.spec.outputs], 1)
    return residual(cell, x, convolve(cell.combine, cell.combine.weight, outputs))


def graph_by_definition(graph, x):
    "The talk's four equations, every G on its own."
    n, d = len(graph.nodes), graph.width
    level, sink = graph.connections.level_weights(), graph.connections.sink_weights()
    f_0 = standard(graph.norms[0], convolve(graph.stem, graph.stem.weight, x))
    f_out, total = {}, 0
    for i, j in product(range(graph.levels), range(n)):
        f_in = f_0 if i == 0 else sum(level[i - 1, j, k] * f_out[i - 1, k] for k in range(n))
        f_out[i, j] = standard(graph.norms[1 + i * n + j], graph.operations[i][j](f_in))
        g = graph.combine.weight[:, (i * n + j) * d:(i * n + j + 1) * d]
        total = total + sink[i, j] * convolve(graph.combine, g, f_out[i, j])
    return residual(graph, x, total)


def close(a, b):
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-10 * b.abs().max().clamp(min=1)


# ---------------------------------------------------------------- cells

SPECS = [*(SearchSpace(4, width=8).sample(seed) for seed in range(6)),
         *(random_cell(seed, width=8).cell for seed in range(3))]


@pytest.mark.parametrize("normalise,training", [*product((True, False), repeat=2)])
def test_new_cell_is_the_identity_to_the_last_bit(normalise, training):
    for spec, shape in product(SPECS, ((2, 12, 4, 3, 5), (1, 12, 1, 2, 2))):
        torch.manual_seed(0)
        cell = AttentionCell(12, spec, normalise).train(training)
        x = torch.randn(shape)
        assert cell(x).equal(x) and cell(x).shape == x.shape


@pytest.mark.parametrize("normalise,training", [*product((True, False), repeat=2)])
def test_cell_is_its_definition(normalise, training):
    for spec in SPECS:
        cell = scramble(AttentionCell(12, spec, normalise, **double)).train(training)
        x = clip(2, 12, 4, 3, 5)
        close(cell(x), cell_by_definition(cell, x))


def test_one_operation_cell_is_a_non_local_block():
    "Wang et al. 2018, embedded Gaussian: y_i = sum_j softmax_j(theta(x_i) . phi(x_j) / sqrt d) g(x_j); z = x + BN(W y)."
    cell = scramble(AttentionCell(6, CellSpec((st_dot,), ((0,),), width=4), normalise=False, **double)).eval()
    cell.input_weights[0].data.fill_(1)
    x, op = clip(2, 6, 3, 2, 3), cell.operations[0]
    z = torch.empty_like(x)
    for b in range(2):
        places = list(product(range(3), range(2), range(3)))
        embedded = [cell.stem.weight @ x[(b, slice(None), *p)] + cell.stem.bias for p in places]
        theta, phi, g = ([layer.weight @ e + layer.bias for e in embedded] for layer in (op.query, op.key, op.value))
        for i, place in enumerate(places):
            powers = [(theta[i] @ other / 2).exp() for other in phi]
            y = cell.combine.weight @ (sum(p * v for p, v in zip(powers, g)) / sum(powers))
            norm = cell.zero_norm
            y = (y - norm.running_mean) / (norm.running_var + norm.eps).sqrt() * norm.weight + norm.bias
            z[(b, slice(None), *place)] = x[(b, slice(None), *place)] + y
    close(cell(x), z)


def test_initial_input_weights_and_trainable_parameters():
    cell = AttentionCell(12, CellSpec((st_dot,) * 3, ((0,), (0, 1), (0, 1, 2)), width=8))
    assert [w.tolist() for w in cell.input_weights] == [pytest.approx([1 / k] * k) for k in (1, 2, 3)]
    assert cell.combine.bias is None and not any(p.requires_grad for n in cell.norms for p in n.parameters())


def test_features_leave_standardised():
    cell, seen = AttentionCell(12, SPECS[-1], **double), []
    for norm in cell.norms: norm.register_forward_hook(lambda module, args, out: seen.append(out))
    cell(clip(8, 12, 6, 3, 3))
    assert len(seen) == len(SPECS[-1].operations) + 1
    for f in seen:
        close(f.mean((0, 2, 3, 4)), torch.zeros(8, **double))
        assert (f.var((0, 2, 3, 4), unbiased=False) > 0.5).all()


def test_every_parameter_of_a_cell_learns():
    "24 operations in a cell, once the residual is open. Only what a softmax or the norm after it takes away is silent."
    ops = tuple(OperationSpec(d, t, a) for d, t, a in product(DIMENSIONS, ("map-based", "dot-product"), ACTIVATIONS))
    torch.manual_seed(0)
    chain = tuple((0, k - 1) if k > 1 else (0,) for k in range(1, 25))
    cell = AttentionCell(12, CellSpec(ops, chain, width=8), **double)
    cell.zero_norm.weight.data.fill_(1)
    cell(clip(4, 12, 4, 3, 3)).sin().sum().backward()
    for name, p in cell.named_parameters():
        op = ops[int(name.split(".")[1])] if name.startswith("operations") else None
        silent = op and op.activation == "softmax" and name.endswith(
            {"map-based": "score.bias", "dot-product": ("key.bias", "value.bias")}[op.type])
        assert silent or p.grad.abs().max() > 1e-9, name


def test_cell_errors_and_state():
    cell = AttentionCell(12, SPECS[0])
    for shape in ((0, 12, 2, 2, 2), (12, 2, 2, 2), (1, 8, 2, 2, 2)):
        with pytest.raises(AttnnasError, match=r"\(B, 12, T, H, W\)"): cell(torch.zeros(shape))
    other = scramble(AttentionCell(12, SPECS[0]))
    cell.load_state_dict(other.state_dict())
    x = torch.randn(2, 12, 3, 4, 4)
    assert cell.eval()(x).equal(other.eval()(x)) and not cell(x).equal(x)


# ---------------------------------------------------------------- supergraphs

def graph_of(parameterisation="softmax", activations="fixed", normalise=True, levels=3, nodes=None, seed=0):
    nodes = level_nodes(activations=activations) if nodes is None else nodes
    connections = ConnectionWeights(levels, len(nodes), parameterisation, activations, **double)
    graph = Supergraph(6, 4, levels, nodes, connections, activations, normalise, **double)
    scramble(graph, seed)
    for p in connections.parameters(): nn.init.normal_(p)
    return graph


@pytest.mark.parametrize("parameterisation,activations,training",
                         [*product(("softmax", "free"), ("fixed", "mixture"), (True, False))])
def test_supergraph_is_the_talks_formula(parameterisation, activations, training):
    x = clip(2, 6, 3, 2, 3)
    for normalise, levels in ((True, 3), (False, 2), (True, 1)):
        graph = graph_of(parameterisation, activations, normalise, levels).train(training)
        close(graph(x), graph_by_definition(graph, x))


def test_new_supergraph_is_the_identity_with_equal_weights():
    x = torch.randn(2, 12, 4, 3, 5)
    for parameterisation, activations in product(("softmax", "free"), ("fixed", "mixture")):
        connections = ConnectionWeights(4, 6, parameterisation, activations)
        graph = Supergraph(12, 8, connections=connections, activations=activations)
        assert graph(x).equal(x)
        torch.testing.assert_close(connections.level_weights(), torch.full((3, 6, 6), 1 / 6))
        torch.testing.assert_close(connections.sink_weights(), torch.full((4, 6), 1 / 24))
    assert Supergraph(12, 8).connections.activation_weights() is None
    torch.testing.assert_close(graph.connections.activation_weights(), torch.full((4, 6, 4), 0.25))


@pytest.mark.parametrize("parameterisation", ["softmax", "free"])
def test_gradients_reach_the_connections_once_the_residual_is_open(parameterisation):
    torch.manual_seed(0)
    graph = Supergraph(12, 8, 3, connections=ConnectionWeights(3, 6, parameterisation, "mixture", **double),
                       activations="mixture", **double)
    learnt = list(graph.connections.parameters())
    assert len(learnt) == 2 + 3 * 6
    for scale in (0, 1):
        graph.zero_norm.weight.data.fill_(scale)
        graph.zero_grad()
        graph(clip(4, 12, 4, 3, 3)).sin().sum().backward()
        for p in learnt: assert bool((p.grad.abs() > 1e-12).all()) == bool(scale)


def test_shared_connections():
    shared = ConnectionWeights(2, 6, **double)
    graphs = nn.ModuleList(Supergraph(c, 4, 2, connections=shared, **double) for c in (6, 10))
    assert sum(p is shared.sink for p in graphs.parameters()) == 1
    for graph in graphs: graph.zero_norm.weight.data.fill_(1)
    gradients = []
    for used in ((0,), (1,), (0, 1)):
        graphs.zero_grad()
        sum(graphs[i](clip(2, (6, 10)[i], 3, 2, 2)).sin().sum() for i in used).backward()
        gradients.append(shared.sink.grad.clone())
    close(gradients[0] + gradients[1], gradients[2])


def test_supergraph_errors():
    with pytest.raises(AttnnasError, match="Did you mean 'softmax'"): ConnectionWeights(2, 6, "sofmax")
    with pytest.raises(AttnnasError, match="mixed"): Supergraph(12, 8, activations="mixed")
    with pytest.raises(AttnnasError, match=r"\(3, 6, 'fixed'\)"): Supergraph(12, 8, 3, connections=ConnectionWeights(4, 6))
    with pytest.raises(AttnnasError, match="decided"): Supergraph(12, 8, operations=level_nodes(activations="mixture"))
    with pytest.raises(AttnnasError, match="none"): Supergraph(12, 8, operations=())
    with pytest.raises(AttnnasError, match="T, H, W"): Supergraph(12, 8)(torch.zeros(0, 12, 2, 2, 2))


# ---------------------------------------------------------------- derivation

a, b = OperationSpec("spatial", "map-based", "sigmoid"), OperationSpec("temporal", "dot-product", "softmax")
sink = torch.tensor([[0.0, 0.1], [0.5, 0.2], [-0.9, 0.4]])
level = torch.tensor([[[0.7, 0.3], [0.6, -0.8]], [[0.5, 0.5], [0.2, 0.9]]])


@pytest.mark.parametrize("options,text,kept", [
    (dict(alpha=1, beta=1), "1: spatial map-based sigmoid(0); 2: spatial map-based sigmoid(1) -> 2", ((0, 0), (1, 0))),
    (dict(alpha=1, beta=2), "1: spatial map-based sigmoid(0); 2: temporal dot-product softmax(0); "
                            "3: spatial map-based sigmoid(1,2) -> 3", ((0, 0), (0, 1), (1, 0))),
    (dict(alpha=2, beta=1), "1: spatial map-based sigmoid(0); 2: spatial map-based sigmoid(1); 3: temporal dot-product "
                            "softmax(1); 4: temporal dot-product softmax(3) -> 2,4", ((0, 0), (1, 0), (1, 1), (2, 1))),
    (dict(alpha=1, beta=1, by="magnitude"), "1: spatial map-based sigmoid(0); 2: spatial map-based sigmoid(1); "
                                            "3: spatial map-based sigmoid(2) -> 3", ((0, 0), (1, 0), (2, 0))),
])
def test_derivation_by_hand(options, text, kept):
    found = derive(level, sink, (a, b), width=16, **options)
    assert str(found.cell) == text and found.kept == kept and found.cell.width == 16
    assert derive(level, sink, (a, b), width=16, **options) == found


def test_margins():
    found = derive(level, sink, (a, b), alpha=2, beta=1)
    assert found.margins == pytest.approx({"sink": 0.2, "inputs of (1, 0)": 0.4, "inputs of (1, 1)": 1.4,
                                           "inputs of (2, 1)": 0.7})
    assert derive(level, sink, (a, b), alpha=6, beta=2).margins == {}
    activation = torch.tensor([0.1, 0.2, 0.3, 0.4]).expand(3, 2, 4)
    found = derive(level, sink, (a, b), alpha=1, beta=1, activation_weights=activation)
    assert found.margins["activation of (1, 0)"] == pytest.approx(0.1)


def test_ties_go_to_the_lowest_level_then_the_lowest_node():
    equal = derive(torch.full((2, 3, 3), 1 / 3), torch.full((3, 3), 1 / 9), (a, b, st_dot), alpha=4, beta=2)
    assert equal.kept == ((0, 0), (0, 1), (0, 2), (1, 0)) and equal.cell.inputs[3] == (1, 2)
    assert set(equal.margins.values()) == {0.0}
    mixture = derive(torch.full((1, 2, 2), 0.5), torch.full((2, 2), 0.25), level_nodes(activations="mixture")[:2], 1, 1,
                     activation_weights=torch.full((2, 2, 4), 0.25))
    assert mixture.cell.operations[0].activation == "none"


def test_activations_are_the_largest_of_the_mixture():
    weights = torch.rand(4, 6, 4, generator=generator("activation"))
    found = derive(torch.rand(3, 6, 6, generator=generator(1)), torch.rand(4, 6, generator=generator(2)),
                   level_nodes(activations="mixture"), activation_weights=weights)
    for operation, (i, j) in zip(found.cell.operations, found.kept):
        assert operation.activation == ACTIVATIONS[weights[i, j].argmax()]
        assert (operation.dimension, operation.type) == (level_nodes()[j].dimension, level_nodes()[j].type)


def test_derivation_on_random_weights_is_the_recursion():
    def reached(i, j, level, beta):
        best = sorted(range(6), key=lambda k: -level[i - 1, j, k])[:beta] if i else []
        return {(i, j)}.union(*(reached(i - 1, k, level, beta) for k in best))
    for seed, alpha, beta in product(range(10), (1, 3, 24), (1, 2, 6)):
        level, sink = (torch.rand(shape, generator=generator(seed, *shape)) for shape in ((3, 6, 6), (4, 6)))
        found = derive(level, sink, level_nodes(), alpha, beta)
        top = sorted(product(range(4), range(6)), key=lambda node: -sink[node])[:alpha]
        assert set(found.kept) == set().union(*(reached(*node, level, beta) for node in top))
        assert {found.kept[k - 1] for k in found.cell.outputs} == set(top)
        for (i, j), read in zip(found.kept, found.cell.inputs):
            assert read == (0,) if i == 0 else {found.kept[f - 1][1] for f in read} == set(
                sorted(range(6), key=lambda k: -level[i - 1, j, k])[:beta])


@pytest.mark.parametrize("change,says", [
    (dict(alpha=7), "alpha.*1 to 6"), (dict(alpha=0), "alpha"), (dict(beta=3), "beta.*1 to 2"), (dict(beta=1.5), "beta"),
    (dict(nodes=(a,)), "sink weights have shape"), (dict(level_weights=level[:1]), r"level weights have shape \(2, 2, 2\)"),
    (dict(sink_weights=sink * float("nan")), "sink weights are not finite"), (dict(by="rank"), "ranking"),
    (dict(activation_weights=torch.zeros(3, 2, 3)), "activation weights"), (dict(nodes=level_nodes(activations="mixture")[:2]), "decided"),
])
def test_derivation_errors(change, says):
    arguments = dict(level_weights=level, sink_weights=sink, nodes=(a, b), alpha=2, beta=1) | change
    with pytest.raises(AttnnasError, match=says): derive(**arguments)


def test_random_cells():
    for activations in ("fixed", "mixture"):
        cells = [random_cell(seed, levels=3, width=8, activations=activations) for seed in range(20)]
        assert cells == [random_cell(seed, levels=3, width=8, activations=activations) for seed in range(20)]
        assert len({c.cell.hash for c in cells}) == 20 and all(len(c.cell.outputs) == 3 for c in cells)
    used = {o.activation for c in cells for o in c.cell.operations}
    assert used == set(ACTIVATIONS)
    assert {j for seed in range(60) for _, j in random_cell(seed).kept} == set(range(6))


@pytest.mark.parametrize("parameterisation,activations,training",
                         [*product(("softmax", "free"), ("fixed", "mixture"), (True, False))])
def test_a_supergraph_without_what_was_left_out_is_its_derived_cell(parameterisation, activations, training):
    for seed, normalise in product(range(3), (True, False)):
        graph = graph_of(parameterisation, activations, normalise, seed=seed)
        connections = graph.connections
        found = derive(connections.level_weights(), connections.sink_weights(), graph.nodes, 3, 2, 4,
                       graph.connections.activation_weights())
        leave_only(graph, found)
        graph.train(training)
        x, cell = clip(2, 6, 3, 2, 3), carry_over(graph, found)
        assert cell.training == training and cell.spec == found.cell
        close(cell(x), graph(x))
        assert not torch.allclose(graph(x), x)
