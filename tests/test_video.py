"Reading video: exact frames from every container, a zoo of broken files, corruptions, hangs, dead workers, ledgers."
import dataclasses
import os
import signal
import struct
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from attnnas.core.errors import AttnnasError
from attnnas.data import decode
from attnnas.data.clips import ClipSource
from attnnas.data.codec import encode
from attnnas.data.cutting import TEST, ClipConfig, clip_frames
from attnnas.data.decode import iterate, probe, read_frames
from attnnas.data.layout import folder_manifest
from attnnas.data.manifest import Ledger, Manifest, Row, file_hash
from attnnas.data.unreadable import REASONS, Unreadable, limited
from attnnas.data.video import VideoClips, VideoLoader
from attnnas.data.workers import WorkerDied, in_workers

av = pytest.importorskip("av")
SMALL = ClipConfig(frames=4, size=24, time_limit=60.)        # a busy machine is no hang


def images(count: int, high: int = 32, wide: int = 40, seed: int = 0) -> np.ndarray:
    "Frames (count, high, wide, 3) that all differ: a smooth picture that moves, with its number as brightness of a corner."
    y, x = np.mgrid[:high, :wide]
    frames = [np.stack([128 + 90 * np.sin((x + 2 * k + 9 * c + seed) / 5) * np.cos(y / 7) for c in range(3)], -1) for k in range(count)]
    frames = np.stack(frames).clip(0, 255).astype(np.uint8)
    frames[:, :8, :8] = (np.arange(count) * 5 % 250)[:, None, None, None]
    return frames


