"""Weights: files good and bad, names, inflation, and torchvision's networks as oracles."""
import copy
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import nn

from attnnas.networks.inception import FULL, same_padding
from attnnas.networks.registry import create_model
from attnnas.networks.frames import PerFrame
from attnnas.networks.weights import (class_layers, imagenet_weights, inflate, inflate_kernel, load_weights,
                                      read_weights, save_weights, torchvision_s3d)
from attnnas.core.errors import AttnnasError
from attnnas.core.seeds import generator
from attnnas.cells.fused import FusedSupergraph
from attnnas.networks.insertion import insert
from attnnas.cells.spec import CellSpec, OperationSpec
from attnnas.cells.supergraph import ConnectionWeights

ROOT = Path(__file__).resolve().parents[1]


def randn(*shape, **options): return torch.randn(shape, generator=generator("weights", *shape), **options)


def small(classes=5, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(),
                         nn.Linear(4, classes))


def snapshot(model): return {name: t.clone() for name, t in model.state_dict().items()}


def same(model, tensors): return all(t.equal(tensors[name]) for name, t in model.state_dict().items())


def settled(network, x):
    "The network with the batch statistics of x, so that features neither die nor explode; in evaluation mode."
    for child in network.modules():
        if isinstance(child, (nn.BatchNorm2d, nn.BatchNorm3d)): child.momentum = 1.0
        if isinstance(child, nn.Dropout): child.p = 0.0
    with torch.no_grad(): network.train()(x)
    return network.eval()


def still(image, frames): return image.unsqueeze(2).expand(-1, -1, frames, -1, -1)


# Files

@pytest.mark.parametrize("write", [
    lambda state, path: save_weights(small(), path),
    lambda state, path: torch.save(state, path),
    lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    lambda state, path: torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1, "betas": (0, 1)}}, path),
    lambda state, path: torch.save({f"module.{name}": t for name, t in state.items()}, path),
    lambda state, path: torch.save({"model": {f"module._orig_mod.{name}": t for name, t in state.items()}}, path),
], ids=["safetensors", "torch", "legacy", "nested", "parallel", "compiled"])
def test_a_file_is_known_by_its_contents(write, tmp_path):
    state = small().state_dict()
    write(state, tmp_path / "weights.any")
    found = read_weights(tmp_path / "weights.any")
    assert set(found) == set(state) and all(found[name].equal(t) for name, t in state.items())


class Trap:
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return os.mkdir, (self.path,)


@pytest.mark.parametrize("write", [
    lambda trap, path: torch.save({"weight": torch.ones(2), "more": trap}, path),
    lambda trap, path: torch.save({"weight": torch.ones(2), "more": trap}, path, _use_new_zipfile_serialization=False),
    lambda trap, path: path.write_bytes(pickle.dumps(trap, 2)),
    lambda trap, path: torch.save(small(), path),
], ids=["torch", "legacy", "pickle", "module"])
def test_code_in_a_file_is_refused_and_not_run(write, tmp_path):
    write(Trap(tmp_path / "sprung"), tmp_path / "trap.pth")
    with pytest.raises(AttnnasError, match=r"trap.pth holds code or objects( \(\S+\))? besides tensors.*state_dict"):
        load_weights(small(), tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pickle.dumps(Trap(tmp_path / "sprung")))
    assert (tmp_path / "sprung").exists()  # the trap works


