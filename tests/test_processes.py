"""Two CPU processes share a training: the same gradients, every clip counted once, the paper's protocol on small data."""
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

pytest.importorskip("accelerate")

import forks
from attnnas.cells.derivation import random_cell
from attnnas.core.errors import AttnnasError
from attnnas.core.seeds import seed_everything
from attnnas.data.clips import Clips
from attnnas.evidence.config import load_tier
from attnnas.evidence.executor import execute
from attnnas.evidence.run import key_of
from attnnas.evidence.store import Store
from attnnas.evidence.tables.rows import Row
from attnnas.evidence.tables.table import changed
from attnnas.evidence.tables.text import provenance
from attnnas.networks.insertion import insert
from attnnas.networks.non_local import NonLocalBlock
from attnnas.networks.profile import count_flops
from attnnas.networks.registry import create_model
from attnnas.search.differentiable import SearchConfig, insert_supergraphs, search_trainer
from attnnas.training.evaluation import in_turns, predict
from attnnas.training.loop import Trainer, TrainingConfig
from attnnas.training.processes import OneProcess, processes, shared_device, start_together

CASES = {"cell": 0, "non-local": 3, "supergraph": 4}  # clips in a pass; 0: all


def steps(where):
    "Train one batch of each case as one of some processes, and write what came of it. They once did not find each other on auto."
    group = processes("auto" if not torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    for what, micro in CASES.items(): torch.save(step(what, micro, group), f"{where}.{what}.{group.count}.{group.rank}")
    group.end()


def step(what, micro, group) -> dict:
    seed_everything(0)
    model = create_model("i3d_small", num_classes=4)
    model.register_forward_pre_hook(lambda model, inputs: inputs[0].double())   # so that only what is wrong differs, not what is rounded
    search = SearchConfig(levels=1, width=8)
    clips = Clips(torch.randint(0, 256, (11, 3, 8, 16, 16), dtype=torch.uint8), torch.arange(11) % 4, list("abcd"), {}, {}, "f")
    training = TrainingConfig(batch_size=7, micro_batch=micro, optimizer="sgd", clip_norm=1e9)
    if what == "supergraph": trainer = search_trainer(insert_supergraphs(model, search), clips, search, training, processes=group)
    else:
        if what == "non-local": insert(model, NonLocalBlock)
        if what == "cell": insert(model, random_cell(1, 2, width=8).cell)
        for p in model.parameters(): p.data += .01 * torch.randn_like(p)     # insertions that start as nothing have no gradient
        trainer = Trainer(model, clips, training, processes=group)
    trainer.train_batch(torch.tensor([3, 1, 4, 10, 5, 9, 2]))
    return {"gradients": torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), "totals": trainer.totals,
            "buffers": torch.cat([b.flatten() for b in model.buffers() if b.is_floating_point()]),
            "scores": predict(model, clips, 3, processes=group), "ranks": torch.tensor(group.gather(group.rank))}


@pytest.fixture(scope="module")
def stepped(tmp_path_factory):
    "Where one process, and two together, have written what came of `steps`."
    folder = tmp_path_factory.mktemp("steps")
    for process in [member for count in (1, 2) for member in start_together(count, forks.FORKS, steps, folder / "out")]:
        process.join(300)
        assert process.exitcode == 0
    return folder


@pytest.mark.parametrize("what", CASES)
def test_two_processes_have_the_gradients_of_one(stepped, what):
    "Seven clips of which one process has four, in one pass or in several; batch normalisation sees all that pass at once."
    one, first, second = (torch.load(stepped / f"out.{what}.{end}") for end in ("1.0", "2.0", "2.1"))
    assert one.pop("ranks").tolist() == [0] and first["ranks"].tolist() == second["ranks"].tolist() == [0, 1]
    for name in one:
        apart = (one[name] - first[name]).abs().max() / one[name].abs().max()
        assert apart < 1e-6, f"{name}: {apart:.1e}"
        assert first[name].equal(second[name]), name
    assert one["totals"][2] == first["totals"][2] == 7 and len(first["scores"]) == 11


class Third(OneProcess):
    rank, count = 2, 3


def test_what_was_shared_out_comes_back_in_order():
    for count in (1, 2, 3, 5):
        for length in range(8):
            parts = []
            for rank in range(count):
                group = Third()
                group.rank, group.count = rank, count
                parts.append(group.share(list(range(length))))
            assert in_turns(parts) == list(range(length))


