"""Predictions: what an evaluation would have counted, for any file, and a line for each that cannot be read."""
import csv
import json
import re

import pytest
import torch
from torch import nn

from attnnas.cells.spec import CellSpec, OperationSpec
from attnnas.cli import main as cli
from attnnas.core.errors import AttnnasError
from attnnas.data.codec import encode
from attnnas.data.cutting import ClipConfig
from attnnas.data.decode import iterate, probe
from attnnas.data.video import VideoClips
from attnnas.evidence.run import load_model, run
from attnnas.evidence.config import load_tier
from attnnas.evidence.store import Store
from attnnas.figures.attention import collect
from attnnas.figures.attention_video import attended, attention_frames, attention_video, deepest_map
from attnnas.networks.insertion import insert, inserted
from attnnas.networks.registry import create_model
from attnnas.networks.saved import load, save
from attnnas.training.evaluation import class_scores
from attnnas.training.predict import clip_config, find_videos, predict, read_clip

HOW = {"frames": 4, "stride": 2, "size": 24, "stream": "rgb"}
CELL = CellSpec((OperationSpec("spatial", "map-based", "softmax"), OperationSpec("temporal", "dot-product", "softmax"),
                 OperationSpec("spatiotemporal", "channel", "sigmoid")), inputs=((0,), (0, 1), (1,)), outputs=(1, 2, 3), width=4)


def network(cell=None):
    torch.manual_seed(0)
    net = create_model("i3d_small", 3, width_multiplier=.25)
    if cell: insert(net, cell, "MaxPool3d_4a_3x3")
    net.classes, net.preprocessing = ["eel", "ray", "cod"], HOW
    return net


def moving(seed, frames, high, wide):
    return (torch.rand(3, frames, high, wide, generator=torch.Generator().manual_seed(seed)) * 255).byte()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Videos of other sizes and lengths, upright and across, one short, with blanks, below folders."
    place = tmp_path_factory.mktemp("videos")
    for k, (name, size) in enumerate({"a/one.mp4": (20, 32, 48), "a/two of them.mp4": (9, 48, 30), "b/short.mp4": (3, 30, 30),
                                      "b/ünd.mp4": (15, 26, 64)}.items()):
        (place / "all" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "all" / name).write_bytes(encode(moving(k, *size)))
    (place / "broken.mp4").write_bytes(b"\0" * 99)
    return place


@pytest.mark.parametrize("views, crops", [(1, 1), (2, 3)])
def test_scores_are_those_of_the_evaluation(folder, views, crops):
    "If this fails, a network is used otherwise than it was tested."
    net = network().train()
    config = ClipConfig(**HOW, views=views, crops=crops, seed=5)
    clips = VideoClips(folder / "all", "all", config, training=False)
    tested = class_scores(net, clips, batch_size=2).scores
    found = predict(net, clips.files, views=views, crops=crops, batch_size=2 * views * crops, device="cpu")
    assert torch.equal(torch.stack([p.scores for p in found]), tested)
    assert net.training, "the network is left as it was found"
    for p, scores in zip(found, tested):
        shares = dict(p.classes)
        assert p.classes[0][0] == net.classes[scores.argmax()] and abs(sum(shares.values()) - 1) < 1e-12
        assert all(abs(shares[n] - s) < 1e-12 for n, s in zip(net.classes, scores.double().softmax(0).tolist()))
        assert list(shares.values()) == sorted(shares.values(), reverse=True) and len(p.frames) == 4 * views
    assert [p.note for p in found] == ["", "", "its 3 frames repeat: a clip spans 7", ""]
    assert found[2].frames[:4] == (0, 2, 1, 0)


def test_an_unreadable_video_is_a_line_among_the_others(folder):
    "If this fails, one damaged file ends the work on ten thousand."
    net = network()
    files = [folder / "none.mp4", folder / "all/a/one.mp4", folder / "broken.mp4", folder / "all/a/one.mp4"]
    told = []
    found = predict(net, files, device="cpu", progress=lambda *n: told.append(n), batch_size=1)
    assert [p.error and p.error.split(" (")[0] for p in found] == ["missing", None, "not a video", None]
    assert found[1] == found[3] and torch.equal(found[1].scores, found[3].scores), "a file that is named twice is read once"
    assert [p.path for p in found] == [str(f) for f in files] and told == [(1, 3), (2, 3), (3, 3)]
    assert predict(net, folder / "broken.mp4", device="cpu")[0].error.startswith("not a video")
    assert "broken.mp4: not a video" in str(found[2]) and not found[2].classes and found[2].scores is None


def test_folders_and_lists(folder):
    names = [p[len(str(folder)):] for p in find_videos(folder)]
    assert names == ["/all/a/one.mp4", "/all/a/two of them.mp4", "/all/b/short.mp4", "/all/b/ünd.mp4", "/broken.mp4"]
    (folder / "empty").mkdir(exist_ok=True)
    for asked, told in (([], "No video"), (folder / "empty", "holds no video"), ([3], "path or a tensor, got int")):
        with pytest.raises(AttnnasError, match=told): predict(network(), asked, device="cpu")


