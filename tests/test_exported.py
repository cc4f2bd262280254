"""Exported files: every model with cells, every operation and block, in both formats, compared on two other batches.

ONNX takes seconds a network to make, so the ordinary tests export one of each kind; `--slow` exports them all."""

import pytest
import torch
from torch import nn

for package in ("onnx", "onnxscript", "onnxruntime"): pytest.importorskip(package)

from attnnas.attention.formula import ACTIVATIONS
from attnnas.cells.fused import FusedSupergraph
from attnnas.cells.operations.base import DIMENSIONS
from attnnas.cells.operations.registry import OPERATIONS, create_operation
from attnnas.cells.spec import CellSpec, OperationSpec
from attnnas.cells.supergraph import Supergraph, level_nodes
from attnnas.core.errors import AttnnasError
from attnnas.networks import export as exporting
from attnnas.networks.export import TOLERANCE, export, exported_metadata
from attnnas.networks.insertion import insert
from attnnas.networks.non_local import NonLocalBlock
from attnnas.networks.registry import create_model, list_models
from attnnas.visual.cbam import CBAM
from attnnas.visual.networks import VISUAL_MODELS

CLOSE = 2e-5  # of the largest score, for every network here; `export` itself refuses TOLERANCE
SPEC = CellSpec((OperationSpec("temporal", "dot-product", "softmax"),
                 OperationSpec("spatiotemporal", "map-based", "sigmoid")), inputs=((0,), (0, 1)), width=4)
FRAMES = {"backbone": "resnet10t"}
# Model -> options that shrink it, and the least clip (C, T, H, W) that it takes with them.
MODELS = {
    "patchnet": ({}, (3, 2, 16, 16)),
    "i3d_small": ({"width_multiplier": .25}, (3, 2, 16, 16)),
    "s3d_small": ({"width_multiplier": .25}, (3, 2, 16, 16)),
    "i3d": ({"width_multiplier": .1}, (3, 2, 33, 33)),
    "s3d": ({"width_multiplier": .1, "padding": "symmetric"}, (3, 16, 64, 64)),
    "d3d": ({"layout": "small", "width_multiplier": .25}, (3, 2, 17, 17)),
    "i3d_r50": ({"width": 4}, (3, 2, 33, 33)),
    "slowfast_r50": ({"width": 8}, (3, 8, 33, 33)),
    "r2plus1d_r50": ({"width": 4}, (3, 4, 33, 33)),
    "r50_frames": (FRAMES, (3, 2, 33, 33)),
    "tsn_r50": (FRAMES, (3, 2, 33, 33)),
    "tsn_irv2": (FRAMES, (3, 2, 33, 33)),
    "tsn_two_stream": (FRAMES | {"stack": 2}, (5, 4, 33, 33)),
    "two_stream": ({"backbone": "mobilenetv2_035", "stack": 2}, (5, 4, 64, 64)),
    "trn_multiscale": (FRAMES | {"frames": 3}, (3, 3, 33, 33)),
    "trn_two_stream": (FRAMES | {"frames": 2, "stack": 2}, (5, 4, 33, 33)),
    "stnet": (FRAMES | {"stack": 2}, (3, 4, 33, 33)),
    "stnet_irv2": (FRAMES | {"stack": 2, "temporal_after": ("layer2",)}, (3, 4, 33, 33)),
    "cnn_lstm": (FRAMES | {"hidden": 8}, (3, 2, 33, 33)),
    "c3d": ({}, (3, 1, 97, 97)),
    "mvit_b": ({"frames": 4, "size": 32}, (3, 4, 32, 32)),
    "assemblenet_50": ({}, (5, 2, 33, 33)),
    "mobilenetv2_frames": ({"width": .35, "mechanism": "cbam"}, (3, 2, 64, 64)),
    "mobilenetv2_two_stream": ({"width": .35, "rgb": "l2pa", "flow": "gated", "stack": 2}, (5, 4, 64, 64)),
}
ORDINARY = ("patchnet",)


def awake(module, seed=0):
    "A module whose zero-initialised norms let their branches through, with the statistics of something."
    torch.manual_seed(seed)
    for part in module.modules():
        if not isinstance(part, (nn.BatchNorm2d, nn.BatchNorm3d)): continue
        part.running_mean.normal_(0, .1)
        if part.affine: nn.init.ones_(part.weight)
    return module


