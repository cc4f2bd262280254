"Preparation: official formats and counts, finding files, long work that is stopped, killed or hangs, archives, copies, images."
import dataclasses
import faulthandler
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from attnnas.cli.data import main
from attnnas.core.errors import AttnnasError
from attnnas.data import archives
from attnnas.data.annotations import DATASETS, Listed
from attnnas.data.archives import locate, unpack
from attnnas.data.clips import ClipSource
from attnnas.data.codec import encode
from attnnas.data.copies import extract_flow, transcode
from attnnas.data.decode import iterate, probe, read_frames
from attnnas.data.flow import flows, read_flow
from attnnas.data.images import (IMAGENETTE, IMAGENETTE_OFFICIAL, Images, image_manifest,
                                 prepare_images, read_image)
from attnnas.data.journal import for_each
from attnnas.data.layout import folder_manifest
from attnnas.data.manifest import Manifest, Row, file_hash, summary_text
from attnnas.data.prepare import examine, prepare
from attnnas.data.unreadable import Unreadable
from attnnas.data.video import VideoLoader
from attnnas.data.workers import _opencv_still

pytest.importorskip("av")
ROOT = Path(__file__).resolve().parent.parent


def film(count: int = 6, high: int = 32, wide: int = 48, seed: int = 0) -> bytes:
    "A small film, as the bytes of an MP4 file."
    y, x = torch.meshgrid(torch.arange(high), torch.arange(wide), indexing="ij")
    frames = torch.stack([128 + 90 * torch.sin((x + k + seed) / 5.) * torch.cos((y - k) / 6.) for k in range(count)])
    return encode(frames.to(torch.uint8).expand(3, -1, -1, -1), fps=24)


# ---- official counts

PUBLISHED = {   # what the papers and the official lists say
    "kinetics600": (600, {"train": 392622, "validation": 30000, "test": 60000}),        # arXiv 1808.01340, table 1
    "mit": (339, {"train": 802264, "validation": 33900}),                               # TPAMI 2019, section 3
    "mit2": (305, {"train": 727305, "validation": 30500}),                              # second release
    "ucf101": (101, {"train1": 9537, "test1": 3783, "train2": 9586, "test2": 3734, "train3": 9624, "test3": 3696}),
    "hmdb51": (51, {"train1": 3570, "test1": 1530, "train2": 3570, "test2": 1530, "train3": 3570, "test3": 1530}),
}

IN_THE_SAME_FORMATS = {
    "kinetics400": (400, {"train": 246245, "validation": 20000, "test": 40000}),        # arXiv 1808.01340, table 1
    "kinetics700": (700, {"train": 545317, "validation": 35000, "test": 70000}),        # arXiv 1907.06987, table 1
    "kinetics700_2020": (700, {}),                                                      # arXiv 2010.10864 gives none a split
    "ssv1": (174, {"train": 86017, "validation": 11522, "test": 10960}),
    "ssv2": (174, {"train": 168913, "validation": 24777, "test": 27157}),
}


def test_official_counts_are_the_published_ones():
    "If this fails, a summary compares what was found with a wrong number."
    assert {name: (data.classes, data.official) for name, data in DATASETS.items()} == PUBLISHED | IN_THE_SAME_FORMATS
    totals = {name: sum(official.values()) for name, (_, official) in IN_THE_SAME_FORMATS.items()}
    assert totals == {"kinetics400": 306245, "kinetics700": 650317, "kinetics700_2020": 0, "ssv1": 108499, "ssv2": 220847}
    counts = {name: official for name, (_, official) in PUBLISHED.items()}
    assert counts["kinetics600"]["validation"] == 600 * 50 and counts["kinetics600"]["test"] == 600 * 100
    assert counts["mit"]["validation"] == 339 * 100 and counts["mit2"]["validation"] == 305 * 100
    assert all(counts["ucf101"][f"train{k}"] + counts["ucf101"][f"test{k}"] == 13320 for k in (1, 2, 3))
    assert all(counts["hmdb51"][f"train{k}"] == 51 * 70 and counts["hmdb51"][f"test{k}"] == 51 * 30 for k in (1, 2, 3))
    assert IMAGENETTE_OFFICIAL == {"train": 9469, "validation": 3925} and len(IMAGENETTE) == 10


def names(count: int) -> list: return [f"Class{k:03d}" for k in range(count)]


def write_kinetics(folder, counts):
    for split, count in counts.items():
        lines = [f'"class, {k % 600:03d}",{split[:1]}{k:010d},{k % 300},{k % 300 + 10},{split}' for k in range(count)]
        (folder / f"{split}.csv").write_text("label,youtube_id,time_start,time_end,split\n" + "\n".join(lines))


