"Data: determinism, any size, labels that follow from motion alone, masks, ceilings, video files and their errors."
import dataclasses
import sys

import numpy as np
import pytest
import torch

from attnnas.core.errors import AttnnasError
from attnnas.data import synthetic, video
from attnnas.data.ceilings import ceilings
from attnnas.data.clips import Clips, ClipSource, to_float
from attnnas.data.synthetic import (BENCHMARKS, CLASS_EVENTS, EVENTS, benchmark, classes,
                                    draw_factors, event_frames, make_clips, object_masks, render)
from attnnas.data.codec import encode
from attnnas.data.cutting import ClipConfig
from attnnas.data.folders import folder_name, write_video_folder
from attnnas.data.video import VideoClips

both = pytest.mark.parametrize("name", ["A", "B"])


# clips

def small_clips(**changes):
    values = dict(video=torch.zeros(4, 3, 2, 5, 5, dtype=torch.uint8), labels=torch.tensor([0, 1, 0, 1]),
                  classes=["a", "b"],
                  groups={"kind": np.array(list("xxyy"))}, factors={"n": torch.arange(4)}, fingerprint="f")
    return Clips(**(values | changes))


@pytest.mark.parametrize("changes, said", [
    (dict(video=torch.zeros(4, 3, 2, 5, 5)), "float32"), (dict(video=torch.zeros(4, 1, 2, 5, 5, dtype=torch.uint8)), "expected uint8"),
    (dict(labels=torch.tensor([0, 1])), "labels"), (dict(labels=torch.tensor([0, 1, 2, 0])), "0 to 1"),
    (dict(labels=torch.zeros(4)), "int64"),
    (dict(groups={"kind": np.array(["x"])}), "kind"), (dict(factors={"n": torch.arange(3)}), "n have")])
def test_clips_that_do_not_fit_are_refused(changes, said):
    with pytest.raises(AttnnasError, match=said): small_clips(**changes)


def test_subset_and_batch_agree():
    clips = make_clips(benchmark("A", 4, 16), "train", 24)
    rows = [7, 3, 20]
    some = clips.subset(rows)
    assert isinstance(some, ClipSource) and len(some) == 3
    assert some.video.equal(clips.batch(torch.tensor(rows))) and some.labels.equal(clips.labels[rows])
    assert list(some.groups["shape"]) == [clips.groups["shape"][r] for r in rows]
    assert some.factors["position"].equal(clips.factors["position"][rows])
    assert len({clips.fingerprint, some.fingerprint, clips.subset([3, 7, 20]).fingerprint}) == 3


def test_to_float_leaves_its_input_alone():
    data = torch.full((1, 3, 1, 2, 2), 255, dtype=torch.uint8)
    assert to_float(data).max() < 3 and data.min() == 255
    own = torch.full((1, 3, 1, 2, 2), 255.)
    assert to_float(own).equal(own) and own.min() == 255, "floating-point clips are normalised already"


# determinism

@both
def test_a_clip_depends_on_its_number_and_nothing_else(name):
    config = benchmark(name)
    most = make_clips(config, "train", 120)
    assert make_clips(config, "train", 120).video.equal(most.video)
    for count in (1, 37, 97):
        fewer = make_clips(config, "train", count)
        assert fewer.video.equal(most.video[:count])
        assert all(value.equal(most.factors[key][:count]) for key, value in fewer.factors.items())
    alone = {key: value[50:51] for key, value in most.factors.items()}
    assert render(config, alone).equal(most.video[50:51])


@both
def test_threads_do_not_change_a_clip(name):
    config, threads = benchmark(name), torch.get_num_threads()
    try:
        videos = []
        for n in (1, 2):
            torch.set_num_threads(n)
            videos.append(make_clips(config, "test", 30).video)
            assert torch.get_num_threads() == n
    finally: torch.set_num_threads(threads)
    assert videos[0].equal(videos[1])


@both
def test_the_global_random_state_is_neither_used_nor_changed(name):
    torch.manual_seed(1)
    first, state = make_clips(benchmark(name), "train", 12), torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.get_rng_state().equal(state)
    torch.manual_seed(2)
    assert make_clips(benchmark(name), "train", 12).video.equal(first.video)


