"Optical flow: known motions are found, bytes and files keep it, mirrors negate it, and it belongs to the frame that it says."
import dataclasses
import math
import time

import numpy as np
import pytest
import torch

from attnnas.core.errors import AttnnasError
from attnnas.core.seeds import generator
from attnnas.data.codec import encode
from attnnas.data.cutting import ClipConfig
from attnnas.data.decode import iterate
from attnnas.data.flow import (BOUND, METHODS, STORES, flow_tensor, flows, from_bytes, mirror_flow,
                               optical_flow, read_flow, to_bytes, write_flow)
from attnnas.data.video import VideoClips, VideoLoader
from attnnas.data.workers import in_workers

pytest.importorskip("av")
cv2 = pytest.importorskip("cv2")
if not hasattr(cv2, "optflow"): pytest.skip("OpenCV without its contributed modules", allow_module_level=True)
each_method = pytest.mark.parametrize("method", METHODS)


def waves(step, frames: int, high: int, wide: int, seed: int = 0) -> torch.Tensor:
    "Sixty plane waves, 8 to 60 pixels long, that move by exactly `step` a frame: uint8 (3, frames, high, wide)."
    length, angle, phase = torch.rand(3, 60, generator=generator("test waves", seed))
    speed, angle = math.tau / (8 * 7.5**length), math.tau * angle
    x, y = (torch.arange(n)[None] - s * torch.arange(frames)[:, None] for n, s in ((wide, step[0]), (high, step[1])))
    total = (speed * (x[:, None, :, None] * angle.cos() + y[:, :, None, None] * angle.sin()) + math.tau * phase).cos().sum(-1)
    return (128 + 50 * total / total.std()).round().clamp(0, 255).to(torch.uint8).expand(3, -1, -1, -1)


# ---- estimates

@each_method
@pytest.mark.parametrize("step", [(1.5, -.75), (-6.3, 4.2), (0., 0.)])
def test_a_translation_is_recovered_to_a_tenth_of_a_pixel(method, step):
    "If this fails, the flow has the wrong sign, scale or order of components, or the estimator is set badly."
    flow = optical_flow(waves(step, 2, 96, 128, seed=1), method)
    error = flow - torch.tensor(step)[:, None, None, None]
    assert flow.shape == (2, 2, 96, 128) and flow.dtype == torch.float32 and error[..., 24:-24, 24:-24].abs().max() < .1


@each_method
def test_flow_of_a_mirrored_clip_is_the_mirrored_flow(method):
    clip = waves((2.25, -1.5), 2, 96, 128, seed=2)
    there, again = (f[..., 24:-24, 24:-24] for f in (mirror_flow(optical_flow(clip, method)), optical_flow(clip.flip(-1), method)))
    assert (again - there).norm() < .01 * there.norm() and there[0].mean() < -2 and there[1].mean() < -1.4


def test_flow_k_is_that_of_frame_k_and_the_last_repeats():
    still, moved = waves((0, 0), 1, 64, 64), waves((2, 0), 2, 64, 64)[:, 1:]
    clip = torch.cat([still, still, still, moved, moved], 1)                     # it moves between frames 2 and 3
    strength = optical_flow(clip, "dis")[0, :, 16:-16, 16:-16].mean((1, 2))
    assert strength.tolist() == pytest.approx([0, 0, 2, 0, 0], abs=.1)
    flow = optical_flow(moved.expand(-1, 3, -1, -1), "dis")
    assert flow[:, 2].equal(flow[:, 1]) and optical_flow(still, "dis").equal(torch.zeros(2, 1, 64, 64))


def alone(clip, reading):
    cv2.setNumThreads(1)
    return optical_flow(clip, "dis")


def test_flow_in_worker_processes_after_flow_in_this_one():
    "If this fails, the preparation of flow hangs in a notebook that has computed flow itself: threads of OpenCV do not fork."
    clip, before = waves((1, 0), 2, 240, 320), cv2.getNumThreads()
    try:
        cv2.setNumThreads(2)
        here = optical_flow(clip, "dis")
        time.sleep(.5)                                      # for the threads to fall asleep
        assert all(there.equal(here) for there in in_workers(alone, [clip] * 2, workers=2, time_limit=30.))
        assert cv2.getNumThreads() == 2
    finally: cv2.setNumThreads(before)


# ---- bytes and files

@pytest.mark.parametrize("bound", [20., 7.5])
def test_a_byte_is_off_by_at_most_the_stated_bound(bound):
    values = torch.linspace(-bound, bound, 100_001)
    stored = to_bytes(values, bound)
    assert (from_bytes(stored, bound) - values).abs().max() <= bound / 254 * 1.0001 and stored.min() == 1 and stored.max() == 255
    assert from_bytes(to_bytes(torch.tensor([0., 99., -99.]), bound), bound).tolist() == pytest.approx([0, bound, -bound])
    assert to_bytes(-values, bound).int().equal(256 - stored.int())              # a mirror costs nothing


