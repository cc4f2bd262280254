"""Composed tasks: what their clips show and hide, how they are run, and how a table counts what was solved."""
import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from attnnas.cells.space import FIXED, SearchSpace
from attnnas.core.errors import AttnnasError
from attnnas.core.options import from_fields, option, to_plain
from attnnas.data import composed
from attnnas.data.composed import NAMES, RUNGS, ComposedConfig, benchmark, make_clips
from attnnas.data.planted import BLANK, DARK, DECOY, LATER, LIGHT, NOW, TARGET, planted_clips
from attnnas.evidence.claims import TABLES, composed_lines
from attnnas.evidence.config import RunConfig, load_tier
from attnnas.evidence.insertions import NonLocal
from attnnas.evidence.sources import Generated, source_of
from attnnas.evidence.store import RunRecord
from attnnas.evidence.tables.composed_attention import marks, preferences
from attnnas.evidence.tables.rows import Row
from attnnas.evidence.tables.table_1_composed import (SPATIAL, TEMPORAL, SOLVED, chain, compare_shares, counted_row,
                                                      found_sentences, in_words, solved, table_1_composed)
from attnnas.figures.attention import Seen
from attnnas.networks.non_local import NonLocalBlock
from attnnas.networks.registry import create_model
from attnnas.search.methods import search_config

DEEPER = [task for task, rung in RUNGS.items() if rung.steps > 1]
every = pytest.mark.parametrize("task", DEEPER)


def clips_of(task, count=512, seed=7, split="test"): return make_clips(ComposedConfig(f"composed-{task}"), split, count, seed)


def tokens_of(task, count=512, seed=7): return clips_of(task, count, seed).factors["tokens"].long().flatten(2)


# the clips

@every
def test_a_clip_depends_on_its_number_and_nothing_else(task):
    "If this fails, more clips, or another split, change the clips that a run has seen."
    few, many = (clips_of(task, count) for count in (20, 300))
    assert few.video.shape == (20, 3, 16, 16, 16) and few.video.equal(many.video[:20]) and few.labels.equal(many.labels[:20])
    others = [few, many, clips_of(task, 20, 8), clips_of(task, 20, split="train")]
    assert len({some.fingerprint for some in others}) == 4
    assert not few.video.equal(others[2].video) and not few.video.equal(others[3].video)


@every
def test_classes_are_balanced_in_every_block(task):
    assert all(part.bincount().tolist() == [128, 128] for part in clips_of(task, 768).labels.split(256))


@pytest.mark.parametrize("task", ["place", "moment", "relation"])
def test_the_first_rung_is_the_planted_tasks(task):
    "If this fails, a record on the ladder's first rung and the benchmark of planted tasks saw different clips."
    assert clips_of(task, 64).video.equal(planted_clips(task, "test", 64, 7).video)


@every
@pytest.mark.parametrize("axis", [(1, 2), 1, 2])
def test_what_is_shown_how_often_does_not_tell_the_class(task, axis):
    "If this fails, a network without attention can read the class from pooled local features."
    shown = F.one_hot(tokens_of(task), 11).sum(axis).flatten(1)
    if axis != (1, 2):  # frames, or places, in any order
        shown = F.one_hot(F.one_hot(tokens_of(task), 11).sum(axis), 17).sum(1).flatten(1)
    labels = clips_of(task).labels
    means = [shown[labels == label].double().mean(0) for label in (0, 1)]
    spread = shown.double().std(0) * (2 / len(shown)) ** .5 * 2 ** .5
    assert ((means[0] - means[1]).abs() <= 5 * spread + 1e-9).all()


@every
def test_pairs_of_frames_and_of_places_agree_as_often_in_both_classes(task):
    "If this fails, one comparison without a choice before it tells the class."
    seen = F.one_hot(tokens_of(task), 11).float()
    labels = clips_of(task).labels
    for pairs in ("btpk,bspk->bts", "btpk,btqk->bpq"):
        agree = F.one_hot(torch.einsum(pairs, seen, seen).long(), 17).sum((1, 2)).double()
        means = [agree[labels == label].mean(0) for label in (0, 1)]
        spread = agree.std(0) * (2 / len(agree)) ** .5 * 2 ** .5
        assert ((means[0] - means[1]).abs() <= 5 * spread + 1e-9).all()


