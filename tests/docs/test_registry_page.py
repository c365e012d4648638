"""docs/registry.md: its commands and calls run in order, and every command and method is named."""

from __future__ import annotations

import inspect
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import cli
from lorakit.registry import Registry, content_hash

PAGE = (Path(__file__).parents[2] / "docs" / "registry.md").read_text(encoding="utf-8")
Save = Callable[..., Path]

pytestmark = pytest.mark.skipif(os.name == "nt", reason="flock")


@pytest.fixture
def runs(save_adapter: Save, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The directories that the page names."""
    monkeypatch.chdir(tmp_path)
    return save_adapter("runs/legal", 1), save_adapter("runs/legal-v2", 2)


def test_the_commands_run_in_order(runs: tuple[Path, Path]) -> None:
    (block,) = re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    first, second = map(content_hash, runs)
    current = []
    for line in block.splitlines():
        assert cli.main(shlex.split(line)[1:]) == 0, line
        entries = Registry("served").listing().entries
        current.append(entries["legal"].current if entries else None)
    assert current == [first] * 2 + [second] * 3 + [first] * 4 + [None] * 2
    assert not list(Path("served/objects").iterdir())


def test_the_calls_run_in_order(runs: tuple[Path, Path]) -> None:
    names: dict[str, Any] = {"Registry": Registry}
    calls = re.findall(r"^\| `(.+?)` \|", PAGE.split("## Python")[1], flags=re.MULTILINE)
    assert len(calls) > 10
    for call in calls:
        if call.startswith("collected"):
            names["lease"].release()
        exec(call, names)
    assert names["version"].hash == content_hash(runs[0]) and names["problems"] == ()
    assert names["collected"].removed == (content_hash(runs[0]),)


def test_everything_is_named() -> None:
    for command in cli.SUBCOMMANDS["adapters"]:
        assert re.search(rf"^\| .*`{command}\b", PAGE, re.MULTILINE), command
    for name, _ in inspect.getmembers(Registry, callable):
        assert name.startswith("_") or f"registry.{name}(" in PAGE, name
