"""Training from encoded video, end to end: the benchmark writes itself as .mp4 files, and the command line reads them."""
import pytest

from attnnas.cli import main as cli
from attnnas.data.synthetic import benchmark
from attnnas.data.folders import write_video_folder
from attnnas.evidence.store import Store


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_video_folder(folder, benchmark("A", frames=8, size=32), {"train": 36, "validation": 12, "test": 24})
    return folder


def train(folder, results, *options):
    return cli.main(["train", "--data", str(folder), "--frames", "8", "--size", "32", "--epochs", "2", "--batch-size", "12",
                     "--device", "cpu", "--results", str(results), *options])


def test_training_from_encoded_video(folder, tmp_path, capsys):
    "Twelve classes from folder names, all clips counted, groups kept, and the same accuracy again."
    assert train(folder, tmp_path / "a") == 0 and train(folder, tmp_path / "b") == 0
    (first,), (second,) = (Store(tmp_path / name).records() for name in "ab")
    assert first.data["train_clips"] == 36 and first.test["count"] == 24 and len(first.data["classes"]) == 12
    assert first.test == second.test and first.history[-1]["loss"] < first.history[0]["loss"]
    assert {"single", "relation"} == set(first.test["by"]["kind"])
    assert "Test accuracy" in capsys.readouterr().out


def test_a_changed_video_is_another_run(folder, tmp_path):
    "The fingerprint of a folder follows its files, so a record never stands for data that changed."
    train(folder, tmp_path)
    write_video_folder(tmp_path / "other", benchmark("A", frames=8, size=32), {"train": 36, "validation": 12, "test": 24}, seed=1)
    train(tmp_path / "other", tmp_path)
    records = Store(tmp_path).records()
    assert len({record.data["fingerprint"] for record in records}) == 2


def test_a_class_that_training_does_not_have_is_refused(folder, tmp_path, capsys):
    import shutil
    shutil.copytree(folder, tmp_path / "videos")
    first = sorted((tmp_path / "videos/train").iterdir())[0]
    shutil.rmtree(first)
    assert train(tmp_path / "videos", tmp_path) == 2
    assert first.name in capsys.readouterr().err


def test_training_videos_that_others_stood_in_for_are_in_the_record(folder, tmp_path):
    "A loss over other videos than those listed is not told by the accuracy; it is told by the record, after a stop too."
    import shutil
    import signal
    from attnnas.evidence.config import RunConfig
    from attnnas.evidence.run import run
    from attnnas.evidence.sources import Videos
    from attnnas.training.loop import Interrupted, TrainingConfig
    shutil.copytree(folder, tmp_path / "videos")
    classes = sorted((tmp_path / "videos/train").iterdir())
    for name in classes[:3]: sorted(name.glob("*.mp4"))[0].write_bytes(b"broken" * 100)
    sorted(classes[3].glob("*.mp4"))[0].write_bytes(b"")
    config = RunConfig(Videos(str(tmp_path / "videos"), frames=4, size=16), training=TrainingConfig(epochs=1, batch_size=12))
    whole = run(config, Store(tmp_path / "whole"), "cpu")
    assert whole.data["unreadable"] == {"train": {"empty": 1, "not a video": 3}} and whole.processes == 1

    def stop(step, steps): signal.raise_signal(signal.SIGTERM)
    config.data.open()["train"].lost.clear()
    with pytest.raises(Interrupted): run(config, Store(tmp_path / "stopped"), "cpu", stop)
    config.data.open()["train"].lost.clear()  # another process knows nothing of what this one has seen
    with pytest.raises(Interrupted): run(config, Store(tmp_path / "stopped"), "cpu", stop)
    config.data.open()["train"].lost.clear()
    assert run(config, Store(tmp_path / "stopped"), "cpu").data["unreadable"] == whole.data["unreadable"]
