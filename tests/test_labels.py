"""A label is right or the video is left out: lists, names, folders and archives as they are delivered."""
import codecs
import json
import os
import tarfile
import unicodedata
import zipfile
from pathlib import Path

import pytest

from attnnas.cli.data import main
from attnnas.core.errors import AttnnasError
from attnnas.core.files import read_json, write_json
from attnnas.data import archives, prepare
from attnnas.data.annotations import DATASETS
from attnnas.data.archives import left_over, locate, unpack
from attnnas.data.copies import transcode
from attnnas.data.journal import for_each
from attnnas.data.layout import files_below, folder_manifest, open_manifest
from attnnas.data.manifest import LeftOut, Manifest, Row, summary_text
from attnnas.data.matching import Listed, match
from attnnas.data.text import class_name, read_lines, read_table

COMPOSED = "caf\u00e9"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)
ENDINGS = (".mp4", ".avi", ".webm")
HEAD = "label,youtube_id,time_start,time_end,split\n"


def lay(folder: Path, *paths: str):
    "Make files whose content is their path."
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(os.fsencode(path))


def write(folder: Path, **files):
    for name, text in files.items():
        data = text if isinstance(text, bytes) else text.encode()
        (folder / name.replace("__", ".")).write_bytes(data)


def found(listed: list, files: list) -> list: return [path or reason for path, reason in match(listed, files, ENDINGS)]


def swim(*keys: str, split="train") -> list: return [Listed(key, key.split("/")[0], split) for key in keys]


def seen(path: str, reading, root: Path, full: bool) -> dict:
    "Looks at no file: all are right, and as long as their names say."
    return {"status": "ok", "detail": "", "duration": float(path.count("long") * 99), "hash": "0" * 16}


@pytest.fixture
def quick(monkeypatch):
    "Preparation that takes every file for a video."
    monkeypatch.setattr(prepare.examine, "__kwdefaults__", prepare.examine.__kwdefaults__ | {"look": seen})


# ---- one function that matches names to files

@pytest.mark.parametrize("keys, files, expected", [
    (["dive/1.avi", "swim/1.avi"], ["swim/1.avi"], ["missing", "swim/1.avi"]),               # another class has the name
    (["dive/1.avi"], ["xdive/1.avi", "dive/11.avi", "dive/1.avi.part"], ["missing"]),        # names that begin or end so
    (["dive/1.avi"], ["unsorted/1.avi"], ["missing"]),                                       # nobody knows whose that is
    (["dive/1.avi"], ["1.avi"], ["1.avi"]), (["dive/1.avi"], ["train/1.mp4"], ["train/1.mp4"]),
    (["dive/1.avi", "swim/1.avi"], ["1.avi"], ["ambiguous", "ambiguous"]),                   # one file, two videos
    (["dive/1.avi"], ["u/dive/1.avi", "v/dive/1.avi"], ["ambiguous"]),                       # two files, one video
    (["dive/1.avi"], ["dive/1.mp4", "dive/1.avi"], ["dive/1.avi"]),
    (["dive/1.avi", "dive/1.mp4"], ["dive/1.mp4"], ["missing", "dive/1.mp4"]),
    (["Cat/1.avi", "cat/1.avi"], ["cat/1.avi"], ["missing", "cat/1.avi"]),                   # two classes but for case
    (["H+/1.avi", "H-/1.avi"], ["H-/1.avi"], ["missing", "H-/1.avi"]),                       # and but for signs
    (["etc./1.avi", "etc/1.avi"], ["etc/1.avi"], ["missing", "etc/1.avi"]),
    (["brush hair/1.avi"], ["brush_hair/1.avi"], ["brush_hair/1.avi"]),
    (["dive\\1.avi"], ["dive/1.avi"], ["dive/1.avi"]), (["dive/1.avi"], ["dive\\1.avi"], ["dive\\1.avi"]),
    ([f"{COMPOSED}/{COMPOSED}.avi"], [f"{DECOMPOSED}/{DECOMPOSED}.avi"], [f"{DECOMPOSED}/{DECOMPOSED}.avi"]),
    ([f"a/{COMPOSED}.avi"], [f"a/{COMPOSED}.avi", f"a/{DECOMPOSED}.avi"], [f"a/{COMPOSED}.avi"]),
    ([f"a/{COMPOSED}.avi"], [os.fsdecode(b"a/caf\xe9.avi")], [os.fsdecode(b"a/caf\xe9.avi")]),      # an old encoding
    (["a/100%25.avi"], ["a/100%.avi"], ["missing"]), (["a/x y.avi"], ["a/x  y.avi"], ["missing"]),
    (["dive/1.avi"], ["swim/dive/1.avi"], ["swim/dive/1.avi"]), (["dive/1.avi", "swim/2.avi"], ["dive/swim/1.avi"], ["missing", "missing"]),
])
def test_a_file_is_taken_only_where_it_is_surely_the_listed_video(keys, files, expected):
    "If this fails, a network is trained on a video of another class under this label, or a video that is there is lost."
    listed = [Listed(key, key.replace("\\", "/").split("/")[0], "train") for key in keys]
    assert found(listed, files) == expected
    assert found(listed[::-1], files[::-1]) == expected[::-1]