@pytest.mark.parametrize("task", ["place-relation", "place-moment-relation", "half-place-moment-relation", "cue-relation"])
def test_the_target_s_places_alone_tell_the_class(task):
    tokens, labels = tokens_of(task), clips_of(task).labels
    meant = torch.full((len(tokens), 1), TARGET)
    if "cue" in task: meant = torch.where((tokens == NOW).flatten(1).any(1), TARGET, DECOY)[:, None]
    place = (tokens[:, 0] == meant)[:, None]
    if "moment" in task: tokens = torch.where((tokens == LATER).any(2, keepdim=True), BLANK, tokens)
    sign = ((tokens == LIGHT).long() - (tokens == DARK).long()) * place
    agree = sign @ sign.mT
    alike = ((agree == place.sum(2, keepdim=True)) & (agree > 0)).sum((1, 2))
    assert ((alike > alike.min()).long() == labels).all()


def test_half_of_the_clips_lack_the_picture_that_does_not_count():
    "If this fails, one attention alone reads more or less than three quarters of the clips."
    tokens = tokens_of("half-place-moment-relation", 2048)
    picture = ((tokens == DARK) | (tokens == LIGHT)).any(2)
    has_third = (picture & (tokens == LATER).any(2)).any(1)
    assert abs(has_third.float().mean() - .5) < .05
    assert ((tokens == LATER).any(2).sum(1) == 4).all(), "the mark stays, so that frames are the same in number"
    whole = tokens_of("place-moment-relation", 64)
    assert ((whole == LATER).any(2) == ((whole == LATER).any(2) & ((whole == DARK) | (whole == LIGHT)).any(2))).all()


@pytest.mark.parametrize("given", [dict(name="composed-place-moment"), dict(size=18), dict(size=12), dict(frames=8), dict(size=16.0)])
def test_what_does_not_fit_is_refused_in_one_line(given):
    with pytest.raises(AttnnasError) as error: benchmark(**given)
    assert "\n" not in str(error.value)


# how they are run

def test_every_task_is_a_data_set_of_a_run():
    for name in NAMES:
        source = source_of({"name": name, "size": 16, "train_clips": 8, "validation_clips": 4, "test_clips": 4})
        assert isinstance(source, Generated) and source.settings.name == name
        assert source.open()["test"].classes == composed.RUNGS[NAMES[name]].classes
    assert len({source_of({"name": name, "size": 16}).fingerprint for name in NAMES}) == len(NAMES)


def test_a_field_that_came_later_leaves_older_configurations_as_they_were():
    "If this fails, adding a field burns the records."
    @dataclasses.dataclass(frozen=True)
    class Config:
        old: int = option(1, "was there")
        new: int = option(1, "came later", added=True)

    assert to_plain(Config()) == {"old": 1} and to_plain(Config(new=2)) == {"old": 1, "new": 2}
    assert from_fields(Config, to_plain(Config(new=2))) == Config(new=2)
    assert NonLocal().to_dict() == {"kind": "non-local", "sites": []}


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_non_local_blocks_stand_one_after_another(blocks):
    net = NonLocal(blocks=blocks).build(create_model("patchnet", 2), {})
    assert sum(isinstance(module, NonLocalBlock) for module in net.modules()) == blocks
    assert net(torch.zeros(1, 3, 16, 16, 16)).shape == (1, 2)


def test_a_space_with_fixed_activations_is_the_part_of_the_whole_one():
    space, whole = SearchSpace(2, 8, activations=(FIXED,)), SearchSpace(2, 8)
    cells = list(space)
    assert len(cells) == space.size == 108 and all(cell in whole for cell in cells)
    inside = [cell for cell in map(whole.sample, range(300)) if cell in space]
    assert inside and all(space[space.index(cell)] == cell for cell in inside)
    near = space.neighbours(cells[40])
    assert all(other in space and cells[40] in space.neighbours(other) for other in near)
    assert search_config({"method": "random", "activations": "fixed", "operations": 2}).space == SearchSpace(2, 64, activations=(FIXED,))
    with pytest.raises(AttnnasError): SearchSpace(2, 8, activations=(FIXED, "softmax"))


def test_a_row_s_fields_reach_its_runs():
    plan = table_1_composed.plan(load_tier("quick"))
    at = {model: runs[0].insertion for (data, _, model), runs in plan.items() if data == "composed-place-relation"}
    assert at["two non-local blocks"].blocks == 2 and at["random cell"].alpha == at["derived cell"].beta == 1
    assert at["spatial alone"].cell == chain(SPATIAL)
    moved = at["cell from composed-moment-relation"]
    assert moved.needs.data.name == "composed-moment-relation"
    for runs in plan.values():
        seeds = [(run.seed, run.insertion.needs and run.insertion.needs.seed) for run in runs]
        assert all(search in (None, seed) for seed, search in seeds), "every seed has a search of its own"


# what is counted