def test_clips_in_memory_give_what_their_file_gives(folder):
    net = network()
    path = folder / "all/a/two of them.mp4"
    of_file, = predict(net, path, device="cpu", top=1)
    cut = read_clip(path, clip_config(net))
    assert cut.video.shape == (3, 4, 24, 24) and cut.frames == of_file.frames and cut.count == 9
    for clip in (cut.video, cut.video[None]):
        found, = predict(net, clip, device="cpu", top=1)
        assert torch.equal(found.scores, of_file.scores) and found.path == "clip 0" and len(found.classes) == 1
    whole = torch.stack([torch.from_numpy(image) for image in iterate(path)])
    found, = predict(net, whole.permute(3, 0, 1, 2), device="cpu")
    assert torch.equal(found.scores, of_file.scores), "a decoded video is cut as its file is"
    with pytest.raises(AttnnasError, match=r"shape \(4, 24, 24\)"): predict(net, cut.video[0], device="cpu")


class Odd(nn.Module):
    def __init__(self, give): super().__init__(); self.give = give
    def forward(self, x): return self.give(x)


@pytest.mark.parametrize("net, options, told", [
    (Odd(lambda x: x.mean((2, 3, 4))), {}, "does not say how clips are cut.*preprocessing="),
    (Odd(lambda x: x), {"preprocessing": HOW}, r"gives \(4, 3, 4, 24, 24\) for 4 clips"),
    (Odd(lambda x: x.mean((2, 3, 4))), {"preprocessing": HOW | {"framse": 3}}, "Did you mean 'frames'"),
    (Odd(lambda x: x.mean((2, 3, 4))), {"preprocessing": HOW, "classes": ["a"]}, "3 scores, and 1 classes"),
    (Odd(lambda x: x.mean((2, 3, 4))), {"preprocessing": HOW, "top": 0}, "top must be"),
    (Odd(lambda x: x.mean((2, 3, 4))), {"preprocessing": HOW, "crops": 2}, "crops"),
    (Odd(lambda x: x.mean((2, 3, 4))), {"preprocessing": HOW, "device": "gpu"}, "Unknown device")])
def test_bad_input_is_one_line(folder, net, options, told):
    with pytest.raises(AttnnasError, match=told): predict(net, folder / "all", **({"device": "cpu"} | options))


def test_scores_that_are_no_numbers_and_classes_without_names(folder):
    nan = Odd(lambda x: x.mean((2, 3, 4)) * float("nan"))
    found = predict(nan, folder / "all", preprocessing=HOW, device="cpu")
    assert all("not finite" in p.error for p in found)
    found, = predict(Odd(lambda x: x.mean((2, 3, 4))), folder / "all/a/one.mp4", preprocessing=HOW, device="cpu")
    assert sorted(name for name, _ in found.classes) == ["0", "1", "2"]


def test_bfloat16_weights(folder):
    net = network(CELL).bfloat16()
    found, = predict(net, folder / "all/a/one.mp4", device="cpu")
    assert found.classes and next(net.parameters()).dtype == torch.bfloat16


def test_flow_is_computed_where_a_network_asks_for_it(tmp_path):
    "If this fails, a network of optical flow is tested on other numbers than it is used on."
    pytest.importorskip("cv2")
    from attnnas.data.copies import extract_flow
    from attnnas.data.layout import folder_manifest
    net = create_model("i3d_small", 3, width_multiplier=.25, in_channels=2)
    how = HOW | {"frames": 2, "stream": "flow"}
    (tmp_path / "videos" / "a").mkdir(parents=True)
    for k in range(2): (tmp_path / "videos" / "a" / f"{k}.mp4").write_bytes(encode(moving(k, 4, 24, 28)))
    extract_flow(folder_manifest(tmp_path / "videos"), tmp_path / "flow", workers=1, progress=False)
    clips = VideoClips(tmp_path / "videos", "all", ClipConfig(**how), training=False, flow=tmp_path / "flow")
    found = predict(net, clips.files, preprocessing=how, device="cpu", batch_size=4)
    assert torch.equal(torch.stack([p.scores for p in found]), class_scores(net, clips, 4).scores)


# The attention video

def test_attention_is_the_mean_over_queries():
    net = network(CELL)
    video = moving(0, 4, 24, 24)[None]
    seen = collect(net, video)
    operation = seen["MaxPool3d_4a_3x3", 2]
    x = operation.input
    matrix = operation.module.weights(x, torch.arange(x.shape[2]))[0]
    torch.testing.assert_close(attended(operation).flatten(), matrix.sum(0).detach())
    kept = seen["MaxPool3d_4a_3x3", 1]
    torch.testing.assert_close(attended(kept), kept.module.weights(kept.input)[0, 0].detach())