def test_a_split_in_the_path_counts_where_splits_are_no_folds():
    "If this fails, a network is tested on a video that it was trained on."
    both = [Listed("a/1.avi", "a", "train"), Listed("a/1.avi", "a", "validation")]
    assert found(both, ["training/a/1.avi", "val/a/1.avi"]) == ["training/a/1.avi", "val/a/1.avi"]
    assert found(both, ["training/a/1.avi"]) == ["training/a/1.avi", "missing"]
    folds = [Listed("a/1.avi", "a", "train1"), Listed("a/1.avi", "a", "test2")]
    assert found(folds, ["train/a/1.avi"]) == ["train/a/1.avi"] * 2


@pytest.mark.parametrize("files, expected", [
    (["one.mp4", "two.mp4"], ["one.mp4", "ambiguous", "ambiguous"]),
    (["two_000001_000011.mp4", "two.mp4"], ["missing", "two_000001_000011.mp4", "ambiguous"]),
    (["b/two.mp4"], ["missing", "missing", "b/two.mp4"]), (["a/two.mp4", "b/two.mp4"], ["missing", "a/two.mp4", "b/two.mp4"]),
    (["one.mp4", "one_000001_000011.webm"], ["one_000001_000011.webm", "missing", "missing"]),
    (["b/one_000001_000011.mp4"], ["missing"] * 3), (["old/one.mp4"], ["old/one.mp4", "missing", "missing"]),
])
def test_a_whole_video_stands_for_no_clip_that_it_may_not_be(files, expected):
    "If this fails, one YouTube video is several clips under several labels."
    clips = [Listed("one_000001_000011", "a", "train", "one"), Listed("two_000001_000011", "a", "train", "two"),
             Listed("two_000050_000060", "b", "validation", "two")]
    assert found(clips, files) == expected


def test_a_video_under_two_classes_is_of_neither():
    twice = [Listed("k", "a", "train"), Listed("k", "b", "validation"), Listed("l", "a", "train"), Listed("l", "a", "test")]
    assert found(twice, ["k.mp4", "l.mp4"]) == ["two labels", "two labels", "l.mp4", "l.mp4"]
    assert found(twice, []) == ["missing"] * 4


def test_copies_of_one_file_are_one(tmp_path):
    lay(tmp_path, "u/a/1.mp4", "v/a/1.mp4")
    listed = swim("a/1.mp4")
    assert [row.status for row in locate(listed, tmp_path)] == ["ambiguous"]
    (tmp_path / "v/a/1.mp4").write_bytes(b"u/a/1.mp4")
    rows = locate(listed, tmp_path)
    assert [row.path for row in rows] == ["u/a/1.mp4"]
    assert left_over(listed, rows, tmp_path) == [LeftOut("v/a/1.mp4", "not sure", "it has the name of a/1.mp4")]


# ---- one reader of lists

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_of_every_system_are_read(tmp_path, encoding, end):
    "If this fails, the first class of a list begins with a mark that nobody sees, or all lines are one."
    (tmp_path / "l.txt").write_bytes(end.join(["é \u2028a.avi 1 ", "", "b\x85.avi 2"]).encode(encoding))
    assert [tuple(line) for line in read_lines(tmp_path / "l.txt")] == [(1, "é \u2028a.avi 1 "), (3, "b\x85.avi 2")]