def write_moments(folder, counts, classes):
    known = names(classes)
    (folder / "moments_categories.txt").write_text("\n".join(f"{name},{k}" for k, name in enumerate(known)))
    for split, count in counts.items():
        lines = [f"{known[k % classes]}/yt-{split}_{k}.mp4,{known[k % classes]},3,0" for k in range(count)]
        (folder / f"{split.replace('train', 'training')}Set.csv").write_text("\n".join(lines))


def write_ucf(folder, counts):
    known = names(101)
    (folder / "classInd.txt").write_text("\n".join(f"{k + 1} {name}" for k, name in enumerate(known)))
    for split, count in counts.items():
        lines = [f"{known[k % 101]}/v_{split}_{k}.avi" + f" {k % 101 + 1}" * split.startswith("train") for k in range(count)]
        (folder / f"{split[:-1]}list0{split[-1]}.txt").write_text("\n".join(lines) + "\n")


def write_hmdb(folder, counts):
    for k, name in enumerate(names(51)):
        for fold in "123":
            lines = [f"{name}_{n}.avi {1 if n < 70 else 2 if n < 100 else 0} " for n in range(130)]
            (folder / f"{name}_test_split{fold}.txt").write_text("\n".join(lines))


@pytest.mark.parametrize("name", PUBLISHED)
def test_lists_of_the_official_length_are_counted_as_such(tmp_path, name):
    "If this fails, lines of an official list are dropped, doubled or put in the wrong split. (Lists above 35 000 are cut to 5 000.)"
    classes, official = PUBLISHED[name]
    counts = {split: count if count < 35_000 else 5_000 for split, count in official.items()}
    write = {"kinetics600": write_kinetics, "ucf101": write_ucf, "hmdb51": write_hmdb}.get(name, partial(write_moments, classes=classes))
    write(tmp_path, counts)
    listed, found = DATASETS[name].listing(tmp_path)
    manifest = Manifest(locate(listed, tmp_path), found, tmp_path, name, official)
    splits = manifest.summary()["splits"]
    assert {split: entry["listed"] for split, entry in splits.items()} == counts and len(found) == classes
    assert all(entry["official"] == official[split] and entry["lost"] == {"missing": counts[split]} for split, entry in splits.items())
    assert sum(f"{count:,} listed of {official[split]:,} official" in summary_text(manifest.summary()) for split, count in counts.items()) == len(counts)


def test_classes_keep_their_official_numbers(tmp_path):
    (tmp_path / "moments_categories.txt").write_text("zebra,0\nadult+female+singing,2\nape,1\n")
    (tmp_path / "validationSet.csv").write_text("a.mp4,ape,3,0\n")
    listed, found = DATASETS["mit"].listing(tmp_path)
    assert found == ["zebra", "ape", "adult+female+singing"] and listed == [Listed("ape/a.mp4", "ape", "validation")]
    (tmp_path / "classInd.txt").write_text("1 Zumba\n10 Ape\n2 Biking\n")
    (tmp_path / "trainlist02.txt").write_text("Ape/v_Ape_g01_c01.avi 10\n")
    listed, found = DATASETS["ucf101"].listing(tmp_path)
    assert found == ["Zumba", "Biking", "Ape"] and listed == [Listed("Ape/v_Ape_g01_c01.avi", "Ape", "train2")]


def test_kinetics_comes_in_several_shapes(tmp_path):
    head = "label,youtube_id,time_start,time_end"
    (tmp_path / "kinetics_600_val.csv").write_text(f"\ufeff{head},split,is_cc\nabseiling,-4wsuPCjDBc,5,15,val,0\n", encoding="utf-8")
    (tmp_path / "train.txt").write_text(f"{head}\n\"talking, loudly\",_x,0.0,10.0\n")
    listed, found = DATASETS["kinetics600"].listing(tmp_path)
    assert listed == [Listed("-4wsuPCjDBc_000005_000015", "abseiling", "validation", "-4wsuPCjDBc"),
                      Listed("_x_000000_000010", "talking, loudly", "train", "_x")] and found == ["abseiling", "talking, loudly"]


