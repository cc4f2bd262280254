"""The plan of a tier against what can be said by hand: sums, paths, expectations."""
import csv
import dataclasses
import math
import random
from pathlib import Path

import pytest

from attnnas.cli import main as cli
from attnnas.core.errors import AttnnasError
from attnnas.evidence.plan import (Assumptions, Job, Place, disk_text, place_of, plan, plan_text,
                                   run_lasts, simulate, tier_jobs)

BENCH = Path(__file__).parent.parent / "results" / "bench"
CALM = Assumptions(failures=0)
MANY = 10**4


def some_jobs(seed: int, depends: bool = True) -> list:
    "Searches, runs that wait for one of them, and others, of random lengths."
    draws = random.Random(seed)
    searches = [Job(f"search {n}", draws.uniform(20, 60), 10) for n in range(4)]
    waiting = [Job(f"derived {n}", draws.uniform(5, 20), 10, f"search {n % 4}" if depends else "")
               for n in range(9)]
    return [*searches, *waiting, *(Job(f"other {n}", draws.uniform(5, 20), 10) for n in range(9))]


def longest_path(jobs) -> float:
    hours = {job.name: job.hours for job in jobs}
    return max(job.hours + hours.get(job.needs, 0) for job in jobs)


@pytest.fixture(scope="module")
def paper() -> tuple:
    with (BENCH / "paper_step.csv").open() as file: return tier_jobs("paper", list(csv.DictReader(file)))


@pytest.mark.parametrize("seed", range(5))
def test_one_gpu_takes_the_sum_and_very_many_the_longest_path(seed):
    "If this fails, a run starts before its search, or a GPU is idle that has work."
    jobs = some_jobs(seed)
    total = sum(job.hours for job in jobs)
    alone, all_at_once = simulate(jobs, 1, 1, CALM), simulate(jobs, MANY, 1, CALM)
    assert math.isclose(alone.hours, total) and math.isclose(alone.used, total)
    assert math.isclose(all_at_once.hours, longest_path(jobs))
    assert alone.lost == alone.failures == all_at_once.lost == alone.waiting == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_schedule_is_within_what_any_schedule_can_do(seed):
    "Never below the mean load nor the longest path, never above Graham's sum of both."
    jobs = some_jobs(seed)
    total = sum(job.hours for job in jobs)
    for gpus in (2, 3, 5, 8, 13):
        hours = simulate(jobs, gpus, 1, CALM).hours
        assert max(total / gpus, longest_path(jobs)) <= hours * (1 + 1e-12)
        assert hours <= total / gpus + longest_path(jobs)


def test_more_gpus_never_take_longer_where_no_run_waits_for_another():
    for seed in range(5):
        jobs = some_jobs(seed, depends=False)
        hours = [simulate(jobs, gpus, 1, CALM).hours for gpus in range(1, 30)]
        assert all(after <= before * (1 + 1e-12) for before, after in zip(hours, hours[1:]))


def test_more_gpus_never_make_the_paper_tier_longer(paper):
    jobs, _ = paper
    hours = [plan(jobs, 2**n, CALM).hours for n in range(10)]
    assert all(after <= before for before, after in zip(hours, hours[1:])) and hours[-1] < hours[0]


def test_waiting_is_what_blocked_runs_could_take():
    "A search of 30 hours and two runs of 10 that need it: on 4 GPUs two of them wait 30 hours, one is free for nobody."
    jobs = [Job("search", 30), Job("one", 10, needs="search"), Job("two", 10, needs="search")]
    outcome = simulate(jobs, 4, 1, CALM)
    assert (outcome.hours, outcome.waiting, outcome.used) == (40, 60, 50)
    assert simulate(jobs, 1, 1, CALM).waiting == 0
    shared = simulate(jobs, 4, 2, dataclasses.replace(CALM, efficiency=1.))
    assert (shared.hours, shared.waiting, shared.used) == (20, 30, 50)


def test_a_shared_run_is_as_fast_as_the_stated_efficiency():
    assumed = dataclasses.replace(CALM, efficiency=.8)
    outcome = simulate([Job("one", 32)], 4, 4, assumed)
    assert math.isclose(outcome.hours, 10) and math.isclose(outcome.used, 40)
    assert plan([Job("one", 32)], 8, assumed).share == 8
    assert plan([Job("one", 32)], 8, dataclasses.replace(assumed, most=2)).share == 2
    assert plan([Job(f"{n}", 32) for n in range(8)], 8, assumed).share == 1