def test_one_quotation_mark_too_many_costs_one_row(tmp_path):
    "If this fails, all rows after a stray mark are one cell and vanish without a word."
    (tmp_path / "t.csv").write_text('a,b\n"open,1\nx,2\n"y\nz",3\n5" pipe,4\n"said ""no""",5\n,\n\nw,6\n')
    rows = read_table(tmp_path / "t.csv")
    assert [row.cells for row in rows[1:]] == [['"open,1'], ["x", "2"], ["y\nz", "3"], ['5" pipe', "4"], ['said "no"', "5"], ["w", "6"]]
    assert [row.number for row in rows] == [1, 2, 3, 4, 6, 7, 10]


@pytest.mark.parametrize("name", [" knitting", "knitting ", "knitting\u00a0", "\ufeffknitting", "knitting\r", "\tknitting"])
def test_a_class_has_one_name(name): assert class_name(name) == "knitting"


KINETICS = [
    ("a b ,ID0,1,11,train\n a  b,ID1,1,11,train\n", ["a b"], 2, []),
    (f"{COMPOSED},ID0,1,11,train\n{DECOMPOSED},ID1,1,11,train\n", [COMPOSED], 2, []),
    ("a/b,ID0,1,11,train\n\"c, d\",ID1,1,11,train\n\"e\"\"f\",ID2,1,11,train\n", ["a/b", "c, d", 'e"f'], 3, []),
    ("a,ID0,1,11,train\n# a comment\na,ID1,x,11,train\na,ID2,1,11,trian\n,ID3,1,11,train\na,,1,11,train\na,ID5,inf,11,train\na,ID6,1\n",
     ["a"], 1, [3, 4, 5, 6, 7, 8, 9]),
    ("a,ID0,1,11,train\na,ID0,1.0,11,training\na,ID0,2,12,train\n", ["a"], 2, [3]),           # a row that stands twice
    ("\"open,ID0,1,11,train\na,ID1,1,11,train\n", ["a"], 1, [2]),
]


@pytest.mark.parametrize("text, classes, good, faults", KINETICS)
def test_one_bad_row_blocks_no_other(tmp_path, text, classes, good, faults):
    "If this fails, a preparation ends at the first odd line, or counts a row that means nothing."
    write(tmp_path, train__csv=HEAD + text)
    listed, names = DATASETS["kinetics600"].listing(tmp_path)
    assert names == classes and [row.key for row in listed if row.fault] == [f"train.csv, line {k}" for k in faults]
    assert sum(not row.fault for row in listed) == good


@pytest.mark.parametrize("change", [lambda text: text.replace(",", ";"), lambda text: text.replace(",", "\t"), str.upper,
                                    lambda text: text.replace(",", " , "), lambda text: text.replace("\n", ",,\n"),
                                    lambda text: "\ufeff\n" + text, lambda text: text.replace("\n", "\r\n\r\n")])
def test_tables_that_went_through_a_spreadsheet_are_read(tmp_path, change):
    write(tmp_path, train__csv=change(HEAD + "a,ID,1,11,train\n"))
    row, = DATASETS["kinetics600"].listing(tmp_path).videos
    assert (row.key.lower(), row.label.lower(), row.split) == ("id_000001_000011", "a", "train")


def test_what_lies_beside_the_lists_does_no_harm(tmp_path):
    "If this fails, a README, a list of links or a file that macOS adds ends the preparation."
    (tmp_path / "__MACOSX").mkdir()
    write(tmp_path, train__csv=HEAD + "a,ID,1,11,train\n", README__txt="Thanks!", k600_paths__txt="https://x/a.tar")
    write(tmp_path / "__MACOSX", train__csv="nothing")
    (tmp_path / "._train.csv").write_bytes(b"\0\5\x16\7\xff")
    write(tmp_path, test__csv="youtube_id,time_start,time_end,split\nID2,1,11,test\n")
    listed = DATASETS["kinetics600"].listing(tmp_path).videos
    assert [(row.key, row.fault[:60]) for row in listed] == [("test.csv", "no Kinetics table: it lacks the column label."), ("ID_000001_000011", "")]


def test_lists_that_lie_there_twice_count_once(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, train__csv=HEAD + "a,ID,1,11,train\n")
    listed = DATASETS["kinetics600"].listing(tmp_path).videos
    assert [row.fault for row in listed] == ["", "ID_000001_000011 stands in a/train.csv, line 2 too."]


