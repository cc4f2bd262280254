"""Attention and the 24 operations against their definitions, written out position by position."""
from itertools import product

import pytest
import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnnas.attention.formula import ACTIVATIONS, activate, attend, attention_weights
from attnnas.core.errors import AttnnasError
from attnnas.cells.operations.base import DIMENSIONS, TYPES, fold, unfold
from attnnas.cells.operations.registry import create_operation

KINDS = list(product(DIMENSIONS, TYPES))
ALL = list(product(DIMENSIONS, TYPES, ACTIVATIONS))
# odd sizes; one frame; more moments than features; one position
SHAPES = [(2, 8, 3, 2, 5), (1, 8, 1, 3, 3), (1, 8, 11, 1, 1), (1, 8, 1, 1, 1)]


def make(dimension, type, activation, width=8, seed=0):
    torch.manual_seed(seed)
    operation = create_operation(dimension, type, activation, width, dtype=torch.float64)
    for p in operation.parameters(): torch.nn.init.normal_(p, std=0.6)
    return operation


def clip(*shape, seed=1):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def scaled(scores, activation):
    "A list of scores -> a list of weights whose mean acts on values."
    if activation == "softmax":
        top = max(scores)
        powers = [(s - top).exp() for s in scores]
        return [len(scores) * p / sum(powers) for p in powers]
    return [{"none": s, "relu": max(s, s * 0), "sigmoid": 1 / (1 + (-s).exp())}[activation] for s in scores]


def positions(shape, dimension):
    "Position -> the places (t, h, w) that are folded into it, in order."
    groups = {}
    for t, h, w in product(*map(range, shape[2:])):
        key = {"spatial": (0, h, w), "temporal": (t, 0, 0), "spatiotemporal": (t, h, w)}[dimension]
        groups.setdefault(key, []).append((t, h, w))
    return groups


def by_definition(operation, x):
    groups, p = positions(x.shape, operation.dimension), dict(operation.named_parameters())
    layer = lambda name, v: p[f"{name}.weight"] @ v + p[f"{name}.bias"]
    y = torch.empty_like(x)
    for b in range(len(x)):
        if hasattr(operation, "query"):
            q, k, v = ({g: torch.cat([layer(name, x[(b, slice(None), *place)]) for place in places])
                        for g, places in groups.items()} for name in ("query", "key", "value"))
            for g, places in groups.items():
                weights = scaled([(q[g] @ k[o]) / len(q[g]) ** 0.5 for o in groups], operation.activation)
                out = sum(w * v[o] for w, o in zip(weights, groups)) / len(groups)
                for place, part in zip(places, out.split(x.shape[1])): y[(b, slice(None), *place)] = part
        else:
            relu = lambda place: layer("reduce", x[(b, slice(None), *place)]).clamp(min=0)
            hidden = {g: sum(map(relu, places)) / len(places) for g, places in groups.items()}
            absent = ("spatial", "temporal", "temporal")  # the dimension in which the kernel does not reach along T, H, W
            reach = [(0,) if operation.dimension == other else (-1, 0, 1) for other in absent]
            kernel, scores = p["score.weight"][0], []
            for g in groups:
                score = p["score.bias"][0]
                for offset in product(*reach):
                    near = tuple(a + o for a, o in zip(g, offset))
                    tap = tuple(o + (1 if len(r) == 3 else 0) for o, r in zip(offset, reach))
                    if near in hidden: score = score + kernel[(slice(None), *tap)] @ hidden[near]
                scores.append(score)
            for (g, places), weight in zip(groups.items(), scaled(scores, operation.activation)):
                for place in places: y[(b, slice(None), *place)] = weight * layer("value", x[(b, slice(None), *place)])
    return y


@pytest.mark.parametrize("dimension,type,activation", ALL)
def test_operation_is_its_definition(dimension, type, activation):
    operation = make(dimension, type, activation)
    with torch.no_grad():
        for shape in SHAPES:
            x = clip(*shape)
            torch.testing.assert_close(operation(x), by_definition(operation, x), atol=1e-10, rtol=0)


@pytest.mark.parametrize("dimension,type,activation", [*ALL, *((*kind, "mixture") for kind in KINDS)])
def test_gradients(dimension, type, activation):
    operation = make(dimension, type, activation, width=4)
    names, values = zip(*operation.named_parameters())
    call = lambda x, *p: functional_call(operation, dict(zip(names, p)), (x,))
    for shape in ((1, 4, 2, 1, 2), (2, 4, 3, 2, 1)):
        assert torch.autograd.gradcheck(call, (clip(*shape).requires_grad_(), *values), fast_mode=True)


@pytest.mark.parametrize("dimension,type", KINDS)
def test_mixture_is_the_weighted_sum_of_the_four(dimension, type):
    mixture, x = make(dimension, type, "mixture"), clip(2, 8, 3, 2, 5)
    state = {name: p for name, p in mixture.state_dict().items() if name != "mixture_logits"}
    results = []
    for activation in ACTIVATIONS:
        single = make(dimension, type, activation)
        single.load_state_dict(state)
        results.append(single(x))
    expected = sum(w * r for w, r in zip(mixture.mixture_logits.softmax(0), results))
    torch.testing.assert_close(mixture(x), expected, atol=1e-12, rtol=0)
    for k, result in enumerate(results):
        mixture.mixture_logits.data = torch.full((4,), -1e4, dtype=torch.float64).index_fill(0, torch.tensor(k), 0)
        torch.testing.assert_close(mixture(x), result, atol=1e-12, rtol=0)
    fresh = create_operation(dimension, type, "mixture", 8)
    assert fresh.mixture_logits.shape == (4,) and not fresh.mixture_logits.any()


