"""The losses of evaluation rows are those of each row alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import hub
from lorakit.data import Batch, Loader, Records, encode, lengths, padding_id
from lorakit.data.records import Document
from lorakit.speed import accelerate
from lorakit.tasks import CAUSAL_LM, Target
from lorakit.tasks.causal_lm import loss_sum
from lorakit.tasks.task import Objective
from lorakit.train.loop.loop import evaluate

from .test_task_losses import CASES, prepared


@pytest.mark.parametrize("is_accelerated", [False, True])
def test_the_losses_of_rows_are_those_of_the_rows_alone(is_accelerated: bool, tiny_model_directory: Path) -> None:
    source = hub.resolve(str(tiny_model_directory))
    tokenizer, model = hub.load_tokenizer(source), hub.load_model(source)
    texts = ["one", "a longer text of a few words", "two words", "another text that is longer than the others here"]
    sequences = encode(Records(Document(text) for text in texts), tokenizer, 64).sequences
    pad = padding_id(tokenizer)
    batches = list(Loader(sequences, 3, 0, shuffle=False, epochs=1, pad_id=pad))
    alone = [loss_sum(model, row, "cpu").item() for row in Loader(sequences, 1, 0, shuffle=False, epochs=1, pad_id=pad)]
    acceleration = accelerate(model) if is_accelerated else None
    found = evaluate(model, batches, "cpu", acceleration=acceleration, objective=CAUSAL_LM.objective(Target()))
    assert found is not None
    assert found.row_losses == pytest.approx(alone, rel=1e-5)
    assert list(found.row_counts) == [size - 1 for size in lengths(sequences)]
    assert sum(found.row_losses) / sum(found.row_counts) == pytest.approx(found.loss, rel=1e-6)
    sums = [loss_sum(model, batch, "cpu", acceleration).item() for batch in batches]
    assert found.loss == pytest.approx(sum(sums) / found.tokens, rel=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_losses_of_rows_of_each_task(case: str, model_directory: Callable[..., Path]) -> None:
    task, model, sequences, pad = prepared(case, model_directory)
    objective = task.objective

    def losses(rows: int) -> Any:
        batches = Loader(sequences, rows, 0, shuffle=False, epochs=1, pad_id=pad, collate=objective.collate)
        return evaluate(model, batches, "cpu", objective=objective)

    several, single = losses(4), losses(1)
    assert several.row_losses == pytest.approx(single.row_losses, rel=1e-4)
    assert several.row_counts == single.row_counts and sum(several.row_counts) == several.tokens
    assert sum(several.row_losses) / several.tokens == pytest.approx(several.loss, rel=1e-5)


def test_a_batch_is_one_row_if_the_loss_compares_its_rows() -> None:
    class Model(nn.Module):
        pass

    def batch(rows: int) -> Batch:
        ones = torch.ones(rows, 1, dtype=torch.long)
        return Batch(ones, ones, ones[:, 0], 0.0, rows, rows)

    objective = Objective(
        lambda *_: batch(1), lambda *_: torch.zeros(()), lambda *_: torch.zeros(3), lambda *_: torch.tensor(2.5)
    )
    found = evaluate(Model(), [batch(3), batch(2)], "cpu", objective=objective)
    assert found is not None and (found.row_losses, found.row_counts) == ((2.5, 2.5), (3, 2))
