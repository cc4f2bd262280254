"""Cells that one can afford: keys that are pooled, and searches that stay within a budget."""
import json
import random as chance
from dataclasses import asdict, replace
from itertools import islice

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
from attnnas.cli.train import _print_cell
from attnnas.evidence.config import RunConfig
from attnnas.evidence.insertions import DerivedCell, Search
from attnnas.evidence.run import key_of, run, search_result
from attnnas.evidence.sources import Generated
from attnnas.evidence.store import Store
from attnnas.evidence.tables.state_of_the_art import count
from attnnas.networks.insertion import insert
from attnnas.networks.profile import count_flops
from attnnas.networks.registry import create_model
from attnnas.search.afford import Weights, cheapest_derivable, derive_within
from attnnas.search.bandit import bandit
from attnnas.search.base import EpochLog, Past, SearchResult, Trial
from attnnas.search.budget import (
    Budget, OverBudget, cell_multiply_adds, cheapened, cheapest_cell, named_budget, site_budget, within)
from attnnas.search.cost import operation_costs
from attnnas.search.differentiable import SearchConfig, result_of
from attnnas.search.evolution import EvolutionConfig, evolution
from attnnas.search.methods import METHODS, search_config
from attnnas.search.pareto import COST, front, pareto, plot_front
from attnnas.search.random import random
from attnnas.search.study import AnotherStudy
from attnnas.training.loop import TrainingConfig
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


# ---- a budget

CLIP = (1, 3, 8, 24, 24)
SITES = {"shallow": (1, 12, 4, 6, 6), "deep": (1, 20, 2, 3, 3)}


def budget_of(most: int, sites=SITES) -> Budget: return Budget(most, "Net", 10**7, dict(sites))


@pytest.mark.parametrize("width", [1, 6, 8])
def test_the_cost_of_a_cell_is_what_the_profile_counts(width):
    types = (*OFFERS, "channel")
    for seed in range(20):
        cell = SearchSpace(3, width, types=types, activations=("sigmoid", "softmax")).sample(seed)
        for shape in SITES.values():
            assert cell_multiply_adds(cell, shape) == count_flops(AttentionCell(shape[1], cell), shape) // 2