@pytest.mark.parametrize("content, told", [
    (None, "Could not read weights from .*: No such file"), (b"", "neither a safetensors nor a torch file"),
    (b"version https://git-lfs", "neither a safetensors nor a torch file: it starts with b'version h'"),
    (b"PK\x03\x04 and nothing", "damaged, or no torch file"),
    (b"\x40" + bytes(7) + b"{no header", "damaged safetensors"),
    ([1, 2], "holds no state dict, or several: a list"), ({"lr": 0.1}, "holds no state dict, or several: lr"),
    ({"model": {"a": torch.ones(1)}, "average": {"a": torch.ones(1)}}, "or several: model, average"),
])
def test_other_files_are_told_apart(content, told, tmp_path):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes): path.write_bytes(content)
    elif content is not None: torch.save(content, path)
    with pytest.raises(AttnnasError, match=told): read_weights(path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(AttnnasError, match="Is a directory"): read_weights(tmp_path)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy"])
def test_damage_is_an_error_and_never_a_half_loaded_network(kind, tmp_path):
    "A flipped number is a number and cannot be seen; whatever can be is an AttnnasError."
    model, path, draw = small(seed=1), tmp_path / "file", generator("damage", kind)
    if kind == "safetensors": save_weights(small(), path)
    else: torch.save(small().state_dict(), path, _use_new_zipfile_serialization=kind == "torch")
    whole, before, refused = path.read_bytes(), snapshot(model), 0
    for i in range(60):
        place = int(torch.randint(len(whole), (), generator=draw))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << i % 8
        path.write_bytes(whole[:place] if i % 2 else bytes(flipped))
        try:
            with warnings.catch_warnings(action="ignore"): load_weights(model, path)
        except AttnnasError:
            refused += 1
            assert same(model, before)
        model.load_state_dict(before)
    assert refused > 30  # all that were cut off, and some that were flipped


def test_saving_replaces_a_file_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "there" / "weights.safetensors"
    save_weights(small(seed=1), path)
    monkeypatch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(AttnnasError, match="No space left"): save_weights(small(seed=2), path)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    assert load_weights(model := small(seed=3), path).fraction == 1 and same(model, small(seed=1).state_dict())


def test_shared_half_precision_and_strided_tensors_survive(tmp_path):
    new = lambda seed: FusedSupergraph(6, 4, 2, connections=ConnectionWeights(2, 6, activations="mixture"),
                                       activations="mixture").requires_grad_(seed == 0)
    model = new(0)
    for p in model.parameters(): nn.init.normal_(p) if p.numel() else p
    save_weights(model, tmp_path / "graph")
    assert load_weights(other := new(1), tmp_path / "graph").fraction == 1 and same(other, model.state_dict())
    half = small().half().to(memory_format=torch.channels_last_3d)
    save_weights(half, tmp_path / "half")
    load_weights(model := small(seed=1), tmp_path / "half")
    assert model[0].weight.dtype == torch.float32 and model[0].weight.equal(half[0].weight.float())


# Fitting

def without(name): return {key: t for key, t in small().state_dict().items() if key != name}


@pytest.mark.parametrize("state, options, told", [
    (without("0.bias"), {}, r"missing in the file: 0.bias\nPass rename="),
    (without("0.bias"), {"other_classes": True}, "missing in the file: 0.bias"),
    ({**small().state_dict(), "extra": torch.ones(1)}, {}, "unexpected in the file: extra"),
    ({**small().state_dict(), "0.weight": torch.ones(4, 3, 1, 3, 3)}, {"other_classes": True},
     r"0.weight \(4, 3, 3, 3, 3\) here, \(4, 3, 1, 3, 3\) in the file"),
    (small(7).state_dict(), {}, r"5.weight \(5, 4\) here, \(7, 4\) in the file(.|\n)*Pass other_classes=True to keep"),
    ({"a.weight": torch.ones(2)}, {"strict": False},
     "Nothing in this state dict matches Sequential.*a.weight; here they are 0.weight"),
    ({"a": torch.ones(2), "b": torch.ones(2)}, {"rename": lambda name: "0.bias"}, "several tensors .* name '0.bias'"),
    ({"a": 3}, {}, "Expected a file, a module or a state dict"),
])
def test_what_does_not_fit_is_told_and_nothing_is_loaded(state, options, told):
    model = small(seed=1)
    before = snapshot(model)
    with pytest.raises(AttnnasError, match=told): load_weights(model, state, **options)
    assert same(model, before)


def test_the_report_counts_parameters():
    model, trained = small(5, seed=1), small(7)
    before = snapshot(model)
    report = load_weights(model, trained, other_classes=True)
    assert report.other_shape == {"5.weight": ((5, 4), (7, 4)), "5.bias": ((5,), (7,))}
    assert (report.missing, report.unexpected, report.made) == ((), (), ())
    loaded, total = 4 * 3 * 27 + 4 + 4 + 4, sum(p.numel() for p in model.parameters())
    assert report.fraction == pytest.approx(loaded / total) and f"{loaded / total:.2%} of the parameters" in str(report)
    assert model[5].weight.equal(before["5.weight"]) and model[0].weight.equal(trained[0].weight)
    assert model[1].running_mean.equal(trained[1].running_mean)


def test_not_strict_loads_what_matches():
    model = small(seed=1)
    state = {**without("0.weight"), "more": torch.ones(1), "5.bias": torch.ones(9)}
    before = snapshot(model)
    report = load_weights(model, state, strict=False)
    assert (report.missing, report.unexpected, list(report.other_shape)) == (("0.weight",), ("more",), ["5.bias"])
    assert model[5].weight.equal(state["5.weight"]) and model[0].weight.equal(before["0.weight"])


def test_a_counter_of_batches_may_be_missing_and_a_headless_file_is_allowed_on_request():
    assert load_weights(small(seed=1), without("1.num_batches_tracked")).missing == ()
    headless = {name: t for name, t in small().state_dict().items() if not name.startswith("5")}
    with pytest.raises(AttnnasError, match="other_classes=True"): load_weights(small(seed=1), headless)
    assert load_weights(small(seed=1), headless, other_classes=True).missing == ("5.weight", "5.bias")


@pytest.mark.parametrize("rename", [
    {"backbone.stem": "0", "norm": "1", "backbone.top.fc": "5", "aux": None},
    lambda name: {"stem": "0", "norm": "1", "fc": "5"}.get(name.split(".")[-2], None) and
        f"{ {'stem': 0, 'norm': 1, 'fc': 5}[name.split('.')[-2]]}.{name.split('.')[-1]}",
], ids=["dictionary", "function"])
def test_renaming(rename):
    theirs = {"0": "backbone.stem", "1": "norm", "5": "backbone.top.fc"}
    state = {f"{theirs[name[0]]}{name[1:]}": t for name, t in small().state_dict().items()}
    state["aux.deep.weight"] = torch.ones(3)
    report = load_weights(model := small(seed=1), state, rename)
    assert report.fraction == 1 and report.unexpected == () and same(model, small().state_dict())


def test_a_prefix_can_be_taken_off_and_the_longest_name_wins():
    state = {f"net.{name}": t for name, t in small().state_dict().items()} | {"net.5.bias.old": torch.ones(1)}
    assert load_weights(small(seed=1), state, {"net": "", "net.5.bias.old": None}).fraction == 1


def test_cells_come_after_weights():
    spec = CellSpec((OperationSpec("temporal", "dot-product", "softmax"),), inputs=((0,),), width=8)
    plain = create_model("i3d_small", 5)
    with pytest.raises(AttnnasError, match="missing in the file: Mixed_4b.original"):
        load_weights(insert(create_model("i3d_small", 5), spec, "Mixed_4b"), plain)


# torchvision's S3D

def test_torchvision_s3d_gives_the_same_scores():
    "At 13 x 209 x 209 SAME padding is symmetric in every layer, as torchvision's always is."
    video = pytest.importorskip("torchvision.models.video")
    torch.manual_seed(0)
    theirs, ours = video.s3d(weights=None, num_classes=400), create_model("s3d", 400, separable_stem=True)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters()) == 8_320_048
    x = randn(1, 3, 13, 209, 209)
    settled(theirs, x)
    report = load_weights(ours, theirs, rename=torchvision_s3d(ours))
    assert report.fraction == 1 and not (report.missing or report.unexpected)
    with torch.no_grad(): expected, scores = theirs(x), ours.eval()(x)
    assert expected.std() > 0.1 and (scores - expected).abs().max() < 1e-4


