"""A network in a folder: what comes back is what was saved, to the bit, and what cannot is refused in one line."""
import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import nn

from attnnas.cells.derivation import random_cell
from attnnas.cells.fused import FusedSupergraph
from attnnas.core.errors import AttnnasError
from attnnas.networks import saved
from attnnas.networks.insertion import inserted, insert
from attnnas.networks.non_local import NonLocalBlock
from attnnas.networks.registry import create_model
from attnnas.networks.saved import from_pretrained, load, push_to_hub, save

CELL = random_cell(0, levels=1, width=4).cell
# One of each family, as small as its options allow.
FAMILIES = {"i3d_small": {"width_multiplier": .25}, "s3d_small": {"head": "mlp", "width_multiplier": .25},
            "i3d_r50": {"width": 8}, "slowfast_r50": {"width": 8}, "r2plus1d_r50": {"width": 8}, "patchnet": {"width": 8},
            "r50_frames": {"backbone": "mobilenetv2_050"}, "trn_multiscale": {"backbone": "mobilenetv2_050", "frames": 3},
            "stnet": {"backbone": "resnet18", "stack": 2, "width": 8}, "cnn_lstm": {"backbone": "mobilenetv2_050"},
            "two_stream": {"backbone": "mobilenetv2_050", "stack": 2},
            "mobilenetv2_frames": {"width": .35, "mechanism": "cbam"}}
SITELESS = ("cnn_lstm", "mobilenetv2_frames", "two_stream")


def randomised(model):
    "Every number drawn, so that no branch is idle and no two tensors are alike."
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters(): tensor.add_(torch.randn(tensor.shape).to(tensor) * .02)
        for name, tensor in model.named_buffers():
            if tensor.is_floating_point(): tensor.add_(torch.rand(tensor.shape).to(tensor) * .02)
    return model.eval()


def scores(model, x):
    with torch.no_grad(): return model(x)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back_to_the_bit(name, tmp_path):
    "If this fails, a published network is another one for whoever loads it."
    model = create_model(name, 3, **FAMILIES[name])
    if name not in SITELESS: insert(model, CELL, model.default_sites[:1] or ["cells"])
    model = randomised(model)
    save(model, tmp_path, classes=["a", "b", "c"])
    state = torch.get_rng_state()
    again = load(tmp_path)
    assert torch.equal(state, torch.get_rng_state()), "loading drew from the global generator"
    here, there = model.state_dict(), again.state_dict()
    assert list(here) == list(there) and all(torch.equal(here[k], there[k]) for k in here)
    assert not any(module.training for module in again.modules()) and again.classes == ["a", "b", "c"]
    assert list(inserted(again)) == list(inserted(model)) and again.made_by == model.made_by
    if name in ("i3d_small", "patchnet", "slowfast_r50"):
        x = torch.randn(2, model.in_channels, *(max(a, b) for a, b in zip(model.smallest, (8, 32, 32))))
        assert torch.equal(scores(model, x), scores(again, x))


class Tied(nn.Module):
    "A shared module, a shared parameter, a view of another tensor and channels-last maps."
    def __init__(self):
        super().__init__()
        self.first = self.second = nn.Conv3d(4, 4, 1)
        self.stem = nn.Conv3d(3, 4, 1)
        self.last = nn.Linear(4, 6)
        self.other = nn.Linear(4, 6)
        self.other.weight = self.last.weight
        self.register_buffer("table", torch.randn(6, 4))
        self.register_buffer("part", self.table[:2])

    def forward(self, x):
        maps = self.first(self.second(self.stem(x))).movedim(1, -1)
        maps = self.last(maps) + self.other(maps)
        return maps.mean((1, 2, 3)) + self.table.sum(1) + self.part.sum()


EXAMPLE = (1, 3, 4, 8, 8)


