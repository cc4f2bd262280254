"""I3D-R50, SlowFast and R(2+1)D: their published cost by two counts, the least clip, and attention at their sites."""
import math

import pytest
import torch
from torch import nn

pytest.importorskip("pytorchvideo")

from attnnas.attention.formula import attend
from attnnas.networks.resnet import i3d_r50, r2plus1d_r50, slowfast_r50
from attnnas.core.errors import AttnnasError
from attnnas.networks.insertion import insert, inserted, remove, site_shapes
from attnnas.networks.non_local import NonLocalBlock
from attnnas.networks.profile import costliest, count_flops
from attnnas.cells.spec import CellSpec, OperationSpec

BUILDERS = (i3d_r50, slowfast_r50, r2plus1d_r50)
SPEC = CellSpec((OperationSpec("temporal", "dot-product", "softmax"),
                 OperationSpec("spatiotemporal", "map-based", "sigmoid")), inputs=((0,), (0, 1)), width=8)
every_network = pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)


def clips(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def narrow(build, seed=0, **options):
    torch.manual_seed(seed)
    return build(5, **{"width": 8, "dropout": 0.0} | options)


def on_meta(build, num_classes=600, **options):
    with torch.device("meta"): return build(num_classes, **options)


def awake(module):
    "The last batch norm of a residual branch starts at zero; now every branch does something."
    for child in module.modules():
        if isinstance(child, nn.BatchNorm3d) and child.affine: nn.init.ones_(child.weight)
    return module


def multiply_adds(model, shape):
    "A second count, from the sizes of the layers: positions x outputs x inputs of a group x taps."
    counts = []

    def convolution(m, args, y):
        counts.append(y[0, 0].numel() * m.out_channels * m.in_channels // m.groups * math.prod(m.kernel_size))

    def linear(m, args, y): counts.append(y.numel() * m.in_features)
    for module in model.modules():
        if isinstance(module, nn.Conv3d): module.register_forward_hook(convolution)
        if isinstance(module, nn.Linear): module.register_forward_hook(linear)
    model.eval()(torch.empty(shape, device="meta"))
    return sum(counts)


# The published cost

@pytest.mark.parametrize("build, classes, total", [
    (i3d_r50, 600, 469_159_297_024), (slowfast_r50, 600, 65_709_348_864),
    (slowfast_r50, 400, 65_708_888_064), (r2plus1d_r50, 400, 75_145_969_664)])
def test_two_counts_agree(build, classes, total):
    model = on_meta(build, classes)
    assert count_flops(model, model.example_shape) == 2 * multiply_adds(model, model.example_shape) == 2 * total


@pytest.mark.parametrize("size", [(64, 256, 256), (8, 224, 224), (3, 70, 33)])
def test_i3d_r50_by_pencil(size):
    "Every layer of the layout that explains 938 GFLOPs, without a network."
    frames, *area = size
    def halved(a): return [-(-n // 2) for n in a]
    area = halved(area)
    total, channels = frames * math.prod(area) * 3 * 64 * 5 * 49, 64
    area = halved(area)
    for stage, taps in enumerate(((3, 3, 3), (3, 1, 3, 1), (3, 1, 3, 1, 3, 1), (1, 3, 1))):
        inner = 64 * 2 ** stage
        for block, time in enumerate(taps):
            before = frames * math.prod(area)
            if stage and not block: area = halved(area)
            after = frames * math.prod(area)
            total += before * channels * inner * time + after * inner * inner * 9 + after * inner * 4 * inner
            if not block: total += after * channels * 4 * inner
            channels = 4 * inner
    assert count_flops(on_meta(i3d_r50), (1, 3, *size)) == 2 * (total + channels * 600)
    if size == (64, 256, 256): assert 2 * total / 1e9 == pytest.approx(938, rel=1e-3)


def test_slowfast_is_published_as_multiply_adds_of_thirty_views():
    model = on_meta(slowfast_r50)
    assert round(30 * multiply_adds(model, (1, 3, 32, 256, 256)) / 1e9) == 1971


@pytest.mark.parametrize("build, millions", [(i3d_r50, 28.04), (slowfast_r50, 34.57), (r2plus1d_r50, 28.11)])
def test_parameters_are_those_that_pytorchvideo_publishes(build, millions):
    assert round(sum(p.numel() for p in on_meta(build, 400).parameters()) / 1e6, 2) == millions


@every_network
def test_costs_by_module_add_up(build):
    model = on_meta(build, width=8)
    shape = (1, 3, 8, 64, 64)
    rows = costliest(model, shape, top=None)
    assert sum(row["gflops"] for row in rows) == pytest.approx(count_flops(model, shape) / 1e9)


# The same function as pytorchvideo's

def theirs(build):
    from pytorchvideo.models import r2plus1d, resnet, slowfast
    common = dict(model_num_class=5, head_pool=nn.AdaptiveAvgPool3d)
    if build is slowfast_r50: return slowfast.create_slowfast(**common, stem_dim_outs=(8, 1))
    if build is r2plus1d_r50: return r2plus1d.create_r2plus1d(**common, stem_dim_out=8, head_activation=None)
    long, short = (3, 1, 1), (1, 1, 1)
    return resnet.create_resnet(**common, stem_dim_out=8, stem_conv_kernel_size=(5, 7, 7),
                                stage_conv_a_kernel_size=(long, [long, short], [long, short], [short, long]))


@every_network
def test_pytorchvideo_s_weights_fit_by_position_and_give_its_scores(build):
    model, x, peer = narrow(build), clips(2, 3, 8, 40, 40), theirs(build)
    def feed(x): return [x[:, :, ::4], x] if build is slowfast_r50 else x
    awake(peer)(feed(clips(4, 3, 8, 40, 40, seed=1)))  # moves the running statistics
    model.load_state_dict(dict(zip(model.state_dict(), peer.state_dict().values(), strict=True)))
    torch.testing.assert_close(model.eval()(x), peer.eval()(feed(x)), rtol=1e-4, atol=1e-5)
    assert model(x).abs().max() > 1e-3


# Clips

@every_network
@pytest.mark.parametrize("batch", [1, 2])
def test_the_least_clip_is_one_pixel(build, batch):
    model = awake(narrow(build, width=32))
    assert model.smallest == (1, 1, 1) and model.eval()(clips(batch, 3, *model.smallest)).shape == (batch, 5)
    for axis in range(3):
        size = [1, 1, 1]
        size[axis] = 0
        with pytest.raises(AttnnasError, match="at least T, H, W = 1, 1, 1, got shape"): model(clips(batch, 3, *size))
    if batch == 1: return
    model.train()(clips(2, 3, 1, 1, 1)).square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("build, frames", [(i3d_r50, 2), (slowfast_r50, 5), (r2plus1d_r50, 5)])
def test_a_batch_of_one_trains_where_batch_norm_has_two_values(build, frames):
    for enough, too_few in (((frames, 1, 1), (frames - 1, 1, 1)), ((1, 33, 1), (1, 32, 1)), ((1, 1, 33), (1, 1, 32))):
        model = awake(narrow(build))
        model(clips(1, 3, *enough)).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        with pytest.raises(ValueError, match="more than 1 value per channel"): model(clips(1, 3, *too_few))


@every_network
@pytest.mark.parametrize("batch", [1, 2])
def test_every_weight_learns(build, batch):
    model = awake(narrow(build, width=32))  # the scale of a single channel is undone by the next norm
    nn.functional.cross_entropy(model(clips(batch, 3, 9, 70, 70)), torch.arange(batch)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@every_network
def test_scores_are_scores_of_clips_of_any_size(build):
    model = awake(narrow(build, in_channels=2)).eval()
    for size in ((4, 32, 32), (7, 33, 50), (17, 20, 96)): assert model(clips(2, 2, *size)).shape == (2, 5)
    x = clips(2, 2, 4, 32, 32)
    before = model(x)
    with torch.no_grad():
        for p in model.head.parameters(): p.mul_(2)
    assert model(x).equal(2 * before)  # no softmax, in evaluation neither


def test_slow_path_sees_every_fourth_frame():
    model, seen = narrow(slowfast_r50).eval(), {}
    model.stem.slow.register_forward_pre_hook(lambda m, args: seen.update(slow=args[0]))
    model.stem.fast.register_forward_pre_hook(lambda m, args: seen.update(fast=args[0]))
    x = clips(1, 3, 10, 16, 16)
    model(x)
    assert seen["slow"].equal(x[:, :, [0, 4, 8]]) and seen["fast"].equal(x)


@every_network
def test_dropout_acts_in_training_alone(build):
    model, x = narrow(build, dropout=0.5), clips(2, 3, 4, 32, 32)
    assert model.eval()(x).equal(model(x)) and not model.train()(x).equal(model(x))


@pytest.mark.parametrize("build, options, told", [
    (slowfast_r50, {"width": 12}, "multiple of 8, got 12"), (i3d_r50, {"width": 0}, "width must be"),
    (r2plus1d_r50, {"in_channels": 2.5}, "in_channels must be a whole number above 0, got 2.5"),
    (i3d_r50, {"num_classes": -1}, "num_classes"), (i3d_r50, {"dropout": 1.0}, "dropout must be .* below 1, got 1.0")])
def test_options_that_make_no_sense(build, options, told):
    with pytest.raises(AttnnasError, match=told): build(**{"num_classes": 5} | options)


@every_network
@pytest.mark.parametrize("shape", [(2, 2, 4, 32, 32), (3, 4, 32, 32)])
def test_input_of_another_shape(build, shape):
    model = narrow(build)
    with pytest.raises(AttnnasError, match=r"takes clips \(B, 3, T, H, W\) of at least"): model(torch.zeros(shape))


# Attention

@pytest.mark.parametrize("build, slow, res3, res4", [(i3d_r50, "", (512, 64, 32, 32), (1024, 64, 16, 16)),
                                                     (slowfast_r50, "slow.", (512, 8, 32, 32), (1024, 8, 16, 16)),
                                                     (r2plus1d_r50, "", (512, 16, 32, 32), (1024, 8, 16, 16))])
def test_default_sites(build, slow, res3, res4):
    model = on_meta(build)
    shapes = site_shapes(model)
    assert model.default_sites == tuple(f"{stage}.{slow}{block}" for stage, blocks in (("res3", "13"), ("res4", "135"))
                                        for block in blocks)
    assert [shapes[site][1:] for site in model.default_sites] == [res3] * 2 + [res4] * 3


@every_network
@pytest.mark.parametrize("what", [SPEC, NonLocalBlock], ids=["cell", "non-local"])
def test_insertion_changes_no_bit_and_removal_restores(build, what):
    model, x = awake(narrow(build)).eval(), clips(2, 3, 5, 40, 40)
    before, tree = model(x), [(name, id(module)) for name, module in model.named_modules()]
    insert(model, what, example=x.shape)
    assert tuple(inserted(model)) == model.default_sites and model(x).equal(before)
    for module in inserted(model).values(): awake(module)
    assert not model(x).equal(before)
    remove(model)
    assert [(name, id(module)) for name, module in model.named_modules()] == tree and model(x).equal(before)


@every_network
def test_state_dict_round_trip(build):
    model, other = (insert(narrow(build, seed), SPEC, example=(1, 3, 4, 32, 32)) for seed in (0, 1))
    x = clips(2, 3, 5, 40, 40)
    awake(model)(x)  # moves the running statistics
    assert not model.eval()(x).equal(other.eval()(x))
    other.load_state_dict(model.state_dict())
    assert model(x).equal(other(x))


@pytest.mark.parametrize("activation, products", [("softmax", 2 * 65_536 ** 2 * 64), ("none", 2 * 65_536 * 64 ** 2)])
def test_attention_at_res3_is_counted_whole(activation, products):
    "65 536 positions: the fused kernel taken apart into its two products, and K^T V first."
    class Attend(nn.Module):
        def forward(self, x): return attend(x, x, x, activation)
    assert count_flops(Attend(), (1, 65_536, 64)) == 2 * products


def test_cost_of_five_non_local_blocks():
    model = on_meta(i3d_r50)
    plain = count_flops(model, model.example_shape)
    sites = [(512, 65_536)] * 2 + [(1024, 16_384)] * 3
    expected = sum(4 * n * c * c // 2 + 2 * n * n * c // 2 for c, n in sites)
    assert count_flops(insert(model, NonLocalBlock), model.example_shape) - plain == 2 * expected
