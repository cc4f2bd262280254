"""The poster's mechanisms against references written as loops; where they stand in a network; masks over images."""
import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from attnnas.networks.registry import create_model
from attnnas.core.errors import AttnnasError
from attnnas.networks.insertion import insert, inserted
from attnnas.cells.operations.registry import OPERATIONS
from attnnas.visual.cbam import CBAM, ChannelAttention, SpatialAttention
from attnnas.visual.gates import GATE_SCALINGS, AttentionGate, shifted
from attnnas.visual.l2pa import L2PA, L2PA_COMPATIBILITIES
from attnnas.explain.localisation import chance, mass_inside, pointing_game
from attnnas.visual.networks import STAGES, VISUAL_MODELS, InterleavedConv2d, visual_model
from attnnas.explain.overlay import attention_table, combine, overlay, scaled, to_heat
from attnnas.visual.residual import Hourglass, ResidualAttention, ResidualUnit
from attnnas.visual.taxonomy import LABELS, Label, label

DTYPES = {torch.float32: 1e-5, torch.float64: 1e-12}
SHAPES = {"image": (9, 8), "clip": (3, 9, 8)}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=list(SHAPES))
each_mechanism = pytest.mark.parametrize("name", [name for name in VISUAL_MODELS if name != "plain"])


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_state(module, seed=1):
    "Every parameter and buffer at random, batch norms included, so that no term of a formula is hidden by a 0 or a 1."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if not value.is_floating_point(): continue
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5 if "var" in name
                        else torch.randn(value.shape, generator=generator) / max(1, value[0].numel() if value.ndim > 1 else 1) ** 0.5)
    return module


def array(tensor): return tensor.detach().double().numpy()
def sigmoid(x): return 1 / (1 + np.exp(-x))
def parameters(module): return sum(p.numel() for p in module.parameters())


def close(ours, reference, dtype):
    torch.testing.assert_close(ours.double(), torch.as_tensor(reference), atol=DTYPES[dtype], rtol=DTYPES[dtype])


# ---- references: plain loops over NumPy arrays, no torch

def ref_norm(x, norm, axes):
    "Batch norm of x, whose channels are axis 1, with the running statistics or, in training, the batch's."
    mean, var = (x.mean(axes), x.var(axes)) if norm.training else (array(norm.running_mean), array(norm.running_var))
    shape = [1, -1] + [1] * (x.ndim - 2)
    return (x - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + norm.eps) * array(norm.weight).reshape(shape) + array(norm.bias).reshape(shape)