@both
def test_splits_and_seeds_are_independent(name):
    config = benchmark(name)
    draws = [draw_factors(config, split, 480, seed) for split in synthetic.SPLITS for seed in (0, 1)]
    columns = torch.stack([f["position"][:, 2, 0].flatten() for f in draws])
    assert torch.corrcoef(columns).fill_diagonal_(0).abs().max() < .12
    everything = torch.cat([f["key"] for f in draws])
    assert len(everything.unique()) == len(everything)


def test_fingerprints_name_what_decides_the_clips():
    config = benchmark("A", 4, 16)
    prints = [make_clips(*arguments).fingerprint for arguments in (
        (config, "train", 12), (config, "test", 12), (config, "train", 13), (config, "train", 12, 1),
        (benchmark("B", 4, 16), "train", 12), (benchmark("A", 4, 16, noise=.05), "train", 12))]
    assert len(set(prints)) == 6 and prints[0] == make_clips(config, "train", 12).fingerprint


# sizes

@both
@pytest.mark.parametrize("frames, size", [(4, 16), (5, 17), (7, 33), (8, 24), (9, 19), (32, 64)])
def test_any_length_and_size_shows_the_same_scenes(name, frames, size):
    config = benchmark(name, frames, size)
    clips = make_clips(config, "train", 6)
    assert clips.video.shape == (6, 3, frames, size, size) and clips.video.dtype == torch.uint8
    reference = draw_factors(benchmark(name), "train", 6)
    for key in ("label", "event", "shape", "colour", "large", "pan", "depth"): assert clips.factors[key].equal(reference[key])
    assert torch.allclose(clips.factors["position"][:, :2, -1], reference["position"][:, :2, -1], atol=1e-5)
    assert object_masks(config, clips.factors).shape == (6, 2 + config.distractors, frames, size, size)


@both
@pytest.mark.parametrize("frames", [4, 5, 6, 7, 8, 11, 16, 30, 64])
def test_windows_do_not_meet(name, frames):
    config = benchmark(name, frames)
    factors = draw_factors(config, "train", 480)
    happening = event_frames(config, factors)
    assert happening.sum(-1)[factors["active"]].eq(config.event_frames).all() and not happening.all(1).any()
    half = frames // 2
    assert not (happening[..., :half].any(-1) & happening[..., half:].any(-1)).any()
    if frames == 16:
        assert sorted(factors["start"].unique().tolist()) == [-1, 0, 1, 2, 10, 11, 12]
        relation = factors["active"].all(1)
        assert happening[relation].any(1)[:, 6:10].sum() == 0


def test_no_distractors_are_needed():
    clips = make_clips(benchmark("A", distractors=0), "train", 12)
    assert clips.factors["position"].shape[1] == 2 and set(clips.groups["decoys"]) == {"0"}
    assert len(make_clips(benchmark("A"), "train", 0)) == 0


def test_only_shapes_depend_on_the_data_not_the_device():
    "Rendering on the meta device fails if any tensor is made on another one."
    for config in BENCHMARKS.values():
        factors = draw_factors(config, "train", 3)
        assert render(config, factors, torch.device("meta")).shape == (3, 3, 16, 32, 32)


@pytest.mark.parametrize("arguments, said", [
    (dict(name="C"), "Unknown data set 'C'"), (dict(name="A", frames=3), "frames is 3"), (dict(name="A", size=15), "size is 15"),
    (dict(name="A", size=32.), "whole number"), (dict(name="A", noise=-1), "noise is -1"),
    (dict(name="A", noise=float("nan")), "noise"), (dict(name="A", distractor=2), "Did you mean 'distractors'"),
    (dict(name="A", radius_min=.1), "above radius_max"), (dict(name="A", large="x"), "large is 'x'")])
def test_configurations_out_of_range_are_refused(arguments, said):
    with pytest.raises(AttnnasError, match=said): benchmark(**arguments)