def test_moments_rows_that_contradict_themselves_are_left_out(tmp_path):
    write(tmp_path, moments_categories__txt="\ufeffclapping,0\r\n\"wave, hello\",1\r\n",
          trainingSet__csv="file,label,n,m\nclapping/1.mp4,\"wave, hello\",3,0\nclapping\\2.mp4,clapping ,3,0\n3.mp4,clapping,3,0\n4.mp4\n5.mp4,flying,1,0\n")
    listed, names = DATASETS["mit"].listing(tmp_path)
    assert names == ["clapping", "wave, hello"]
    assert [row.key for row in listed] == ["trainingSet.csv, line 1", "trainingSet.csv, line 2", "clapping\\2.mp4", "clapping/3.mp4",
                                           "trainingSet.csv, line 5", "trainingSet.csv, line 6"]


@pytest.mark.parametrize("name, file, text, said", [
    ("mit", "moments_categories.txt", "a,0\na ,1\n", "line 2: class 'a' or number 1 stands twice"), ("mit", "moments_categories.txt", "a,0\nb,0\n", "number 0"),
    ("ucf101", "classInd.txt", "1 a\n1 b\n", "stands twice"), ("ucf101", "classInd.txt", "1 a\nb\n", "line 2, 'b'")])
def test_lists_of_classes_are_whole_or_refused(tmp_path, name, file, text, said):
    "If this fails, class numbers are not the official ones, and every label is wrong."
    (tmp_path / file).write_text(text)
    with pytest.raises(AttnnasError, match=said): DATASETS[name].listing(tmp_path)


def test_two_releases_below_one_folder_are_refused(tmp_path):
    for name, text in {"v1": "a,0\nb,1\n", "v2": "b,0\na,1\n"}.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name, moments_categories__txt=text, trainingSet__csv="a/1.mp4,a,3,0\n")
    with pytest.raises(AttnnasError, match="several moments_categories.txt that differ"): DATASETS["mit"].listing(tmp_path)


def test_lines_of_ucf_and_hmdb_may_hold_spaces_and_signs(tmp_path):
    "If this fails, a file is cut at its first space, or a line's two classes are not compared."
    write(tmp_path, classInd__txt="1 Ape\r\n2 Bee line\r\n",
          trainlist01__txt="Ape/v (1).avi 1\r\nBee line/#2 é.avi 2 \nApe/3.avi 2\nFox/4.avi 1\nApe\\5.avi 1\n6.avi 2\nv.avi\n", testlist01__txt="Ape/v 7.avi\n")
    listed = DATASETS["ucf101"].listing(tmp_path).videos
    assert [row.label or row.key for row in listed] == ["Ape", "Ape", "Bee line", "trainlist01.txt, line 3", "trainlist01.txt, line 4", "Ape", "Bee line",
                                                        "trainlist01.txt, line 7"]
    assert [row.key for row in listed[:3]] == ["Ape/v 7.avi", "Ape/v (1).avi", "Bee line/#2 é.avi"]
    write(tmp_path, wave_test_split1__txt="#20 a b.avi 1 \r\nc.avi\t2\nd.avi 0\ne.avi 5\nf.avi\n")
    listed = DATASETS["hmdb51"].listing(tmp_path).videos
    assert [(row.key, row.split) for row in listed] == [("wave/#20 a b.avi", "train1"), ("wave/c.avi", "test1"), ("wave_test_split1.txt, line 4", ""),
                                                        ("wave_test_split1.txt, line 5", "")]


# ---- one walker of folders

def test_every_file_is_found_once(tmp_path):
    "If this fails, a link in a circle never ends, or a link to another class gives its videos a second label."
    outside = tmp_path / "outside"
    data = tmp_path / "data"
    lay(outside, "o.mp4", "sub/p.mp4")
    lay(data, "a/x.MP4", "a/g/y.mp4", "b/z.mp4", "b/z.txt", "a/.hidden.mp4", "__MACOSX/a/m.mp4", "a/d.mp4/e.mp4", "a/x.mp4.flow.mkv")
    (data / "b/n.mp4").mkdir()
    for target, link in {".": "latest", "..": "a/up", "../b": "a/more", "../..": "b/far", str(outside): "a/out", "../a/out/sub": "a/too", "self": "a/self"}.items():
        os.symlink(target, data / link)
    os.symlink(outside, outside / "sub/round")
    files = files_below(data)
    assert files.media == ["a/d.mp4/e.mp4", "a/g/y.mp4", "a/out/o.mp4", "a/out/sub/p.mp4", "a/x.MP4", "b/n.mp4", "b/z.mp4"]
    assert files.closed == []
    assert {row.path: row.label for row in folder_manifest(data).rows} == {path: path[0] for path in files.media}


