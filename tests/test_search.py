"""Black-box search: no trial is lost, none is made twice, and what is tried is a function of the seed.

As a script it is the processes that are killed and that share: python tests/test_search.py FOLDER.
"""
import dataclasses
import gzip
import json
import os
import random as standard_random
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import forks
from attnnas.networks.registry import create_model
from attnnas.core.errors import AttnnasError
from attnnas.core.seeds import seed_everything
from attnnas.data.synthetic import benchmark, make_clips
from attnnas.networks.insertion import insert
from attnnas.networks.profile import count_flops
from attnnas.cells.supergraph import TALK
from attnnas.core.options import to_plain
from attnnas.search.base import EpochLog, Past, SearchResult, Trial, TrialLog, try_cell
from attnnas.search.bandit import bandit
from attnnas.search.differentiable import SearchConfig, differentiable
from attnnas.search.bandit import propose as propose_bandit
from attnnas.search.evolution import evolution
from attnnas.search.evolution import propose as propose_evolution
from attnnas.search.objective import CellTraining
from attnnas.search.methods import black_box, search_config
from attnnas.search.methods import METHODS as BY_NAME
from attnnas.search.random import random
from attnnas.search.study import AnotherStudy, BlackBoxConfig, Claims, Study, describe, search
from attnnas.search.tabular import TabularBenchmark, different_cells, run_of
from attnnas.cells.space import SearchSpace
from attnnas.training.evaluation import Diverged, evaluate
from attnnas.training.loop import Trainer, TrainingConfig

SPACE = SearchSpace(2, width=8)
METHODS = {"random": random, "evolution": partial(evolution, population=5, tournament=2),
           "bandit": partial(bandit, startup=4)}
WORTH = {"spatial": 0, "temporal": 2, "spatiotemporal": 3, "none": 0, "relu": 1, "softmax": 2, "sigmoid": 1.5}
each_method = pytest.mark.parametrize("name", METHODS)


def worth(cell) -> float:
    "Dimension, activation by type, variety, and few inputs."
    pairs = [(o.type, o.activation) for o in cell.operations]
    unfit = pairs.count(("dot-product", "sigmoid")) + pairs.count(("map-based", "softmax"))
    return (60 + sum(WORTH[o.dimension] + WORTH[o.activation] for o in cell.operations) - unfit
            + len({o.type for o in cell.operations}) - .5 * sum(map(len, cell.inputs)))


@dataclasses.dataclass
class Formula:
    "The formula as an objective. It writes down who tried what, and can kill its process or wait in its n-th trial."
    log: Path | None = None
    kill_in: int = 0
    wait_in: int = 0
    meet: int = 0  # wait in each trial until so many processes have come
    made: int = 0
    settings = "the formula"

    def __call__(self, cell, seed):
        self.made += 1
        if self.made == self.kill_in: os.kill(os.getpid(), signal.SIGKILL)
        if self.log:
            with open(self.log, "a") as file: file.write(f"{os.getpid()} {cell.hash}\n")
            deadline = time.monotonic() + 60
            while len({pid for pid, _ in tries(self.log)}) < self.meet and time.monotonic() < deadline: time.sleep(.01)
        while self.made == self.wait_in: time.sleep(.01)
        if cell.operations[0].activation == "none": raise Diverged("nan")
        return {"score": worth(cell), "multiply_adds": 7}


def tries(log) -> list:
    return [line.split() for line in Path(log).read_text().splitlines()]


def outcomes(result) -> list:
    return [dataclasses.replace(trial, seconds={}) for trial in result.log.trials]


def forked(work) -> int:
    "A child process that does `work` and ends."
    if not (pid := os.fork()):
        try: work()
        finally: os._exit(0)
    return pid


