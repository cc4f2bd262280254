"""Networks of other packages with cells: what PyTorch does with a module, it does with these."""
import copy
import gc
import io
import pickle
from functools import cache

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn

from attnnas.cells.cell import AttentionCell
from attnnas.cells.spec import CellSpec, OperationSpec
from attnnas.data.datasets import as_clips
from attnnas.networks.insertion import insert, inserted
from attnnas.networks.over_frames import over_frames
from attnnas.training.loop import Trainer, TrainingConfig

CELL = CellSpec((OperationSpec("temporal", "dot-product", "softmax"), OperationSpec("spatial", "map-based", "sigmoid")),
                ((0,), (0, 1)), (1, 2), width=4)
SHAPE = (2, 3, 4, 32, 32)


def r3d_18():
    "The network of torchvision with one block a stage, and without its last stage."
    from torchvision.models.video.resnet import BasicBlock, BasicStem, Conv3DSimple, VideoResNet
    network = VideoResNet(BasicBlock, [Conv3DSimple] * 4, [1, 1, 1, 1], BasicStem, num_classes=4)
    network.layer4 = nn.Identity()
    network.fc = nn.Linear(256, 4)
    return network, "layer2"


def slow_r50():
    "The network of pytorchvideo, narrow."
    from pytorchvideo.models.resnet import create_resnet
    network = create_resnet(model_depth=50, model_num_class=4, stem_dim_out=4, dropout_rate=0,
                            head_pool_kernel_size=(4, 1, 1))
    return network, "blocks.2"


def timm_over_frames():
    import timm
    return over_frames(timm.create_model("test_resnet", num_classes=4), SHAPE[1:2] + SHAPE[3:]), None


def own():
    network = nn.Sequential(nn.Conv3d(3, 8, 3, 2, 1), nn.BatchNorm3d(8), nn.ReLU(), nn.AdaptiveAvgPool3d(1),
                            nn.Flatten(), nn.Linear(8, 4))
    return network, "2"


@cache
def made(build):
    "The network before a cell, and with cells that do something."
    torch.manual_seed(0)
    plain, site = build()
    network = insert(copy.deepcopy(plain), CELL, site, SHAPE).eval()
    fresh = copy.deepcopy(network)
    for cell in inserted(network).values():
        assert isinstance(cell, AttentionCell)
        nn.init.ones_(cell.zero_norm.weight)
    return plain.eval(), fresh, network


@pytest.fixture(params=[r3d_18, slow_r50, timm_over_frames, own], ids=lambda build: build.__name__)
def networks(request): return made(request.param)


@pytest.fixture
def network(networks): return networks[2]


@pytest.fixture
def recorded(request, network):
    "The network, where recording it takes seconds; slow_r50 takes a minute, and is left to --slow."
    is_slow = request.node.callspec.params["networks"] is slow_r50
    if is_slow and not request.config.getoption("--slow"): pytest.skip("slow: make test SLOW=1")
    return network


@pytest.fixture
def clip(): return torch.rand(SHAPE, generator=torch.Generator().manual_seed(1))


def same(one, other, clip, **tolerance):
    with torch.no_grad(): torch.testing.assert_close(one(clip), other(clip), **tolerance)


def test_a_new_cell_changes_nothing_and_a_trained_one_does(networks, clip):
    plain, fresh, network = networks
    same(fresh, plain, clip)
    with torch.no_grad(): assert not torch.allclose(network(clip), plain(clip), atol=1e-5)


def test_deepcopy_and_pickle(network, clip):
    same(copy.deepcopy(network), network, clip)
    same(pickle.loads(pickle.dumps(network)), network, clip)


def test_state_dict_and_safetensors(networks, clip, tmp_path):
    _, fresh, network = networks
    loaded = copy.deepcopy(fresh)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    same(loaded, network, clip)
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    loaded = copy.deepcopy(fresh)
    loaded.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    same(loaded, network, clip)


def test_autocast(network, clip):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad(): scores = network(clip)
    with torch.no_grad(): exact = network(clip)
    assert not torch.equal(scores.float(), exact), "nothing ran in half precision"
    torch.testing.assert_close(scores.float(), exact, rtol=.1, atol=.1 * exact.abs().max().item())


def test_compile_in_one_graph(recorded, clip):
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(recorded), backend="eager", fullgraph=True)
    same(compiled, recorded, clip)


def test_export_for_any_batch(recorded, clip):
    batch = torch.export.Dim("batch", min=2, max=16)
    program = torch.export.export(copy.deepcopy(recorded), (clip,), dynamic_shapes=({0: batch},)).module()
    same(program, recorded, torch.cat([clip, clip.flip(2)[:1]]))


def gradients(network, clip) -> list:
    network(clip).square().sum().backward()
    return [parameter.grad for parameter in network.parameters()]


def test_data_parallel_and_ddp(network, clip, tmp_path):
    "The group ends after all that holds it: torch waits for its threads with the interpreter locked, and may do so for ever."
    same(nn.DataParallel(network), network, clip)
    alone = gradients(copy.deepcopy(network).train(), clip)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try: shared = gradients(nn.parallel.DistributedDataParallel(copy.deepcopy(network).train()), clip)
    finally:
        gc.collect()
        dist.destroy_process_group()
    torch.testing.assert_close(shared, alone)


def test_a_step_of_training_moves_backbone_and_cell(networks, clip):
    network = copy.deepcopy(networks[2])
    before = copy.deepcopy(network.state_dict())
    pairs = [(video, number) for number, video in enumerate([*clip, *clip.flip(4)])]
    Trainer(network, as_clips(pairs), TrainingConfig(epochs=1, batch_size=4)).fit()
    moved = {name for name, parameter in network.named_parameters() if not torch.equal(parameter, before[name])}
    assert any(".added." in name for name in moved) and any(".added." not in name for name in moved)
