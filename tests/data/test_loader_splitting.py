import pytest

from lorakit.data import Completion, Document, Records, split
from lorakit.errors import ConfigError


def documents(count: int) -> Records:
    return Records((Document(f"text {index}", "a", index) for index in range(count)), ["a note"])


def test_whole_documents_are_held_out_by_the_seed() -> None:
    parts = split(documents(100), 0.05, seed=1)
    assert len(parts.held_out) == 5
    assert sorted(parts.train + parts.held_out, key=lambda r: r.line or 0) == list(documents(100))
    assert split(documents(100), 0.05, seed=1) == parts
    assert split(documents(100), 0.05, seed=2).held_out != parts.held_out
    assert parts.note == "5 of 100 documents are held out for evaluation (seed 1)."
    assert parts.train.notes == ["a note"]


def test_the_order_of_the_records_does_not_matter() -> None:
    backwards = split(list(reversed(documents(50))), 0.1, seed=3)
    assert set(backwards.held_out) == set(split(documents(50), 0.1, seed=3).held_out)


def test_equal_documents_stay_on_one_side() -> None:
    records = [Document(f"text {index % 10}", "a", index) for index in range(40)]
    parts = split(records, 0.3, seed=0)
    trained, held_out = ({r.text for r in side if isinstance(r, Document)} for side in (parts.train, parts.held_out))
    assert len(held_out) == 3
    assert not trained & held_out
    often = [*[Document("said often")] * 90, *documents(9)]
    for seed in range(5):  # the fraction counts texts, not repetitions
        assert len({r.text for r in split(often, 0.3, seed).held_out if isinstance(r, Document)}) == 3


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_document_leaves_nothing_and_that_is_said(count: int) -> None:
    parts = split(documents(count), 0.05)
    assert len(parts.train) == count
    assert not parts.held_out
    assert "the data is a single document. Pass --eval-data" in parts.note


def test_rows_that_are_no_documents_are_called_rows() -> None:
    rows = [Completion("p", str(index)) for index in range(3)]
    assert split(rows, 0.3).note == "1 of 3 rows is held out for evaluation (seed 0)."


def test_two_documents_leave_one_and_zero_leaves_none() -> None:
    assert len(split(documents(2), 0.01).held_out) == 1
    assert len(split(documents(2), 0.99).held_out) == 1
    assert split(documents(2), 0).note == "No data is held out for evaluation (eval_fraction is 0)."


@pytest.mark.parametrize("fraction", [-0.1, 1, 5])
def test_a_share_is_a_share(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"eval_fraction is .*; it must be in \[0, 1\)"):
        split(documents(3), fraction)
