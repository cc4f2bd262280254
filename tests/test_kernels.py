"""The ways to compute attention without its matrix, against loops, and that none of them makes the matrix."""
import os
import subprocess
import sys
from itertools import product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from attnnas.attention import kernels, triton as triton_kernels
from attnnas.attention.formula import (ACTIVATIONS, COMPATIBILITIES, PREPARATIONS, SCALINGS,
                                       Attention, activate, attend, attention_weights, local)
from attnnas.core.errors import AttnnasError
from attnnas.cells.fused import FusedSupergraph
from attnnas.cells.operations.registry import create_operation

from test_ops import clip, scaled

PATHS_OF = {"none": ("materialised", "chunked", "associative"), "relu": ("materialised", "chunked"),
            "sigmoid": ("materialised", "chunked"), "softmax": ("materialised", "chunked", "fused")}
EVERY = [(name, path) for name, paths in PATHS_OF.items() for path in paths]
# batch axes, queries, keys, features, width of the values: odd sizes, one position, more tiles than one
SIZES = [((2, 3), 3, 5, 7, 7), ((1,), 1, 1, 2, 2), ((), 6, 20, 4, 4), ((2,), 5, 4, 3, 6)]


def inputs(batch, queries, keys, features, width, dtype=torch.float64, grad=False):
    shapes = ((queries, features), (keys, features), (keys, width))
    return [clip(*batch, *shape, seed=i).to(dtype).requires_grad_(grad) for i, shape in enumerate(shapes)]


def gradients(function, tensors):
    y = function(*tensors)
    return y.detach(), *torch.autograd.grad(y, tensors, clip(*y.shape, seed=9).to(y))


@pytest.fixture
def small_tiles(monkeypatch):
    "Tiles of 16, so that small inputs have many."
    monkeypatch.setattr(kernels, "_tile", lambda device: 16)


class Made(TorchDispatchMode):
    "Records the elements of the largest tensor that is made inside."
    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor))])
        return result


# ---- values

@pytest.mark.parametrize("activation,path", EVERY)
def test_path_is_the_equation(activation, path):
    "Position by position, in float64 to 1e-10 and in float32 to 1e-5."
    for batch, queries, keys, features, width in SIZES:
        if path == "fused" and features != width: continue
        q, k, v = inputs(batch, queries, keys, features, width)
        y, y32 = attend(q, k, v, activation, 0.7, path), attend(q.float(), k.float(), v.float(), activation, 0.7, path)
        for place in product(*map(range, (*batch, queries))):
            rows, values = k[place[:-1]], v[place[:-1]]
            weights = scaled([0.7 * (q[place] @ key) for key in rows], activation)
            expected = sum(w * value for w, value in zip(weights, values)) / keys
            torch.testing.assert_close(y[place], expected, atol=1e-10, rtol=0)
            torch.testing.assert_close(y32[place], expected.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation,path", [*EVERY, ("mixture", "chunked")])
def test_gradients_over_many_tiles(activation, path, small_tiles, monkeypatch):
    "gradcheck, with tiles of 16 and rows left over."
    monkeypatch.setattr(kernels, "ROWS", 16)
    q, k, v = inputs((2,), 37, 21, 3, 3, grad=True)
    mixture = [torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64).requires_grad_()]
    call = lambda q, k, v, w=activation: attend(q, k, v, w, 0.7, path)
    assert torch.autograd.gradcheck(call, (q, k, v, *(mixture if activation == "mixture" else [])), fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_real_tiles_in_single_precision(activation):
    "Sizes that no tile divides, and keys that are views whose last axis is not contiguous, as the layers make them."
    tensors = [t.transpose(1, 2).contiguous().transpose(1, 2).detach().requires_grad_()
               for t in inputs((2,), 1030, 777, 12, 12, torch.float32)]
    best = gradients(lambda *a: attend(*a, activation), tensors)
    for one, other in zip(best, gradients(lambda *a: attend(*a, activation, path="materialised"), tensors)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("activation", list(kernels.ELEMENTWISE))
def test_half_precision_sums_over_tiles_in_float32(activation, small_tiles):
    "512 tiles of ones: bfloat16 alone would stop counting at 256."
    q, k = torch.full((1, 1, 1), 20.0, dtype=torch.bfloat16), torch.ones(1, 8192, 1, dtype=torch.bfloat16)
    y = attend(q, k, k, activation, 0.05, "chunked")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), activate(torch.ones(1, 1, 1), activation), atol=4e-3, rtol=0)


