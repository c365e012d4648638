"""Accelerated models in fp16 on a CPU: every fused operation runs, and losses and gradients are close to those of fp32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorakit import LoraConfig, core
from lorakit.speed import accelerate

from .. import small_models

SCALE = 2.0**8
IDS = torch.randint(1, small_models.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))


def results(base: Any, dtype: torch.dtype, fast: bool, **fields: Any) -> tuple[float, torch.Tensor]:
    """Return the loss, and the gradient of all factors in fp32 as one vector."""
    model = copy.deepcopy(base).to(dtype)
    core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, **fields), seed=3)
    named = core.trainable_parameters(model)
    assert {parameter.dtype for _, parameter in named} == {torch.float32}
    if fast:
        acceleration = accelerate(model)
        assert acceleration.swaps
    loss = model.train()(IDS, labels=IDS, use_cache=False).loss
    (loss * SCALE).backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() / SCALE for _, p in named if p.grad is not None])


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (small_models.llama, {}),
        (small_models.llama, {"use_dora": True}),
        *(
            pytest.param(make, {}, marks=pytest.mark.slow)
            for make in (
                small_models.gemma2,
                small_models.gpt2,
                small_models.mixtral,
                small_models.neox,
                small_models.qwen3,
            )
        ),
    ],
    ids=["llama", "llama-dora", "gemma2", "gpt2", "mixtral", "neox", "qwen3"],
)
def test_losses_and_gradients_in_fp16_are_close_to_those_in_fp32(
    make: Callable[[], Any], fields: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    base = make()
    loss, gradient = results(base, torch.float16, True, **fields)
    wanted_loss, wanted = results(base, torch.float32, False, **fields)
    assert loss == pytest.approx(wanted_loss, rel=5e-3)
    assert torch.isfinite(gradient).all() and gradient.shape == wanted.shape
    assert torch.nn.functional.cosine_similarity(gradient, wanted, 0) > 0.999