def test_what_links_put_into_two_classes_is_of_neither(tmp_path):
    "If this fails, the order of two links decides which class a video has."
    lay(tmp_path / "pool", "1.mp4", "2.mp4", "3.mp4", "sub/4.mp4")
    lay(tmp_path / "data", "a/own.mp4", "b/own.mp4")
    for target, link in {"../../pool/1.mp4": "a/1.mp4", "../../pool/2.mp4": "a/2.mp4", "../../pool/2.mp4 ": "a/none.mp4", "own.mp4": "a/again.mp4",
                         "../b/own.mp4": "a/theirs.mp4"}.items(): os.symlink(target, tmp_path / "data" / link)
    os.symlink("../../pool/2.mp4", tmp_path / "data/b/2.mp4")
    for link in ("a/sub", "b/sub"): os.symlink(tmp_path / "pool/sub", tmp_path / "data" / link)
    manifest = folder_manifest(tmp_path / "data")
    assert [row.path for row in manifest.rows] == ["a/1.mp4", "a/again.mp4", "a/none.mp4", "a/own.mp4"]
    assert {entry.path for entry in manifest.left_out if entry.reason == "two labels"} == {"a/2.mp4", "b/2.mp4", "a/theirs.mp4", "b/own.mp4", "a/sub/4.mp4"}


def test_many_links_end_soon(tmp_path):
    for name in "abcdefghijkl":
        lay(tmp_path, f"{name}/{name}.mp4")
        for other in "abcdefghijkl": os.symlink(f"../{other}", tmp_path / name / f"to_{other}")
    assert len(files_below(tmp_path).media) == 12


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may open everything")
def test_folders_that_cannot_be_opened_are_named(tmp_path):
    lay(tmp_path, "a/x.mp4", "a/shut/y.mp4")
    (tmp_path / "a/shut").chmod(0)
    try: assert files_below(tmp_path).closed == ["a/shut"] and folder_manifest(tmp_path).summary()["left_out"] == {"no access": 1}
    finally: (tmp_path / "a/shut").chmod(0o755)


@pytest.mark.parametrize("paths, rows, left_out", [
    (["train/a/1.mp4", "train/a/g/h/2.mp4", "val/a/3.mp4", "val/4.mp4", "5.mp4", "train/a/6.ts"],
     [("train", "a", "train/a/1.mp4"), ("train", "a", "train/a/g/h/2.mp4"), ("val", "a", "val/a/3.mp4")],
     {("val/4.mp4", "no class"), ("5.mp4", "no class"), ("train/a/6.ts", "other ending")}),
    (["a/1.mp4", "b/g/2.mp4", "3.mp4"], [("all", "a", "a/1.mp4"), ("all", "b", "b/g/2.mp4")], {("3.mp4", "no class")}),
    (["training dog/1.mp4", "test/2.mp4"], [("all", "test", "test/2.mp4"), ("all", "training dog", "training dog/1.mp4")], set()),
    (["knit /1.mp4", "knit/2.mp4"], [("all", "knit", "knit/2.mp4"), ("all", "knit", "knit /1.mp4")], set()),
    ([f"{COMPOSED}/1.mp4", f"{DECOMPOSED}/2.mp4"], [("all", COMPOSED, f"{DECOMPOSED}/2.mp4"), ("all", COMPOSED, f"{COMPOSED}/1.mp4")], set()),
    (["test1/a/1.mp4", "train_set/a/2.mp4", "extra/a/3.mp4", "misc/4.mp4", "notes/n.txt"],
     [("extra", "a", "extra/a/3.mp4"), ("test1", "a", "test1/a/1.mp4"), ("train_set", "a", "train_set/a/2.mp4")], {("misc/4.mp4", "no class")}),
])
def test_every_video_of_a_folder_is_a_row_or_is_told(tmp_path, paths, rows, left_out):
    "If this fails, videos vanish, or the name of a group in a class becomes a class."
    lay(tmp_path, *paths)
    manifest = folder_manifest(tmp_path)
    assert [(row.split, row.label, row.path) for row in manifest.rows] == rows
    assert {(entry.path, entry.reason) for entry in manifest.left_out} == left_out
    for split in {row.split for row in manifest.rows}:
        assert open_manifest(tmp_path, split).split(split) == manifest.split(split)