def main(folder: Path):
    "Forks before any computation in this process, so that its children lack no thread."
    for name, method in METHODS.items():
        for times in (3, 4): os.waitpid(forked(lambda: method(SPACE, Formula(kill_in=times), 9, 5, folder / name)), 0)
        shared = lambda: method(SPACE, Formula(folder / f"{name}.log", meet=2), 12, 5, folder / f"{name} shared")
        for pid in [forked(shared) for _ in range(2)]: os.waitpid(pid, 0)
    crowd = lambda: random(SPACE, Formula(folder / "crowd.log"), 80, 5, folder / "crowd")
    for pid in [forked(crowd) for _ in range(4)]: os.waitpid(pid, 0)
    log = folder / "orphan.log"
    log.touch()
    first = forked(lambda: random(SPACE, Formula(log, wait_in=2), 10, 5, folder / "orphan"))
    while len(tries(log)) < 2: time.sleep(.01)
    second = forked(lambda: random(SPACE, Formula(log), 10, 5, folder / "orphan"))
    while len(tries(log)) < 10: time.sleep(.01)
    time.sleep(.2)
    os.kill(first, signal.SIGKILL)
    for pid in (first, second): os.waitpid(pid, 0)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "The folder in which `main` has been at work."
    folder = tmp_path_factory.mktemp("processes")
    assert forks.Forked(main, folder, output=folder / "output.txt").wait(300) == 0, (folder / "output.txt").read_text()
    return folder


# Trials

@pytest.mark.parametrize("score", [None, float("nan"), float("-inf")])
def test_a_score_that_is_no_number_is_a_diverged_trial(score):
    objective = lambda cell, seed: {"score": score, "multiply_adds": 3, "top5": 1}
    trial = try_cell(objective, Trial(0, SPACE[0], 9, {"proposal": 1}))
    assert (trial.status, trial.score, trial.multiply_adds, trial.metrics) == ("diverged", None, 3, {"top5": 1})
    assert str(score) in trial.reason and trial.seconds.keys() == {"proposal", "wall", "cpu"}


def test_an_objective_that_diverges_is_a_trial_and_one_that_fails_is_an_error():
    def raising(error):
        def objective(cell, seed): raise error
        return objective
    trial = Trial(0, SPACE[0], 0, {})
    assert try_cell(raising(Diverged("too hot")), trial).reason == "too hot"
    with pytest.raises(ZeroDivisionError): try_cell(raising(ZeroDivisionError()), trial)
    with pytest.raises(AttnnasError, match="a dictionary with a score"): try_cell(lambda *_: {"top1": 5}, trial)


def test_what_follows_from_the_trials():
    scores = [None, 61.0, 60.0, 63.0, 63.0]
    trials = tuple(Trial(k, SPACE[k], 0, {"wall": 2.0, "cpu": 1.0, "proposal": .5}, "finished" if s else "diverged", s,
                         multiply_adds=10, metrics={"regret": k}) for k, s in enumerate(scores))
    result = SearchResult("random", {}, 0, TrialLog(SPACE, "x", trials), {})
    assert result.best == SPACE[3] and result.multiply_adds == 50
    assert result.seconds == {"wall": 10, "cpu": 5, "proposal": 2.5}
    way = result.trajectory
    assert [(row["best"], row["regret"]) for row in way] == [(None, None), (61, 1), (61, 1), (63, 3), (63, 3)]
    assert way[-1] == {"trials": 5, "seconds": 12.5, "multiply_adds": 50, "best": 63, "regret": 3}
    with pytest.raises(AttnnasError, match="None of the 1 trials finished"):
        dataclasses.replace(result, log=TrialLog(SPACE, "x", trials[:1])).best


@pytest.mark.parametrize("change, told", [
    ({"schema_version": 2}, "version 2"), ({"trials": None}, "incomplete"), ({"best": 1}, "Unknown field"),
    ({"space": {"operation": 2}}, "Did you mean 'operations'")])
def test_a_result_is_its_json(change, told):
    result = METHODS["evolution"](SPACE, Formula(), 8)
    values = json.loads(json.dumps(result.to_dict()))
    assert SearchResult.from_dict(values) == result
    with pytest.raises(AttnnasError, match=told): SearchResult.from_dict(values | change)