# Inflation

@pytest.fixture(scope="module")
def images(): return randn(8, 3, 63, 63)


@pytest.fixture(scope="module")
def google(images):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    return settled(models.googlenet(weights=None, num_classes=50, aux_logits=True, init_weights=False), images).double()


def close(scores, expected):
    "Equal, but for the rounding of double precision."
    assert expected.dtype == torch.float64 and expected.std() > 0.01
    assert (scores - expected).abs().max() < 1e-10 * expected.abs().max()


@pytest.mark.parametrize("mode", ["mean", "centre"])
@pytest.mark.parametrize("t", [1, 2, 3, 5, 7])
def test_an_inflated_filter_sees_a_still_clip_as_an_image(mode, t):
    kernel, image = randn(4, 3, 3, 3).double(), randn(2, 3, 9, 8).double()
    inflated = inflate_kernel(kernel, t, mode)
    assert inflated.shape == (4, 3, t, 3, 3)
    interior = F.conv3d(still(image, t + 4), inflated)
    torch.testing.assert_close(interior, still(F.conv2d(image, kernel), 5))


@pytest.mark.parametrize("name, options", [("i3d", {}), ("s3d", {}), ("s3d", {"separable_stem": True})])
def test_centre_gives_the_image_network_s_scores_at_every_length(name, options, google):
    model = create_model(name, 50, **options).double()
    report = inflate(model, google, "centre")
    assert not report.missing and not report.other_shape and all(n.startswith("aux") for n in report.unexpected)
    assert (report.fraction == 1) == (name == "i3d") and all(".time." in n for n in report.made)
    image = randn(2, 3, 31, 47).double()  # 16 i - 1: where both ways of padding agree
    with torch.no_grad():
        expected = google(image)
        for frames in (1, 2, 5): close(model.eval()(still(image, frames)), expected)