LONG = 16_128  # positions of a clip of 64 frames at res4
HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)])
@pytest.mark.parametrize("activation,path", [*EVERY, ("mixture", "materialised"), ("mixture", "chunked")])
def test_half_precision_of_many_keys(activation, path, dtype, tolerance):
    "If this fails, sums over keys overflow, or gradients divided by the keys vanish: each is as good as rounding it once."
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64) if activation == "mixture" else activation
    q, k, v = (clip(1, n, 4, seed=i).to(dtype) for i, n in enumerate((5, LONG, LONG)))
    slope = clip(1, 5, 4, seed=7)
    for size in (1, 1e-3, 1e-4):
        def run(*tensors, path=path):
            tensors = [t.requires_grad_() for t in tensors]
            y = attend(*tensors, weights, path=path)
            return y, *torch.autograd.grad(y, tensors, (slope * size).to(dtype).to(y))
        exact = run(*(t.double() for t in (q, k, v + 3)), path="materialised")
        for one, other in zip(run(q.clone(), k.clone(), v + 3), exact):
            rounded = (other.to(dtype).double() - other).norm()
            assert one.dtype == dtype and (one.double() - other).norm() <= 2 * rounded + tolerance * other.norm()


@pytest.mark.parametrize("activation,path", [*EVERY, ("mixture", "chunked")])
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_does_not_reach_the_products(activation, path, dtype):
    "If this fails, autocast rounds inside of attention, or a backward pass inside of it raises. Inputs of two types do not."
    weights = torch.full((4,), 0.25) if activation == "mixture" else activation
    tensors = [t.requires_grad_() for t in inputs((2,), 30, 20, 4, 4, torch.float32)]
    expected = gradients(lambda *a: attend(*a, weights, path=path), tensors)
    with torch.autocast("cpu", dtype):
        for one, other in zip(gradients(lambda *a: attend(*a, weights, path=path), tensors), expected):
            torch.testing.assert_close(one, other, atol=0.05, rtol=0)
        y = attend(tensors[0].to(dtype), *tensors[1:], weights, path=path)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, expected[0], atol=0.02, rtol=0)


@pytest.mark.parametrize("window", [0, 1, 4])
@pytest.mark.parametrize("activation", [*SCALINGS, "mixture"])
def test_gradients_of_a_window(activation, window):
    "If this fails, local attention trains to NaN: what lies outside of the window has no part in any gradient."
    for dtype in (torch.float64, torch.float32, torch.float16):
        mixture = [torch.tensor([3.0, 0.2, 0.3, 0.4], dtype=dtype).requires_grad_()] if activation == "mixture" else []
        tensors = [t.requires_grad_() for t in inputs((2,), 6, 9, 3, 3, dtype)]
        y = attend(*tensors, local(window, mixture[0] if mixture else activation))
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), [*tensors, *mixture]))
        if dtype == torch.float64 and activation != "hard":
            call = lambda q, k, v, *m: attend(q, k, v, local(window, m[0] if m else activation))
            assert torch.autograd.gradcheck(call, (*tensors, *mixture), fast_mode=True)


def test_inputs_are_left_alone():
    "If this fails, an activation in place wrote into what the caller still needs."
    tensors = inputs((1,), 600, 550, 4, 4, grad=True)
    before = [t.detach().clone() for t in tensors]
    for activation, path in EVERY: gradients(lambda *a: attend(*a, activation, path=path), tensors)
    assert all(t.detach().equal(b) for t, b in zip(tensors, before))


