"""Small random bases of the families that llama.cpp, mlx-lm and vLLM are tested with, as directories that all read."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tests import small_models

from lorakit import hub

ROPE = {"rope_type": "default", "rope_theta": 500.0}
"""Not 10,000, which runtimes assume if they find no other value."""

PER_TYPE = {"full_attention": ROPE, "sliding_attention": ROPE | {"rope_theta": 1e4}}

FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": partial(small_models.llama, rope_parameters=ROPE),
    "mistral": partial(small_models.mistral, rope_parameters=ROPE, sliding_window=None),
    "qwen2": partial(small_models.qwen2, rope_parameters=ROPE),
    "qwen3": partial(small_models.qwen3, rope_parameters=ROPE),
    "phi3": partial(small_models.phi3, rope_parameters=ROPE),
    "gemma2": partial(small_models.gemma2, rope_parameters=ROPE, sliding_window=64),
    "gemma3_text": partial(small_models.gemma3, rope_parameters=PER_TYPE, sliding_window=64, num_hidden_layers=6),
    "gpt2": partial(small_models.gpt2, n_ctx=1024),  # which mlx-lm needs
}
"""Name of a family -> function that makes a model. The window is longer than the prompts, which mlx-lm needs for Gemma 2."""


def random(family: str, std: float, **fields: Any) -> Any:
    """Return a model of a family with weights so large that attention, and thus positions, matter."""
    torch.manual_seed(0)
    return small_models.randomized(FAMILIES[family](**fields), std)


def saved(base: Any, folder: Path) -> Path:
    """Save a base; GPT-2 without the prefix of its tensors, as it was published and mlx-lm needs it."""
    hub.save_model(base, folder)
    weights = folder / "model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, {"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of the words t0, t1, … to the directory of a base."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{number}": number for number in range(small_models.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="t0").save_pretrained(folder)
