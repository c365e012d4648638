"""The maximum length that follows the data: a percentile of the rows' lengths, within the model and the memory."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit import hub
from lorakit.data import Completion, Document, Labeled, Records
from lorakit.errors import UsageError
from lorakit.session import coding
from lorakit.session.coding import max_length_for, percentile, usual_length
from lorakit.tasks import CAUSAL_LM, Target, TaskOnData

PLAIN = TaskOnData(CAUSAL_LM, Target())


def test_the_percentile_is_numpys_and_at_most_one_row_in_a_hundred_is_longer() -> None:
    rng = random.Random(0)
    for count in (1, 2, 50, 99, 100, 101, 1000):
        sizes = [rng.randint(1, 3000) for _ in range(count)]
        found = percentile(sizes)
        assert found in sizes and sum(size > found for size in sizes) <= count / 100
        lower, higher = (np.percentile(sizes, 99, method=method) for method in ("lower", "higher"))
        assert lower <= found <= higher or found == max(sizes)


def test_the_lengths_are_those_of_whole_rows(tiny_tokenizer: Any) -> None:
    rows = [Completion("say ", "a word " * count) for count in range(1, 101)]
    sizes = [
        len(tiny_tokenizer(row.prompt, add_special_tokens=False)["input_ids"])
        + len(tiny_tokenizer(row.completion, add_special_tokens=False)["input_ids"])
        + 1  # the end of the text
        for row in rows
    ]
    found = usual_length(Records(rows), tiny_tokenizer, PLAIN)
    assert abs(found - sorted(sizes)[98]) <= 1
    few = Records([Completion("a", "b")])
    assert usual_length(few, tiny_tokenizer, PLAIN) == 16
    assert usual_length(Records([Document("a b c")]), tiny_tokenizer, PLAIN) == 512
    assert usual_length(Records([*rows, Document("a b c")]), tiny_tokenizer, PLAIN) == max(512, found)


def test_long_data_is_sampled_at_equal_distances(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Records([Completion("say ", "a word " * (1 + number % 90)) for number in range(1000)])
    whole = usual_length(rows, tiny_tokenizer, PLAIN)
    monkeypatch.setattr(coding, "SAMPLED_ROWS", 100)
    assert abs(usual_length(rows, tiny_tokenizer, PLAIN) - whole) <= 0.2 * whole


def test_the_models_limit(tiny_model_directory: Path) -> None:
    shape = hub.shape_of(hub.resolve(str(tiny_model_directory)))
    limit = shape.positions
    assert limit > 0
    assert max_length_for(shape, None, lambda: limit + 1) == limit
    assert max_length_for(shape, None, lambda: 20) == max_length_for(shape, 20, lambda: 30) == 20
    with pytest.raises(UsageError):
        max_length_for(shape, limit + 1, lambda: 20)


def test_classes_are_measured_without_their_labels(tiny_tokenizer: Any) -> None:
    from lorakit.tasks import TASKS

    task = TaskOnData(TASKS["classification"], Target("class", ("a", "b")))
    rows = Records([Labeled(("word " * 40,), "a"), Labeled(("word " * 30,), None)])
    expected = len(tiny_tokenizer("word " * 40)["input_ids"])
    assert usual_length(rows, tiny_tokenizer, task) == expected
