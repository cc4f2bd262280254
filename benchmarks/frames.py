"""Are frames numbered as a player shows them? Generated files of many containers, codecs and cuts.

Every file is made of numbered pictures: encoded with random settings, then often changed without
encoding it again, as editors, downloads and old cameras do it. Clips of several strides and starts,
single frames, `iterate` and `probe` are compared, pixel by pixel, with plain sequential decoding.

    python benchmarks/frames.py [--files 1000] [--seed 0]  ->  results/bench/frames.csv

A file is "entered" where decoding may begin in its middle, and "counted" where it is decoded from
its beginning. "refused" files are lost with a reason, as they are damaged for any decoder.
"""
import argparse
import os
import random
import struct
import tempfile
import threading
from collections import Counter, defaultdict
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd

from attnnas.core.errors import AttnnasError
from attnnas.data import decode
from attnnas.data.codec import pyav

os.environ["SVT_LOG"] = "1"      # errors only
av = pyav()
RESULTS = Path(__file__).resolve().parent.parent / "results" / "bench" / "frames.csv"
HIGH, WIDE = 96, 128            # a size that H.263 has
BITS = 8


# ---- pictures

def picture(number: int) -> np.ndarray:
    "Return a picture that shows its number as eight bright or dark columns: (HIGH, WIDE, 3)."
    image = np.full((HIGH, WIDE, 3), 40, np.uint8)
    width = WIDE // BITS
    for bit in range(BITS):
        if number >> bit & 1: image[:, bit * width:(bit + 1) * width] = 215
    return image


