"""The table of faults in docs/distributed.md names tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

from lorakit.train.processes.launching import PATIENCE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")


def test_each_fault_has_tests() -> None:
    files = [ROOT / name for name in re.findall(r"`(tests/[\w/]+\.py)`", PAGE)]
    known = {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), flags=re.MULTILINE)}
    table = PAGE.partition("<!-- faults -->")[2].strip().partition("\n\n")[0].splitlines()[2:]
    assert len(table) >= 14
    for row in table:
        named = re.findall(r"`(test_\w+)`", row)
        assert named, row
        assert set(named) <= known, set(named) - known


def test_the_limit_is_the_default() -> None:
    assert f"The default, {PATIENCE} s," in PAGE
