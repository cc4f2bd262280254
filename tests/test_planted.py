"""Planted truth: what the tasks show and hide, which operations are blind to them, and that the search finds the others."""
import itertools
import re

import pytest
import torch
from torch.nn import functional as F

from attnnas.core.errors import AttnnasError
from attnnas.core.seeds import seed_everything
from attnnas.data.clips import ClipSource
from attnnas.cells.operations.registry import create_operation
from attnnas.cells.supergraph import TALK
from attnnas.search.differentiable import SearchConfig, differentiable
from attnnas.data.planted import (BLANK, DARK, DECOY, FACE, LIGHT, TARGET, TASKS, planted_clips)
from attnnas.networks.patches import PatchNet
from attnnas.search.planted import PLANTED, chance_level, planted_ranks
from attnnas.training.loop import TrainingConfig

every = pytest.mark.parametrize("task", TASKS)
NODES = [tuple(name.split(" ")) for name in TALK]
VARYING = [(task, "spatiotemporal", "map-based") for task in TASKS] + [("relation", "temporal", "map-based")]
CONSTANT = [(task, *node) for task in TASKS for node in NODES if (task, *node) not in VARYING]


def tokens(task, count=256, seed=0): return planted_clips(task, "test", count, seed).factors["tokens"].long()


# the clips

@every
def test_a_clip_depends_on_its_number_and_nothing_else(task):
    few, many = (planted_clips(task, "train", n, seed=3, noise=.05) for n in (20, 300))
    assert isinstance(few, ClipSource) and few.video.shape == (20, 3, 16, 16, 16)
    assert few.video.equal(many.video[:20]) and few.labels.equal(many.labels[:20])
    others = [planted_clips(task, split, 20, seed) for split, seed in (("train", 3), ("train", 4), ("test", 3))]
    assert len({clips.fingerprint for clips in (few, many, *others)}) == 5
    assert not any(a.factors["tokens"].equal(b.factors["tokens"]) for a, b in itertools.combinations(others, 2))


@every
def test_classes_are_balanced_in_every_block(task):
    labels = planted_clips(task, "train", 512).labels
    assert all(part.bincount().unique().numel() == 1 for part in labels.split(256))


@every
@pytest.mark.parametrize("pixels", [4, 7])
def test_cells_of_a_clip_look_alike_where_they_show_the_same_and_only_there(task, pixels):
    clips = planted_clips(task, "test", 6, pixels=pixels)
    shown = clips.factors["tokens"].flatten(1)
    cells = clips.video.unflatten(4, (4, pixels)).unflatten(3, (4, pixels)).permute(0, 2, 3, 5, 1, 4, 6)
    cells = cells.flatten(4).flatten(1, 3).float()
    for what, look in zip(shown, cells):
        looks = {int(k): look[what == k] for k in what.unique()}
        assert all((some == some[0]).all() for some in looks.values())
        assert min((a[0] - b[0]).abs().max() for a, b in itertools.combinations(looks.values(), 2)) > 40


def test_tint_and_noise_change_colours_only():
    plain, tinted, noisy = (planted_clips("place", "test", 8, **how) for how in (dict(tint=0), dict(tint=.2), dict(noise=.1)))
    assert plain.factors["tokens"].equal(tinted.factors["tokens"]) and plain.factors["tokens"].equal(noisy.factors["tokens"])
    spread = (noisy.video.float() - planted_clips("place", "test", 8).video.float()).std()
    assert 15 < spread < 26, "a tenth of white, less what is clipped"


@pytest.mark.parametrize("changes, said", [
    (dict(task="plaice"), "Did you mean 'place'"), (dict(split="dev"), "Unknown split 'dev'"),
    (dict(count=-1), "expected 0 clips or more"), (dict(pixels=3), "4 pixels or more")])
def test_bad_requests_are_refused(changes, said):
    asked = dict(task="place", split="train", count=1) | changes
    with pytest.raises(AttnnasError, match=re.escape(said)): planted_clips(**asked)


# what they show

