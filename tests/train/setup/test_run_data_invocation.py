"""Sequences that an adapter with invocation tokens does not learn from: counted as the model itself behaves."""

from __future__ import annotations

import json
import random
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import LoraConfig
from lorakit.cli import main
from lorakit.core import attach, disable
from lorakit.data.encoding import IGNORED, Sequence
from lorakit.train.setup.run_data import count_inactive

from ...laws.zoo import LLAMA, randomise

VOCABULARY = 6


def _sequences(count: int) -> list[Sequence]:
    draw = random.Random(3)
    made = []
    for _ in range(count):
        ids = [draw.randrange(VOCABULARY) for _ in range(draw.randint(2, 12))]
        begin = draw.randint(1, len(ids))
        end = draw.randint(begin, len(ids))
        labels = [token if begin <= at < end else IGNORED for at, token in enumerate(ids)]
        made.append(Sequence(array("i", ids), array("i", labels)))
    return made


@pytest.mark.costly(cases=0)
@pytest.mark.parametrize("tokens", [[1], [1, 2], [3, 3, 3]])
def test_inactive_sequences_are_those_whose_loss_does_not_depend_on_the_adapter(tokens: list[int]) -> None:
    model = LLAMA.model().eval()
    config = LLAMA.config(alora_invocation_tokens=tokens, task_type="CAUSAL_LM")
    attach(model, config, "a")
    randomise(model, "a", 7)
    sequences, same = _sequences(600), 0
    with torch.no_grad():
        for row in sequences:
            ids = torch.tensor([list(row.input_ids)])
            adapted = model(input_ids=ids).logits[0, :-1]
            with disable(model):
                plain = model(input_ids=ids).logits[0, :-1]
            trained = torch.tensor(list(row.labels))[1:] != IGNORED
            same += torch.equal(adapted[trained], plain[trained])
    assert 0 < same < len(sequences)
    assert count_inactive(config, sequences) == same


def test_other_adapters_always_act() -> None:
    assert count_inactive(LoraConfig(), _sequences(3)) == 0


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    texts = [{"prompt": f"what is {n} plus {n}? ", "completion": f"{2 * n} of course"} for n in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in texts))
    return path


def _call(command: str, model: Path, rows: Path, folder: Path, tokens: list[int]) -> int:
    words = [command, *(["--data"] if command == "train" else []), str(rows), "--model", str(model)]
    if command == "train":
        words += ["--output-dir", str(folder), "--device", "cpu", "--dtype", "float32", "--max-steps", "1", "--r", "2"]
    words += ["--eval-fraction", "0", "--max-length", "64"]
    return main([*words, "--alora-invocation-tokens", *map(str, tokens)])


@pytest.mark.parametrize("command", ["train", "data"])
@pytest.mark.parametrize("tokens", [[999_999], [-1], [1] * 64])
def test_tokens_that_cannot_occur_are_an_error(
    command: str,
    tokens: list[int],
    rows: Path,
    tiny_model_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _call(command, tiny_model_directory, rows, tmp_path / "run", tokens) == 2
    assert "alora_invocation_tokens" in capsys.readouterr().err
    assert not (tmp_path / "run" / "run.json").exists()


@pytest.mark.parametrize("command", ["train", "data"])
def test_tokens_that_do_not_occur_are_a_finding(
    command: str,
    rows: Path,
    tiny_model_directory: Path,
    tiny_tokenizer: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    absent = tiny_tokenizer(" goodbye", add_special_tokens=False)["input_ids"]
    assert _call(command, tiny_model_directory, rows, tmp_path / "run", absent) == 0
    said = capsys.readouterr().out
    assert said.count("the adapter does not act in any sequence") == 1
    present = tiny_tokenizer(" plus", add_special_tokens=False)["input_ids"]
    assert _call(command, tiny_model_directory, rows, tmp_path / "other", present) == 0
    assert "does not act" not in capsys.readouterr().out
    if command == "train":
        counts = [
            json.loads((tmp_path / name / "run.json").read_text())["data"]["inactive_sequences"]
            for name in ("run", "other")
        ]
        assert counts == [8, 0]
