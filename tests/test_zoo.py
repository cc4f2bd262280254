"""C3D, MViT-B, D3D's student and AssembleNet-50: what they cost, which clips they take, where attention goes."""
import copy
from functools import cache

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attnnas.networks.assemblenet import (ASSEMBLENET_50, LEVELS_50, Join, Node, assemblenet_50,
                                          check_connectivity)
from attnnas.networks.base import Backbone
from attnnas.networks.inception import FULL, InceptionVideo
from attnnas.networks.zoo import C3D_PLAN, GridBlock, SelfGate, c3d, d3d, mvit_b
from attnnas.core.errors import AttnnasError
from attnnas.networks.insertion import insert, inserted, remove, site_shapes
from attnnas.networks.non_local import NonLocalBlock
from attnnas.networks.profile import count_flops
from attnnas.cells.spec import CellSpec, OperationSpec

SPEC = CellSpec((OperationSpec("temporal", "dot-product", "softmax"),
                 OperationSpec("spatiotemporal", "map-based", "sigmoid")), inputs=((0,), (0, 1)), width=8)
BUILDERS = {"c3d": c3d, "mvit_b": lambda n: mvit_b(n, frames=4, size=32),
            "d3d": d3d, "d3d_small": lambda n: d3d(n, layout="small"), "assemblenet_50": assemblenet_50}
each_model = pytest.mark.parametrize("name", BUILDERS)
SITES = {"c3d": 3, "mvit_b": 5, "d3d": 5, "d3d_small": 2, "assemblenet_50": 3}


@cache
def made(name) -> Backbone:
    "A model with 5 classes, shared by the tests of this file: they leave its modules as they found them."
    torch.manual_seed(0)
    model = BUILDERS[name](5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d): nn.init.ones_(module.weight)
    return model


def clips(model, batch=1, seed=0):
    return torch.randn(batch, model.in_channels, *model.smallest, generator=torch.Generator().manual_seed(seed))


def on_meta(build, *arguments, **options):
    with torch.device("meta"): return build(*arguments, **options)


def parameters(model): return sum(p.numel() for p in model.parameters())


def tree(model): return [(name, id(module)) for name, module in model.named_modules()]


# All of them

@each_model
def test_every_parameter_learns_at_the_smallest_clip(name):
    """If this fails, `smallest` promises a clip that cannot be trained on, alone or in a batch, or a weight is idle.

    With one clip a gradient may be zero: max pooling makes all positions alike, and batch norm makes those nothing.
    """
    model = made(name).train()
    for batch in (2, 1):
        model.zero_grad()
        scores = model(clips(model, batch))
        assert scores.shape == (batch, 5)
        F.cross_entropy(scores, torch.arange(batch)).backward()
        assert scores.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())
        if batch > 1: assert [n for n, p in model.named_parameters() if not p.grad.abs().sum() > 0] == []
    model.zero_grad()


@each_model
@pytest.mark.parametrize("what", [SPEC, NonLocalBlock], ids=["cell", "non-local"])
def test_attention_changes_no_bit_when_new_and_goes_without_a_trace(name, what):
    model = made(name).eval()
    x, before, names = clips(model), tree(model), list(model.state_dict())
    with torch.no_grad():
        scores = model(x)
        insert(model, what, example=x.shape)
        assert len(inserted(model)) == SITES[name] and model(x).equal(scores)
        for added in inserted(model).values(): nn.init.ones_(added.zero_norm.weight)
        assert not model(x).equal(scores)
        remove(model)
    assert tree(model) == before and list(model.state_dict()) == names and model(x).equal(scores)


@each_model
def test_a_new_cell_learns_at_every_site(name):
    "If this fails, a default site is one that the scores do not depend on."
    model = insert(copy.deepcopy(made(name)).eval(), SPEC, example=clips(made(name)).shape)
    F.cross_entropy(model(clips(model)), torch.tensor([1])).backward()
    for cell in inserted(model).values(): assert cell.zero_norm.weight.grad.abs().sum() > 0