def test_a_result_of_a_search_with_other_nodes_is_read_and_derived_with_its_own(training):
    nodes = ("temporal dot-product", "spatial map-based", "spatiotemporal map-based")
    config = SearchConfig(levels=2, width=8, nodes=nodes)
    found = differentiable(create_model("i3d_small", 12), training.clips, config, training.training,
                           sites=training.sites)
    values = json.loads(json.dumps(found.to_dict()))
    again = SearchResult.from_dict(values)
    assert again == found and again.log.nodes == nodes and again.settings["nodes"] == list(nodes)
    assert np.shape(again.log.epochs[-1]["connections"]["Mixed_4b"]["sink"]) == (2, 3)
    operations = again.log.derive(alpha=6, beta=3).cell.operations
    assert {f"{o.dimension} {o.type}" for o in operations} == set(nodes)
    assert again.cells() == found.cells() and list(again.cells()) == ["Mixed_4b"] == again.log.sites


def test_a_log_without_nodes_has_those_of_the_talk():
    config = SearchConfig(levels=2)
    assert config.nodes == TALK and search_config({"levels": 2}) == config
    assert EpochLog.from_dict({"epochs": []}).nodes == TALK
    with pytest.raises(AttnnasError, match="Unknown type 'dot-produkt'"): SearchConfig(nodes=("spatial dot-produkt",))


def test_a_black_box_result_of_the_first_schema_is_read():
    result = METHODS["evolution"](SPACE, Formula(), 8)
    first = {"schema_version": 1, "method": "evolution", "space": dataclasses.asdict(SPACE), "seed": 0,
             "settings": {"population": 5, "tournament": 2}, "objective": "the formula",
             "trials": [trial.to_dict() for trial in result.log.trials], "provenance": result.provenance}
    assert SearchResult.from_dict(json.loads(json.dumps(first))) == result


# Methods by name

@pytest.mark.parametrize("values", [{}, {"levels": 2, "nodes": ["temporal dot-product"]}, {"method": "random", "trials": 3},
                                    {"method": "evolution", "population": 4}, {"method": "bandit", "startup": 3}])
def test_a_configuration_has_the_options_of_its_method_and_no_others(values):
    config = search_config(values)
    plain = json.loads(json.dumps(to_plain(config)))
    assert search_config(plain) == config and list(plain)[0] == "method"
    assert type(config) is BY_NAME[plain["method"]].options
    black_box_options = {"trials", "operations"} & plain.keys()
    assert bool(black_box_options) == isinstance(config, BlackBoxConfig)
    assert ("levels" in plain) == (plain["method"] == "differentiable")


@pytest.mark.parametrize("values, told", [
    ({"method": "evolutoin"}, "Did you mean 'evolution'"), ({"method": "evolution", "populaton": 3}, "Did you mean 'population'"),
    ({"method": "bandit", "tournament": 3}, "'tournament' is an option of evolution, not of bandit"),
    ({"trials": 3}, "'trials' is an option of random, evolution, bandit, pareto, not of differentiable"),
    ({"method": "random", "levels": 3}, "'levels' is an option of differentiable, not of random"),
    ({"method": "random", "trials": 0}, "trials = 0")])
def test_a_configuration_with_options_of_another_method_is_refused(values, told):
    with pytest.raises(AttnnasError, match=told): search_config(values)


@pytest.mark.parametrize("values", [{"method": "random"}, {"method": "evolution", "population": 2, "tournament": 1},
                                    {"method": "bandit", "startup": 2}])
def test_a_black_box_search_of_a_backbone_stops_and_continues(training, tmp_path, values):
    config = search_config(values | {"trials": 3, "operations": 2, "width": 8})
    recipe = dataclasses.replace(training.training, epochs=1)
    run = partial(black_box, config, training.backbone, training.clips, training.validation, recipe, seed=5)
    seen = []

    def stop(made, trials):
        seen.append((made, trials))
        if made == 2: raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt): run(journal=tmp_path / "journal", progress=stop)
    assert seen == [(1, 3), (2, 3)]
    resumed = run(journal=tmp_path / "journal", progress=lambda *step: seen.append(step))
    assert seen[2:] == [(2, 3), (3, 3)] and outcomes(resumed) == outcomes(run())
    assert resumed.method == config.method and resumed.settings == config.settings
    sites = create_model("i3d_small", 12).default_sites
    assert resumed.cells() == dict.fromkeys(sites, resumed.best) and resumed.best in config.space
    with pytest.raises(AnotherStudy, match="seed is 5 there and 6 here"): run(journal=tmp_path / "journal", seed=6)


