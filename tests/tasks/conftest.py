"""Small encoder and encoder-decoder models with the tokenizer of the test suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture
def model_directory(tmp_path: Path, tiny_tokenizer: Any) -> Callable[..., Path]:
    """Save a small masked language model (or a T5) with random weights and the tokenizer, without a chat template."""
    import torch
    import transformers

    def make(family: str, **words: Any) -> Path:
        vocabulary = {"vocab_size": len(tiny_tokenizer), "pad_token_id": tiny_tokenizer.pad_token_id}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            if family == "T5":
                sizes = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
                ends = {
                    "eos_token_id": tiny_tokenizer.eos_token_id,
                    "decoder_start_token_id": tiny_tokenizer.pad_token_id,
                }
                config = transformers.T5Config(**sizes, **vocabulary, **ends, **words)
                model: Any = transformers.T5ForConditionalGeneration(config)
            elif family == "DistilBert":
                sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
                config = transformers.DistilBertConfig(**sizes, **vocabulary, **words)
                model = transformers.DistilBertForMaskedLM(config)
            else:
                config = getattr(transformers, f"{family}Config")(**SIZES, **vocabulary, **words)
                model = getattr(transformers, f"{family}ForMaskedLM")(config)
        folder = tmp_path / family.lower()
        model.save_pretrained(folder)
        tiny_tokenizer.chat_template = None
        tiny_tokenizer.save_pretrained(folder)
        return folder

    return make