@each_model
def test_state_dict_round_trip(name):
    model = made(name).eval()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in other.state_dict().values(): tensor.mul_(2)
        x = clips(model)
        assert not other(x).equal(model(x))
        other.load_state_dict(model.state_dict())
        assert other(x).equal(model(x))


@pytest.mark.parametrize("build, shape, channels", [
    (lambda n: c3d(n, in_channels=2), (1, 2, 16, 112, 112), 2), (c3d, (1, 3, 16, 112, 112), 3),
    (d3d, (1, 3, 64, 224, 224), 3), (assemblenet_50, (1, 5, 32, 224, 224), 5)])
def test_example_shape_and_the_sites_in_it(build, shape, channels):
    model = on_meta(build, 5)
    shapes = site_shapes(model)
    assert (model.example_shape, model.in_channels) == (shape, channels)
    assert {len(shapes[name]) for name in model.default_sites} == {5}
    for wrong in (torch.zeros(1, channels + 1, *shape[2:], device="meta"), torch.zeros(shape[1:], device="meta")):
        with pytest.raises(AttnnasError, match=rf"takes clips \(B, {channels}"): model(wrong)


@pytest.mark.parametrize("name", ["d3d", "d3d_small", "assemblenet_50"])
def test_smallest_is_the_least_that_batch_norm_takes(name, monkeypatch):
    model = made(name).train()
    smaller = clips(model)[..., :-1, :-1]
    with pytest.raises(AttnnasError, match="of at least T, H, W = 1, "): model(smaller)
    monkeypatch.setattr(model, "smallest", (1, 1, 1))
    with pytest.raises(ValueError, match="more than 1 value per channel"): model(smaller)


# C3D

def c3d_by_hand(classes, in_channels=3):
    "(parameters, multiply-adds) at 16 x 112 x 112: 27 weights and a bias for each pair of channels and each channel."
    layers = [(in_channels, 64, 16 * 112 ** 2), (64, 128, 16 * 56 ** 2),
              (128, 256, 8 * 28 ** 2), (256, 256, 8 * 28 ** 2),
              (256, 512, 4 * 14 ** 2), (512, 512, 4 * 14 ** 2), (512, 512, 2 * 7 ** 2), (512, 512, 2 * 7 ** 2)]
    full = [(8192, 4096), (4096, 4096), (4096, classes)]
    weights = sum(27 * i * o + o for i, o, _ in layers) + sum(i * o + o for i, o in full)
    return weights, sum(27 * i * o * n for i, o, n in layers) + sum(i * o for i, o in full)


@pytest.mark.parametrize("classes, published", [(101, 78.4e6), (487, 80.0e6)])
def test_c3d_costs_what_its_layers_say(classes, published):
    model = on_meta(c3d, classes)
    weights, multiply_adds = c3d_by_hand(classes)
    assert parameters(model) == weights == pytest.approx(published, rel=1e-3)
    assert count_flops(model, model.example_shape) == 2 * multiply_adds
    assert round(multiply_adds / 1e9, 1) == 38.5


def test_c3d_s_batch_norm_takes_the_place_of_the_biases_and_a_single_clip():
    plain, normed = on_meta(c3d, 5), c3d(5, batch_norm=True)
    convolutions = [module for module in normed.modules() if isinstance(module, nn.Conv3d)]
    assert parameters(normed) - parameters(plain) == sum(conv.out_channels for conv in convolutions)  # scales
    normed(clips(normed)).sum().backward()
    assert [n for n, p in normed.named_parameters() if not p.grad.abs().sum() > 0] == []


def test_c3d_takes_exactly_the_clips_that_its_fully_connected_layer_can_read():
    model = on_meta(c3d, 5).eval()
    free = on_meta(c3d, 5).eval()
    free.smallest, free.largest = (1, 1, 1), (999, 999, 999)
    shapes = [(t, h, 112) for t in (1, 2, 15, 16, 17, 32) for h in (96, 97, 128, 129)]
    for shape in [*shapes, (16, 112, 96), (16, 112, 129)]:
        x = torch.zeros(1, 3, *shape, device="meta")
        try: fits = free(x).shape == (1, 5)
        except RuntimeError: fits = False
        if fits: assert model(x).shape == (1, 5)
        else:
            with pytest.raises(AttnnasError, match="C3D takes"): model(x)
        assert fits == (shape[0] <= 16 and 97 <= shape[1] <= 128 and 97 <= shape[2] <= 128)