@pytest.mark.parametrize("paths, said", [(["Ape/g01/1.mp4", "Bee/g01/2.mp4"], "may be splits or classes: Ape, Bee"),
                                         (["train/1.mp4", "test/2.mp4"], "named as splits, but hold no class folders"),
                                         (["train/a/1.mp4", "test/2.mp4"], "test holds no class folders"), (["a/1.mp4", "b/n.txt"], "b holds no video")])
def test_folders_that_may_mean_two_things_are_refused(tmp_path, paths, said):
    "If this fails, a split or a group is silently taken for a class."
    lay(tmp_path, *paths)
    with pytest.raises(AttnnasError, match=said): folder_manifest(tmp_path)


# ---- a whole preparation

def make(folder: Path, name: str = "kinetics600", out: str = "k.csv") -> Manifest:
    return prepare.prepare(name, annotations=folder, videos=folder, out=folder / out, workers=0, progress=False)


def test_every_row_and_every_file_is_accounted_for(tmp_path, quick):
    "If this fails, what was lost on the way to a result is not in its summary."
    write(tmp_path, train__csv=HEAD + "a,ID0,1,11,train\na,ID1,1,11,train\nb,ID2,1,11,train\nb,ID2,5,15,train\na,ID3,1,11,train\nb,ID3,1,11,train\nodd\n")
    lay(tmp_path, "ID0_000001_000011.mp4", "ID2.mp4", "ID3_000001_000011.mp4", "ID9.mp4")
    summary = make(tmp_path).summary()
    assert summary["splits"]["train"] == {"official": 392622, "listed": 6, "found": 5, "readable": 1, "unchecked": 0,
                                          "lost": {"ambiguous": 2, "missing": 1, "two labels": 2}}
    assert summary["left_out"] == {"bad row": 1, "not listed": 1, "not sure": 2}
    assert Manifest.load(tmp_path / "k.csv").summary() == summary
    assert "left out: 1 bad row, 1 not listed, 2 not sure" in summary_text(summary)
    ledger = (tmp_path / "k.ledger.csv").read_text()
    assert '"train.csv, line 8",bad row,1 cells; expected 5.' in ledger and "ID2.mp4,not sure,it has the name of ID2_000001_000011" in ledger


def test_the_same_command_again_gives_the_same(tmp_path, quick):
    "If this fails, a second run reads the first one's manifest as a list, or its copies as videos."
    write(tmp_path, train__csv=HEAD + "a,ID0,1,11,train\n")
    lay(tmp_path, "ID0_000001_000011.mp4", "small/ID0_000001_000011.mp4", "small/.copies.journal", "flow/ID0_000001_000011.mp4.flow.mkv")
    first = make(tmp_path)
    assert make(tmp_path) == first == make(tmp_path, out="other.csv") and first.left_out == []


def test_a_whole_video_is_no_clip_of_it(tmp_path, quick):
    "If this fails, ten seconds are cut from anywhere in a video of minutes, under the label of ten of its seconds."
    write(tmp_path, train__csv=HEAD + "a,long,1,11,train\nb,short,1,11,train\n")
    lay(tmp_path, "long.mp4", "short.mp4")
    assert {row.path: row.status for row in make(tmp_path).rows} == {"long.mp4": "untrimmed", "short.mp4": "ok"}


def test_a_folder_can_be_prepared_again_when_its_copies_lie_in_it(tmp_path, quick):
    lay(tmp_path, "a/1.mp4", "b/2.mp4", "small/a/1.mp4", "small/.copies.journal")
    assert [row.path for row in make(tmp_path, "folder").rows] == [row.path for row in make(tmp_path, "folder").rows] == ["a/1.mp4", "b/2.mp4"]


