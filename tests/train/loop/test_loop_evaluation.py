"""Loss and perplexity over all tokens with loss."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.data import Batch
from lorakit.errors import DataError, NonFiniteError, RunError
from lorakit.session.measuring import Evaluation, evaluating
from lorakit.train.loop.loop import evaluate


class Noisy(nn.Module):
    """Next-token logits from an embedding with dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(5, 5)
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        class Output:
            logits = self.dropout(self.table(input_ids))

        return Output


def _batch(ids: list[list[int]], trained: int | None = None) -> Batch:
    labels = torch.tensor(ids)
    labels[:, 0] = -100
    if trained == 0:
        labels[:] = -100
    count = int((labels != -100).sum())
    return Batch(torch.tensor(ids), torch.ones_like(labels), labels, 0.0, labels.numel(), count)


def test_the_mean_is_over_tokens_not_over_batches() -> None:
    model = Noisy().eval()
    long, short = [1, 2, 3, 4, 0, 1], [2, 2]
    parted = evaluate(model, [_batch([long]), _batch([short])], "cpu")
    logs = torch.log_softmax(model.table.weight.detach(), 1)
    pairs = [*itertools.pairwise(long), *itertools.pairwise(short)]
    expected = -sum(float(logs[a, b]) for a, b in pairs) / len(pairs)
    assert parted is not None
    assert parted.loss == pytest.approx(expected, rel=1e-5)
    assert parted.tokens == len(pairs)
    assert parted.perplexity == pytest.approx(math.exp(expected), rel=1e-5)


def test_dropout_is_off_and_each_module_gets_its_mode_back() -> None:
    model = Noisy().train()
    model.table.eval()
    first, second = (evaluate(model, [_batch([[1, 2, 3]])], "cpu") for _ in range(2))
    assert first == second
    assert (model.training, model.table.training, model.dropout.training) == (True, False, True)
    with pytest.raises(RuntimeError, match="stop"), evaluating(model):
        raise RuntimeError("stop")
    assert (model.training, model.table.training, model.dropout.training) == (True, False, True)


def test_it_draws_no_random_number() -> None:
    model = Noisy().train()
    before = torch.get_rng_state()
    evaluate(model, [_batch([[1, 2, 3]])], "cpu")
    assert torch.equal(before, torch.get_rng_state())


def test_it_can_be_abandoned() -> None:
    asked = iter([False, True])
    assert evaluate(Noisy(), [_batch([[1, 2]]), _batch([[1, 2]])], "cpu", stop=lambda: next(asked)) is None


def test_nothing_to_evaluate() -> None:
    with pytest.raises(DataError, match="No token in the evaluation data contributes to the loss"):
        evaluate(Noisy(), [_batch([[1, 2]], trained=0)], "cpu")


def test_a_loss_that_is_not_finite() -> None:
    model = Noisy()
    model.table.weight.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match="the evaluation loss is nan"):
        evaluate(model, [_batch([[1, 2]])], "cpu")


def test_perplexity_stays_a_json_number() -> None:
    assert math.isfinite(Evaluation(1e6, 3).perplexity)


@pytest.mark.parametrize(
    ("rows", "fewer"),
    [(1, ""), (2, "fewer rows per batch (train: --per-device-train-batch-size, eval: --batch-size) or ")],
)
def test_memory_that_runs_out_names_the_batch_and_leaves_the_mode(rows: int, fewer: str) -> None:
    class Greedy(Noisy):
        def forward(self, *_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model = Greedy().train()
    said = f"out of memory while evaluating: batch of {rows} × 3 tokens. Try {fewer}a smaller --max-length."
    with pytest.raises(RunError) as caught:
        evaluate(model, [_batch([[1, 2, 3]] * rows)], "cpu")
    assert str(caught.value) == said
    assert model.training


def test_other_errors_pass_through() -> None:
    class Broken(Noisy):
        def forward(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match=r"^shape mismatch$"):
        evaluate(Broken(), [_batch([[1, 2, 3]])], "cpu")
