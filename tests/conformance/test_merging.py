"""Merged weights are peft's, whichever library merged."""

from __future__ import annotations

import pytest

from .architectures import model_named, outputs_of
from .closeness import assert_close, assert_differs, assert_same_bits
from .rows import ROWS_COMPARED, Row, quiet_peft

MERGED = [row for row in ROWS_COMPARED if "in-groups" not in row.name and "stacked" not in row.name]
"""Rows that both libraries merge: a convolution with groups cannot hold its adapter's update, and for layers that share
their weights peft adds all updates to the one weight (tests/core/model/test_replication.py has ours)."""


@pytest.mark.axes(alone=("row.model", "row.settings"))
@pytest.mark.parametrize("row", MERGED, ids=str)
def test_merge_and_unload(row: Row) -> None:
    peft_model, our_model = row.pair()
    adapted = outputs_of(our_model(**row.inputs))
    with quiet_peft():
        expected = peft_model.merge_and_unload()
    found = our_model.merge_and_unload()
    plain = model_named(row.model)
    assert list(found.state_dict()) == list(plain.state_dict())
    assert_close(found.state_dict(), expected.state_dict())
    assert_differs(found.state_dict(), plain.state_dict())
    assert_close(outputs_of(found(**row.inputs)), adapted, rtol=2e-5)
    assert {n: p.requires_grad for n, p in found.named_parameters()} == {
        n: p.requires_grad for n, p in model_named(row.model).named_parameters()
    }


@pytest.mark.axes(alone=("row.model", "row.settings"))
@pytest.mark.parametrize("row", MERGED, ids=str)
def test_merge_adapter_and_back(row: Row) -> None:
    peft_model, our_model = row.pair()
    before = {name: tensor.clone() for name, tensor in our_model.state_dict().items()}
    with quiet_peft():
        peft_model.merge_adapter()
    our_model.merge_adapter()
    assert_close(our_model.state_dict(), peft_model.state_dict())
    our_model.unmerge_adapter()
    assert_same_bits(our_model.state_dict(), before)  # peft's unmerging subtracts, and rounds


@pytest.mark.axes(alone=("row.model", "row.settings"))
@pytest.mark.parametrize("row", ROWS_COMPARED, ids=str)
def test_unload(row: Row) -> None:
    _, our_model = row.pair()
    assert_same_bits(our_model.unload().state_dict(), model_named(row.model).state_dict())