@pytest.mark.parametrize("file, text, said", [
    ("train.csv", "label,id\na,b\n", "lacks the column time_end, time_start, youtube_id"), ("train.csv", "", "lacks the column"),
    ("some.csv", "label,youtube_id,time_start,time_end\na,b,1,2\n", "split in .*some.csv 'some'"),
    ("test.csv", "label,youtube_id,time_start,time_end\n,b,1,2\n", "line 2: no label"),
    ("train.csv", "label,youtube_id,time_start,time_end\na,b,one,2\n", "line 2: times are 'one'"), ("notes.md", "", "holds no annotations")])
def test_what_is_wrong_with_kinetics_tables_is_said(tmp_path, file, text, said):
    (tmp_path / file).write_text(text)
    with pytest.raises(AttnnasError, match=said): DATASETS["kinetics600"].listing(tmp_path)


@pytest.mark.parametrize("name, files, said", [
    ("mit", {"moments_categories.txt": "a,x\n"}, "not NAME,NUMBER"), ("mit", {"moments_categories.txt": "a,0", "trainingSet.csv": "b/1.mp4,b,1,0"}, "line 1"),
    ("ucf101", {"classInd.txt": "1 Ape", "testlist01.txt": "Apes/v.avi"}, "Did you mean 'Ape'"),
    ("hmdb51", {"wave_test_split1.txt": "a.avi 3"}, "use in .*'3'"), ("hmdb51", {"wave.txt": "a.avi 1"}, "holds no annotations")])
def test_what_is_wrong_with_other_lists_is_said(tmp_path, name, files, said):
    for file, text in files.items(): (tmp_path / file).write_text(text)
    with pytest.raises(AttnnasError, match=said): DATASETS[name].listing(tmp_path)


# ---- finding files

