"""The networks, where attention goes in them, and what they cost."""
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnnas.networks.inception import FULL, InceptionVideo, SameConv3d, SameMaxPool3d, same_padding
from attnnas.networks.registry import MODELS, create_model, describe_models, list_models
from attnnas.cells.cell import AttentionCell
from attnnas.core.errors import AttnnasError
from attnnas.networks.insertion import Site, insert, inserted, remove, site_shapes
from attnnas.networks.non_local import NonLocalBlock
from attnnas.networks.profile import costliest, count_flops, profile
from attnnas.cells.spec import CellSpec, OperationSpec

PAPER_CLIP = (1, 3, 250, 256, 256)
SMALL = ("i3d_small", "s3d_small")
SPEC = CellSpec((OperationSpec("temporal", "dot-product", "softmax"),
                 OperationSpec("spatiotemporal", "map-based", "sigmoid")), inputs=((0,), (0, 1)), width=16)


def clips(seed=0, shape=(2, 3, 8, 24, 24)): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small(name="i3d_small", seed=0, **options):
    torch.manual_seed(seed)
    return create_model(name, 5, **options)


def awake(module):
    "Undo the zero scale: what was inserted now does something."
    for child in module.modules():
        if isinstance(child, nn.BatchNorm3d) and child.affine: nn.init.ones_(child.weight)


def tree(model): return [(name, id(module)) for name, module in model.named_modules()]


# The published cost

@pytest.mark.parametrize("name, multiply_adds", [("i3d", 568_076_558_336), ("s3d", 328_088_182_784)])
def test_multiply_adds_are_the_published_ones(name, multiply_adds):
    assert count_flops(create_model(name, 600), PAPER_CLIP) == 2 * multiply_adds


@pytest.mark.parametrize("name, gflops", [("i3d", 1304.563), ("s3d", 824.586)])
def test_five_non_local_blocks_cost_what_is_published(name, gflops):
    model = insert(create_model(name, 600), lambda channels: NonLocalBlock(channels, pool_keys=True))
    assert list(inserted(model)) == ["Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_5b", "Mixed_5c"]
    assert round(count_flops(model, PAPER_CLIP) / 1e9, 3) == gflops


def test_parameters_with_a_separated_stem():
    model = create_model("s3d", 400, separable_stem=True)
    assert sum(p.numel() for p in model.parameters()) == 8_320_048


def test_shapes_at_the_paper_s_layers():
    shapes = site_shapes(create_model("i3d", 600), PAPER_CLIP)
    expected = {"Mixed_3b": (256, 125, 32, 32), "Mixed_3c": (480, 125, 32, 32), "Mixed_4b": (512, 63, 16, 16),
                "Mixed_4e": (528, 63, 16, 16), "Mixed_4f": (832, 63, 16, 16), "Mixed_5c": (1024, 32, 8, 8)}
    assert {name: shapes[name][1:] for name in expected} == expected
    training = site_shapes(create_model("s3d", 600))
    assert (training["Mixed_4d"][2:], training["Mixed_5b"][2:]) == ((16, 14, 14), (8, 7, 7))


# Padding

@pytest.mark.parametrize("kernel, stride", [(1, 1), (3, 1), (2, 2), (3, 2), (7, 2)])
def test_same_padding_gives_the_ceiling_and_puts_the_odd_one_last(kernel, stride):
    for size in range(1, 40):
        before, after = same_padding(size, kernel, stride)
        assert (size + before + after - kernel) // stride + 1 == math.ceil(size / stride)
        assert after - before in (0, 1)


@pytest.mark.parametrize("size", [(7, 8, 9), (6, 5, 4), (1, 2, 3)])
@pytest.mark.parametrize("kernel, stride", [((3, 3, 3), (2, 2, 2)), ((1, 3, 3), (1, 2, 2)), ((2, 2, 2), (2, 2, 2)),
                                            ((3, 7, 7), (2, 2, 2)), ((3, 3, 3), (1, 1, 1))])
