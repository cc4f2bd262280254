"""Where attention may stand: the channel axis, other names of a module, several inputs, and what a site shows."""
import copy
import pickle

import pytest
import torch
from torch import nn

from attnnas.attention.formula import COMPATIBILITIES, Attention, local
from attnnas.core.errors import AttnnasError
from attnnas.explain.gradcam import gradcam
from attnnas.networks.axes import ChannelAxes
from attnnas.networks.dry_run import DryRun
from attnnas.networks.insertion import Site, insert, inserted, remove, site_shapes
from attnnas.networks.non_local import NonLocalBlock
from attnnas.networks.profile import count_flops


class Residual(nn.Module):
    "x + a 1x1 convolution that starts at zero, in two or three dimensions."
    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.weight = nn.Parameter(torch.zeros(channels, channels))

    def forward(self, x): return x + torch.einsum("oc,bc...->bo...", self.weight, x)


class Transformer(nn.Module):
    "Patches by a convolution, one block over windows with channels last, and a classifier; `size` axes of space."
    def __init__(self, heads=2):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.norm = nn.LayerNorm(8)
        self.mix = nn.Linear(8, 8)
        self.scores = nn.Identity()
        self.block = nn.Identity()
        self.head = nn.Linear(8, 5)
        self.heads = heads

    def forward(self, x):
        x = self.norm(self.patches(x).permute(0, 2, 3, 1))
        b, h, w, c = x.shape
        windows = x.view(b, h // 2, 2, w // 2, 2, c).transpose(2, 3).reshape(-1, 4, c)
        q = windows.view(-1, 4, self.heads, c // self.heads).transpose(1, 2)
        y = self.scores((q @ q.transpose(2, 3)).softmax(-1)) @ q
        y = self.mix(y.transpose(1, 2).reshape(-1, 4, c))
        y = y.view(b, h // 2, w // 2, 2, 2, c).transpose(2, 3).reshape(b, h, w, c)
        x = self.block(torch.roll(x + y, (1, 1), (1, 2)))
        return self.head(x.mean((1, 2)))


IMAGE = (1, 3, 32, 32)  # as many rows as columns, and as many channels as either


def test_channels_last_are_found_though_every_axis_is_as_long():
    "If this fails, attention takes the height of a transformer's map for its channels."
    shapes = site_shapes(Transformer(), IMAGE)
    assert shapes["patches"] == shapes["norm"] == shapes["block"] == (1, 8, 8, 8)
    torch.manual_seed(0)
    network = Transformer().eval()
    x = torch.rand(2, *IMAGE[1:])
    before = network(x)
    insert(network, Residual, ["patches", "block"], IMAGE)
    assert network(x).equal(before)
    inserted(network)["block"].weight.data[3, 5] = 1.
    seen = []
    network.block.register_forward_hook(lambda module, args, output: seen.append(output - module.original(*args)))
    network(x)
    assert seen[0].abs().sum((0, 1, 2)).nonzero().flatten().tolist() == [3]


def test_scores_of_a_query_and_a_key_are_no_map():
    "If this fails, a cell is put behind a matrix of attention weights as if it were a picture."
    assert "scores" not in site_shapes(Transformer(), IMAGE)
    with pytest.raises(AttnnasError, match=r"'scores' \(Identity\).*holds the channels is not known"):
        insert(Transformer(), Residual, "scores", IMAGE)
    with pytest.raises(AttnnasError, match="holds the channels is not known"):
        gradcam(Transformer(), torch.rand(IMAGE), "scores", 1)


def test_grad_cam_of_channels_last_is_a_map_of_positions():
    "If this fails, the picture shows channels where it says positions."
    torch.manual_seed(0)
    network = Transformer()
    x = torch.rand(2, 3, 32, 16)
    map = gradcam(network, x, "block", 1)
    kept = []
    network.block.register_forward_hook(lambda module, args, output: kept.append(output))
    network.eval()(x)
    expected = (kept[0] * network.head.weight[1]).sum(-1).relu() / (8 * 4)
    torch.testing.assert_close(map[:, 0], expected.detach())


def follow(function, shape, start=None):
    x = torch.empty(shape, device="meta")
    with ChannelAxes() as axes:
        axes.start(x)
        return axes.axis(function(x))


@pytest.mark.parametrize("function, expected", [
    (lambda x: x.movedim(1, -1), 3), (lambda x: x.movedim(1, -1).flatten(1, 2), 2), (lambda x: x.mean(3), 1),
    (lambda x: x.flatten(1), None), (lambda x: x.flatten(1).unflatten(1, (6, 4, 4)), 1), (lambda x: x[:, :3], 1),
    (lambda x: x.view(2, 3, 2, 4, 4).transpose(1, 2).reshape(2, 6, 4, 4), 1),  # channels shuffled
    (lambda x: x.view(2, 2, 3, 4, 4), None), (lambda x: torch.cat([x, x], 1), 1), (lambda x: torch.stack([x, x], 1), 2),
    (lambda x: nn.InstanceNorm2d(6, device="meta")(x), 1), (lambda x: x * x.mean((2, 3), keepdim=True), 1),
    (lambda x: x.flatten(2) @ x.flatten(2).transpose(1, 2), None),  # channels with channels
    (lambda x: nn.Linear(4, 4, device="meta")(x), 1),  # mixes columns
    (lambda x: torch.einsum("bchw,dc->bhwd", x, torch.empty(4, 6, device="meta")), 3),
    (lambda x: torch.empty(2, 6, 4, 4, device="meta"), None)])
def test_the_channel_axis_is_followed(function, expected):
    "If this fails, some operation takes the channel axis to a wrong place."
    assert follow(function, (2, 6, 4, 4)) == expected


class Alias(nn.Module):
    "A module with two names, called by the second."
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv3d(3, 8, 1)
        self.body = nn.Sequential(nn.Conv3d(8, 8, 1), nn.ReLU())
        self.features = self.body
        self.plain = [self.stem]
        self.head = nn.Linear(8, 2)

    def forward(self, x): return self.head(self.features(self.plain[0](x)).mean((2, 3, 4)))


CLIP = (1, 3, 4, 8, 8)


@pytest.mark.parametrize("name", ["body", "features"])
def test_a_module_with_two_names_is_one_site(name):
    "If this fails, what was inserted stands in the network and never runs."
    network = Alias()
    keys = list(network.state_dict())
    insert(network, NonLocalBlock, name, CLIP)
    runs = []
    inserted(network)["body"].register_forward_hook(lambda *arguments: runs.append(1))
    network(torch.rand(CLIP))
    assert len(runs) == 1 and network.body is network.features
    assert list(remove(network).state_dict()) == keys and network.body is network.features
    with pytest.raises(AttnnasError, match="'body' is named twice"):
        insert(network, NonLocalBlock, ["body", "features"], CLIP)


def test_a_module_that_is_called_from_a_list_is_refused():
    "If this fails, what was inserted stands in the network and never runs."
    network = Alias()
    with pytest.raises(AttnnasError, match="'stem' would run 0 times"):
        insert(network, NonLocalBlock, "stem", CLIP)
    assert inserted(network) == {}


def test_a_site_shows_what_its_module_shows():
    "If this fails, a network that reads or sets attributes or items of its parts breaks when a cell is put in."
    network = Alias()
    network.body.depth = 3
    conv = network.body[0]
    insert(network, NonLocalBlock, "body", CLIP)
    site = network.features
    assert isinstance(site, Site) and len(site) == 2 and site[0] is conv and list(site)[0] is conv
    assert site.depth == 3 and site.channel_axis == 1 and not hasattr(site, "width")
    site.depth = 4
    assert site.original.depth == 4 and bool(site)
    assert len(pickle.loads(pickle.dumps(site))) == 2


def test_insertion_leaves_modes_as_they_are():
    "If this fails, a frozen batch norm inside a site learns again."
    network = nn.Sequential(nn.Sequential(nn.Conv3d(3, 4, 1), nn.BatchNorm3d(4)))
    network[0][1].eval()
    insert(network, NonLocalBlock, "0", CLIP)
    assert not network[0].original[1].training and network[0].added.training


class Pair(nn.Module):
    "Two clips, as a list that it writes into or as two arguments."
    def __init__(self):
        super().__init__()
        self.one = nn.Conv3d(3, 4, 1)
        self.other = nn.Conv3d(2, 4, 1)

    def forward(self, x, y=None):
        pair = x if y is None else [x, y]
        pair[0] = self.one(pair[0])
        return pair[0].mean() + self.other(pair[1]).mean()


OTHER = (1, 2, 8, 4, 4)


@pytest.mark.parametrize("example", [[CLIP, OTHER], (CLIP, OTHER), [torch.rand(CLIP), torch.rand(OTHER)],
                                     (torch.rand(CLIP), torch.rand(OTHER))], ids=str)
def test_several_inputs(example):
    "If this fails, a network of two paths takes no cells."
    network = insert(Pair(), NonLocalBlock, ["one", "other"], example)
    assert [block.channels for block in inserted(network).values()] == [4, 4]
    assert count_flops(Pair(), example) == 2 * (4 * 3 * 256 + 4 * 2 * 128)


@pytest.mark.parametrize("example", [CLIP, {"x": CLIP}, "clip", (1, -3, 4, 8, 8), [], 5])
def test_an_example_that_is_none_is_one_line(example):
    "If this fails, a wrong example ends in a traceback of PyTorch."
    with pytest.raises(AttnnasError, match="failed in a dry run|no example of an input"):
        insert(Pair(), NonLocalBlock, "one", example)


@pytest.mark.parametrize("compatibility", COMPATIBILITIES)
def test_attention_pickles(compatibility):
    "If this fails, attention cannot be sent to another process or saved whole."
    attention = Attention(4, compatibility=compatibility, scaling=local(2))
    x = torch.rand(1, 5, 4)
    assert pickle.loads(pickle.dumps(attention))(x, x, x).equal(attention(x, x, x))


class Product(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.pair = nn.Bilinear(8, 8, 5)
        self.lstm = nn.LSTM(8, 6, batch_first=True)

    def forward(self, x): return self.function(self, x)


@pytest.mark.parametrize("function, expected", [
    (lambda net, x: x[0] @ x.new_ones(8), 20 * 8), (lambda net, x: torch.dot(x[0, 0], x[0, 1]), 8),
    (lambda net, x: x.new_zeros(20).addmv_(x[0], x.new_ones(8)), 20 * 8),
    (lambda net, x: torch.addbmm(x.new_zeros(20, 20), x, x.mT), 20 * 20 * 8),
    (lambda net, x: torch.addr(x.new_zeros(20, 20), x[0, :, 0], x[0, :, 1]), 20 * 20),
    (lambda net, x: net.pair(x, x), 20 * 8 * 8 * 5), (lambda net, x: net.lstm(x)[0], 20 * 24 * (8 + 6)),
    (lambda net, x: torch.einsum("bnc,bmc->bnm", x, x), 20 * 20 * 8)])
def test_every_product_is_counted(function, expected):
    "If this fails, a network looks cheaper than it is."
    assert count_flops(Product(function), (1, 20, 8)) == 2 * expected


def test_a_product_without_a_formula_is_named():
    "If this fails, a network looks cheaper than it is."
    with pytest.raises(AttnnasError, match="_euclidean_dist"):
        count_flops(Product(lambda net, x: torch.cdist(x, x)), (1, 100, 8))


class Normed(nn.Module):
    "Batch normalisation and relu of a map whose channels lie last in memory where `moved`."
    def __init__(self, moved: bool):
        super().__init__()
        self.moved, self.norm = moved, nn.BatchNorm3d(6)

    def forward(self, x):
        x = x.movedim(-1, 1) if self.moved else x
        mean = x.mean((2, 3), keepdim=True)
        sums = x + x, x - mean, mean * x, x + x.transpose(2, 3).transpose(2, 3), 2 * x, x + 1
        joined = torch.cat((x, x * x), 1), torch.cat([mean, x[:, :, :1, :1]], -2), torch.cat((x, x[..., :2]), -1)
        return x, self.norm(x), torch.relu(x), torch.relu(self.norm(x)), *sums, *joined


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("moved", [False, True])
def test_the_short_way_of_a_dry_run_gives_what_torch_gives(moved, dtype, training):
    "If this fails, a dry run has other shapes, types or layouts in memory than a pass, or would save other tensors for a backward pass."
    dry = DryRun(Normed(moved).to(dtype), training=training)
    x = dry.input((2, 4, 5, 7, 6) if moved else (2, 6, 4, 5, 7)).requires_grad_()

    def traits(run):
        saved = []
        keep = lambda tensor: saved.append((tensor.shape, tensor.dtype)) or tensor
        with torch.autograd.graph.saved_tensors_hooks(keep, keep): made = run(x)
        return [(t.shape, t.dtype, t.stride(), t.device, t.requires_grad) for t in made], saved
    assert traits(dry) == traits(dry.model)


class Copies(nn.Module):
    "Its class says how it is copied."
    def __deepcopy__(self, memo): return self


class Odd(nn.Module):
    "What a copy must keep: one weight twice, one module twice, tensors and modules outside of the usual places."
    def __init__(self):
        super().__init__()
        self.first, self.second, self.own = nn.Linear(3, 3), nn.Linear(3, 3), Copies()
        self.second.weight = self.first.weight
        self.again = self.first
        self.register_buffer("mean", torch.zeros(3, dtype=torch.float64))
        self.register_parameter("nothing", None)
        self.first.weight.requires_grad_(False)
        self.sizes, self.seen = {"a": [1, 2]}, [self.first]
        self.first.register_forward_hook(self.count)
        self.calls = 0

    def count(self, *_): self.calls += 1

    def forward(self, x): return self.again(self.seen[0](self.first(x))) + self.second(x)


def test_a_dry_run_s_copy_is_a_deep_copy_without_data():
    "If this fails, a network behaves otherwise in a dry run than in use, or a dry run changes the network."
    net = Odd()
    dry = DryRun(net)
    twin, plain = dry.model, copy.deepcopy(net)
    assert list(twin.state_dict()) == list(plain.state_dict()) and all(t.is_meta for t in twin.state_dict().values())
    traits = lambda module: [(t.dtype, t.shape, t.requires_grad) for t in (*module.parameters(), *module.buffers())]
    assert traits(twin) == traits(plain)
    assert twin.second.weight is twin.first.weight and twin.again is twin.first is twin.seen[0] and twin.own is net.own
    assert twin.sizes == net.sizes and twin.sizes["a"] is not net.sizes["a"] and twin.nothing is None
    assert dry(dry.input((2, 3))).shape == (2, 3) and (twin.calls, net.calls) == (3, 0)
    assert not any(t.is_meta for t in net.state_dict().values())