def test_videos_in_two_splits_are_counted(tmp_path, quick):
    write(tmp_path, train__csv=HEAD + "a,ID0,1,11,train\na,ID0,1,11,val\n")
    lay(tmp_path, "ID0_000001_000011.mp4")
    summary = make(tmp_path).summary()
    assert summary["shared"] == {"train and validation": 1} and "in train and validation: 1 videos in both" in summary_text(summary)
    folds = Manifest([Row("x", "a", "train1"), Row("x", "a", "test2")], ["a"])
    assert folds.summary()["shared"] == {}


def test_all_files_in_folders_of_other_names_is_an_error_with_a_hint(tmp_path, quick):
    write(tmp_path, wave_test_split1__txt="1.avi 1\n")
    lay(tmp_path, "stuff/1.avi")
    with pytest.raises(AttnnasError, match="stuff/1.avi has the name of one"): make(tmp_path, "hmdb51")


def test_names_that_are_not_utf8_reach_the_manifest(tmp_path, quick, capsys):
    "If this fails, one file name in an old encoding ends the preparation with a traceback."
    place = tmp_path / os.fsdecode(b"caf\xe9")
    lay(place, os.fsdecode(b"caf\xe9/\xff.mp4"), "b/1.mp4")
    assert main(["folder", "--videos", str(place), "--out", str(tmp_path / "m.csv"), "--workers", "0"]) == 0
    manifest = Manifest.load(tmp_path / "m.csv")
    assert manifest.classes == ["b", COMPOSED] and manifest.path(manifest.rows[1]).exists() and capsys.readouterr().out.startswith(COMPOSED)


# ---- manifests of one's own

def test_a_manifest_that_went_through_a_spreadsheet_is_read(tmp_path):
    rows = [Row("a/x, y.mp4", "a", "train"), Row("a/line\rend\n.mp4", "a", "train", 1.5), Row(f"a/{DECOMPOSED} .mp4", "a", "test")]
    Manifest(rows, ["a"], tmp_path).save(tmp_path / "m.csv")
    text = (tmp_path / "m.csv").read_bytes().decode()
    assert Manifest.load(tmp_path / "m.csv").rows == rows
    lines = text.replace('"a/line\rend\n.mp4","a","train","1.5"', "a/2.mp4,a,train,1.5")
    for changed in (lines.replace("\n", "\r\n"), lines.replace("\n", ",,\n"), lines + "\n\n,,,,,,,,,,\n", lines.replace("path,", "Path ,")):
        (tmp_path / "m.csv").write_bytes(codecs.BOM_UTF8 + changed.encode())
        assert [row.path for row in Manifest.load(tmp_path / "m.csv").rows] == ["a/x, y.mp4"] + [row.path for row in Manifest.load(tmp_path / "m.csv").rows][1:]
        assert len(Manifest.load(tmp_path / "m.csv").rows) == 3
    (tmp_path / "m.json").write_bytes(codecs.BOM_UTF8 + (tmp_path / "m.json").read_bytes())
    assert Manifest.load(tmp_path / "m.csv").classes == ["a"]


def test_classes_that_nobody_can_tell_apart_are_refused():
    for other in ("a ", f"\ufeffa", "a\u00a0"):
        with pytest.raises(AttnnasError, match=r"differ in spaces.*'a'"): Manifest([], ["a", other])
    with pytest.raises(AttnnasError, match="lacks: 'a '"): Manifest([Row("1.mp4", "a ", "train")], ["a"])
    assert Manifest([], ["Cat", "cat", "b"]).summary()["alike"] == [["Cat", "cat"]]


def test_json_holds_what_names_hold(tmp_path):
    write_json(tmp_path / "x.json", {"é": os.fsdecode(b"\xff")})
    assert read_json(tmp_path / "x.json") == {"é": os.fsdecode(b"\xff")}


@pytest.mark.parametrize("about", [[], {"classes": "abc", "root": "."}, {"classes": ["a"], "root": 1}])
def test_what_lies_beside_a_manifest_is_checked(tmp_path, about):
    Manifest([], ["a"], tmp_path).save(tmp_path / "m.csv")
    (tmp_path / "m.json").write_text(json.dumps(about))
    with pytest.raises(AttnnasError, match="m.json lacks"): Manifest.load(tmp_path / "m.csv")


# ---- archives, journals, copies