@pytest.mark.parametrize("ending", (".mp4", ".gif"))
@pytest.mark.parametrize("cell", (CELL, None))
def test_attention_video(folder, tmp_path, ending, cell):
    "If this fails, nothing plays, or the picture moves while the video does not."
    net = network(cell).train()
    path = attention_video(net, folder / "all/b/ünd.mp4", tmp_path / f"seen{ending}", device="cpu")
    drawn = attention_frames(net, folder / "all/b/ünd.mp4", device="cpu")
    about = probe(path)
    assert (about.frames, about.height, about.width) == tuple(drawn.shape[1:]) and about.frames == 4
    assert drawn.shape[2] % 2 == drawn.shape[3] % 2 == 0 and drawn.dtype == torch.uint8
    assert not torch.equal(drawn[:, 0], drawn[:, 1])
    assert net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    panels = 3 if cell else 2  # the channel operation weighs no positions
    assert drawn.shape[3] >= panels * 200 or drawn.shape[2] >= panels * 200


def test_attention_of_networks_of_ones_own(folder, tmp_path):
    net = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, 3))
    assert deepest_map(net, torch.zeros(1, 3, 4, 8, 8)) == "0"
    clip = moving(1, 4, 8, 12)
    assert attention_frames(net, clip, device="cpu").shape[1] == 4
    with pytest.raises(AttnnasError, match="neither an .mp4 nor a .gif"): attention_video(net, clip, tmp_path / "x.avi")
    with pytest.raises(AttnnasError, match="could not be decoded"):
        attention_video(network(), folder / "broken.mp4", tmp_path / "x.gif", device="cpu")
    flat = nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(3, 3))
    with pytest.raises(AttnnasError, match="nothing to draw"): attention_frames(flat, clip, device="cpu")


# The command line

@pytest.fixture(scope="module")
def results(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    config = load_tier("smoke").run("A", "i3d_small", "non-local", 0)
    search = load_tier("smoke").run("A", "i3d_small", "search", 0)
    return place, run(config, Store(place)), run(search, Store(place))


def attnnas(capsys, *words):
    code = cli.main([str(word) for word in words])
    found = capsys.readouterr()
    return code, found.out, found.err


def test_predict_by_run_record_and_folder(results, folder, tmp_path, capsys):
    "If this fails, a run's network cannot be used, or is another one once it is saved."
    place, record, _ = results
    video = folder / "all/a/two of them.mp4"
    code, out, _ = attnnas(capsys, "save", record.key[:6], tmp_path / "net", "--results", place)
    assert code == 0 and "Written" in out
    said = []
    for what in (record.key[:6], place / "runs" / record.key / "record.json", place / "runs" / record.key, tmp_path / "net"):
        code, out, err = attnnas(capsys, "predict", what, video, "--results", place, "--device", "cpu", "--json", "-")
        assert code == 0, err
        said.append(json.loads(out))
    assert all(one == said[0] for one in said) and len(said[0][0]["classes"]) == 5
    net, again = load_model(record, Store(place)), load(tmp_path / "net")
    assert list(inserted(again)) == list(inserted(net)) and again.made_from["run"] == record.key
    assert again.preprocessing == net.preprocessing and again.classes == record.data["classes"]


def test_predict_writes_tables_and_names_what_it_could_not_read(folder, tmp_path, capsys):
    net = save(network(CELL), tmp_path / "net")
    code, out, err = attnnas(capsys, "predict", net, folder / "all/a", folder / "broken.mp4", "--top", 2, "--csv", tmp_path / "x.csv",
                             "--attention", tmp_path / "s.gif", "--device", "cpu")
    assert code == 1 and "broken.mp4: not a video" in err and out.count("%") == 4 and "two of them.mp4" in out
    rows = list(csv.DictReader((tmp_path / "x.csv").open()))
    assert [row["rank"] for row in rows] == ["1", "2", "1", "2", ""] and "not a video" in rows[-1]["error"]
    assert sorted(p.name for p in tmp_path.glob("*.gif")) == ["s-one.gif", "s-two of them.gif"]
    code, out, _ = attnnas(capsys, "predict", net, folder / "all/a/one.mp4", "--attention", tmp_path / "one.mp4", "--device", "cpu")
    assert code == 0 and probe(tmp_path / "one.mp4").frames == 4


def test_bad_lines(results, folder, tmp_path, capsys):
    place, record, search = results
    video = folder / "all/a/one.mp4"
    for words, told in ((["nothing", video], "no file or folder, and 0 runs"), ([tmp_path, video], "folder without config.json"),
                        ([search.key, video], "is a search"), ([record.key, video, "--attention", "x.avi"], "neither"),
                        ([record.key, video, "--json", "-", "--csv", "-"], "both want the terminal"),
                        (["", video], "2 runs|0 runs")):
        code, out, err = attnnas(capsys, "predict", *words, "--results", place)
        assert code == 2 and err.count("\n") == 1 and re.search(told, err) and not out, err
