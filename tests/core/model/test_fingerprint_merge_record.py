"""lorakit.core.model.fingerprint: the record of merged adapters in the model's config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.core.model.fingerprint import CONFIG_KEY, add_merge_record, check_not_merged_in, merge_record
from lorakit.errors import BaseMismatchError


def test_notes_add_up_and_travel(tiny_llama: Any, tmp_path: Path) -> None:
    assert merge_record(tiny_llama) == {}
    add_merge_record(tiny_llama, {"ab": "one"})
    add_merge_record(tiny_llama, {"cd": "two"})
    tiny_llama.save_pretrained(tmp_path)
    again = type(tiny_llama).from_pretrained(tmp_path)
    assert merge_record(again) == {"ab": "one", "cd": "two"}


@pytest.mark.parametrize("noted", [None, 3, "ab", {"sha256": "ab"}, [3, None, {"name": "x"}]])
def test_a_note_that_makes_no_sense_says_nothing(tiny_llama: Any, noted: Any) -> None:
    setattr(tiny_llama.config, CONFIG_KEY, noted)
    assert merge_record(tiny_llama) == {}


def test_a_model_without_a_config_has_none() -> None:
    assert merge_record(torch.nn.Linear(2, 2)) == {}


def test_a_second_time_needs_a_word(tiny_llama: Any) -> None:
    add_merge_record(tiny_llama, {"ab": "one"})
    check_not_merged_in(tiny_llama, Path("two"), "cd", ())
    check_not_merged_in(tiny_llama, Path("one"), "ab", ("base_mismatch",))
    with pytest.raises(BaseMismatchError, match=r"already been merged into the model \(as one\)") as caught:
        check_not_merged_in(tiny_llama, Path("folder"), "ab", ())
    assert (caught.value.where, caught.value.override) == ("folder", "base_mismatch")