def test_a_process_without_a_clip_is_refused_before_training():
    clips = Clips(torch.zeros(9, 3, 2, 4, 4, dtype=torch.uint8), torch.zeros(9, dtype=torch.int64), ["a"])
    with pytest.raises(AttnnasError, match="9 clips in batches of 4, 4 at once, leave 1 for 3 processes"):
        Trainer(torch.nn.Linear(1, 1), clips, TrainingConfig(batch_size=4), processes=Third())
    Trainer(torch.nn.Linear(1, 1), clips, TrainingConfig(batch_size=3), processes=Third())


@pytest.fixture(scope="module")
def config():
    run = load_tier("smoke").run("A", "i3d_small", "non-local", seed=0)
    return changed(run, data={"train_clips": 60, "validation_clips": 21, "test_clips": 33}, training={"batch_size": 16, "epochs": 2})


def test_a_shared_run_is_the_run_of_one(config, tmp_path):
    one, = execute([config], Store(tmp_path / "one"), 1, "cpu", show=False)
    two, = execute([config], Store(tmp_path / "two"), 1, "cpu", show=False, processes=2)
    assert two.key == one.key and two.test["count"] == 33 and two.history[-1]["validation"]["count"] == 21
    assert two.history[0]["loss"] == pytest.approx(one.history[0]["loss"], rel=1e-4)
    assert two.test["loss"] == pytest.approx(one.test["loss"], rel=1e-2)
    assert not (tmp_path / "two/runs" / two.key / "processes.log").exists()


def test_a_wrong_run_says_why(config, tmp_path):
    with pytest.raises(AttnnasError, match="1 for 2 processes"):
        execute([changed(config, data={"train_clips": 17})], Store(tmp_path), 1, "cpu", show=False, processes=2)


def test_what_several_processes_cannot_share_is_refused_before_any_work(config, tmp_path):
    "Otherwise each would be a training of its own, or wait for the others for ever."
    for device, count, told in (("cuda:0", 2, "cuda|CUDA"), ("cuda", 100, "GPU|CUDA"), ("cpu", 0, "processes must be"), ("cpu", -2, "processes must be")):
        with pytest.raises(AttnnasError, match=told): execute([config], Store(tmp_path), 1, device, show=False, processes=count)
    with pytest.raises(AttnnasError, match="workers must be"): execute([config], Store(tmp_path), -1, "cpu", show=False)
    assert not list(tmp_path.iterdir())
    if not torch.cuda.is_available(): assert shared_device("auto", 2) == "cpu"


TOGETHER = """
import sys
from attnnas.training.processes import processes
group = processes("cpu")
if group.rank == 1: sys.exit("gone")
group.gather(group.rank)
"""


def test_a_process_that_is_gone_ends_the_others(tmp_path):
    "If this fails, a launcher waits for what will never come, or a process aborts at its exit."
    (tmp_path / "script.py").write_text(TOGETHER)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, tmp_path / "script.py"], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=60)
    assert done.returncode != 0 and "SIGABRT" not in done.stderr


def batch(config, folder):
    "Be a batch of one run that two processes share."
    execute([config], Store(folder), 1, "cpu", False, processes=2)


def test_stopped_and_killed_shared_runs_leave_no_process_and_continue(config, tmp_path):
    """Again and again, each time as far as a checkpoint of its own: its batch is asked to stop, its batch is killed, and one of
    its processes is killed. That one ends the other and the call within a minute, with a message. The last call finishes."""
    config = changed(config, training={"epochs": 25})
    checkpoint = Store(tmp_path).path(key_of(config), "checkpoint.safetensors")
    output = tmp_path / "output.txt"
    for how in ("stop", "kill", "kill a part"):
        before = checkpoint.stat().st_mtime_ns if checkpoint.exists() else None
        process = forks.Forked(batch, config, tmp_path, output=output)
        until(lambda: checkpoint.exists() and checkpoint.stat().st_mtime_ns != before or process.poll() is not None)
        assert process.poll() is None, output.read_text()
        if how == "kill a part": os.kill(parts(process.pid)[1], signal.SIGKILL)
        else: process.send_signal(signal.SIGTERM if how == "stop" else signal.SIGKILL)
        process.wait(90)
        until(lambda: is_gone(process.pid))
        assert checkpoint.exists() and not checkpoint.with_name("record.json").exists()
    assert process.poll() == 1 and "failed or was killed" in output.read_text()
    short = execute([config], Store(tmp_path), 1, "cpu", show=False, processes=2)[0]
    assert len(short.history) == 25 and not checkpoint.exists()