@pytest.mark.parametrize("gpus", (1, 4))
def test_lost_hours_are_those_of_the_formula(gpus):
    "An epoch of e hours with failures at rate r takes (exp(r e) - 1) / r, and each failure a restart more."
    job = Job("one", 80, epochs=8)
    assumed = Assumptions(failures=50, restart=.5, efficiency=1)
    drawn = [run_lasts(job, gpus, assumed, seed) for seed in range(6000)]
    rate, epoch = gpus * .05, 10 / gpus
    failures = 8 * (math.exp(rate * epoch) - 1)
    lost = 8 * ((math.exp(rate * epoch) - 1) / rate - epoch) + failures * .5
    assert sum(run.failures for run in drawn) / 6000 == pytest.approx(failures, rel=.03)
    assert sum(run.lost for run in drawn) / 6000 == pytest.approx(lost, rel=.03)
    assert all(math.isclose(run.hours, 80 / gpus + run.lost) for run in drawn)
    assert all(run.lost <= run.failures * (epoch + .5) for run in drawn)


def test_a_seed_decides_all_and_another_one_differs():
    jobs = some_jobs(0)
    assumed = Assumptions(failures=20)
    assert plan(jobs, 4, assumed) == plan(list(reversed(jobs)), 4, assumed)
    assert plan(jobs, 4, assumed) != plan(jobs, 4, assumed, seed=1)
    assert plan(jobs, 4, assumed).lost > plan(jobs, 4, Assumptions(failures=2)).lost > 0


def test_network_and_disk_are_clips_times_bytes():
    "Two runs that read 10 clips a second of 2 seconds at 512 KiB: 10 MiB a second each; 3,072 videos of 1 MiB: 3 GiB."
    place = Place("x.csv", {"train": 3000, "test": 72}, 2.)
    jobs = [Job(name, 5, place=place, clips=10.) for name in "ab"]
    assumed = dataclasses.replace(CALM, video=512., flow=1024.)
    assert simulate(jobs, 1, 1, assumed).mib == 10 and simulate(jobs, 2, 1, assumed).mib == 20
    assert disk_text(jobs, assumed) == "x.csv, rgb: 3,072 videos of all splits, 2 seconds each, 3 GiB"
    flow = [dataclasses.replace(job, stream="flow") for job in jobs]
    assert simulate(flow, 1, 1, assumed).mib == 20


def test_bad_plans_are_refused():
    one = Job("one", 10)
    for wrong, said in ((lambda: simulate([Job("one", 10, needs="none")], 1, 1, CALM), "search none"),
                        (lambda: simulate([one], 2, 4, CALM), "does not fit"),
                        (lambda: plan([one], 0, CALM), "gpus"), (lambda: plan([one], 1, CALM, draws=0), "draws"),
                        (lambda: plan([one], 1, Assumptions(failures=1000)), "hardly"),
                        (lambda: Assumptions(failures=-1.), "failures"), (lambda: Assumptions(efficiency=2.), "efficiency"),
                        (lambda: place_of("none/kinetics601.csv"), "kinetics600")):
        with pytest.raises(AttnnasError, match=said): wrong()


def test_the_paper_tier_waits_for_its_searches(paper):
    jobs, unknown = paper
    assert (len(jobs), unknown) == (46, 6)
    names = {job.name for job in jobs}
    needed = {job.needs for job in jobs if job.needs}
    assert len(needed) == 4 and needed <= names
    assert math.isclose(simulate(jobs, MANY, 1, CALM).hours, longest_path(jobs))


def test_doctor_prints_a_plan_of_100_columns_and_its_assumptions(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert cli.main(["doctor", "--plan", "--gpus", "1", "512", "--failures-per-1000-gpu-hours", "0"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    for field in dataclasses.fields(Assumptions): assert f"\n{field.name} = " in out
    assumed = Assumptions.from_bench(BENCH, failures=0.)
    with (BENCH / "paper_step.csv").open() as file: jobs, _ = tier_jobs("paper", list(csv.DictReader(file)))
    assert plan_text([plan(jobs, gpus, assumed) for gpus in (1, 512)]) in out and disk_text(jobs, assumed).split("\n")[0] in out
    assert cli.main(["doctor", "--plan", "--gpus", "0"]) == 2