def test_centre_at_even_sizes_needs_same_padding_in_the_stem_alone(google):
    "At multiples of 32, 224 among them, torchvision's poolings are SAME; its stem is shifted by a pixel."
    model, shifted = create_model("i3d", 50).double(), copy.deepcopy(google)
    inflate(model, google, "centre")
    image = randn(1, 3, 64, 64).double()
    shifted.conv1.conv.padding = (0, 0)
    with torch.no_grad():
        scores = model.eval()(still(image, 6))
        close(scores, shifted(F.pad(image, [*same_padding(64, 7, 2)] * 2)))
        assert (scores - google(image)).abs().max() > 1e-3


def exact_frames(frames: int) -> dict:
    "Layer -> which of its frames only see exact frames inside the clip, by the layers' temporal kernels and strides."
    def window(exact, kernel, stride, padding_counts):
        before, size = same_padding(len(exact), kernel, stride)[0], len(exact)
        taps = [range(o * stride - before, o * stride - before + kernel) for o in range(-(-size // stride))]
        return [all(exact[i] if 0 <= i < size else not padding_counts for i in tap) for tap in taps]
    exact, found = [True] * frames, {}
    for name, numbers in FULL.items():
        if name.startswith("MaxPool"): exact = window(exact, numbers[0][0], numbers[1][0], False)
        elif name.startswith("Mixed"): exact = window(exact, 3, 1, True)
        else: exact = window(exact, numbers[1], numbers[2][0], True)
        found[name] = exact
    return found


@pytest.mark.parametrize("frames", [33, 64])
def test_mean_is_exact_in_the_frames_that_padding_does_not_reach_and_in_no_other(frames, google):
    model = create_model("i3d", 50).double().eval()
    assert inflate(model, google).fraction == 1  # "mean" is the default
    image, seen = randn(1, 3, 31, 31).double(), {}
    for layer in FULL: model.get_submodule(layer).register_forward_hook(
        lambda module, args, output, layer=layer: seen.setdefault(layer, []).append(output))
    with torch.no_grad():
        model(still(image, frames))
        inflate(model, google, "centre")
        model(still(image, 1))
    for layer, expected in exact_frames(frames).items():
        clip, flat = seen[layer]
        difference = (clip - flat).abs().amax((0, 1, 3, 4)) / flat.abs().max()
        assert (difference < 1e-10).tolist() == expected, layer
        assert difference[[not e for e in expected]].min() > 1e-5 if not all(expected) else True


def test_how_many_frames_mean_keeps():
    counts = lambda frames, layer: (sum(exact_frames(frames)[layer]), len(exact_frames(frames)[layer]))
    assert (counts(64, "Mixed_3c"), counts(64, "Mixed_5b"), counts(250, "Mixed_5c")) == ((23, 32), (0, 8), (19, 32))


def test_s3d_s_temporal_layers_start_as_the_identity(google):
    model = create_model("s3d", 50).double()
    inflate(model, google, "mean")
    unit, x = model.Mixed_3b.Branch_1.Conv3d_0b_3x3.time.eval(), randn(1, 128, 1, 4, 4).abs().double()
    with torch.no_grad(): interior = unit(x.expand(-1, -1, 5, -1, -1))[:, :, 1:-1]
    torch.testing.assert_close(interior, x.expand(-1, -1, 3, -1, -1))


def test_flow_starts_from_the_mean_colour(google):
    model = create_model("i3d", 50, in_channels=2).double()
    inflate(model, google, "centre")
    gray = randn(1, 1, 31, 31).double()
    with torch.no_grad():
        expected = google.conv1(gray.expand(-1, 3, -1, -1))  # sums three channels; two give 2/3 of it before the norm
        stem = model.Conv3d_1a_7x7.eval()
        filtered = stem.conv(still(gray.expand(-1, 2, -1, -1), 1)) * 1.5
        torch.testing.assert_close(stem.act(stem.norm(filtered)).squeeze(2), expected)


def layers_of_i3d_r50():
    one, three = (1, 1, 1), (3, 1, 1)
    return dict(stem_conv_kernel_size=(5, 7, 7),
                stage_conv_a_kernel_size=((three,), (three, one), (three, one), (one, three)))


@pytest.fixture(scope="module")
def residual():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    return settled(models.resnet50(weights=None, num_classes=50), randn(8, 3, 64, 64)).double()


@pytest.mark.parametrize("size", [64, 49])  # both networks pad symmetrically: an odd size and an even one
def test_a_residual_network_by_pytorchvideo_s_names(size, residual):
    resnet = pytest.importorskip("pytorchvideo.models.resnet")
    model = resnet.create_resnet(model_num_class=50, head_pool_kernel_size=(4, 2, 2), **layers_of_i3d_r50()).double()
    report = inflate(model, residual, "centre")
    assert report.fraction == 1 and not report.unexpected and not report.made
    image = randn(1, 3, size, size).double()
    with torch.no_grad(): close(model.eval()(still(image, 4)), residual(image))


def test_the_package_s_own_residual_network(residual):
    pytest.importorskip("attnnas.networks.resnet")
    model = create_model("i3d_r50", 50).double()
    report = inflate(model, residual, "centre")
    assert report.fraction == 1 and not report.unexpected
    image = randn(1, 3, 80, 49).double()
    with torch.no_grad(): close(model.eval()(still(image, 3)), residual(image))


def test_a_residual_network_inside_another_and_with_a_pooling_between_its_stages(residual):
    resnet = pytest.importorskip("pytorchvideo.models.resnet")
    pooled = nn.Module()
    pooled.net = resnet.create_resnet(model_num_class=9, stage1_pool=nn.MaxPool3d, **layers_of_i3d_r50()).double()
    report = inflate(pooled, residual, "mean")
    assert list(report.other_shape) == ["net.blocks.6.proj.weight", "net.blocks.6.proj.bias"] and not report.missing
    blocks = pooled.net.blocks
    for ours, theirs, t in ((blocks[0].conv, residual.conv1, 5),
                            (blocks[5].res_blocks[1].branch2.conv_a, residual.layer4[1].conv1, 3)):
        torch.testing.assert_close(ours.weight, theirs.weight.unsqueeze(2).expand(-1, -1, t, -1, -1) / t)


def test_timm_has_the_same_names(residual):
    timm = pytest.importorskip("timm")
    assert set(timm.create_model("resnet50", num_classes=50).state_dict()) == set(residual.state_dict())


@pytest.mark.parametrize("make, options, told", [
    (lambda: create_model("i3d", 50, width_multiplier=0.5), {}, r"another shape: Conv3d_1a_7x7.conv.weight \(32, 3, 7"),
    (lambda: create_model("i3d_small", 50), {}, "same layout, before cells are inserted"),
    (lambda: insert(create_model("i3d", 50), nn.BatchNorm3d, "Mixed_4b"), {}, "Mixed_4b.original(.|\n)*before cells"),
    (lambda: create_model("i3d", 50), {"mode": "center"}, "Unknown mode of inflation 'center'. Did you mean 'centre'"),
    (small, {}, "No 2-D network is known for Sequential.*names="),
])
def test_an_inflation_that_does_not_fit_changes_nothing(make, options, told, google):
    model = make()
    before = snapshot(model)
    with pytest.raises(AttnnasError, match=told): inflate(model, google, **options)
    assert same(model, before)


def test_another_network_is_inflated_by_its_own_names():
    flat = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5))
    report = inflate(model := small(seed=1), flat, names=lambda name: name.replace("5.", "2."))
    assert report.fraction == 1 and model[5].bias.equal(flat[2].bias)
    torch.testing.assert_close(model[0].weight.sum(2), flat[0].weight)


# ImageNet's weights

def test_imagenet_weights_come_from_a_file_or_the_cache_or_an_error(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    tried = []
    def download(url, path, hash_prefix):
        tried.append((url, hash_prefix))
        raise OSError("no route to host")
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    for name, file in (("googlenet", "googlenet-1378be20.pth"), ("resnet50", "resnet50-0676ba61.pth")):
        with pytest.raises(AttnnasError, match=f"fetch https://.*{file}: no route.* at {tmp_path}/checkpoints/{file}"):
            imagenet_weights(name)
        assert tried[-1][1] == Path(file).stem[-8:]
        torch.save({"weight": torch.ones(2)}, tmp_path / "checkpoints" / file)
        assert imagenet_weights(name)["weight"].equal(torch.ones(2))
    assert len(tried) == 2
    assert set(imagenet_weights("resnet50", tmp_path / "checkpoints" / file)) == {"weight"}
    with pytest.raises(AttnnasError, match="Could not read weights"): imagenet_weights("resnet50", tmp_path / "nowhere")
    with pytest.raises(AttnnasError, match="Did you mean 'resnet50'"): imagenet_weights("resnet5")


# Imports

def test_importing_imports_nothing_heavy():
    heavy = ("timm", "pytorchvideo", "torchvision", "cv2", "av", "optuna", "matplotlib", "pandas", "scipy")
    code = ("import sys, attnnas, attnnas.networks.weights, attnnas.networks.profile;"
            f"print([name for name in {heavy} if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Wrappers and classifiers

PREFIXES = ("module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "module.module.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("as_file", [False, True])
def test_wrappers_leave_nothing_in_names(prefix, as_file, tmp_path):
    "If this fails, weights that were saved from a wrapped network match nothing."
    here, there = (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2))
    weights = {prefix + name: tensor for name, tensor in there.state_dict().items()}
    if as_file:
        torch.save(weights, tmp_path / "w.pth")
        weights = tmp_path / "w.pth"
    assert load_weights(here, weights).fraction == 1 and here[1].weight.equal(there[1].weight)


def test_wrappers_of_parts_of_both_networks_and_of_averages():
    "If this fails, weights of compiled parts, of an averaged network, or for a wrapped network match nothing."
    here, there = (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)) for _ in range(2))
    there[1] = torch.compile(there[1])
    assert load_weights(nn.DataParallel(torch.compile(here)), there).fraction == 1
    averaged = torch.optim.swa_utils.AveragedModel(here)
    assert load_weights(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), averaged).unexpected == ()