def test_a_black_box_search_takes_the_options_of_one(training):
    with pytest.raises(AttnnasError, match="random, evolution, bandit, pareto; got SearchConfig"):
        black_box(SearchConfig(), training.backbone, training.clips, training.validation)


# Methods

@each_method
def test_the_same_seed_gives_the_same_search(name):
    first, second, other = (METHODS[name](SPACE, Formula(), 8, seed) for seed in (3, 3, 4))
    assert outcomes(first) == outcomes(second) != outcomes(other)
    assert {trial.status for trial in first.log.trials + other.log.trials} == {"finished", "diverged"}


def test_the_sampler_of_the_bandit_is_seeded_by_seed_and_number(monkeypatch):
    "Most proposals are the same under any seed of the sampler, so equal searches alone do not show this."
    optuna = pytest.importorskip("optuna")
    seeds, sampler = [], optuna.samplers.GPSampler
    noting = lambda seed, **options: seeds.append(seed) or sampler(seed=seed, **options)
    monkeypatch.setattr(optuna.samplers, "GPSampler", noting)
    trials = [try_cell(Formula(), Trial(k, SPACE.sample(k), 0, {})) for k in range(8)]
    for number, seed in ((8, 0), (8, 0), (9, 0), (8, 1)):
        propose_bandit(dataclasses.replace(past(trials, number), seed=seed), startup=4)
    assert seeds[0] == seeds[1] and len(set(seeds)) == 3


def test_methods_of_one_seed_start_with_the_same_cells():
    starts = [[trial.cell for trial in method(SPACE, Formula(), 4, 1).log.trials] for method in METHODS.values()]
    assert starts[0] == starts[1] == starts[2]


@each_method
def test_no_cell_is_tried_twice_and_a_search_ends_with_the_space(name):
    small = SearchSpace(2, dimensions=["temporal"], types=["dot-product"])
    result = METHODS[name](small, Formula(), 60)
    assert sorted(trial.cell.hash for trial in result.log.trials) == sorted(different_cells(small))
    assert result.best in small and len(result.log.trials) == 3 * 4**2 - 4 * 3 // 2
    one = SearchSpace(1, dimensions=["temporal"], types=["dot-product"], activations=["relu"])
    assert len(METHODS[name](one, Formula(), 60).log.trials) == 1


def past(trials, number=None, running=()) -> Past:
    taken = {trial.cell.hash for trial in trials} | {cell.hash for cell in running}
    return Past(SPACE, 0, len(trials) if number is None else number, list(trials), list(running), taken)


def test_evolution_forgets_the_oldest_and_never_breeds_the_diverged():
    trials = [try_cell(lambda cell, seed: {"score": worth(cell)}, Trial(k, SPACE.sample(k), 0, {})) for k in range(12)]
    trials[3] = dataclasses.replace(trials[3], score=99.0)
    child = lambda tried, population: propose_evolution(past(tried), population, tournament=50)
    assert child(trials, 12) in SPACE.neighbours(trials[3].cell)
    young = max(trials[6:], key=lambda trial: trial.score)
    assert child(trials, 6) in SPACE.neighbours(young.cell)
    dead = [dataclasses.replace(trial, status="diverged", score=None) for trial in trials]
    assert child([*dead[:-1], trials[-1]], 12) in SPACE.neighbours(trials[-1].cell)
    assert propose_evolution(past(trials[:4]), 5, 2) == past(trials[:4]).draw()