def with_cells(name):
    options, shape = MODELS[name]
    model = create_model(name, 3, **options)
    if model.default_sites: insert(model, SPEC, example=(1, *shape))
    return awake(model), (1, *shape)


class Scores(nn.Module):
    "A block as a network: its mean over all positions."
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks: x = x + block(x)
        return x.flatten(2).mean(2)


def check(model, shape, folder, formats=("pt2", "onnx")):
    for name in formats:
        written = export(model, folder / f"network.{name}", example=shape)
        assert written.difference < CLOSE < TOLERANCE and written.size == written.path.stat().st_size


# Models

def test_the_table_has_every_model():
    "If this fails, a new model has no row, and nobody knows whether it can be exported."
    assert set(MODELS) == set(list_models())


@pytest.mark.parametrize("name", [name if name in ORDINARY else pytest.param(name, marks=pytest.mark.slow) for name in MODELS])
def test_every_model_with_cells_is_exported(name, tmp_path): check(*with_cells(name), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patchnet", "i3d_small", "i3d_r50", "slowfast_r50", "r50_frames", "c3d", "mvit_b", "assemblenet_50",
                                  "mobilenetv2_frames"])
def test_a_network_of_each_family_is_compiled_whole(name):
    torch.compiler.reset()  # Backbone.forward is one code, and dynamo compiles it for eight networks at most
    model, shape = with_cells(name)
    compiled = torch.compile(model.eval(), fullgraph=True, backend="eager", dynamic=True)
    with torch.no_grad():
        for count in (2, 3):
            x = torch.randn(count, *shape[1:])
            torch.testing.assert_close(compiled(x), model(x))


# Operations

def operations(activation, type=None):
    return [create_operation(dimension, kind, activation, 4) for dimension in DIMENSIONS for kind in OPERATIONS
            if type in (None, kind) and activation in (*OPERATIONS[kind].activations, "mixture")]


@pytest.mark.parametrize("activation", [name if name in ("softmax", "mixture") else pytest.param(name, marks=pytest.mark.slow)
                                        for name in (*ACTIVATIONS, "mixture")])
def test_every_operation_is_recorded(activation, tmp_path):
    "Every type x dimension x activation."
    check(awake(Scores(*operations(activation))), (1, 4, 3, 4, 5), tmp_path, ["pt2"])


@pytest.mark.parametrize("activation", ["softmax", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "relu", "sigmoid", "mixture"))])
def test_every_operation_is_in_onnx(activation, tmp_path):
    check(awake(Scores(*operations(activation))), (1, 4, 3, 4, 5), tmp_path, ["onnx"])


@pytest.mark.parametrize("activation", ["softmax", "relu"])
def test_attention_over_more_positions_than_are_kept_at_once(activation, tmp_path):
    "The kernels that a long clip takes; on a short one the scores are kept whole."
    operation = create_operation("spatiotemporal", "dot-product", activation, 4)
    check(Scores(operation), (1, 4, 5, 16, 16), tmp_path, ["pt2"])


BLOCKS = {"non-local": NonLocalBlock, "pooled": lambda c: NonLocalBlock(c, pool_keys=True), "cbam": CBAM,
          "supergraph": lambda c: Supergraph(c, 4, 2), "fused": lambda c: FusedSupergraph(c, 4, 2),
          "fused mixture": lambda c: FusedSupergraph(c, 4, 2, level_nodes(keys="pooled"), activations="mixture")}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) if name == "supergraph" else name for name in BLOCKS])
def test_every_block_is_recorded(name, tmp_path):
    check(awake(Scores(BLOCKS[name](4))), (1, 4, 3, 4, 4), tmp_path, ["pt2"])


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_is_in_onnx(name, tmp_path):
    check(awake(Scores(BLOCKS[name](4))), (1, 4, 3, 4, 4), tmp_path, ["onnx"])


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", VISUAL_MODELS)
def test_every_visual_mechanism_is_exported(mechanism, tmp_path):
    check(awake(create_model("mobilenetv2_frames", 3, mechanism=mechanism, width=.35)), (1, 3, 1, 64, 64), tmp_path)


# What stays and what is told

class Tiny(nn.Module):
    example_shape = (1, 3, 2, 4, 4)

    def __init__(self, forward=lambda x: x.mean((2, 3, 4))):
        super().__init__()
        self.made = forward
        self.norm, self.drop = nn.BatchNorm3d(3), nn.Dropout(.5)

    def forward(self, x): return self.made(self.drop(self.norm(x)))


