"""Check the source of lorakit against the rules of `tests/architecture`, which imports nothing of lorakit.

Known violations of a rule are listed in `tests/architecture/known.toml`, which may only shrink. `test_samples.py` there
shows that each rule can fail.
"""

from __future__ import annotations

import ast

import pytest

from .architecture import known
from .architecture.imports import FLOORS
from .architecture.reading import Rule, Sources, house
from .architecture.rules import RULES


@pytest.fixture(scope="module")
def sources() -> Sources:
    return house()


@pytest.fixture(scope="module")
def listed() -> known.Known:
    return known.read()


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_house_keeps_the_rule(rule: Rule, sources: Sources, listed: known.Known) -> None:
    breaches = known.differences(rule(sources), listed.get(rule.__name__, {}))
    assert not breaches, "\n".join(breaches)


def test_the_list_names_rules(listed: known.Known) -> None:
    assert set(listed) <= {rule.__name__ for rule in RULES}
    assert all(entry.reason.strip() for entries in listed.values() for entry in entries.values())


def test_the_public_names_are_no_modules(sources: Sources) -> None:
    tables = [node.value for node in ast.parse(sources["__init__.py"]).body if isinstance(node, ast.Assign)]
    homes = next(ast.literal_eval(value) for value in tables if isinstance(value, ast.Dict))
    assert not set(homes) & set(FLOORS)
    assert set(homes.values()) <= set(FLOORS)
