"""Image networks on the frames of a clip: what they compute, what they cost, and attention between their layers."""
import itertools

import pytest

timm = pytest.importorskip("timm")
import torch
from torch import nn
from torch.nn import functional as F

from attnnas.networks import frames
from attnnas.networks.base import Backbone
from attnnas.networks.frames import (FrameAverage, FrameNetwork, PerFrame, Relations, StNet,
                                     TemporalXception, TwoStream, image_name, super_images,
                                     temporal_block)
from attnnas.core.errors import AttnnasError
from attnnas.networks.insertion import insert, inserted, remove, site_shapes
from attnnas.networks.non_local import NonLocalBlock
from attnnas.networks.profile import count_flops
from attnnas.cells.spec import CellSpec, OperationSpec

SPEC = CellSpec((OperationSpec("temporal", "dot-product", "softmax"),
                 OperationSpec("spatiotemporal", "map-based", "sigmoid")), inputs=((0,), (0, 1)), width=8)
BUILDERS = ("r50_frames", "tsn_r50", "tsn_two_stream", "two_stream", "trn_multiscale", "stnet", "cnn_lstm")
CASES = {"average": ("tsn_r50", {}), "relations": ("trn_multiscale", {"frames": 4}), "stnet": ("stnet", {"stack": 2}),
         "lstm": ("cnn_lstm", {}), "streams": ("two_stream", {"stack": 2})}
every_case = pytest.mark.parametrize("case", CASES)


def small(case, seed=0, **options):
    torch.manual_seed(seed)
    name, own = CASES[case]
    return getattr(frames, name)(5, **{"backbone": "resnet18"} | own | options)


def clips(*shape, seed=0): return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def clip_for(model, batch=2, side=32):
    frames = max(model.smallest[0], 4)
    return clips(batch, model.in_channels, frames, side, side)


def seeded(model, x):
    "Scores with the same random tuples, whoever asks."
    torch.manual_seed(7)
    return model(x)


def awake(model):
    for module in inserted(model).values(): nn.init.ones_(module.zero_norm.weight)
    return model


def tree(model): return [(name, id(module)) for name, module in model.named_modules()]


# What each promises

@every_case
@pytest.mark.parametrize("batch", [1, 2])
def test_the_smallest_clip_trains_every_weight(case, batch):
    model = small(case)
    scores = model(clips(batch, model.in_channels, *model.smallest))
    assert scores.shape == (batch, 5)
    F.cross_entropy(scores, torch.arange(batch)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_case
def test_a_smaller_clip_is_refused_and_would_not_train(case):
    model = small(case)
    shape = (1, model.in_channels, model.smallest[0] - 1, *model.smallest[1:])
    with pytest.raises(AttnnasError, match="of at least T, H, W ="): model(torch.zeros(shape))
    with pytest.raises(ValueError, match="more than 1 value per channel|takes clips|relates exactly"):
        model.scores(torch.zeros(shape))


def test_smallest_image_of_networks_without_padding():
    model = frames.trn_multiscale(5, frames=2)
    assert isinstance(model, Backbone) and model.smallest == (2, 75, 75)
    model(clips(1, 3, 2, 75, 75)).sum().backward()
    assert all(p.grad.any() for p in model.parameters())
    for size in ((74, 75), (75, 74)):
        with pytest.raises(RuntimeError): model.scores(clips(1, 3, 2, *size))


@pytest.mark.parametrize("name", BUILDERS)
def test_default_sites_see_time_in_the_published_clip(name):
    with torch.device("meta"): model = getattr(frames, name)(600)
    shapes = site_shapes(model)
    time = {shapes[site][2] for site in model.default_sites}
    expected = {"r50_frames": 64, "trn_multiscale": 8, "cnn_lstm": 16}.get(name, 25)
    assert time == {expected} and {len(shapes[site]) for site in model.default_sites} == {5}
    assert getattr(frames, name).__doc__ and model.in_channels == (5 if "stream" in name else 3)


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"relations"}))
def test_any_longer_and_larger_clip(case):
    model = small(case).eval()
    for size in ((7, 32, 32), (5, 33, 47), (12, 64, 40)):
        assert model(clips(2, model.in_channels, *size)).isfinite().all()


# Frame by frame