# ---- memory

@pytest.mark.parametrize("activation", [*ACTIVATIONS, "mixture"])
def test_no_matrix_is_ever_held(activation):
    "N = 2500: neither pass makes a tensor of a fifth of N x N. The stored matrix is noticed."
    n, weights = 2500, torch.full((4,), 0.25, dtype=torch.float32)
    tensors = inputs((1,), n, n, 8, 8, torch.float32, grad=True)
    run = lambda path: gradients(lambda *a: attend(*a, weights if activation == "mixture" else activation, path=path), tensors)
    with Made() as made: run("auto")
    assert made.largest < n * n / 4
    with Made() as made: run("materialised")
    assert made.largest >= n * n


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "mixture"])
def test_operation_holds_no_matrix(activation):
    "From the layer's own layout (the softmax kernel falls back to the matrix if the last axis is not contiguous)."
    operation = create_operation("spatiotemporal", "dot-product", activation, 8)
    with Made() as made: operation(torch.randn(1, 8, 10, 15, 15)).sum().backward()
    assert made.largest < 2250 ** 2 / 4


# ---- which path

def shaped(positions, features, width=None, batch=1):
    make = lambda d: torch.empty(batch, positions, d, device="meta")
    return make(features), make(features), make(width or features)


@pytest.mark.parametrize("activation,shape,path", [
    ("softmax", (16, 12_544), "materialised"), ("none", (16, 12_544), "materialised"), ("none", (129, 128), "associative"),
    ("none", (127, 128), "materialised"), ("relu", (6272, 128), "chunked"), ("sigmoid", (1000, 64), "materialised"),
    ("sigmoid", (1000, 64, 64, 2), "chunked"), ("softmax", (196, 64), "fused"), ("softmax", (196, 64, 32), "materialised"),
    ("softmax", (6272, 64, 32), "chunked"), ("softmax", (1568, 416), "materialised"), ("mixture", (6272, 64), "chunked")])
def test_dispatch(activation, shape, path):
    assert kernels.best_path(*shaped(*shape), activation) == path


def test_materialising_is_never_quadratic():
    "Whatever rule picks it, the matrix is at most four times the queries, or small: 4 MiB of float32."
    for activation, n, d in product((*ACTIVATIONS, "mixture"), (1, 100, 1025, 3000, 50_000), (1, 64, 257, 2000)):
        if kernels.best_path(*shaped(n, d), activation) == "materialised":
            assert n * n <= max(4 * n * d, 2**20)


def test_path_errors():
    q, k, v = inputs((1,), 4, 5, 3, 3)
    with pytest.raises(AttnnasError, match="chunked"): attend(q, k, v, path="chunk")
    for activation, path in (("relu", "fused"), ("softmax", "associative"), ("softmax", "triton"), (torch.ones(4), "triton")):
        with pytest.raises(AttnnasError, match=f"Path '{path}' is for"): attend(q, k, v, activation, path=path)
    with pytest.raises(AttnnasError, match="CUDA"): attend(q, k, v, "relu", path="triton")
    for wrong in ((q, k, v[:, 1:]), (q[..., 1:], k, v), (q[0], k, v), (q[:0], k[:0], v[:0]), (q[0, 0], k[0, 0], v[0, 0])):
        with pytest.raises(AttnnasError, match=r"\(\.\.\., P, R\)"): attend(*wrong)


# ---- Triton

