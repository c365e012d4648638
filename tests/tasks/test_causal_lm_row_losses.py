"""The loss of each row of a padded batch is that of the row alone, whatever the head does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.data import Batch
from lorakit.errors import NotYetSupported
from lorakit.tasks import CAUSAL_LM, Target, loss_sum
from lorakit.tasks.causal_lm import row_losses

from ..small_models import WIDER

LENGTHS = (12, 5, 9)


def model_of(family: str, **fields: Any) -> Any:
    """Return a small frozen model."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**WIDER, initializer_range=0.2, **fields)
    return getattr(transformers, f"{family}ForCausalLM")(config).requires_grad_(False).eval()


def row(number: int) -> Batch:
    """Return a batch of one row, whose first three tokens do not contribute to the loss."""
    length = LENGTHS[number]
    ids = torch.randint(0, 96, (1, length), generator=torch.Generator().manual_seed(number))
    labels = ids.clone()
    labels[:, :3] = -100
    return Batch(ids, torch.ones_like(ids), labels, 0.0, length, length - 3)


def padded() -> Batch:
    """Return the rows as one batch."""
    pads = [max(LENGTHS) - length for length in LENGTHS]

    def joined(name: str, value: int) -> Tensor:
        parts = [getattr(row(number), name) for number in range(len(LENGTHS))]
        return torch.cat(
            [nn.functional.pad(part, (0, pad), value=value) for part, pad in zip(parts, pads, strict=True)]
        )

    return Batch(joined("input_ids", 95), joined("attention_mask", 0), joined("labels", -100), 0.0, 26, 17)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Gemma2", {"head_dim": 16, "final_logit_softcapping": 5.0}),
        ("Granite", {"logits_scaling": 4.0}),
        ("Cohere", {"logit_scale": 0.25}),
    ],
    ids=["plain", "tied", "soft-capped", "divided", "scaled"],
)
def test_the_loss_of_each_row_is_that_of_the_row_alone(family: str, fields: dict[str, Any]) -> None:
    model = model_of(family, **fields)
    with torch.no_grad():
        found = row_losses(model, padded(), "cpu")
        wanted = torch.stack([loss_sum(model, row(number), "cpu") for number in range(len(LENGTHS))])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], found[1], rtol=0.01)
    assert CAUSAL_LM.objective(Target()).row_losses is row_losses


def test_the_head_gets_one_position_per_row_and_is_left_alone() -> None:
    model, seen = model_of("Llama"), list[tuple[int, ...]]()
    handle = model.lm_head.register_forward_hook(lambda _, args, output: seen.append(tuple(output.shape)))
    with torch.no_grad(), pytest.raises(NotYetSupported, match="head"):
        row_losses(model, padded(), "cpu")  # someone else's hook reads or changes the logits
    assert seen == [(3, 1, 96)]
    handle.remove()
    assert not model.lm_head._forward_hooks and not model.lm_head._forward_pre_hooks
    with torch.no_grad():
        assert model(input_ids=padded().input_ids).logits.shape == (3, 12, 96)


class OtherLogits(nn.Module):
    """A model whose logits are not a function of the output of its head alone."""

    def __init__(self) -> None:
        super().__init__()
        self.model = model_of("Llama")
        self.config = self.model.config

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.model.lm_head

    def forward(self, **inputs: Any) -> Any:
        """Return the output with other logits."""
        output = self.model(**inputs)
        output.logits = output.logits.roll(1, dims=-1)
        return output


@pytest.mark.parametrize("case", ["trained", "adapted", "other logits", "no head"])
def test_other_heads_are_measured_one_row_at_a_time(case: str) -> None:
    model = OtherLogits() if case == "other logits" else model_of("Llama")
    if case == "trained":
        model.lm_head.requires_grad_(True)
    elif case == "adapted":
        core.attach(model, LoraConfig(r=2, target_modules=["lm_head"]))
    elif case == "no head":
        model = model.model
    with torch.no_grad(), pytest.raises(NotYetSupported, match="one row at a time"):
        row_losses(model, padded(), "cpu")