def test_unknown_splits_and_counts_are_refused():
    with pytest.raises(AttnnasError, match="Did you mean 'train'"): make_clips(benchmark("A"), "trian", 3)
    with pytest.raises(AttnnasError, match="-1"): make_clips(benchmark("A"), "train", -1)


# labels

@both
def test_classes_are_balanced_at_every_dozen(name):
    labels = draw_factors(benchmark(name), "validation", 132)["label"]
    assert all(run.sort().values.tolist() == list(range(12)) for run in labels.split(12))


def seen_events(config, factors):
    "(early, late) events of every clip, read off the trajectories of the actors alone."
    position, radius = factors["position"][:, :2], factors["radius"][:, :2]
    half, out = config.frames // 2, []
    for n in range(len(position)):
        pair = []
        for window in (slice(None, half + 1), slice(half, None)):
            events = []
            for actor in (0, 1):
                dx, dy = (position[n, actor, window][-1] - position[n, actor, window][0]).tolist()
                r = radius[n, actor, window]
                change = (r / radius[n, actor, half]).log()[(r / radius[n, actor, half]).log().abs().argmax()].item()
                growth = (r[-1] / r[0]).log().item()
                if max(abs(dx), abs(dy)) > .05:
                    east, south = ("E" if dx > 0 else "W"), ("S" if dy > 0 else "N")
                    if config.name == "B": events.append(south + east)
                    else: events.append(("H" if abs(dx) > abs(dy) else "V") + ("+" if dx + dy > 0 else "-"))
                elif config.name == "A" and abs(growth) > .05: events.append("S+" if growth > 0 else "S-")
                elif config.name == "B" and abs(change) > .05: events.append("P+" if change > 0 else "P-")
            assert len(events) <= 1
            pair.append(EVENTS[config.name].index(events[0]) if events else synthetic.IDLE)
        out.append(tuple(pair))
    return out


@both
def test_the_label_follows_from_the_actors_motion(name):
    config = benchmark(name)
    factors = draw_factors(config, "test", 720)
    pairs = seen_events(config, factors)
    table = list(CLASS_EVENTS[name].values())
    assert [tuple(p) in table[label][2] for p, label in zip(pairs, factors["label"])] == [True] * 720
    active = factors["active"].sum(1)
    assert (active[factors["label"] < 6] == 1).all() and (active[factors["label"] >= 6] == 2).all()
    assert len(set(pairs)) == sum(len(row[2]) for row in table)     # every pair occurs


@both
def test_actors_stay_apart_and_inside(name):
    config = benchmark(name)
    position = draw_factors(config, "train", 9600)["position"][:, :2]
    assert (position[:, 0] - position[:, 1]).norm(dim=-1).min() >= config.separation
    assert position.min() >= synthetic.MARGIN - 1e-6 and position.max() <= 1 - synthetic.MARGIN + 1e-6


@both
def test_looks_know_nothing_of_the_label(name):
    "Means by class of colours, shapes, depth, pan, actor, decoys differ by no more than chance."
    factors = draw_factors(benchmark(name), "train", 9600)
    acts_first = (factors["event"][:, 0] >= 0).float()
    columns = torch.stack([factors["colour"][:, 0, 0], factors["shape"][:, 0].float(), factors["depth"][:, 0].float(),
                           factors["pan"][:, 0], factors["base"][:, 1], (factors["decoy"][:, 0] == 2).float(), factors["position"][:, 2, 0, 0]], 1)
    standard = (columns - columns.mean(0)) / columns.std(0)
    by_class = torch.stack([standard[factors["label"] == c].mean(0) for c in range(12)]) * 800 ** .5
    assert by_class.abs().max() < 4.5
    assert abs(acts_first[factors["label"] < 6].mean() - .5) < .03


@both
def test_groups_report_what_the_factors_hold(name):
    config = benchmark(name)
    clips = make_clips(config, "train", 240)
    assert set(clips.groups) == {"kind", "family", "window", "decoys", "shape"}
    single = clips.groups["kind"] == "single"
    assert (single == (clips.labels < 6).numpy()).all() and ((clips.groups["window"] == "both") == ~single).all()
    late = (clips.factors["start"] >= 8).any(1).numpy()
    assert (late[single] == (clips.groups["window"][single] == "late")).all()
    for i in range(20):
        happening = event_frames(config, clips.factors)[i]
        actor = int(happening.int().argmax(1).masked_fill(~happening.any(1), 99).argmin())
        assert clips.groups["shape"][i] == synthetic.SHAPES[name][clips.factors["shape"][i, actor]]