# Runs in Triton's interpreter, in a process of its own: the variable is read when Triton is imported.
INTERPRETED = """
import sys, torch
from attnnas.attention import kernels, triton as triton_kernels
torch.manual_seed(0)
for batch, queries, keys, features, width, dtype, tolerance in (
        (2, 70, 37, 20, 20, torch.float32, 1e-5), (1, 1, 1, 3, 5, torch.float32, 1e-5), (1, 33, 65, 200, 7, torch.float32, 1e-5),
        (1, 70, 37, 20, 24, torch.float16, 2e-3)):  # the interpreter has no bfloat16 products
    tensors = [torch.randn(batch, n, d).to(dtype).requires_grad_()
               for n, d in ((queries, features), (keys, features), (keys, width))]
    for activation in kernels.ELEMENTWISE:
        results = []
        for function in (triton_kernels.attend_tiles, kernels.tiled):
            y = function(*tensors, activation, 0.3)
            results.append((y, *torch.autograd.grad(y, tensors, torch.ones_like(y))))
        for one, other in zip(*results):
            assert one.dtype == other.dtype == dtype
            torch.testing.assert_close(one, other, atol=tolerance * max(1, other.abs().max().item()), rtol=0)
print("agree")
"""


@pytest.mark.skipif(not triton_kernels.HAS_TRITON, reason="no Triton")
def test_triton_kernels_in_the_interpreter():
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "agree", done.stderr


