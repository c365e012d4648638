"""The same files, and each library reads what the other wrote."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

import lorakit.peft as ours

from . import differences
from .architectures import model_named, outputs_of
from .closeness import assert_close, assert_differs
from .rows import ROWS_COMPARED, Row, quiet_peft, theirs
from .written import compare_folders


class Saved:
    """A row's adapter, written by both libraries, with peft's outputs before."""

    def __init__(self, row: Row, folder: Path) -> None:
        self.theirs, self.ours = folder / "peft", folder / "lorakit"
        peft_model, our_model = row.pair()
        self.outputs = outputs_of(peft_model(**row.inputs))
        with quiet_peft():
            peft_model.save_pretrained(self.theirs)
        our_model.save_pretrained(self.ours)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Row -> its files, written once."""
    made: dict[str, Saved] = {}

    def of(row: Row) -> Saved:
        if row.name not in made:
            made[row.name] = Saved(row, tmp_path_factory.mktemp(row.name))
        return made[row.name]

    return of


@pytest.mark.axes(alone=("row.model", "row.settings"))
@pytest.mark.parametrize("row", ROWS_COMPARED, ids=str)
def test_same_files(row: Row, saved: Any) -> None:
    compare_folders(row, saved(row).theirs, saved(row).ours)


@pytest.mark.axes(alone=("row.model", "row.settings"))
@pytest.mark.parametrize("row", ROWS_COMPARED, ids=str)
def test_lorakit_reads_what_peft_wrote(row: Row, saved: Any) -> None:
    base = model_named(row.model)
    expected, plain = saved(row).outputs, outputs_of(base(**row.inputs))
    model = ours.PeftModel.from_pretrained(base, saved(row).theirs)
    assert_close(outputs_of(model(**row.inputs)), expected)
    assert_differs(expected, plain)


@pytest.mark.axes(alone=("row.model", "row.settings"))
@pytest.mark.parametrize("row", ROWS_COMPARED, ids=str)
def test_peft_reads_what_lorakit_wrote(row: Row, saved: Any) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = theirs.PeftModel.from_pretrained(model_named(row.model), saved(row).ours)
    remarks = [str(w.message) for w in said if "is_gradient_checkpointing" not in str(w.message)]
    assert [remark for remark in remarks if "key" in remark or "unexpected" in remark.lower()] == []
    assert_close(outputs_of(model(**row.inputs)), saved(row).outputs)


@pytest.mark.axes(alone=("row.model", "row.settings"))
@pytest.mark.parametrize("row", ROWS_COMPARED, ids=str)
def test_what_peft_saved_again_is_unverified_once(row: Row, saved: Any, tmp_path: Path) -> None:
    ours_again = ours.PeftModel.from_pretrained(model_named(row.model), saved(row).ours)
    ours_again.save_pretrained(tmp_path)
    with quiet_peft():
        theirs.PeftModel.from_pretrained(model_named(row.model), tmp_path).save_pretrained(tmp_path)
    with pytest.warns(UserWarning) as said:
        model = ours.PeftModel.from_pretrained(model_named(row.model), tmp_path)
    texts = [str(w.message) for w in said]
    assert sum("rewritten by another program, so they cannot be verified" in text for text in texts) == 1
    assert sum("was edited after the adapter was saved" in text for text in texts) <= 1
    assert len(texts) <= 2
    assert_close(outputs_of(model(**row.inputs)), saved(row).outputs)
    model.save_pretrained(tmp_path)  # saved by lorakit again, so loading does not warn
    ours.PeftModel.from_pretrained(model_named(row.model), tmp_path)


def test_every_accepted_difference_is_needed(saved: Any) -> None:
    used = set().union(*(compare_folders(row, saved(row).theirs, saved(row).ours) for row in ROWS_COMPARED))
    assert set(differences.CONFIG) | set(differences.TENSORS_OF_PEFT_ALONE) == used