# what is seen

@both
def test_masks_agree_with_what_is_rendered(name):
    "Without noise and texture, a pixel differs from the background where an object's mask is, and has the object's colour."
    config = benchmark(name, size=48, noise=0., texture=0.)
    clips = make_clips(config, "train", 12)
    masks = object_masks(config, clips.factors)
    assert (masks.sum(1) <= 1).all()
    base = clips.factors["base"][..., None, None, None] * 255
    changed = (clips.video - base).abs().amax(1) > 1
    covered = masks.any(1)
    assert changed[covered].float().mean() > .999
    rim = torch.nn.functional.max_pool2d(covered.float(), 3, 1, 1) > 0
    assert not (changed & ~rim).any()
    colour = (clips.factors["colour"][..., None] + clips.factors["flash"][:, :, None]).clamp(max=1)   # (n, objects, 3, T)
    expected = torch.einsum("nothw,noct->ncthw", masks.float(), colour) * 255
    core = -torch.nn.functional.max_pool2d(-masks.float().flatten(0, 1), 3, 1, 1).view_as(masks) > 0
    core = core.any(1)[:, None].expand_as(clips.video)
    assert core.sum() > 1000 and ((clips.video - expected).abs()[core] < 1.5).float().mean() > .99


@both
def test_masks_follow_the_actors(name):
    config = benchmark(name, size=64)
    factors = draw_factors(config, "train", 12)
    masks = object_masks(config, factors, torch.arange(12))[:, :2]
    front = factors["depth"].argsort(1)[:, :2] == factors["depth"].shape[1] - 1                       # nothing covers these
    grid = (torch.arange(64) + .5) / 64
    for n, actor in front.nonzero().tolist():
        mask = masks[n, actor].float()
        mass = mask.sum((1, 2))
        centre = torch.stack(((mask.sum(1) * grid).sum(1), (mask.sum(2) * grid).sum(1)), 1) / mass[:, None]
        inside = ((factors["position"][n, actor] - .5).abs() < .25).all(-1)
        assert ((centre - factors["position"][n, actor]).abs()[inside] < .02).all()
        area = (mass / factors["radius"][n, actor] ** 2)[inside]
        assert not len(area) or area.max() < 1.4 * area.min()
    assert front.any()


def test_noise_has_the_stated_strength_and_colour():
    for name, channels in (("A", 3), ("B", 1)):
        noise = synthetic._noise(benchmark(name), torch.tensor([1, 2, 2**31 - 1], dtype=torch.int32))
        assert noise.shape == (3, channels, 16, 32, 32)
        assert abs(noise.std() - benchmark(name).noise) < .001 and abs(noise.mean()) < .001
        assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < .03
    values = synthetic._hash(torch.arange(2**16, dtype=torch.int32))
    bits = ((values[:, None] >> torch.arange(32, dtype=torch.int32)) & 1).float()
    assert len(values.unique()) == 2**16 and (bits.mean(0) - .5).abs().max() < .02


def test_the_hash_is_murmur3s():
    def reference(x):
        for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)): x = (x ^ x >> shift) * multiplier & 0xFFFFFFFF
        return x ^ x >> 16
    x = torch.tensor([0, 1, -1, 123456789, -2**31], dtype=torch.int32)
    assert [v & 0xFFFFFFFF for v in synthetic._hash(x.clone()).tolist()] == [reference(v & 0xFFFFFFFF) for v in x.tolist()]


def test_flicker_and_flash_change_brightness():
    calm, flickering = (make_clips(benchmark("B", flicker=flicker, noise=0.), "train", 12).video.float().mean((1, 3, 4))
                        for flicker in (0., .2))
    assert flickering.std(1).mean() > 5 * calm.std(1).mean()


# ceilings

