"Frames as a player shows them, whatever the container; pixels, random sources and rates that are kept or refused."
import importlib.util
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from attnnas.core.errors import AttnnasError
from attnnas.data import decode
from attnnas.data.copies import extract_flow, transcode
from attnnas.data.cutting import ClipConfig
from attnnas.data.decode import iterate, probe, read_frames
from attnnas.data.images import read_image
from attnnas.data.journal import file_stamp, for_each
from attnnas.data.layout import folder_manifest
from attnnas.data.prepare import examine
from attnnas.data.randomness import seeded, sources_of
from attnnas.data.unreadable import Unreadable
from attnnas.data.video import VideoClips, VideoLoader

av = pytest.importorskip("av")
BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "frames.py"
spec = importlib.util.spec_from_file_location("generated_frames", BENCHMARK)
generated = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generated)


def film(path, count=40, codec="libx264", pixels="yuv420p", times=None, side=(96, 128), **options):
    "Write numbered pictures; `times` in milliseconds."
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {name: str(value) for name, value in options.items()}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = side
        stream.pix_fmt = pixels
        if times: stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(count):
            image = av.VideoFrame.from_ndarray(generated.picture(k), format="rgb24")
            frame = image.reformat(side[1], side[0], pixels)
            if times:
                frame.pts = times[k]
                frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(images) -> list: return [generated.number_of(image) for image in images]


def wrong(path) -> str: return generated.check(path, random.Random(0))


# ---- frames

@pytest.mark.parametrize("name, codec, options", [
    ("h264.avi", "libx264", {"bf": 2}), ("mpeg4.avi", "mpeg4", {"bf": 2}),
    ("h264.flv", "libx264", {"bf": 2}), ("mpeg2.mpg", "mpeg2video", {"bf": 2}),
    ("open.ts", "libx264", {"x264-params": "open-gop=1:bframes=3:keyint=10"}),
    ("refreshed.mkv", "libx264", {"x264-params": "intra-refresh=1:bframes=0:keyint=10"}),
    ("fields.mp4", "libx264", {"x264-params": "interlaced=1"}), ("hevc.mp4", "libx265", {"g": 9}),
    ("hidden.mkv", "libvpx", {"auto-alt-ref": 1, "lag-in-frames": 12, "cpu-used": 5}),
    ("hidden.webm", "libvpx-vp9", {"auto-alt-ref": 1, "lag-in-frames": 12, "cpu-used": 8})])
def test_frame_k_is_the_kth_that_is_shown(tmp_path, name, codec, options):
    "If this fails, clips of such files show other frames than they say, silently."
    path = film(tmp_path / name, codec=codec, **options)
    assert numbers(iterate(path)) == list(range(40)) and not wrong(path)


@pytest.mark.parametrize("ending", ["avi", "mkv", "mp4"])
def test_two_pictures_in_a_packet(tmp_path, ending):
    "If this fails, clips of UCF101 and HMDB51 are out of order."
    for k in range(3):
        path = tmp_path / f"{k}.{ending}"
        count = generated.packed(path, random.Random(k))
        assert not wrong(path) and probe(path, full=False).frames == count


@pytest.mark.parametrize("cut", generated.CUTS, ids=[cut.__name__ for cut in generated.CUTS])
def test_files_that_were_cut_without_encoding_them(tmp_path, cut):
    "If this fails, frames of cut or damaged files are lost, or numbered by wrong times."
    source = film(tmp_path / "whole.mp4", bf=2, g=12)
    for ending in ("mp4", "mkv"):
        path = tmp_path / f"cut.{ending}"
        options = {"avoid_negative_ts": "disabled"} if cut is generated.hidden_head else {}
        try: generated.copied(source, path, lambda ps: cut(ps, random.Random(1)), options)
        except (av.error.FFmpegError, ValueError): continue         # Matroska takes no such times
        said = wrong(path)
        assert not said or said.startswith("refused")


def test_generated_files(tmp_path):
    "If this fails, run benchmarks/frames.py: it makes a thousand of these and says which are wrong."
    for number in range(2000, 2012):
        draw = random.Random(number)
        try: path, how = generated.make(tmp_path, number, draw)
        except (av.error.FFmpegError, ValueError, IndexError): continue
        said = generated.check(path, draw)
        assert not said or said.startswith("refused"), how


@pytest.mark.parametrize("name, options", [
    ("a.mp4", {}), ("a.mkv", {"bf": 2}), ("a.mov", {"bf": 0}),
    ("a.webm", {"codec": "libvpx-vp9", "deadline": "realtime", "cpu-used": 8})])