def test_the_network_stays_as_it_is(tmp_path):
    model = Tiny()
    model.drop.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    export(model, tmp_path / "a.pt2")
    assert [module.training for module in model.modules()] == modes == [True, True, False]
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(AttnnasError): export(Tiny(lambda x: x.mean((2, 3, 4)) * len(x)).train(), tmp_path / "b.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt2"]


def test_what_the_network_knows_is_in_the_file(tmp_path):
    model = Tiny()
    model.classes, model.preprocessing = ["one", "zwei", "três"], {"frames": 5, "size": 6, "stride": 2}
    for name in ("pt2", "onnx"):
        written = export(model, tmp_path / f"a.{name}")
        assert written.clip == (3, 5, 6, 6)  # the clip that it was trained on, not the published one
        told = exported_metadata(written.path)
        assert (told["classes"], told["preprocessing"], told["clip"]) == (model.classes, model.preprocessing, [3, 5, 6, 6])


def test_other_programs_run_the_files(tmp_path):
    import onnxruntime
    model = awake(Tiny()).eval()
    x = torch.randn(7, 3, 2, 4, 4)
    onnx = onnxruntime.InferenceSession(export(model, tmp_path / "a.onnx").path)
    assert onnx.get_inputs()[0].shape[1:] == [3, 2, 4, 4] and isinstance(onnx.get_inputs()[0].shape[0], str)
    torch.testing.assert_close(torch.from_numpy(onnx.run(["scores"], {"clips": x.numpy()})[0]), model(x))
    loaded = torch.export.load(export(model, tmp_path / "a.pt2").path)
    torch.testing.assert_close(loaded.module()(x), model(x))


# What is refused

@pytest.mark.parametrize("forward, told", [
    (lambda x: x.mean((2, 3, 4)) * len(x), "Tiny bakes the number of clips in"),
    (lambda x: x.mean((2, 3, 4)) if x.sum() > 0 else x.amax((2, 3, 4)), "Tiny cannot be recorded"),
    (lambda x: [x.mean((2, 3, 4))], "gives list for 2 clips"),
    (lambda x: x.mean(), "expected one tensor with a row a clip"),
    (lambda x: torch.special.i1(x.mean((2, 3, 4))), "ONNX has no operation for PyTorch's prims.bessel_i1")])
def test_what_cannot_be_exported_is_told_in_one_line(forward, told, tmp_path):
    with pytest.raises(AttnnasError, match=told) as caught: export(Tiny(forward), tmp_path / "a.onnx")
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("path, options, told", [
    ("a.tflite", {}, r"'a.tflite' does not say its format: expected an ending among .onnx, .pt2"),
    ("a.onnx", {"format": "pt"}, "Unknown format of an exported network 'pt'. Did you mean 'pt2'"),
    ("a.pt2", {"example": (1,)}, r"\(1,\) is no example"), ("a.pt2", {"example": "clip"}, "'clip' is no example")])
def test_bad_arguments(path, options, told, tmp_path):
    with pytest.raises(AttnnasError, match=told): export(Tiny(), tmp_path / path, **options)


def test_a_network_without_an_example_asks_for_one(tmp_path):
    with pytest.raises(AttnnasError, match="Identity has no example_shape. Give example="): export(nn.Identity(), tmp_path / "a.pt2")


def test_missing_packages_are_named_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(AttnnasError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'attnnas\[export\]'"):
        export(Tiny(), tmp_path / "a.onnx")
    export(Tiny(), tmp_path / "a.pt2")


def test_other_numbers_are_refused_with_the_first_of_them(tmp_path, monkeypatch):
    "If this fails, a file that computes something else is written without a word."
    made = exporting.Pt2.runner

    def wrong(content):
        run = made(content)
        return lambda clips: run(clips) + torch.tensor([0, 1, 0]) * (len(clips) == 3)
    monkeypatch.setattr(exporting.Pt2, "runner", staticmethod(wrong))
    with pytest.raises(AttnnasError, match=r"other numbers: of 3 clips, at \(0, 1\), "): export(Tiny(), tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_told(tmp_path):
    for name in ("a.onnx", "a.pt2"):
        (tmp_path / name).write_bytes(b"\x00nothing")
        with pytest.raises(AttnnasError, match="or a damaged one"): exported_metadata(tmp_path / name)
    with pytest.raises(AttnnasError, match="Could not read"): exported_metadata(tmp_path / "none.onnx")