def is_gone(group: int) -> bool:
    try: os.killpg(group, 0)
    except ProcessLookupError: return True
    return False


def parts(group: int) -> list:
    "Ids of the processes that share a run: those of a batch's group, but for the batch."
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        with suppress(OSError):
            if os.getpgid(int(process)) == group != int(process): found.append(int(process))
    return found


def until(true, seconds: float = 180):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(.1)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    "A prepared data set: a manifest, flow files, and weights of a GoogLeNet where torch keeps its downloads."
    pytest.importorskip("av"), pytest.importorskip("cv2")
    from torchvision.models import googlenet
    from attnnas.data.flow import optical_flow, write_flow
    from attnnas.data.folders import write_video_folder
    from attnnas.data.layout import folder_manifest
    from attnnas.data.synthetic import benchmark, make_clips
    folder, made = tmp_path_factory.mktemp("prepared"), benchmark("A", frames=12, size=32)
    counts = {"train": 14, "validation": 9}
    write_video_folder(folder / "videos", made, counts)
    for split, count in counts.items():
        for file in (folder / "videos").glob(f"{split}/*/*.mp4"):
            flow = optical_flow(make_clips(made, split, count).video[int(file.stem[-6:])], "farneback").transpose(0, 1)
            write_flow(folder / "flow" / file.relative_to(folder / "videos").with_name(file.name + ".flow.mkv"), flow, bound=4., method="farneback")
    sorted((folder / "videos").glob("validation/*/*.mp4"))[3].write_bytes(b"")
    folder_manifest(folder / "videos").save(folder / "small.csv")
    (folder / "hub/checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(googlenet(init_weights=False).state_dict(), folder / "hub/checkpoints/googlenet-1378be20.pth")
    return folder


@pytest.mark.parametrize("modality", ["rgb", "flow"])
def test_the_papers_protocol_on_small_data(prepared, tmp_path, monkeypatch, modality):
    "Random crops of a manifest, an inflated start, micro-batches, longer and larger test clips, of which one is lost."
    monkeypatch.setenv("TORCH_HOME", str(prepared))
    run = load_tier("paper").run(str(prepared / "small.csv"), "i3d", "non-local", seed=0)
    precision = {"rgb": run.training.precision, "flow": "fp32"}[modality]  # bf16 takes ten times as long where a CPU has none
    run = changed(run, data={"frames": 8, "size": 32, "test_frames": 10, "test_size": 40, "modality": modality, "flow": str(prepared / "flow")},
                  training={"epochs": 1, "batch_size": 8, "micro_batch": 4, "precision": precision})
    record, = execute([run], Store(tmp_path), 1, "cpu", show=False, processes=2 if modality == "rgb" else 1)
    assert record.status == "finished" and record.data["train_clips"] == 14 and "validation_clips" not in record.data
    assert (record.test["count"], record.test["asked"], record.test["unreadable"]) == ((8, 9, {"empty": 1}) if modality == "rgb" else (9, 9, {}))
    model = create_model("i3d", num_classes=len(record.data["classes"]), in_channels=3 if modality == "rgb" else 2)
    shape = (1, model.in_channels, 10, 40, 40)
    assert record.gflops == pytest.approx(count_flops(insert(model, NonLocalBlock), shape) / 1e9)
    said = provenance([Row(str(prepared / "small.csv"), "i3d", "non-local", (record,))])
    assert "14 training and 9 test clips of 8 frames at 32x32, tested in 10 frames at 40x40" in said
    assert ("1 test clips could not be read" in said) == (modality == "rgb")


def test_a_start_that_cannot_be_had_is_said_before_training(tmp_path):
    run = load_tier("smoke").run("A", "i3d_small", "none", seed=0, start="imagenet")
    with pytest.raises(AttnnasError, match="backbone that starts from ImageNet .i3d_small"): execute([run], Store(tmp_path), 1, "cpu", show=False)
