"""One's own videos, as a new user has them: any layout, splits without leaks, broken files listed before the first step."""
import csv
import json
import shutil
from collections import Counter

import pytest
import torch

pytest.importorskip("av"), pytest.importorskip("torchvision")

from attnnas.cli.data import main
from attnnas.core.errors import AttnnasError
from attnnas.core.hashes import content_hash
from attnnas.data.annotations import DATASETS, own_table
from attnnas.data.codec import encode
from attnnas.data.cutting import ClipConfig, as_pictures, training_transform
from attnnas.data.layout import folder_manifest
from attnnas.data.lists import open_videos
from attnnas.data.manifest import Manifest, Row
from attnnas.data.splits import clips_of, deal, film_of, groups_of, open_splits
from attnnas.data.video import VideoClips
from attnnas.evidence.config import RunConfig
from attnnas.evidence.sources import Generated, Videos, source_of

CLASSES = ("jump up", "run", "sit")
SIZES = ((24, 32), (32, 24), (40, 40), (24, 48))     # height, width
ASKED = {"validation_share": .2, "test_share": .2}
TINY = {"frames": 4, "size": 24, "workers": 0}


def film(frames: int, high: int, wide: int, seed: int) -> bytes:
    "A film whose left half is dark and whose right half is bright."
    picture = torch.full((3, frames, high, wide), 40 + seed % 30, dtype=torch.uint8)
    picture[..., wide // 2:] += 120
    picture[:, :, (seed % 4) * 4:(seed % 4) * 4 + 3] = 10
    return encode(picture)


@pytest.fixture(scope="session")
def sixty(tmp_path_factory):
    "Three classes of twenty small videos of different sizes and lengths, some upright, one broken, names with spaces."
    folder = tmp_path_factory.mktemp("own") / "my videos"
    for k in range(60):
        place = folder / CLASSES[k % 3] / f"take {k // 3}.mp4"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(film(2 + k % 9, *SIZES[k % 4], seed=k))
    (folder / "run/take 7.mp4").write_bytes(b"no video at all")
    return folder


@pytest.fixture
def three(sixty, tmp_path):
    "A folder of three files, each of its own class, with no word on what they show."
    folder = tmp_path / "flat one"
    folder.mkdir()
    for name, source in (("clip 1", "run/take 1"), ("clip 2", "sit/take 2"), ("clip 3", "jump up/take 3")):
        shutil.copy(sixty / f"{source}.mp4", folder / f"{name}.mp4")
    return folder


def paths(clips: dict) -> dict: return {split: {row.path for row in part.rows} for split, part in clips.items()}


# ---- the new user's trial

def test_a_folder_of_classes_becomes_three_splits_of_right_labels(sixty):
    "If this fails, a clip is tested that was trained on, or shows another class than its label says."
    clips = clips_of(sixty, **TINY)
    found = paths(clips)
    assert {split: len(rows) for split, rows in found.items()} == {"train": 36, "validation": 12, "test": 12}
    assert len(set.union(*found.values())) == 60
    for part in clips.values():
        assert part.classes == list(CLASSES)
        assert [part.classes[label] for label in part.labels] == [row.path.split("/")[0] for row in part.rows]
        assert set(Counter(part.labels.tolist()).values()) == {len(part) // 3}
    batch = clips["train"].batch(torch.arange(36))
    assert batch.shape == (36, 3, 4, 24, 24) and batch.dtype == torch.uint8


def test_splits_are_those_of_their_seed(sixty):
    assert paths(clips_of(sixty, **TINY)) == paths(clips_of(sixty, **TINY))
    assert paths(clips_of(sixty, split_seed=1, **TINY)) != paths(clips_of(sixty, **TINY))


def test_broken_and_short_videos_are_listed_before_the_first_step(sixty):
    source = Videos(str(sixty), workers=2, frames=4, stride=2, size=24, **ASKED)
    lines = source.preview(progress=False)
    text = "\n".join(lines)
    assert "3 classes; videos: train 36, validation 12, test 12" in text and "Made here: validation and test, with seed 0" in text
    assert "1 video cannot be read" in text and "run/take 7.mp4: not a video" in text
    counts = {row.path: 2 + (3 * int(row.path.split()[-1][:-4]) + CLASSES.index(row.path.split("/")[0])) % 9
              for part in source.open().values() for row in part.rows}
    for split, part in source.open().items():
        short = sum(counts[row.path] < 7 for row in part.rows if row.path != "run/take 7.mp4")
        assert f"{split}: {short} videos are shorter than the 7 frames" in text
    lost = {split: part.summary()["unreadable"] for split, part in source.open().items() if part.lost}
    assert list(lost.values()) == [{"not a video": 1}]            # what a record says of its data


@pytest.mark.parametrize("workers", [0, 2])
def test_a_class_without_a_readable_video_is_refused_by_name(sixty, tmp_path, workers):
    for name in CLASSES[:2]: shutil.copytree(sixty / name, tmp_path / "v" / name)
    for file in (tmp_path / "v/run").iterdir(): file.write_bytes(b"x" * (1 + int(file.stem.split()[1])))
    clips = clips_of(tmp_path / "v", **TINY | {"workers": workers})
    with pytest.raises(AttnnasError, match="No training video of class 'run' can be read: run/take"): clips.preview()


def test_videos_that_the_manifest_has_checked_are_not_looked_at_again(sixty):
    rows = [Row("run/take 1.mp4", "run", "all", frames=5, status="ok"), Row("run/take 7.mp4", "run", "all", frames=9, status="ok"),
            Row("run/take 2.mp4", "run", "all")]
    clips = VideoClips(Manifest(rows, ["run"], sixty), "all", ClipConfig(frames=6, size=16), training=True)
    assert clips.preview() == (1, 1, 5, 6) and not clips.lost


# ---- what a clip looks like

def left_is_dark(clip) -> bool: return bool(clip[..., :8].float().mean() < clip[..., -8:].float().mean())


def test_a_mirror_that_is_off_is_off(sixty):
    "If this fails, a swipe to the left is trained on as one to the right."
    for mirror, sides in ((False, {True}), (True, {True, False})):
        clips = clips_of(sixty, mirror=mirror, area=1., **TINY)["train"]
        assert {left_is_dark(clips[epoch, i]["video"]) for epoch in range(4) for i in range(4)} == sides
    assert Videos(str(sixty), mirror="off", **ASKED).open()["train"].config.mirror is False


def test_jitter_is_one_for_a_clip_and_leaves_crops_and_flow():
    "If this fails, colours flicker from frame to frame, or a seed's crops depend on the jitter."
    ramp = torch.arange(40 * 40, dtype=torch.float32).reshape(1, 1, 40, 40) / 8
    still = (ramp + torch.tensor([10., 25., 50.])[:, None, None, None]).to(torch.uint8).expand(3, 5, 40, 40)
    flow = torch.randn(2, 5, 40, 40)

    def changed(jitter):
        torch.manual_seed(3)
        return training_transform(ClipConfig(size=24, jitter=jitter))(as_pictures(still, flow))

    plain, bright = changed(0.), changed(.8)
    for frame in bright["video"]: assert (frame.int() - bright["video"][0].int()).abs().max() <= 1
    assert (plain["video"].int() - bright["video"].int()).abs().float().mean() > 5 and plain["flow"].equal(bright["flow"])


def test_a_test_clip_is_described_for_whoever_predicts(sixty):
    clips = clips_of(sixty, stride=2, test_frames=6, test_size=32, **TINY)
    assert all(part.preprocessing == {"frames": 6, "stride": 2, "size": 32, "stream": "rgb"} for part in clips.values())
    ClipConfig(**clips["test"].preprocessing)
    assert ClipConfig(stream="flow", bound=4.).preprocessing["bound"] == 4.


def test_views_and_crops_are_those_of_the_test_alone(sixty):
    source = Videos(str(sixty), frames=4, size=24, views=2, crops=3, workers=0, **ASKED)
    clips = source.open()
    assert clips["test"][0]["video"].shape == (6, 3, 4, 24, 24) and clips["validation"][0]["video"].shape == (3, 4, 24, 24)


# ---- identity

def test_settings_at_their_defaults_name_no_run(sixty):
    "If this fails, every run on videos that was ever made gets another key."
    old = {"name": "v", "modality": "rgb", "frames": 16, "size": 32, "test_split": "test", "test_frames": 0, "test_size": 0, "data_seed": 0}
    assert Videos("v").to_dict() == old == Videos("v", workers=3).to_dict()
    assert RunConfig(Videos("v")).hash == RunConfig(Videos("v", workers=0)).hash != RunConfig(Videos("v", mirror="off")).hash
    assert source_of(Videos("v", jitter=.3, test_share=.1).to_dict()) == Videos("v", jitter=.3, test_share=.1)
    assert Generated().preview() == []


def test_the_fingerprint_of_clips_is_what_it_was(sixty):
    clips = VideoClips(sixty, "all", ClipConfig(frames=4, size=24), training=True)
    how = {"frames": 4, "stride": 1, "size": 24, "stream": "rgb", "views": 1, "crops": 1, "area": .25, "mirror": True, "bound": 20.,
           "seed": 0, "backend": "pyav"}
    assert clips.fingerprint == content_hash(["attnnas.video.clips", how, True, "None", {}, clips.manifest.fingerprint("all")])
    other = VideoClips(sixty, "all", ClipConfig(frames=4, size=24, jitter=.1), training=True)
    assert other.fingerprint != clips.fingerprint


# ---- films stay whole

@pytest.mark.parametrize("path, expected", [
    ("a/v_YoYo_g07_c02.avi", "v_YoYo_g07"), ("v_YoYo_g07_c02.avi.mp4", "v_YoYo_g07"), ("x/-4wsuPCjDBc_000005_000015.mp4", "-4wsuPCjDBc"),
    ("brush_hair/April_09_brush_hair_u_nm_np1_ba_goo_0.avi", "April_09_brush_hair"), ("yt-_6u6SA1fWvA_15.mp4", "yt-_6u6SA1fWvA"),
    ("run/take 1.mp4", "run/take 1"), ("run/take 1.avi.mp4", "run/take 1"), ("run/g01_c01.mp4", "run/g01_c01")])
def test_films_are_known_by_published_names(path, expected): assert film_of(path) == expected


@pytest.mark.parametrize("seed", range(5))
def test_no_film_is_in_two_splits(seed):
    "If this fails, a network is tested on the rooms that it was trained in."
    rows = [Row(f"{name}/v_{name}_g{film:02}_c{clip:02}.avi", name, "all") for name in "abc"
            for film in range(8) for clip in range(1 + film % 4)]
    groups = groups_of(Manifest(rows, list("abc"))).names
    splits = deal(rows, groups, {"validation": .2, "test": .2}, seed).names
    assert len(set(zip(groups, splits))) == len(set(groups)) == 24
    for name in "abc":
        counts = Counter(split for row, split in zip(rows, splits) if row.label == name)
        assert 3 <= counts["test"] <= 5 and 3 <= counts["validation"] <= 5


def test_equal_files_and_named_groups_stay_together(sixty, tmp_path):
    for k in range(6): shutil.copy(sixty / f"run/take {k}.mp4", tmp_path / f"{k}.mp4")
    shutil.copy(tmp_path / "0.mp4", tmp_path / "copy of 0.mp4")
    rows = [Row(f"{k}.mp4", "run", "all", group="g" if k in (2, 3) else "") for k in range(6)] + [Row("copy of 0.mp4", "sit", "all")]
    names, notes = groups_of(Manifest(rows, ["run", "sit"], tmp_path))
    assert names[0] == names[6] and names[2] == names[3] and len(set(names)) == 5
    assert notes == ["0.mp4 (run) and copy of 0.mp4 (sit) are equal files of two classes: one label is wrong."]


def test_small_classes_keep_a_video_to_train_on_and_say_so():
    rows = [Row(f"{name}/{k}.mp4", name, "all") for name, count in (("one", 1), ("two", 2), ("many", 10)) for k in range(count)]
    splits, notes = deal(rows, [row.path for row in rows], {"test": .2, "validation": .2})
    assert {row.label for row, split in zip(rows, splits) if split == "train"} == {"one", "two", "many"}
    assert notes == ["Class 'one' has one video: none is left for the test or the validation split.",
                     "Class 'two' has 2 videos: none is left for the validation split."]
    clips = [Row(f"one/v_x_g01_c{k}.avi", "one", "all") for k in range(3)] + rows
    assert "Class 'one' has 3 clips of one video" in deal(clips[:3] + rows[1:], ["x"] * 3 + [r.path for r in rows[1:]], {"test": .2}).notes[0]


def test_a_film_of_two_classes_leaves_both_something_to_train_on():
    rows = [Row(f"a/{k}.mp4", "a", "all") for k in range(4)] + [Row(f"b/{k}.mp4", "b", "all") for k in range(3)]
    groups = ["x", "y", "z", "z", "x", "y", "y"]
    for seed in range(8):
        splits = deal(rows, groups, {"test": .4}, seed).names
        assert {row.label for row, split in zip(rows, splits) if split == "train"} == {"a", "b"}
        assert len(set(zip(groups, splits))) == 3


def test_shares_that_cannot_be_are_refused(sixty):
    rows = [Row("a/0.mp4", "a", "all")]
    with pytest.raises(AttnnasError, match="leave nothing to train on"): deal(rows, ["x"], {"test": .5, "validation": .5})
    with pytest.raises(AttnnasError, match="No video is left for the test split. Class 'a' has one video"): deal(rows, ["x"], {"test": .2})
    with pytest.raises(AttnnasError, match="my videos has no splits. .*--test-share"): Videos(str(sixty)).open()
    with pytest.raises(AttnnasError, match="test_share = 1.5"): Videos(str(sixty), test_share=1.5)
    with pytest.raises(AttnnasError, match="Did you mean 'stride'"): clips_of(sixty, strides=2)


# ---- layouts

def test_folders_of_splits_stay_as_they_are_and_a_missing_one_is_made(sixty, tmp_path):
    for split, takes in (("train", range(10)), ("test", range(10, 14))):
        for name in CLASSES:
            (tmp_path / split / name).mkdir(parents=True)
            for k in takes: shutil.copy(sixty / name / f"take {k}.mp4", tmp_path / split / name)
    asked = clips_of(tmp_path, validation_share=.3, **TINY)
    assert {split: len(part) for split, part in asked.items()} == {"train": 21, "validation": 9, "test": 12} and asked.made == ["validation"]
    assert not paths(asked)["train"] & paths(asked)["validation"]
    with pytest.raises(AttnnasError, match="have a test split already"): clips_of(tmp_path, test_share=.3, **TINY)
    plain = clips_of(tmp_path, validation_share=0., **TINY)
    assert sorted(plain) == ["test", "train"] and plain["train"].fingerprint == VideoClips(
        tmp_path, "train", ClipConfig(frames=4, size=24), training=True).fingerprint
    shutil.move(tmp_path / "test", tmp_path / "val")
    alone = clips_of(tmp_path, **TINY)
    assert len(alone["validation"]) == len(alone["test"]) == 12 and not alone.made


@pytest.mark.parametrize("where", ["labels.csv", "sheet.csv", "../flat one.csv", "../labels.csv"])
def test_a_flat_folder_and_its_table(three, where):
    (three / where).write_text("path,label,group\nclip 1.mp4,run,a\nclip 2,sit,b\nclip 3.mp4,sit,b\nclip 9.mp4,run,a\n")
    manifest = open_videos(three)
    assert [(row.path, row.label, row.status, row.group) for row in manifest.rows] == [
        ("clip 1.mp4", "run", "unchecked", "a"), ("clip 2.mp4", "sit", "unchecked", "b"), ("clip 3.mp4", "sit", "unchecked", "b"),
        ("clip 9.mp4", "run", "missing", "a")]
    assert manifest.root == three and manifest.classes == ["run", "sit"]
    if where[0] != ".": assert open_videos(three / where).rows == manifest.rows


def test_a_flat_folder_without_a_table_says_what_to_do(three):
    with pytest.raises(AttnnasError, match="3 files, and nothing says what they show.*flat one/labels.csv"): open_videos(three)
    for name in "ab": (three / f"{name}.csv").write_text("path,label\nclip 1.mp4,x\n")
    with pytest.raises(AttnnasError, match="several tables of videos: a.csv, b.csv"): open_videos(three)


def test_a_table_in_a_folder_of_classes_changes_nothing(sixty, tmp_path):
    shutil.copytree(sixty, tmp_path / "v")
    before = open_videos(tmp_path / "v").fingerprint()
    (tmp_path / "v/labels.csv").write_text("path,label\nrun/take 1.mp4,sit\n")
    assert open_videos(tmp_path / "v").fingerprint() == before


def test_a_table_of_paths_absolute_or_from_where_it_lies(sixty, tmp_path):
    with open(tmp_path / "list.csv", "w", newline="") as file:
        table = csv.writer(file)
        for k in range(6): table.writerow([sixty / "run" / f"take {k}.mp4", "b"])
        for k in range(6): table.writerow([f"../{(sixty / 'sit' / f'take {k}.mp4').relative_to(tmp_path.parent)}", "a"])
    manifest = open_videos(tmp_path / "list.csv")
    assert manifest.classes == ["a", "b"] and all(manifest.path(row).exists() for row in manifest.rows) and len(manifest.rows) == 12
    (tmp_path / "paths.csv").write_text("\n".join(str(sixty / name / "take 1.mp4") for name in CLASSES))
    assert [row.label for row in open_videos(tmp_path / "paths.csv").rows] == list(CLASSES)


def test_splits_and_numbers_of_a_table_are_kept(sixty, tmp_path):
    lines = [f"{sixty}/run/take {k}.mp4;{k % 2 * 9 + 1};{split}" for k, split in enumerate(("train",) * 4 + ("Val",) * 2 + ("testing",) * 2)]
    (tmp_path / "list.csv").write_text("video;class;split\n" + "\n".join(lines))
    clips = clips_of(tmp_path / "list.csv", **TINY)
    assert {split: len(part) for split, part in clips.items()} == {"train": 4, "validation": 2, "test": 2} and clips["train"].classes == ["1", "10"]


def test_rows_that_cannot_be_used_are_counted_not_lost(three):
    (three / "labels.csv").write_text("path,label\nclip 1.mp4,run\n,run\nclip 2.mp4,\nclip 1.mp4,run\nclip 3.mp4,run\nclip 3.mp4,sit\nclip 2.mp4,sit\n")
    manifest = open_videos(three)
    assert [(row.path, row.status) for row in manifest.rows] == [("clip 1.mp4", "unchecked"), ("clip 3.mp4", "two labels"), ("clip 3.mp4", "two labels"), ("clip 2.mp4", "unchecked")]
    assert [entry.detail for entry in manifest.left_out if entry.reason == "bad row"] == ["no path.", "no label.", "clip 1.mp4 stands in labels.csv, line 2 too."]
    (three / "labels.csv").write_text("path,label\nnowhere.mp4,run\n")
    with pytest.raises(AttnnasError, match="None of the 1 videos"): open_videos(three)


def test_a_manifest_keeps_its_groups_and_its_old_columns(sixty, tmp_path):
    manifest = folder_manifest(sixty)
    manifest.save(tmp_path / "m.csv")
    assert "group" not in (tmp_path / "m.csv").read_text().splitlines()[0] and Manifest.load(tmp_path / "m.csv").rows == manifest.rows
    rows = [Row(row.path, row.label, row.split, group=f"day {k % 5}") for k, row in enumerate(manifest.rows)]
    Manifest(rows, manifest.classes, sixty).save(tmp_path / "g.csv")
    assert Manifest.load(tmp_path / "g.csv").rows == rows
    clips = clips_of(tmp_path / "g.csv", **TINY)
    days = {split: {row.group for row in part.rows} for split, part in clips.items()}
    assert sum(map(len, days.values())) == 5


def test_the_command_line_has_the_settings(sixty, capsys):
    from attnnas.cli.main import main as run
    with pytest.raises(SystemExit): run(["train", "--help"])
    shown = capsys.readouterr().out
    for flag in ("--stride", "--area", "--mirror", "--jitter", "--views", "--crops", "--validation-share", "--test-share", "--workers"):
        assert flag in shown


# ---- official lists

def test_kinetics_400_and_700_are_read(tmp_path):
    (tmp_path / "k400_train.csv").write_text("label,youtube_id,time_start,time_end,split,is_cc\n\"air drumming, loud\",-0x,5,15,train,0\n")
    (tmp_path / "test.csv").write_text("youtube_id,time_start,time_end,label,split\nabc,1,11,,test\nabd,1,11,yoga,test\n")
    listed, names = DATASETS["kinetics400"].listing(tmp_path)
    assert [video.key for video in listed if not video.fault] == ["-0x_000005_000015", "abd_000001_000011"] and names == ["air drumming, loud", "yoga"]
    assert {DATASETS[name].classes for name in ("kinetics700", "kinetics700_2020")} == {700}


SOMETHING = {"something-something-v2-labels.json": {"Putting something similar to other things that are already on the table": "1",
                                                    "Holding something next to something": "0", "Se\u0301parer": "2"},
             "something-something-v2-train.json": [
                 {"id": "78687", "label": "holding potato next to bottle", "template": "Holding [something] next to [something]", "placeholders": ["potato", "bottle"]},
                 {"id": 5, "template": "Putting  [something similar to other things that are already on the table] "},
                 {"template": "Holding [something] next to [something]"}, {"id": "6", "template": "Holding [nothing]"},
                 {"id": "7", "template": "S\u00e9parer"}],
             "something-something-v2-validation.json": [{"id": "8", "template": "Holding [something] next to [something]"}],
             "something-something-v2-test.json": [{"id": "9"}, {"id": "10"}]}


def test_something_something_is_read_and_its_test_left_out_with_a_count(tmp_path, sixty, capsys):
    (tmp_path / "lists").mkdir()
    (tmp_path / "videos").mkdir()
    for name, value in SOMETHING.items(): (tmp_path / "lists" / name).write_text(json.dumps(value))
    for number in (78687, 5, 7, 8, 9): shutil.copy(sixty / "run/take 1.mp4", tmp_path / "videos" / f"{number}.webm")
    assert main(["ssv2", "--annotations", str(tmp_path / "lists"), "--videos", str(tmp_path / "videos"), "--out", str(tmp_path / "m.csv"), "--workers", "0"]) == 0
    said = capsys.readouterr().out
    assert "2 bad row, 2 no label, 1 not listed" in said and "train: 3 listed of 168,913 official" in said
    manifest = Manifest.load(tmp_path / "m.csv")
    assert manifest.classes == ["Holding something next to something", "Putting something similar to other things that are already on the table", "S\u00e9parer"]
    assert [(row.path, manifest.classes.index(row.label), row.split) for row in manifest.rows] == [
        ("78687.webm", 0, "train"), ("5.webm", 1, "train"), ("7.webm", 2, "train"), ("8.webm", 0, "validation")]


def test_something_something_of_the_first_release(tmp_path):
    (tmp_path / "something-something-v1-labels.csv").write_text("Closing something\nHolding [part] of [something]\n".replace("[", "").replace("]", ""))
    (tmp_path / "something-something-v1-train.csv").write_text("100218;Closing something\n2;Holding part of something\n")
    (tmp_path / "something-something-v1-test.csv").write_text("3\n4\n")
    listed, names = DATASETS["ssv1"].listing(tmp_path)
    assert [(video.key, video.label) for video in listed if not video.fault] == [("100218.webm", "Closing something"), ("2.webm", "Holding part of something")]
    assert [video.reason for video in listed if video.fault] == ["no label"] * 2 and names == ["Closing something", "Holding part of something"]


def test_own_tables_of_other_shapes_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("name,age\nAda,36\n")
    with pytest.raises(AttnnasError, match="no table of videos. Expected a header with path and label"): own_table(tmp_path / "x.csv")


def test_open_splits_of_official_manifests_is_as_it_was(sixty, tmp_path):
    rows = [Row(f"run/take {k}.mp4", "run", split) for k, split in enumerate(("train", "validation", "test"))]
    Manifest(rows, ["run"], sixty).save(tmp_path / "official.csv")
    assert sorted(open_splits(tmp_path / "official.csv", validation_share=0., test_share=0.).manifests) == ["test", "train"]
    assert sorted(Videos(str(tmp_path / "official.csv"), test_split="validation").open()) == ["test", "train"]
    assert sorted(clips_of(tmp_path / "official.csv", **TINY)) == ["test", "train", "validation"]
