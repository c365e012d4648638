"""Packed sequences: which models keep them apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakit.ops.norm import Norm
from lorakit.speed import accelerate, acceleration
from lorakit.speed.probe import agree, eval_mode, keeps_sequences_apart, token_ids

from ..small_models import gpt2, llama


def logits(model: Any) -> torch.Tensor:
    result: torch.Tensor = model(input_ids=token_ids(model), use_cache=False).logits
    return result


def test_rounding_errors_of_a_whole_model_do_not_prevent_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bf16, the errors of 30 fused layers exceed the tolerance, which is meant for one module."""
    model = llama(num_hidden_layers=4).requires_grad_(False)
    with eval_mode(model):
        theirs = logits(model)
    forward = Norm.forward

    def rounded(norm: Norm, x: torch.Tensor) -> Any:
        n, stats = forward(norm, x)
        return n * (1 + 9e-5), stats

    monkeypatch.setattr(Norm, "forward", rounded)
    made = accelerate(model)
    with eval_mode(model):
        assert not agree(logits(model), theirs)
    assert len(made.swaps) > 4 and made.packs


def test_a_model_that_mixes_packed_sequences_when_fused_does_not_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    model = gpt2().requires_grad_(False)
    checks = []

    def whether(*args: Any) -> bool:
        checks.append(args)
        return len(checks) == 1 and keeps_sequences_apart(*args)

    monkeypatch.setattr(acceleration, "keeps_sequences_apart", whether)
    assert not accelerate(model).packs
    assert len(checks) == 2


@pytest.mark.parametrize("made", [llama, gpt2])
def test_logits_are_computed_if_they_are_not_given(made: Any) -> None:
    model = made()
    with eval_mode(model):
        assert keeps_sequences_apart(model) and keeps_sequences_apart(model, logits(model))
        assert not keeps_sequences_apart(model, logits(model) * 1.01)
