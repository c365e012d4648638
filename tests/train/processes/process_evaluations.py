"""Evaluations of each task, divided between processes and not; started by `processes.start`.

python process_evaluations.py FOLDER_FOR_OUTCOMES

Every process writes both evaluations of each case to `<rank>.json`.
"""

from __future__ import annotations

import json
import random
import sys
from array import array
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.data.encoding import Sequence
from lorakit.tasks import TASKS, Target, TaskOnData, evaluation_batches
from lorakit.train.loop.loop import evaluate
from lorakit.train.processes.processes import ALONE, Processes, joined


class Mean:
    """An embedder without modules of sentence-transformers."""

    def embed(self, hidden: Tensor, ids: Tensor, mask: Tensor, *, is_training: bool) -> Tensor:
        return nn.functional.normalize((hidden * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True), dim=-1)


VOCABULARY, ROWS = 40, 23
NAMES = ("a", "b", "c")
CASES = {
    "causal-lm": ("causal-lm", Target()),
    "class": ("classification", Target("class", NAMES)),
    "classes": ("classification", Target("classes", NAMES)),
    "score": ("classification", Target("score")),
    "tags": ("token-classification", Target("tags", ("O", "B-x", "I-x"))),
    "seq2seq": ("seq2seq", Target()),
    "scored pairs": ("embedding", Target("score", embedder=Mean())),
    "pairs": ("embedding", Target("pairs", embedder=Mean())),
}


class Small(nn.Module):
    """A model whose hidden states are embeddings; its logits are for each row or for each token."""

    def __init__(self, outputs: int, is_by_row: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head, self.is_by_row = nn.Embedding(VOCABULARY, 8), nn.Linear(8, outputs), is_by_row

    def forward(self, input_ids: Tensor, decoder_input_ids: Tensor | None = None, **_: Any) -> SimpleNamespace:
        hidden = self.table(input_ids if decoder_input_ids is None else decoder_input_ids)
        logits = self.head(hidden.mean(1) if self.is_by_row else hidden)
        return SimpleNamespace(logits=logits, last_hidden_state=hidden)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(labels[:, :1]), labels[:, :-1].clamp(min=0)], 1)


def rows_of(case: str) -> list[Sequence]:
    """Return rows of different lengths with the labels of a case."""
    drawn = random.Random(0)

    def ids() -> list[int]:
        return [drawn.randrange(1, VOCABULARY) for _ in range(drawn.randrange(3, 12))]

    made = []
    for number in range(ROWS):
        own, others = ids(), tuple[Any, ...]()
        labels: Any = array("i", [-100, *own[1:]])
        if case == "class":
            labels = array("i", [number % 3])
        elif case == "classes":
            labels = array("i", range(number % 4))
        elif case == "tags":
            labels = array("i", [drawn.randrange(3) for _ in own])
        elif case == "seq2seq":
            labels = array("i", ids())
        if "score" in case:
            labels = array("d", [drawn.random()])
        if "pairs" in case:
            others = (array("i", ids()),)
            labels = labels if "score" in case else array("i")
        made.append(Sequence(array("i", own), labels, others))
    return made


def evaluations(case: str, processes: Processes) -> list[dict[str, Any]]:
    """Return the evaluation of a case by this process, and by all processes together."""
    name, target = CASES[case]
    task = TaskOnData(TASKS[name], target)
    is_for_tokens = name in ("causal-lm", "seq2seq")
    model = Small(VOCABULARY if is_for_tokens else max(1, len(target.names)), name == "classification")
    found = []
    for group in (ALONE, processes):
        batches = evaluation_batches(task.task, task.objective.collate, rows_of(case), 2, 0)
        made = evaluate(model, batches, "cpu", objective=task.objective, processes=group)
        assert made is not None
        found.append({**asdict(replace(made, meter=None)), "metrics": dict(made.metrics)})
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as processes:
        made = {case: evaluations(case, processes) for case in sys.argv[2:] or CASES}
    Path(sys.argv[1], f"{processes.rank}.json").write_text(json.dumps(made))