def tar(path: Path, **files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items(): archive.writestr(f"{name}.mp4", text)
    return path


def test_archives_of_one_name_are_two(tmp_path):
    "If this fails, the second archive of a name is not unpacked, or its files replace those of the first."
    train, val = tar(tmp_path / "train/a.zip", x="1"), tar(tmp_path / "val/a.zip", y="2")
    for archive in (train, val): unpack(archive, tmp_path / "to")
    assert sorted(path.name for path in (tmp_path / "to").glob("*.mp4")) == ["x.mp4", "y.mp4"]
    train.unlink()
    assert unpack(train, tmp_path / "to") == tmp_path / "to"                        # done, and removed to save space
    with pytest.raises(AttnnasError, match="no archive"): unpack(tmp_path / "other/a.zip", tmp_path / "to")
    with pytest.raises(AttnnasError, match="x.mp4 is there with another content"): unpack(tar(tmp_path / "more/a.zip", z="4", x="3"), tmp_path / "to")
    assert (tmp_path / "to/x.mp4").read_text() == "1" and not (tmp_path / "to/z.mp4").exists()


def test_unpacking_that_was_broken_off_can_be_started_again(tmp_path, monkeypatch):
    archive = tar(tmp_path / "a.zip", x="1", y="2")

    def half(archive, folder):
        (folder / "x.mp4").write_text("")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(archives, "_extract", half)
        unpack(archive, tmp_path / "to")
    assert not list((tmp_path / "to").glob("*"))
    unpack(archive, tmp_path / "to")
    assert {path.name: path.read_text() for path in (tmp_path / "to").glob("*.mp4")} == {"x.mp4": "1", "y.mp4": "2"}


def test_inner_archives_of_a_broken_off_run_are_unpacked_later(tmp_path, monkeypatch):
    "If this fails, the classes of HMDB51 whose archives were not reached are missing for ever."
    inner = tar(tmp_path / "wave.zip", w="1").read_bytes()
    outer = tmp_path / "outer.rar"
    with zipfile.ZipFile(outer, "w") as archive: archive.writestr("wave.rar", inner)
    real, calls = archives._extract, []

    def once(archive, folder):
        calls.append(archive.name)
        if len(calls) == 2: raise KeyboardInterrupt
        with zipfile.ZipFile(archive) as file: file.extractall(folder)

    monkeypatch.setattr(archives, "_extract", once)
    with pytest.raises(KeyboardInterrupt): unpack(outer, tmp_path / "to")
    unpack(outer, tmp_path / "to")
    assert (tmp_path / "to/w.mp4").exists() and real


def answer(path, reading): return {"status": "ok", "detail": ""}


@pytest.mark.parametrize("status, again", [("no access", True), ("time-out", True), ("crash", True), ("damaged", False)])
def test_what_may_be_otherwise_the_next_time_is_tried_again(tmp_path, status, again):
    "If this fails, a file that was locked or slow once is lost for ever."
    entry = {"path": "x", "stamp": [1], "result": {"status": status, "detail": ""}}
    odd = [b"7\n", b'{"path": "x"}\n', b"\xff\n", b'["x"]\n']
    (tmp_path / "j").write_bytes(b"".join(odd) + json.dumps(entry).encode() + b"\n")
    go = lambda: for_each(answer, ["x"], lambda path: [1], tmp_path / "j", workers=0, progress=False)["x"]["status"]
    assert go() == go() == ("ok" if again else status)


def test_copies_replace_no_video(tmp_path):
    "If this fails, a small copy is written over the only original."
    lay(tmp_path / "v", "a/x.avi", "a/x.avi.mp4")
    twice = folder_manifest(tmp_path / "v")
    for said, manifest, folder in (("holds the videos", twice, tmp_path / "v"), ("have the copy a/x.avi.mp4", twice, tmp_path / "c"),
                                   ("does not lie below", Manifest([Row(str(tmp_path / "v/a/x.avi"), "a", "all")], ["a"]), tmp_path / "c"),
                                   ("does not lie below", Manifest([Row("../v/a/x.avi", "a", "all")], ["a"], tmp_path / "w"), tmp_path / "c")):
        with pytest.raises(AttnnasError, match=said): transcode(manifest, folder, tmp_path / "c.csv", workers=0, progress=False)
