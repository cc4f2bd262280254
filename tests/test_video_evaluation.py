"""A test on real videos: which count, what a network is given, and what its result says of the data."""
import pytest
import torch
from torch import nn

pytest.importorskip("av"), pytest.importorskip("cv2"), pytest.importorskip("torchvision")

from attnnas.core.errors import AttnnasError
from attnnas.data.clips import to_float
from attnnas.data.flow import optical_flow, to_bytes, write_flow
from attnnas.data.synthetic import benchmark, make_clips
from attnnas.data.cutting import ClipConfig, as_bytes
from attnnas.data.folders import write_video_folder
from attnnas.data.video import VideoClips
from attnnas.training.evaluation import evaluate, predict

CONFIG = benchmark("A", frames=12, size=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "videos"
    write_video_folder(folder, CONFIG, {"train": 12, "test": 9})
    for file in folder.glob("test/*/*.mp4"):
        video = make_clips(CONFIG, "test", 9).video[int(file.stem[-6:])]
        flow = optical_flow(video, "farneback").transpose(0, 1)
        write_flow(folder.parent / "flow" / file.relative_to(folder).with_name(file.name + ".flow.mkv"), flow, bound=4., method="farneback")
    return folder


class Remembers(nn.Module):
    "Scores that depend on all it sees, and what it saw."
    def __init__(self):
        super().__init__()
        self.dropout, self.seen = nn.Dropout(.5), []

    def forward(self, x):
        self.seen.append(x)
        return self.dropout(x.flatten(1)[:, ::97][:, :24].cumsum(1))


@pytest.mark.parametrize("stream, channels", [("rgb", 3), ("flow", 2), ("both", 5)])
def test_a_network_sees_colours_flow_or_both(folder, stream, channels):
    clips = VideoClips(folder, "test", ClipConfig(frames=6, size=32, stream=stream, bound=4.), training=False, flow=folder.parent / "flow")
    model = Remembers()
    result = evaluate(model, clips, 4)
    assert result["count"] == result["asked"] == 9 and result["unreadable"] == {} and model.training
    seen = torch.cat(model.seen)
    assert seen.shape == (9, channels, 6, 32, 32)
    if stream != "rgb": assert seen[:, -2:].equal(to_float(to_bytes(torch.stack([clips[i]["flow"] for i in range(9)]), 4.)))
    if stream != "flow": assert seen[:, :3].equal(to_float(torch.stack([clips[i]["video"] for i in range(9)])))


@pytest.mark.parametrize("workers", [0, 2])
def test_views_are_averaged_and_what_is_lost_is_counted(folder, tmp_path, workers):
    import shutil
    shutil.copytree(folder, tmp_path / "v")
    lost = sorted((tmp_path / "v").glob("test/*/*.mp4"))[::4]
    for file in lost: file.write_bytes(b"")
    clips = VideoClips(tmp_path / "v", "test", ClipConfig(frames=5, size=24, views=2, crops=3), training=False, workers=workers)
    model = Remembers().train()
    result = evaluate(model, clips, 2)
    assert result["count"] == 9 - len(lost) and result["asked"] == 9 and result["unreadable"] == {"empty": len(lost)}
    assert result["data"]["videos"] == 9 and result["data"]["unreadable"] == {"empty": len(lost)}
    model.eval()
    scores = torch.stack([model(to_float(clips[i]["video"])).mean(0) for i in range(9) if "video" in clips[i]])
    assert all(x.shape[1:] == (3, 5, 24, 24) for x in model.seen)
    labels = clips.labels[[i for i in range(9) if "video" in clips[i]]]
    assert result["loss"] == pytest.approx(nn.functional.cross_entropy(scores, labels).item(), rel=1e-5)
    assert sum(group["count"] for group in result["by"]["class"].values()) == result["count"]
    with pytest.raises(AttnnasError, match=f"{len(lost)} of 9 clips could not be read"): predict(model, clips, 2)


def test_nothing_to_test_is_said(folder):
    training = VideoClips(folder, "train", ClipConfig(frames=5, size=24), training=True)
    with pytest.raises(AttnnasError, match="training clips"): evaluate(Remembers(), training, 2)
    clips = VideoClips(folder, "test", ClipConfig(frames=5, size=24), training=False)
    clips.lost = {i: ("gone", "") for i in range(9)}
    with pytest.raises(AttnnasError, match="None of the 9 videos of split 'test'"): evaluate(Remembers(), clips, 2)


def test_a_batch_of_bytes_and_pixels():
    batch = {"video": torch.full((2, 3, 4, 5, 5), 115, dtype=torch.uint8), "flow": torch.full((2, 2, 4, 5, 5), -50.)}
    x = to_float(as_bytes(batch, 20.))
    assert x.shape == (2, 5, 4, 5, 5) and x[:, 3:].unique().numel() == 1 and x[0, 3, 0, 0, 0] == to_float(torch.ones(1, dtype=torch.uint8))