@both
def test_ceilings(name):
    known = ceilings(BENCHMARKS[name])
    assert known == {"oracle": 1, "bag of local events": .75, "early and late counts": .75,
                     "best linear on counts": .875, "MLP on counts": 1}


def test_no_linear_layer_beats_the_best_on_counts():
    "No half plane of counts (+, -) tells (2, 0) and (0, 2) from (1, 1): three of four at most, so .875 with the singles."
    angles = torch.linspace(0, 2 * torch.pi, 721, dtype=torch.float64)
    counts = torch.tensor([[2., 0], [1, 1], [1, 1], [0, 2]], dtype=torch.float64)   # same, opposite, opposite, same
    side = counts @ torch.stack((angles.cos(), angles.sin())) - torch.linspace(-3, 3, 121, dtype=torch.float64)[:, None, None]
    right = (side > 0) == torch.tensor([True, False, False, True])[:, None]
    assert right.double().mean(1).max() == .75


# video files

def videos(folder, split: str, frames: int = 16, size: int = 32) -> VideoClips:
    "The clips of a split, as a test takes them."
    return VideoClips(folder, split, ClipConfig(frames=frames, size=size), training=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("videos")
    write_video_folder(place, benchmark("B"), {"train": 24, "test": 13})
    return place


def test_a_folder_gives_back_clips_labels_and_factors(folder):
    config = benchmark("B")
    source, clips = videos(folder, "test"), make_clips(config, "test", 13)
    assert isinstance(source, ClipSource) and len(source) == 13 and source.classes == sorted(folder_name(c) for c in classes(config))
    number = torch.tensor([int(file.stem[-6:]) for file in source.files])
    error = source.batch(torch.arange(13)).float() - clips.video[number].float()
    assert 10 * torch.log10(255 ** 2 / error.square().mean()) > 42
    assert [source.classes[c] for c in source.labels] == [folder_name(clips.classes[c]) for c in clips.labels[number]]
    assert list(source.groups["class"]) == [source.classes[c] for c in source.labels]
    for column, values in clips.groups.items(): assert (source.groups[column] == values[number.numpy()]).all()
    for key, value in clips.factors.items(): assert source.factors[key].equal(value[number])
    source.check()


def test_annotations_are_kinetics_style(folder):
    lines = (folder / "train.csv").read_text().splitlines()
    assert lines[0] == "label,youtube_id,time_start,time_end,split" and len(lines) == 25
    label, clip, start, end, split = lines[1].split(",")
    assert (folder / split / folder_name(label) / f"{clip}.mp4").exists() and (start, end, split) == ("0", "1", "train")


def test_fingerprints_follow_the_files(folder, tmp_path):
    write_video_folder(tmp_path, benchmark("B"), {"train": 24, "test": 13})
    first, again = videos(folder, "test"), videos(tmp_path, "test")
    assert first.fingerprint == again.fingerprint != videos(folder, "test", frames=8).fingerprint
    data = bytearray(again.files[3].read_bytes())
    data[-1] ^= 1
    again.files[3].write_bytes(data)
    assert videos(tmp_path, "test").fingerprint != first.fingerprint


def middle(path, frames: int, size: int):
    "The clip from the middle of one file in a folder without splits."
    clips = VideoClips(path.parent.parent, "all", ClipConfig(frames=frames, size=size), training=False)
    return clips.batch(torch.tensor([0]))[0]


def test_frames_and_sizes_are_fitted(folder, tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    file = tmp_path / "a" / "b" / "one.mp4"
    file.write_bytes(videos(folder, "train").files[0].read_bytes())
    whole = middle(file, 16, 32)
    assert middle(file, 6, 32).equal(whole[:, 5:11])
    assert middle(file, 18, 32)[:, 16:].equal(whole[:, :2])        # too short: it starts again
    for size in (17, 64): assert middle(file, 2, size).shape == (3, 2, size, size)
    wide = torch.zeros(3, 4, 20, 50, dtype=torch.uint8)
    wide[..., 15:35] = 200                                          # the middle 20 of 50 columns
    file.write_bytes(encode(wide))
    assert middle(file, 4, 20).float().mean() > 190 and middle(file, 4, 10).float().mean() > 185


def test_a_folder_without_annotations_is_a_source(tmp_path):
    for split in ("train", "validation"):
        for label, grey in (("cats", 50), ("dogs", 200)):
            (tmp_path / split / label).mkdir(parents=True)
            (tmp_path / split / label / "one.mp4").write_bytes(encode(torch.full((3, 4, 32, 32), grey, dtype=torch.uint8)))
    (tmp_path / "train" / ".hidden").mkdir()
    source = videos(tmp_path, "validation", frames=4)
    assert source.classes == ["cats", "dogs"] and set(source.groups) == {"class"} and source.factors == {}
    assert (source.batch(torch.tensor([1, 0])).float().mean((1, 2, 3, 4)) - torch.tensor([200., 50])).abs().max() < 3


def errors(folder):
    yield "There is no folder", lambda: videos(folder / "nowhere", "train")
    yield "no split 'test'. It holds: train, validation", lambda: videos(folder, "test")
    yield "holds classes that train lacks: birds", lambda: videos(folder, "validation")
    yield "dogs holds no video", lambda: videos(folder, "train")
    yield "frames = 0", lambda: videos(folder, "train", frames=0)


def test_what_is_wrong_with_a_folder_is_said_when_it_is_opened(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(AttnnasError, match="no folder at all"): videos(tmp_path / "empty", "train")
    (tmp_path / "empty" / "train").mkdir()
    with pytest.raises(AttnnasError, match="holds no class folders"): videos(tmp_path / "empty", "train")
    place = tmp_path / "data"
    for name in ("train/cats", "train/dogs", "validation/birds"): (place / name).mkdir(parents=True)
    (place / "train" / "cats" / "one.mp4").write_bytes(encode(torch.zeros(3, 4, 32, 32, dtype=torch.uint8)))
    for said, attempt in errors(place):
        with pytest.raises(AttnnasError) as caught: attempt()
        assert said in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not a video", "half"])
def test_an_undecodable_file_is_named(folder, tmp_path, content):
    file = tmp_path / "train" / "cats" / "one.mp4"
    file.parent.mkdir(parents=True)
    good = encode(torch.zeros(3, 4, 32, 32, dtype=torch.uint8))
    file.write_bytes(good[:len(good) // 2] if content == "half" else content)
    with pytest.raises(AttnnasError, match="one.mp4"): videos(tmp_path, "train")
    file.with_name("a.mp4").write_bytes(good)
    source = videos(tmp_path, "train", frames=4)                   # one that can be read is enough here
    with pytest.raises(AttnnasError, match="1 of 2.*one.mp4"): source.check()
    with pytest.raises(AttnnasError, match="one.mp4"): source.batch(torch.tensor([0, 1]))


def test_annotations_of_other_clips_are_refused(folder, tmp_path):
    write_video_folder(tmp_path, benchmark("B"), {"train": 12})
    first = next((tmp_path / "train").rglob("*.mp4"))
    first.rename(first.with_name("stranger.mp4"))
    with pytest.raises(AttnnasError, match="such as stranger"): videos(tmp_path, "train")


def test_writing_checks_before_it_works(tmp_path):
    with pytest.raises(AttnnasError, match="0 clips"): write_video_folder(tmp_path / "a", benchmark("A"), {"train": 12, "test": 0})
    with pytest.raises(AttnnasError, match="Unknown split"):
        write_video_folder(tmp_path / "a", benchmark("A"), {"train": 12, "tset": 3})
    assert not (tmp_path / "a").exists()


def test_without_pyav_the_extra_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AttnnasError, match=r"pip install attnnas\[video\]"): videos(folder, "train")
    with pytest.raises(AttnnasError, match=r"pip install attnnas\[video\]"): write_video_folder(folder, benchmark("A"), {"train": 1})


def test_class_names_make_safe_and_distinct_folders():
    for name in "AB":
        names = [folder_name(c) for c in classes(benchmark(name))]
        assert len(set(names)) == 12 and all(n.isascii() and n.replace("_", "").isalnum() for n in names)