@pytest.fixture(scope="module")
def rough():
    "Flow with fine detail and beyond the bound, of an odd size: (2, 40, 35, 47)."
    return 9 * torch.randn(2, 40, 35, 47, generator=generator("rough")).cumsum(-1).div(4)


@pytest.mark.parametrize("store", STORES)
def test_files_give_back_what_was_stored(tmp_path, rough, store):
    file = tmp_path / "a.flow.mkv"
    assert write_flow(file, rough.unbind(1), store=store, method="dis") == 40
    back, bound = read_flow(file), rough.clamp(-BOUND, BOUND)
    assert back.shape == rough.shape and back.dtype == torch.float32
    error = (back - bound).abs()
    if store == "lossless": assert error.max() <= BOUND / 254 * 1.0001 and back.equal(from_bytes(to_bytes(rough)))
    else: assert error.mean() < .25
    for chosen in ([0], [39], [31, 5, 5], range(14, 30)): assert read_flow(file, chosen).equal(back[:, list(chosen)])
    assert read_flow(file, lambda count: [count - 1]).equal(back[:, 39:])


def test_bound_travels_in_the_file(tmp_path):
    flow = torch.full((2, 8, 8), 3.)
    write_flow(tmp_path / "a.mkv", [flow], bound=4.)
    assert (read_flow(tmp_path / "a.mkv")[:, 0] - flow).abs().max() <= 4 / 254 * 1.0001


def test_what_is_wrong_with_a_flow_file_is_said(tmp_path):
    file = tmp_path / "a.mkv"
    write_flow(file, waves((1, 1), 1, 16, 16).float()[:2].unbind(1))
    (tmp_path / "clip.mp4").write_bytes(encode(waves((1, 1), 4, 32, 32)))
    (tmp_path / "cut.mkv").write_bytes(file.read_bytes()[:300])
    for said, attempt in {"holds 1 flows": lambda: read_flow(file, [1]), "no.mkv could not be read": lambda: read_flow(tmp_path / "no.mkv"),
                          "is not a flow file": lambda: read_flow(tmp_path / "clip.mp4"), "cut.mkv": lambda: read_flow(tmp_path / "cut.mkv"),
                          "no flow to write": lambda: write_flow(tmp_path / "b.mkv", []),
                          "Did you mean 'small'": lambda: write_flow(file, [], store="smal"), "flow method 'lk'": lambda: list(flows([], "lk"))}.items():
        with pytest.raises(AttnnasError, match=said): attempt()
    assert not (tmp_path / "b.mkv").exists()


# ---- transforms

def test_crops_resizing_and_mirrors_are_those_of_the_frames():
    """If this fails, flow is cropped elsewhere than its frames, or keeps its length or its sign where it must not.

    The same picture is shown as colours and as horizontal component: what comes out must agree, up to sign and scale.
    """
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    picture = waves((1, 2), 3, 60, 80)
    both = {"video": tv_tensors.Video(picture.transpose(0, 1)),
            "flow": flow_tensor()(picture[:2].transpose(0, 1).float())}
    change, signs = v2.Compose([v2.RandomResizedCrop(32, scale=(.3, 1.)), v2.RandomHorizontalFlip(), v2.RandomVerticalFlip()]), set()
    for seed in range(12):
        torch.manual_seed(seed)
        out = change(both)
        for component in (0, 1):
            seen, flow = out["video"][:, 0].float().flatten(), out["flow"][:, component].flatten()
            scale = (seen * flow).sum() / seen.square().sum()
            assert (flow - scale * seen).norm() < .01 * flow.norm() and .4 < abs(scale) < 1.2      # 32 of 33 to 80 pixels
            signs.add((component, scale.item() > 0))
    assert len(signs) == 4


@pytest.mark.parametrize("name, options", [("RandomRotation", dict(degrees=20)), ("RandomAffine", dict(degrees=5)),
                                           ("RandomPerspective", dict(p=1)), ("ElasticTransform", {})])
def test_what_would_turn_the_vectors_is_refused(name, options):
    from torchvision.transforms import v2
    with pytest.raises(AttnnasError, match="would turn or bend"): getattr(v2, name)(**options)(flow_tensor()(torch.zeros(1, 2, 60, 60)))


def test_colours_leave_flow_alone():
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    both = {"video": tv_tensors.Video(waves((1, 0), 2, 20, 20).transpose(0, 1)), "flow": flow_tensor()(torch.rand(2, 2, 20, 20))}
    out = v2.Compose([v2.ColorJitter(.5, .5, .5), v2.RandomGrayscale(1.), v2.GaussianBlur(3)])(both)
    assert torch.equal(out["flow"], both["flow"]) and not torch.equal(out["video"], both["video"])


# ---- beside the clips

