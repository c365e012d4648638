"""Calibration batches of several rows: padding is not measured, and the losses of the rows stay separate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.core.int8.calibrating import Calibration, Target, base_losses
from lorakit.core.int8.quantized_base import quantize_base
from lorakit.core.quantization.int8_linear import Int8Linear
from lorakit.errors import NotYetSupported

from ...small_models import WIDER

LENGTHS = (12, 5, 9)


def llama() -> Any:
    """Return a small frozen model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**WIDER)).requires_grad_(False).eval()


def qwen_moe() -> Any:
    """Return a small frozen model whose shared experts get an input without the axis of the rows."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    sizes = {**WIDER, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 64, "num_experts": 4}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes, num_experts_per_tok=2)).requires_grad_(False).eval()


def rows() -> list[dict[str, Tensor]]:
    """Return rows of several lengths, one per batch."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 96, (1, length), generator=generator) for length in LENGTHS]
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in ids]


def padded() -> dict[str, Tensor]:
    """Return the same rows as one batch; padding has a token that the rows do not contain last."""
    found = {"input_ids": 95, "attention_mask": 0, "labels": -100}
    pads = [max(LENGTHS) - length for length in LENGTHS]
    return {
        name: torch.cat(
            [nn.functional.pad(row[name], (0, pad), value=value) for row, pad in zip(rows(), pads, strict=True)]
        )
        for name, value in found.items()
    }


def largest(model: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the largest input of each channel of each linear layer."""
    targets = [
        Target(path, module, torch.zeros(module.in_features))
        for path, module in model.named_modules()
        if type(module) is nn.Linear and ".experts." not in path and not path.endswith(".mlp.gate")
    ]
    calibration = Calibration(targets, needs_mask=True)
    with torch.no_grad(), calibration.hooks():
        for batch in batches:
            calibration.begin(batch)
            model(**batch)
    return {target.path: target.absmax for target in targets}


@pytest.mark.parametrize("make", [llama, qwen_moe])
def test_padding_is_not_measured(make: Any) -> None:
    model = make()
    alone, together = largest(model, rows()), largest(model, [padded()])
    assert alone and all(torch.allclose(alone[path], together[path], rtol=1e-4, atol=1e-6) for path in alone)
    unmasked = {name: value for name, value in padded().items() if name != "attention_mask"}
    assert not torch.allclose(alone["lm_head"], largest(model, [unmasked])["lm_head"], rtol=1e-2)


class Transposed(nn.Module):
    """A model of one block, a linear layer whose input has shape (length, rows, 64)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 64)
        self.layers = nn.ModuleList([nn.Linear(64, 64)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the output of the block (length, rows, 64)."""
        found: Tensor = self.layers[0](self.embedding(input_ids).transpose(0, 1).contiguous())
        return found


def without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def test_an_input_whose_padding_is_unknown_is_an_error_if_asked_for() -> None:
    model = Transposed().requires_grad_(False)
    with pytest.raises(NotYetSupported, match="padding") as found:
        quantize_base(model, [without_labels(padded())], needs_mask=True)
    assert found.value.where == "layers.0" and type(model.layers[0]) is nn.Linear
    quantize_base(model, [without_labels(row) for row in rows()], needs_mask=True)
    assert isinstance(model.layers[0], Int8Linear)
    quantize_base(Transposed().requires_grad_(False), [without_labels(padded())])


def test_the_losses_of_rows_stay_separate() -> None:
    def by_row(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        logits = model(**without_labels(batch)).logits
        pairs = zip(logits[:, :-1], batch["labels"][:, 1:], strict=True)
        return torch.stack([nn.functional.cross_entropy(found, wanted) for found, wanted in pairs])

    wanted = base_losses(llama(), rows())
    found = base_losses(llama(), [padded()], by_row)
    assert len(found) == len(LENGTHS) and found == pytest.approx(wanted, rel=1e-4)
    assert quantize_base(llama(), [padded()], forward=by_row).losses == found
