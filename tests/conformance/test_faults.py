"""Faults of peft 0.21.2 that need a special model; other tests show the rest (docs/from-peft.md)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lorakit import peft as ours


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bi,eio->beo", x, self.weight)


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_parameter_that_is_parametrised_already_gives_the_same_answer_each_time() -> None:
    """Fault 8: peft's proxies pile up there, one more with each forward."""
    base = Mixture()
    nn.utils.parametrize.register_parametrization(base.experts, "weight", Doubled())
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    plain = base(x)
    torch.manual_seed(0)
    config = ours.LoraConfig(r=2, target_parameters=["experts.weight"], target_modules=[], init_lora_weights=False)
    model = ours.get_peft_model(base, config).eval()
    answers = [model(x) for _ in range(4)]
    assert all(torch.equal(answer, answers[0]) for answer in answers)
    assert not torch.allclose(answers[0], plain)
    with model.disable_adapter():
        assert torch.equal(model(x), plain)
    assert len(base.experts.base_layer.parametrizations.weight) == 1


def test_merging_replicas_is_no_sum_in_a_weight_that_they_share(tiny_llama: nn.Module) -> None:
    """Fault 5: the replicas of a layer have one weight, and each its own update."""
    ids = torch.randint(0, 60, (2, 6), generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    config = ours.LoraConfig(
        r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (0, 2)], init_lora_weights=False
    )
    model = ours.get_peft_model(tiny_llama, config).eval()
    before = model(ids).logits
    with pytest.warns(UserWarning, match="shares its weight with"):
        model.merge_adapter()
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model(ids).logits, before)


def test_merging_while_training_is_said() -> None:
    """Fault 14: a merged layer runs its base alone, so a loss over it reaches no factor."""
    model = ours.get_peft_model(nn.Sequential(nn.Linear(4, 4)), ours.LoraConfig(r=2, target_modules=["0"])).train()
    with pytest.warns(UserWarning, match="Merging in training mode: default will not be trained"):
        model.merge_adapter()
    model.unmerge_adapter()
    model.eval().merge_adapter()
    model.unmerge_adapter()
