"""The option `--cases`: run a covering sample of each test function, a tenth of the rest, or all cases.

The axes of a test function are its `parametrize` marks, so a hand-written table is one axis and stays whole. If one
mark holds a product, the mark `axes` names the axes instead, as paths of attributes. The sample has each value of each
axis and each pair of values that occurs, but of a function marked costly, whose cases take seconds, only one, or as
many as the mark says, which may be none. It has no case marked slow, and is drawn again each day; `--cases-seed`
repeats the sample of a day. The tenths do not depend on the seed, so the sample of any day and the ten tenths are all cases.
"""

from __future__ import annotations

import datetime
import heapq
import itertools
import operator
import random
import re
import zlib
from collections import defaultdict
from collections.abc import Collection, Hashable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

WHOLE = 8
"""A function with at most this many cases is not sampled."""
COSTLY = 1
"""A function marked costly has this many cases in the sample, unless its mark says how many."""
TENTHS = 10
_DESELECTED = pytest.StashKey[int]()


def sampled(cases: Sequence[Mapping[str, Hashable]], alone: Collection[str], seed: str) -> set[int]:
    """Return the indices of few cases that have all values of each axis and all pairs that occur.

    Args:
        cases: Axis -> value.
        alone: Axes whose pairs with others need not be covered.
        seed: Decides between cases that cover equally many pairs.
    """
    goals = [_goals(case, alone) for case in cases]
    order = random.Random(seed)
    waiting = [(-len(goal), order.random(), index) for index, goal in enumerate(goals)]
    heapq.heapify(waiting)
    left, chosen = set().union(*goals), set()
    while left:
        most, tie, index = heapq.heappop(waiting)  # a bound: what a case adds only shrinks
        adds = len(goals[index] & left)
        if adds == -most:
            chosen.add(index)
            left -= goals[index]
        elif adds:
            heapq.heappush(waiting, (-adds, tie, index))
    return chosen


def _goals(case: Mapping[str, Hashable], alone: Collection[str]) -> set[Any]:
    return {*case.items(), *itertools.combinations([pair for pair in case.items() if pair[0] not in alone], 2)}


def axes_of(item: pytest.Item) -> dict[str, Hashable]:
    """Return the axes of a case and its values on them."""
    parameters, mark = item.callspec.params, item.get_closest_marker("axes")  # type: ignore[attr-defined]
    if mark is not None:
        holder = SimpleNamespace(**parameters)
        names = (*mark.args, *mark.kwargs.get("alone", ()))
        return {name: _key(operator.attrgetter(name)(holder)) for name in names}
    left, axes = dict(parameters), {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0] if mark.args else mark.kwargs["argnames"]
        together = re.findall(r"\w+", names) if isinstance(names, str) else names
        axes[",".join(together)] = tuple(_key(left.pop(name)) for name in together)
    return axes | {name: _key(value) for name, value in left.items()}


def _key(value: Any) -> Hashable:
    """Return a key that only equal values of one type share; two values that cannot be hashed differ."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value  # True is not 1


def tenth_of(function: str, index: int) -> int:
    """Return the tenth of a case, given its function and its index among the function's cases."""
    return (zlib.crc32(function.encode()) + index) % TENTHS


def chosen(items: Sequence[pytest.Item], cases: str, seed: int) -> list[pytest.Item]:
    """Return the items that a value of `--cases` selects, in their order.

    Raises:
        pytest.UsageError: If the value is unknown.
    """
    parts = cases.split("+")
    if unknown := [part for part in parts if not re.fullmatch(r"all|sample|rest:\d", part)]:
        raise pytest.UsageError(f"--cases {cases}: {unknown[0]!r} is not sample, rest:0 to rest:9 or all")
    if "all" in parts:
        return list(items)
    functions = defaultdict(list)
    for item in items:
        functions[f"{item.parent.nodeid if item.parent else ''}::{getattr(item, 'originalname', item.name)}"].append(
            item
        )
    kept: set[pytest.Item] = set()
    for function, members in functions.items():
        sample = _sample(members, f"{seed} {function}")
        if "sample" in parts:
            kept |= sample
        for index, item in enumerate(members):
            if item not in sample and f"rest:{tenth_of(function, index)}" in parts:
                kept.add(item)
    return [item for item in items if item in kept]


def _sample(items: Sequence[pytest.Item], seed: str) -> set[pytest.Item]:
    fast = [item for item in items if item.get_closest_marker("slow") is None]
    if fast and (mark := fast[0].get_closest_marker("costly")):
        return set(random.Random(seed).sample(fast, min(len(fast), mark.kwargs.get("cases", COSTLY))))
    if len(fast) <= WHOLE:
        return set(fast)
    mark = fast[0].get_closest_marker("axes")
    alone = mark.kwargs.get("alone", ()) if mark else ()
    return {fast[index] for index in sampled([axes_of(item) for item in fast], alone, seed)}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("cases", "choice of test cases")
    what = "sample: each value and pair of values of each function's axes; rest:K: tenth K (0 to 9) of the others; "
    group.addoption("--cases", default="all", help=f"{what}sample+rest:K; all (default)")
    group.addoption("--cases-seed", type=int, help="seed of the sample, which is today's date if not given")


def pytest_configure(config: pytest.Config) -> None:
    """Set the seed before xdist copies the options to its workers."""
    if config.option.cases_seed is None:
        config.option.cases_seed = int(f"{datetime.date.today():%Y%m%d}")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Return how to repeat the sample."""
    cases, seed = config.option.cases, config.option.cases_seed
    return None if cases == "all" else f"cases: --cases {cases} --cases-seed {seed}"


def of_inner_session(config: pytest.Config) -> list[str]:
    """Return the options of a session that a test runs: a sample, unless the outer session runs all cases."""
    if config.option.cases == "all":
        return []
    return ["--cases", "sample", "--cases-seed", str(config.option.cases_seed)]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what `--cases` does not select, unless cases are given by `-k`, other than `-k "not …"`, or by ids."""
    keyword = config.option.keyword
    if (keyword and not keyword.startswith("not ")) or any("[" in word for word in config.args):
        return
    kept = chosen(items, config.option.cases, config.option.cases_seed)
    asked = set(kept)
    left = [item for item in items if item not in asked]
    items[:] = kept
    if left:
        config.hook.pytest_deselected(items=left)
    if hasattr(config, "workeroutput"):
        config.workeroutput["deselected"] = len(left)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Report what a worker of xdist deselected; all workers deselect the same."""
    config, count = node.config, getattr(node, "workeroutput", {}).get("deselected", 0)
    if count and _DESELECTED not in config.stash:
        config.stash[_DESELECTED] = count
        config.hook.pytest_deselected(items=[node] * count)
