"""Published weights: local files of each published layout, made by the libraries that publish them, give their scores."""
import re
from unittest.mock import patch

import pytest
import torch
from torch import nn

pytest.importorskip("pytorchvideo")
pytest.importorskip("torchvision")
from pytorchvideo.models import hub
from pytorchvideo.models.hub import r2plus1d, resnet, slowfast, vision_transformers
from torchvision.models import video
from torchvision.models.video import mvit as torchvision_mvit
from torchvision.transforms._presets import VideoClassification

import attnnas as an
from attnnas.core.errors import AttnnasError
from attnnas.networks import pretrained
from attnnas.networks.inception import same_padding
from attnnas.networks.pretrained import PRETRAINED, TIMM, load_pretrained, published_options
from attnnas.networks.registry import MODULES, create_model


def settled(network, seed=0):
    "A network in evaluation mode whose every number is drawn, so that no two layers can be exchanged unseen."
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith("running_var"): tensor.uniform_(.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            spread = .1 if tensor.ndim < 2 else (2 / tensor[0].numel()) ** .5
            tensor.normal_(1 if name.endswith("weight") and tensor.ndim == 1 else 0, spread, generator=generator)
    return network.eval()


def saved(network, path, key="model_state"):
    state = network.state_dict()
    torch.save({key: state} if key else state, path)
    return path


def clip(*shape): return torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check_scores(ours, theirs, x, their_x=None, rtol=1e-4):
    expected = theirs(x if their_x is None else their_x)
    found = ours.eval()(x)
    assert found.shape == expected.shape and found.std() > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * expected.abs().max().item())


def check_report(model, classes_fit=True):
    report = model.load_report
    assert not report.missing and not report.unexpected and (report.fraction == 1) == classes_fit
    assert set(report.other_shape) == (set() if classes_fit else {f"{model.class_layers[0]}.{part}" for part in ("weight", "bias")})


def test_i3d_r50_of_pytorchvideo_gives_their_scores(tmp_path):
    theirs = settled(hub.i3d_r50(pretrained=False, stem_dim_out=8, head_pool_kernel_size=(2, 2, 2)))
    file = saved(theirs, tmp_path / "I3D_8x8_R50.pyth")
    ours = create_model("i3d_r50", 400, pretrained=file, width=8)
    assert ours.made_by["options"] == {"width": 8, "layout": "pytorchvideo"}
    check_report(ours)
    check_scores(ours, theirs, clip(4, 64, 64))
    again = create_model(**{**ours.made_by["options"], "name": "i3d_r50", "num_classes": 400})
    again.load_state_dict(ours.state_dict())
    check_scores(again, theirs, clip(4, 64, 64))


def test_slowfast_r50_of_pytorchvideo_gives_their_scores(tmp_path):
    pools = ((2, 2, 2), (8, 2, 2))
    theirs = settled(hub.slowfast_r50(pretrained=False, stem_dim_outs=(16, 2), head_pool_kernel_sizes=pools))
    ours = create_model("slowfast_r50", 400, pretrained=saved(theirs, tmp_path / "slowfast.pyth"), width=16)
    check_report(ours)
    x = clip(8, 64, 64)
    check_scores(ours, theirs, x, [x[:, :, ::4], x])


def test_r2plus1d_r50_of_pytorchvideo_gives_their_scores(tmp_path):
    theirs = hub.r2plus1d_r50(pretrained=False, stem_dim_out=8, head_pool_kernel_size=(1, 2, 2), head_activation=None)
    ours = create_model("r2plus1d_r50", 400, pretrained=saved(settled(theirs), tmp_path / "r2.pyth"), width=8)
    check_report(ours)
    check_scores(ours, theirs, clip(4, 64, 64))


def small_mvit(build):
    "torchvision's mvit_v1_b for clips of 4 x 32 x 32, with the blocks that it itself sets."
    make = torchvision_mvit._mvit

    def smaller(**options): return make(**options | {"spatial_size": (32, 32), "temporal_size": 4})
    with patch.object(torchvision_mvit, "_mvit", smaller): return build(weights=None)


