"""docs/security.md: every row names a test that exists, or says in bold that nothing prevents the attempt."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for table in re.findall(r"\| attempt \| result \| test \|\n\|[-|]+\n((?:\|.*\n)+)", PAGE)
    for line in table.splitlines()
]
NAMED = re.compile(r"`((?:\w+/)*\w+\.py)::(\w+)`")


@pytest.mark.parametrize(("file", "name"), sorted({pair for row in ROWS for pair in NAMED.findall(row[-1])}))
def test_a_named_test_exists(file: str, name: str) -> None:
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_row_has_a_test_or_says_that_nothing_prevents_it() -> None:
    assert len(ROWS) > 20
    without = [row[0] for row in ROWS if not NAMED.search(row[-1])]
    assert without and all(
        "**not" in " ".join(row) or "not verified" in " ".join(row) for row in ROWS if row[0] in without
    )
