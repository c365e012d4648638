"""Five failures of `examples/naive_lora.py`, each compared with lorakit, which passes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.errors import TargetError

from ..loading import load

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "naive_lora.py"


@pytest.fixture
def naive() -> Any:
    return load("examples/naive_lora.py")


def layers(count: int = 3) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[nn.Linear(16, 16) for _ in range(count)]).eval()


def test_closure_that_binds_late(naive: Any) -> None:
    """Every forward looks `lora` and `original` up when it runs: by then they are the last layer's."""
    x, plain = torch.randn(2, 16), layers()
    model = naive.get_peft_model(layers(), 4, 8, ["0", "1", "2"])
    model(x).sum().backward()
    used = [module.lora.B.grad is not None for module in model]
    assert used == [False, False, True]
    assert not torch.allclose(model(x), plain(x))  # B is zero, and yet the output is not the base's

    ours = layers()
    core.attach(ours, LoraConfig(r=4, target_modules=["0", "1", "2"]))
    torch.testing.assert_close(ours(x), plain(x), rtol=0, atol=0)
    ours(x).sum().backward()
    assert all(site.layer.factor("default").B.grad is not None for site in core.sites(ours))


def test_only_targets_are_frozen(naive: Any, tiny_llama: Any, tiny_gpt2: Any) -> None:
    """Modules that are not targets remain trainable: all of the base except the adapted weights."""
    base = sum(p.numel() for p in tiny_llama.parameters())
    model = naive.get_peft_model(tiny_llama, 4, 8, ["q_proj", "v_proj"])
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained > 0.8 * base

    core.attach(tiny_gpt2, LoraConfig(r=4, target_modules=["c_attn"]))
    named = [name for name, p in tiny_gpt2.named_parameters() if p.requires_grad]
    assert named
    assert all(".lora_A." in name or ".lora_B." in name for name in named)


def test_in_and_out_are_swapped_on_conv1d(naive: Any, tiny_gpt2: Any) -> None:
    """Conv1D keeps its weight as (in, out); read as (out, in), A does not fit the input."""
    tokens = torch.arange(8)[None]
    adapted = core.attach(tiny_gpt2, LoraConfig(r=4, target_modules=["c_attn"]))
    tiny_gpt2(tokens)
    site = core.sites(tiny_gpt2)[0]
    assert (site.in_features, site.out_features) == (32, 96)
    assert site.layer.factor("default").A.shape == (4, 32)
    assert adapted.trainable_parameters == 2 * 4 * (32 + 96)
    core.detach(tiny_gpt2)

    model = naive.get_peft_model(tiny_gpt2, 4, 8, ["c_attn"])
    assert model.transformer.h[0].attn.c_attn.lora.A.shape == (4, 96)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(tokens)


def test_substrings_match_too_much(naive: Any, tiny_llama: Any) -> None:
    """ "head" is in "lm_head", and "proj" is in seven names of a block."""
    with pytest.raises(TargetError, match="head"):
        core.attach(tiny_llama, LoraConfig(r=4, target_modules=["head"]))
    with pytest.raises(TargetError, match="proj"):
        core.attach(tiny_llama, LoraConfig(r=4, target_modules=["proj"]))
    naive.get_peft_model(tiny_llama, 4, 8, ["head"])
    assert hasattr(tiny_llama.lm_head, "lora")
    naive.get_peft_model(tiny_llama, 4, 8, ["proj"])
    assert sum(hasattr(module, "lora") for module in tiny_llama.model.modules()) == 2 * 7


def test_unit_variance_makes_the_first_step_too_large(naive: Any) -> None:
    """A of variance 1 makes Ax, and so what one step of Adam changes, √(3·in) times as large as A of 1/(3·in)."""
    changes = {}
    for name in ("naive", "lorakit"):
        torch.manual_seed(0)
        width = 768
        model = nn.Sequential(nn.Linear(width, width, bias=False))
        x = torch.randn(64, width)
        y = x + 0.1 * torch.randn(64, width)
        before = model(x).detach()
        if name == "naive":
            naive.get_peft_model(model, 8, 16, ["0"])
        else:
            core.attach(model, LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        after = model(x).detach()
        changes[name] = float((after - before).norm() / before.norm())
    assert changes["naive"] / changes["lorakit"] == pytest.approx((3 * 768) ** 0.5, rel=0.2)
    assert changes["naive"] > 0.2  # more than a fifth of the output, in one step at a usual rate
    assert changes["lorakit"] < 0.01