@pytest.mark.parametrize("name, side", [("resnet18", 40), ("mobilenetv2_050", 40), ("inception_v3", 80),
                                        ("convnext_atto", 64)])
def test_the_trunk_is_timm_s_network_on_every_frame(name, side):
    torch.manual_seed(0)
    net, x = timm.create_model(name, num_classes=0).eval(), clips(2, 3, 3, side, side)
    model = FrameNetwork(name, (8, 64, 64)).eval()
    weights = {name: tensor for name, tensor in net.state_dict().items() if not name.startswith("head.")}
    assert sorted(map(image_name, model.state_dict())) == sorted(weights)
    model.load_state_dict({name: weights[image_name(name)] for name in model.state_dict()})
    with torch.no_grad():
        maps = model.trunk(x)
        for t in range(3):  # single images round differently from a batch of six: close, and bits in the batch
            torch.testing.assert_close(maps[:, :, t], net.forward_features(x[:, :, t]), rtol=1e-4, atol=1e-4)
        assert maps.equal(net.forward_features(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (2, 3)).transpose(1, 2))


@pytest.mark.parametrize("name, told", [("resnet51q_", "Unknown image network.*Did you mean 'resnet51q'"),
                                        ("vit_tiny_patch16_224", "VisionTransformer is not a chain"),
                                        ("swin_tiny_patch4_window7_224", "SwinTransformer is not a chain"),
                                        ("maxvit_pico_rw_256", "MaxxVit is not a chain"),
                                        ("hrnet_w18_small", "not a chain")])
def test_a_network_that_cannot_be_followed_is_refused(name, told):
    with pytest.raises(AttnnasError, match=told): frames.r50_frames(5, backbone=name)


def test_per_frame_keeps_the_order_of_clips_and_frames():
    x = clips(2, 3, 4, 5, 6)
    doubled = PerFrame(nn.Conv2d(3, 7, 3)).double()
    y = doubled(x.double())
    for b, t in itertools.product(range(2), range(4)):
        torch.testing.assert_close(y[b, :, t], doubled.module(x[b:b + 1, :, t].double())[0])


def test_per_frame_gives_the_same_bits_in_any_memory_layout():
    "What is inserted may leave channels last, in which a convolution would round otherwise."
    torch.manual_seed(0)
    x, layer = clips(1, 64, 4, 16, 16), PerFrame(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64)))
    assert layer(x.contiguous(memory_format=torch.channels_last_3d)).equal(layer(x))


def test_consensus_is_the_average_over_frames():
    model, x = small("average").eval(), clips(2, 3, 5, 40, 40)
    by_hand = torch.stack([model.head(model.trunk(x[:, :, t:t + 1]).mean((2, 3, 4))) for t in range(5)])
    torch.testing.assert_close(model(x), by_hand.mean(0))
    torch.testing.assert_close(model.frame_scores(x), by_hand.transpose(0, 1))
    torch.testing.assert_close(model(x[:, :, [3, 0, 4, 2, 1]]), model(x))


def test_dropout_acts_in_training_alone():
    plain, model, x = small("average"), small("average", dropout=0.5), clips(2, 3, 4, 32, 32)
    assert seeded(model.eval(), x).equal(seeded(plain.eval(), x))
    assert not seeded(model.train(), x).allclose(seeded(plain.train(), x))


# Relations

def by_loops(module, features, chosen):
    "The sum over scales of h(g(tuple)), tuple by tuple."
    total = 0
    for k in module.scales:
        _, first, _, second = getattr(module, f"scale{k}")
        every = list(itertools.combinations(range(features.shape[1]), k))
        for weight, picked in chosen(every):
            joined = torch.cat([features[:, i] for i in picked], 1)
            hidden = (joined.relu() @ first.weight.T + first.bias).relu()
            total = total + weight * (hidden @ second.weight.T + second.bias)
    return total


