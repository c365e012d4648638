"""The option `--cases`: what a sample covers, that it can be repeated, and which cases are never left out."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Hashable

import pytest

from .sampling import chosen, of_inner_session, sampled

pytest_plugins = "pytester"

SUITE = """
import dataclasses, itertools
import pytest

@dataclasses.dataclass(frozen=True)
class Case:
    kind: str
    init: int
    dtype: str

CASES = [Case(*case) for case in itertools.product("abcd", range(5), "xyz")]

@pytest.mark.parametrize("second", range(5))
@pytest.mark.parametrize("first", range(6))
@pytest.mark.parametrize("switch", [True, False])
def test_product(first, second, switch): ...

@pytest.mark.axes("case.kind", "case.init", alone=["case.dtype"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}{case.init}{case.dtype}")
def test_attributes(case): ...

@pytest.mark.parametrize(("x", "y", "wanted"), [(x, y, x & y) for x in range(4) for y in range(4)])
def test_table(x, y, wanted): ...

@pytest.mark.parametrize("x", [[] for _ in range(20)])
def test_values_without_a_hash(x): ...

@pytest.mark.parametrize("x", [pytest.param(n, marks=pytest.mark.slow if n > 3 else ()) for n in range(40)])
def test_slow_ones(x): ...

@pytest.mark.slow
def test_slow(): ...

@pytest.mark.costly(cases=2)
@pytest.mark.parametrize("x", range(6))
def test_costly(x): ...

@pytest.mark.costly(cases=0)
def test_costly_alone(): ...

@pytest.mark.costly
@pytest.mark.parametrize("x", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_costly_and_slow(x): ...

def test_alone(): ...
"""
ALL = 60 + 60 + 16 + 20 + 40 + 1 + 6 + 3 + 1 + 1


def product(draw: random.Random) -> list[dict[str, Hashable]]:
    """Return a product of three to five axes without some of its cases."""
    sizes = [draw.randint(2, 5) for _ in range(draw.randint(3, 5))]
    names = [f"axis{number}" for number in range(len(sizes))]
    every = [dict(zip(names, case, strict=True)) for case in itertools.product(*map(range, sizes))]
    return draw.sample(every, draw.randint(len(every) // 3, len(every)))


@pytest.mark.parametrize("seed", range(20))
def test_each_value_and_each_pair_that_occurs_is_covered(seed: int) -> None:
    cases = product(random.Random(seed))
    for alone in ((), ("axis0",), tuple(cases[0])):
        sample = [cases[index] for index in sampled(cases, alone, "any")]
        for one, other in itertools.product(cases[0], repeat=2):
            together = one == other or not {one, other} & {*alone}
            assert not together or {(c[one], c[other]) for c in cases} == {(c[one], c[other]) for c in sample}
        assert len(sample) <= len(cases)


def test_a_sample_of_a_full_product_is_small() -> None:
    """Fewer than twice the product of the two largest axes, which is the least that is possible."""
    cases = [dict(zip("abcde", case, strict=True)) for case in itertools.product(range(6), range(5), *[range(3)] * 3)]
    assert 30 <= len(sampled(cases, (), "1")) < 60 < len(cases)
    assert len(sampled(cases, "abcde", "1")) <= 12


def test_a_seed_repeats_its_sample_and_others_differ() -> None:
    cases = [dict(zip("abc", case, strict=True)) for case in itertools.product(range(6), repeat=3)]
    first, again, other = (sampled(cases, (), seed) for seed in ("1", "1", "2"))
    assert first == again != other


Choose = Callable[[str, int], list[str]]
PLUGIN = ("-p", "tests.sampling", "-p", "no:cacheprovider")


@pytest.fixture
def suite(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # each run would import all plugins again
    pytester.makeini("[pytest]\nmarkers =\n  slow\n  axes\n  costly\n")
    pytester.makepyfile(test_made=SUITE)
    return pytester


@pytest.fixture
def choose(suite: pytest.Pytester) -> Choose:
    """A function that returns the names of the made-up cases that a value of `--cases` and a seed choose."""
    items, _ = suite.inline_genitems("-p", "no:cacheprovider")
    assert len(items) == ALL
    return lambda cases, seed: [item.name for item in chosen(items, cases, seed)]


def of(function: str, cases: list[str]) -> list[str]:
    return [case for case in cases if case.partition("[")[0] == function]


def test_the_sample_and_the_tenths_are_all_cases_each_once(choose: Choose) -> None:
    every = choose("all", 1)
    for seed in (1, 2):
        parts = [choose(part, seed) for part in ("sample", *map("rest:{}".format, range(10)))]
        assert sorted(itertools.chain(*parts)) == sorted(every)
        assert choose("sample+rest:3", seed) == [case for case in every if case in parts[0] + parts[4]]
        assert max(map(len, parts[1:])) <= 2 * min(map(len, parts[1:]))


def test_a_tenth_does_not_depend_on_the_sample(choose: Choose) -> None:
    """Otherwise ten commits on several days could miss a case."""
    first, second = ({case: n for n in range(10) for case in choose(f"rest:{n}", seed)} for seed in (1, 2))
    assert first.keys() != second.keys()
    assert all(first[case] == second[case] for case in first.keys() & second.keys())


def test_what_is_sampled(choose: Choose) -> None:
    sample = choose("sample", 1)
    assert sample == choose("sample", 1) != choose("sample", 2)
    assert 30 <= len(of("test_product", sample)) < 60
    attributes = [re.findall(r"[a-z]|\d", case.partition("[")[2]) for case in of("test_attributes", sample)]
    assert {(kind, init) for kind, init, _ in attributes} == set(itertools.product("abcd", "01234"))
    assert len(attributes) == 20 and {dtype for *_, dtype in attributes} == set("xyz")
    assert len(of("test_table", sample)) == 16 and len(of("test_values_without_a_hash", sample)) == 20
    assert of("test_slow_ones", sample) == [f"test_slow_ones[{number}]" for number in range(4)]
    assert "test_alone" in sample and "test_slow" not in sample


def test_a_costly_function_has_a_few_cases_each_day(choose: Choose) -> None:
    days = [choose("sample", seed) for seed in range(40)]
    assert {len(of("test_costly", day)) for day in days} == {2}
    assert {case for day in days for case in of("test_costly", day)} == {
        f"test_costly[{number}]" for number in range(6)
    }
    assert {tuple(of("test_costly_and_slow", day)) for day in days} == {
        (f"test_costly_and_slow[{number}]",) for number in (0, 2)
    }
    assert not any("test_costly_alone" in day for day in days)
    assert any("test_costly_alone" in choose(f"rest:{tenth}", 1) for tenth in range(10))


@pytest.mark.parametrize("wrong", ["some", "rest:10", "rest", "sample+", ""])
def test_an_unknown_choice_is_an_error(wrong: str) -> None:
    with pytest.raises(pytest.UsageError, match="rest:0 to rest:9"):
        chosen([], wrong, 1)


def test_what_is_named_is_not_sampled(suite: pytest.Pytester) -> None:
    words = (*PLUGIN, "--cases", "sample")
    ids = ("test_made.py::test_slow_ones[39]", "test_made.py::test_product[True-0-0]")
    suite.runpytest(*words, *ids).assert_outcomes(passed=2)
    suite.runpytest(*words, "-k", "test_product").assert_outcomes(passed=60, deselected=ALL - 60)


def test_an_exclusion_by_name_leaves_the_rest_to_the_sample(suite: pytest.Pytester) -> None:
    whole, part = (suite.runpytest(*PLUGIN, "-k", "not test_product", *words) for words in ((), ("--cases", "sample")))
    assert 0 < part.parseoutcomes()["passed"] < whole.parseoutcomes()["passed"] == ALL - 60


def test_a_session_inside_runs_a_sample_of_the_same_day(suite: pytest.Pytester) -> None:
    config = suite.parseconfig(*PLUGIN, "--cases", "sample+rest:3", "--cases-seed", "7")
    assert of_inner_session(config) == ["--cases", "sample", "--cases-seed", "7"]
    assert of_inner_session(suite.parseconfig(*PLUGIN)) == []


def test_workers_choose_the_same_and_what_is_left_out_is_counted(suite: pytest.Pytester) -> None:
    words = (*PLUGIN, "--cases", "sample")
    alone = suite.runpytest(*words)
    outcomes = alone.parseoutcomes()
    assert 0 < outcomes["passed"] < ALL == outcomes["passed"] + outcomes["deselected"]
    (again,) = re.findall(r"cases: (--cases sample --cases-seed \d+)", alone.stdout.str())
    spread = suite.runpytest(*PLUGIN, *again.split(), "-p", "xdist", "-n", "2").parseoutcomes()
    assert [spread[key] for key in ("passed", "deselected")] == [outcomes[key] for key in ("passed", "deselected")]
