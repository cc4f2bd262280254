"""Cells that one can afford: keys that are pooled, and searches that stay within a budget."""
import json
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from attnnas.cells.cell import AttentionCell
from attnnas.cells.derivation import carry_over, derive
from attnnas.cells.fused import FusedSupergraph
from attnnas.cells.operations.dot_product import DotProductAttention
from attnnas.cells.operations.registry import create_operation
from attnnas.cells.space import SearchSpace
from attnnas.cells.spec import ALL_OPERATIONS, CellSpec, OperationSpec
from attnnas.cells.supergraph import TALK, ConnectionWeights, Supergraph, level_nodes, node_names
from attnnas.core.errors import AttnnasError
from attnnas.core.hashes import content_hash
from attnnas.evidence.config import RunConfig
from attnnas.evidence.insertions import DerivedCell, Search
from attnnas.evidence.run import key_of
from attnnas.networks.profile import count_flops
from attnnas.search.cost import operation_costs
from attnnas.search.differentiable import SearchConfig, result_of
from attnnas.search.evolution import EvolutionConfig
from genotypes import leave_only

DIMENSIONS = ("spatial", "temporal", "spatiotemporal")
POOLED = tuple(OperationSpec(d, "dot-product", "softmax", pool_keys=True) for d in DIMENSIONS)
WHOLE = tuple(replace(operation, pool_keys=False) for operation in POOLED)
OFFERS = ("map-based", "dot-product", "pooled dot-product")


def cell_of(*operations, width=4) -> CellSpec:
    return CellSpec(operations, tuple((k,) for k in range(len(operations))), width=width)


# ---- a description

def test_a_cell_that_pools_no_keys_is_described_and_named_as_before_there_was_a_choice():
    "If this fails, hashes, keys of committed records and journals change."
    cell = cell_of(*WHOLE)
    old = {"activation", "dimension", "type"}
    assert all(set(operation) == old for operation in cell.to_dict()["operations"])
    operations = [{name: getattr(o, name) for name in old} for o in cell.operations]
    before = {"operations": operations, "inputs": cell.inputs, "outputs": cell.outputs, "width": cell.width}
    assert cell.hash == content_hash(before)
    assert asdict(SearchSpace(4)).keys() == {"operations", "width", "dimensions", "types", "activations", "chain"}


def test_a_cell_that_pools_keys_is_another_cell_and_survives_its_file(tmp_path):
    cells = {cell_of(*WHOLE), cell_of(*POOLED), *(cell_of(*WHOLE[:k], POOLED[k], *WHOLE[k + 1:]) for k in range(3))}
    assert len({cell.hash for cell in cells}) == 5
    for cell in cells:
        cell.save(tmp_path / "cell.json")
        assert CellSpec.load(tmp_path / "cell.json") == cell == CellSpec.from_dict(json.loads(cell.to_json()))
        assert cell.with_all_keys() == cell_of(*WHOLE)
    assert "pooled dot-product" in str(cell_of(*POOLED)) and "pooled" not in str(cell_of(*WHOLE))


def test_the_standard_numbering_tells_pooled_keys_apart():
    a, b = WHOLE[2], POOLED[2]
    one, other = (CellSpec(pair, ((0,), (0,))) for pair in ((a, b), (b, a)))
    assert one.hash == other.hash != CellSpec((a, a), ((0,), (0,))).hash


@pytest.mark.parametrize("given,says", [
    ({"type": "map-based", "pool_keys": True}, "compares no keys"), ({"type": "channel", "pool_keys": True}, "compares no keys"),
    ({"pool_keys": 1}, "True or False"), ({"pool_keys": "2x2x2"}, "True or False"), ({"pool_keys": None}, "True or False"),
    ({"pooled": True}, "pool_keys")])
def test_bad_pooling_is_refused_with_the_operations_number(given, says):
    operation = {"dimension": "spatial", "type": "dot-product", "activation": "softmax"} | given
    with pytest.raises(AttnnasError, match=f"Operation 1 of the cell: .*{says}"):
        CellSpec.from_dict({"schema_version": 1, "operations": [operation], "inputs": [[0]]})


def test_a_module_without_keys_is_not_asked_to_pool_them():
    with pytest.raises(AttnnasError, match="compares no keys"): create_operation("spatial", "map-based", "none", 4, pool_keys=True)


# ---- the space

