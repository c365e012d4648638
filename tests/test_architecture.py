"""Imports keep the contracts of `.importlinter`, and the sources the rules of `tests/architecture`, except for its list."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections import Counter

import grimp
import pytest
from importlinter import cli

from .architecture.contracts import CONFIG, contracts
from .architecture.rules import ROOT, RULES, Rule, Sources, package_sources, small_modules

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

KNOWN = tomllib.loads((ROOT / "tests/architecture/known.toml").read_text("utf-8"))


@pytest.fixture(scope="module")
def sources() -> Sources:
    return package_sources()


def test_contracts_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.lint_imports(config_filename=str(CONFIG), no_cache=True)
    assert code == 0, capsys.readouterr().out


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rules_are_kept_except_for_the_list(rule: Rule, sources: Sources) -> None:
    """A breach that is not listed fails, and so does an entry whose breach is gone; "×N" counts equal ones."""
    found = list(rule(sources))
    counts = Counter(f"{breach.path}: {breach.subject}" for breach in found)
    known = KNOWN.get(rule.__name__, {})
    listed = {key.partition(" ×")[0]: int(key.partition(" ×")[2] or 1) for key in known}
    assert all(reason.strip() for reason in known.values())
    assert counts == listed, "\n".join(
        str(b) for b in found if counts[f"{b.path}: {b.subject}"] > listed.get(f"{b.path}: {b.subject}", 0)
    )


def test_the_list_names_rules() -> None:
    assert set(KNOWN) <= {rule.__name__ for rule in RULES}


def test_imports_make_no_cycle_and_no_small_module(sources: Sources) -> None:
    graph = grimp.build_graph("lorakit", cache_dir=None, exclude_type_checking_imports=True)
    graphlib.TopologicalSorter({m: graph.find_modules_directly_imported_by(m) for m in graph.modules}).prepare()
    assert not list(map(str, small_modules(grimp.build_graph("lorakit", cache_dir=None), sources)))


def test_every_package_that_is_imported_has_importers() -> None:
    graph = grimp.build_graph("lorakit", cache_dir=None, include_external_packages=True)
    outside = {module for module in graph.modules if graph.is_module_squashed(module)} - sys.stdlib_module_names
    listed = {name for options in contracts().values() for name in options.get("protected_modules", ())}
    assert outside - listed == {"torch", "safetensors"}, "add a contract to .importlinter"


def test_the_public_names_are_no_modules(sources: Sources) -> None:
    tables = [node.value for node in ast.parse(sources["__init__.py"]).body if isinstance(node, ast.Assign)]
    homes = next(ast.literal_eval(value) for value in tables if isinstance(value, ast.Dict))
    modules = {path.split("/")[0].removesuffix(".py") for path in sources}
    assert not set(homes) & modules
    assert set(homes.values()) <= modules