def test_ordinary_files_are_entered_in_the_middle(tmp_path, monkeypatch, name, options):
    "If this fails, the last clip of a long video costs as much as all of it."
    path = film(tmp_path / name, count=100, g=10, **options)
    whole = [image.copy() for image in iterate(path)]
    seen = []

    def counted(*arguments, once=decode._decoded):
        for frame in once(*arguments):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(decode, "_decoded", counted)
    found = read_frames(path, [97, 99])
    assert found.count == 100 and (found.images == np.stack(whole)[[97, 99]]).all()
    assert len(seen) <= 20


def test_times_of_files_that_are_counted(tmp_path):
    path = film(tmp_path / "a.ts", count=30, bf=2)
    assert read_frames(path, [0, 3, 29]).times == pytest.approx([0, .12, 1.16], abs=1e-3)
    assert probe(path).rate == pytest.approx(25) and probe(path) == probe(path, full=False)


def test_longer_files_are_decoded_again_rather_than_kept(tmp_path, monkeypatch):
    path = film(tmp_path / "a.avi", bf=2)
    few = read_frames(path, [5, 30, 2])
    monkeypatch.setattr(decode, "_KEPT", 100_000)
    again = read_frames(path, [5, 30, 2])
    assert numbers(again.images) == [5, 30, 2] and (again.images == few.images).all()


# ---- random sources

class Draws:
    "A transform that draws from everything, and shows what it drew."
    def __init__(self):
        self.own = {"new": np.random.default_rng(0), "old": [np.random.RandomState(0)]}
        self.python = random.Random(0)
        self.torch = torch.Generator()

    def __call__(self, pictures):
        import cv2
        drawn = [np.random.randint(256), random.randrange(256), int(torch.randint(256, ())),
                 self.own["new"].integers(256), self.own["old"][0].randint(256),
                 self.python.randrange(256),
                 int(torch.randint(256, (), generator=self.torch)),
                 int(cv2.randu(np.zeros((1, 1), np.uint8), 0, 256)[0, 0])]
        shown = torch.tensor(drawn, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 8, 8)
        return {"video": shown}

    def __repr__(self): return "Draws()"


def test_every_random_source_is_a_function_of_epoch_and_clip(tmp_path):
    "If this fails, an augmentation repeats itself in every epoch, or follows the number of workers."
    pytest.importorskip("cv2")
    for k in range(4): film(tmp_path / "x" / f"{k}.mp4", count=8)

    def epochs(workers, count):
        clips = VideoClips(tmp_path, "all", ClipConfig(frames=8, size=8), training=True,
                           transform=Draws(), workers=workers)
        loader = VideoLoader(clips, 2)
        return [[clip[0, :, 0, 0].tolist() for batch in loader for clip in batch["video"]]
                for _ in range(count)]

    alone = epochs(0, 2)
    assert alone[:1] == epochs(2, 1)
    drawn = [tuple(clip[source] for epoch in alone for clip in epoch) for source in range(8)]
    assert all(len(set(values)) > 4 for values in drawn) and len(set(drawn)) == 8


def test_random_sources_go_on_as_before():
    "If this fails, reading a clip changes what the training around it draws."
    np.random.seed(3)
    random.seed(3)
    torch.manual_seed(3)
    expected = np.random.rand(), random.random(), torch.rand(()).item()
    np.random.seed(3)
    random.seed(3)
    torch.manual_seed(3)
    with seeded(1): np.random.rand(), random.random(), torch.rand(())
    assert (np.random.rand(), random.random(), torch.rand(()).item()) == expected


def test_generators_are_found_where_transforms_keep_them():
    first, second, third = (np.random.default_rng(k) for k in range(3))

    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.again = self
            self.rng = first

    def closing_over(picture): return picture + second.random()

    held = [torch.nn.Sequential(Inner()), closing_over, {"a": (third, third)}]
    found = sources_of(held)
    assert len(found) == 3 and {id(f) for f in found} == {id(first), id(second), id(third)}


# ---- colours and flow

def test_what_changes_the_frames_of_colours_changes_those_of_flow(tmp_path):
    "If this fails, a network of two streams learns from flow that belongs to other frames."
    pytest.importorskip("cv2")
    from torchvision.transforms import v2
    film(tmp_path / "clips/a/1.mp4", count=16)
    extract_flow(folder_manifest(tmp_path / "clips"), tmp_path / "flow", "dis", workers=0,
                 progress=False)
    config = ClipConfig(frames=8, size=64, stream="both")

    def clip(transform):
        return VideoClips(tmp_path / "clips", "all", config, training=True, transform=transform,
                          flow=tmp_path / "flow")[0]

    whole = clip(v2.Identity())
    half = clip(v2.UniformTemporalSubsample(4))
    chosen = [0, 2, 4, 7]
    assert half["video"].equal(whole["video"][:, chosen])
    assert half["flow"].equal(whole["flow"][:, chosen])

    def shorter(pictures): return pictures | {"video": pictures["video"][::2]}
    def alone(pictures): return {"video": pictures["video"]}
    for transform in (shorter, alone):
        with pytest.raises(AttnnasError, match="same streams, with equal T, H and W"):
            clip(transform)


