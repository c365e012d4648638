"""Adapters of the tiny models on disk, for commands that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def save_adapter(tmp_path: Path, tiny_model_directory: Path) -> Callable[..., Path]:
    """Save an adapter of the model in `tiny_model_directory` whose B is random, drawn from `seed`."""

    def save(name: str, seed: int = 1, *, spread: float = 0.3, model: Any = None, **fields: Any) -> Path:
        import torch

        from lorakit import core, hub
        from lorakit.config import LoraConfig

        base = hub.load_model(tiny_model_directory) if model is None else model
        config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **fields})
        core.attach(base, config, "made", seed=seed)
        generator = torch.Generator().manual_seed(seed)
        for path, parameter in core.trainable_parameters(base, "made"):
            if "lora_B" in path or "lora_embedding_A" in path:
                parameter.data = torch.randn(parameter.shape, generator=generator) * spread
        core.save_adapter(base, tmp_path / name, "made", facts={"base_name": "tiny"}, allow=("nonfinite",))
        core.detach(base, "made")
        return tmp_path / name

    return save