def test_the_bandit_knows_what_is_running_and_what_diverged():
    trials = [try_cell(Formula(), Trial(k, SPACE.sample(k), 0, {})) for k in range(14)]
    alone = propose_bandit(past(trials), startup=4)
    beside = propose_bandit(past(trials, running=[alone]), startup=4)
    assert beside.hash not in {alone.hash, *(trial.cell.hash for trial in trials)}
    bad = lambda cell: any(o.type == "map-based" for o in cell.operations)
    trials = [Trial(k, cell, 0, {}, "diverged") if bad(cell) else Trial(k, cell, 0, {}, "finished", worth(cell))
              for k, cell in enumerate(map(SPACE.sample, range(14)))]
    assert sum(map(bad, (trial.cell for trial in trials))) > 7
    assert sum(bad(propose_bandit(past(trials, number), startup=4)) for number in range(14, 20)) <= 1


def made_up_table(space, noise=0.0, seeds=(0,)) -> TabularBenchmark:
    draw = np.random.default_rng(0)
    scores = lambda cell: (worth(cell) + noise * draw.normal(size=2)).tolist()
    return TabularBenchmark(space, tuple(run_of(space, cell, seed, *scores(cell), seconds=9.0, multiply_adds=7)
                                         for cell in different_cells(space).values() for seed in seeds), {})


def test_the_bandit_beats_random_search():
    "Regret of the best cell after 20 trials: below random search's for 8 of 10 seeds at least."
    table = made_up_table(SPACE)
    ours, theirs = ([method(SPACE, table.objective(0), 20, seed).trajectory[-1]["regret"] for seed in range(10)]
                    for method in (bandit, random))
    assert sum(a < b for a, b in zip(ours, theirs)) >= 8 and np.mean(ours) < np.mean(theirs) / 2, (ours, theirs)


@pytest.mark.parametrize("method, options", [
    (evolution, {"population": 0}), (evolution, {"tournament": 1.5}), (bandit, {"startup": 0}), (random, {"trials": 0}),
    (random, {"workers": 0}), (random, {"trials": "9"})])
def test_options_that_make_no_sense(method, options):
    (name, value), = options.items()
    with pytest.raises(AttnnasError, match=f"{name} must be a whole number, at least 1; got {value!r}"):
        method(SPACE, Formula(), **options)


def test_the_standard_library_is_not_shadowed():
    import attnnas.search.random  # noqa: F401
    assert standard_random.Random(0).random() == sys.modules["random"].Random(0).random()
    assert sys.modules["attnnas.search.random"].random is random


# Killed and shared

@each_method
def test_killed_twice_and_resumed_is_the_search_that_was_not(processes, name):
    "If this fails, the order of trials depends on something that lives in a process."
    journal = processes / name
    assert len(journal.read_text().splitlines()) == 1 + 6 + 5  # the study, six claims, the five trials made
    resumed = METHODS[name](SPACE, Formula(), 9, 5, journal)
    assert outcomes(resumed) == outcomes(METHODS[name](SPACE, Formula(), 9, 5))
    assert not journal.with_name(f"{name}.claims").exists()


@each_method
def test_two_processes_make_every_trial_once(processes, name):
    tried = tries(processes / f"{name}.log")
    result = METHODS[name](SPACE, Formula(kill_in=1), 12, 5, processes / f"{name} shared")
    assert len(tried) == 12 and len({pid for pid, _ in tried}) == 2
    assert sorted(cell for _, cell in tried) == sorted({trial.cell.hash for trial in result.log.trials})


def test_processes_in_a_hurry_do_not_write_over_each_other(processes):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = random(SPACE, Formula(kill_in=1), 80, 5, processes / "crowd")
    assert outcomes(result) == outcomes(random(SPACE, Formula(), 80, 5)) and len(tries(processes / "crowd.log")) == 80


def test_a_killed_worker_leaves_its_trial_to_the_other(processes):
    tried = tries(processes / "orphan.log")
    first, second = tried[0][0], tried[-1][0]
    assert [cell for pid, cell in tried if pid == first] == [tried[0][1], tried[1][1]]
    assert tried[-1] == [second, tried[1][1]] and len(tried) == 11, "the second ends with what the first had begun"
    result = random(SPACE, Formula(kill_in=1), 10, 5, processes / "orphan")
    assert outcomes(result) == outcomes(random(SPACE, Formula(), 10, 5))