@pytest.mark.parametrize("count, tuples", [(2, 3), (4, 3), (5, 1), (5, 99)])
def test_relations_are_the_loop_over_tuples(count, tuples):
    torch.manual_seed(0)
    module, features = Relations(count, 6, 4, hidden=5, tuples=tuples).double(), clips(3, count, 6).double()
    expected = by_loops(module, features, lambda every: [(min(tuples, len(every)) / len(every), one) for one in every])
    torch.testing.assert_close(module.eval()(features), expected)

    def drawn(every):
        order = torch.randperm(len(every))[:tuples] if tuples < len(every) else range(len(every))
        return [(1, every[i]) for i in order]
    torch.manual_seed(3)
    found = module.train()(features)
    torch.manual_seed(3)
    torch.testing.assert_close(found, by_loops(module, features, drawn))


def test_relations_know_the_order_and_have_one_number_of_frames():
    model, x = small("relations").eval(), clips(1, 3, 4, 32, 32)
    torch.testing.assert_close(model(x), model.head(model.reduce(model.features(x))))
    assert not model(x).allclose(model(x.flip(2)), rtol=1e-3)
    with pytest.raises(AttnnasError, match="exactly 4 frames, got 6.*frames=6"): model(clips(1, 3, 6, 32, 32))
    with pytest.raises(AttnnasError, match="2 to 12 frames.*got frames=13"): Relations(13, 4, 5)
    assert not any("tuples" in name for name in model.state_dict())


# StNet

