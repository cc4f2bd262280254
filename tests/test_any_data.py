"""Any data and any network: what becomes a clip source, what is refused, and how a search of it is judged."""
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils import data as torch_data

from attnnas.cells.spec import CellSpec, OperationSpec
from attnnas.core.errors import AttnnasError
from attnnas.data.clips import Clips, ClipSource, to_float
from attnnas.data.datasets import as_clips, check_trainable
from attnnas.networks.insertion import insert, inserted
from attnnas.networks.sites import propose_sites
from attnnas.search.base import EpochLog, SearchResult
from attnnas.search.differentiable import SearchConfig, differentiable
from attnnas.search.health import accuracy, health
from attnnas.search.methods import black_box, search_config
from attnnas.search.objective import CellTraining
from attnnas.search.verdict import verdict
from attnnas.training.loop import TrainingConfig


def video(value=0, shape=(3, 2, 4, 4)): return torch.full(shape, value, dtype=torch.uint8)


def pairs(count=8): return [(video(20 * k), k % 2) for k in range(count)]


class Counted(torch_data.Dataset):
    "Counts how often an item is read; `targets` are there on request."
    def __init__(self, targets=False, noisy=False):
        self.reads = 0
        self.noisy = noisy
        if targets: self.targets = [k % 2 for k in range(8)]

    def __len__(self): return 8

    def __getitem__(self, k):
        self.reads += 1
        noise = 0
        if self.noisy: noise = torch.randint(50, ()).item() + np.random.randint(50) + random.randrange(50)
        return video(10 * k + noise), k % 2


def test_every_form_gives_the_same_clips():
    source = Clips(torch.stack([v for v, _ in pairs()]), torch.tensor([k % 2 for k in range(8)]), ["0", "1"])
    assert as_clips(source) is source
    labels = (int, torch.tensor, np.int64, lambda k: np.array(k))
    half = torch_data.Subset(pairs(), range(4)), torch_data.Subset(pairs(), range(4, 8))
    forms = [pairs(), tuple(pairs()), [{"video": v, "label": k} for v, k in pairs()],
             [(v.numpy(), k) for v, k in pairs()], torch_data.ConcatDataset(half),
             torch_data.DataLoader(pairs(), 3, shuffle=True),
             torch_data.TensorDataset(source.video, source.labels),
             *([(v, kind(k)) for v, k in pairs()] for kind in labels)]
    rows = torch.tensor([5, 0, 3])
    for form in forms:
        clips = as_clips(form)
        assert isinstance(clips, ClipSource) and clips.classes == source.classes
        assert torch.equal(clips.labels, source.labels) and clips.labels.dtype == torch.int64
        assert torch.equal(clips.batch(rows), source.batch(rows))


def test_names_are_numbered_as_they_are_given():
    named = [(v, "ab"[k]) for v, k in pairs()]
    assert as_clips(named).classes == ["a", "b"]
    clips = as_clips(named, classes=["b", "c", "a"])
    assert clips.labels[:2].tolist() == [2, 0]
    with pytest.raises(AttnnasError, match="Unknown class 'b'"): as_clips(named, classes=["a", "B"])


def test_labels_are_had_without_reading_all_videos():
    "If this fails, opening a data set that lists its labels decodes every video of it."
    listed = Counted(targets=True)
    assert as_clips(listed).labels.tolist() == as_clips(Counted()).labels.tolist()
    assert listed.reads <= 4
    listed.targets[0] = 1
    with pytest.raises(AttnnasError, match="Item 0 has the label 0"): as_clips(listed)


def test_augmentation_is_a_function_of_epoch_and_index():
    "If this fails, the number of workers, or what was read before, changes the clips of a training."
    rows = torch.arange(8)
    ways = [as_clips(Counted(noisy=True), workers=workers) for workers in (0, 2)]
    state = torch.get_rng_state()
    first, second = (list(clips.ahead(rows.split(3), epoch=1)) for clips in ways)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, first, second))
    late, = ways[0].ahead([rows[6:]], epoch=1)
    assert torch.equal(late, first[2])
    assert not torch.equal(ways[0].batch(rows), torch.cat(first))


