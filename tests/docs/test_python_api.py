"""docs/python-api.md: the calls of its table run in order, and every public method of a session is named."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import transformers

import lorakit
from lorakit import cli
from lorakit.generate import Sampling
from lorakit.session import Session

ROOT = Path(__file__).parents[2]
PAGE, README = ((ROOT / page).read_text(encoding="utf-8") for page in ("docs/python-api.md", "README.md"))


def train(*words: object) -> None:
    usual = ("--max-steps", 1, "--max-length", 32, "--r", 2, "--lora-alpha", 4)
    assert cli.main(["train", *map(str, (*words, *usual))]) == 0


def test_the_calls_run_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model_directory: Path, tiny_tokenizer: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = transformers.BertConfig(vocab_size=512, pad_token_id=tiny_tokenizer.pad_token_id, **sizes)
    transformers.BertForMaskedLM(config).save_pretrained("bert")
    tiny_tokenizer.save_pretrained("bert")
    Path("notes.md").write_text("The notes say hello to the world. " * 60)
    Path("sentiment.csv").write_text("text,label\n" + "a dull film,bad\na great film,good\n" * 12)
    train("--model", tiny_model_directory, "--data", "notes.md", "--output-dir", "runs/notes")
    train("--model", "bert", "--data", "sentiment.csv", "--output-dir", "runs/sentiment")
    names: dict[str, Any] = {"lorakit": lorakit, "Sampling": Sampling}
    calls = re.findall(r"^\| `(.+?)` \|", PAGE, flags=re.MULTILINE)
    assert len(calls) > 10
    for call in calls:
        exec(call.replace('"smollm2"', repr(str(tiny_model_directory))), names)
    assert len(names["answers"]) == 2 and len(names["tokens"]) == 4 and names["result"].perplexity > 1
    assert names["rows"][0]["label"] in ("good", "bad")
    (code,) = re.findall(r"```python\n(import lorakit\n\nwith .*?)```", README, flags=re.DOTALL)
    exec(code, {})
    assert len(capsys.readouterr().out.splitlines()) >= 2


def test_every_public_method_is_named() -> None:
    for name, _ in inspect.getmembers(Session, callable):
        if not name.startswith("_"):
            assert f"{name}" in PAGE, name