@pytest.mark.parametrize("library", ["pytorchvideo", "torchvision"])
def test_mvit_of_either_library_gives_its_scores(library, tmp_path):
    if library == "torchvision": theirs = small_mvit(video.mvit_v1_b)
    else: theirs = hub.mvit_base_16x4(pretrained=False, spatial_size=32, temporal_size=4)
    file = saved(settled(theirs), tmp_path / "mvit.pyth", "model_state" if library == "pytorchvideo" else None)
    ours = create_model("mvit_b", 400, pretrained=file, frames=4, size=32)
    check_report(ours)
    check_scores(ours, theirs, clip(4, 32, 32))


def test_s3d_of_torchvision_gives_its_scores(tmp_path):
    theirs = settled(video.s3d(weights=None))
    theirs.avgpool = nn.AdaptiveAvgPool3d(1)  # theirs is for clips of 224 x 224
    ours = create_model("s3d", 400, pretrained=saved(theirs, tmp_path / "s3d.pth", None))
    assert ours.made_by["options"] == {"separable_stem": True, "padding": "symmetric"}
    check_report(ours)
    check_scores(ours, theirs, clip(16, 64, 64))
    video_bytes = torch.randint(0, 256, (16, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    theirs_input = VideoClassification(crop_size=(64, 64), resize_size=(64, 64))(video_bytes)
    with torch.no_grad(): expected = theirs(theirs_input[None])[0]
    found, = an.predict(ours, video_bytes.transpose(0, 1), device="cpu")
    torch.testing.assert_close(found.scores, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


class Unit(nn.Module):
    "A layer of the published I3D: SAME padding by hand, convolution, batch norm, ReLU."
    def __init__(self, channels, width, kernel, stride=(1, 1, 1), last=False):
        super().__init__()
        self.conv3d = nn.Conv3d(channels, width, kernel, stride, bias=last)
        if not last: self.bn = nn.BatchNorm3d(width, eps=1e-3)

    def forward(self, x):
        x = self.conv3d(padded(x, self.conv3d.kernel_size, self.conv3d.stride))
        return self.bn(x).relu() if hasattr(self, "bn") else x


def padded(x, kernel, stride):
    pads = [same_padding(*axis) for axis in zip(x.shape[2:], kernel, stride)]
    return nn.functional.pad(x, [side for pad in reversed(pads) for side in pad])


class Pool(nn.Module):
    def __init__(self, kernel, stride):
        super().__init__()
        self.sizes = kernel, stride

    def forward(self, x): return nn.functional.max_pool3d(padded(x, *self.sizes), *self.sizes)


class Block(nn.Module):
    def __init__(self, channels, widths):
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0, self.b1a, self.b1b = Unit(channels, b0, 1), Unit(channels, b1a, 1), Unit(b1a, b1b, 3)
        self.b2a, self.b2b = Unit(channels, b2a, 1), Unit(b2a, b2b, 3)
        self.b3a, self.b3b = Pool((3, 3, 3), (1, 1, 1)), Unit(channels, b3b, 1)

    def forward(self, x):
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(self.b3a(x))], 1)


class PublishedI3D(nn.Module):
    "The layout of rgb_imagenet.pt, from the paper's figure 3; zeros as padding of its pools, as published."
    plan = {"Conv3d_1a_7x7": (64, 7, (2, 2, 2)), "MaxPool3d_2a_3x3": ((1, 3, 3), (1, 2, 2)), "Conv3d_2b_1x1": (64, 1, (1, 1, 1)),
            "Conv3d_2c_3x3": (192, 3, (1, 1, 1)), "MaxPool3d_3a_3x3": ((1, 3, 3), (1, 2, 2)), "Mixed_3b": (64, 96, 128, 16, 32, 32),
            "Mixed_3c": (128, 128, 192, 32, 96, 64), "MaxPool3d_4a_3x3": ((3, 3, 3), (2, 2, 2)),
            "Mixed_4b": (192, 96, 208, 16, 48, 64), "Mixed_4c": (160, 112, 224, 24, 64, 64), "Mixed_4d": (128, 128, 256, 24, 64, 64),
            "Mixed_4e": (112, 144, 288, 32, 64, 64), "Mixed_4f": (256, 160, 320, 32, 128, 128),
            "MaxPool3d_5a_2x2": ((2, 2, 2), (2, 2, 2)), "Mixed_5b": (256, 160, 320, 32, 128, 128),
            "Mixed_5c": (384, 192, 384, 48, 128, 128)}

    def __init__(self):
        super().__init__()
        channels = 3
        for name, numbers in self.plan.items():
            if name.startswith("MaxPool"): self.add_module(name, Pool(*numbers))
            elif name.startswith("Mixed"): self.add_module(name, Block(channels, numbers))
            else: self.add_module(name, Unit(channels, *numbers))
            if name.startswith("Mixed"): channels = numbers[0] + numbers[2] + numbers[4] + numbers[5]
            elif name.startswith("Conv"): channels = numbers[0]
        self.logits = Unit(channels, 400, 1, last=True)

    def forward(self, x):
        for name in self.plan: x = getattr(self, name)(x)
        return self.logits(x.mean((2, 3, 4), keepdim=True)).flatten(1)


def test_i3d_of_the_published_layout_gives_its_scores(tmp_path):
    theirs = settled(PublishedI3D())
    ours = create_model("i3d", 400, pretrained=saved(theirs, tmp_path / "rgb_imagenet.pt", None))
    assert ours.preprocessing == {"mean": [.5, .5, .5], "std": [.5, .5, .5]}
    check_report(ours)
    check_scores(ours, theirs, clip(9, 37, 45))


@pytest.mark.parametrize("name, options", [("r50_frames", {}), ("two_stream", {"stack": 2})])
def test_image_networks_start_from_timm_s_file(name, options, tmp_path):
    timm = pytest.importorskip("timm")
    theirs = settled(timm.create_model("resnet10t", num_classes=1000))
    file = saved(theirs, tmp_path / "resnet10t.pth", "state_dict")
    model = create_model(name, 5, pretrained=file, backbone="resnet10t", **options).eval()
    assert not model.load_report.other_shape and all("trunk." in part for part in model.load_report.matched)
    assert all("head" in part for part in model.load_report.missing)
    image = clip(1, 64, 64)
    rgb = getattr(model, "rgb", model)
    with torch.no_grad(): torch.testing.assert_close(rgb.features(image)[0], theirs.forward_features(image[:, :, 0]).mean((2, 3)))
    (tmp_path / "other.pth").write_bytes((tmp_path / "resnet10t.pth").read_bytes())
    with pytest.raises(AttnnasError, match="other.pth does not fit timm's resnet14t"):
        create_model(name, 5, pretrained=tmp_path / "other.pth", backbone="resnet14t", **options)


def test_other_classes_keep_their_head_and_the_cells_come_after(tmp_path):
    theirs = settled(hub.i3d_r50(pretrained=False, stem_dim_out=8))
    model = create_model("i3d_r50", 3, pretrained=saved(theirs, tmp_path / "a.pyth"), width=8)
    check_report(model, classes_fit=False)
    assert model.stem.conv.weight.equal(theirs.blocks[0].conv.weight) and model.head.out_features == 3
    assert "of another shape: head.weight (3, 256) here, (400, 256) in the file" in str(model.load_report)


# What must not be loaded

def test_a_layout_that_computes_something_else_is_refused_although_all_shapes_fit(tmp_path):
    "If this fails, weights land silently in a network that pools where theirs does not."
    pooled = saved(hub.i3d_r50(pretrained=False, stem_dim_out=8), tmp_path / "pooled.pyth")
    ours = create_model("i3d_r50", 400, width=8)
    before = ours.stem.conv.weight.clone()
    with pytest.raises(AttnnasError, match="halves the frames behind res2, and this network keeps all frames"):
        load_pretrained(ours, "i3d_r50", pooled)
    assert ours.stem.conv.weight.equal(before)
    slow = saved(hub.slow_r50(pretrained=False, stem_dim_out=8), tmp_path / "slow.pyth")
    with pytest.raises(AttnnasError, match="keeps all frames, and this network halves"):
        create_model("i3d_r50", 400, pretrained=slow, width=8)
    with pytest.raises(AttnnasError, match="slow.pyth does not fit ResNetVideo; nothing was loaded"):
        load_pretrained(ours, "i3d_r50", slow)


@pytest.mark.parametrize("name, options, told", [
    ("c3d", {}, "Nobody's weights are known for 'c3d'; they are for cnn_lstm, i3d"),
    ("i3d_r50", {"layout": "talk"}, "belong to layout='pytorchvideo', got 'talk'"),
    ("s3d", {"separable_stem": False}, "belong to separable_stem=True, got False")])
def test_a_contradiction_is_refused_before_anything_is_made(name, options, told):
    with pytest.raises(AttnnasError, match=told): create_model(name, 5, pretrained=True, **options)


def test_without_a_network_the_message_names_the_url_and_the_local_file(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def nowhere(*_, **__): raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", nowhere)
    for name, options in (("i3d_r50", {"width": 4}), ("s3d", {"width_multiplier": .1})):
        url = PRETRAINED[name].url
        with pytest.raises(AttnnasError) as caught: create_model(name, 5, pretrained=True, **options)
        told = str(caught.value)
        assert f"Could not fetch {url}: no network" in told and 'give pretrained="file"' in told and "\n" not in told
        assert str(tmp_path / "checkpoints" / url.rpartition("/")[2]) in told


def test_timm_without_a_network_is_one_line(monkeypatch):
    timm = pytest.importorskip("timm")
    make = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained: raise OSError("no network\nand much more")
        return make(name, **options)
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(AttnnasError, match=r'resnet10t from https://huggingface.co/timm/resnet10t\S*: no network. .*pretrained="file"') as caught:
        create_model("r50_frames", 5, pretrained=True, backbone="resnet10t")
    assert "\n" not in str(caught.value)


def test_a_fetched_file_is_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    theirs = settled(hub.i3d_r50(pretrained=False, stem_dim_out=8))
    seen = []

    def download(url, path, hash_prefix=None):
        seen.append((url, hash_prefix))
        saved(theirs, path)
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for _ in range(2): model = create_model("i3d_r50", 400, pretrained=True, width=8)
    assert seen == [(PRETRAINED["i3d_r50"].url, None)] and model.load_report.fraction == 1
    assert "pretrained" not in model.made_by["options"]


# The table

def test_urls_are_the_ones_that_the_libraries_fetch():
    "If this fails, a library publishes its weights elsewhere now, or the table has a slip."
    expected = {"i3d_r50": resnet.checkpoint_paths["i3d_r50"], "slowfast_r50": slowfast.checkpoint_paths["slowfast_r50"],
                "r2plus1d_r50": r2plus1d.checkpoint_paths["r2plus1d_r50"],
                "mvit_b": vision_transformers.checkpoint_paths["mvit_base_16x4"], "s3d": video.S3D_Weights.DEFAULT.url}
    assert {name: PRETRAINED[name].url for name in expected} == expected
    transforms = video.S3D_Weights.DEFAULT.transforms()
    assert (PRETRAINED["s3d"].mean, PRETRAINED["s3d"].std) == (tuple(transforms.mean), tuple(transforms.std))


def test_models_of_frames_are_those_of_the_registry():
    assert set(TIMM) == set(MODULES["networks.frames"])
    assert published_options("tsn_r50", {"stack": 1}) == {"stack": 1}


def test_full_size_shapes_are_the_published_ones():
    "If this fails, a published file does not fit, although the narrow ones of these tests do."
    builds = {"i3d_r50": hub.i3d_r50, "slowfast_r50": hub.slowfast_r50, "r2plus1d_r50": hub.r2plus1d_r50}
    with torch.device("meta"):
        for name, build in builds.items():
            model = create_model(name, 400, **PRETRAINED[name].options)
            tensors = build(pretrained=False).state_dict()
            _, rename = pretrained._from_pytorchvideo(model, tensors)
            pattern = re.compile("|".join(sorted(map(re.escape, rename), key=len, reverse=True)))
            shapes = {pattern.sub(lambda part: rename[part[0]], name, count=1): t.shape for name, t in tensors.items()}
            assert shapes == {name: t.shape for name, t in model.state_dict().items()}
