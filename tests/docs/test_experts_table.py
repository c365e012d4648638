"""The table of models with experts in docs/from-peft.md is the one that the script makes with the installed releases."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ..loading import load

pytest.importorskip("peft")
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "from-peft.md"


GENERATED = load("scripts/generated_table.py")


@pytest.fixture(scope="module")
def script() -> Any:
    return load("scripts/experts_table.py")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_table_is_current(script: Any) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert GENERATED.with_table(page, script.BEGIN, script.table()) == page


def test_a_table_replaces_the_one_between_the_markers(script: Any) -> None:
    page = f"before\n{script.BEGIN}\n\nold\n{GENERATED.END}\nafter\n"
    assert (
        GENERATED.with_table(page, script.BEGIN, "new\n")
        == f"before\n{script.BEGIN}\n\nnew\n\n{GENERATED.END}\nafter\n"
    )


def test_each_family_has_a_row_and_none_differs() -> None:
    from ..peft.experts import FAMILIES

    page = PAGE.read_text(encoding="utf-8")
    text = page.partition("<!-- Written by scripts/experts_table.py. -->")[2].partition("<!-- End of the table. -->")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")][2:]
    assert {row[0].strip() for row in rows} == {family.name for family in FAMILIES}
    assert {cell.strip() for row in rows for cell in row[4:]} == {"equal"}


@pytest.mark.filterwarnings("ignore")
def test_a_row_of_a_known_family(script: Any) -> None:
    from ..peft.experts import BY_KIND
    from ..peft.test_model_experts import targets_of

    family = BY_KIND["mixtral"]
    row = script.row_of(family, "old names", targets_of(family, "old names"))
    assert row.weights == "q_proj, o_proj, gate.weight, experts.down_proj, experts.gate_up_proj"
    assert row[3:] == ("equal",) * 5


def test_differences_are_counted(script: Any) -> None:
    one = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert script.compared(one, dict(one)) == "equal"
    assert script.compared(one, one | {"b": torch.ones(2)}) == "1 of 2 differ"
    assert script.compared(one, {"a": one["a"]}) == "other tensors"
