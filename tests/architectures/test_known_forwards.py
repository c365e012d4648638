"""The table of known source: every listed class of the installed transformers release is in it."""

from __future__ import annotations

import importlib
import json
import re
from importlib import metadata, resources
from typing import Any

import pytest

from lorakit.architectures import known_forwards as table
from lorakit.identity.identities import Identities

STORED = ("transformers.activations.", "deepseek_v4.modeling_deepseek_v4.DeepseekV4MLP")
"""Classes that store functions on their instances, so that the class alone has no digest in the table."""

ROWS = json.loads(resources.files("lorakit.architectures").joinpath(table.FILE).read_text())["forwards"]
KNOWN = table.known_forwards()


def named(name: str) -> Any:
    """Return a class or function of the installed release, or None if it has none of this name."""
    module, _, attribute = name.rpartition(".")
    for path in (f"transformers.models.{module}", module):
        try:
            return getattr(importlib.import_module(path), attribute)
        except (ImportError, AttributeError):
            continue
    return None


def numbers(release: str) -> tuple[int, ...]:
    """Return a version as numbers."""
    return tuple(int(part) for part in release.split(".")[:3] if part.isdigit())


def digests_of(value: Any, roles: set[str]) -> set[str]:
    """Return the digests that a class or function has in its roles."""
    identities = Identities()
    made = {identities.of_forward(value).digest} if table.MODEL in roles else set()
    made |= {identities.of_function(value).digest} if table.LOSS in roles else set()
    return made | ({identities.of_class(value).digest} if roles - {table.MODEL, table.LOSS} else set())


def test_form() -> None:
    assert len(KNOWN.releases) >= 6 and KNOWN.span == f"{KNOWN.releases[0]} to {KNOWN.releases[-1]}"
    for digest, row in ROWS.items():
        assert re.fullmatch("[0-9a-f]{16}", digest) and row["roles"] and row["classes"] and row["functions"]
        assert set(row["releases"]) <= set(KNOWN.releases)


@pytest.mark.costly(cases=0)
def test_every_listed_class_of_the_installed_release_is_known() -> None:
    """If this test fails after an update of transformers: run scripts/known_forwards.py and review its diff."""
    installed = numbers(metadata.version("transformers"))
    latest = max((one for one in KNOWN.releases if numbers(one) <= installed), key=numbers)
    roles: dict[str, set[str]] = {}
    for row in ROWS.values():
        for name in row["classes"] if latest in row["releases"] else ():
            roles.setdefault(name, set()).update(row["roles"])
    found = {name: value for name in roles if (value := named(name)) is not None}
    unknown = [name for name, value in found.items() if not digests_of(value, roles[name]) & ROWS.keys()]
    assert len(found) > 250
    assert [name for name in unknown if not name.startswith(STORED)] == []


def test_releases_are_compared_by_their_first_two_numbers() -> None:
    made = table.KnownForwards(("5.9.1", "5.10.0"), {})
    assert made.covers("5.9.0") and made.covers("5.10.3") and not made.covers("5.1.0") and not made.covers("6.9.1")


@pytest.mark.parametrize(("role", "is_known"), [("norm", True), ("attention", False), (table.PART, True)])
def test_roles(role: str, is_known: bool) -> None:
    made = table.KnownForwards(("5.9.1",), {"a": frozenset({"norm"})})
    assert made.knows("a", role) is is_known and not made.knows("b", role) and not made.knows("", role)


def test_an_unknown_release_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.metadata, "version", lambda name: "99.1.0")
    assert table.unknown_release(KNOWN) == "99.1.0"
    monkeypatch.setattr(table.metadata, "version", lambda name: KNOWN.releases[0])
    assert table.unknown_release(KNOWN) == ""