def test_workers_of_one_call(tmp_path):
    log = tmp_path / "log"
    result = random(SPACE, Formula(log, meet=2), 8, 5, workers=2)
    assert len({pid for pid, _ in tries(log)}) == 2 and len(tries(log)) == 8
    assert outcomes(result) == outcomes(random(SPACE, Formula(), 8, 5)), "of random search even the order is the same"


def test_an_objective_that_cannot_travel():
    with pytest.raises(AttnnasError, match="cannot be sent to another process"):
        random(SPACE, lambda *_: {"score": 1}, 4, workers=2)


def test_a_failing_objective_stops_the_search_and_the_same_call_continues(tmp_path):
    class Failing(Formula):
        def __call__(self, cell, seed):
            if self.made == 3: raise RuntimeError("out of memory")
            return super().__call__(cell, seed)
    with pytest.raises(RuntimeError, match="out of memory"): random(SPACE, Failing(), 6, 5, tmp_path / "journal")
    result = random(SPACE, again := Formula(), 6, 5, tmp_path / "journal")
    assert again.made == 3 and outcomes(result) == outcomes(random(SPACE, Formula(), 6, 5))


def test_a_proposal_that_fails_holds_nothing_back(tmp_path):
    study = Study("broken", lambda past: 1 / 0, {}, SPACE, Formula())
    with pytest.raises(ZeroDivisionError) as error: search(study, 3, tmp_path / "journal")
    assert error and Claims(tmp_path / "journal").take(0), "free, although the traceback still holds the file"


# The journal

@pytest.fixture
def journal(tmp_path):
    "Of six trials of seed 5: a line for the study, then two a trial."
    random(SPACE, Formula(), 6, 5, tmp_path / "folder/journal.jsonl")
    return tmp_path / "folder/journal.jsonl"


def resume(journal) -> tuple:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        return random(SPACE, again := Formula(), 6, 5, journal), again.made, [str(warning.message) for warning in told]


@pytest.mark.parametrize("number, made", [(1, 0), (2, 0), (3, 1), (13, 1)])
@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\x00", b'{"check":"00000000","trial":{}}', b"[" * 100_000,
                                    b"null", b'"x'])
def test_a_damaged_line_is_told_by_its_number_and_costs_one_trial_at_most(journal, number, made, damage):
    lines = journal.read_bytes().splitlines()
    lines[number - 1] = damage
    journal.write_bytes(b"\n".join(lines) + b"\n")
    result, again, (message,) = resume(journal)
    assert f"line {number} is left out" in message and again == made
    assert outcomes(result) == outcomes(random(SPACE, Formula(), 6, 5))
    assert resume(journal)[1] == 0


def test_a_changed_digit_is_damage(journal):
    text = journal.read_text()
    journal.write_text(text.replace('"score":6', '"score":7', 1))
    result, again, (message,) = resume(journal)
    assert "checksum" in message and again == 1 and outcomes(result) == outcomes(random(SPACE, Formula(), 6, 5))


@pytest.mark.parametrize("keep", [3, 60, 1200, 2500, -1])
def test_a_torn_last_line_is_removed(journal, keep):
    content = journal.read_bytes()[:keep]
    journal.write_bytes(content)
    result, again, (message,) = resume(journal)
    assert f"line {content.count(10) + 1} was cut off" in message
    assert outcomes(result) == outcomes(random(SPACE, Formula(), 6, 5)) and resume(journal)[1:] == (0, [])


@pytest.mark.parametrize("content", ["a note", "a note\n", "\n", '{"score": 1}\n'])
def test_another_file_is_left_alone(tmp_path, content):
    note = tmp_path / "note"
    note.write_text(content)
    with pytest.raises(AttnnasError, match="is not the journal of a search"): random(SPACE, Formula(), 3, journal=note)
    assert note.read_text() == content
    with pytest.raises(AttnnasError, match="Could not open"): random(SPACE, Formula(), 3, journal=note / "journal")