def test_same_layers_equal_padding_by_hand(size, kernel, stride):
    x = -1 - clips(1, (2, 4, *size)).abs()  # all negative: a zero among the padding would win the pooling
    pads = [side for axis in reversed([same_padding(*a) for a in zip(size, kernel, stride)]) for side in axis]
    pooled = F.max_pool3d(F.pad(x, pads, value=-math.inf), kernel, stride)
    if kernel != (3, 7, 7): assert SameMaxPool3d(kernel, stride)(x).equal(pooled)
    conv = SameConv3d(4, 5, kernel, stride)
    torch.testing.assert_close(conv(x), F.conv3d(F.pad(x, pads), conv.weight, None, stride))


# The small networks

@pytest.mark.parametrize("name, low, high", [("i3d_small", 40_000, 70_000), ("s3d_small", 30_000, 45_000)])
def test_small_networks_are_small_and_learn_with_every_weight(name, low, high):
    model = create_model(name, 12)
    assert low < sum(p.numel() for p in model.parameters()) < high
    F.cross_entropy(model(clips()), torch.tensor([0, 1])).backward()
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters())


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(8, 24, 24), (16, 32, 32), (5, 33, 18), (1, 8, 8)])
def test_small_networks_take_clips_of_any_size(name, size):
    model = small(name, in_channels=2)
    assert model(clips(0, (2, 2, *size))).shape == (2, 5)
    assert site_shapes(model, (1, 2, *size))["Mixed_4c"][2] == size[0]  # no temporal stride


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_see_nine_frames(name):
    "Without attention a feature knows nothing of an event that is more than four frames away."
    model, x = small(name).eval(), clips(0, (1, 3, 16, 16, 16)).requires_grad_()
    seen = []
    model.Mixed_4c.register_forward_hook(lambda module, args, output: seen.append(output))
    model(x)
    seen[0][:, :, 8].sum().backward()
    assert x.grad.abs().sum((0, 1, 3, 4)).nonzero().flatten().tolist() == list(range(4, 13))


def test_separation_and_stem_by_layer():
    kernels = lambda model: {n: m.kernel_size for n, m in model.named_modules() if isinstance(m, nn.Conv3d)}
    i3d, s3d = kernels(create_model("i3d", 5)), kernels(create_model("s3d", 5))
    assert (i3d["Conv3d_1a_7x7.conv"], s3d["Conv3d_1a_7x7.conv"]) == ((7, 7, 7), (3, 7, 7))
    assert [k for n, k in s3d.items() if k[0] > 1 and k[1] > 1] == [(3, 7, 7)]
    assert sum(k == (3, 3, 3) for k in i3d.values()) == sum(k == (3, 1, 1) for k in s3d.values()) == 19
    assert tuple(n for n, _ in create_model("s3d", 5).named_children()) == (*FULL, "head")