@pytest.mark.parametrize("types", [OFFERS, ("pooled dot-product",), ("map-based", "pooled dot-product")])
def test_a_space_with_pooled_keys_numbers_every_cell_once(types):
    space = SearchSpace(1, 8, types=types)
    cells = list(space)
    assert len(set(cells)) == len(cells) == space.size == 12 * len(types)
    for number, cell in enumerate(cells):
        assert space.index(cell) == number and cell in space and space.decode(space.encode(cell)) == cell
        near = space.neighbours(cell)
        assert len(set(near)) == len(near) and all(cell in space.neighbours(other) for other in near)
    pooled = [cell for cell in cells if cell.operations[0].pool_keys]
    assert len(pooled) == 12 and not any(cell in SearchSpace(1, 8) for cell in pooled)


def test_the_talks_space_offers_no_pooled_keys():
    assert SearchSpace(4).size == 104_509_440 and not any(o.pool_keys for o in ALL_OPERATIONS)
    assert EvolutionConfig().space == SearchSpace() and EvolutionConfig(keys="any").space.types == OFFERS
    with pytest.raises(AttnnasError, match="types name one twice"): SearchSpace(types=("pooled dot-product",) * 2)
    with pytest.raises(AttnnasError, match="dot-product"): SearchSpace(types=("pooled map-based",))


# ---- what is computed

