"""The scale of pixels belongs to the network: wherever bytes become numbers, they are those that it learnt from."""
import copy
import dataclasses
import pickle

import pytest
import torch
from torch import nn

import attnnas as an
from attnnas.core.errors import AttnnasError
from attnnas.data.clips import Clips, to_float
from attnnas.evidence.config import load_tier
from attnnas.evidence.run import load_model, run
from attnnas.evidence.store import Store
from attnnas.figures.attention import collect
from attnnas.figures.attention_video import attention_frames
from attnnas.networks.export import exported_metadata
from attnnas.networks.pixels import scale_of, set_scale, to_input
from attnnas.networks.registry import create_model
from attnnas.networks.weights import load_weights, save_weights
from attnnas.training.distillation import Distillation
from attnnas.training.evaluation import class_scores, evaluate
from attnnas.training.loop import TrainingConfig, classify
from attnnas.training.train import train

MEAN, STD = [.485, .456, .406], [.229, .224, .225]
SCALE = {"mean": MEAN, "std": STD}


def some_clips(count=4, name="clips"):
    video = torch.randint(0, 256, (count, 3, 4, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Clips(video, torch.arange(count) % 2, ["eel", "ray"], fingerprint=name)


def scaled(video):
    "The definition, written out."
    mean, std = (torch.tensor(values).view(3, 1, 1, 1) for values in (MEAN, STD))
    return (video.double() / 255 - mean) / std


class Spy(nn.Module):
    "A network that keeps what it is given."
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.seen = []

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.layer(x.mean((2, 3, 4)))


def spy():
    torch.manual_seed(0)
    model = Spy()
    set_scale(model, MEAN, STD)
    return model


def check_seen(model, video):
    "All that the network was given are clips of `video` on its scale."
    expected = scaled(video).flatten(1)
    distances = torch.cdist(torch.cat(model.seen).double().flatten(1), expected, p=1) / expected.shape[1]
    assert distances.min(1).values.max() < 1e-5


def test_every_way_of_bytes_into_a_network_is_on_its_scale():
    "If this fails, a published network is trained, tested or used on pixels that it never learnt from."
    clips = some_clips()
    ways = {"training": lambda m: classify(m, clips.video, clips.labels), "evaluation": lambda m: class_scores(m, clips),
            "prediction": lambda m: an.predict(m, clips.video, device="cpu"),
            "distillation": lambda m: Distillation(nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 2)), to_float)(
                m, clips.video, clips.labels)}
    for name, way in ways.items():
        model = spy()
        way(model)
        assert len(model.seen) == 1, name
        check_seen(model, clips.video)
    model = spy()
    train(model, clips, clips, config=TrainingConfig(epochs=1, batch_size=2), progress=False, device="cpu")
    check_seen(model, clips.video)
    assert model.preprocessing == SCALE | {"frames": 4, "stride": 1, "size": 16, "stream": "rgb"}


def test_pictures_of_attention_see_the_same_scale():
    clips = some_clips()
    torch.manual_seed(0)
    cell = an.CellSpec([an.OperationSpec("spatial", "map-based", "softmax")], inputs=[[0]], width=4)
    model = an.insert(nn.Sequential(nn.Conv3d(3, 6, 1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 2)), cell, "0",
                      (1, 3, 4, 16, 16)).eval()
    usual = collect(model, clips.video)["0", 1].input
    frames = attention_frames(model, clips.video[0], device="cpu")
    set_scale(model, MEAN, STD)
    floats = scaled(clips.video).float()
    torch.testing.assert_close(collect(model, clips.video)["0", 1].input, collect(model, floats)["0", 1].input)
    assert not torch.allclose(usual, collect(model, floats)["0", 1].input, atol=1e-2)
    assert attention_frames(model, clips.video[0], device="cpu").shape == frames.shape


def test_who_says_nothing_gets_the_usual_scale_to_the_bit():
    video = some_clips().video
    expected = video.float().sub(255 * .45).div(255 * .225)
    assert to_input(nn.Linear(1, 1), video).equal(expected) and to_float(video).equal(expected)
    for name in ("i3d_small", "patchnet"): assert scale_of(create_model(name, 2)) == {}
    model = nn.Linear(1, 1)
    set_scale(model, [.45] * 3, [.225] * 3)
    assert not hasattr(model, "preprocessing")
    torch.testing.assert_close(to_input(spy(), video).double(), scaled(video), atol=1e-5, rtol=0)


@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, lambda m: nn.Sequential(m, nn.Linear(2, 2)), torch.compile,
                                  copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_the_scale_goes_with_the_network(wrap):
    assert scale_of(wrap(spy())) == SCALE


def test_a_wrapped_network_remembers_what_it_was_trained_on():
    inner = spy()
    train(nn.DataParallel(inner), some_clips(), config=TrainingConfig(epochs=1, batch_size=4), progress=False, device="cpu")
    assert inner.classes == ["eel", "ray"] and inner.preprocessing["frames"] == 4 and inner.preprocessing["mean"] == MEAN


