"""Adapters of the tiny models on disk, for commands that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorakit import cli

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


def _saved(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bert(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    """A masked language model without a pooler, which classification needs."""
    import torch
    import transformers

    torch.manual_seed(3)
    config = transformers.BertConfig(**SIZES, vocab_size=len(tiny_tokenizer), pad_token_id=tiny_tokenizer.pad_token_id)
    return _saved(tmp_path / "bert", transformers.BertForMaskedLM(config), tiny_tokenizer)


@pytest.fixture
def t5(tmp_path: Path, tiny_tokenizer: Any) -> Path:
    import torch
    import transformers

    torch.manual_seed(3)
    config = transformers.T5Config(
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        vocab_size=len(tiny_tokenizer),
        pad_token_id=tiny_tokenizer.pad_token_id,
        eos_token_id=tiny_tokenizer.eos_token_id,
        decoder_start_token_id=tiny_tokenizer.pad_token_id,
    )
    return _saved(tmp_path / "t5", transformers.T5ForConditionalGeneration(config), tiny_tokenizer)


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)

    def run(command: str, *words: object, more: tuple[str, ...] = ("--device", "cpu", "--dtype", "float32")) -> int:
        return cli.main([command, *map(str, words), *more])

    return run