@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("activation", ["none", "relu", "softmax", "sigmoid"])
def test_weights_of_pooled_keys_are_those_that_were_applied(dimension, activation):
    "Weights over all positions, times values that are alike within a pooled key, are the output."
    torch.manual_seed(0)
    operation = DotProductAttention(4, dimension, activation, pool_keys=True, dtype=torch.float64)
    x = torch.randn(2, 4, 5, 3, 4, dtype=torch.float64)
    axes = {"spatial": (3, 4), "temporal": (2,), "spatiotemporal": (2, 3, 4)}[dimension]
    first = x
    for axis in axes: first = first.index_select(axis, torch.arange(x.shape[axis]) // 2 * 2)
    count = {"spatial": 12, "temporal": 5, "spatiotemporal": 60}[dimension]
    with torch.no_grad():
        for layer in (operation.query, operation.key, operation.value): layer.bias.zero_()
        weights = operation.weights(first, torch.arange(count))
        value = operation.value(first.movedim(1, -1))
        fold = {"spatial": "btxyc->bxytc", "temporal": "btxyc->btxyc", "spatiotemporal": "btxyc->btxyc"}[dimension]
        folded = torch.einsum(f"{fold}", value).reshape(2, count, -1)
        expected = operation(first).movedim(1, -1)
        expected = torch.einsum(fold, expected).reshape(2, count, -1)
    torch.testing.assert_close(weights @ folded, expected)


@pytest.mark.parametrize("keys", ["pooled", "any"])
@pytest.mark.parametrize("activations", ["fixed", "mixture"])
@pytest.mark.parametrize("training", [True, False])
def test_the_fused_supergraph_with_pooled_keys_is_the_literal_one(keys, activations, training):
    torch.manual_seed(0)
    nodes = level_nodes(activations=activations, keys=keys)
    literal, fused = (kind(10, 8, 2, nodes, activations=activations, dtype=torch.float64).train(training)
                      for kind in (Supergraph, FusedSupergraph))
    for p in literal.parameters(): nn.init.normal_(p, std=0.5)
    fused.load_state_dict(literal.state_dict())
    x = torch.randn(2, 10, 3, 4, 5, dtype=torch.float64)
    outcomes = []
    for graph in (literal, fused):
        y = graph(x)
        outcomes.append([y, *torch.autograd.grad(y.sin().sum(), list(graph.parameters())), *graph.buffers()])
    for a, b in zip(*outcomes): torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", [Supergraph, FusedSupergraph])
@pytest.mark.parametrize("activations", ["fixed", "mixture"])
@pytest.mark.parametrize("keys", ["pooled", "any"])
def test_a_supergraph_without_what_was_left_out_is_its_derived_cell_with_pooled_keys(keys, activations, kind):
    "What the search trained is what the cell is."
    nodes = level_nodes(activations=activations, keys=keys)
    pooled = 0
    for seed in range(6):
        torch.manual_seed(seed)
        connections = ConnectionWeights(3, len(nodes), "free", activations, dtype=torch.float64)
        for p in connections.parameters(): nn.init.normal_(p)
        graph = kind(10, 8, 3, nodes, connections, activations, dtype=torch.float64).train(bool(seed % 2))
        graph.zero_norm.weight.data.fill_(1)
        found = derive(connections.level_weights(), connections.sink_weights(), graph.nodes, width=8,
                       activation_weights=connections.activation_weights())
        leave_only(graph, found)
        x = torch.randn(2, 10, 3, 4, 5, dtype=torch.float64)
        cell = carry_over(graph, found)
        y = graph(x)
        torch.testing.assert_close(cell(x), y, atol=1e-9, rtol=1e-9)
        has = [operation.pool_keys for operation in found.cell.operations]
        assert has == [module.pool_keys for module in cell.operations]
        pooled += sum(has)
        if any(has): assert not torch.allclose(whole(cell, found.cell)(x), y)
    assert pooled


def whole(cell: AttentionCell, spec: CellSpec) -> AttentionCell:
    "The same weights in the cell that pools no keys."
    other = AttentionCell(10, spec.with_all_keys(), dtype=torch.float64)
    other.load_state_dict(cell.state_dict())
    return other.train(cell.training)


def test_a_pooled_operation_costs_less_and_the_expected_cost_knows_it():
    shape, nodes = (1, 8, 8, 8, 8), level_nodes(keys="any")
    costs = operation_costs(nodes, 8, shape[2:])
    for whole_node, pooled_node in zip(WHOLE, POOLED):
        a, b = (count_flops(AttentionCell(8, cell_of(node, width=8)), shape) for node in (whole_node, pooled_node))
        assert b < a
        if pooled_node.dimension == "temporal": continue
        names = node_names(nodes)
        row = [costs[names.index(name)] for name in node_names((whole_node, pooled_node))]
        assert (row[1] <= row[0]).all() and row[1][2] < row[0][2] and 2 * (row[0][2] - row[1][2]) == a - b


# ---- a search

def searched(keys: str) -> RunConfig: return RunConfig(insertion=Search(SearchConfig(levels=2, width=8, keys=keys)))


def history(nodes: int) -> list:
    torch.manual_seed(0)
    weights = {"level": torch.rand(1, nodes, nodes).tolist(), "sink": torch.rand(2, nodes).tolist(),
               "activation": torch.rand(2, nodes, 4).tolist()}
    return [{"epoch": 0, "top1": 1.0, "connections": {"site": weights}}]


@pytest.mark.parametrize("keys", ["all", "pooled", "any"])
def test_a_search_derives_the_keys_that_it_trained(keys):
    config = SearchConfig(levels=2, width=8, keys=keys)
    found = result_of(config, history(len(config.level)), 0, {}, 0, {})
    assert found.log.level == config.level
    cell = found.cells(alpha=8, beta=3)["site"]
    pools = {operation.pool_keys for operation in cell.operations
             if operation.type == "dot-product" and operation.dimension != "temporal"}
    assert pools == {"all": {False}, "pooled": {True}, "any": {False, True}}[keys]
    assert not any(o.pool_keys for o in cell.operations if o.type != "dot-product")
    again = type(found).from_dict(json.loads(json.dumps(found.to_dict())))
    assert again.cells(alpha=8, beta=3)["site"] == cell


def test_names_of_a_level_make_it_again():
    for keys in ("all", "pooled", "any"):
        nodes = level_nodes(keys=keys)
        assert level_nodes(node_names(nodes)) == nodes
    assert node_names(level_nodes()) == TALK and len(level_nodes(keys="any")) == 8
    explicit = level_nodes(["temporal pooled dot-product"])
    assert explicit[0].pool_keys and level_nodes(node_names(explicit), keys="any") == explicit
    with pytest.raises(AttnnasError, match="compares no keys"): level_nodes(["spatial pooled map-based"])


def test_a_derived_cell_pools_as_its_search_did_and_is_another_run_than_one_with_all_keys():
    "Records from before there was a choice are of cells with all keys, and do not say so."
    for keys in ("pooled", "any"):
        search = searched(keys)
        new, old = DerivedCell(search), DerivedCell(search, cell_keys="all")
        assert new.cell_keys == "pooled" and "cell_keys" not in old.to_dict()
        runs = [RunConfig(insertion=insertion) for insertion in (new, old)]
        assert len({key_of(run) for run in runs}) == 2
        for run in runs: assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    plain = DerivedCell(searched("all"))
    assert plain == DerivedCell(searched("all"), cell_keys="all") and "cell_keys" not in plain.to_dict()
    with pytest.raises(AttnnasError, match="did not pool"): DerivedCell(searched("all"), cell_keys="pooled")
    with pytest.raises(AttnnasError, match="all, pooled|pooled"): DerivedCell(searched("pooled"), cell_keys="some")


def test_the_cell_that_is_inserted_pools_its_keys():
    search = searched("pooled")
    options = search.insertion.search
    found = result_of(options, history(6), 0, {}, 0, {})
    model = search.network.create(2, 3)
    cells = {name: next(iter(DerivedCell(search, 8, 3, cell_keys=name).cells(model, 0, found).values()))
             for name in ("pooled", "all")}
    assert cells["pooled"] == found.cells(8, 3)["site"] and any(o.pool_keys for o in cells["pooled"].operations)
    assert cells["all"] == cells["pooled"].with_all_keys() != cells["pooled"]