@pytest.mark.parametrize("length, stack", [(6, 3), (8, 3), (5, 1)])
def test_super_images_stack_frames_in_order(length, stack):
    x = clips(2, 3, length, 4, 5)
    y = super_images(x, stack)
    assert y.shape == (2, 3 * stack, length // stack, 4, 5)
    for i, n, c in itertools.product(range(length // stack), range(stack), range(3)):
        assert y[:, n * 3 + c, i].equal(x[:, c, i * stack + n])


def test_temporal_block_is_a_convolution_over_three_frames():
    block, x = temporal_block(4).eval(), clips(2, 4, 5, 2, 3)
    nn.init.normal_(block.norm.running_mean)
    padded, weight = F.pad(x, (0, 0, 0, 0, 1, 1)), block.conv.weight[..., 0, 0]
    y = sum(torch.einsum("bcthw,dc->bdthw", padded[:, :, k:k + 5], weight[:, :, k]) for k in range(3))
    torch.testing.assert_close(block(x), block.norm(y).relu())


def test_temporal_xception_block_by_hand():
    torch.manual_seed(0)
    block, x = TemporalXception(6, 4).eval(), clips(2, 6, 5)
    depth1, point1, norm, _, depth2, point2 = block.body

    def separable(x, depth, point):
        padded = F.pad(x, (1, 1))
        y = sum(padded[:, :, k:k + 5] * depth.weight[:, 0, k, None] for k in range(3)) + depth.bias[:, None]
        return torch.einsum("bct,dc->bdt", y, point.weight[..., 0]) + point.bias[:, None]
    x0 = block.first(x)
    y = separable(norm(separable(x0, depth1, point1)).relu(), depth2, point2)
    shortcut = torch.einsum("bct,dc->bdt", x0, block.shortcut.weight[..., 0]) + block.shortcut.bias[:, None]
    torch.testing.assert_close(block(x), block.last[0](y + shortcut).relu())


def test_stnet_s_shapes_and_answer():
    model, x = StNet(5, "resnet18", (12, 64, 64), stack=3, width=32).eval(), clips(2, 3, 14, 64, 64)
    shapes = site_shapes(model, x.shape)
    assert shapes["trunk.conv1"] == (2, 64, 4, 32, 32) and model.trunk.conv1.module.in_channels == 9
    assert shapes["trunk.layer2_time"] == shapes["trunk.layer2"] == (2, 128, 4, 8, 8)
    assert shapes["trunk.layer3_time"] == shapes["trunk.layer3"] == (2, 256, 4, 4, 4)
    assert list(dict(model.trunk.named_children()))[-5:] == ["layer2", "layer2_time", "layer3", "layer3_time", "layer4"]
    features = model.trunk(super_images(x, 3)).mean((3, 4))
    assert features.shape == (2, 512, 4) and model.xception(features).shape == (2, 32, 4)
    torch.testing.assert_close(model(x), model.head(model.xception(features).max(2).values))
    with pytest.raises(AttnnasError, match="part of resnet18 'layer5'"):
        StNet(5, "resnet18", (10, 64, 64), temporal_after=("layer5",))


# LSTM

@pytest.mark.parametrize("state", ["mean", "last"])
def test_lstm_step_by_step(state):
    model, x = small("lstm", state=state, hidden=8).eval(), clips(2, 3, 4, 32, 32)
    lstm, h, c, answers = model.lstm, torch.zeros(2, 8), torch.zeros(2, 8), []
    for feature in model.features(x).unbind(1):
        gates = feature @ lstm.weight_ih_l0.T + lstm.bias_ih_l0 + h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
        i, f, g, o = gates.chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        answers.append(model.head(h))
    torch.testing.assert_close(model(x), sum(answers) / 4 if state == "mean" else answers[-1])
    with pytest.raises(AttnnasError, match="Unknown state 'first'"): small("lstm", state="first")


# Two streams

@pytest.mark.parametrize("weight", [1.0, 1.5])
def test_two_streams_by_hand(weight):
    torch.manual_seed(0)
    model, x = frames.two_stream(5, "resnet18", stack=5, flow_weight=weight).eval(), clips(2, 5, 17, 32, 32)
    rgb = model.rgb(torch.stack([x[:, :3, t] for t in (2, 7, 12)], 2))
    stacks = torch.stack([torch.cat([x[:, 3:, t] for t in range(first, first + 5)], 1) for first in (0, 5, 10)], 2)
    assert stacks.shape[1] == 10 == model.flow.trunk.conv1.module.in_channels
    flow = model.flow.head(model.flow.trunk(stacks).mean((3, 4)).transpose(1, 2)).mean(1)
    found = model.stream_scores(x)
    torch.testing.assert_close(found, (rgb, flow))
    torch.testing.assert_close(model(x), (rgb + weight * flow) / (1 + weight))
    assert model(x).equal(model.fuse(*found)) and model.example_shape == (1, 5, 125, 224, 224)


def test_two_streams_of_any_backbones():
    from attnnas.networks.inception import i3d_small
    model = TwoStream(i3d_small(5), i3d_small(5, in_channels=2), flow_weight=3).eval()
    x = clips(2, 5, 8, 24, 24)
    torch.testing.assert_close(model(x), (model.rgb(x[:, :3]) + 3 * model.flow(x[:, 3:])) / 4)
    assert model.example_shape == (1, 5, 16, 32, 32)
    assert model.default_sites == ("rgb.MaxPool3d_4a_3x3", "rgb.Mixed_4b", "flow.MaxPool3d_4a_3x3", "flow.Mixed_4b")
    relations = frames.trn_multiscale(5, "resnet18", frames=3, in_channels=2, stack=4)
    uneven = TwoStream(FrameAverage(5, "resnet18", (8, 64, 64)), relations, every=4)
    assert uneven.smallest == (12, 1, 1) and uneven.eval()(clips(1, 5, 13, 32, 32)).shape == (1, 5)


# What they cost

def counted(model, shape):
    "(2 x multiply-adds, additions of biases) from the weights' shapes and the outputs that hooks see."
    multiply_adds, additions, model = [], [], model.eval()

    def see(module, args, output):
        if isinstance(module, nn.LSTM):
            steps = output[0].shape[0] * output[0].shape[1]
            multiply_adds.append(steps * 4 * module.hidden_size * (module.input_size + module.hidden_size))
        else:
            multiply_adds.append(output.numel() * module.weight[0].numel())
            additions.append(output.numel() if module.bias is not None else 0)
    hooks = [module.register_forward_hook(see) for module in model.modules()
             if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.LSTM))]
    with torch.no_grad(): model(torch.empty(shape, device=next(model.parameters()).device))
    for hook in hooks: hook.remove()
    return 2 * sum(multiply_adds), sum(additions)


@every_case
def test_cost_by_a_second_count(case):
    with torch.device("meta"): model = small(case)
    shape = (2, model.in_channels, max(4, model.smallest[0]), 64, 48)
    assert count_flops(model, shape) == counted(model, shape)[0] > 0


def test_cost_in_closed_form():
    image = 4_089_184_256  # multiply-adds of ResNet-50 and 1000 classes on one image of 224 x 224
    with torch.device("meta"): average, lstm = frames.tsn_r50(1000), frames.cnn_lstm(1000)
    assert count_flops(average, average.example_shape) == 2 * 25 * image
    steps = 4 * 256 * (2048 + 256) + 256 * 1000
    assert count_flops(lstm, lstm.example_shape) == 2 * 16 * (image - 2048 * 1000 + steps)
    relations = Relations(5, 6, 4, hidden=7)
    tuples = {2: 10, 3: 10, 4: 5, 5: 1}
    assert count_flops(relations, (1, 5, 6)) == 2 * sum(n * (k * 6 * 7 + 7 * 4) for k, n in tuples.items())


@pytest.mark.parametrize("name, published", [("tsn_irv2", 411), ("stnet_irv2", 440)])
def test_published_cost_is_multiply_adds_and_biases_once(name, published):
    with torch.device("meta"): model = getattr(frames, name)(600)
    assert all(model.get_submodule(site) is not None for site in model.default_sites) and model.smallest[1:] == (75, 75)
    doubled, additions = counted(model, model.example_shape)
    assert round((doubled / 2 + additions) / 1e9) == published != round(doubled / 1e9)


# Attention between the layers

@every_case
@pytest.mark.parametrize("what", [SPEC, NonLocalBlock], ids=["cell", "non-local"])
def test_a_new_cell_changes_no_bit(case, what):
    plain, model = small(case), small(case)
    before, x = tree(model), clip_for(model)
    insert(model, what)
    assert list(inserted(model)) == list(model.default_sites)
    for training, batch in itertools.product((True, False), (1, 2)):
        assert seeded(model.train(training), x[:batch]).equal(seeded(plain.train(training), x[:batch]))
    assert not seeded(awake(model), x).equal(seeded(plain, x))
    assert tree(remove(model)) == before


def test_a_cell_lets_frames_see_each_other():
    def seen(model):
        x = clips(1, 3, 4, 32, 32).requires_grad_()
        model.eval().frame_scores(x)[:, 0].sum().backward()
        return [bool(x.grad[:, :, t].any()) for t in range(4)]
    assert seen(small("average")) == [True, False, False, False]
    assert seen(awake(insert(small("average"), SPEC))) == [True] * 4
    assert seen(small("average", backbone="mobilenetv2_050")) == [True, False, False, False]


def test_blocks_inside_a_stage_are_sites():
    model, plain, x = small("average"), small("average"), clips(2, 3, 4, 32, 32)
    insert(model, NonLocalBlock, ["trunk.layer3.0", "trunk.conv1"])
    assert model(x).equal(plain(x)) and inserted(model)["trunk.layer3.0"].channels == 256


@every_case
def test_state_dict_round_trip(case):
    model, other = (insert(small(case, seed=seed), SPEC) for seed in (0, 1))
    x = clip_for(model)
    seeded(awake(model), x)  # moves the running statistics
    assert not seeded(model.eval(), x).equal(seeded(other.eval(), x))
    other.load_state_dict(model.state_dict())
    assert seeded(model, x).equal(seeded(other, x))


class Residual(nn.Module):
    "x + a 3x3 convolution that starts at zero."
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        for tensor in self.conv.parameters(): nn.init.zeros_(tensor)

    def forward(self, x): return x + self.conv(x)


def test_mobilenet_takes_a_module_for_images():
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_100", num_classes=5)
    before, x, sites = tree(model), clips(2, 3, 64, 64), ["blocks.2", "blocks.4", "blocks.6"]
    scores = {training: model.train(training)(x) for training in (False, True)}
    model.load_state_dict(state := {name: tensor.clone() for name, tensor in model.state_dict().items()})
    fresh = timm.create_model("mobilenetv2_100", num_classes=5)
    fresh.load_state_dict(state)
    insert(model, Residual, sites, example=(1, 3, 64, 64))
    assert [module.conv.in_channels for module in inserted(model).values()] == [32, 96, 320]
    for training in (True, False): assert model.train(training)(x).equal(fresh.train(training)(x))
    for module in inserted(model).values(): nn.init.ones_(module.conv.bias)
    assert not model(x).equal(fresh(x)) and scores[True].equal(fresh.train()(x))
    assert tree(remove(model)) == before
    with pytest.raises(AttnnasError, match="takes.*B, C, T, H, W"):
        insert(model, SPEC, "blocks.2", example=(1, 3, 64, 64))
