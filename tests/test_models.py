"""Every listed model, as a user meets it: by name, at its smallest clip, open to insertion."""
from functools import partial

import pytest
import torch
from torch import nn

from attnnas.networks.registry import create_model, list_models
from attnnas.core.errors import AttnnasError
from attnnas.cells.cell import AttentionCell
from attnnas.cells.derivation import random_cell
from attnnas.cells.fused import FusedSupergraph
from attnnas.networks.insertion import insert, inserted, remove, site_shapes
from attnnas.networks.non_local import NonLocalBlock
from attnnas.networks.profile import count_flops
from attnnas.visual.cbam import CBAM

every_model = pytest.mark.parametrize("name", list_models())
INSERTED = {"cell": random_cell(0, levels=2, width=8).cell, "supergraph": lambda channels: FusedSupergraph(channels, 4, 1),
            "non-local": lambda channels: NonLocalBlock(channels, inner=2, pool_keys=True), "cbam": CBAM}


@pytest.fixture(scope="module")
def made():
    "Networks on the meta device: shapes and counts without work."
    found = {}

    def make(name):
        if name not in found:
            drawn_on = "cpu" if name == "mvit_b" else "meta"  # torchvision reads numbers out of tensors of mvit_b
            with torch.device(drawn_on): found[name] = create_model(name, num_classes=7).to("meta").eval()
        return found[name]
    return make


IMAGES_ALONE = ("mobilenetv2_frames", "mobilenetv2_two_stream")     # their frames never meet before the scores


@every_model
def test_sites_and_insertion(made, name):
    "If this fails, `insert` has no default place in a model, or takes something there and does not give it back."
    network = made(name)
    if name in IMAGES_ALONE:
        assert network.default_sites == ()
        with pytest.raises(AttnnasError, match="No sites for"): insert(network, NonLocalBlock)
        return
    shapes, before = site_shapes(network), list(network.state_dict())
    assert network.default_sites and all(len(shapes[site]) == 5 for site in network.default_sites)
    cell = partial(AttentionCell, spec=INSERTED["cell"])
    others = (INSERTED[what] for what in ("supergraph", "non-local", "cbam"))
    insert(network, lambda channels: nn.Sequential(*(make(channels) for make in (cell, *others))))
    assert sorted(inserted(network)) == sorted(network.default_sites)
    assert list(remove(network).state_dict()) == before
    with pytest.raises(AttnnasError, match="Did you mean"): insert(network, NonLocalBlock, network.default_sites[0] + "x")


@every_model
def test_clips_that_do_not_fit(made, name):
    "If this fails, a user sees a kernel's message where the smallest clip should be named."
    network = made(name)
    channels, smallest = network.in_channels, network.smallest
    assert network(torch.empty(1, channels, *smallest, device="meta")).shape == (1, 7)
    for bad in ((1, channels + 1, *smallest), (channels, *smallest), (1, channels, smallest[0] - 1, *smallest[1:])):
        with pytest.raises(AttnnasError, match=str(channels)): network(torch.empty(bad, device="meta"))


@every_model
def test_forward_and_backward_at_the_smallest_clip(name):
    "If this fails, a model does not train at the clip that it says it takes, or has parameters that nothing reaches."
    network = create_model(name, num_classes=7, **({"frames": 4, "size": 64} if name == "mvit_b" else {}))
    state = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    for batch, mode in ((2, True), (1, False)):  # one clip may leave batch norm a single value: then only evaluation works
        network.train(mode).zero_grad(set_to_none=True)
        scores = network(torch.rand(batch, network.in_channels, *network.smallest))
        scores.square().sum().backward()
        assert scores.shape == (batch, 7)
        missing = [key for key, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert missing == []
    network.load_state_dict(state)
    assert all(tensor.equal(state[key]) for key, tensor in network.state_dict().items())


def second_count(network, shape) -> int:
    "2 x multiply-adds of convolutions and linear layers, read off their outputs and weights."
    total = 0

    def count(module, args, output):
        nonlocal total
        output = output if isinstance(module, nn.Linear) else output.movedim(1, -1)
        total += 2 * output.numel() * module.weight[0].numel()
    hooks = [m.register_forward_hook(count) for m in network.modules()
             if isinstance(m, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    with torch.no_grad(): network(torch.empty(shape, device="meta"))
    for hook in hooks: hook.remove()
    return total


@every_model
def test_count_agrees_with_a_second_counter(made, name):
    "If this fails, a layer of the model is counted twice or not at all."
    network = made(name)
    shape = (2, network.in_channels, *network.example_shape[2:])
    counted, second = count_flops(network, shape), second_count(network, shape)
    if name == "mvit_b": assert second < counted  # products of queries and keys are no layers: a closed form is in test_zoo
    elif name == "cnn_lstm": assert counted - second == 2 * 2 * shape[2] * 4 * 256 * (network.width + 256)  # the LSTM's gates
    else: assert counted == second


@pytest.mark.parametrize("what", INSERTED)
def test_insertion_in_a_wide_choice_of_networks_is_the_identity(what):
    "If this fails, inserting new attention changes what a trained network says. CBAM is no identity, and only keeps the shape."
    for name in ("i3d_small", "s3d_small", "r50_frames"):
        options = {"backbone": "resnet18"} if name == "r50_frames" else {}
        network = create_model(name, num_classes=5, **options).eval()
        x = torch.rand(2, 3, max(network.smallest[0], 8), 64, 64)
        before = network(x)
        after = insert(network, INSERTED[what], example=x.shape).eval()(x)
        assert after.shape == before.shape and (what == "cbam") != after.equal(before)
        assert remove(network)(x).equal(before)