def test_a_part_that_is_called_module_keeps_its_name(tmp_path):
    "If this fails, a network whose only part is called `module` cannot load its own weights."
    for network in (PerFrame(nn.Linear(2, 2)), nn.DataParallel(PerFrame(nn.Linear(2, 2)))):
        torch.save(network.state_dict(), tmp_path / "w.pth")
        assert load_weights(PerFrame(nn.Linear(2, 2)), tmp_path / "w.pth").fraction == 1


@pytest.mark.parametrize("name, options, expected", [
    ("two_stream", {"backbone": "mobilenetv2_035"}, ["rgb.head", "flow.head"]),
    ("trn_multiscale", {"backbone": "resnet10t", "frames": 3}, ["head.scale2.3", "head.scale3.3"]),
    ("i3d_small", {"head": "mlp"}, ["head.2"]), ("mobilenetv2_frames", {"mechanism": "cbam"}, ["network.backbone.classifier"])])
def test_all_classifiers_stay_where_the_file_has_other_classes(name, options, expected):
    "If this fails, a network of several classifiers is refused, or loses one."
    with torch.device("meta"): here, there = (create_model(name, classes, **options) for classes in (5, 7))
    assert list(class_layers(here)) == expected
    with torch.device("cpu"): here, there = here.to_empty(device="cpu"), there.to_empty(device="cpu")
    with pytest.raises(AttnnasError, match="other_classes=True"): load_weights(here, there)
    report = load_weights(here, there, other_classes=True)
    assert {tensor.rpartition(".")[0] for tensor in report.other_shape} == set(expected) and not report.missing


def test_timm_says_what_its_classifier_is():
    "If this fails, the last linear layer of a transformer is taken for its classifier, which may be another."
    network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=3, depths=(1, 1, 1, 1), embed_dim=24)
    assert class_layers(network) == ("head.fc",)