def number_of(image: np.ndarray) -> int:
    "Read the number of a picture of any size."
    width = image.shape[1] // BITS
    middles = [image[:, b * width + width // 4:(b + 1) * width - width // 4] for b in range(BITS)]
    return sum(int(middle.mean() > 127) << b for b, middle in enumerate(middles))


# ---- what can be written

X264 = [{"bf": "0"}, {"bf": "2"}, {"bf": "3", "b-pyramid": "normal"}, {"bf": "1", "slices": "4"},
        {"x264-params": "open-gop=1:bframes=3"}, {"x264-params": "intra-refresh=1:bframes=0"},
        {"x264-params": "interlaced=1"}, {"x264-params": "aud=1:bframes=2"},
        {"tune": "zerolatency"}]
X265 = [{"x265-params": f"log-level=none:{more}"}
        for more in ("bframes=0", "bframes=3", "open-gop=0:bframes=2", "open-gop=1:b-pyramid=1")]
B_FRAMES = [{"bf": "0"}, {"bf": "1"}, {"bf": "2"}]
VPX = [{"deadline": "realtime", "cpu-used": "8"},
       {"auto-alt-ref": "1", "lag-in-frames": "12", "cpu-used": "5", "b": "60k"}]
CODECS = {"libx264": X264, "libx265": X265, "mpeg4": B_FRAMES, "mpeg2video": B_FRAMES,
          "mpeg1video": B_FRAMES, "libvpx": VPX, "libvpx-vp9": VPX,
          "libsvtav1": [{"preset": "12"}]}
PIXELS = {"mjpeg": "yuvj420p", "qtrle": "rgb24", "png": "rgb24", "huffyuv": "yuv422p",
          "prores_ks": "yuv422p10le", "gif": "rgb8", "apng": "rgb24", "dnxhd": "yuv422p",
          "cinepak": "rgb24", "zmbv": "bgr0", "flashsv": "bgr24", "utvideo": "yuv422p"}
CONTAINERS = {
    "mp4": "libx264 libx264 libx264 libx265 mpeg4 mjpeg libvpx-vp9 libsvtav1 mpeg2video",
    "mov": "libx264 libx264 libx265 mpeg4 mjpeg prores_ks qtrle png mpeg2video",
    "mkv": "libx264 libx264 libx264 libx265 mpeg4 mjpeg libvpx libvpx-vp9 libsvtav1 ffv1 "
            "mpeg2video mpeg1video huffyuv wmv2 rv20 snow utvideo msmpeg4",
    "webm": "libvpx libvpx-vp9 libsvtav1",
    "avi": "libx264 libx264 libx265 mpeg4 mpeg4 msmpeg4 msmpeg4v2 mjpeg huffyuv ffv1 wmv1 wmv2 "
            "mpeg2video libvpx cinepak zmbv flv h263p",
    "ts": "libx264 libx265 mpeg4 mpeg2video mpeg1video",
    "mpg": "mpeg1video mpeg2video",
    "vob": "mpeg2video libx264",
    "flv": "flv libx264 flashsv",
    "ogv": "libvpx",
    "3gp": "h263 mpeg4 libx264",
    "wmv": "wmv1 wmv2 msmpeg4 mpeg4 libx264 mjpeg",
    "rm": "rv10 rv20",
    "mxf": "mpeg2video",
    "nut": "libx264 mpeg4 ffv1 libvpx",
    "ivf": "libvpx libvpx-vp9 libsvtav1",
    "gif": "gif",
    "apng": "apng",
    "h264": "libx264",
    "hevc": "libx265",
    "m4v": "mpeg4",
    "m2v": "mpeg2video",
    "wtv": "mpeg2video",
    "swf": "flv mjpeg",
}
MUXERS = {"mp4": [{}, {"movflags": "frag_keyframe+empty_moov"}, {"movflags": "faststart"},
                  {"use_editlist": "0"}, {"movflags": "negative_cts_offsets"}],
          "mkv": [{}, {"reserve_index_space": "0"}, {"cluster_time_limit": "100"}]}


def encode(path: Path, draw: random.Random, codec: str) -> int:
    "Write a file of numbered pictures. Returns: their number."
    count = draw.randint(8, 60)
    options = dict(draw.choice(CODECS.get(codec, [{}])))
    options["g"] = str(draw.choice([4, 7, 12, 250]))
    if codec == "libx264": options |= {"preset": "veryfast"}
    if codec == "libx265": options |= {"preset": "ultrafast"}
    uneven = path.suffix in (".mkv", ".mp4", ".mov", ".webm", ".nut") and draw.random() < .2
    muxer = draw.choice(MUXERS.get(path.suffix[1:], [{}]))
    with av.open(str(path), "w", container_options=muxer) as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = HIGH, WIDE
        stream.pix_fmt = PIXELS.get(codec, "yuv420p")
        stream.codec_context.thread_count = 1
        if uneven: stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        time = 0
        for k in range(count):
            frame = av.VideoFrame.from_ndarray(picture(k), format="rgb24")
            if uneven:
                time += draw.choice([3, 40, 40, 40, 500])
                frame.pts = time
                frame.time_base = Fraction(1, 1000)
            container.mux(stream.encode(frame.reformat(format=stream.pix_fmt)))
        container.mux(stream.encode())
    return count


# ---- what becomes of a file without encoding it again

def copied(source: Path, target: Path, change, options=None):
    """Copy the packets of a file.

    change: (list of packets) -> (list of packets); it may move their times.
    options: of the container that is written.
    """
    with av.open(str(source)) as old:
        stream = old.streams.video[0]
        packets = [packet for packet in old.demux(stream) if packet.size]
        if any(packet.dts is None for packet in packets): raise ValueError("no times to copy")
        with av.open(str(target), "w", container_options=options or {}) as new:
            copy = new.add_stream_from_template(stream)
            for packet in change(packets):
                packet.stream = copy
                new.mux(packet)


def moved(packets: list, by: int) -> list:
    for packet in packets:
        packet.dts += by
        if packet.pts is not None: packet.pts += by
    return packets


def step_of(packets: list) -> int:
    "Return the usual distance between two packets."
    if len(packets) < 2: return 1
    return max(1, round((packets[-1].dts - packets[0].dts) / (len(packets) - 1)))


def keys_of(packets: list) -> list:
    return [i for i, packet in enumerate(packets) if packet.is_keyframe]


def from_a_key_frame(packets, draw):
    first = draw.choice(keys_of(packets))
    return moved(packets[first:], -packets[first].dts)


def hidden_head(packets, draw):
    "What ffmpeg -ss does with -c copy: what is before the cut has negative times."
    cut = draw.randint(1, max(1, len(packets) // 2))
    key = max(k for k in keys_of(packets) if k <= cut)
    return moved(packets[key:], -packets[cut].dts)


def from_any_frame(packets, draw):
    first = draw.randint(1, len(packets) - 1)
    return moved(packets[first:], -packets[first].dts)


def with_a_hole(packets, draw):
    first = draw.randint(1, len(packets) - 1)
    return packets[:first] + packets[first + draw.randint(1, 3):]


def without_tail(packets, draw):
    return packets[:draw.randint(1, len(packets))]


def shown_when_decoded(packets, draw):
    "What copying from AVI gives: the order of decoding taken for that of showing."
    for packet in packets: packet.pts = packet.dts
    return packets


def pictures_without_times(packets, draw):
    for packet in draw.sample(packets, max(1, len(packets) // 4)): packet.pts = None
    return packets


def shuffled_times(packets, draw):
    "Wrong times of showing, never before decoding."
    step = step_of(packets)
    for packet in packets: packet.pts = packet.dts + step * draw.randint(0, 3)
    return packets


def delayed(packets, draw): return moved(packets, draw.randint(1, 90) * step_of(packets))


def joined(packets, draw):
    "A film after itself; the second time shows what is after a random key frame."
    first = draw.choice(keys_of(packets))
    step = step_of(packets)
    return packets[:first] + moved(packets[first:], step * draw.randint(1, 40))


def settings_alone(packets, draw):
    "A packet in the middle that holds no picture: for H.264 a delimiter, elsewhere filling."
    at = draw.randint(1, len(packets) - 1)
    step = step_of(packets)
    extra = av.Packet(b"\0\0\0\2\x09\xf0")
    extra.dts = packets[at].dts
    extra.pts = packets[at].dts
    extra.time_base = packets[at].time_base
    return packets[:at] + [extra] + moved(packets[at:], step)


CUTS = [from_a_key_frame, hidden_head, hidden_head, from_any_frame, with_a_hole, without_tail,
        shown_when_decoded, pictures_without_times, shuffled_times, delayed, joined, settings_alone]
# After a lost packet these decoders show what their memory held: no two readings need agree.
LOSSES = (with_a_hole, from_any_frame)
UNDEFINED = ("ffv1", "libvpx", "libvpx-vp9", "zmbv", "snow", "flashsv", "cinepak")
COPIES = {"mp4": ["mp4", "mov", "mkv", "ts", "avi"], "mov": ["mov", "mp4", "mkv"],
          "mkv": ["mkv", "mp4", "avi", "ts", "mov"], "webm": ["webm", "mkv"], "avi": ["avi", "mkv"],
          "ts": ["ts", "mp4", "mkv"], "flv": ["flv", "mp4", "mkv"], "nut": ["nut", "mkv"],
          "3gp": ["3gp", "mp4"], "mpg": ["mpg", "ts", "mkv"], "wmv": ["wmv", "mkv", "avi"]}


def with_edits(path: Path, draw: random.Random):
    "Change the edit list of an MP4 file by hand: another beginning, another length."
    data = bytearray(path.read_bytes())
    at = data.find(b"elst")
    if at < 0 or data[at + 4] or struct.unpack(">I", data[at + 8:at + 12])[0] != 1:
        raise ValueError("no edit list of one entry")
    length, begin = struct.unpack(">Ii", data[at + 12:at + 20])
    begin += draw.choice([0, 512, 512 * 5, 512 * 13])
    length = max(1, round(length * draw.choice([1, .9, .5])))
    data[at + 12:at + 20] = struct.pack(">Ii", length, begin)
    path.write_bytes(data)


# ---- packed B-frames

NOT_CODED = (b"\0\0\1\xb6\x50\x4f", False)       # "as before", where a picture was sent earlier


def packed(path: Path, draw: random.Random) -> int:
    "Write MPEG-4 as DivX and XviD packed it: a picture and the B-frame after it in one packet."
    coder = av.CodecContext.create("mpeg4", "w")
    coder.width, coder.height, coder.pix_fmt = WIDE, HIGH, "yuv420p"
    coder.time_base = Fraction(1, 25)
    coder.framerate = Fraction(25)
    coder.options = {"bf": str(draw.choice([1, 2])), "g": str(draw.choice([5, 12, 30]))}
    coder.thread_count = 1
    count = draw.randint(8, 60)
    coded = []
    for k in range(count):
        frame = av.VideoFrame.from_ndarray(picture(k), format="rgb24").reformat(format="yuv420p")
        frame.pts = k
        coded += [bytes(packet) for packet in coder.encode(frame)]
    coded += [bytes(packet) for packet in coder.encode()]
    said = draw.choice([b"DivX503b1393p", b"DivX501b481p", b"XviD0046"])
    packets = []
    waiting = False
    for data in coded:
        at = data.find(b"\0\0\1\xb6")
        kind = data[at + 4] >> 6
        if kind == 0: data = data[:at] + b"\0\0\1\xb2" + said + data[at:]
        is_b = kind == 2
        if is_b and packets and not waiting:
            packets[-1] = (packets[-1][0] + data, packets[-1][1])
            waiting = True
        elif is_b: packets.append((data, False))
        else:
            if waiting: packets.append(NOT_CODED)
            waiting = False
            packets.append((data, kind == 0))
    if waiting: packets.append(NOT_CODED)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = HIGH, WIDE, "yuv420p"
        if path.suffix == ".avi": stream.codec_context.codec_tag = "XVID"
        container.start_encoding()
        for i, (data, is_key) in enumerate(packets):
            packet = av.Packet(data)
            packet.stream = stream
            packet.pts = packet.dts = i
            packet.time_base = Fraction(1, 25)
            packet.is_keyframe = is_key
            container.mux(packet)
    return count


# ---- one file

def make(folder: Path, number: int, draw: random.Random) -> tuple[Path, str]:
    "Write one file. Returns: it, and how it was made. Raises: what a muxer raises."
    if draw.random() < .08:
        path = folder / f"{number}.{draw.choice(['avi', 'avi', 'mkv', 'mp4'])}"
        packed(path, draw)
        return path, "mpeg4 packed"
    ending = draw.choice(list(CONTAINERS) + ["mp4", "mkv", "mov", "avi"] * 8)
    codec = draw.choice(CONTAINERS[ending].split())
    path = folder / f"{number}.{ending}"
    encode(path, draw, codec)
    kind = draw.random()
    if kind < .3 or ending not in COPIES: return path, f"{codec} whole"
    if kind < .4 and ending in ("mp4", "mov"):
        with_edits(path, draw)
        return path, f"{codec} edit list by hand"
    target = folder / f"{number} copy.{draw.choice(COPIES[ending])}"
    cut = draw.choice(CUTS)
    if cut in LOSSES and codec in UNDEFINED: cut = from_a_key_frame
    options = {"avoid_negative_ts": "disabled"} if cut is hidden_head else {}
    copied(path, target, lambda packets: cut(packets, draw), options)
    return target, f"{codec} {cut.__name__.replace('_', ' ')}"


def reference(path: Path) -> list:
    "Decode a file from its beginning to its end: the images, all of the size of the first."
    images = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            size = images[0].shape[1::-1] if images else (frame.width, frame.height)
            images.append(frame.reformat(*size, format="rgb24").to_ndarray())
    return images


def asked(count: int, draw: random.Random) -> list:
    "Return lists of frame numbers, as clips of several strides and starts ask for them."
    wanted = [list(range(count)), list(range(0, count, 2)), [count - 1], [0]]
    for stride in (1, 2, 3, 8):
        first = draw.randrange(count)
        wanted.append([(first + k * stride) % count for k in range(8)])
    clip = range(draw.randrange(count), count)[:8]
    return [*wanted, list(clip), list(reversed(clip)), draw.sample(range(count), min(3, count))]


def is_entered(path: Path) -> bool:
    with decode._opened(path, decode.MAX_PIXELS) as (container, stream):
        return decode._scan(container, stream, path, threading.Event()) is not None


def check(path: Path, draw: random.Random) -> str:
    "Compare a file with its reference. Returns: \"\", \"refused: ...\", or what is wrong."
    try: truth = reference(path)
    except (av.error.FFmpegError, ValueError, IndexError) as error:
        truth = []
        said = error
    else: said = "no frames"
    try: seen = list(decode.iterate(path))
    except AttnnasError as error:
        reason = f"{getattr(error, 'reason', '')} {getattr(error, 'detail', error)}"
        return f"refused: {reason}" if not truth else f"{len(truth)} frames decode, but {reason}"
    if not truth: return f"refused: {said}" if not seen else f"read, where decoding says: {said}"
    if len(seen) != len(truth): return f"iterate gives {len(seen)} of {len(truth)} frames"
    if not all(map(np.array_equal, seen, truth)): return "iterate gives other frames"
    for full in (True, False):
        found = decode.probe(path, full).frames
        if found != len(truth): return f"probe(full={full}) says {found} of {len(truth)}"
    for pick in asked(len(truth), draw):
        got = decode.read_frames(path, pick, time_limit=None)
        if got.count != len(truth): return f"read_frames counts {got.count} of {len(truth)}"
        if not all(np.array_equal(got.images[i], truth[k]) for i, k in enumerate(pick)):
            return f"{pick[:6]} gives {[number_of(image) for image in got.images[:6]]}"
    return ""


# ---- all files

def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", default="0")
    options = parser.parse_args()
    av.logging.set_level(None)
    found = defaultdict(Counter)
    made = number = 0
    with tempfile.TemporaryDirectory() as folder:
        while made < options.files:
            number += 1
            draw = random.Random(f"{options.seed} {number}")
            try: path, how = make(Path(folder), number, draw)
            except (av.error.FFmpegError, ValueError, IndexError) as error:
                found["not made"][f"{type(error).__name__}: {error}"[:80]] += 1
                continue
            said = check(path, draw)
            made += 1
            group = found[path.suffix[1:]]
            group["files"] += 1
            if said.startswith("refused"): group["refused"] += 1
            elif said: group["wrong"] += 1
            else: group["entered" if is_entered(path) else "counted"] += 1
            if said: print(f"{number:5} {path.suffix[1:]:5} {how:40} {said}", flush=True)
            for file in Path(folder).iterdir(): file.unlink()
    print("not made, as the muxer refuses it:", dict(found.pop("not made", {})))
    columns = ("files", "entered", "counted", "refused", "wrong")
    total = sum(found.values(), Counter())
    rows = [{"container": name} | {column: group[column] for column in columns}
            for name, group in [*sorted(found.items()), ("all", total)]]
    for row in rows: print(row)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, dtype=object).to_csv(RESULTS, index=False, lineterminator="\n")


if __name__ == "__main__": main()