@pytest.mark.parametrize("kind", ("cell", "non-local", "sequence", "cell without norms"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_tied_modules_channels_last_sites_and_types(kind, dtype, tmp_path):
    from attnnas.cells.cell import AttentionCell
    what = {"cell": CELL, "non-local": lambda c: NonLocalBlock(c, 2, pool_keys=True), "sequence":
            lambda c: nn.Sequential(NonLocalBlock(c), AttentionCell(c, CELL)),
            "cell without norms": lambda c: AttentionCell(c, CELL, normalise=False)}[kind]
    model = randomised(insert(Tied(), what, ["stem", "other"], EXAMPLE).to(dtype))
    assert model.other.channel_axis == 4
    save(model, tmp_path)
    again = load(tmp_path, Tied())
    x = torch.randn(2, *EXAMPLE[1:], dtype=dtype)
    assert torch.equal(scores(model, x), scores(again, x)) and scores(again, x).dtype == dtype
    assert again.first is again.second and again.last.weight is again.other.original.weight
    assert again.other.channel_axis == 4
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file: names = set(file.keys())
    assert "second.weight" not in names and "first.weight" in names, "shared tensors are written once"


def test_safetensors_own_reader_takes_the_file(tmp_path):
    def whole():
        model = Tied()
        del model.part  # safetensors' own writer has no place for a part of a tensor
        return model

    save(randomised(whole()), tmp_path)
    safetensors.torch.load_model(whole(), tmp_path / "model.safetensors")


def test_a_site_inside_a_site_comes_back(tmp_path):
    model = insert(create_model("i3d_small", 3, width_multiplier=.25), CELL, "Mixed_4b")
    insert(model, CELL, "Mixed_4b.original.Branch_0")
    model = randomised(model)
    again = load(save(model, tmp_path))
    assert list(inserted(again)) == list(inserted(model))
    x = torch.randn(1, 3, 8, 32, 32)
    assert torch.equal(scores(model, x), scores(again, x))


def test_what_is_unknown_is_asked_for(tmp_path):
    "If this fails, a network comes back without what was inserted into it."
    def graph(): return insert(create_model("patchnet", 3, width=8), lambda c: FusedSupergraph(c, 4, 1), "cells")

    model = randomised(graph())
    save(model, tmp_path)
    with pytest.raises(AttnnasError, match="'cells' a FusedSupergraph.*network="): load(tmp_path)
    plain = create_model("patchnet", 3, width=8)
    with pytest.raises(AttnnasError, match="FusedSupergraph"): load(tmp_path, plain)
    assert not inserted(plain)
    x = torch.randn(2, 3, 4, 16, 16)
    assert torch.equal(scores(load(tmp_path, graph()), x), scores(model, x))


def test_a_network_that_does_not_fit_stays_as_it_was(tmp_path):
    save(randomised(insert(Tied(), CELL, "stem", EXAMPLE)), tmp_path)
    class Wider(Tied):
        def __init__(self):
            super().__init__()
            self.last = nn.Linear(4, 7)
    other = Wider()
    before = {name: t.clone() for name, t in other.state_dict().items()}
    with pytest.raises(AttnnasError, match=r"last.weight is \(6, 4\) in the file and \(7, 4\) here"): load(tmp_path, other)
    assert not inserted(other) and all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
    with pytest.raises(AttnnasError, match="no module 'stem'"): load(tmp_path, nn.Conv3d(3, 3, 1))
    with pytest.raises(AttnnasError, match=r"network=Tied\(...\)"): load(tmp_path)


@pytest.fixture
def folder(tmp_path):
    model = randomised(insert(create_model("patchnet", 2, width=8), CELL))
    model.classes, model.preprocessing, model.made_from = ["eel", "ray"], {"frames": 4, "size": 16}, {"seed": 3}
    return save(model, tmp_path / "net")


def edited(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("spoil, told", [
    (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    (lambda f: (f / "config.json").write_text("[]"), "not that of a network"),
    (lambda f: edited(f, library_name="timm"), "not that of a network"),
    (lambda f: edited(f, schema_version=2, library_version="9.9"), "newer attnnas .9.9."),
    (lambda f: edited(f, schema_version="x"), "schema version 'x', expected 1"),
    (lambda f: edited(f, inserted=None), "damaged: inserted"),
    (lambda f: edited(f, network={"name": "patchnett", "num_classes": 2, "options": {}}), "Did you mean 'patchnet'"),
    (lambda f: edited(f, network={"name": "patchnet", "num_classes": 3, "options": {"width": 8}}), "does not fit"),
    (lambda f: (f / "model.safetensors").write_bytes(b""), "is damaged"),
    (lambda f: flip(f / "model.safetensors"), "values are not those")])
def test_what_cannot_be_read_is_one_line(folder, spoil, told):
    "If this fails, a user of a damaged download sees a traceback, or wrong scores."
    spoil(folder)
    with pytest.raises(AttnnasError, match=told) as error: load(folder)
    assert "\n" not in str(error.value)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def test_no_folder(tmp_path):
    with pytest.raises(AttnnasError, match="no folder"): load(tmp_path / "none")
    (tmp_path / "file").write_text("")
    with pytest.raises(AttnnasError, match="is a file"): save(nn.Linear(1, 1), tmp_path / "file")


@pytest.mark.parametrize("ends_at", ("model.safetensors", "README.md", "config.json"))
def test_an_interrupted_save_leaves_a_whole_network(folder, ends_at, monkeypatch):
    "If this fails, a process that ended while it saved leaves weights of one network and the names of another."
    write = saved.write_atomic

    def dies(path, content):
        if path.name == ends_at: raise KeyboardInterrupt
        write(path, content)

    monkeypatch.setattr(saved, "write_atomic", dies)
    monkeypatch.setattr(saved, "write_json", dies)
    new = randomised(create_model("i3d_small", 3, width_multiplier=.25))
    with pytest.raises(KeyboardInterrupt): save(new, folder, classes=["x", "y", "z"])
    found = load(folder)
    old = ends_at == "model.safetensors"
    assert found.classes == (["eel", "ray"] if old else ["x", "y", "z"])
    assert found.made_by["name"] == ("patchnet" if old else "i3d_small")


@pytest.mark.parametrize("change, told", [
    ({"classes": ["a"]}, "1 classes for a network of 2"), ({"classes": [1, 2]}, "Give a list of strings"),
    ({"preprocessing": {"size": torch.ones(1)}}, "preprocessing holds tensor"), ({"made_from": {1: 2}}, "made_from holds")])
def test_what_a_file_cannot_hold_is_refused_before_it_is_written(change, told, tmp_path):
    with pytest.raises(AttnnasError, match=told): save(create_model("patchnet", 2), tmp_path / "net", **change)
    assert not (tmp_path / "net").exists()


def test_options_that_json_cannot_hold(tmp_path):
    model = create_model("patchnet", 2)
    model.made_by["options"] = {"norm": nn.BatchNorm3d}
    with pytest.raises(AttnnasError, match="option of patchnet.*made_by"): save(model, tmp_path / "net")
    with pytest.raises(AttnnasError, match="meta"): save(nn.Linear(1, 1, device="meta"), tmp_path / "net")
    model.made_by["options"] = {"pretrained": "some/file.pt", "width": 24}
    assert load(save(model, tmp_path / "net")).made_by["options"] == {"width": 24}


def test_a_card_of_ones_own_stays(folder):
    card = folder / "README.md"
    assert card.read_text().startswith("---\nlibrary_name: attnnas") and "eel, ray" in card.read_text()
    card.write_text("mine")
    save(load(folder), folder)
    assert card.read_text() == "mine"


def test_wrapped_networks_and_edited_classes(folder):
    model = load(folder)
    save(nn.DataParallel(model), folder)
    edited(folder, classes=["Aal", "Rochen"])
    again = load(folder)
    assert again.classes == ["Aal", "Rochen"] and again.made_from == {"seed": 3}


ALONE = """
import sys, types, importlib.machinery
root, folder = sys.argv[1:]
package = types.ModuleType("attnnas")      # without its __init__, which imports the searches
package.__path__ = [root + "/attnnas"]
sys.modules["attnnas"] = package
from attnnas.networks.saved import load
print(load(folder).classes)
rooms = {name.split(".")[1] for name in sys.modules if name.startswith("attnnas.")}
assert rooms <= {"core", "attention", "cells", "networks", "data"}, rooms
assert {name for name in sys.modules if name.startswith("attnnas.data.")} == {"attnnas.data.clips"}  # bytes to numbers
assert "huggingface_hub" not in sys.modules
"""


def test_loading_needs_neither_training_nor_search(folder):
    from pathlib import Path
    root = str(Path(saved.__file__).parents[2])
    done = subprocess.run([sys.executable, "-c", ALONE, root, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0 and "eel" in done.stdout, done.stderr


def test_the_hub(folder, tmp_path, monkeypatch):
    import huggingface_hub
    asked = {}

    def snapshot(name, **options):
        asked.update(options, name=name)
        if name == "some/gone": raise OSError("404: no such repository\nmore")
        return str(folder)

    class Api:
        def __init__(self, token=None): pass
        def create_repo(self, name, **options): asked.update(options, made=name)
        def upload_folder(self, repo_id, folder_path):
            asked["files"] = sorted(p.name for p in saved.Path(folder_path).iterdir())
            return "address"

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert from_pretrained(folder).classes == ["eel", "ray"] and not asked, "a folder needs no hub"
    assert from_pretrained("some/fishes", revision="v1").classes == ["eel", "ray"]
    assert asked["name"] == "some/fishes" and asked["revision"] == "v1"
    with pytest.raises(AttnnasError, match="404"): from_pretrained("some/gone")
    assert push_to_hub(load(folder), "some/fishes") == "address"
    assert asked["private"] and asked["files"] == ["README.md", "config.json", "model.safetensors"]
