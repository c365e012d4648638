"""An evaluation that is divided between two processes has the loss and the metrics of one process, bit for bit."""

from __future__ import annotations

import json
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from .process_evaluations import CASES
from .processes import start

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

METRICS = {
    "causal-lm": set[str](),
    "class": {"accuracy", "f1_macro"},
    "classes": {"accuracy", "f1_micro", "f1_macro"},
    "score": {"mse", "pearson", "spearman"},
    "tags": {"accuracy", "f1", "precision", "recall"},
    "seq2seq": {"token_accuracy"},
    "scored pairs": {"spearman"},
    "pairs": {"ndcg@10"},
}
RUN = [case for case, (task, _) in CASES.items() if task != "embedding" or find_spec("sentence_transformers")]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Evaluations in each of two processes, by case."""
    folder = tmp_path_factory.mktemp("evaluations")
    start("process_evaluations", folder, *RUN)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.costly(cases=0)
@pytest.mark.parametrize("case", CASES)
def test_two_processes_measure_what_one_measures(made: list[dict[str, Any]], case: str) -> None:
    if case not in RUN:
        pytest.skip("sentence-transformers is not installed")
    for found in made:
        alone, together = found[case]
        assert together == alone
        assert METRICS[case] <= set(alone["metrics"])