def test_heads_and_width():
    plain, mlp, wide = small(), small(head="mlp"), small(width_multiplier=1.5)
    assert isinstance(plain.head, nn.Linear) and [type(m) for m in mlp.head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert wide.head.in_features == 1.5 * plain.head.in_features
    assert mlp(clips()).shape == wide(clips()).shape == (2, 5)


def test_memory_format_of_the_input_does_not_matter():
    model, x = small().eval(), clips()
    assert model(x).equal(model(x.to(memory_format=torch.channels_last_3d)))


@pytest.mark.parametrize("options, told", [
    ({"layout": "smal"}, "Did you mean 'small'"), ({"head": "conv"}, "Known: linear, mlp"),
    ({"width_multiplier": 0}, "above 0"),
    ({"separable_stem": True}, "needs separable=True")])
def test_options_that_make_no_sense(options, told):
    with pytest.raises(AttnnasError, match=told): InceptionVideo(5, separable=False, **options)


@pytest.mark.parametrize("shape", [(2, 2, 8, 24, 24), (3, 8, 24, 24)])
def test_input_of_another_shape(shape):
    with pytest.raises(AttnnasError, match=r"takes clips \(B, 3, T, H, W\) of at least"): small()(torch.zeros(shape))


# Names

def test_models_by_name():
    assert list_models() == sorted(MODELS) and list_models("i3d*") == ["i3d", "i3d_r50", "i3d_small"]
    assert set(describe_models()) == set(MODELS) and all(len(text) > 20 for text in describe_models().values())
    i3d, s3d = (sum(p.numel() for p in small(name).parameters()) for name in SMALL)
    assert i3d > s3d
    with pytest.raises(AttnnasError, match="Did you mean 's3d_small'"): create_model("s3dsmall", 5)
    with pytest.raises(AttnnasError, match="'depth'"): create_model("i3d", 5, depth=50)


# Non-local block

@pytest.mark.parametrize("pool_keys, size", [(False, (3, 4, 5)), (True, (4, 4, 6)), (True, (3, 5, 1))])
def test_non_local_block_is_the_equation(pool_keys, size):
    x, block = clips(2, (2, 6, *size)), NonLocalBlock(6, pool_keys=pool_keys).eval()
    assert block(x).equal(x)
    awake(block)
    theta, phi, g = block.project(x).chunk(3, 1)
    if pool_keys: phi, g = (F.max_pool3d(t, 2, 2, ceil_mode=True) for t in (phi, g))
    weights = torch.einsum("bci,bcj->bij", theta.flatten(2), phi.flatten(2)).softmax(-1)
    y = torch.einsum("bij,bcj->bci", weights, g.flatten(2)).unflatten(2, size)
    torch.testing.assert_close(block(x), x + block.zero_norm(block.combine(y)))
    queries = torch.tensor([0, 7, 3])
    torch.testing.assert_close(block.weights(x, queries), weights[:, queries])


def test_non_local_block_never_stores_all_pairs():
    x, block = clips(0, (1, 8, 4, 4, 4)).requires_grad_(), NonLocalBlock(8)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]): block(x.to(memory_format=layout)).sum().backward()


def test_non_local_block_is_a_cell_of_one_operation():
    "Equal, once the cell's stem is multiplied into its projections and its 1 / sqrt(d) into the queries."
    spec = CellSpec((OperationSpec("spatiotemporal", "dot-product", "softmax"),), inputs=((0,),), width=6)
    cell, block, x = AttentionCell(8, spec, normalise=False), NonLocalBlock(8, inner=6), clips(0, (2, 8, 3, 4, 4))
    operation, stem = cell.operations[0], cell.stem
    with torch.no_grad():
        parts = [(layer.weight @ stem.weight, layer.weight @ stem.bias + layer.bias)
                 for layer in (operation.query, operation.key, operation.value)]
        parts[0] = tuple(part / 6 ** 0.5 for part in parts[0])
        block.project.weight.copy_(torch.cat([weight for weight, _ in parts]))
        block.project.bias.copy_(torch.cat([bias for _, bias in parts]))
        block.combine.weight.copy_(cell.combine.weight)
        for module in (cell.zero_norm, block.zero_norm): nn.init.ones_(module.weight)
    torch.testing.assert_close(block(x), cell(x), rtol=1e-4, atol=1e-5)
    assert (block(x) - x).abs().max() > 0.1


def test_non_local_block_refuses_another_shape():
    with pytest.raises(AttnnasError, match="8"): NonLocalBlock(8)(torch.zeros(1, 4, 2, 2, 2))


# Insertion

@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("what", [SPEC, NonLocalBlock], ids=["cell", "non-local"])
def test_a_new_cell_changes_no_bit(name, what):
    plain, model, x = small(name), insert(small(name), what), clips()
    assert len(inserted(model)) == 2
    for training in (True, False, True):
        assert model.train(training)(x).equal(plain.train(training)(x))
    awake(nn.ModuleList(inserted(model).values()))
    assert not model(x).equal(plain(x))