def test_fingerprints_tell_data_apart():
    changed = pairs()
    changed[0] = video(1), 0
    relabelled = [(v, 1 - k) for v, k in pairs()]
    every = [as_clips(data).fingerprint for data in (pairs(), pairs(), changed, relabelled, pairs(6))]
    assert every[0] == every[1] and len(set(every)) == 4


class Stream(torch_data.IterableDataset):
    def __iter__(self): yield from pairs()


WRONG = {
    "IterableDataset": Stream(), "no number": torch_data.DataLoader(Stream()), "is empty": [], "no data of clips": 7,
    "no label": [video(), video()], "missing": [(video(), None)], "0.5": [(video(), 0.5)], "-1": [(video(), -1)],
    "without label": [{"video": video(), "target": 0}], "names and some": [(video(), 0), (video(), "a")],
    "permute\\(1, 0, 2, 3\\)": [(video(0, (8, 3, 4, 4)), 0)], "permute\\(3, 0, 1, 2\\)": [(video(0, (8, 9, 9, 3)), 0)],
    "unsqueeze": [(video(0, (3, 9, 9)), 0)], "int64": [(video().long(), 0)], "expected a tensor": [("a.mp4", 0)],
    "WeightedRandomSampler": torch_data.DataLoader(pairs(), sampler=torch_data.WeightedRandomSampler([1.] * 8, 8)),
    "RandomSampler": torch_data.DataLoader(pairs(), sampler=torch_data.RandomSampler(pairs(), num_samples=3)),
}


@pytest.mark.parametrize("told", WRONG)
def test_what_does_not_fit_is_one_line_before_work(told):
    with pytest.raises(AttnnasError, match=told) as caught: as_clips(WRONG[told])
    assert "\n" not in str(caught.value)


def test_other_refusals():
    with pytest.raises(AttnnasError, match="expected 0 to 0"): as_clips(pairs(), classes=["one"])
    uneven = as_clips([(video(), 0), (video(0, (3, 2, 4, 5)), 1)])
    with pytest.raises(AttnnasError, match="Items 0 and 1"): uneven.batch(torch.arange(2))
    with pytest.raises(AttnnasError, match="one class"): check_trainable(as_clips(pairs()[::2]))
    with pytest.raises(AttnnasError, match="int64"): to_float(video().long())


def test_a_collate_function_is_used_and_checked():
    def halved(items): return torch.stack([v[..., ::2] for v, _ in items]), torch.tensor([k for _, k in items])
    clips = as_clips(torch_data.DataLoader(pairs(), 4, collate_fn=halved))
    assert clips.batch(torch.arange(3)).shape == (3, 3, 2, 4, 2)
    with pytest.raises(AttnnasError, match="collate_fn made"):
        as_clips(torch_data.DataLoader(pairs(), 4, collate_fn=lambda items: (items, 0)))


def test_floating_clips_stay_as_they_are():
    clip = torch.randn(2, 3, 2, 4, 4)
    assert to_float(clip) is clip
    assert torch.equal(to_float(clip.double()), clip.double().float())
    assert to_float(video(255)).max() > 2


def network(classes=2):
    return nn.Sequential(nn.Conv3d(3, 4, 1), nn.ReLU(), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(4, classes))


SHORT = TrainingConfig(epochs=1, batch_size=4)
CELL = CellSpec((OperationSpec("spatial", "map-based", "sigmoid"),), ((0,),), width=2)


