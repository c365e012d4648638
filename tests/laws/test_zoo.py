"""Each entry of a registry has a case, or a reason to have none."""

from __future__ import annotations

import dataclasses

import pytest

from lorakit.core.kinds import KINDS
from lorakit.core.variants import PLAIN, VARIANTS

from ..conformance import cells
from . import zoo


@pytest.mark.parametrize(
    ("table", "entry"),
    [("VARIANTS", dataclasses.replace(PLAIN, name="new")), ("KINDS", dataclasses.replace(KINDS[0], name="new"))],
)
def test_an_entry_without_a_case_fails(table: str, entry: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, table, (*getattr(zoo, table), entry))
    with pytest.raises(LookupError, match="new"):
        zoo.every_case.__wrapped__()


def test_each_variant_is_in_some_case() -> None:
    in_cases = {case.variant for case in zoo.every_case()}
    assert in_cases | zoo.WITHOUT_A_CASE.keys() == {variant.name for variant in VARIANTS}
    assert not in_cases & zoo.WITHOUT_A_CASE.keys()


def test_a_variant_unknown_to_the_product_is_not_plain_lora() -> None:
    cell = dataclasses.replace(cells.every_cell()[0], variant="new")
    with pytest.raises(KeyError, match="new"):
        cell.row  # noqa: B018
    assert cells.OF_VARIANT.keys() | cells.OUTSIDE_THE_PRODUCT.keys() == {variant.name for variant in VARIANTS}