@pytest.mark.skipif(not triton_kernels.HAS_TRITON, reason="no Triton")
@pytest.mark.parametrize("dtype,size", [("bf16", 2), ("fp32", 4)])
@pytest.mark.parametrize("kernel,tensors", [("_forward", 4), ("_backward_keys", 6), ("_backward_queries", 5)])
def test_triton_kernels_compile_without_a_gpu(kernel, tensors, dtype, size, tmp_path, monkeypatch):
    "To machine code of Ampere's cards, in what memory a multiprocessor of the smallest of them has: 99 KiB."
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, width = getattr(triton_kernels, kernel), 128
    constants = dict(ACTIVATION="sigmoid", PRECISION="ieee", TILE=triton_kernels.tile_of(width, width, size), R=width, V=width)
    kinds = {name: f"*{dtype}" if i < tensors else {"scale": "fp32"}.get(name, "i32") for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(kernel, kinds | dict.fromkeys(constants, "constexpr"),
                       {(kernel.arg_names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=GPUTarget("cuda", 86, 32), options=dict(num_stages=2))
    assert compiled.asm["cubin"] and compiled.metadata.shared <= 99 * 1024


def test_without_cuda_or_triton_nothing_breaks():
    "If this fails, attention on a CPU costs an import of Triton's compiler, or the package fails where there is none."
    code = """
import sys, torch
sys.modules["triton"] = None  # as if it were not installed
from attnnas.attention.formula import attend
x = torch.randn(1, 1500, 4, requires_grad=True)
attend(x, x, x, "relu").sum().backward()
assert "attnnas.attention.triton" not in sys.modules
from attnnas.attention.triton import HAS_TRITON, supported
assert not HAS_TRITON and not supported(x, x, x)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("features", [24, 64, 128, 256])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_on_a_gpu(activation, features, dtype, tolerance):
    "Every path on the device against float64 there; Triton is what 'auto' takes for relu and sigmoid."
    exact = [t.cuda().requires_grad_() for t in inputs((2,), 1500, 1311, features, features)]
    rounded = [t.detach().to(dtype).requires_grad_() for t in exact]
    expected = gradients(lambda *a: attend(*a, activation, path="materialised"), [t.detach().double().requires_grad_() for t in rounded])
    paths = ("auto", *PATHS_OF[activation], *(["triton"] if activation != "softmax" else []))
    if activation in ("relu", "sigmoid"): assert kernels.best_path(*rounded, activation) == "triton"
    for path in paths:
        if path == "fused" and not kernels.can_fuse(*rounded): continue
        for one, other in zip(gradients(lambda *a: attend(*a, activation, path=path), rounded), expected):
            torch.testing.assert_close(one.double(), other, atol=tolerance * other.abs().max().item(), rtol=0)


# ---- the general form

@pytest.mark.parametrize("compatibility,scaling", list(product(COMPATIBILITIES, SCALINGS)))
def test_general_attention_is_its_definition(compatibility, scaling):
    torch.manual_seed(0)
    attention = Attention(5, 5 if compatibility in PREPARATIONS else 7, compatibility, scaling, dtype=torch.float64)
    q, k, v = clip(2, 3, 5), clip(2, 11, 5 if compatibility in PREPARATIONS else 7, seed=2), clip(2, 11, 4, seed=3)
    p = dict(attention.named_parameters())
    score = {"dot": lambda q, k: q @ k, "scaled dot": lambda q, k: q @ k / 5 ** 0.5,
             "cosine": lambda q, k: q @ k / (q @ q * (k @ k)).sqrt(),
             "bilinear": lambda q, k: k @ p["compare.matrix.weight"] @ q,
             "additive": lambda q, k: p["compare.score.weight"][0] @ torch.tanh(
                 p["compare.query.weight"] @ q + p["compare.key.weight"] @ k + p["compare.key.bias"])}[compatibility]
    y = attention(q, k, v)
    for b, i in product(range(2), range(3)):
        scores = [score(q[b, i], key) for key in k[b]]
        if scaling == "hard": weights = [11.0 * (s == max(scores)) for s in scores]
        else: weights = scaled(scores, scaling)
        expected = sum(w * value for w, value in zip(weights, v[b])) / 11
        torch.testing.assert_close(y[b, i], expected, atol=1e-10, rtol=0)
        torch.testing.assert_close(attention.weights(q, k)[b, i], torch.stack([torch.as_tensor(w) for w in weights]).double() / 11,
                                   atol=1e-10, rtol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_local_attention_is_attention_to_the_window(activation):
    q, k, v = (clip(9, 4, seed=i).requires_grad_() for i in range(3))
    y = attend(q, k, v, local(2, activation))
    for i in range(9):
        near = slice(max(0, i - 2), i + 3)
        share = 1 if activation == "softmax" else (min(9, i + 3) - max(0, i - 2)) / 9
        torch.testing.assert_close(y[i], share * attend(q[i:i + 1], k[near], v[near], activation)[0], atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda *a: attend(*a, local(2, activation)), (q, k, v), fast_mode=True)


def test_local_windows_follow_the_keys():
    "Half as many queries as keys: the window of query i is at key 2 i."
    weights = attention_weights(clip(3, 4), clip(6, 4, seed=2), local(0))
    assert weights.equal(torch.eye(6, dtype=torch.float64)[::2])


def test_hard_attention_learns():
    "Gradients of the softmax reach the scores, although the weights are zeros and ones."
    scores = clip(4, 6).requires_grad_()
    slope = clip(4, 6, seed=2)
    given, = torch.autograd.grad(activate(scores, "hard"), scores, slope)
    assert given.equal(torch.autograd.grad(activate(scores, "softmax"), scores, slope)[0]) and given.abs().min() > 0


def test_general_attention_errors():
    for wrong, match in ((dict(compatibility="cosin"), "cosine"), (dict(scaling="sofmax"), "softmax"),
                         (dict(key_features=4), "3 and 4")):
        with pytest.raises(AttnnasError, match=match): Attention(3, **wrong)


# ---- clips of a mixture, one after another or together

def as_elsewhere(monkeypatch, scores: int):
    "Take clips as on a device that is no CPU and holds so many scores."
    on_a_cpu = kernels._clips
    monkeypatch.setattr(kernels, "_scores", lambda device: scores)

    def clips(query, key):
        assert on_a_cpu(query, key) == list(range(len(query)))
        return on_a_cpu(query.to("meta"), key.to("meta"))

    monkeypatch.setattr(kernels, "_clips", clips)


def step_of_a_mixture(clips: int, positions: int, dtype=torch.float64):
    q, k, v = (clip(clips, positions, 6, seed=i).to(dtype).requires_grad_() for i in range(3))
    mixture = torch.tensor([0.1, 0.2, 0.4, 0.3], dtype=dtype, requires_grad=True)
    return lambda: gradients(lambda *a: attend(*a[:3], a[3], path="chunked"), [q, k, v, mixture])


@pytest.mark.parametrize("scores", [1, 1000, 20_000, 2**27])
@pytest.mark.parametrize("clips", [1, 7])
def test_clips_that_are_taken_together_are_those_that_are_taken_one_by_one(clips, scores, monkeypatch):
    monkeypatch.setattr(kernels, "ROWS", 16)
    step = step_of_a_mixture(clips, 50)
    expected = step()
    as_elsewhere(monkeypatch, scores)
    for a, b in zip(step(), expected): torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scores", [1, 10**6, 2**24, 2**27, 2**29])
@pytest.mark.parametrize("clips,queries,keys", [(8, 3136, 3136), (8, 3136, 392), (3, 25088, 25088), (1, 7, 5)])
def test_what_is_taken_at_a_time_fits_where_it_can_and_is_everything_once(clips, queries, keys, scores, monkeypatch):
    monkeypatch.setattr(kernels, "_scores", lambda device: scores)
    query, key = (torch.empty(clips, n, 4, device="meta") for n in (queries, keys))
    groups = kernels._clips(query, key)
    taken = [len(query[group]) for group in groups]
    rows = [len(query[0, i]) for i in kernels._rows(query, key)]
    assert sum(taken) == clips and sum(rows) == queries
    least = min(kernels.ROWS, queries) * keys  # some rows of one clip are taken anyway
    assert max(taken) * max(rows) * keys <= max(scores, least)
    if scores >= clips * queries * keys: assert len(taken) == len(rows) == 1


# Calls that start no kernel on a device: they look at memory in another way, make it, or ask for a type.
NO_LAUNCH = {f"aten::{name}" for name in (
    "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "as_strided", "as_strided_", "chunk", "contiguous", "detach",
    "empty", "empty_like", "empty_strided", "expand", "flatten", "lift_fresh", "linear", "movedim", "narrow", "new_empty",
    "new_empty_strided", "permute", "promote_types", "reshape", "resize_", "resolve_conj", "resolve_neg", "result_type",
    "select", "slice", "split", "split_with_sizes", "squeeze", "t", "tensordot", "to", "transpose", "unbind", "unflatten",
    "unsqueeze", "view", "view_as")}


def launches(step) -> int:
    "How many calls of a step would start a kernel: those that call no other one, as torch's profiler sees them."
    step()

    def starts(event): return event.name.startswith("aten::") and event.name not in NO_LAUNCH

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler: step()
    return sum(starts(event) and not any(map(starts, event.cpu_children)) for event in profiler.events())


def test_a_mixture_elsewhere_takes_as_many_launches_for_eight_clips_as_for_one(monkeypatch):
    "Measured with torch 2.13: 379 for eight clips one by one, 64 together."
    one_by_one = launches(step_of_a_mixture(8, 64))
    as_elsewhere(monkeypatch, 2**24)
    together = {clips: launches(step_of_a_mixture(clips, 64)) for clips in (1, 8)}
    assert together[8] == together[1] <= 80 and one_by_one > 4 * together[8]


def test_launches_of_a_supergraph_do_not_grow_with_the_clips(monkeypatch):
    "Measured with torch 2.13, four levels, 400 positions, eight clips: 3,013 one by one, 1,753 together."
    graph = FusedSupergraph(12, 8, 4, activations="mixture")

    def step_of(clips):
        x = torch.randn(clips, 12, 4, 10, 10, requires_grad=True)
        return lambda: graph(x).sum().backward()

    one_by_one = launches(step_of(8))
    as_elsewhere(monkeypatch, 2**24)
    assert launches(step_of(8)) <= 1900 < 0.7 * one_by_one
