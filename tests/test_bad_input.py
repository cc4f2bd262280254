"""What cannot be learnt from, run or read is one line before the work, in Python and on the command line."""
import os
import zlib
from functools import partial

import pytest
import torch
from torch import nn

import attnnas as an
from attnnas.cli.main import main
from attnnas.core.errors import AttnnasError
from attnnas.data.clips import Clips
from attnnas.data.codec import encode
from attnnas.search.differentiable import SearchConfig, differentiable
from attnnas.training.loop import TrainingConfig

CELL = an.CellSpec([an.OperationSpec("spatial", "map-based", "softmax")], inputs=[[0]], width=4)
QUICK = TrainingConfig(epochs=1, batch_size=4)
SMALL = SearchConfig(levels=1, width=4)


def write(path, frames=6, high=32, wide=32):
    pytest.importorskip("av")
    path.parent.mkdir(parents=True, exist_ok=True)
    seed = zlib.crc32(path.name.encode())
    video = torch.randint(0, 256, (3, frames, high, wide), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    path.write_bytes(encode(video))


def folder_of(place, classes=("eel", "ray"), count=4):
    for name in classes:
        for i in range(count): write(place / name / f"{name} {i}.mp4")
    return place


def items(label, count=8, shape=(3, 4, 16, 16)):
    return [(torch.full(shape, i, dtype=torch.uint8), label(i)) for i in range(count)]


def network(classes=2):
    return nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, classes))


class Gives(nn.Module):
    "A network that gives whatever a function makes of the clip."
    def __init__(self, function):
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.ones(1))

    def forward(self, x): return self.function(x, self.weight)


class Breaks(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, number): raise OSError("the disk is gone")


even = lambda i: i % 2
LABELS = {"missing": lambda i: None, "nan": lambda i: float("nan"), "''": lambda i: "" if i == 3 else "ab"[i % 2],
          "'  '": lambda i: "  ", "-1": lambda i: -1 if i == 3 else i % 2}


@pytest.mark.parametrize("told, label", LABELS.items())
def test_labels_that_are_missing(told, label):
    for call in (an.train, partial(differentiable, sites=["0"])):
        with pytest.raises(AttnnasError, match=f"The label of item .* is {told}"): call(network(), items(label))


NETWORKS = [(network()[:3], "gives .*expected"), (network(1), "1 outputs|gives .1, 1.; expected scores"), ("i3d", r"got str \('i3d'\).*create_model"),
            (Gives(lambda x, w: (x, w)), "tuple"), (Gives(lambda x, w: x.mean((2, 3, 4)) @ torch.ones(5, 2)), "shape|shapes")]


@pytest.mark.parametrize("model, told", NETWORKS, ids=range(len(NETWORKS)))
def test_networks_that_give_no_scores(model, told):
    for call in (partial(an.train, progress=False), partial(differentiable, search=SMALL, sites=["0"])):
        with pytest.raises(AttnnasError, match=told) as caught: call(model, items(even))
        assert "\n" not in str(caught.value)


def test_other_things_that_no_training_starts_with():
    frozen = network().requires_grad_(False)
    for model, data, told in ((frozen, items(even), "nothing to train"), (network(), Breaks(), "cannot give its item 0: OSError: the disk is gone"),
                              (Gives(lambda x, w: (w - w) / (w - w) * x.mean((2, 3, 4))), items(even), "not finite for the first clip, in fp32"),
                              (an.create_model("c3d", 2), items(even), "C3D takes clips .* of at least"),
                              (network(), items(lambda i: 0), "of class '0'"), (network(), [], "empty")):
        with pytest.raises(AttnnasError, match=told): an.train(model, data, config=QUICK, progress=False, device="cpu")
    for call in (lambda: an.predict("folder", torch.zeros(3, 4, 8, 8)), lambda: an.insert("i3d", CELL, "0"), lambda: an.train("i3d", [])):
        with pytest.raises(AttnnasError, match="Expected a network"): call()
    for nothing in (None, [], ()):
        with pytest.raises(AttnnasError, match="No video was given"): an.predict(network(), nothing, preprocessing={"frames": 4, "size": 16})


@pytest.mark.parametrize("sites, told", [(["Mixed_9"], "Unknown site 'Mixed_9'"), (["4"], "cannot be a site"), (None, "No sites for"), (["0", "0"], "named twice")])
def test_sites_that_do_not_exist(sites, told):
    with pytest.raises(AttnnasError, match=told): an.insert(network(), CELL, sites, (1, 3, 4, 16, 16))
    with pytest.raises(AttnnasError, match=told): differentiable(network(), items(even), SMALL, QUICK, sites)