def test_the_label_is_the_face_that_goes_with_the_target():
    for task, together in (("place", lambda clip, slot: clip[:, slot // 4, slot % 4]), ("moment", lambda clip, slot: clip[slot])):
        clips = planted_clips(task, "test", 64)
        for clip, label in zip(clips.factors["tokens"], clips.labels):
            seen = [set(together(clip, slot).unique().tolist()) - {BLANK} for slot in range(16)]
            assert sorted(map(len, seen)) == [1] * 8 + [2] * 8, "eight slots of filling, eight of a badge and a face"
            assert seen.count({TARGET, FACE + int(label)}) == 2 and sum(TARGET in s and len(s) == 2 for s in seen) == 2
            assert sum(DECOY in s and len(s) == 2 for s in seen) == 6


def test_a_picture_comes_back_or_agrees_in_half_of_the_cells():
    clips = planted_clips("relation", "test", 128)
    for clip, label in zip(clips.factors["tokens"].long().flatten(2), clips.labels):
        shown = clip[(clip != BLANK).any(1)]
        pictures = 2 * (shown == LIGHT).float() - 1
        assert shown.shape == (8, 16) and set(shown.unique().tolist()) == {DARK, LIGHT}
        agree = (pictures @ pictures.T)[0]
        assert agree.sort().values.tolist() == ([-16.] * 4 + [16.] * 4 if label == 1 else [-16.] * 2 + [0.] * 4 + [16.] * 2)


# what they hide

@every
def test_a_window_of_three_never_sees_what_has_to_be_compared(task):
    clip = tokens(task)
    if task == "relation":
        windows = clip.flatten(2).unfold(1, 3, 1)
        shown = (windows != BLANK).any(2, keepdim=True)
        for a, b in itertools.combinations(range(3), 2):
            both = (shown[..., a] & shown[..., b]).expand_as(windows[..., a])
            assert windows[..., a][both].equal(windows[..., b][both])
    else:
        windows = clip.unfold({"place": 1, "moment": 3}[task], 3, 1)
        assert max(len(set(w) - {BLANK}) for w in windows.reshape(-1, 3).unique(dim=0).tolist()) == 1


@every
def test_the_bags_that_have_to_be_constant_are(task):
    seen = F.one_hot(tokens(task), 9)
    different = lambda bags: len(bags.reshape(-1, 9).unique(dim=0))
    assert different(seen.sum((1, 2, 3))) == 1
    assert (different(seen.sum((2, 3))) == 1) == (task == "place")
    assert (different(seen.sum(1)) == 1) == (task != "place")


@pytest.mark.parametrize("task, dimension, kind", CONSTANT)
def test_the_mean_output_is_the_same_for_all_clips_but_where_it_was_planted(task, dimension, kind):
    torch.manual_seed(0)
    op = create_operation(dimension, kind, {"map-based": "sigmoid", "dot-product": "softmax"}[kind], 9, dtype=torch.float64)
    for p in op.parameters(): p.data.mul_(3)
    with torch.no_grad(): mean = op(F.one_hot(tokens(task, 64), 9).double().movedim(-1, 1)).mean((2, 3, 4))
    spread = (mean - mean[0]).abs().max().item()
    assert spread > 1e-6 if f"{dimension} {kind}" in PLANTED[task] else spread < 1e-12


@pytest.mark.parametrize("task, dimension, kind", VARYING)
def test_maps_that_vary_do_not_vary_with_the_class(task, dimension, kind):
    torch.manual_seed(0)
    op = create_operation(dimension, kind, "sigmoid", 9, dtype=torch.float64)
    clips = planted_clips(task, "train", 2048)
    cells = F.one_hot(clips.factors["tokens"].long(), 9).double().movedim(-1, 1)
    with torch.no_grad(): mean = torch.cat([op(part).mean((2, 3, 4)) for part in cells.split(512)])
    of = [mean[clips.labels == c] for c in range(len(clips.classes))]
    error = torch.stack([(m.var(0) / len(m)) for m in of]).sum(0).sqrt() + 1e-12
    away = torch.stack([(a.mean(0) - b.mean(0)).abs() for a, b in itertools.combinations(of, 2)]) / error
    assert away.max() < 4.5, "classes differ by more than sampling allows"


# the network

def test_the_network_sees_one_cell_at_a_time():
    seed_everything(0)
    net = PatchNet(4).eval()
    video = torch.rand(1, 3, 16, 16, 16)
    other = video.clone()
    other[:, :, 5, 4:8, 8:12] += 1
    with torch.no_grad(): changed = (net.cells(video) != net.cells(other)).any(1)[0]
    assert changed.nonzero().tolist() == [[5, 1, 2]] and net(video).shape == (1, 4)
    with pytest.raises(AttnnasError, match="PatchNet takes clips"): net(video[:, :1])


# the search

def test_ranks_and_chance():
    sink = torch.tensor([[.1, .3, .05, .02, .2, .15], [.06, .01, .04, .03, .025, .015]])
    assert planted_ranks("place", sink) == [1, 4, 5, 12] and planted_ranks("relation", sink.tolist()) == [8, 10]
    for right, alpha in itertools.product((1, 2), (1, 3)):
        draws = list(itertools.combinations(range(6), alpha))
        assert chance_level(right, 6, alpha) == pytest.approx(sum(min(draw) < right for draw in draws) / len(draws))
    with pytest.raises(AttnnasError, match="Unknown task"): planted_ranks("time", sink)


@pytest.mark.parametrize("task", ["place", "relation"])
def test_the_search_finds_what_was_planted(task):
    "The lesson does it for a moment."
    seed_everything(100)
    train = planted_clips(task, "train", 4096, seed=100)
    found = differentiable(PatchNet(len(train.classes)), train, SearchConfig(levels=1, width=16, activations="fixed"),
                           TrainingConfig(epochs=1, warmup=.2), seed=100)
    assert planted_ranks(task, found.log.epochs[-1]["connections"]["cells"]["sink"])[0] == 1
