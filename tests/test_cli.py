"""The command line: each bad input is one clear line and a non-zero exit code, and nothing finished is lost."""
import errno
import json
import re
import os
import subprocess
import sys
from pathlib import Path

import pytest

import forks
from commands import attnnas
from attnnas.cli import main as cli
from attnnas.cli.doctor import gpu_hours
from attnnas.cli.train import AT_CHANCE
from attnnas.cells.spec import CellSpec
from attnnas.evidence.config import RunConfig
from attnnas.evidence.run import run
from attnnas.evidence.sources import Generated
from attnnas.evidence.store import Store
from attnnas.training.loop import TrainingConfig

TINY = ["--frames", "4", "--size", "16", "--train-clips", "16", "--validation-clips", "8", "--test-clips", "12", "--epochs", "1",
        "--batch-size", "8", "--levels", "1", "--width", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A search, its genotype file and a training of it, made through the command line."
    folder = tmp_path_factory.mktemp("cli")
    for arguments, code in ((["search", "--output", folder / "cell.json"], AT_CHANCE), (["train", "--cell", folder / "cell.json"], 0)):
        assert cli.main([str(a) for a in [*arguments, "--results", folder, *TINY]]) == code, "so tiny a search stays at chance"
    return folder


def test_search_writes_a_genotype_that_train_inserts(made, capsys):
    cell = CellSpec.load(made / "cell.json")
    code, out, _ = attnnas(capsys, "train", "--cell", made / "cell.json", "--results", made, *TINY)
    assert code == 0 and "Reused run" in out and "Test accuracy" in out
    code, out, _ = attnnas(capsys, "list", "runs", "--results", made)
    first = out.splitlines()[0]
    runs = [line for line in out.splitlines() if re.match("[0-9a-f]{8} ", line)]
    assert len(runs) == 2 and " search " in out and "\nkey " in out and first.startswith("2 runs in") and str(made) in first
    key = next(line.split()[0] for line in runs if " cell " in line)
    code, out, _ = attnnas(capsys, "show", key[:8], "--results", made, "--picture", made / "cell.png")
    assert code == 0 and cell.hash in out and "top-1" in out and (made / "cell.png").stat().st_size > 5000


def test_show_a_genotype_file(made, capsys):
    code, out, _ = attnnas(capsys, "show", made / "cell.json")
    assert code == 0 and CellSpec.load(made / "cell.json").hash in out


def test_show_takes_a_copied_record_and_refuses_what_is_none(made, tmp_path, capsys):
    "If this fails, a record that was mailed cannot be read, or JSON of another kind ends in a traceback."
    record = next(made.glob("runs/*/record.json"))
    values = json.loads(record.read_text())
    copied = tmp_path / "mailed.json"
    copied.write_text(record.read_text())
    assert attnnas(capsys, "show", copied)[0] == 0
    lacking = {name: value for name, value in values.items() if name != "data"}
    for other in ([], 1, "text", {}, {"classes": ["a"]}, {"schema_version": 1}, lacking,
                  values | {"data": None}, values | {"history": 3}, values | {"seconds": {}}):
        copied.write_text(json.dumps(other))
        code, _, err = attnnas(capsys, "show", copied)
        assert code == 2 and "mailed.json" in err, other


def test_lists(capsys):
    for what, some, count in (("models", "i3d_small", None), ("operations", "temporal dot-product relu", 24),
                              ("templates", "table_1_nonlocal", None), ("tiers", "smoke", None)):
        code, out, _ = attnnas(capsys, "list", what)
        assert code == 0 and some in out and (count is None or len(out.splitlines()) == count)


def test_profile_of_a_network_with_a_cell(made, capsys):
    code, out, _ = attnnas(capsys, "profile", "i3d_small", "--classes", "12", "--insert", made / "cell.json", "--shape", "3", "8", "24", "24")
    assert code == 0 and "inserted at 2 sites" in out and "Input: 1 x 3 x 8 x 24 x 24" in out and "Mixed_4b.added" in out
    assert attnnas(capsys, "profile", "i3d_small", "--insert", "none.json")[0] == 2


def test_doctor_names_devices_packages_and_what_tiers_lack(capsys, tmp_path):
    code, out, _ = attnnas(capsys, "doctor", "--results", tmp_path)
    assert code == 0 and "torch" in out and "cpu" in out and "quick tier" in out and "GiB free" in out


def test_doctor_multiplies_measured_steps_by_the_clips_of_a_tier(tmp_path):
    "Two runs by hand: 100 epochs of 392,622 clips and 30,000 test clips of 250 x 256 x 256, at a third of a step; and one unknown."
    (tmp_path / "one.toml").write_text("""
[data]
frames = 64
size = 224
test_split = "validation"
test_frames = 250
test_size = 256
[training]
epochs = 100
[templates.table_1_nonlocal]
data = ["none/kinetics600.csv"]
backbones = ["i3d", "s3d"]
leave_out = ["backbone, MLP head", "non-local", "random cell", "derived cell"]
seeds = [0]
""")
    steps = [{"backbone": "i3d", "inserted": "none", "seconds_a_clip": "0.01"}]
    hours, count, unknown = gpu_hours(str(tmp_path / "one.toml"), steps)
    assert (count, unknown) == (2, 1)
    assert hours == pytest.approx(.01 * (39_262_200 + 30_000 * 250 * 256 * 256 / (64 * 224 * 224) / 3) / 3600)


def test_help_shows_every_field_with_its_documentation(capsys):
    with pytest.raises(SystemExit) as stop: cli.main(["train", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for text in ("--train-clips", "training clips of a generated set", "--connection-learning-rate", "--weight-decay", "--alpha"): assert text in out


BAD = [(["train", "--data", "nowhere"], "nowhere"), (["train", "--data", "EMPTY"], "EMPTY"),
       (["train", "--backbone", "i3d_smal"], "Did you mean 'i3d_small'"), (["train", "--insertion", "non-local", "--sites", "Mixed_4x"], "Mixed_4"),
       (["train", "--tier", "quik"], "Did you mean 'quick'"), (["train", "--cell", "FIELD"], "activaton"), (["train", "--cell", "VERSION"], "version"),
       (["train", "--cell", "TEXT"], "not JSON"), (["train", "--cell", "none.json"], "none.json"), (["train", "--epochs", "0"], "epochs = 0"),
       (["train", "--device", "cuda:99"], "cuda:99"), (["train", "--device", "tpu"], "tpu"), (["search", "--levels", "0"], "levels = 0"),
       (["reproduce", "--tier", "ful1"], "ful1"), (["reproduce", "--template", "table_9"], "table_9"), (["show", "0000"], "0 runs"),
       (["train", "--insertion", "cell"], "The inserted cell is None"), (["profile", "i3d_smal"], "Did you mean 'i3d_small'"),
       (["profile", "i3d_small", "--shape", "4", "8", "24", "24"], "takes clips (B, 3"), (["profile", "i3d_small", "--sites", "Mixed_4x", "--insert", "cbam"], "Mixed_4b")]


@pytest.mark.parametrize("arguments, message", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input_is_one_line_and_a_nonzero_exit(arguments, message, capsys, tmp_path, made):
    values = json.loads((made / "cell.json").read_text())
    operation = {("activaton" if k == "activation" else k): v for k, v in values["operations"][0].items()}
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "FIELD").write_text(json.dumps(values | {"operations": [operation, *values["operations"][1:]]}))
    (tmp_path / "VERSION").write_text(json.dumps(values | {"schema_version": 99}))
    (tmp_path / "TEXT").write_text("a cell")
    arguments = [str(tmp_path / a) if (tmp_path / a).exists() else a for a in arguments]
    sized = TINY if arguments[0] in ("train", "search") else []
    code, _, err = attnnas(capsys, *arguments[:1], "--results", tmp_path / "results", *sized, *arguments[1:])
    assert code == 2 and message in err
    assert len([line for line in err.splitlines() if line.startswith("attnnas")]) == 1 and "Traceback" not in err


def test_a_results_folder_that_cannot_be_written_is_named(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = attnnas(capsys, "train", "--results", tmp_path / "file", *TINY)
    assert code == 2 and "Could not write" in err and str(tmp_path / "file") in err


def run_on_a_full_disk(results):
    def full(handle): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    data = Generated(frames=4, size=16, train_clips=16, validation_clips=8, test_clips=12)
    os.fsync = full
    run(RunConfig(data=data, training=TrainingConfig(epochs=1, batch_size=8)), Store(results), "cpu")


def test_a_full_disk_is_named_and_finished_runs_stay(made, tmp_path):
    before = {path: path.read_bytes() for path in made.glob("runs/*/record.json")}
    status = forks.Forked(run_on_a_full_disk, made, output=tmp_path / "output.txt").wait(100)
    told = (tmp_path / "output.txt").read_text()
    assert status and "No space left on device" in told and "Free some space" in told
    assert before == {path: path.read_bytes() for path in made.glob("runs/*/record.json")} and len(before) == 2
    assert not list(made.rglob("*.tmp"))


def test_the_console_script_is_installed():
    found = subprocess.run([Path(sys.executable).with_name("attnnas"), "--version"], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.strip()


@pytest.mark.parametrize("words", [["list", "models"], ["doctor", "--plan"]])
def test_a_reader_that_has_seen_enough_is_no_error(words):
    "As `attnnas list models | head -1`; the first one fits into the pipe's buffer, the other is written line by line."
    command = [sys.executable, "-c", "import sys; from attnnas.cli.main import main; sys.exit(main())", *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    told = process.stderr.read()
    assert (process.wait(120), told) == (0, "")