@pytest.mark.parametrize("other, told", [
    (partial(random, SPACE, Formula(), seed=6), "seed is 5 there and 6 here"),
    (partial(random, SearchSpace(2), Formula(), seed=5), "space width is 8 there and 64 here"),
    (partial(random, SPACE, worth, seed=5), "objective is 'the formula' there and 'test_search.worth' here"),
    (partial(METHODS["bandit"], SPACE, Formula(), seed=5),
     "method is 'random' there and 'bandit' here; settings startup is None there and 4 here")])
def test_a_study_with_other_settings_is_refused(journal, other, told):
    content = journal.read_bytes()
    with pytest.raises(AttnnasError, match=told): other(trials=6, journal=journal)
    assert journal.read_bytes() == content


def test_more_trials_continue_a_study_and_fewer_are_its_first(journal):
    more = random(SPACE, again := Formula(), 9, 5, journal)
    assert again.made == 3 and outcomes(more)[:4] == outcomes(random(SPACE, Formula(kill_in=1), 4, 5, journal))


def test_an_outcome_that_is_no_json(tmp_path):
    with pytest.raises(AttnnasError, match="trial cannot be written as JSON"):
        random(SPACE, lambda cell, seed: {"score": 1, "extra": {1, 2}}, 3)


# The table

def test_a_table_knows_its_noise_its_best_cell_and_every_description(tmp_path):
    space = SearchSpace(2, dimensions=["temporal", "spatiotemporal"])
    table = made_up_table(space, noise=2.0, seeds=(0, 1, 5))
    noise, spread = table.noise["validation"], np.std([worth(cell) for cell in table.cells])
    assert abs(noise.residual - 2) < .1 and abs(noise.rows - spread) < .1
    assert noise.share == pytest.approx(noise.residual**2 / (noise.residual**2 + noise.rows**2))
    assert table.regret(table.optimum) == 0 and min(map(table.regret, table.cells)) == 0
    mean = lambda cell: np.mean([run["test"] for run in table.runs if run["hash"] == cell.hash])
    for cell in table.cells[::100]: assert table.regret(cell) == pytest.approx(mean(table.optimum) - mean(cell))
    for cell in map(space.sample, range(50)):
        assert table.objective(5)(cell, 0) == table.objective(5)(cell.canonical(), 1)
        alone, together = [table.objective(seed)(cell, 0) for seed in table.seeds], table.objective()(cell, 0)
        assert together["score"] == pytest.approx(np.mean([one["score"] for one in alone]))
        assert together["seconds"] == {"wall": 27.0} and together["multiply_adds"] == 21 and together["regret"] == alone[0]["regret"]
    table.save(tmp_path / "t.json.gz")
    again = TabularBenchmark.load(tmp_path / "t.json.gz")
    assert again.runs == table.runs and describe(again.objective(1)) == describe(table.objective(1))
    assert len({str(describe(table.objective(seed))) for seed in (0, 1, None)}) == 3
    with pytest.raises(AttnnasError, match="seeds 0, 1, 5, not 2"): table.objective(2)
    with pytest.raises(AttnnasError, match="not in the table"): table.regret(SearchSpace(3)[0])


def test_a_run_that_diverged_counts_as_the_worst(tmp_path):
    small = SearchSpace(1)
    table = made_up_table(small, seeds=(0, 1))
    best, lost = table.optimum, {"status": "diverged", "validation": None, "test": None}
    runs = [run | (lost if (run["hash"], run["seed"]) == (best.hash, 1) else {}) for run in table.runs]
    damaged = TabularBenchmark(small, runs, {})
    lowest = min(run["test"] for run in table.runs)
    assert damaged.means["test"][table.row(best)] == (worth(best) + lowest) / 2 and damaged.noise["test"].residual == 0
    assert damaged.objective()(best, 0)["score"] is None is not damaged.objective(0)(best, 0)["score"]
    result = random(small, damaged.objective(1), 24)
    assert [trial.cell.hash for trial in result.log.trials if trial.status == "diverged"] == [best.hash]
    assert result.seconds["wall"] == 24 * 9 and result.multiply_adds == 24 * 7
    assert result.trajectory[-1]["regret"] == damaged.regret(result.best)