def test_saved_and_loaded_networks_keep_it(tmp_path):
    clips = some_clips()
    torch.manual_seed(0)
    net = create_model("i3d_small", 2).eval()
    set_scale(net, MEAN, STD)
    expected = an.predict(net, clips.video, device="cpu")
    an.save(net, tmp_path / "own", preprocessing={"frames": 4, "size": 16})
    again = an.load(tmp_path / "own")
    assert again.preprocessing == SCALE | {"frames": 4, "size": 16}
    found = an.predict(again, clips.video, device="cpu")
    assert all(a.scores.equal(b.scores) for a, b in zip(expected, found))
    other = create_model("i3d_small", 2)
    load_weights(other, tmp_path / "own" / "model.safetensors")  # the weights bring their scale
    assert scale_of(other) == SCALE
    save_weights(other, tmp_path / "bare.safetensors")
    load_weights(third := create_model("i3d_small", 2), tmp_path / "bare.safetensors")
    assert scale_of(third) == SCALE
    load_weights(fourth := create_model("i3d_small", 2), third)
    assert scale_of(fourth) == SCALE


def test_a_file_of_weights_is_the_same_bytes_where_the_scale_is_the_usual_one(tmp_path):
    import safetensors.torch
    net = create_model("patchnet", 2)
    save_weights(net, tmp_path / "a.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == safetensors.torch.save(dict(net.state_dict()), metadata={"format": "pt"})


def test_a_run_that_starts_from_such_weights_uses_and_keeps_it(tmp_path):
    "If this fails, `attnnas train --init FOLDER` reads a published network's weights without its pixels."
    smoke = load_tier("smoke").run("A", "i3d_small", "none", 0)
    start = smoke.build(10).model
    set_scale(start, MEAN, STD)
    an.save(start, tmp_path / "start")
    config = dataclasses.replace(smoke, network=smoke.network.starting_from(tmp_path / "start"))
    store = Store(tmp_path / "runs")
    record = run(config, store, "cpu")
    model = load_model(record, store)
    assert {name: model.preprocessing[name] for name in SCALE} == SCALE and model.preprocessing["frames"] == config.data.frames
    clips = config.data.open()["test"]
    assert evaluate(model, clips, config.training.batch_size) == record.test
    assert record.history != run(smoke, store, "cpu").history


def test_an_export_says_it(tmp_path):
    pytest.importorskip("onnxruntime")
    net = create_model("patchnet", 2)
    an.export(net, tmp_path / "a.onnx", example=(1, 3, 4, 16, 16))
    assert exported_metadata(tmp_path / "a.onnx")["pixels"] == {"mean": .45, "std": .225}
    set_scale(net, MEAN, STD)
    an.export(net, tmp_path / "a.onnx", example=(1, 3, 4, 16, 16))
    assert exported_metadata(tmp_path / "a.onnx")["pixels"] == SCALE


@pytest.mark.parametrize("pretrained", ["over_frames", "create_model"])
def test_timm_s_networks_read_what_timm_s_transform_gives(pretrained, tmp_path):
    timm = pytest.importorskip("timm")
    images = pytest.importorskip("PIL.Image")
    torch.manual_seed(0)
    theirs = timm.create_model("resnet10t", num_classes=5).eval()
    config = timm.data.resolve_data_config(model=theirs)
    transform = timm.data.create_transform(**config | {"input_size": (3, 64, 64), "crop_pct": 1.})
    video = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    frames = torch.stack([transform(images.fromarray(frame.permute(1, 2, 0).numpy())) for frame in video])
    if pretrained == "over_frames":
        with torch.no_grad(): expected = theirs(frames).mean(0)
        net = an.over_frames(copy.deepcopy(theirs), (3, 64, 64))
    else:
        torch.save(theirs.state_dict(), tmp_path / "r.pth")
        net = create_model("r50_frames", 5, pretrained=tmp_path / "r.pth", backbone="resnet10t")
        with torch.no_grad(): expected = net.eval()(frames.transpose(0, 1)[None])[0]
    assert net.preprocessing == {name: list(config[name]) for name in ("mean", "std")}
    found, = an.predict(net, video.transpose(0, 1), device="cpu")
    torch.testing.assert_close(found.scores, expected, atol=1e-4, rtol=1e-4)


def test_two_streams_scale_colours_and_leave_the_flow(tmp_path):
    timm = pytest.importorskip("timm")
    torch.save(timm.create_model("resnet10t", num_classes=5).state_dict(), tmp_path / "r.pth")
    net = create_model("two_stream", 5, pretrained=tmp_path / "r.pth", backbone="resnet10t", stack=2)
    assert net.preprocessing == {"mean": [.485, .456, .406, .45, .45], "std": [.229, .224, .225, .225, .225]}


@pytest.mark.parametrize("wrong, told", [({"mean": .5}, "give both mean and std"), ({"mean": .5, "std": 0}, "deviations above 0"),
                                         ({"mean": "x", "std": 1}, "expected a number"), ({"mean": [.5] * 2, "std": [.5] * 2}, "2 channels")])
def test_a_wrong_scale_is_one_line(wrong, told):
    with pytest.raises(AttnnasError, match=told): an.predict(spy(), some_clips().video, preprocessing=wrong, device="cpu")
    found = an.predict(model := spy(), some_clips().video, preprocessing={"mean": 0., "std": 1.}, device="cpu")
    assert len(found) == 4 and model.seen[0].min() >= 0 and model.seen[0].max() <= 1