# ---- images

@pytest.mark.parametrize("name", ["ramp.png", "ramp.tif", "ramp.jp2"])
def test_greys_of_16_bits_stay_apart(tmp_path, name):
    "If this fails, X-rays and depth become white or black."
    Image = pytest.importorskip("PIL.Image")
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (32, 1))
    try: Image.fromarray(ramp).save(tmp_path / name)
    except (OSError, KeyError): pytest.skip("this Pillow cannot write it")
    image = read_image(tmp_path / name)
    assert image.shape == (3, 32, 256) and (image[0] == torch.arange(256)).float().mean() > .9


@pytest.mark.parametrize("pixels, name", [
    (np.arange(4096, dtype=np.uint16).reshape(64, 64), "12 bits.png"),
    (np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64), "numbers.tif"),
    (np.arange(-2048, 2048, dtype=np.int32).reshape(64, 64), "integers.tif")])
def test_greys_that_no_byte_can_hold_are_refused(tmp_path, pixels, name):
    "If this fails, such pictures are black or white in the training data, silently."
    Image = pytest.importorskip("PIL.Image")
    Image.fromarray(pixels).save(tmp_path / name)
    with pytest.raises(Unreadable) as caught: read_image(tmp_path / name)
    assert caught.value.reason == "not an image" and caught.value.detail


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_a_drawing_on_nothing_is_seen_on_white(tmp_path, mode):
    "If this fails, a black drawing on nothing is a black square."
    Image = pytest.importorskip("PIL.Image")
    drawing = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (0, 0, 4, 8))
    options = {}
    if mode == "P":
        drawing = Image.new("P", (8, 8), 0)
        drawing.putpalette([0, 0, 0, 0, 0, 0])
        drawing.paste(1, (0, 0, 4, 8))
        options = {"transparency": 0}
    else: drawing = drawing.convert(mode)
    drawing.save(tmp_path / "a.png", **options)
    image = read_image(tmp_path / "a.png")
    assert (image[..., :4] == 0).all() and (image[..., 4:] == 255).all()


# ---- one video and the others

@pytest.mark.parametrize("seconds", [.5, 3.7, 3600, 7 * 24 * 3600])
def test_a_copy_is_as_long_as_its_original(tmp_path, seconds):
    times = [round(1000 * seconds * k) for k in range(3)]
    film(tmp_path / "videos/a/slow.mkv", count=3, times=times, bf=0)
    before = examine(folder_manifest(tmp_path / "videos"), tmp_path / "m.csv", workers=0,
                     progress=False)
    after = transcode(before, tmp_path / "copies", tmp_path / "copies.csv", 32, workers=0,
                      progress=False)
    assert after.rows[0].status == "ok" and after.rows[0].frames == 3
    assert after.rows[0].duration == pytest.approx(before.rows[0].duration, rel=.01)


@pytest.mark.parametrize("method", ["dis", "farneback"])
def test_a_small_video_does_not_stop_the_flow_of_others(tmp_path, method):
    "If this fails, hours of flow end at the first video of eight pixels."
    pytest.importorskip("cv2")
    for name, side in (("a/1", 64), ("a/small", 8), ("b/2", 64)):
        film(tmp_path / f"videos/{name}.mp4", count=4, side=(side, side))
    done = extract_flow(folder_manifest(tmp_path / "videos"), tmp_path / "flow", method, workers=0,
                        progress=False)
    lost = {"no flow": 1} if method == "dis" else {}
    assert done == {"videos": 3, "flows": 12 - 4 * len(lost), "lost": lost}


def test_an_error_of_one_file_is_its_own_and_one_of_the_disk_is_all_s(tmp_path):
    "If this fails, one file stops a preparation, or a full disk is taken for a thousand bad files."
    def work(path, reading):
        if path == "odd": raise ZeroDivisionError("nothing")
        if path == "full": raise AttnnasError("Could not write: no space")
        return {"status": "ok"}

    stamp = file_stamp(tmp_path)
    options = {"workers": 0, "progress": False}
    found = for_each(work, ["a", "odd", "b"], stamp, tmp_path / "journal", **options)
    assert [found[name]["status"] for name in ("a", "odd", "b")] == ["ok", "failed", "ok"]
    assert "ZeroDivisionError: nothing" in found["odd"]["detail"]
    with pytest.raises(AttnnasError, match="no space"):
        for_each(work, ["a", "full", "c"], stamp, tmp_path / "journal", **options)
