"""The same files, and each library reads what the other wrote."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

import lorakit.peft as ours

from . import differences
from .architectures import model_named, outputs_of
from .closeness import assert_close, assert_differs, assert_same_bits
from .rows import ROWS_COMPARED, Row, quiet_peft, theirs

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
USED: set[str] = set()


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


@pytest.mark.parametrize("row", ROWS_COMPARED, ids=str)
def test_same_files(row: Row, saved: Any) -> None:
    folders = saved(row)
    names, our_names = ({path.name for path in folder.iterdir()} for folder in (folders.theirs, folders.ours))
    assert names - our_names == set(differences.FILES_OF_PEFT_ALONE)
    assert our_names - names == set(differences.FILES_OF_OURS_ALONE)
    _compare_configs(row, *(json.loads((f / CONFIG).read_text()) for f in (folders.theirs, folders.ours)))
    metadata, our_metadata = (_metadata(f / WEIGHTS) for f in (folders.theirs, folders.ours))
    assert {k: v for k, v in our_metadata.items() if k not in differences.METADATA} == metadata
    tensors, our_tensors = (load_file(f / WEIGHTS) for f in (folders.theirs, folders.ours))
    for name in set(tensors) - set(our_tensors):
        _accept_tensor(row, name)
        del tensors[name]
    assert_same_bits(our_tensors, tensors)


@pytest.mark.parametrize("row", ROWS_COMPARED, ids=str)
def test_lorakit_reads_what_peft_wrote(row: Row, saved: Any) -> None:
    base = model_named(row.model)
    expected, plain = saved(row).outputs, outputs_of(base(**row.inputs))
    model = ours.PeftModel.from_pretrained(base, saved(row).theirs)
    assert_close(outputs_of(model(**row.inputs)), expected)
    assert_differs(expected, plain)


@pytest.mark.parametrize("row", ROWS_COMPARED, ids=str)
def test_peft_reads_what_lorakit_wrote(row: Row, saved: Any) -> None:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = theirs.PeftModel.from_pretrained(model_named(row.model), saved(row).ours)
    remarks = [str(w.message) for w in said if "is_gradient_checkpointing" not in str(w.message)]
    assert [remark for remark in remarks if "key" in remark or "unexpected" in remark.lower()] == []
    assert_close(outputs_of(model(**row.inputs)), saved(row).outputs)


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
    assert sum("was edited since the adapter was saved" in text for text in texts) <= 1
    assert len(texts) <= 2
    assert_close(outputs_of(model(**row.inputs)), saved(row).outputs)
    model.save_pretrained(tmp_path)  # from here on it is ours again, and nothing is said
    ours.PeftModel.from_pretrained(model_named(row.model), tmp_path)


def test_every_accepted_difference_is_needed(saved: Any) -> None:
    for row in ROWS_COMPARED:
        folders = saved(row)
        first, second = (json.loads((f / CONFIG).read_text()) for f in (folders.theirs, folders.ours))
        _compare_configs(row, first, second)
        for name in set(load_file(folders.theirs / WEIGHTS)) - set(load_file(folders.ours / WEIGHTS)):
            _accept_tensor(row, name)
    assert set(differences.CONFIG) | set(differences.TENSORS_OF_PEFT_ALONE) == USED


def _compare_configs(row: Row, theirs_: dict[str, Any], ours_: dict[str, Any]) -> None:
    for field in sorted(set(theirs_) | set(ours_)):
        first, second = (_unordered(config.get(field, differences.ABSENT)) for config in (theirs_, ours_))
        if first != second:
            accepted = differences.CONFIG.get(field)
            assert accepted is not None and accepted.holds(row, first, second), (
                f"{field}: peft {first}, lorakit {second}"
            )
            USED.add(field)


def _accept_tensor(row: Row, name: str) -> None:
    for ending, accepted in differences.TENSORS_OF_PEFT_ALONE.items():
        if name.endswith(ending) and accepted.holds(row, name, None):
            USED.add(ending)
            return
    raise AssertionError(f"peft alone wrote {name}")


def _unordered(value: Any) -> Any:
    """Lists of names are sets in peft, and it writes them in the order of their hashes."""
    return sorted(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else value


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())