def test_a_budget_is_counted_at_the_real_sites_of_the_network():
    network = create_model("i3d_small", num_classes=5)
    cell = cell_of(POOLED[2], WHOLE[1], width=8)
    plain = count_flops(network, CLIP) // 2
    share, number = (site_budget(text, network, example=CLIP) for text in ("0.25x", "2e6"))
    assert (share.most, share.whole, number.most) == (plain // 4, plain, 2_000_000)
    with_cells = count_flops(insert(create_model("i3d_small", num_classes=5), cell), CLIP) // 2
    assert share.cost(cell) == with_cells - plain
    assert site_budget("0.25x", insert(network, cell), example=CLIP) == share, "what is inserted does not count"
    assert Budget.from_dict(json.loads(json.dumps(share.to_dict()))) == share
    with pytest.raises(AttnnasError, match="Mixed_9z"): site_budget("1x", network, ["Mixed_9z"], CLIP)
    assert len(named_budget("96e9", "i3d_r50").sites) == 5


@pytest.mark.parametrize("options,says", [
    ({"budget": "half"}, "0.5x"), ({"budget": "-1"}, "0.5x"), ({"budget": "nan"}, "0.5x"), ({"budget": "x"}, "0.5x"),
    ({"budget": "1e400"}, "0.5x"), ({"budget": 2e9}, "expected str"), ({"budget_in": "i3d"}, "Give a budget"),
    ({"budget": "1x", "budget_in": "i4d"}, "Did you mean 'i3d'")])
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_that_is_none_is_refused_before_any_work(method, options, says):
    with pytest.raises(AttnnasError, match=says): search_config({"method": method} | options)


def weights_of(levels: int, nodes: int, mixture: bool) -> Weights:
    activation = torch.randn(levels, nodes, 4).softmax(-1) if mixture else None
    return Weights(torch.randn(levels - 1, nodes, nodes).softmax(-1),
                   (2 * torch.randn(levels * nodes)).softmax(0).view(levels, nodes), activation)


@pytest.mark.parametrize("start", range(0, 1000, 250))
def test_no_derived_cells_are_over_any_of_1000_budgets(start):
    "Random weights, shared and of each site, and budgets around what can be had; refused only where nothing fits."
    refused = changed = 0
    for seed in range(start, start + 250):
        torch.manual_seed(seed)
        pick = chance.Random(seed)
        mixture, levels, width = pick.random() < 0.5, pick.randint(1, 3), pick.choice((2, 8))
        nodes = level_nodes(activations="mixture" if mixture else "fixed", keys=pick.choice(("all", "pooled", "any")))
        first = weights_of(levels, len(nodes), mixture)
        shared = pick.random() < 0.5
        weights = {site: first if shared else weights_of(levels, len(nodes), mixture) for site in SITES}
        parts = [SITES] if shared else [{site: shape} for site, shape in SITES.items()]
        least = sum(budget_of(0, part).cost(cheapest_derivable(nodes, width, budget_of(0, part))) for part in parts)
        budget = budget_of(int(least * 2 ** pick.uniform(-0.5, 5)) + pick.randint(-1, 1))
        alpha, beta = pick.randint(1, 3), pick.randint(1, 2)
        free = {site: derive(own.level, own.sink, nodes, alpha, beta, width, own.activation).cell for site, own in weights.items()}
        try: found = derive_within(weights, nodes, budget, alpha, beta, width)
        except OverBudget as error:
            assert budget.most < least == error.cheapest and error.most == budget.most
            refused += 1
            continue
        cells = {site: derivation.cell for site, derivation in found.items()}
        assert budget.cost(cells) <= budget.most and least <= budget.most
        assert sum(count_flops(AttentionCell(SITES[site][1], cell), SITES[site]) // 2 for site, cell in cells.items()) <= budget.most
        if budget.fits(free): assert cells == free
        else: changed += 1
        if shared: assert len(set(cells.values())) == 1
    assert refused > 10 and changed > 50


def test_the_exact_cost_of_the_cheapest_fits_and_one_less_does_not():
    torch.manual_seed(0)
    for activations in ("fixed", "mixture"):
        nodes = level_nodes(activations=activations)
        weights = dict.fromkeys(SITES, weights_of(2, len(nodes), activations == "mixture"))
        least = budget_of(0).cost(cheapest_derivable(nodes, 8, budget_of(0)))
        found = derive_within(weights, nodes, budget_of(least), width=8)
        assert budget_of(0).cost({site: derivation.cell for site, derivation in found.items()}) == least
        with pytest.raises(OverBudget, match="No cell fits"): derive_within(weights, nodes, budget_of(least - 1), width=8)


def test_a_budget_of_another_network_is_for_the_cells_that_go_there():
    torch.manual_seed(0)
    nodes = level_nodes(activations="mixture", keys="any")
    weights = {site: weights_of(2, 8, True) for site in ("a", "b")}
    budget = budget_of(0)
    for factor in (1.01, 1.5, 3):
        bound = replace(budget, most=int(factor * budget.cost(cheapest_derivable(nodes, 8, budget))))
        cells = {site: derivation.cell for site, derivation in derive_within(weights, nodes, bound, width=8).items()}
        assert bound.cost(cells["a"]) <= bound.most, "DerivedCell gives the first cell to sites of other names"


def test_a_log_keeps_its_budget_and_derives_within_it_for_any_alpha_and_beta():
    least = budget_of(0).cost(cheapest_derivable(level_nodes(activations="mixture"), 8, budget_of(0)))
    torch.manual_seed(0)
    weights = {"level": torch.rand(1, 6, 6).tolist(), "sink": torch.rand(2, 6).tolist(), "activation": torch.rand(2, 6, 4).tolist()}
    epochs = ({"epoch": 0, "top1": 1.0, "connections": dict.fromkeys(SITES, weights)},)
    free, bound = (EpochLog(epochs, width=8, budget=budget) for budget in (None, budget_of(2 * least)))
    assert "budget" not in free.to_dict()
    again = EpochLog.from_dict(json.loads(json.dumps(bound.to_dict())))
    assert again == bound
    for alpha, beta in ((1, 1), (3, 2), (12, 6)):
        assert bound.budget.fits(again.cells(alpha, beta))
        assert again.derive(alpha, beta, "deep").cell == again.cells(alpha, beta)["deep"]
    assert not bound.budget.fits(free.cells(3, 2))


# ---- black-box searches

SPACES = (SearchSpace(2, 4), SearchSpace(4, 4, types=OFFERS), SearchSpace(3, 4, chain=True), SearchSpace(3, 4, activations=("fixed",)))


@pytest.mark.parametrize("start", range(0, 1000, 250))
def test_no_proposal_is_over_any_of_1000_budgets(start):
    for seed in range(start, start + 250):
        pick = chance.Random(seed)
        space = pick.choice(SPACES)
        cheapest = budget_of(0).cost(cheapest_cell(space, budget_of(0)))
        budget = budget_of(int(cheapest * 2 ** (3 * pick.random() ** 2)))
        past = Past(space, seed, 0, [], [], set(), budget)
        drawn = past.draw()
        near = past.first_new(islice(past.walk(drawn), 1, None))
        for cell in (drawn, near, cheapened(space.sample(seed), space, budget)):
            if cell is not None: assert cell in space and budget.fits(cell)
        assert drawn is not None


def made_up(cell, seed):
    score = sum(o.type == "dot-product" for o in cell.operations) + seed % 7 / 10
    return {"score": score, COST: 10**7 + budget_of(0).cost(cell)}


@pytest.mark.parametrize("method,options", [(random, {}), (evolution, {"population": 3}), (bandit, {"startup": 3}), (pareto, {"startup": 3})])
def test_a_method_trains_no_cell_over_its_budget(method, options):
    space = SearchSpace(2, 4)
    for factor in (1.02, 1.3):
        budget = budget_of(int(factor * budget_of(0).cost(cheapest_cell(space, budget_of(0)))))
        tried = []

        def objective(cell, seed):
            tried.append(cell)
            return made_up(cell, seed)

        found = method(space, objective, 8, 0, budget=budget, show=False, **options)
        assert len(tried) == len(found.log.trials) == 8 and all(map(budget.fits, tried)) and budget.fits(found.best)
        again = SearchResult.from_dict(json.loads(json.dumps(found.to_dict())))
        assert again == found and again.log.budget == budget
    with pytest.raises(OverBudget, match="No cell fits"):
        method(space, made_up, 8, 0, budget=budget_of(100), show=False, **options)


def test_a_search_ends_where_every_cell_within_the_budget_is_tried():
    space = SearchSpace(2, 4, dimensions=("temporal",))
    budget = budget_of(int(1.1 * budget_of(0).cost(cheapest_cell(space, budget_of(0)))))
    different = {cell.hash for cell in within(space, budget)}
    assert different == {cell.hash for cell in space if budget.fits(cell)} and 3 < len(different) < 200
    found = random(space, made_up, 10**4, budget=budget, show=False)
    assert {trial.cell.hash for trial in found.log.trials} == different


def test_a_large_space_with_hardly_any_cell_within_the_budget_is_searched_at_once():
    "104 million cells, of which 315 are as cheap as the cheapest: none is drawn by chance, and none is listed in vain."
    space = SearchSpace(4, 4)
    budget = budget_of(budget_of(0).cost(cheapest_cell(space, budget_of(0))))
    found = random(space, made_up, 5, budget=budget, show=False)
    assert len(found.log.trials) == 5 and all(budget.fits(trial.cell) for trial in found.log.trials)


def test_a_journal_of_another_budget_is_another_study(tmp_path):
    space, path = SearchSpace(2, 4), tmp_path / "journal.jsonl"
    first = random(space, made_up, 2, journal=path, show=False, budget=budget_of(10**7))
    assert random(space, made_up, 2, journal=path, show=False, budget=budget_of(10**7)) == first
    for other in (None, budget_of(10**6)):
        with pytest.raises(AnotherStudy, match="budget"): random(space, made_up, 2, journal=path, show=False, budget=other)


def test_the_front_is_what_nobody_beats():
    pick = chance.Random(0)
    trials = [Trial(n, cell_of(WHOLE[0]), 0, {}, "finished", pick.randint(0, 9), metrics={COST: pick.randint(0, 9)}) for n in range(60)]
    trials.append(Trial(60, cell_of(WHOLE[0]), 0, {}, "diverged"))
    best = front(trials)
    points = {(t.metrics[COST], t.score) for t in trials[:60]}
    beaten = {p for p in points for q in points if q != p and q[0] <= p[0] and q[1] >= p[1]}
    assert [(t.metrics[COST], t.score) for t in best] == sorted(points - beaten)
    with pytest.raises(AttnnasError, match=COST): front([replace(trials[0], metrics={})])


def test_the_front_is_drawn_and_a_differentiable_search_has_none():
    found = pareto(SearchSpace(2, 4), made_up, 5, startup=3, show=False)
    axis = plot_front(found).axes[0]
    assert len(axis.collections[0].get_offsets()) == 5
    assert len(axis.lines[0].get_xdata()) == len(front(found.log.trials))
    with pytest.raises(AttnnasError, match="tries no cells"): plot_front(replace(found, log=EpochLog(())))


# ---- runs

TINY = Generated("A", frames=4, size=16, train_clips=24, validation_clips=8, test_clips=12)


@pytest.fixture(scope="module")
def store(tmp_path_factory): return Store(tmp_path_factory.mktemp("afford"))


def tiny(**search) -> RunConfig:
    options = search_config({"width": 8} | search)
    return RunConfig(TINY, insertion=Search(options), training=TrainingConfig(epochs=1, batch_size=8))


@pytest.mark.parametrize("search", [
    {"levels": 2, "keys": "any"}, {"levels": 2, "connections": "per-site"},
    {"method": "evolution", "trials": 3, "operations": 2}], ids=str)
def test_a_run_keeps_its_budget_and_so_does_the_network_with_its_cell(search, store, tmp_path, capsys):
    config = tiny(budget="0.2x", **search)
    assert key_of(config) != key_of(tiny(**search)) and "budget" not in tiny(**search).to_dict()["insertion"]["search"]
    record = run(config, store, "cpu")
    assert record.config["insertion"]["search"]["budget"] == "0.2x"
    found = search_result(record)
    plain = config.network.create(len(record.data["classes"]), 3)
    cells = DerivedCell(config).cells(plain, 0, found)
    without = count_flops(plain, TINY.tested_shape)
    with_cells = count_flops(DerivedCell(config).build(plain, cells), TINY.tested_shape)
    assert found.log.budget.cost(cells) == (with_cells - without) // 2 <= 0.2 * without / 2
    _print_cell(record, {}, tmp_path / "cell.json", ["i3d_r50"])
    told = capsys.readouterr().out
    assert f"Budget: {found.log.budget.cost(found.cells()):,} of {found.log.budget.most:,}" in told
    assert "In i3d_small, at" in told and "In i3d_r50, at" in told


@pytest.mark.parametrize("search", [{"levels": 2}, {"method": "random", "trials": 3, "operations": 2}], ids=str)
def test_a_run_whose_budget_nothing_fits_trains_nothing(search, store):
    config = tiny(budget="1000", **search)
    with pytest.raises(OverBudget, match="No cell fits the budget of 1,000 multiply-adds"): run(config, store, "cpu")
    assert store.get(key_of(config)) is None and not store.path(key_of(config), "checkpoint.safetensors").exists()


def test_a_budget_of_a_named_network_is_kept_there(store):
    config = tiny(levels=2, budget="0.01x", budget_in="i3d_r50")
    cells = search_result(run(config, store, "cpu")).cells()
    budget = named_budget("0.01x", "i3d_r50")
    network = create_model("i3d_r50", num_classes=600)
    shape = network.example_shape
    plain = count_flops(network, shape)
    assert (count_flops(insert(network, next(iter(cells.values()))), shape) - plain) // 2 <= budget.most


def test_table_5_counts_pooled_keys_and_a_found_cell_fits_what_its_row_prints():
    "The talk's cells add 96 GFLOPs to I3D-R50; a cell that compares all positions of res3 adds thousands."
    whole = CellSpec(WHOLE, ((0,), (1,), (2,)))
    pooled = CellSpec(POOLED, ((0,), (1,), (2,)))
    counted = {cell: count("I3D-R50+Cell", 600, cell)["multiply_adds"] for cell in (whole, pooled)}
    budget = named_budget("48e9", "i3d_r50")
    for cell, found in counted.items(): assert found - budget.whole == budget.cost(cell)
    assert budget.cost(whole) > 3 * budget.cost(pooled) > 3 * budget.most
    nodes = level_nodes(activations="mixture", keys="any")
    for seed in range(3):
        torch.manual_seed(seed)
        found = derive_within({"site": weights_of(2, len(nodes), True)}, nodes, budget)["site"].cell
        assert count("I3D-R50+Cell", 600, found)["multiply_adds"] - budget.whole <= 48e9 and len(found.outputs) > 1