def test_cells_learn_from_the_first_step():
    model = insert(small(), SPEC)
    model(clips()).square().sum().backward()
    for cell in inserted(model).values(): assert cell.zero_norm.weight.grad.abs().sum() > 0


def test_removal_restores_the_network():
    model = small()
    before, keys, scores = tree(model), list(model.state_dict()), model.eval()(clips())
    insert(model, SPEC, ["Mixed_3b", "Mixed_4c", "Mixed_3b.Branch_1.Conv3d_0b_3x3"])  # one of them inside another
    assert list(inserted(model)) == ["Mixed_3b", "Mixed_3b.original.Branch_1.Conv3d_0b_3x3", "Mixed_4c"]
    assert [name for name, _ in model.named_children()] == [*model.layers, "head"]
    assert tree(remove(model)) == before and list(model.state_dict()) == keys and model(clips()).equal(scores)


def test_sites_have_cells_of_their_own():
    first, second = inserted(insert(small(), SPEC)).values()
    assert (first.channels, second.channels) == (48, 64)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}


def test_state_dict_round_trip():
    model, other = insert(small(seed=0), SPEC), insert(small(seed=1), SPEC)
    awake(model)
    model(clips())  # moves the running statistics
    assert not model.eval()(clips()).equal(other.eval()(clips()))
    other.load_state_dict(model.state_dict())
    assert model(clips()).equal(other(clips()))


def test_inserted_modules_follow_the_network():
    model = insert(small().double().eval(), SPEC)
    assert {p.dtype for p in model.parameters()} == {torch.float64} and not any(m.training for m in model.modules())
    assert model(clips().double()).dtype == torch.float64


class Scale(nn.Module):
    "x times one learnable number a channel; any number of trailing axes."
    def __init__(self, channels):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))

    def forward(self, x): return x * self.scale.view(-1, *[1] * (x.ndim - 2))


class Images(nn.Module):
    "A 2-D network with one ReLU used twice and a part that gives no tensor."
    def __init__(self):
        super().__init__()
        self.first, self.second, self.act = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3), nn.ReLU()
        self.pair, self.pool, self.head = Pair(), nn.AdaptiveAvgPool2d(1), nn.Linear(6, 2)

    def forward(self, x):
        x, _ = self.pair(self.act(self.second(self.act(self.first(x)))))
        return self.head(self.pool(x).flatten(1))


class Pair(nn.Module):
    def forward(self, x): return x, x


def test_any_network_by_name():
    video = nn.Sequential(nn.Conv3d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 2))
    x, image = clips(), clips(0, (2, 3, 16, 16))
    before = video(x)
    assert insert(video, SPEC, "1", example=(1, 3, 8, 24, 24))(x).equal(before) and isinstance(video[1], Site)
    images = Images()
    shapes = site_shapes(images, (1, 3, 16, 16))
    assert shapes == {"first": (1, 4, 14, 14), "second": (1, 6, 12, 12), "pool": (1, 6, 1, 1)}
    before = images(image)
    assert insert(images, Scale, ["first", "second"], (1, 3, 16, 16))(image).equal(before)
    assert [module.scale.numel() for module in inserted(images).values()] == [4, 6]


def test_a_network_that_cannot_run_on_meta_takes_a_tensor():
    class Threshold(nn.Module):
        def forward(self, x): return x if x.mean().item() < 9 else -x
    model = nn.Sequential(nn.Conv3d(3, 4, 1), Threshold())
    shape = (1, 3, 4, 4, 4)
    with pytest.raises(AttnnasError, match="failed in a dry run.*small input tensor"): insert(model, SPEC, "0", shape)
    insert(model, SPEC, "0", clips(0, shape))
    assert list(inserted(model)) == ["0"]


IMAGE = dict(model=Images, example=(1, 3, 16, 16))