@pytest.mark.parametrize("dimension,type", KINDS)
def test_what_can_be_permuted(dimension, type):
    "Pairs know no order. A map's convolution sees its neighbours, and a mean over the rest sees no order there."
    x, order_t, order_w = clip(1, 8, 5, 1, 6), torch.tensor([3, 0, 4, 1, 2]), torch.tensor([5, 2, 0, 4, 1, 3])
    for activation in ACTIVATIONS:
        operation = make(dimension, type, activation)
        frames = torch.allclose(operation(x[:, :, order_t]), operation(x)[:, :, order_t], atol=1e-12)
        places = torch.allclose(operation(x[..., order_w]), operation(x)[..., order_w], atol=1e-12)
        assert frames == (type == "dot-product" or dimension == "spatial")
        assert places == (type == "dot-product" or dimension == "temporal")


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_map_weights(dimension):
    x = clip(2, 8, 4, 3, 5)
    shape = {"spatial": (2, 1, 1, 3, 5), "temporal": (2, 1, 4, 1, 1), "spatiotemporal": (2, 1, 4, 3, 5)}[dimension]
    for activation in ACTIVATIONS:
        operation = make(dimension, "map-based", activation)
        weights = operation.weights(x)
        assert weights.shape == shape
        torch.testing.assert_close(operation(x), weights * operation.value(x), atol=1e-12, rtol=0)
        if activation == "softmax":
            torch.testing.assert_close(weights.mean((2, 3, 4)), torch.ones(2, 1, dtype=torch.float64))
        if activation == "relu": assert (weights >= 0).all()
        if activation == "sigmoid": assert ((weights > 0) & (weights < 1)).all()


@pytest.mark.parametrize("dimension", DIMENSIONS)
@pytest.mark.parametrize("activation", [*ACTIVATIONS, "mixture"])
def test_dot_product_weights(dimension, activation):
    operation, x = make(dimension, "dot-product", activation), clip(2, 8, 4, 3, 5)
    count = {"spatial": 15, "temporal": 4, "spatiotemporal": 60}[dimension]
    weights = operation.weights(x, torch.arange(count))
    assert weights.shape == (2, count, count)
    value = operation.value(fold(x, dimension)).flatten(2)
    torch.testing.assert_close(operation(x), unfold(weights @ value, dimension, x.shape), atol=1e-12, rtol=0)
    torch.testing.assert_close(operation.weights(x, torch.tensor([3, 1])), weights[:, [3, 1]], atol=1e-12, rtol=0)
    if activation == "softmax": torch.testing.assert_close(weights.sum(-1), torch.ones(2, count, dtype=torch.float64))


@pytest.mark.parametrize("dimension,type", KINDS)
def test_memory_format_does_not_matter(dimension, type):
    operation, x = make(dimension, type, "softmax"), clip(2, 8, 4, 3, 5)
    last = x.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(operation(last), operation(x), atol=1e-12, rtol=0)


def test_maps_start_open():
    "A fresh ReLU map lets features through: its weights are near one, not dead."
    x = torch.randn(4, 24, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    for seed, dimension in product(range(5), DIMENSIONS):
        torch.manual_seed(seed)
        weights = create_operation(dimension, "map-based", "relu", 24).weights(x)
        assert 0.2 < weights.mean() < 2


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("queries,keys,features", [(3, 5, 7), (6, 20, 4), (1, 1, 2)])
def test_attend_is_the_equation(activation, queries, keys, features):
    q, k, v = clip(2, 3, queries, features), clip(2, 3, keys, features, seed=2), clip(2, 3, keys, features, seed=3)
    for scale in (None, 0.3):
        factor = features ** -0.5 if scale is None else scale
        for b, h, i in product(range(2), range(3), range(queries)):
            weights = torch.stack(scaled([factor * (q[b, h, i] @ key) for key in k[b, h]], activation)) / keys
            for got, expected in ((attention_weights(q, k, activation, scale), weights),
                                  (attend(q, k, v, activation, scale), weights @ v[b, h])):
                torch.testing.assert_close(got[b, h, i], expected, atol=1e-12, rtol=0)


def test_softmax_over_many_keys_uses_the_fused_kernel():
    "The kernel alone is allowed: the matrix is never stored, whatever the layout of what comes in."
    x = torch.randn(2, 16, 70)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        attend(*(x.transpose(1, 2) for _ in range(3)))
        create_operation("spatiotemporal", "dot-product", "softmax", 16)(torch.randn(2, 16, 4, 5, 6))


def test_errors():
    operation = create_operation("temporal", "map-based", "relu", 8)
    for shape in ((0, 8, 2, 2, 2), (1, 8, 0, 2, 2), (8, 2, 2, 2), (1, 4, 2, 2, 2)):
        with pytest.raises(AttnnasError, match=r"\(B, 8, T, H, W\)"): operation(torch.zeros(shape))
        with pytest.raises(AttnnasError): operation.weights(torch.zeros(shape))
    for wrong in (("time", "map-based", "relu"), ("temporal", "map", "relu"), ("temporal", "map-based", "tanh")):
        with pytest.raises(AttnnasError, match="Unknown"): create_operation(*wrong, 8)
    with pytest.raises(AttnnasError, match="sigmoid"): activate(torch.zeros(3), "sigmoidal")
