"""Sums of gradients in one of two processes, in buckets that are sent during the backward pass.

python process_sums.py FOLDER_FOR_OUTCOMES

Every process writes the outcome of each case to `<rank>.pt`. The buckets are a few hundred bytes, so that the gradients
of the small model fill several.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.data import Batch
from lorakit.errors import LorakitError
from lorakit.train.loop import gradient_sum
from lorakit.train.loop.optimizer import build_adamw
from lorakit.train.loop.step import StepOptions, train_step
from lorakit.train.processes.processes import Processes, joined

WIDTH = 12


class Small(nn.Module):
    """A layer, a recomputed layer, three experts that see only their tokens, and a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])

    def forward(self, ids: Tensor, fault: str = "") -> Tensor:
        hidden = torch.tanh(self.first(torch.nn.functional.one_hot(ids, 4).to(self.first.weight.dtype)))
        if fault == "backward":
            hidden = Failing.apply(hidden)
        hidden = hidden + checkpoint(lambda x: torch.tanh(self.second(x)), hidden, use_reentrant=False)
        for number, expert in enumerate(self.experts):
            chosen = ids == number
            if chosen.any():
                hidden = hidden.index_put((chosen,), torch.tanh(expert(hidden[chosen])))
        return self.last(hidden).square().sum() * (float("nan") if fault == "nan" else 1.0)


class Failing(torch.autograd.Function):
    """The identity, whose backward pass fails."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise ValueError("no gradient here")


@dataclass(eq=False)
class Recording(Processes):
    """Processes that record the sizes of the buffers whose sums are started."""

    sizes: list[int] = field(default_factory=list)

    def start_sum(self, buffer: Tensor) -> Callable[[], None]:
        self.sizes.append(buffer.numel())
        return super().start_sum(buffer)


@dataclass(frozen=True)
class Noting(StepOptions):
    """Options that note, after each backward pass, how many sums have started."""

    early: list[int] = field(default_factory=list)

    def backward(self, loss: Tensor) -> None:
        super().backward(loss)
        assert isinstance(self.processes, Recording)
        self.early.append(len(self.processes.sizes))


def batch_of(*ids: int) -> Batch:
    row = torch.tensor([ids])
    return Batch(row, torch.ones_like(row), row, 0.0, len(ids), len(ids))


class Case:
    """A model whose optimizer does nothing, and the step of one case."""

    def __init__(self, processes: Processes, fault: str = "", **config: Any) -> None:
        torch.manual_seed(0)
        self.model, self.fault, self.early = Small().double(), fault, list[int]()
        targets = ["first", "second", "last", *(f"experts.{number}" for number in range(3))]
        core.attach(self.model, LoraConfig(r=2, target_modules=targets, **config), "default", seed=0)
        self.model.double()
        self.named = core.trainable_parameters(self.model, "default")
        with torch.no_grad():
            for _, parameter in self.named:
                parameter.add_(torch.randn_like(parameter) / 4)
        self.processes = Recording(processes.rank, processes.count, processes.local_rank, sums=processes.sums)

    def loss(self, model: nn.Module, batch: Batch, *_: object) -> Tensor:
        return model(batch.input_ids, self.fault)

    def step(self, batches: list[Batch]) -> list[Tensor | None]:
        options = Noting(torch.device("cpu"), 0.0, loss=self.loss, processes=self.processes, early=self.early)
        optimizer = build_adamw(self.named, 1e-30, 0.0)
        train_step(self.model, self.named, optimizer, batches, 1e-30, options)
        return [None if p.grad is None else p.grad.clone() for _, p in self.named]


def own_gradients(case: Case, batches: list[Batch], trained: int) -> list[Tensor]:
    """Return the gradients that this process alone computes, of the loss divided by the tokens of all processes."""
    for _, parameter in case.named:
        parameter.grad = None
    for batch in batches:
        (case.model(batch.input_ids) / trained).backward()
    penalty = core.penalties(case.model) if case.processes.is_first else None
    if penalty is not None:
        penalty.backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for _, p in case.named]


def equality(processes: Processes, batches: list[list[Batch]], **config: Any) -> dict[str, Any]:
    """Compare a step's gradients with the sum of what each process computes alone."""
    case = Case(processes, **config)
    trained = sum(batch.trained_tokens for share in batches for batch in share)
    parts = processes.exchange(own_gradients(case, batches[processes.rank], trained))
    made = case.step(batches[processes.rank])
    expected = [sum(values[1:], values[0]) for values in zip(*parts, strict=True)]
    return {
        "names": [name for name, _ in case.named],
        "gradients": made,
        "equal": [one is None or torch.equal(one, other) for one, other in zip(made, expected, strict=True)],
        "zero": [not bool(one.any()) for one in expected],
        "sizes": case.processes.sizes,
        "early": case.early,
    }


def failure(processes: Processes, fault: str) -> dict[str, Any]:
    """Return the error of a step in which process 1 fails, and whether the next step succeeds."""
    case = Case(processes, fault if processes.rank == 1 else "")
    batches = [batch_of(0, 1, 2), batch_of(3, 0)]
    outcome: dict[str, Any] = {"kind": None}
    try:
        with case.processes.together():
            case.step(batches)
    except (LorakitError, ValueError) as cause:
        outcome = {"kind": type(cause).__name__, "message": str(cause)}
    case.fault = ""
    return {**outcome, "next": case.step(batches), "sizes": case.processes.sizes}


if __name__ == "__main__":
    torch.set_num_threads(1)
    gradient_sum.BUCKET_BYTES = 400
    with joined() as processes:
        two = [[batch_of(1, 1, 3), batch_of(0, 1, 2, 3)], [batch_of(0, 3), batch_of(2, 1, 0)]]
        unseen = [[batch_of(0, 3, 3)], [batch_of(1, 3)]]
        made = {
            "batches": equality(processes, two),
            "unseen experts": equality(processes, unseen),
            "no batch": equality(processes, [[batch_of(0, 1, 2)], []]),
            "penalty": equality(processes, two, kasa_config={"beta": 0.1, "gamma": 0.1}),
            "error": failure(processes, "backward"),
            "nan": failure(processes, "nan"),
        }
        torch.save(made, Path(sys.argv[1], f"{processes.rank}.pt"))