def test_files_are_found_wherever_they_lie(tmp_path):
    for path in ("k/val/ID1_000001_000011.mp4", "k/ID2.webm", "u/UCF-101/Ape/v_1.avi", "u/Bee/v_1.avi", "n/notes.txt", "k/ID3_000001_000011.part"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(b"x")
    wanted = [Listed("ID1_000001_000011", "a", "validation", "ID1"), Listed("ID2_000000_000010", "a", "train", "ID2"),
              Listed("ID3_000001_000011", "a", "train", "ID3"), Listed("Ape/v_1.avi", "Ape", "train1"), Listed("Bee/v_1.avi", "Bee", "train1"),
              Listed("Cat/v_9.avi", "Cat", "test1")]
    rows = locate(wanted, tmp_path)
    assert [row.path for row in rows] == ["k/val/ID1_000001_000011.mp4", "k/ID2.webm", "ID3_000001_000011.mp4",
                                          "u/UCF-101/Ape/v_1.avi", "u/Bee/v_1.avi", "Cat/v_9.avi"]
    assert [row.status for row in rows] == ["unchecked", "unchecked", "missing", "unchecked", "unchecked", "missing"]


# ---- a whole data set

@pytest.fixture
def ucf(tmp_path):
    "A small UCF101: two classes of four videos, one missing, one empty, one cut off; three splits."
    (tmp_path / "classInd.txt").write_text("1 Ape\n2 Bee\n")
    for k in range(8):
        path = tmp_path / "videos/UCF-101" / ("Ape", "Bee")[k % 2] / f"v_{k}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        if k != 3: path.write_bytes(film(seed=k)[:{4: 0, 5: 900}.get(k)])
    line = lambda k: f"{('Ape', 'Bee')[k % 2]}/v_{k}.mp4"
    for fold in (1, 2, 3):
        (tmp_path / f"trainlist0{fold}.txt").write_text("".join(f"{line(k)} {k % 2 + 1}\n" for k in range(8) if k % 3 + 1 != fold))
        (tmp_path / f"testlist0{fold}.txt").write_text("".join(f"{line(k)}\n" for k in range(8) if k % 3 + 1 == fold))
    return tmp_path


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_set_becomes_a_manifest(ucf, workers):
    manifest = prepare("ucf101", annotations=ucf, videos=ucf / "videos", out=ucf / "ucf.csv", workers=workers, progress=False)
    assert Manifest.load(ucf / "ucf.csv").rows == manifest.rows and len(manifest.rows) == 24
    row = next(row for row in manifest.rows if row.path.endswith("v_0.mp4"))
    path = ucf / "videos/UCF-101/Ape/v_0.mp4"
    assert (row.frames, row.width, row.height, row.rate, row.status, row.backend) == (6, 48, 32, 24., "ok", "pyav")
    assert row.duration == pytest.approx(.25) and row.hash == file_hash(path)
    splits = manifest.summary()["splits"]
    assert sum(split["lost"].get("missing", 0) for split in splits.values()) == sum(split["lost"].get("empty", 0) for split in splits.values()) == 3
    assert splits["train1"]["official"] == 9537 and splits["train1"]["listed"] == 5
    ledger = (ucf / "ucf.ledger.csv").read_text().splitlines()
    assert len(ledger) == 10 and any("v_5.mp4,not a video" in line for line in ledger)


def counting(path, reading, log):
    with open(log, "a") as file: file.write(path + "\n")
    return {"status": "ok", "detail": "", "length": len(path)}


def stopping(path, reading, log):
    if path == "4": raise KeyboardInterrupt
    return counting(path, reading, log)


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_work_goes_on_where_it_was(tmp_path, workers):
    "If this fails, a preparation of days starts from nothing after a power cut, or forgets what it has done."
    paths, stamp, log = [str(k) for k in range(9)], lambda path: [int(path) // 100, 1], tmp_path / "log"
    work = dict(stamp=stamp, journal=tmp_path / "journal", progress=False)
    with pytest.raises(KeyboardInterrupt): for_each(partial(stopping, log=log), paths, workers=0, **work)
    with open(tmp_path / "journal", "a") as file: file.write('{"path": "7", "st')        # broken off while writing
    found = for_each(partial(counting, log=log), paths, workers=workers, **work)
    assert list(found) == paths and sorted(log.read_text().split()) == paths              # each exactly once
    for_each(partial(counting, log=log), paths, workers=workers, **(work | {"stamp": lambda path: [path == "6", 1]}))
    assert log.read_text().split().count("6") == 2 and len(log.read_text().split()) == 10  # the one that changed, again


def deadly(path, reading):
    if path == "2":
        faulthandler.disable()                  # of pytest, which would print where this process is
        os.kill(os.getpid(), signal.SIGSEGV)
    if path == "5": time.sleep(600)
    return {"status": "ok", "detail": ""}


def test_files_that_kill_or_hang_a_worker_are_noted_and_the_rest_is_done(tmp_path):
    "If this fails, one file in half a million ends the preparation, each time at the same place."
    paths, started = [str(k) for k in range(8)], time.monotonic()
    found = for_each(deadly, paths, lambda path: [], tmp_path / "journal", workers=2, time_limit=4., progress=False)
    assert {path: result["status"] for path, result in found.items()} == {path: {"2": "crash", "5": "time-out"}.get(path, "ok") for path in paths}
    assert "SIGSEGV" in found["2"]["detail"] and time.monotonic() - started < 60


def test_a_changed_file_is_looked_at_again(ucf):
    go = partial(prepare, "ucf101", annotations=ucf, videos=ucf / "videos", out=ucf / "ucf.csv", workers=0, progress=False)
    first = go()
    (ucf / "videos/UCF-101/Bee/v_5.mp4").write_bytes(film(9))
    (ucf / "videos/UCF-101/Bee/v_3.mp4").write_bytes(film(4))
    again = go()
    changed = {row.path.rsplit("/", 1)[1]: (row.status, row.frames) for row in again.rows if row not in first.rows}
    assert changed == {"v_5.mp4": ("ok", 9), "v_3.mp4": ("ok", 4)} and again.fingerprint() != first.fingerprint()


def test_a_folder_of_classes_is_prepared_too(tmp_path):
    for name in "ab": (tmp_path / "f" / name).mkdir(parents=True)
    (tmp_path / "f/a/1.mp4").write_bytes(film())
    (tmp_path / "f/b/2.mp4").write_bytes(b"no")
    manifest = prepare("folder", videos=tmp_path / "f", out=tmp_path / "f.csv", workers=0, progress=False)
    assert [row.status for row in manifest.rows] == ["ok", "not a video"]
    quick = prepare("folder", videos=tmp_path / "f", out=tmp_path / "g.csv", workers=0, progress=False, full=False)
    assert quick.rows == manifest.rows


@pytest.mark.parametrize("name", DATASETS)
def test_a_command_without_its_files_says_where_they_are(name, tmp_path, capsys):
    assert main([name]) == 2 and DATASETS[name].where in capsys.readouterr().err
    with pytest.raises(AttnnasError, match="There is no folder"): prepare(name, annotations=tmp_path / "no", videos=tmp_path, out=tmp_path / "x.csv")


def test_wrong_folders_are_an_error_before_the_work(ucf, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(AttnnasError, match="None of the 24 listed videos"): prepare("ucf101", annotations=ucf, videos=tmp_path / "other", out=ucf / "x.csv")
    assert not (ucf / "x.csv").exists()


def test_settings_that_cannot_be_are_refused_before_the_work(films, tmp_path):
    "If this fails, hours of work end in an error, or a wrong number is taken for another one, or for no end of work."
    for said, attempt in {"must end in .csv": lambda: examine(films, tmp_path / "x.txt", workers=0),
                          "x.tsv; its name": lambda: transcode(films, tmp_path / "c", tmp_path / "x.tsv"),
                          "workers is -1": lambda: examine(films, tmp_path / "x.csv", workers=-1),
                          "short_side is 0": lambda: transcode(films, tmp_path / "c", tmp_path / "x.csv", 0),
                          "bound is 0": lambda: extract_flow(films, tmp_path / "f", bound=0.)}.items():
        with pytest.raises(AttnnasError, match=said): attempt()
    assert not (tmp_path / "x.csv").exists() and not (tmp_path / "c").exists() and not (tmp_path / "f").exists() and not (tmp_path / ".x.txt.journal").exists()


# ---- manifests

def test_manifests_come_back_as_they_were(tmp_path):
    rows = [Row('a/"quoted", ü\u2028.mp4', "x y", "train", .1 + .2, 7, 1, 2, 1e-3, "0" * 16, "ok", "pyav"), Row("b.mp4", "z,", "test", status="missing"),
            Row(os.fsdecode(b"not-utf8-\xff.mp4"), "z,", "test")]
    manifest = Manifest(rows, ["z,", "x y"], tmp_path / "videos", "n", {"train": 3})
    manifest.save(tmp_path / "m.csv")
    again = Manifest.load(tmp_path / "m.csv")
    assert again == dataclasses.replace(manifest, root=again.root) and again.root.resolve() == manifest.root.resolve()
    assert again.fingerprint() == manifest.fingerprint() != manifest.fingerprint("train")
    shutil.move(tmp_path / "m.csv", tmp_path / "n.csv")
    with pytest.raises(AttnnasError, match="n.json"): Manifest.load(tmp_path / "n.csv")


@pytest.mark.parametrize("text, said", [("", "columns are none"), ("path,label\n", "columns are path, label"), ("{head}\na,x,train\n", "line 2"),
                                        ("{head}\na,x,train,1,2,3,4,5,,ok,\nb,x,train,long,2,3,4,5,,ok,\n", "line 3.*'long'"),
                                        ("{head}\na,y,train,1,2,3,4,5,,ok,\n", "class list lacks: y")])
def test_damaged_manifests_are_refused_with_their_line(tmp_path, text, said):
    (tmp_path / "m.json").write_text(json.dumps({"classes": ["x"], "root": "."}))
    (tmp_path / "m.csv").write_text(text.replace("{head}", "path,label,split,duration,frames,width,height,rate,hash,status,backend"))
    with pytest.raises(AttnnasError, match=said): Manifest.load(tmp_path / "m.csv")


def test_fingerprints_follow_what_is_in_the_files(tmp_path):
    (tmp_path / "a").mkdir()
    for k in range(2): (tmp_path / "a" / f"{k}.mp4").write_bytes(film(seed=k))
    before = folder_manifest(tmp_path).fingerprint("all")
    assert before == folder_manifest(tmp_path).fingerprint("all")
    (tmp_path / "a/1.mp4").write_bytes(film(seed=5))
    assert before != folder_manifest(tmp_path).fingerprint("all")


# ---- archives

def make(kind: str, path: Path, files: dict):
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, data in files.items(): file.writestr(name, data)
    else:
        with tarfile.open(path, "w:gz") as file:
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                file.addfile(entry, io.BytesIO(data))


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_archives_are_unpacked_once_and_inside(tmp_path, kind):
    make(kind, tmp_path / f"a.{kind}", {"x/1.mp4": b"one"})
    unpack(tmp_path / f"a.{kind}", tmp_path / "to")
    (tmp_path / "to/x/1.mp4").write_bytes(b"kept")
    assert (unpack(tmp_path / f"a.{kind}", tmp_path / "to") / "x/1.mp4").read_bytes() == b"kept"
    make(kind, tmp_path / f"bad.{kind}", {"../outside.mp4": b"evil"})
    try: unpack(tmp_path / f"bad.{kind}", tmp_path / "deep/to")
    except AttnnasError: pass
    assert not (tmp_path / "deep/outside.mp4").exists()


def test_archives_that_cannot_be_unpacked(tmp_path, monkeypatch):
    make("tar.gz", tmp_path / "cut.tar.gz", {"1.bin": os.urandom(99999)})
    (tmp_path / "cut.tar.gz").write_bytes((tmp_path / "cut.tar.gz").read_bytes()[:50000])
    (tmp_path / "a.rar").write_bytes(b"Rar!")
    monkeypatch.setattr(archives.shutil, "which", lambda name: None)
    for name, said in {"cut.tar.gz": "Download it again", "a.rar": "Install bsdtar", "none.zip": "no archive"}.items():
        with pytest.raises(AttnnasError, match=said): unpack(tmp_path / name, tmp_path / "to")
    assert not list((tmp_path / "to").glob(".*unpacked"))


def test_rar_goes_through_the_program_that_is_there_and_inner_ones_too(tmp_path, monkeypatch):
    "A stand-in for unrar that copies a file beside the archive: HMDB51 is an archive of archives."
    program = tmp_path / "bin/unrar"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\nfor last; do :; done\nmkdir -p "$last"\ncp "$4.inside/"* "$last"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(archives.shutil, "which", lambda name: str(program) if name == "unrar" else None)
    for path in ("outer.rar", "outer.rar.inside/wave.rar", "to/wave.rar.inside/w.avi"):
        (tmp_path / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / path).write_bytes(b"Rar!")
    unpack(tmp_path / "outer.rar", tmp_path / "to")
    assert (tmp_path / "to/w.avi").exists()


# ---- copies and flow

@pytest.fixture
def films(tmp_path):
    "A prepared folder with a wide film, a small one and a broken one."
    (tmp_path / "v/a").mkdir(parents=True)
    for name, data in {"wide.mp4": film(9, 60, 101), "small.mkv": film(5, 24, 30), "no.mp4": b"no"}.items(): (tmp_path / "v/a" / name).write_bytes(data)
    return prepare("folder", videos=tmp_path / "v", out=tmp_path / "v.csv", workers=0, progress=False)


def test_copies_are_smaller_and_otherwise_the_same(films, tmp_path):
    copies = transcode(films, tmp_path / "c", tmp_path / "c.csv", short_side=30, workers=2, progress=False)
    found = {row.path: (row.status, row.frames, row.height, row.width) for row in copies.rows}
    assert found == {"a/no.mp4": ("not a video", 0, 0, 0), "a/small.mkv.mp4": ("ok", 5, 24, 30), "a/wide.mp4": ("ok", 9, 30, 50)}
    assert copies.summary()["splits"] == films.summary()["splits"]
    shown, copied = (read_frames(m.path(row), [4]).images[0].mean((0, 1)) for m, row in ((films, films.rows[2]), (copies, copies.rows[2])))
    assert np.abs(shown - copied).max() < 6
    made = (tmp_path / "c/a/wide.mp4").stat().st_mtime_ns
    (tmp_path / "c/a/small.mkv.mp4").unlink()
    transcode(films, tmp_path / "c", tmp_path / "c.csv", short_side=30, workers=0, progress=False)
    assert (tmp_path / "c/a/wide.mp4").stat().st_mtime_ns == made and (tmp_path / "c/a/small.mkv.mp4").exists()


def test_flow_is_made_for_what_can_be_read(films, tmp_path):
    pytest.importorskip("cv2")
    done = extract_flow(films, tmp_path / "f", "dis", workers=2, progress=False)
    assert done == {"videos": 2, "flows": 14, "lost": {}}
    wide = films.path(films.rows[2])
    expected = np.stack(list(flows(iterate(wide), "dis")), 1)
    assert np.abs(read_flow(tmp_path / "f/a/wide.mp4.flow.mkv").numpy() - expected.clip(-20, 20)).max() < .08
    with pytest.raises(AttnnasError, match="other settings"): extract_flow(films, tmp_path / "f", "farneback", workers=0, progress=False)
    (tmp_path / "f/a/wide.mp4.flow.mkv").unlink()
    extract_flow(films, tmp_path / "f", "dis", workers=0, progress=False)
    assert (tmp_path / "f/a/wide.mp4.flow.mkv").exists()
    extract_flow(films, tmp_path / "half", "dis", short_side=30, workers=0, progress=False)
    assert read_flow(tmp_path / "half/a/wide.mp4.flow.mkv").shape == (2, 9, 30, 50)


@pytest.mark.parametrize("work", ["copies", "flow"])
def test_a_killed_preparation_leaves_no_half_file_and_goes_on(tmp_path, work):
    "If this fails, a file that was being written when the machine went down is later read as if it were whole."
    (tmp_path / "v/a").mkdir(parents=True)
    for k in range(6): (tmp_path / f"v/a/{k}.mp4").write_bytes(film(24, 48, 64, seed=k))
    manifest, folder = folder_manifest(tmp_path / "v"), tmp_path / "made"
    go = {"copies": lambda: transcode(manifest, folder, tmp_path / "c.csv", 32, workers=0, progress=False),
          "flow": lambda: extract_flow(manifest, folder, "farneback", workers=0, progress=False)}[work]
    process, made = torch.multiprocessing.get_context("fork").Process(target=go), lambda: sorted((folder / "a").glob("[0-9]*"))
    with _opencv_still(): process.start()
    while len(made()) < 2 and process.is_alive(): time.sleep(.005)
    process.kill()
    process.join()
    whole = {path: path.stat().st_mtime_ns for path in made()}
    assert 2 <= len(whole) < 6
    for path in whole: assert probe(path).frames == 24
    go()
    again = {path: path.stat().st_mtime_ns for path in made()}
    assert len(again) == 6 and sum(again[path] == time for path, time in whole.items()) >= len(whole) - 1    # the last was not noted


def test_the_whole_command_line(ucf, capsys):
    go = lambda *arguments: main([str(argument) for argument in arguments])
    assert go("ucf101", "--annotations", ucf, "--videos", ucf / "videos", "--out", ucf / "u.csv", "--workers", 0) == 0
    assert "train1: 5 listed of 9,537 official" in capsys.readouterr().out
    assert go("transcode", ucf / "u.csv", "--folder", ucf / "small", "--out", ucf / "small.csv", "--short-side", 16, "--workers", 0) == 0
    assert go("flow", ucf / "small.csv", "--folder", ucf / "flow", "--method", "farneback", "--workers", 0) == 0
    assert "flow of 5 videos, 30 frames; lost: none" in capsys.readouterr().out
    assert go("summary", ucf / "small.csv") == 0 and "1 missing" in capsys.readouterr().out
    assert go("summary", ucf / "nothing.csv") == 2 and "nothing.json" in capsys.readouterr().err
    assert go("folder", "--videos", ucf / "videos/UCF-101", "--out", ucf / "f.csv", "--workers", 0, "--quick") == 0
    with pytest.raises(SystemExit): main(["kinetics"])


TASKS = [*DATASETS, "folder", "images", "transcode", "flow", "summary"]


@pytest.mark.parametrize("task", TASKS)
def test_every_command_explains_itself(task, capsys):
    with pytest.raises(SystemExit) as done: main([task, "--help"])
    assert done.value.code == 0 and f"usage: attnnas data {task}" in capsys.readouterr().out


def test_the_commands_are_part_of_attnnas(tmp_path, capsys):
    "If this fails, an installed wheel cannot prepare data: data_prep is in the repository alone."
    from attnnas.cli.main import main as attnnas
    with pytest.raises(SystemExit) as done: attnnas(["data", "--help"])
    assert done.value.code == 0 and set(TASKS) <= set(capsys.readouterr().out.replace(",", " ").split())
    assert attnnas(["data", "summary", str(tmp_path / "none.csv")]) == 2
    assert capsys.readouterr().err.startswith("attnnas data: ")


@pytest.mark.parametrize("module", ["data_prep", "attnnas.cli.main data"])
def test_a_command_runs_from_the_command_line(tmp_path, module):
    (tmp_path / "videos/a").mkdir(parents=True)
    (tmp_path / "videos/a/1.mp4").write_bytes(film(4, 32, 32))
    start = "import sys; from attnnas.cli.main import main; sys.exit(main())"
    program = ["-m", "data_prep"] if module == "data_prep" else ["-c", start, "data"]
    done = subprocess.run([sys.executable, *program, "folder", "--videos", str(tmp_path / "videos"), "--workers", "0",
                           "--out", str(tmp_path / "v.csv")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "all: 1 listed, 1 found, 1 readable; lost: none" in done.stdout
    assert Manifest.load(tmp_path / "v.csv").rows[0].frames == 4


# ---- images

def picture(path, high=20, wide=30, mode="RGB", **options):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((high, wide, 3), np.uint8)
    pixels[:, :wide // 2] = 200
    Image.fromarray(pixels).convert(mode).save(path, **options)
    return path


@pytest.mark.parametrize("name, mode", [("a.png", "RGB"), ("a.png", "L"), ("a.png", "RGBA"), ("a.gif", "P"), ("a.jpg", "CMYK"), ("a.bmp", "RGB"),
                                        ("a.webp", "RGB"), ("wrong ending.png", "RGB")])
def test_images_of_every_kind_become_rgb(tmp_path, name, mode):
    image = read_image(picture(tmp_path / name, mode=mode, **({"format": "JPEG"} if "wrong" in name else {})))
    assert image.shape == (3, 20, 30) and image.dtype == torch.uint8
    assert (image[:, :, 3:12].float() - 200).abs().mean() < 8 and image[:, :, 18:27].float().mean() < 8


def test_photographs_taken_sideways_come_upright(tmp_path):
    from PIL import Image
    note = Image.Exif()
    note[0x0112] = 6                                                    # turn by 90 degrees, clockwise
    image = read_image(picture(tmp_path / "a.jpg", exif=note))
    assert image.shape == (3, 30, 20) and image[:, :12].float().mean() > 180 and image[:, 18:].float().mean() < 20


@pytest.mark.parametrize("name, make, reason", [
    ("empty.jpg", lambda p: p.write_bytes(b""), "empty"), ("text.jpg", lambda p: p.write_text("no"), "not an image"),
    ("cut.jpg", lambda p: p.write_bytes(picture(p, 200, 200, quality=95).read_bytes()[:900]), "damaged"),
    ("cut.png", lambda p: p.write_bytes(picture(p, 200, 200).read_bytes()[:-40]), "damaged"), ("missing.jpg", lambda p: None, "missing"),
    ("pipe.jpg", os.mkfifo, "not a file"), ("large.png", lambda p: picture(p, 300, 300), "too large")])
def test_broken_images_have_a_reason(tmp_path, name, make, reason):
    make(tmp_path / name)
    with pytest.raises(Unreadable) as caught: read_image(tmp_path / name, max_pixels=50_000)
    assert caught.value.reason == reason


@pytest.mark.parametrize("size", ["160", "320", ""])
def test_imagenette_is_known_by_its_folders(tmp_path, size):
    "Any of its three sizes, from the archive or unpacked, with the classes in the official order."
    root = tmp_path / f"made/imagenette2{'-' * bool(size)}{size}"
    for k, name in enumerate(IMAGENETTE):
        for split in ("train", "val"): picture(root / split / name / f"{split}_{k}.JPEG", 20 + k, 30)
    (root / "val/n01440764/broken.JPEG").write_bytes(b"no")
    archive = shutil.make_archive(tmp_path / "a", "gztar", tmp_path / "made")
    manifest = prepare_images(tmp_path / "to", tmp_path / "i.csv", [archive], workers=0, progress=False)
    assert manifest.classes[:2] == ["tench", "English springer"] and manifest.name == "imagenette"
    splits = manifest.summary()["splits"]
    assert splits["train"] == {"official": 9469, "listed": 10, "found": 10, "readable": 10, "unchecked": 0, "lost": {}}
    assert splits["validation"]["official"] == 3925 and splits["validation"]["lost"] == {"not an image": 1}
    assert prepare_images(root, tmp_path / "j.csv", workers=0, progress=False).rows == manifest.rows


def test_any_folder_of_images(tmp_path):
    for k in range(3): picture(tmp_path / "flat" / f"{k}.png")
    for k in range(4): picture(tmp_path / "classes" / "ab"[k % 2] / f"{k}.png")
    flat, classed = (image_manifest(tmp_path / name) for name in ("flat", "classes"))
    assert (flat.classes, len(flat.rows), flat.splits) == (["flat"], 3, ["all"]) and (classed.classes, len(classed.rows)) == (["a", "b"], 4)
    source = Images(tmp_path / "classes", "all", 16, training=False)
    assert isinstance(source, ClipSource) and source.batch(torch.arange(4)).shape == (4, 3, 16, 16)
    with pytest.raises(AttnnasError, match="imagenette2-160.tgz"): prepare_images(tmp_path / "no", tmp_path / "x.csv")


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_images_keep_the_rules_of_videos(tmp_path, training, workers):
    for k in range(8): picture(tmp_path / "ab"[k % 2] / f"{k}.png")
    (tmp_path / "a/4.png").write_bytes(b"")
    loader = VideoLoader(Images(tmp_path, "all", 16, training=training, workers=workers), 3)
    batches = list(loader)
    assert sum(len(batch["image"]) for batch in batches) == 7 + training and loader.ledger.videos() == {"a/4.png": "empty"}
    assert all(batch["image"].shape[1:] == (3, 16, 16) for batch in batches)
    source = loader.clips
    assert source[1, 3]["image"].equal(source[1, 3]["image"]) and source.summary()["unreadable"] == {"empty": 1}
    if not training:
        with pytest.raises(Unreadable, match="empty"): source.batch(torch.arange(8))
