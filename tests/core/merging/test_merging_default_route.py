"""A merged adapter belongs to the default route until it is unmerged; an explicit choice takes precedence."""

import pytest
import torch
from torch import Tensor, nn

from lorakit import LoraConfig, core


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).eval()
    for name in ("a", "b"):
        core.attach(model, LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False), name)
    return model


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.ones(3, 6))


def under(model: nn.Module, *names: str) -> Tensor:
    with core.use(model, *names):
        return output(model)


def test_two_merged_adapters_both_answer(model: nn.Module) -> None:
    both = under(model, "a", "b")
    core.merge(model, "a", "b")
    torch.testing.assert_close(output(model), both)


def test_one_merged_beside_the_active_one(model: nn.Module) -> None:
    both, only = under(model, "a", "b"), output(model)
    core.merge(model, "b")
    torch.testing.assert_close(output(model), both)
    core.unmerge(model)
    assert torch.equal(output(model), only)


def test_the_active_one_stays_after_its_own_merge(model: nn.Module) -> None:
    only = output(model)
    core.merge(model)
    core.unmerge(model)
    assert torch.equal(output(model), only)


def test_a_choice_after_the_merge_wins(model: nn.Module) -> None:
    alone = under(model, "b")
    core.merge(model, "a")
    core.activate(model, "b")
    assert torch.equal(output(model), alone)
    core.unmerge(model)
    assert torch.equal(output(model), alone)