@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    "Two videos whose speed changes from frame to frame, and their flow. Frame k of video 0 moves by k/4 pixels."
    folder = tmp_path_factory.mktemp("pair")
    for n, name in enumerate(("a/0.mp4", "b/1.mp4")):
        frames = torch.stack([waves((sum(j / 4 for j in range(k)) * (-1)**n, 0), 2, 48, 64)[:, 1] for k in range(20)], 1)
        (folder / "clips" / name).parent.mkdir(parents=True)
        (folder / "clips" / name).write_bytes(encode(frames))
        write_flow(folder / "flow" / f"{name}.flow.mkv", flows(iterate(folder / "clips" / name), "dis"), method="dis")
    return folder


BOTH = ClipConfig(frames=6, size=40, stream="both")


def test_flow_belongs_to_the_frames_beside_it(pair):
    "If this fails, a network sees the colours of one moment and the motion of another, or of another video."
    clips = VideoClips(pair / "clips", "all", dataclasses.replace(BOTH, size=48), training=False, flow=pair / "flow")
    for n, sign in enumerate((1, -1)):
        clip = clips[n]
        assert clip["flow"].shape == (2, 6, 48, 48) and clip["frames"].tolist() == [7, 8, 9, 10, 11, 12]
        assert clip["flow"][0, :, 12:-12, 12:-12].mean((1, 2)).tolist() == pytest.approx([sign * k / 4 for k in range(7, 13)], abs=.1)
        measured = torch.from_numpy(np.stack(list(flows(clip["video"].permute(1, 2, 3, 0).numpy(), "dis")), 1))
        assert (measured - clip["flow"])[:, :5, 12:-12, 12:-12].abs().mean() < .12


def test_training_mirrors_and_crops_both_streams_together(pair):
    clips = VideoClips(pair / "clips", "all", BOTH, training=True, flow=pair / "flow")
    mirrored = 0
    for epoch in range(12):
        clip = clips[epoch, 0]
        measured = torch.from_numpy(np.stack(list(flows(clip["video"].permute(1, 2, 3, 0).numpy(), "dis")), 1))
        ours, theirs = (f[0, :5, 12:-12, 12:-12].median(-1)[0].median(-1)[0] for f in (clip["flow"], measured))
        assert (ours - theirs).abs().max() < .15 + .1 * ours.abs().max()
        mirrored += (ours.sum() < 0).item()
    assert 1 <= mirrored <= 11
    steady = VideoClips(pair / "clips", "all", dataclasses.replace(BOTH, mirror=False), training=True, flow=pair / "flow")
    assert all(steady[epoch, 0]["flow"][0].median() >= 0 for epoch in range(8))


def test_frames_are_made_as_small_as_their_flow(pair, tmp_path):
    "Flow that was extracted at half the size still fits: the colours follow it."
    for name in ("a/0.mp4", "b/1.mp4"):
        images = (image[::2, ::2].copy() for image in iterate(pair / "clips" / name))
        write_flow(tmp_path / f"{name}.flow.mkv", flows(images, "dis"))
    clip = VideoClips(pair / "clips", "all", dataclasses.replace(BOTH, size=24), training=False, flow=tmp_path)[0]
    assert clip["video"].shape == (3, 6, 24, 24) and clip["flow"].shape == (2, 6, 24, 24)
    assert clip["flow"][0, 0, 6:-6, 6:-6].mean() == pytest.approx(7 / 8, abs=.1)


def test_flow_alone(pair):
    clips = VideoClips(pair / "clips", "all", dataclasses.replace(BOTH, stream="flow"), training=False, flow=pair / "flow")
    assert "video" not in clips[0] and clips[0]["flow"].shape == (2, 6, 40, 40) and clips[0]["count"] == 20
    assert clips.batch(torch.tensor([1, 0])).shape == (2, 2, 6, 40, 40)
    both = VideoClips(pair / "clips", "all", BOTH, training=False, flow=pair / "flow")
    assert clips[1]["flow"].equal(both[1]["flow"])


@pytest.mark.parametrize("fault", ["missing", "short", "not flow"])
def test_flow_that_does_not_fit_is_in_the_ledger(pair, tmp_path, fault):
    "If this fails, a clip is shown with the flow of other frames, or an epoch ends over one missing file."
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a/0.mp4.flow.mkv").write_bytes((pair / "flow/a/0.mp4.flow.mkv").read_bytes())
    if fault == "short": write_flow(tmp_path / "b/1.mp4.flow.mkv", torch.zeros(19, 2, 48, 64))
    if fault == "not flow": (tmp_path / "b/1.mp4.flow.mkv").write_bytes((pair / "clips/b/1.mp4").read_bytes())
    loader = VideoLoader(VideoClips(pair / "clips", "all", BOTH, training=False, flow=tmp_path, workers=2), 2)
    assert [path for batch in loader for path in batch["path"]] == ["a/0.mp4"] and loader.ledger.videos() == {"b/1.mp4": "no flow"}
    if fault == "short": assert "holds 19 flows for 20 frames" in loader.ledger.entries[0]["detail"]