@pytest.mark.parametrize("case, told", [
    (dict(sites="Mixed_4d"), r"Unknown site 'Mixed_4d'. Did you mean 'Mixed_4\w'\? Sites: Conv3d_1a_7x7, "),
    (dict(sites=""), "'' .InceptionVideo. cannot be a site"),
    (dict(sites=["Mixed_4b", "hed"]), "Unknown site 'hed'"),
    (dict(sites=["Mixed_4b", "head"]), r"'head' .Linear. cannot be a site.*5-D \(or 4-D\).*Mixed_4c"),
    (dict(sites=["Mixed_4b", "Mixed_3b", "Mixed_4b"]), "'Mixed_4b' is named twice"),
    (dict(sites=[]), "Give sites"),
    (dict(what=lambda channels: nn.Conv3d(channels, channels, 2)), "MaxPool3d_4a_3x3.*must keep the shape"),
    (dict(what=lambda channels: nn.Conv3d(7, 7, 1)), "does not take its shape"),
    (dict(what=lambda channels: channels), "gave int"),
    (dict(what=nn.Identity()), "Cannot insert Identity"),
    (dict(what="cell.json"), "Cannot insert str"),
    (dict(example=(1, 2, 8, 24, 24)), r"failed in a dry run.*takes clips \(B, 3"),
    (dict(model=Images), "No sites for Images"),
    (dict(model=Images, sites="first"), "Images has no example_shape"),
    (dict(IMAGE, sites="first"), r"an attention cell takes \(B, C, T, H, W\)"),
    (dict(IMAGE, sites="act", what=Scale), "'act' .ReLU. cannot be a site.*once"),
    (dict(IMAGE, sites="pair", what=Scale), "'pair' .Pair. cannot be a site"),
])
def test_a_mistake_is_told_and_leaves_the_network_alone(case, told):
    model = case.get("model", small)()
    before = tree(model)
    with pytest.raises(AttnnasError, match=told):
        insert(model, case.get("what", SPEC), case.get("sites"), case.get("example"))
    assert tree(model) == before


def test_a_taken_site_is_refused():
    model = insert(small(), SPEC, "Mixed_4b")
    before = tree(model)
    for site in ("Mixed_4b", "Mixed_4b.original", "Mixed_4b.added.stem"):
        with pytest.raises(AttnnasError, match="taken by AttentionCell|cannot be a site"):
            insert(model, SPEC, ["Mixed_4c", site])
    assert tree(model) == before
    assert list(inserted(insert(model, SPEC, "Mixed_4c"))) == ["Mixed_4b", "Mixed_4c"]


# Profile

def test_attention_s_products_are_counted():
    n, c, d = 2 * 4 * 4, 6, 3
    assert count_flops(NonLocalBlock(c), (1, c, 2, 4, 4)) == 2 * (4 * n * c * d + 2 * n * n * d)


def test_profile_leaves_the_model_alone_and_adds_up():
    model = insert(small(), NonLocalBlock)
    before = tree(model)
    numbers = profile(model, (1, 3, 8, 24, 24))
    rows = costliest(model, (1, 3, 8, 24, 24), top=None)
    assert model.training and tree(model) == before and next(model.parameters()).device.type == "cpu"
    assert numbers["gflops"] == pytest.approx(2 * numbers["multiply_adds"] / 1e9)
    assert numbers["gflops"] == pytest.approx(sum(row["gflops"] for row in rows))
    assert numbers["parameters"] == sum(p.numel() for p in model.parameters())
    assert [row["gflops"] for row in rows] == sorted((row["gflops"] for row in rows), reverse=True)
    assert costliest(model, (1, 3, 8, 24, 24), top=2) == rows[:2]
    assert {"Mixed_4b.added", "Mixed_4b.added.project", "head"} <= {row["module"] for row in rows}


def test_cost_of_nothing_and_of_a_wrong_shape():
    assert count_flops(nn.ReLU(), (1, 3, 4, 4, 4)) == 0
    with pytest.raises(AttnnasError, match="Conv3d failed in a dry run on an input of shape"):
        count_flops(nn.Conv3d(3, 4, 3), (1, 2, 4, 4, 4))