def write(path, frames, codec="libx264", form=None, pixels="yuv420p", rate=25, rotation=0, times=None, **options):
    "Encode `frames`; `times`: presentation times in hundredths of a second."
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=rate, options={k: str(v) for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixels
        if times: stream.time_base = stream.codec_context.time_base = Fraction(1, 100)
        if rotation: stream.set_display_rotation(rotation)
        for k, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            if times: frame.pts, frame.time_base = times[k], stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        for packet in (*stream.encode(frame), *stream.encode()): container.mux(packet)


# ---- exactly the frames asked for

CONTAINERS = {"plain.mp4": {}, "no b-frames.mkv": dict(bf=0), "short gops.mov": dict(g=5, bf=3), "open.ts": dict(g=10),
              "vp9.webm": dict(codec="libvpx-vp9", deadline="realtime", **{"cpu-used": 8}), "old.avi": dict(codec="mpeg4", bf=2, b="900k"),
              "stills.mov": dict(codec="mjpeg", pixels="yuvj420p"), "lossless.mkv": dict(codec="ffv1", pixels="yuv444p")}


@pytest.mark.parametrize("name", CONTAINERS)
def test_any_frame_from_any_container(tmp_path, name):
    "If this fails, a clip shows other frames than its numbers say, and flow no longer belongs to its frames."
    path = write(tmp_path / name, images(50), **CONTAINERS[name])
    whole = np.stack(list(iterate(path)))
    assert len(whole) == 50 == probe(path).frames == probe(path, full=False).frames
    corner = whole[:, 2:6, 2:6].mean((1, 2, 3))
    assert np.abs(corner - np.arange(50) * 5 % 250).max() < 12                  # every frame once, in order
    for chosen in ([0], [49], [37, 12, 12, 48], range(23, 31), range(0, 50, 7)):
        found = read_frames(path, chosen)
        assert found.count == 50 and (found.images == whole[list(chosen)]).all()
        assert found.times == pytest.approx([k / 25 for k in chosen], abs=2e-3)


def test_frames_without_times_are_counted(tmp_path):
    "If this fails, a raw stream, whose packets carry no times, cannot be read or loses frames."
    path = write(tmp_path / "raw.h264", images(30), form="h264")
    whole = np.stack(list(iterate(path)))
    assert len(whole) == 30 and (read_frames(path, [29, 4, 11]).images == whole[[29, 4, 11]]).all()


def test_variable_frame_rates_keep_their_times(tmp_path):
    times = [0, 4, 8, 40, 44, 100, 104, 300]
    path = write(tmp_path / "variable.mkv", images(8), times=times)
    found = read_frames(path, range)
    assert found.count == 8 and found.times == pytest.approx([t / 100 for t in times], abs=2e-3)
    assert (read_frames(path, [5]).images[0] == found.images[5]).all() and probe(path).duration == pytest.approx(8 * 3 / 7, abs=.01)


@pytest.mark.parametrize("angle", [90, 180, -90])
def test_rotated_videos_come_upright(tmp_path, angle):
    "If this fails, every video held sideways by its telephone is shown sideways."
    frames = images(3, 32, 48)
    plain, turned = (read_frames(write(tmp_path / f"{a}.mp4", frames, rotation=a), range).images for a in (0, angle))
    assert (turned == np.rot90(plain, angle // 90 % 4, axes=(1, 2))).all()
    found = probe(tmp_path / f"{angle}.mp4")
    assert (found.height, found.width) == turned.shape[1:3]


def test_what_is_asked_for_must_be_there(tmp_path):
    path = write(tmp_path / "a.mp4", images(5))
    with pytest.raises(AttnnasError, match=r"has 5 frames; frames \[5\]"): read_frames(path, [5])
    with pytest.raises(AttnnasError, match="pyav"): read_frames(path, range, backend="pyva")


@pytest.mark.parametrize("times", [None, [0, 4, 8, 40, 44, 100, 104, 300]], ids=["constant", "variable"])
def test_torchcodec_reads_the_same_frames(tmp_path, times):
    pytest.importorskip("torchcodec", exc_type=(ImportError, RuntimeError))
    path = write(tmp_path / "a.mkv", images(8), times=times)
    ours, theirs = (read_frames(path, [7, 3, 5], backend=name) for name in ("pyav", "torchcodec"))
    assert theirs.count == ours.count == 8 and np.abs(ours.images.astype(int) - theirs.images).mean() < 2
    assert theirs.times == pytest.approx(ours.times, abs=2e-3)


def test_torchcodec_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(AttnnasError, match="torchcodec backend cannot be loaded.*pyav"): read_frames(tmp_path, range, backend="torchcodec")


# ---- the zoo

def huge(path):
    "A motion-JPEG film whose pictures say that they are 65 500 pixels high and wide."
    data = bytearray(write(path, images(4), codec="mjpeg", pixels="yuvj420p").read_bytes())
    at = data.find(b"\xff\xc0")
    while at >= 0:
        data[at + 5:at + 9] = struct.pack(">HH", 65500, 65500)
        at = data.find(b"\xff\xc0", at + 2)
    at = data.find(b"strf") + 12
    data[at:at + 8] = struct.pack("<ii", 65500, 65500)
    path.write_bytes(data)


def box_without_end(path):
    "A first box that claims 2**60 bytes."
    path.write_bytes(struct.pack(">I4sQ", 1, b"moov", 2**60) + bytes(5000))


def no_rate_avi(path):
    "An AVI whose header says 0 microseconds a frame and 0 frames a second."
    data = bytearray(write(path, images(6), codec="mpeg4").read_bytes())
    at = data.find(b"avih") + 8
    data[at:at + 4] = bytes(4)
    at = data.find(b"strh") + 8 + 20
    data[at:at + 8] = bytes(8)
    path.write_bytes(data)


def no_rate_mp4(path):
    "An MP4 in which every frame lasts no time at all."
    data = bytearray(write(path, images(6), bf=0).read_bytes())
    at = data.find(b"stts") + 12
    for k in range(struct.unpack(">I", data[at - 4:at])[0]): data[at + 8 * k + 4:at + 8 * k + 8] = bytes(4)
    path.write_bytes(data)


def cut(path, name, share, **options):
    data = write(path.with_name("whole " + name), images(40), **options).read_bytes()
    path.with_name("whole " + name).unlink()
    path.write_bytes(data[:int(len(data) * share)])


BROKEN = ("not a video", "damaged", "too large")         # which of them is for the version of FFmpeg to say
ZOO = {  # file name: (how it is made, what must come of it)
    "empty.mp4": (lambda p: p.write_bytes(b""), "empty"),
    "truncated.mp4": (lambda p: cut(p, "t.mp4", .7), BROKEN),
    "streamable, truncated.mp4": (lambda p: cut(p, "s.mp4", .8, movflags="faststart"), BROKEN),
    "truncated.avi": (lambda p: cut(p, "t.avi", .5, codec="mpeg4"), BROKEN),
    "audio only.mp4": (sound, "no video stream"),
    "one frame.mp4": (lambda p: write(p, images(1)), "reads"),
    "variable frame rate.mkv": (lambda p: write(p, images(6), times=[0, 1, 9, 50, 51, 90]), "reads"),
    "rotated.mp4": (lambda p: write(p, images(6), rotation=90), "reads"),
    "odd size.mkv": (lambda p: write(p, images(6, 33, 47), pixels="yuv444p"), "reads"),
    "wrong extension.avi": (lambda p: write(p, images(6), form="matroska"), "reads"),
    "text.mp4": (lambda p: p.write_text("not a video\n" * 99), "not a video"),
    "missing.mp4": (lambda p: None, "missing"),
    "a loop of links.mp4": (lambda p: os.symlink(p.name, p), "no access"),
    "a pipe.mp4": (os.mkfifo, "not a file"),
    "a folder.mp4": (os.mkdir, "not a file"),
    "пинг-понг 卓球 ü: 100%.mp4": (lambda p: write(p, images(6)), "reads"),
    "no frame rate.avi": (no_rate_avi, "reads"),
    "no frame rate.mp4": (no_rate_mp4, "reads"),
    "huge header.avi": (huge, BROKEN),
    "huge box.mp4": (box_without_end, BROKEN),
}
LOST = {f"{'ab'[k % 2]}/{name}": said for k, (name, (_, said)) in enumerate(ZOO.items()) if said != "reads"}


def all_of_them(videos: dict) -> bool:
    "Are `videos` (path -> reason) those of the zoo that must be lost, with the right reasons?"
    return videos.keys() == LOST.keys() and all(videos[path] in (said if said == BROKEN else (said,)) for path, said in LOST.items())


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    "The zoo as a manifest of two classes, with two sound videos in each."
    folder, rows = tmp_path_factory.mktemp("zoo"), []
    for k, (name, (make, _)) in enumerate(ZOO.items()):
        path = folder / "ab"[k % 2] / name
        path.parent.mkdir(exist_ok=True)
        make(path)
        rows.append(Row(f"{path.parent.name}/{name}", path.parent.name, "all"))
    for k in range(4):
        rows.append(Row(f"{'ab'[k % 2]}/sound {k}.mp4", "ab"[k % 2], "all"))
        write(folder / rows[-1].path, images(9, seed=k))
    return Manifest(rows, ["a", "b"], folder, "zoo")


@pytest.mark.parametrize("workers", [0, 2, 4])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_every_animal_reads_or_is_in_the_ledger(zoo, training, workers):
    "If this fails, a broken video is lost without a word, stops the epoch, or is counted in a test in which it was not seen."
    loader = VideoLoader(VideoClips(zoo, "all", SMALL, training=training, workers=workers), 5)
    batches = list(loader)
    paths, asked = ([x for batch in batches for x in batch[name]] for name in ("path", "asked"))
    assert all_of_them(loader.ledger.videos()) and len(loader.ledger) == len(LOST)
    assert all(batch["video"].shape == (len(batch["path"]), 3, 4, 24, 24) and batch["video"].dtype == torch.uint8 for batch in batches)
    if training:
        assert sorted(asked) == list(range(len(zoo.rows))) and not set(paths) & set(LOST)
        assert loader.ledger.summary()["stand_ins"] == len(LOST)
        for batch in batches: assert batch["label"].tolist() == [zoo.labels(zoo.rows)[i] for i in batch["asked"]]
    else:
        assert [*paths] == [row.path for row in zoo.rows if row.path not in LOST]          # exactly N, each once, in order
        assert loader.ledger.summary()["stand_ins"] == 0


@pytest.mark.parametrize("name", [name for name, (_, said) in ZOO.items() if said == "reads"])
def test_animals_that_read_read_correctly(zoo, name):
    path = next(zoo.path(row) for row in zoo.rows if row.path.endswith("/" + name))
    found = read_frames(path, range)
    count, turned = (1 if "one" in name else 6), "rotated" in name
    expected = images(count, 33, 47) if "odd" in name else images(count)
    expected = np.rot90(expected, 1, axes=(1, 2)) if turned else expected
    assert found.count == count and np.abs(found.images.astype(int) - expected).mean() < 12
    assert (np.stack(list(iterate(path))) == found.images).all()


def test_pictures_above_the_limit_are_refused_before_they_are_decoded(tmp_path):
    with pytest.raises(Unreadable) as caught: read_frames(write(tmp_path / "a.mp4", images(3)), range, max_pixels=1000)
    assert caught.value.reason == "too large" and "40 x 32" in str(caught.value)


def test_a_file_without_permission_is_no_access(tmp_path):
    path = write(tmp_path / "a.mp4", images(3))
    path.chmod(0)
    if os.access(path, os.R_OK): pytest.skip("this user may read everything")
    with pytest.raises(Unreadable) as caught: read_frames(path, range)
    assert caught.value.reason == "no access"


# ---- corruption

def corrupted(folder: Path, count: int):
    "(good file, corrupted copy) pairs: 1 to 30 bytes overwritten, in files of four codecs."
    kinds = [dict(), dict(codec="mpeg4", form="avi"), dict(codec="libvpx-vp9", form="webm", deadline="realtime", **{"cpu-used": 8}),
             dict(form="matroska", bf=0)]
    good = [write(folder / f"good{k}", images(24), **({"form": "mp4"} | kind)) for k, kind in enumerate(kinds)]
    rng = np.random.default_rng(0)
    for n in range(count):
        data = bytearray(good[n % 4].read_bytes())
        for at in rng.integers(len(data), size=rng.integers(1, 31)): data[at] ^= int(rng.integers(1, 256))
        path = folder / f"{n}.mp4"
        path.write_bytes(data)
        yield good[n % 4], path


def outcome(path, reading):
    try: found = read_frames(path, [0, 11, 23], time_limit=60.)
    except AttnnasError as error: return getattr(error, "reason", "too short")
    return found.images.shape


def test_corrupted_files_neither_crash_nor_hang_and_all_are_reported(tmp_path, request):
    "If this fails, a damaged download ends a run, or its pictures are trained on as if nothing were wrong with them."
    count = 1000 if request.config.getoption("--slow") else 100
    pairs = list(corrupted(tmp_path, count))
    found = list(in_workers(outcome, [path for _, path in pairs], workers=1, time_limit=150))
    assert len(found) == count and all(isinstance(f, tuple) or f in REASONS or f == "too short" for f in found)
    assert "time-out" not in found and "damaged" in found
    for k in range(count // 3): os.link(tmp_path / "good0", tmp_path / f"sound {k}.mp4")
    rows = [Row(path.name, "x", "all", hash=file_hash(good)) for good, path in pairs]
    rows += [Row(f"sound {k}.mp4", "x", "all", hash=file_hash(tmp_path / "good0")) for k in range(count // 3)]
    loader = VideoLoader(VideoClips(Manifest(rows, ["x"], tmp_path), "all", SMALL, training=False), 50)
    assert [path for batch in loader for path in batch["path"]] == [row.path for row in rows[count:]]
    assert loader.ledger.videos() == {path.name: "changed" for _, path in pairs}


# ---- hangs and deaths

@pytest.mark.parametrize("workers", [0, 2])
def test_a_decoder_that_hangs_is_given_up_and_named(zoo, monkeypatch, workers):
    "If this fails, one video on a broken disk stops a training for ever."
    def sleepy(path, *rest):
        if path.name == "sound 1.mp4": time.sleep(600)
        return decode._read_pyav(path, *rest)

    monkeypatch.setitem(decode.BACKENDS, "sleepy", sleepy)
    good = Manifest([row for row in zoo.rows if "sound" in row.path], ["a", "b"], zoo.root)
    clips = VideoClips(good, "all", dataclasses.replace(SMALL, backend="sleepy", time_limit=4.), training=True, workers=workers)
    loader, started = VideoLoader(clips, 2), time.monotonic()
    assert sum(len(batch["path"]) for batch in loader) == 4
    assert loader.ledger.videos() == {"b/sound 1.mp4": "time-out"} and loader.ledger.entries[0]["stand_in"] == "b/sound 3.mp4"
    assert sum(len(batch["path"]) for batch in loader) == 4 and len(loader.ledger) == 2    # the second epoch does not wait again
    assert time.monotonic() - started < 60


def test_work_that_nobody_waits_for_is_told_to_stop():
    seen = []
    with pytest.raises(Unreadable, match="time-out"): limited(.2, "x", lambda stop: seen.append(stop.wait(30)))
    for _ in range(100):
        if seen: break
        time.sleep(.05)
    assert seen == [True]
    with pytest.raises(ZeroDivisionError): limited(5, "x", lambda stop: 1 / 0)


class Mined(VideoClips):
    "Reading `sound 3.mp4` kills the reader, as long as the mine lies there."
    def _clip(self, i, epoch, asked):
        if self.rows[i].path == "b/sound 3.mp4" and self.manifest.path(self.rows[i]).with_name("mine").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return super()._clip(i, epoch, asked)


def test_a_killed_worker_is_named_and_its_epoch_can_be_finished(zoo):
    "If this fails, a machine that runs out of memory costs an epoch, and nobody learns over which video."
    mine = zoo.root / "b" / "mine"
    mine.write_bytes(b"")
    clips = Mined(zoo, "all", SMALL, training=False, workers=2)
    loader, seen = VideoLoader(clips, 3), []
    with pytest.raises(AttnnasError, match=r"died \(SIGKILL\) while reading .*sound 3\.mp4"):
        for batch in loader: seen += batch["path"]
    assert 4 <= loader.position <= 7 and len(seen) + len(loader.ledger) == 3 * loader.position
    mine.unlink()
    again = VideoLoader(clips, 3)
    again.load_state_dict(loader.state_dict())
    for batch in again: seen += batch["path"]
    assert seen == [row.path for row in zoo.rows if row.path not in LOST] and all_of_them(again.ledger.videos())


def stopped(task, reading):
    reading(task)
    if task == 3: os.kill(os.getpid(), signal.SIGSTOP)
    return task


def test_a_worker_that_gives_no_sign_is_ended():
    seen, started = [], time.monotonic()
    with pytest.raises(WorkerDied, match="gave no answer for 3 seconds"):
        for answer in in_workers(stopped, range(6), workers=2, time_limit=3.): seen.append(answer)
    assert seen == [0, 1, 2] and time.monotonic() - started < 30


def fails(task, reading): raise AttnnasError("on purpose")


def test_errors_in_workers_arrive_and_leave_no_process_behind():
    with pytest.raises(AttnnasError, match="on purpose"): list(in_workers(fails, [1], workers=2))
    answers = in_workers(stopped, range(3), workers=2)
    next(answers)
    answers.close()
    time.sleep(.1)
    assert not torch.multiprocessing.active_children()


# ---- what comes of broken data

def test_data_of_which_nothing_can_be_read_is_an_error_within_seconds(tmp_path):
    (tmp_path / "x").mkdir()
    for k in range(200): (tmp_path / "x" / f"{k}.mp4").write_bytes(b"" if k % 2 else b"text")
    started = time.monotonic()
    for training in (True, False):
        with pytest.raises(AttnnasError, match="None of the 200 videos"): VideoClips(tmp_path, "all", SMALL, training=training)
    lost = Manifest([Row("x/0.mp4", "x", "all", status="damaged")], ["x"], tmp_path)
    with pytest.raises(AttnnasError, match="the manifest says so"): VideoClips(lost, "all", SMALL, training=True)
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("workers", [0, 2])
def test_a_class_without_a_readable_video_is_named_in_training(tmp_path, workers):
    for name in "ab": (tmp_path / name).mkdir()
    write(tmp_path / "a/1.mp4", images(5))
    for k in range(3): (tmp_path / "b" / f"{k}.mp4").write_bytes(b"")
    loader = VideoLoader(VideoClips(tmp_path, "all", SMALL, training=True, workers=workers), 4)
    with pytest.raises(AttnnasError, match="No readable video of class 'b'"): list(loader)


def test_losses_known_to_the_manifest_are_not_tried_again(zoo, monkeypatch):
    status = {path: said[1] if said == BROKEN else said for path, said in LOST.items()}
    rows = [dataclasses.replace(row, status=status.get(row.path, "ok")) for row in zoo.rows]
    known = Manifest(rows, zoo.classes, zoo.root)
    clips = VideoClips(known, "all", SMALL, training=False)
    kept = clips.readable()
    assert len(clips) == len(rows) and len(kept) == len(rows) - len(LOST)
    assert kept.batch(torch.arange(len(kept))).shape == (len(kept), 3, 4, 24, 24)
    with pytest.raises(Unreadable, match="empty"): clips.batch(torch.tensor([0]))
    assert known.summary()["splits"]["all"]["lost"] == dict(Counter(status.values()))


def test_the_ledger_is_a_table(zoo, tmp_path):
    loader = VideoLoader(VideoClips(zoo, "all", SMALL, training=True), 8)
    for batch in loader: pass
    loader.ledger.save(tmp_path / "ledger.csv")
    lines = (tmp_path / "ledger.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].split(",") == list(Ledger.FIELDS) and len(lines) == len(LOST) + 1


# ---- clips

@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "A folder of two classes with three sound videos each, 5 to 40 frames long."
    folder = tmp_path_factory.mktemp("plain")
    for k, count in enumerate((40, 30, 5, 21, 33, 12)):
        (folder / "ab"[k % 2]).mkdir(exist_ok=True)
        write(folder / "ab"[k % 2] / f"{k}.mp4", images(count, seed=k))
    return folder


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_change_nothing(plain, workers):
    loaders = [VideoLoader(VideoClips(plain, "all", SMALL, training=True, workers=n), 4) for n in (0, workers)]
    for _ in range(2):
        for ours, theirs in zip(*loaders, strict=True):
            assert ours["path"] == theirs["path"] and ours["video"].equal(theirs["video"]) and ours["frames"].equal(theirs["frames"])


def test_an_epoch_stopped_and_resumed_is_the_same_epoch(plain):
    clips = VideoClips(plain, "all", SMALL, training=True)
    whole, first, parts = VideoLoader(clips, 4), VideoLoader(clips, 4), []
    whole = [batch["video"] for _ in range(2) for batch in whole]
    for batch in first:
        parts.append(batch["video"])
        break
    second = VideoLoader(VideoClips(plain, "all", SMALL, training=True, workers=2), 4)
    second.load_state_dict(first.state_dict())
    parts += [batch["video"] for _ in range(2) for batch in second]
    assert len(parts) == len(whole) == 4 and all(a.equal(b) for a, b in zip(parts, whole))


def test_training_clips_begin_anywhere_and_are_drawn_once(plain):
    clips = VideoClips(plain, "all", dataclasses.replace(SMALL, stride=2), training=True)
    starts = {clips[epoch, 0]["frames"][0].item() for epoch in range(60)}
    assert min(starts) == 0 and 30 <= max(starts) <= 33 and len(starts) > 15             # 40 frames, the last start is 33
    sample = clips[7, 0]
    assert sample["frames"].diff().tolist() == [2, 2, 2] and sample["count"] == 40 and sample["label"] == 0
    assert sample["times"].tolist() == pytest.approx([k / 25 for k in sample["frames"].tolist()])
    assert not clips[1, 0]["video"].equal(clips[2, 0]["video"]) and clips[1, 0]["video"].equal(clips[1, 0]["video"])


def test_a_crop_and_a_mirror_are_the_same_in_all_frames(tmp_path):
    "If this fails, augmentation is drawn for each frame, and a still picture seems to move."
    (tmp_path / "x").mkdir()
    write(tmp_path / "x/still.mp4", np.repeat(images(1), 20, 0), qp=0)
    clips = VideoClips(tmp_path, "all", SMALL, training=True)
    shown = [clips[epoch, 0]["video"] for epoch in range(6)]
    for video in shown: assert (video[:, 1:].int() - video[:, :1].int()).abs().max() <= 8
    assert len({video[0, 0].sum().item() for video in shown}) == 6


def test_test_clips_are_where_they_should_be(plain):
    assert clip_frames(300, TEST, .5) == list(range(25, 275)) and clip_frames(250, TEST, .5) == list(range(250))
    assert clip_frames(100, TEST, .5) == [k % 100 for k in range(250)]
    row = VideoClips(plain, "all", SMALL, training=False)[0]
    assert row["frames"].tolist() == [18, 19, 20, 21] and row["video"].shape == (3, 4, 24, 24)
    many = VideoClips(plain, "all", dataclasses.replace(SMALL, views=3, crops=3), training=False)[0]
    assert many["video"].shape == (9, 3, 4, 24, 24) and many["frames"].tolist() == [*range(6, 10), *range(18, 22), *range(30, 34)]
    left, middle, right = many["video"][3:6]
    assert middle.equal(row["video"]) and left[..., 3:].float().sub(middle[..., :-3]).abs().mean() < 1     # 30 wide, 24 seen


def test_clips_are_a_clip_source_and_a_plain_folder_needs_no_manifest(plain):
    clips = VideoClips(plain, "all", SMALL, training=False)
    assert isinstance(clips, ClipSource) and clips.classes == ["a", "b"] and clips.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert clips.fingerprint != VideoClips(plain, "all", dataclasses.replace(SMALL, stride=2), training=False).fingerprint
    folder_manifest(plain).save(plain / "plain.csv")
    assert VideoClips(plain / "plain.csv", "all", SMALL, training=False)[3]["video"].equal(clips[3]["video"])


def test_a_transform_of_torchvision_takes_the_place_of_the_default(plain):
    from torchvision.transforms import v2
    clips = VideoClips(plain, "all", SMALL, training=True, transform=v2.Compose([v2.Resize((20, 20)), v2.ColorJitter(brightness=.5)]))
    assert clips[0]["video"].shape == (3, 4, 20, 20)


def test_pytorchvideo_takes_the_same_manifest(plain):
    pytest.importorskip("pytorchvideo.data")
    from pytorchvideo.data import LabeledVideoDataset, make_clip_sampler
    manifest = folder_manifest(plain)
    theirs = LabeledVideoDataset(manifest.labelled_paths("all"), make_clip_sampler("random", .16), decode_audio=False,
                                 video_sampler=torch.utils.data.SequentialSampler)
    assert [(clip["video_name"], clip["label"]) for clip in theirs] == \
        [(Path(row.path).name, label) for row, label in zip(manifest.rows, manifest.labels(manifest.rows).tolist())]


def test_settings_that_cannot_be(plain):
    with pytest.raises(AttnnasError, match="frames = 0"): ClipConfig(frames=0)
    with pytest.raises(AttnnasError, match="Did you mean 'both'"): ClipConfig(stream="bot")
    with pytest.raises(AttnnasError, match="for tests"): VideoClips(plain, "all", dataclasses.replace(SMALL, views=2), training=True)
    with pytest.raises(AttnnasError, match="no split 'train'"): VideoClips(plain, "train", SMALL, training=True)
    with pytest.raises(AttnnasError, match="batch_size is 0"): VideoLoader(VideoClips(plain, "all", SMALL, training=True), 0)