@pytest.mark.parametrize("sites", ["auto", ["1"]])
def test_all_searches_take_own_networks_and_own_data(sites):
    found = differentiable(network(), pairs(), SearchConfig(levels=1, width=2), SHORT, sites, validation=pairs(4))
    assert list(found.cells()) == ["1"] and found.multiply_adds > 0
    assert found.provenance["counts"] == {"training": [4, 4], "validation": [2, 2]}
    config = search_config({"method": "random", "trials": 1, "operations": 1, "width": 2})
    found = black_box(config, network, pairs(), pairs(4), SHORT, sites)
    assert list(found.cells()) == ["1"] and found.log.trials[0].metrics["count"] == 4
    training = CellTraining(network, pairs(), pairs(4), SHORT, sites)
    assert tuple(training.sites) == ("1",) and "score" in training(CELL, 0)


def test_a_search_refuses_before_it_trains():
    config = SearchConfig(levels=1, width=2)
    for own, data, told in ((network(1), pairs(), "expected scores \\(B, 2\\)"), (network(), pairs()[::2], "one class"),
                            (network()[:2], pairs(), "gives \\(1, 4, 2, 4, 4\\)")):
        with pytest.raises(AttnnasError, match=told): differentiable(own, data, config, SHORT, "auto")
        assert not inserted(own)


def test_proposals_are_ends_of_stages_within_the_budget():
    own = nn.Sequential(nn.Conv3d(3, 4, 3, 1, 1), nn.ReLU(), nn.MaxPool3d(2), nn.Conv3d(4, 8, 3, 1, 1), nn.ReLU(),
                        nn.MaxPool3d(2), nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(8, 2))
    shape = 1, 3, 8, 16, 16
    every = propose_sites(own, shape, budget=10**12)
    assert every.names == ("1", "4") and len(str(every).splitlines()) == 4
    assert propose_sites(own, shape, budget=10**12, count=1).names == ("4",)
    dear, cheap = (place.multiply_adds for place in every.places)
    assert propose_sites(own, shape, budget=cheap).names == ("4",) and cheap < dear
    assert propose_sites(own, shape).names == ("4",), "the cheapest, where nothing is within the default"
    with pytest.raises(AttnnasError, match="at '4'"): propose_sites(own, shape, budget=1)
    assert list(inserted(insert(own, CELL, every, shape))) == ["1", "4"]
    with pytest.raises(AttnnasError, match="over_frames"): propose_sites(nn.Conv2d(3, 4, 1), (1, 3, 8, 8))


def log(*epochs):
    sink = [[.3, .25, .2, .1, .1, .05]]
    weights = {"site": {"level": [], "sink": sink, "activation": None}}
    rows = tuple({"epoch": k, "connections": weights} | epoch for k, epoch in enumerate(epochs))
    return SearchResult("differentiable", {}, 0, EpochLog(rows, width=4, activations="fixed"))


@pytest.mark.parametrize("top1, count, counts, status", [
    (90, 100, [50, 50], "believe"), (90, 100, [90, 10], "chance"), (55, 100, 2, "chance"), (70, 8, 2, "chance"),
    (70, 100, 2, "believe"), (40, 100, {"a": 25, "b": 75}, "chance")])
def test_a_verdict_is_about_chance(top1, count, counts, status):
    "If this fails, a network that has learned nothing, or only the largest class, is believed."
    found = log({"top1": 99., "validation": {"top1": float(top1), "count": count}})
    judged = verdict(found, counts)
    assert judged.status == status and judged.ok == (status == "believe")
    assert any("at chance" in alarm for alarm in health(found, counts=counts).alarms) == (not judged.ok)
    assert ("At chance: do not use" in str(judged).splitlines()[-1]) == (not judged.ok)


def test_a_verdict_without_validation_or_counts():
    found = log({"top1": 90.})
    assert verdict(found).status == "unknown" and verdict(found, 2).status == "unknown"
    assert verdict(found, 2, trained=100).status == verdict(found, [50, 50]).status == "unvalidated"


def test_the_interval_is_wilsons():
    found = accuracy("validation", 50, 10, 2)
    assert abs(found.low - 23.66) < .01 and abs(found.high - 76.34) < .01