@pytest.fixture(scope="module")
def nasty(tmp_path_factory):
    place = folder_of(tmp_path_factory.mktemp("my vidéos"), ("sea eel", "raie bouclée", "it's \"x\""))
    eel, ray = place / "sea eel", place / "raie bouclée"
    write(eel / "portrait (1).mp4", 6, 64, 24)
    write(ray / "tiny.mp4", 6, 8, 8)
    write(ray / "one frame.mp4", 1)
    write(place / "lonely" / "only.mp4")
    (eel / "zero.mp4").write_bytes(b"")
    (ray / "notes.mp4").write_text("hello\n" * 50)
    (ray / "readme.txt").write_text("hello")
    os.symlink(place, eel / "loop")
    os.symlink(place / "gone.mp4", eel / "dangling.mp4")
    return place


def test_a_nasty_folder_is_told_trained_on_and_predicted(nasty, tmp_path):
    clips = an.clips_of(nasty, 4, 16, validation_share=.25, test_share=.25, workers=0)
    told = "\n".join(clips.preview())
    for said in ("zero.mp4: empty", "notes.mp4: not a video", "shorter than the 4 frames", "Class 'lonely' has one video", "readme.txt: "):
        assert said in told, told
    assert [c for c in clips["train"].classes] == sorted({"sea eel", "raie bouclée", "it's \"x\"", "lonely"})
    net = network(4)
    an.train(net, clips["train"], clips["validation"], config=QUICK, progress=False, device="cpu")
    found = an.predict(net, nasty, device="cpu")
    wrong = {os.path.basename(p.path): p.error for p in found if p.error}
    assert set(wrong) <= {"zero.mp4", "notes.mp4", "dangling.mp4"} and {"zero.mp4", "notes.mp4"} <= set(wrong)
    an.save(net, tmp_path / "net")
    assert len({p.path for p in found}) == len(found) < 30, "the loop is not followed"


COMMAND = ["--frames", "4", "--size", "16", "--epochs", "1", "--batch-size", "4", "--backbone", "i3d_small", "--device", "cpu",
           "--validation-share", ".25", "--test-share", ".25"]


def bad_folders(place):
    good = folder_of(place / "good")
    (folder_of(place / "ghost") / "ghost").mkdir()
    folder_of(place / "one", ("eel",))
    (place / "nothing").mkdir()
    rows = [f"{file},{file.parent.name}" for file in sorted(good.rglob("*.mp4"))]
    (place / "nolabel.csv").write_text("path\n" + "\n".join(row.split(",")[0] for row in rows))
    (place / "void.csv").write_text("")
    for name in "ab":
        (place / "unreadable" / name).mkdir(parents=True)
        for i in range(4): (place / "unreadable" / name / f"{i}.mp4").write_bytes(bytes([i]) * 40)
    (place / "file.mp4").write_bytes((good / "eel" / "eel 0.mp4").read_bytes())
    return {"ghost": "ghost holds no video", "one": "of 1 class", "nothing": "No folders in", "void.csv": "no table of videos",
            "unreadable": "can be read", "file.mp4": "is a file", "gone": "There is no folder"}


def test_commands_refuse_bad_folders_in_one_line(tmp_path, capsys):
    for name, told in bad_folders(tmp_path).items():
        for command in ("train", "search"):
            assert main([command, "--data", str(tmp_path / name), "--results", str(tmp_path / "runs"), *COMMAND]) == 2, name
            said = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
            assert said.startswith(f"attnnas {command}: ") and told in said, (name, said)
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("record.json"))


def test_commands_refuse_options_that_do_not_fit_in_one_line(tmp_path, capsys):
    good = folder_of(tmp_path / "good", count=5)
    cases = {("--insertion", "non-local", "--sites", "Mixed_9"): "Unknown site 'Mixed_9'", ("--backbone", "i3d_smal"): "Did you mean 'i3d_small'",
             ("--batch-size", "0"): "expected 1 to", ("--validation-share", "0", "--patience", "3"): "patience looks at validation clips"}
    for options, told in cases.items():
        assert main(["train", "--data", str(good), "--results", str(tmp_path / "runs"), *COMMAND, *options]) == 2
        said = capsys.readouterr().err.replace("\r", "\n").strip().splitlines()[-1]
        assert told in said, said
        assert ".)" not in said and "others" not in said, said


def test_a_row_without_a_label_is_named_before_the_first_step(tmp_path):
    rows = [f"{file},{file.parent.name}" for file in sorted(folder_of(tmp_path / "good").rglob("*.mp4"))]
    rows[2] = rows[2].split(",")[0] + ","
    (tmp_path / "own.csv").write_text("path,label\n" + "\n".join(rows) + "\n")
    clips = an.clips_of(tmp_path / "own.csv", 4, 16, test_share=.25, workers=0)
    assert any("own.csv, line 4: no label" in line for line in clips.preview())


def test_clips_are_checked_where_they_are_made():
    with pytest.raises(AttnnasError, match="labels reach from"): Clips(torch.zeros(2, 3, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 5]), ["a", "b"])