def test_c3d_s_layers_by_hand():
    "The last pooling makes 4 x 4 of 7 x 7 with what hangs over the edge left out of the maximum."
    model = made("c3d").eval()
    x = torch.randn(1, 3, 16, 112, 112, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = x
        for name, plan in C3D_PLAN.items():
            if isinstance(plan, tuple):
                odd = [side for n, k in zip(reversed(y.shape[2:]), reversed(plan)) for side in (0, -n % k)]
                y = F.max_pool3d(F.pad(y, odd, value=-1), plan)
            else:
                conv = model.get_submodule(name)[0]
                y = F.conv3d(y, conv.weight, conv.bias, padding=1).relu()
        assert y.shape == (1, 512, 1, 4, 4)
        y = y.flatten(1)
        for layer in (model.fc6, model.fc7): y = layer(y).relu()
        torch.testing.assert_close(model(x), model.fc8(y), rtol=1e-4, atol=1e-4)


# MViT-B

def mvit_by_hand(classes):
    "(parameters, multiply-adds) of MViT-B at 16 x 224 x 224, from the table of its blocks."
    n, weights, work = 8 * 56 ** 2, 96 * 441 + 96, 8 * 56 ** 2 * 96 * 441  # the patches: 3 x 3 x 7 x 7 = 441 numbers
    weights += 96 * (56 ** 2 + 8) + 2 * 96  # position embeddings of space, time and class token; the class token
    dim = 96
    for block in range(16):
        out = 2 * dim if block in (0, 2, 13) else dim
        keys = 8 * (14 if block in (1, 3, 14) else 7) ** 2  # 56 / 8, then 56 / 4, 28 / 4, 28 / 2, 14 / 2, 14 / 1, 7 / 1
        queries = n // 4 if block in (1, 3, 14) else n
        pools = [(queries, block in (1, 3, 14)), (keys, True), (keys, True)]
        weights += 4 * dim + 4 * (dim * dim + dim) + sum(27 * 96 + 2 * 96 for _, pooled in pools if pooled)
        work += 3 * (n + 1) * dim * dim + sum(27 * dim * count for count, pooled in pools if pooled)
        work += 2 * (queries + 1) * (keys + 1) * dim + (queries + 1) * dim * dim
        weights += dim * 4 * dim + 4 * dim + 4 * dim * out + out + (dim * out + out if out != dim else 0)
        work += (queries + 1) * (4 * dim * dim + 4 * dim * out + (dim * out if out != dim else 0))
        dim, n = out, queries
    return weights + 2 * dim + dim * classes + classes, work + dim * classes


def test_mvit_costs_what_its_table_says_and_nearly_what_is_published():
    model = mvit_b(400)
    weights, multiply_adds = mvit_by_hand(400)
    assert parameters(model) == weights and count_flops(model, model.example_shape) == 2 * multiply_adds
    assert round(weights / 1e6, 1) == 36.6 and multiply_adds == pytest.approx(70.5e9, rel=2e-3)


def test_mvit_is_pytorchvideo_s():
    from pytorchvideo.models.vision_transformers import create_multiscale_vision_transformers
    from attnnas.networks.zoo import MVIT_B
    torch.manual_seed(0)
    plain = create_multiscale_vision_transformers(spatial_size=32, temporal_size=4, head_num_classes=5, **MVIT_B).eval()
    model = made("mvit_b").eval()
    x = clips(model, 2)
    with torch.no_grad(): assert model(x).equal(plain(x))
    assert [isinstance(block, GridBlock) for block in model.transformer.blocks] == 15 * [True] + [False]


def test_a_grid_holds_the_tokens_in_their_places():
    class Give(nn.Module):
        def forward(self, tokens, size): return tokens, size
    block, tokens, size = GridBlock(Give()), torch.randn(2, 1 + 24, 6), [2, 3, 4]
    grids = []
    block.grid.register_forward_hook(lambda module, args, output: grids.append(output))
    out, after = block(tokens, size)
    assert out.equal(tokens) and after == size and grids[0].shape == (2, 6, 2, 3, 4)
    assert grids[0][1, :, 1, 2, 3].equal(tokens[1, -1]) and grids[0][0, :, 0, 1, 2].equal(tokens[0, 1 + 4 + 2])
    block.grid = nn.Conv3d(6, 6, 3, padding=1)
    out, _ = block(tokens, size)
    assert out[:, 0].equal(tokens[:, 0]) and not out[:, 1:].equal(tokens[:, 1:])  # the class token goes around


@pytest.mark.parametrize("shape", [(1, 3, 4, 64, 64), (1, 3, 2, 32, 32), (1, 3, 4, 28, 32), (3, 4, 32, 32)])
def test_mvit_takes_one_size(shape):
    model = made("mvit_b")
    with pytest.raises(AttnnasError, match="only, got shape .* position embeddings .* frames= and size="):
        model(torch.zeros(shape))
    with pytest.raises(AttnnasError, match=r"takes clips \(B, 3"): model(torch.zeros(1, 2, 4, 32, 32))


def test_mvit_s_stochastic_depth_rises_to_its_rate():
    blocks = mvit_b(5, in_channels=2, frames=2, size=4, drop_path=0.3).transformer.blocks
    rates = [block.drop_path.drop_prob for block in (blocks[7].block, blocks[15])]
    assert rates == pytest.approx([0.3 * 7 / 15, 0.3])


@pytest.mark.parametrize("frames, size", [(3, 32), (4, 30), (0, 32)])
def test_mvit_s_patches_must_come_out_even(frames, size):
    with pytest.raises(AttnnasError, match="a patch is 2 x 4 x 4"): mvit_b(5, frames=frames, size=size)


# D3D's student

def test_d3d_is_s3d_with_thirty_seven_gates():
    plain, gated = (on_meta(build, 400) for build in (lambda n: InceptionVideo(n, separable=True), d3d))
    blocks = [layer for layer in FULL.values() if len(layer) == 6]
    squares = 192 ** 2 + sum(b[i] ** 2 for b in blocks for i in (0, 2, 4, 5))
    assert sum(isinstance(module, SelfGate) for module in gated.modules()) == 37
    assert parameters(gated) == parameters(plain) + squares
    shape = (1, 3, 16, 64, 64)
    assert count_flops(gated, shape) == count_flops(plain, shape) + 2 * squares


def test_d3d_without_its_gates_is_s3d():
    gated, plain = copy.deepcopy(made("d3d_small")).eval(), InceptionVideo(5, separable=True, layout="small").eval()
    x, told = torch.randn(2, 3, 8, 24, 24), plain.load_state_dict(gated.state_dict(), strict=False)
    assert told.missing_keys == [] and all(key.endswith("gate.linear.weight") for key in told.unexpected_keys)
    assert not gated(x).equal(plain(x))
    for module in gated.modules():
        if isinstance(module, nn.Sequential) and "gate" in dict(module.named_children()): del module.gate
    assert gated(x).equal(plain(x))


def test_a_gate_is_the_equation():
    gate, x = SelfGate(3), torch.randn(2, 3, 4, 5, 6)
    y = gate(x)
    for b in range(2):
        weights = torch.sigmoid(gate.linear.weight @ torch.stack([x[b, c].mean() for c in range(3)]))
        for c in range(3): torch.testing.assert_close(y[b, c], weights[c] * x[b, c])


# AssembleNet

TINY = {"a": Node(0, {"rgb": 1}, 8, 2), "b": Node(0, {"flow": 1}, 4), "1": Node(1, {"a": .3, "b": .8}, 4, 2),
        "2": Node(2, {"1": .5, "b": .5}, 8), "3": Node(3, {"1": .5, "2": .5}, 8), "4": Node(4, {"3": 1}, 8)}


def tiny(connectivity=TINY, seed=0):
    torch.manual_seed(seed)
    model = assemblenet_50(5, connectivity, levels=[(2, 8)] * 4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm3d): nn.init.ones_(module.weight)
    return model.eval()


def assemblenet_by_hand(classes, frames, size):
    "(parameters, multiply-adds), from the table of nodes."
    width, stride, weights, work = {}, {}, 0, 0
    for name, node in ASSEMBLENET_50.items():
        sources, c = [*node.inputs], node.channels
        if node.level == 0:
            positions = frames * (size // 2) ** 2
            taps = 49 * c * {"rgb": 3, "flow": 2}[sources[0]]
            time = 5 * c * c if sources == ["rgb"] else 0
            weights += taps + 2 * c + time + (2 * c if time else 0)
            work += positions * (taps + time)
            width[name], stride[name] = c, 4
            continue
        grid, widest = max(stride[s] for s in sources), max(width[s] for s in sources)
        positions = frames * (size // grid) ** 2
        for narrow in {width[s] for s in sources} - {widest}:
            weights += narrow * widest
            work += positions * narrow * widest
        weights += len(sources) if len(sources) > 1 else 0
        modules, middle = LEVELS_50[node.level - 1]
        channels = widest
        for i in range(modules):
            before, step = positions, 2 if i == 0 and node.level > 1 else 1
            positions //= step ** 2
            enter = (3 if i % 2 else 1) * channels * c
            skip = channels * 4 * c if step > 1 or channels != 4 * c else 0
            weights += enter + 2 * c + 9 * c * middle + 2 * middle + middle * 4 * c + 8 * c
            weights += skip + 8 * c if skip else 0
            work += before * enter + positions * (9 * c * middle + middle * 4 * c + skip)
            channels = 4 * c
        width[name], stride[name] = 4 * c, grid * (2 if node.level > 1 else 1)
    return weights + width["4a"] * classes + classes, work + width["4a"] * classes


def test_assemblenet_costs_what_its_table_says():
    model = on_meta(assemblenet_50, 339)
    weights, multiply_adds = assemblenet_by_hand(339, 32, 224)
    assert parameters(model) == weights and count_flops(model, model.example_shape) == 2 * multiply_adds
    assert site_shapes(model)["nodes.4a"] == (1, 2048, 32, 7, 7)  # all frames, to the end


@pytest.mark.parametrize("stream, part", [("rgb", slice(0, 3)), ("flow", slice(3, 5))])
def test_both_streams_reach_the_scores_and_go_through_stems_of_their_own(stream, part):
    model, x = made("assemblenet_50").eval(), clips(made("assemblenet_50"))
    other = x.clone()
    other[:, part] = -other[:, part]
    seen = {name: [] for name in model.order}
    hooks = [model.nodes[name].register_forward_hook(lambda module, args, output, maps=maps: maps.append(output))
             for name, maps in seen.items()]
    with torch.no_grad(): assert not model(x).equal(model(other))
    for hook in hooks: hook.remove()
    moved = {name for name, (one, two) in seen.items() if not one.equal(two)}
    expected = {stream}
    for name in model.order:
        if expected & set(ASSEMBLENET_50[name].inputs): expected.add(name)
    assert moved == expected - {stream}


def test_a_dilation_is_a_temporal_reach():
    "With one (2+1)D module, frame 8 of a block is moved by the frames `dilation` before and after it, and no others."
    model = tiny()
    maps = [torch.randn(1, 8, 17, 6, 6, requires_grad=True), torch.randn(1, 4, 17, 6, 6)]
    model.nodes["1"](*maps)[:, :, 8].sum().backward()
    assert maps[0].grad.abs().sum((0, 1, 3, 4)).nonzero().flatten().tolist() == [6, 8, 10]


@pytest.mark.parametrize("size", [(1, 33, 33), (3, 50, 37), (2, 64, 64)])
def test_maps_of_every_grid_meet(size):
    assert tiny()(torch.randn(2, 5, *size)).shape == (2, 5)


def test_joining_is_the_equation():
    fine, coarse = [[torch.randn(2, width, 3, *grid) for width in (4, 6)] for grid in ((7, 6), (4, 3))]
    maps = fine + coarse
    join = Join([.1, .2, .6, .9], [4, 6, 4, 6], [4, 4, 8, 8])
    pool = lambda x: F.max_pool3d(F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), value=-9), (1, 2, 2))
    widen = join.widen["4"]
    expected = widen(.1 * pool(maps[0])) + .2 * pool(maps[1]) + widen(.6 * maps[2]) + .9 * maps[3]
    torch.testing.assert_close(join(*maps), expected)


def test_the_order_in_which_nodes_are_written_does_not_matter():
    model, other = tiny(), tiny(dict(reversed(TINY.items())), seed=1)
    other.load_state_dict(model.state_dict())
    x = torch.randn(1, 5, 4, 40, 40)
    assert other(x).equal(model(x))


def test_several_last_nodes_are_averaged():
    model = tiny(TINY | {"4b": Node(4, {"2": 1}, 8, 1)})
    ends = []
    for name in ("4", "4b"): model.nodes[name].register_forward_hook(lambda module, args, output: ends.append(output))
    scores = model(torch.randn(2, 5, 4, 40, 40))
    torch.testing.assert_close(scores, model.head((ends[0].mean((2, 3, 4)) + ends[1].mean((2, 3, 4))) / 2))


def test_published_connectivity_is_sound():
    order = check_connectivity(ASSEMBLENET_50)
    assert sorted(order) == sorted(ASSEMBLENET_50) and len(order) == 15
    for node in ASSEMBLENET_50.values():
        if node.level: assert all(ASSEMBLENET_50[source].level < node.level for source in node.inputs)


@pytest.mark.parametrize("change, told", [
    ({"2": Node(2, {"1x": .5, "b": .5}, 8)}, "Unknown input of node '2': '1x'"),
    ({"2": Node(2, {"rgb": 1}, 8)}, "Unknown input of node '2': 'rgb'"),
    ({"a": Node(0, {"depth": 1}, 8)}, "Unknown input of node 'a': 'depth'.*Known: rgb, flow"),
    ({"1": Node(1, {"a": .5, "3": .5}, 8)}, "runs in a circle: .*3.*1"),
    ({"1": Node(1, {"a": .5, "b": .4, "1": .5}, 8)}, "runs in a circle: 1 -> 1"),
    ({"2b": Node(2, {"1": 1}, 8)}, "Nothing reads node '2b'"),
    ({"4b": Node(4, {"3": 1}, 16)}, r"\[8, 16\] channels"),
    ({"4": Node(3, {"3": 1}, 8)}, "have no channels"),
    ({"2": Node(5, {"1": 1}, 8)}, "Unknown level of node '2'"),
    ({"2": Node(2, {}, 8)}, "'2' has 0 inputs"),
    ({"a": Node(0, {"rgb": 1, "flow": 1}, 8)}, "'a' has 2 inputs"),
    ({"3": Node(3, {"1": 1.0, "2": .5}, 8)}, "between 0 and 1"),
    ({"2": Node(2, {"1": .5, "b": .5}, 8, 0)}, "'2' has 8 channels and dilation 0"),
    ({"2": Node(2, {"1": .5, "b": .5}, 0)}, "'2' has 0 channels"),
    ({"flow": Node(1, {"b": 1}, 8)}, "may not be called 'flow'"),
    ({"2.b": Node(1, {"b": 1}, 8)}, "may not be called '2.b'")])
def test_a_wrong_connectivity_is_told(change, told):
    with pytest.raises(AttnnasError, match=told): tiny(TINY | change)


def test_four_levels_are_needed():
    with pytest.raises(AttnnasError, match="levels has 3 entries"): assemblenet_50(5, TINY, levels=[(1, 8)] * 3)