@pytest.mark.parametrize("change, told", [
    (lambda runs: runs[1:], "1 are missing and 0 are there twice"),
    (lambda runs: [*runs, runs[0]], "0 are missing and 1 are there twice"), (lambda runs: [], "0 runs"),
    (lambda runs: [runs[0] | {"hash": "0" * 16}, *runs[1:]], "another space, or was edited"),
    (lambda runs: [runs[0] | {"cell": 10**6}, *runs[1:]], "another space, or was edited"),
    (lambda runs: [runs[0] | {"test": float("nan")}, *runs[1:]], "A finished run has numbers"),
    (lambda runs: [runs[0] | {"status": "diverged"}, *runs[1:]], "one that diverged has no scores"),
    (lambda runs: [{"cell": 1}, *runs[1:]], "has the fields")])
def test_a_table_that_is_not_whole_is_refused(change, told):
    runs = list(made_up_table(SearchSpace(1)).runs)
    with pytest.raises(AttnnasError, match=told): TabularBenchmark(SearchSpace(1), change(runs), {})


def test_a_table_that_cannot_be_read(tmp_path):
    path = tmp_path / "t.json.gz"
    made_up_table(SearchSpace(1)).save(path)
    content = path.read_bytes()
    for wrong, told in ((content[:-20], "Could not read"), (b"{}", "Could not read"),
                        (gzip.compress(b"{}"), "schema version 1"),
                        (gzip.compress(b'{"schema_version": 1}'), "lacks 'space'")):
        path.write_bytes(wrong)
        with pytest.raises(AttnnasError, match=told): TabularBenchmark.load(path)
    with pytest.raises(AttnnasError, match="No such file"): TabularBenchmark.load(tmp_path / "none")


# The standard objective

@pytest.fixture(scope="module")
def training():
    data = benchmark("A", frames=4, size=16)
    clips, validation = make_clips(data, "train", 24), make_clips(data, "validation", 16)
    return CellTraining(partial(create_model, "i3d_small"), clips, validation, TrainingConfig(epochs=2, batch_size=8),
                        sites=("Mixed_4b",))


def test_cell_training_is_training_and_evaluation(training):
    outcome = training(SPACE[77], seed=4)
    seed_everything(4)
    model = insert(create_model("i3d_small", 12), SPACE[77], ["Mixed_4b"])
    forward = count_flops(model, (1, 3, 4, 16, 16)) // 2
    Trainer(model, training.clips, training.training, seed=4).fit()
    found = evaluate(model, training.validation, 8)
    assert (outcome["score"], outcome["loss"], outcome["count"]) == (found["top1"], found["loss"], 16)
    assert outcome["network_multiply_adds"] == forward and outcome["multiply_adds"] == forward * (3 * 2 * 24 + 16)


def test_a_training_that_diverges_is_a_trial(training):
    hot = dataclasses.replace(training.training, optimizer="sgd", learning_rate=1e9)
    trial = random(SPACE, dataclasses.replace(training, training=hot), 1).log.trials[0]
    assert trial.status == "diverged" and trial.reason and trial.score is None and trial.multiply_adds > 0


def test_what_a_training_depends_on(training):
    other = partial(dataclasses.replace, training)
    others = [other(training=TrainingConfig(epochs=3)), other(sites=None), other(clips=training.validation),
              other(backbone=partial(create_model, "s3d_small"))]
    assert len({json.dumps(describe(one)) for one in (training, *others)}) == 5
    assert describe(other(device="cuda")) == describe(training)
    with pytest.raises(AttnnasError, match="Mixed_4x"): random(SPACE, other(sites=("Mixed_4x",)), 1)