def ref_conv(x, weight, bias=None):
    "Convolution of stride 1 with zeros around, so that sizes stay: x (B, C, *sizes), weight (out, C, *kernel)."
    weight, half = array(weight), [k // 2 for k in weight.shape[2:]]
    padded = np.pad(x, [(0, 0), (0, 0), *((h, h) for h in half)])
    y = np.zeros((len(x), len(weight), *x.shape[2:]))
    for place in np.ndindex(*x.shape[2:]):
        window = padded[(slice(None), slice(None), *(slice(p, p + k) for p, k in zip(place, weight.shape[2:])))]
        for o in range(len(weight)): y[(slice(None), o, *place)] = (window * weight[o]).reshape(len(x), -1).sum(1)
    return y if bias is None else y + array(bias).reshape(1, -1, *[1] * (x.ndim - 2))


def ref_resize(x, sizes):
    "Linear interpolation of every axis after the first two, pixels' centres at halves, clamped at the rim."
    for axis, size in enumerate(sizes, 2):
        n, y = x.shape[axis], np.zeros((*x.shape[:axis], size, *x.shape[axis + 1:]))
        for i in range(size):
            place = min(max((i + 0.5) * n / size - 0.5, 0), n - 1)
            low = int(math.floor(place))
            high, share = min(low + 1, n - 1), place - low
            at = lambda k: x.take(k, axis)
            y[(slice(None),) * axis + (i,)] = (1 - share) * at(low) + share * at(high)
        x = y
    return x


def ref_channel(x, module):
    w0, w1, mask = array(module.squeeze.weight), array(module.excite.weight), np.zeros(x.shape[:2])
    for b in range(len(x)):
        for pooled in ([x[b, c].mean() for c in range(x.shape[1])], [x[b, c].max() for c in range(x.shape[1])]):
            mask[b] += w1 @ np.maximum(w0 @ np.array(pooled), 0)
    return sigmoid(mask).reshape(*x.shape[:2], *[1] * (x.ndim - 2))


def ref_spatial(x, module):
    pooled = np.stack([x.max(1), x.mean(1)], 1)
    weight = module.conv.weight
    if x.ndim == 4: weight = weight[:, :, weight.shape[2] // 2]    # an image is a clip of one frame among zeros
    return sigmoid(ref_norm(ref_conv(pooled, weight), module.norm, tuple(i for i in range(x.ndim) if i != 1)))


def ref_gate(x, g, gate):
    wx, wg, b, psi, bias = (array(t) for t in (gate.local.weight, gate.gate.weight, gate.gate.bias, gate.psi.weight, gate.psi.bias))
    g = np.moveaxis(np.tensordot(wg, g, (1, 1)), 0, 1)
    g = ref_resize(g, x.shape[2:]) if g.ndim > 2 else np.broadcast_to(g.reshape(*g.shape, *[1] * (x.ndim - 2)), (*g.shape, *x.shape[2:]))
    mask = np.zeros((len(x), 1, *x.shape[2:]))
    for n in range(len(x)):
        for place in np.ndindex(*x.shape[2:]):
            at = (n, slice(None), *place)
            mask[(n, 0, *place)] = psi[0] @ np.maximum(wx @ x[at] + g[at] + b, 0) + bias[0]
        if gate.scaling == "softmax": mask[n] = np.exp(mask[n]) / np.exp(mask[n]).sum()
        if gate.scaling == "shifted": mask[n] = (mask[n] - mask[n].min()) / (mask[n] - mask[n].min()).sum()
    return sigmoid(mask) if gate.scaling == "sigmoid" else mask


def ref_l2pa(l, g, module):
    project = np.eye(l.shape[1]) if isinstance(module.project, nn.Identity) else array(module.project.weight)
    attended, mask = np.zeros(g.shape), np.zeros((len(l), 1, *l.shape[2:]))
    for n in range(len(l)):
        local = {place: project @ l[(n, slice(None), *place)] for place in np.ndindex(*l.shape[2:])}
        score = {place: v @ g[n] if module.compatibility == "dot" else array(module.u.weight)[0] @ (v + g[n]) for place, v in local.items()}
        total = sum(math.exp(s) for s in score.values())
        for place, v in local.items():
            mask[(n, 0, *place)] = math.exp(score[place]) / total
            attended[n] += mask[(n, 0, *place)] * v
    return attended, mask


def ref_layers(x, layers):
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d): x = ref_norm(x, layer, (0, 2, 3))
        elif isinstance(layer, nn.ReLU): x = np.maximum(x, 0)
        elif isinstance(layer, nn.Conv2d): x = ref_conv(x, layer.weight, layer.bias)
        else: x = x + ref_layers(x, layer.layers)                  # a residual unit
    return x


def ref_pool(x):
    y = np.zeros((*x.shape[:2], *((n + 1) // 2 for n in x.shape[2:])))
    for i, j in np.ndindex(*y.shape[2:]): y[:, :, i, j] = x[:, :, max(2 * i - 1, 0):2 * i + 2, max(2 * j - 1, 0):2 * j + 2].max((2, 3))
    return y


def ref_hourglass(x, module, depth):
    y = ref_layers(ref_pool(x), module.down)
    if depth > 1: y = ref_hourglass(y, module.inner, depth - 1) + ref_layers(y, [module.skip])
    return ref_resize(ref_layers(y, module.up), x.shape[2:])


# ---- every mechanism is its formula

@each_dtype
@each_shape
@pytest.mark.parametrize("frames, training", [(1, False), (3, False), (1, True)])
def test_cbam_is_its_formula(dtype, shape, frames, training):
    x, cbam = randn(2, 20, *shape, dtype=dtype), random_state(CBAM(20, frames=frames, dtype=dtype)).train(training)
    after, channel = cbam.channel(x, return_mask=True)
    close(channel, ref_channel(array(x), cbam.channel), dtype)
    close(after, ref_channel(array(x), cbam.channel) * array(x), dtype)
    inner = array(after)
    expected = ref_spatial(inner, cbam.spatial)
    y, mask = cbam(x, return_mask=True)
    close(mask, expected, dtype), close(y, expected * inner, dtype)


@each_dtype
@each_shape
@pytest.mark.parametrize("scaling", GATE_SCALINGS)
@pytest.mark.parametrize("grid", [False, True])
def test_gate_is_its_formula(dtype, shape, scaling, grid):
    x, gate = randn(2, 6, *shape, dtype=dtype), random_state(AttentionGate(6, 5, scaling=scaling, dtype=dtype))
    g = randn(2, 5, *((n + 2) // 3 for n in shape) if grid else (), seed=2, dtype=dtype)
    y, mask = gate(x, g, return_mask=True)
    expected = ref_gate(array(x), array(g), gate)
    close(mask, expected, dtype), close(y, expected * array(x), dtype)
    pool = np.mean if scaling == "sigmoid" else np.sum
    close(gate.pool(y), pool((expected * array(x)).reshape(2, 6, -1), 2), dtype)


@each_dtype
@each_shape
@pytest.mark.parametrize("compatibility", L2PA_COMPATIBILITIES)
@pytest.mark.parametrize("channels", [4, 7])
def test_l2pa_is_its_formula(dtype, shape, compatibility, channels):
    l, g = randn(2, channels, *shape, dtype=dtype), randn(2, 7, seed=2, dtype=dtype)
    module = random_state(L2PA(channels, 7, compatibility, dtype=dtype))
    for ours, expected in zip(module(l, g, return_mask=True), ref_l2pa(array(l), array(g), module)): close(ours, expected, dtype)


@each_dtype
@pytest.mark.parametrize("depth, size", [(1, (6, 5)), (2, (9, 8)), (3, (17, 18))])
@pytest.mark.parametrize("training", [False, True])
def test_residual_attention_is_its_formula(dtype, depth, size, training):
    x, module = randn(2, 8, *size, dtype=dtype), random_state(ResidualAttention(8, depth, dtype=dtype)).train(training)
    y, mask = module(x, return_mask=True)
    expected = sigmoid(ref_layers(ref_hourglass(array(x), module.hourglass, depth), module.head))
    close(mask, expected, dtype), close(y, (1 + expected) * ref_layers(array(x), module.trunk), dtype)
    assert 0 < mask.min() and mask.max() < 1


def test_residual_attention_takes_any_trunk():
    trunk, x = nn.Conv2d(8, 8, 3, padding=1), randn(2, 8, 6, 6)
    module = ResidualAttention(8, trunk=trunk).eval()
    y, mask = module(x, return_mask=True)
    assert module.trunk is trunk and y.equal((1 + mask) * trunk(x))


# ---- what every mechanism promises

MECHANISMS = {"cbam": lambda **f: CBAM(8, **f), "channel": lambda **f: ChannelAttention(8, **f), "spatial": lambda **f: SpatialAttention(**f),
              "gate": lambda **f: AttentionGate(8, 6, **f), "l2pa": lambda **f: L2PA(8, 6, "additive", **f),
              "residual": lambda **f: ResidualAttention(8, 2, **f)}
each_module = pytest.mark.parametrize("name", MECHANISMS)


def inputs(name, dtype=torch.float32, device="cpu"):
    x = (randn(2, 8, 6, 6, dtype=dtype), randn(2, 6, seed=2, dtype=dtype))[:2 if name in ("gate", "l2pa") else 1]
    return [t.to(device) for t in x]


@each_module
def test_a_mask_changes_nothing_and_leaves_nothing(name):
    module = MECHANISMS[name]().eval()
    attributes = set(vars(module))
    y, mask = module(*inputs(name), return_mask=True)
    assert y.equal(module(*inputs(name))) and mask.requires_grad and set(vars(module)) == attributes


@each_module
@pytest.mark.parametrize("dtype, device", [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float32, "meta")], ids=str)
def test_precision_and_device_are_passed_on(name, dtype, device):
    module = MECHANISMS[name](dtype=dtype, device=device)
    for value in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point()), *module.eval()(*inputs(name, dtype, device), return_mask=True)]:
        assert (value.dtype, value.device.type) == (dtype, device)


@each_module
def test_gradients_reach_every_parameter(name):
    torch.manual_seed(0)
    module = MECHANISMS[name]()
    module(*inputs(name)).square().sum().backward()
    assert all((p.grad != 0).any() for p in module.parameters())


@pytest.mark.parametrize("channels", [1, 8, 15, 16, 24, 100])
def test_parameters_by_hand(channels):
    hidden, quarter, half = max(1, channels // 16), max(1, channels // 4), max(1, channels // 2)
    assert parameters(CBAM(channels)) == 2 * channels * hidden + 2 * 49 + 2
    assert parameters(CBAM(channels, frames=3)) == 2 * channels * hidden + 2 * 3 * 49 + 2
    assert parameters(AttentionGate(channels, 30)) == channels * half + 30 * half + half + half + 1
    assert parameters(L2PA(channels, 30)) == channels * 30 and parameters(L2PA(30, 30, "additive")) == 30
    unit = 2 * channels * quarter + 9 * quarter ** 2 + 2 * channels + 4 * quarter
    assert parameters(ResidualUnit(channels)) == unit
    for depth in (1, 2, 3):
        assert parameters(Hourglass(channels, depth)) == (3 * depth - 1) * unit
        assert parameters(ResidualAttention(channels, depth)) == (3 * depth + 1) * unit + 2 * channels ** 2 + 5 * channels


def test_cbam_of_few_channels_has_a_hidden_unit():
    "If this fails, C // 16 is 0 and the channel weights are all one half, whatever the image."
    cbam = CBAM(8)
    assert cbam.channel.squeeze.out_features == 1
    nn.init.ones_(cbam.channel.squeeze.weight)
    _, mask = cbam.channel(randn(2, 8, 4, 4).abs(), return_mask=True)
    assert mask.std() > 0.01


def test_an_image_is_a_clip_of_one_frame():
    x, g = randn(2, 8, 9, 9), randn(2, 6, 3, 3)
    for module, args in ((CBAM(8, frames=3).eval(), (x,)), (AttentionGate(8, 6), (x, g))):
        torch.testing.assert_close(module(*args), module(*(t.unsqueeze(2) for t in args)).squeeze(2))


# ---- defects that must not return

def test_shifted_scores_have_a_shifted_denominator():
    "If this fails, the pseudo-softmax divides by the sum of unshifted scores: weights sum to anything."
    scores = randn(3, 50, dtype=torch.float64)
    weights = shifted(scores)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(weights, shifted(scores - 100))
    assert (weights >= 0).all() and (weights.amin(-1) == 0).all()


def test_shifted_scores_that_are_all_equal():
    scores = torch.full((2, 5), 3.0, requires_grad=True)
    shifted(scores).square().sum().backward()
    assert shifted(scores).equal(torch.full((2, 5), 0.2)) and scores.grad.isfinite().all()


def features(model, x):
    "What the backbone gives at the three stages and at its end, caught by hooks."
    kept, names = {}, [*(f"backbone.blocks.{group}" for group in model.groups), "backbone.bn2"]
    handles = [model.get_submodule(name).register_forward_hook(lambda m, i, o, n=n: kept.__setitem__(n, o))
               for n, name in zip((*STAGES, "last"), names)]
    model(x)
    for handle in handles: handle.remove()
    return kept


@pytest.mark.parametrize("compatibility", L2PA_COMPATIBILITIES)
def test_l2pa_classifies_the_attended_features_and_nothing_else(compatibility):
    "If this fails, the classifier sees weighted maps, or the global feature, instead of sum_i a_i l_i."
    torch.manual_seed(0)
    model, x = visual_model("l2pa", 5, width=0.35, compatibility=compatibility).eval(), randn(2, 3, 64, 64)
    with torch.no_grad(): kept, scores = features(model, x), model(x)
    g = array(kept["last"].mean((2, 3)))
    attended = [ref_l2pa(array(kept[stage]), g, model.attention[stage])[0] for stage in STAGES]
    layer, = model.classifiers
    close(scores, np.concatenate(attended, 1) @ array(layer.weight).T + array(layer.bias), torch.float32)
    assert layer.in_features == 3 * 1280 and isinstance(model.backbone.classifier, nn.Identity)
    assert model(randn(2, 3, 96, 32)).shape == (2, 5)              # flattened maps would fix the size of the image


@pytest.mark.parametrize("name", ["gated", "gated_grid"])
@pytest.mark.parametrize("fusion", ["mean", "concat"])
def test_gated_networks_classify_every_scale_and_the_last_map(name, fusion):
    torch.manual_seed(0)
    model, x = visual_model(name, 5, width=0.35, fusion=fusion, scaling="shifted").eval(), randn(2, 3, 64, 64)
    with torch.no_grad(): kept, scores = features(model, x), model(x)
    last = array(kept["last"])
    g = last if name == "gated_grid" else last.mean((2, 3))
    answers = [(ref_gate(array(kept[s]), g, model.attention[s]) * array(kept[s])).sum((2, 3)) for s in STAGES] + [last.mean((2, 3))]
    if fusion == "concat": answers = [np.concatenate(answers, 1)]
    expected = [a @ array(layer.weight).T + array(layer.bias) for a, layer in zip(answers, model.classifiers, strict=True)]
    close(scores, np.mean(expected, 0), torch.float32)


@pytest.mark.parametrize("factor", [1, 1000])
def test_no_map_is_left_unscaled_in_the_table(factor):
    "If this fails, the first map (or another) goes into the overlay as it is, and cannot be compared with the rest."
    image, pattern = torch.rand(3, 32, 32), {stage: randn(1, 1, 4, 4, seed=i) for i, stage in enumerate(STAGES)}
    rows = {"first": {s: factor * m + 7 for s, m in pattern.items()}, "second": pattern}
    figure = attention_table(image, rows)
    drawn = np.array([axis.get_images()[0].get_array() for axis in figure.axes]).reshape(2, 4, 32, 32, 3)
    for column, stage in enumerate(STAGES):
        expected = overlay(image, scaled(to_heat(pattern[stage], (32, 32)))[0])
        np.testing.assert_allclose(drawn[1, column], expected, atol=1e-6)
    np.testing.assert_allclose(drawn[0], drawn[1], atol=0.02)      # one step of the colour map, from rounding


def test_a_flat_mask_stays_grey():
    "If this fails, a gate that weighs all positions alike gets all the colours, and looks like a find."
    image, noise = torch.rand(3, 32, 32), torch.rand(1, 1, 4, 4)
    grey = image.mean(0)[..., None].expand(-1, -1, 3).numpy()
    rows = {"flat": {stage: 0.98 + 0.001 * noise for stage in STAGES}, "constant": {stage: 0 * noise + 0.3 for stage in STAGES}}
    figure = attention_table(image, rows)
    for axis in figure.axes: np.testing.assert_allclose(axis.get_images()[0].get_array(), grey, atol=0.01)
    assert figure.axes[0].get_xlabel() == "0.98 to 0.981" and figure.axes[4].get_xlabel() == "0.3 to 0.3"


# ---- in networks

@pytest.mark.parametrize("video", [False, True])
def test_cbam_goes_into_any_network(video):
    shape = (2, 3, 8, 24, 24) if video else (2, 3, 24, 24)
    small = create_model("i3d_small", 5) if video else nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    plain = copy.deepcopy(small).eval()
    model = insert(small, CBAM, None if video else "1", None if video else (1, 3, 24, 24)).eval()
    assert all(isinstance(added, CBAM) for added in inserted(model).values())
    assert not torch.allclose(model(randn(*shape)), plain(randn(*shape)), atol=1e-3), "a new CBAM is not the identity"
    model.train()(randn(*shape)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


TABLE = {"l2pa": [(1, 28, 28), (1, 14, 14), (1, 7, 7)], "gated": [(1, 28, 28), (1, 14, 14), (1, 7, 7)],
         "gated_grid": [(1, 28, 28), (1, 14, 14), (1, 7, 7)], "residual": [(24, 56, 56), (32, 28, 28), (64, 14, 14)],
         "cbam": [(1, 56, 56), (1, 28, 28), (1, 14, 14)]}
CHANNELS = {"cbam": (24, 32, 96), "residual": (24, 32, 64)}


@each_mechanism
def test_places_and_parameters_at_the_poster_s_size(name):
    plain, model = parameters(visual_model("plain", 10, device="meta")), visual_model(name, 10, device="meta").eval()
    scores, masks = model(torch.empty(2, 3, 224, 224, device="meta"), return_masks=True)
    assert scores.shape == (2, 10) and list(masks) == list(STAGES)
    assert [tuple(mask.shape[1:]) for mask in masks.values()] == TABLE[name]
    channels = [module.channels for module in model.attention.values()] if name != "cbam" else [m.channel.channels for m in model.attention.values()]
    assert tuple(channels) == CHANNELS.get(name, (32, 96, 160))
    classifier = lambda size: size * 10 + 10
    added = {"l2pa": 1280 * (32 + 96 + 160) + classifier(3 * 1280) - classifier(1280),
             "cbam": sum(2 * c * max(1, c // 16) + 100 for c in CHANNELS["cbam"])}
    added["gated"] = added["gated_grid"] = sum(parameters(AttentionGate(c, 1280)) + classifier(c) for c in (32, 96, 160))
    added["residual"] = sum(parameters(ResidualAttention(c, depth, nn.Identity())) for c, depth in zip((24, 32, 64), (3, 2, 1)))
    assert parameters(model) - plain == added[name]


@pytest.mark.parametrize("name", VISUAL_MODELS)
def test_a_tiny_network_learns_on_a_cpu(name):
    torch.manual_seed(0)
    model, y = visual_model(name, 3, width=0.35), torch.arange(24) % 3
    x = 0.3 * randn(24, 3, 32, 32)
    x[torch.arange(24), y] += 1                                    # a class is a colour
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    for step in range(10):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad(), loss.backward(), optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) / 3 < 0.5 * losses[0] and all(p.grad is not None for p in model.parameters())


@each_mechanism
def test_masks_of_all_stages_come_from_one_pass(name):
    torch.manual_seed(0)
    model, x, calls = visual_model(name, 3, width=0.35).eval(), randn(2, 3, 32, 32), []
    for module in (model.backbone.conv_stem, model.backbone.conv_head, *model.attention.values()):
        module.register_forward_hook(lambda module, args, output: calls.append(module))
    with torch.no_grad(): scores, masks = model(x, return_masks=True)
    assert len(calls) == len(set(calls)) == 5 and scores.equal(model(x))
    heat = combine(masks, (32, 32))
    expected = sum(scaled(to_heat(mask, (32, 32))) for mask in masks.values()) / 3
    torch.testing.assert_close(heat, expected)
    assert heat.shape == (2, 32, 32) and 0 <= heat.min() and heat.max() <= 1


@pytest.mark.parametrize("name, kind", [*((name, "dict") for name in VISUAL_MODELS), ("residual", "safetensors"), ("residual", "pth")])
def test_imagenet_weights_are_kept(name, kind, tmp_path):
    import timm
    state = timm.create_model("mobilenetv2_035", num_classes=20).state_dict()
    weights = state
    if kind == "safetensors": save_file(state, weights := tmp_path / "weights.safetensors")
    if kind == "pth": torch.save(state, weights := tmp_path / "weights.pth")
    model = visual_model(name, 3, width=0.35, weights=weights)
    ours = {n.removeprefix("backbone."): v for n, v in model.state_dict().items()}
    if name == "residual":
        for stage, block in (("early", "blocks.1.1"), ("medium", "blocks.2.2"), ("late", "blocks.3.3")):
            ours |= {n.replace(f"attention.{stage}.trunk", block): v for n, v in ours.items() if f"{stage}.trunk" in n}
    kept = [n for n, v in state.items() if not n.startswith("classifier") and v.equal(ours.get(n, torch.empty(0)))]
    assert len(kept) == len(state) - 2


@pytest.mark.parametrize("spoil, told", [
    (lambda s: s.pop("bn2.weight"), "missing in the file: bn2.weight"), (lambda s: s.update(odd=torch.ones(1)), "unexpected in the file: odd"),
    (lambda s: s.update({"bn1.bias": torch.ones(3)}), r"bn1.bias \(16,\) here, \(3,\) in the file")])
def test_weights_that_do_not_fit_are_refused(spoil, told):
    import timm
    state = timm.create_model("mobilenetv2_035", num_classes=20).state_dict()
    spoil(state)
    with pytest.raises(AttnnasError, match=told): visual_model("cbam", 3, width=0.35, weights=state)


@pytest.mark.parametrize("options, told", [
    (dict(name="cban"), "Did you mean 'cbam'"), (dict(name="cbam", fusion="mean"), "has no option 'fusion'. It has: none"),
    (dict(name="gated", fusio="mean"), "It has: scaling, fusion"), (dict(name="gated", fusion="sum"), "Known: mean, concat"),
    (dict(name="l2pa", compatibility="cos"), "Known: dot, additive"), (dict(name="plain", width=2), "Known: 0.35"),
    (dict(name="plain", output_stride=4), "Known: 8, 16, 32"), (dict(name="plain", weights="none.pth"), "Could not read weights from none.pth")])
def test_options_that_make_no_sense(options, told):
    with pytest.raises(AttnnasError, match=told): visual_model(**{"num_classes": 3, "width": 0.35} | options)


@pytest.mark.parametrize("wrong, told", [
    (lambda: CBAM(8)(randn(2, 9, 4, 4)), r"\(B, 8, H, W\) or \(B, 8, T, H, W\)"), (lambda: CBAM(8, kernel_size=4), "odd"),
    (lambda: ResidualAttention(8)(randn(2, 8, 3, 4, 4)), r"Expected a feature map \(B, 8, H, W\) with"),
    (lambda: ResidualAttention(8, 0), "at least 1"), (lambda: AttentionGate(8, 6)(randn(2, 8, 4, 4), randn(3, 6)), r"\(2, 6\)"),
    (lambda: L2PA(8, 6)(randn(2, 8, 4, 4), randn(2, 6, 1, 1)), "Pool the last map"), (lambda: CBAM(8)(randn(0, 8, 4, 4)), "no empty axis"),
    (lambda: visual_model("plain", 3, width=0.35)(randn(1, 3, 32, 32), return_masks=True), "no masks")])
def test_mistakes_are_named(wrong, told):
    with pytest.raises(AttnnasError, match=told): wrong()


# ---- the taxonomy

def test_everything_that_attends_has_a_label():
    kinds = {type(module) for name in VISUAL_MODELS for module in visual_model(name, 2, width=0.35, device="meta").attention.values()}
    assert kinds | set(OPERATIONS.values()) <= set(LABELS)
    for name in MECHANISMS:
        module = MECHANISMS[name]().eval()
        mask = module(*inputs(name), return_mask=True)[1]
        assert (mask.shape[1] > 1) == (label(module).representations == "multidimensional") or isinstance(module, CBAM)
    with pytest.raises(AttnnasError, match="expected some of self, distinctive"): Label("both", *["x"] * 7)


# ---- from masks to pixels, and to numbers

@pytest.mark.parametrize("cells", [4, 7, 10, 28])
@pytest.mark.parametrize("pixels", [28, 31, 224])
def test_a_planted_cell_lands_on_its_pixels(cells, pixels):
    for row, column in ((0, 0), (cells - 1, 0), (cells // 2, cells - 2)):
        mask = torch.zeros(1, 3, cells, cells)
        mask[0, :, row, column] = 1
        bright = to_heat(mask, (pixels, pixels))[0].nonzero()
        size = pixels / cells
        centre = bright.double().mean(0) + 0.5
        assert len(bright) and (centre - (torch.tensor([row, column]) + 0.5) * size).abs().max() < size / 2 + 0.5
        assert (bright.amax(0) - bright.amin(0) + 1).max() <= math.ceil(size)


def test_a_planted_frame_lands_on_its_frames():
    mask = torch.zeros(1, 1, 4, 2, 2)
    mask[0, 0, 2] = 1
    assert to_heat(mask, (16, 8, 8))[0].amax((1, 2)).nonzero().flatten().tolist() == [8, 9, 10, 11]


def test_scaling_is_by_image_and_survives_constants():
    heat = torch.stack([torch.arange(6.0).view(2, 3), torch.full((2, 3), -4.0), 1e-6 * torch.arange(6.0).view(2, 3)])
    expected = torch.arange(6.0).view(2, 3) / 5
    torch.testing.assert_close(scaled(heat), torch.stack([expected, torch.zeros(2, 3), expected]))


def test_localisation_of_rectangles_in_closed_form():
    objects = torch.zeros(3, 40, 40, dtype=torch.bool)
    objects[0, :20, :10] = objects[1, 10:30, 10:30] = objects[2, 39:, 39:] = True
    ramp = torch.arange(40.0)[:, None].expand(40, 40)              # a row's weight is its number
    mask = ramp.expand(3, 1, 40, 40)
    rows = lambda first, last: sum(range(first, last)) / sum(range(40))
    expected = torch.tensor([rows(0, 20) * 10 / 40, rows(10, 30) * 20 / 40, rows(39, 40) / 40], dtype=torch.float64)
    torch.testing.assert_close(mass_inside(mask, objects), expected)
    torch.testing.assert_close(pointing_game(mask, objects), torch.tensor([0, 0, 1 / 40], dtype=torch.float64))
    torch.testing.assert_close(chance(objects), torch.tensor([200, 400, 1], dtype=torch.float64) / 1600)


@pytest.mark.parametrize("cells", [1, 5, 7, 40])
def test_a_mask_that_knows_nothing_scores_chance(cells):
    objects = torch.zeros(2, 40, 40, dtype=torch.bool)
    objects[:, 8:24, 16:32] = True
    for value in (0.0, 0.3): torch.testing.assert_close(mass_inside(torch.full((2, 1, cells, cells), value), objects), chance(objects))
    if cells in (5, 40): torch.testing.assert_close(pointing_game(torch.zeros(2, 1, cells, cells), objects), chance(objects))


def test_a_peak_counts_by_the_centre_of_its_cell():
    objects = torch.zeros(1, 2, 20, 20, dtype=torch.bool)
    objects[0, 1, 7, 12] = True
    scores = {}
    for place in np.ndindex(2, 4, 4):
        mask = torch.zeros(1, 1, 2, 4, 4)
        mask[(0, 0, *place)] = 1
        scores[place] = pointing_game(mask, objects).item(), mass_inside(mask, objects).item()
    # the cell of frame 1, rows 5..9 and columns 10..14 has its centre on the object, one of its 5 x 5 pixels
    assert scores.pop((1, 1, 2)) == (1, pytest.approx(1 / 25)) and set(scores.values()) == {(0, 0)}


@pytest.mark.parametrize("wrong, told", [
    (lambda m, o: mass_inside(-m, o), "cannot be negative"), (lambda m, o: pointing_game(m, o.float()), "bool"),
    (lambda m, o: pointing_game(m, o & False), "Image 0 has no object"), (lambda m, o: mass_inside(m / 0, o), "NaN"),
    (lambda m, o: pointing_game(m[:, 0], o), "Expected masks")])
def test_masks_that_cannot_be_scored(wrong, told):
    objects = torch.zeros(1, 8, 8, dtype=torch.bool)
    objects[0, 2:4] = True
    with pytest.raises(AttnnasError, match=told): wrong(torch.ones(1, 1, 4, 4), objects)


@pytest.mark.parametrize("dilation, size, groups", [(2, (4, 4), 6), (2, (7, 5), 6), (4, (8, 12), 6), (4, (3, 9), 2), (3, (1, 10), 1)])
def test_an_interleaved_convolution_is_the_dilated_one(dilation, size, groups):
    options = dict(padding=dilation, dilation=dilation, groups=groups, dtype=torch.float64)
    dilated, interleaved = nn.Conv2d(6, 12, 3, **options), InterleavedConv2d(6, 12, 3, **options)
    interleaved.load_state_dict(dilated.state_dict())
    x = torch.randn(2, 6, *size, dtype=torch.float64, requires_grad=True)
    direction, found = torch.randn(2, 12, *size, dtype=torch.float64), []
    for layer in (dilated, interleaved):
        y = layer(x)
        found.append([y, *torch.autograd.grad((y * direction).sum(), [x, layer.weight, layer.bias])])
    for theirs, ours in zip(*found): torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_an_interleaved_convolution_of_another_kernel():
    "Five rows by three columns, padded so that the size stays."
    options = dict(padding=(4, 2), dilation=2, dtype=torch.float64)
    dilated, interleaved = nn.Conv2d(2, 3, (5, 3), **options), InterleavedConv2d(2, 3, (5, 3), **options)
    interleaved.load_state_dict(dilated.state_dict())
    x = torch.randn(2, 2, 7, 6, dtype=torch.float64)
    torch.testing.assert_close(interleaved(x), dilated(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel, options", [(3, dict(dilation=2)), (3, dict(dilation=2, padding=2, stride=2)), (2, dict(dilation=2, padding=1)),
                                             (3, dict(dilation=(2, 4), padding=(2, 4))), (3, dict(dilation=2, padding="same")),
                                             (3, dict(dilation=2, padding=2, padding_mode="reflect"))])
def test_what_cannot_be_interleaved_is_refused(kernel, options):
    with pytest.raises(AttnnasError, match="Expected stride 1.* got InterleavedConv2d"): InterleavedConv2d(4, 4, kernel, **options)


@pytest.mark.parametrize("stride, dilations", [(32, set()), (16, {2}), (8, {2, 4})])
def test_every_dilated_layer_is_interleaved(stride, dilations):
    layers = [m for m in visual_model("plain", 10, width=0.35, output_stride=stride).modules() if isinstance(m, nn.Conv2d)]
    assert {m.dilation[0] for m in layers if type(m) is InterleavedConv2d} == dilations
    assert all(m.dilation == (1, 1) for m in layers if type(m) is nn.Conv2d)
