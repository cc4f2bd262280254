"""Settings mean what they say: every number of every configuration has bounds on both sides, and what is no number is refused."""
import dataclasses
import importlib
import math
import pkgutil

import pytest

import attnnas
from attnnas.core.errors import AttnnasError
from attnnas.core.options import check, check_counts, check_number, differences, option


def configurations() -> list:
    "Every dataclass of options of the package."
    found = {}
    for module in pkgutil.walk_packages(attnnas.__path__, "attnnas."):
        if module.name.endswith(("_modidx", "attention.triton")): continue
        for value in vars(importlib.import_module(module.name)).values():
            has_options = dataclasses.is_dataclass(value) and any("help" in field.metadata for field in dataclasses.fields(value))
            if isinstance(value, type) and has_options: found[value.__qualname__] = value
    return [found[name] for name in sorted(found)]


CONFIGURATIONS = configurations()
NUMBERS = [(cls, field) for cls in CONFIGURATIONS for field in dataclasses.fields(cls)
           if type(field.default) in (int, float) and "help" in field.metadata and not field.metadata["choices"]]


def test_all_kinds_of_configuration_are_seen():
    names = {cls.__name__ for cls in CONFIGURATIONS}
    assert {"TrainingConfig", "SearchConfig", "BlackBoxConfig", "EvolutionConfig", "BanditConfig", "ClipConfig", "Generated", "Videos",
            "RandomCell", "DerivedCell", "NetworkConfig", "RunConfig"} <= names
    assert len(NUMBERS) > 50


@pytest.mark.parametrize("cls, field", NUMBERS, ids=lambda value: getattr(value, "__name__", getattr(value, "name", None)))
def test_a_number_that_can_only_be_a_mistake_is_refused(cls, field):
    "A number without a bound, or one that lets NaN pass, is a setting that a training hides."
    low, high = field.metadata["minimum"], field.metadata["maximum"]
    assert low is not None and high is not None and low <= field.default <= high
    kind = type(field.default)
    wrong = [low - 1, high * 2 + 1, math.nan, math.inf, -math.inf, "1", None, True, [1]]
    if kind is int: wrong += [field.default + .5, float(field.default)]
    one = dataclasses.make_dataclass("One", [(field.name, kind, dataclasses.field(default=field.default, metadata=field.metadata))])
    for value in wrong:
        with pytest.raises(AttnnasError, match=f"^{field.name} = "): check(one(value))
    for value in (low, high, field.default): check(one(kind(value)))


@pytest.mark.parametrize("cls", [cls for cls in CONFIGURATIONS if cls.__name__ not in ("GivenCell", "DerivedCell", "Search")])
def test_every_configuration_checks_itself_when_it_is_made(cls):
    "Before any work: a class that forgets to check lets anything pass."
    cls()
    numbers = [field for field in dataclasses.fields(cls) if type(field.default) in (int, float) and "help" in field.metadata]
    for field in numbers:
        with pytest.raises(AttnnasError, match=field.name): cls(**{field.name: math.nan})


def test_numbers_and_counts():
    check_number("weight", 0, minimum=0)
    with pytest.raises(AttnnasError, match=r"^weight = -1: expected at least 0 \(of the loss\)\.$"): check_number("weight", -1, 0, None, "of the loss")
    with pytest.raises(AttnnasError, match="^x = 3: expected at most 2"): check_number("x", 3, maximum=2)
    check_counts(0, workers=0)
    for value in (0, -1, 1.0, True, "2", None):
        with pytest.raises(AttnnasError, match="trials must be a whole number, at least 1"): check_counts(trials=value)


def test_pictures_and_generated_clips_refuse_what_is_no_number():
    from attnnas.data import pictures, synthetic
    for module, name in ((pictures, "pictures"), (synthetic, "A")):
        for field in dataclasses.fields(module.benchmark(name)):
            if type(field.default) not in (int, float): continue
            for value in (math.nan, math.inf, -1, 1e9):
                with pytest.raises(AttnnasError, match=field.name if "radius" not in field.name else "radi"):
                    module.benchmark(name, **{field.name: value})


def test_a_derivation_that_cannot_be_is_refused_before_the_search():
    from attnnas.evidence.config import RunConfig
    from attnnas.evidence.insertions import DerivedCell, Search
    from attnnas.search.differentiable import SearchConfig
    search = RunConfig(insertion=Search(SearchConfig(levels=1)))
    DerivedCell(search, alpha=6, beta=6)
    for wrong in ({"alpha": 7}, {"beta": 7}, {"alpha": 0}):
        with pytest.raises(AttnnasError, match=next(iter(wrong))): DerivedCell(search, **wrong)


def test_differences_name_the_place():
    assert list(differences({"a": {"b": 1}, "c": 2}, {"a": {"b": 3}, "c": 2})) == ["a b is 1 there and 3 here"]
    assert list(differences({}, {"a": 1})) == ["a is None there and 1 here"]


def test_an_option_without_bounds_still_refuses_what_is_not_finite():
    one = dataclasses.make_dataclass("One", [("rate", float, option(1.0, "a rate"))])
    check(one(1e30))
    with pytest.raises(AttnnasError, match="rate = nan: expected a finite number"): check(one(math.nan))
