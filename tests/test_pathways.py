"""Networks of several inputs: wrapped, they are networks of a clip everywhere; bare, each entrance refuses them in one line."""
from functools import partial

import pytest
import torch
from torch import nn

import attnnas as an
from attnnas.core.errors import AttnnasError
from attnnas.data.clips import Clips
from attnnas.networks.insertion import inserted, site_shapes
from attnnas.search.differentiable import SearchConfig, differentiable
from attnnas.search.objective import CellTraining
from attnnas.training.loop import TrainingConfig

CELL = an.CellSpec([an.OperationSpec("spatial", "map-based", "softmax")], inputs=[[0]], width=4)
ONE = (1, 3, 8, 16, 16)
SLOW = (1, 3, 2, 16, 16)
QUICK = TrainingConfig(epochs=1, batch_size=4)


class Two(nn.Module):
    "A network of two pathways, given as `kind` of arguments."
    def __init__(self, kind, classes=2):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.slow, self.fast = nn.Conv3d(3, 4, (1, 4, 4), (1, 4, 4)), nn.Conv3d(3, 4, 4, 4)
        self.head = nn.Linear(8, classes)

    def forward(self, *given):
        x, = given if self.kind != "tuple" else (given,)
        slow, fast = x.values() if self.kind == "dict" else x
        return self.head(torch.cat([self.slow(slow).mean((2, 3, 4)), self.fast(fast).mean((2, 3, 4))], 1))


SPLITS = {"tuple": lambda x: (x[:, :, ::4], x), "list": lambda x: [x[:, :, ::4], x], "dict": lambda x: {"slow": x[:, :, ::4], "fast": x}}
EXAMPLES = {"tuple": (SLOW, ONE), "list": [SLOW, ONE], "dict": {"slow": SLOW, "fast": ONE}}
each_kind = pytest.mark.parametrize("kind", SPLITS)


def some_clips(count=8):
    video = torch.randint(0, 256, (count, 3, 8, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return Clips(video, torch.arange(count) % 2, ["eel", "ray"], fingerprint="clips")


def make(kind, classes): return an.Pathways(Two(kind, classes), SPLITS[kind])


@each_kind
def test_a_wrapped_network_goes_the_whole_way(kind, tmp_path):
    clips = some_clips()
    net = make(kind, 2)
    found = differentiable(net, clips, SearchConfig(levels=1, width=4), QUICK, ["network.slow", "network.fast"])
    net = an.insert(make(kind, 2), found.best, ["network.slow", "network.fast"], ONE)
    an.train(net, clips, clips, config=QUICK, progress=False, device="cpu")
    expected = an.predict(net, clips.video, device="cpu")
    assert expected[0].classes[0][0] in clips.classes
    an.save(net, tmp_path)
    again = an.load(tmp_path, network=make(kind, 2))
    assert all(a.scores.equal(b.scores) for a, b in zip(an.predict(again, clips.video, device="cpu"), expected))
    score = CellTraining(partial(make, kind), clips, clips, QUICK, ("network.slow",))(CELL, 0)
    assert score["count"] == 8


@each_kind
def test_a_wrapped_network_is_exported(kind, tmp_path):
    pytest.importorskip("onnxruntime")
    net = an.insert(make(kind, 2), CELL, "network.fast", ONE)
    an.export(net, tmp_path / "a.onnx", example=ONE)
    an.export(net, tmp_path / "a.pt2", example=ONE)


@each_kind
def test_cells_go_into_a_bare_network_by_an_example_of_its_kind(kind):
    net = Two(kind)
    assert set(site_shapes(net, EXAMPLES[kind])) == {"slow", "fast"}
    before = [p.clone() for p in net.parameters()]
    an.insert(net, CELL, "slow", EXAMPLES[kind])
    assert list(inserted(net)) == ["slow"]
    an.remove(net)
    assert all(a.equal(b) for a, b in zip(before, net.parameters()))


@each_kind
def test_a_bare_network_is_refused_before_work(kind):
    "If this fails, somebody waits for a search that cannot take a step."
    clips = some_clips()
    for example in (None, EXAMPLES[kind]):
        calls = (lambda: differentiable(Two(kind), clips, sites=["slow"], example=example),
                 lambda: an.train(Two(kind), clips, example=example, progress=False, device="cpu"),
                 lambda: CellTraining(partial(Two, kind), clips, clips, sites=("slow",), example=example))
        for call in calls:
            with pytest.raises(AttnnasError, match=r"attnnas\.Pathways\(network, split\)") as caught: call()
            assert "\n" not in str(caught.value)


def test_data_of_several_tensors_are_refused():
    data = [((torch.zeros(3, 2, 8, 8), torch.zeros(3, 8, 8, 8)), i % 2) for i in range(4)]
    with pytest.raises(AttnnasError, match="item 0 is a tuple.*Pathways"): an.as_clips(data)


@pytest.mark.parametrize("network, sites, told", [
    (lambda classes: nn.Conv3d(3, classes, 3), None, "expected scores"), (lambda classes: nn.Sequential(nn.Flatten(), nn.Linear(6144, 1)), None,
                                                                       "gives .1, 1.; expected scores"),
    (partial(make, "list"), ("network.slwo",), "network.slow"), (partial(make, "list"), None, "No sites")])
def test_a_search_by_trials_refuses_a_network_before_the_first_trial(network, sites, told):
    with pytest.raises(AttnnasError, match=told): CellTraining(network, some_clips(), some_clips(), QUICK, sites)
