"""The checks of one optimizer step. Invariant 9 covers the split into batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.data import Batch
from lorakit.errors import DataError, NonFiniteError, RunError
from lorakit.train.loop.optimizer import build_adamw
from lorakit.train.loop.step import StepOptions, StepResult, train_step


class Bigram(nn.Module):
    """The smallest language model: a table of next-token logits, partly frozen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(5, 5))
        self.idle = nn.Parameter(torch.zeros(2, 2))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        class Output:
            logits = self.table[input_ids]

        return Output


def batch(ids: list[list[int]], labels: list[list[int]] | None = None) -> Batch:
    targets = torch.tensor(ids if labels is None else labels)
    targets[:, 0] = -100
    trained = int((targets != -100).sum())
    return Batch(torch.tensor(ids), torch.ones_like(targets), targets, 0.5, targets.numel(), trained)


class Stepper:
    """A model with its optimizer, for several steps."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        self.optimizer = build_adamw(self.named, 0.1, 0.0)

    def step(self, *batches: Batch) -> StepResult:
        return train_step(self.model, self.named, self.optimizer, batches, 0.1, StepOptions(torch.device("cpu")))


def test_a_step_returns_the_mean_and_the_counts() -> None:
    model = Bigram()
    rows = batch([[1, 2, 3], [0, 1, 2]], [[1, 2, -100], [0, 1, 2]])
    log = torch.log_softmax(model.table.detach(), 1)
    expected = -float(log[1, 2] + log[0, 1] + log[1, 2]) / 3
    result = Stepper(model).step(rows)
    assert result.loss == pytest.approx(expected, rel=1e-6)
    assert (result.tokens, result.trained_tokens) == (6, 3)
    assert result.grad_norm > 0


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_moves_when_a_number_is_not_finite(where: str) -> None:
    model = Bigram()
    whole = Stepper(model)
    whole.step(batch([[1, 2, 3]]))
    if where == "loss":
        model.table.data[4, 4] = float("nan")
    else:
        model.table.register_hook(lambda gradient: gradient * float("inf"))
    before = model.table.detach().clone()
    moments = {k: v.clone() for k, v in whole.optimizer.state[model.table].items()}
    with pytest.raises(NonFiniteError, match=r"the (loss|gradient norm) became (nan|inf); the step was not taken"):
        whole.step(batch([[4, 4, 4]]))
    assert torch.equal(before, model.table.detach()) or where == "loss"
    assert torch.allclose(before, model.table.detach(), equal_nan=True, rtol=0, atol=0)
    assert all(torch.equal(v, moments[k]) for k, v in whole.optimizer.state[model.table].items())
    assert model.table.grad is None


def test_a_step_without_a_trained_token() -> None:
    with pytest.raises(DataError, match="No token in the batches of this step contributes to the loss"):
        Stepper(Bigram()).step(batch([[1, 2]], [[-100, -100]]))


def test_a_batch_without_a_trained_token_beside_others_counts_for_nothing() -> None:
    rows, empty = batch([[1, 2, 3]]), batch([[3, 2]], [[-100, -100]])
    one, two = Bigram(), Bigram()
    a, b = Stepper(one).step(rows), Stepper(two).step(empty, rows)
    assert a.loss == b.loss
    assert torch.equal(one.table, two.table)


def test_a_frozen_model() -> None:
    model = Bigram()
    whole = Stepper(model)
    model.requires_grad_(False)
    with pytest.raises(RunError, match="does not depend on any trainable tensor: the adapter is inactive or frozen"):
        whole.step(batch([[1, 2, 3]]))


@pytest.mark.parametrize(
    "cause",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_memory_that_runs_out_names_the_batch_and_the_way_out(cause: Exception) -> None:
    class Greedy(Bigram):
        def forward(self, **_: Any) -> Any:
            raise cause

    with pytest.raises(RunError) as caught:
        Stepper(Greedy()).step(batch([[1, 2, 3], [1, 2, 3]]))
    text = str(caught.value)
    assert text.startswith("out of memory: batch of 2 × 3 tokens. ")
    flags = ("--no-accelerate", "--recompute layers", "--gradient-accumulation-steps", "--max-length")
    targets = [text.index(flag) for flag in flags]
    assert targets == sorted(targets)


def test_other_errors_pass_through() -> None:
    class Broken(Bigram):
        def forward(self, **_: Any) -> Any:
            raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match=r"^shape mismatch$"):
        Stepper(Broken()).step(batch([[1, 2, 3]]))


def test_a_tensor_that_was_put_in_the_place_of_another_is_seen_before_the_step() -> None:
    model = Bigram()
    whole = Stepper(model)
    whole.step(batch([[1, 2, 3]]))
    model.load_state_dict({"table": torch.ones(5, 5), "idle": torch.zeros(2, 2)}, assign=True)
    with pytest.raises(RunError, match=r"table is not the tensor that the optimizer was created for.*replaced"):
        whole.step(batch([[1, 2, 3]]))
    assert torch.equal(model.table, torch.ones(5, 5))


def test_storage_that_was_replaced_is_trained() -> None:
    one, two = Bigram(), Bigram()
    a, b = Stepper(one), Stepper(two)
    a.step(batch([[1, 2, 3]]))
    b.step(batch([[1, 2, 3]]))
    two.table.data = two.table.detach().clone()
    for whole in (a, b):
        whole.step(batch([[2, 4, 3]]))
    assert torch.equal(one.table, two.table)
    two.float()  # nothing to do
    two.double()
    before = two.table.detach().clone()
    with pytest.raises(RunError, match=r"changed from \(5, 5\) \(float32 on cpu\) to .* \(float64"):
        b.step(batch([[1, 2, 3]]))
    assert torch.equal(two.table, before)