def row(model, accuracies, cell=None, data="composed-place-relation"):
    records = []
    for seed, top1 in enumerate(accuracies):
        test = None if top1 is None else {"top1": top1, "top5": 100., "by": {}}
        records.append(RunRecord(
            key="", config=RunConfig(seed=seed).to_dict(), status="finished" if test else "diverged", reason=None, test=test,
            history=[], parameters=1000, gflops=.1, seconds={"cpu": 1., "wall": 1.}, peak_memory=1., device="cpu", threads=1, versions={},
            data={"fingerprint": "0"}, source="0", cells={"cells": cell.to_dict()} if cell else {}, finished=""))
    return Row(data, "patchnet", model, tuple(records))


def test_a_diverged_run_did_not_solve_its_task():
    some = row("non-local", [SOLVED, 94.9, None, 100.])
    assert solved(some) == (2, 4) and counted_row(some)["share"] == .5


def test_shares_are_compared_exactly_and_corrected_together():
    rows = [row("backbone", [50.] * 5), row("non-local", [50.] * 5), row("derived cell", [100.] * 5)]
    pairs = [pair for pair in table_1_composed.pairs if pair.better == "derived cell"]
    found = compare_shares(rows, pairs)
    assert [(one.worse, one.verdict) for one in found] == [("backbone", "held"), ("non-local", "held")]
    assert [one.p for one in found] == pytest.approx([2 * 2 / 252] * 2)  # 1 of C(10, 5) ways on either side, times two tests
    turned = compare_shares([row("backbone", [100.] * 6), row("derived cell", [50.] * 6)], pairs)
    assert [one.verdict for one in turned] == ["not held"]
    few = compare_shares([row("backbone", [50.] * 3), row("derived cell", [100.] * 3)], pairs)
    assert [one.verdict for one in few] == ["undecided"], "three runs against three decide nothing"


def test_found_cells_are_named_with_what_they_solved():
    cell = chain(SPATIAL, TEMPORAL)
    assert in_words(cell) == "spatial dot-product, then temporal dot-product"
    assert in_words(chain(SPATIAL, dataclasses.replace(TEMPORAL, pool_keys=True))) == "spatial dot-product, then temporal pooled dot-product"
    sentence, = found_sentences([row("derived cell", [100., 50., 99.], cell), row("random cell", [50.], cell)])
    assert "3 searches found spatial dot-product, then temporal dot-product (2 of 3 solved it)" in sentence


def test_claims_name_every_data_set():
    cell = chain(SPATIAL, TEMPORAL)
    both = [row(model, [top1] * 6, cell if "cell" in model else None, data) for data in ("composed-place-relation", "composed-moment-relation")
            for model, top1 in (("backbone", 50.), ("non-local", 50.), ("random cell", 50.), ("derived cell", 100.))]
    lines = {line["claim"]: line["verdict"] for line in composed_lines(both)}
    assert lines["a searched cell is better than non-local blocks"] == lines["a searched cell is better than nothing"] == "held"
    assert lines["a cell searched on another task solves it"] == "not run"
    assert "table_1_composed" in TABLES


@pytest.mark.parametrize("dimension", ["spatial", "temporal", "spatiotemporal"])
def test_preferences_are_those_of_a_loop_over_queries_and_keys(dimension):
    "If this fails, the figure of what found cells attend to says something else than their weights."
    clips = make_clips(benchmark("composed-place-relation"), "test", 3)
    held = marks(clips.factors["tokens"])
    torch.manual_seed(0)
    operation = SimpleNamespace(weights=lambda x, queries: drawn)
    axes = {"spatial": (4, 4), "temporal": (16,), "spatiotemporal": (16, 4, 4)}[dimension]
    keys = math.prod(axes)
    drawn = torch.rand(3, keys, keys).softmax(-1)
    found = preferences(Seen(SimpleNamespace(dimension=dimension), operation, torch.zeros(3, 1, 16, 4, 4)), held)

    def place(t, y, x): return {"spatial": 4 * y + x, "temporal": t, "spatiotemporal": 16 * t + 4 * y + x}[dimension]

    cells = list(itertools.product(range(16), range(4), range(4)))
    asks, what = "target's pictures", "decoys' badges"
    totals = []
    for n in range(3):
        for query in sorted({place(*cell) for cell in cells if held[asks][n][cell]}):
            totals.append(sum(drawn[n, query, place(*cell)] * keys / 256 for cell in cells if held[what][n][cell]))
    assert found[asks][what] == pytest.approx((torch.stack(totals).mean() / held[what].double().mean()).item(), rel=1e-5)
