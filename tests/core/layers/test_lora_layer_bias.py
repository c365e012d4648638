"""`lora_bias`: the bias of B is applied, scaled, merged into the base's bias, saved, and unmerged bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorakit.config import LoraConfig
from lorakit.core import attach, detach, disable, load_adapter, merge, merged_state_dict, save_adapter, unmerge, use
from lorakit.core.model.fingerprint import fingerprint
from lorakit.errors import ConfigError, MergeError


def model(bias: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Tanh(), nn.Conv1d(4, 3, 1)).eval()


def adapted(**fields: object) -> nn.Module:
    made = model()
    for seed, name in enumerate("ab"):
        attach(made, LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"], lora_bias=True, **fields), name)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(seed)
        for layer in (made[0], made[2]):
            for parameter in layer.parameters_of(name):
                parameter.data = torch.randn(parameter.shape, generator=generator)
    return made


X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(3))


def test_it_acts_scaled_and_a_fresh_one_does_not() -> None:
    made = model()
    before = made(X)
    attach(made, LoraConfig(r=2, target_modules=["0", "2"], lora_bias=True))
    assert torch.equal(made(X), before)
    assert made[0].lora_B["default"].bias.requires_grad
    both = adapted()
    layer = both[0]
    W, b, f = layer.base_layer.weight, layer.base_layer.bias, layer.factor("a")
    torch.testing.assert_close(layer(X), F.linear(X, W + 3 * f.B @ f.A, b + 3 * f.bias))


def test_merged_into_the_bias_and_out_again() -> None:
    made, plain = adapted(), model()
    base, mark = {k: v.clone() for k, v in plain.state_dict().items()}, fingerprint(plain)
    with use(made, "a", "b"):
        expected = made(X)
    only_b = merged_state_dict(made, "b")
    with use(made, "b"):
        expected_b = made(X)
    merge(made, "a", "b")
    torch.testing.assert_close(made(X), expected)
    assert fingerprint(made) == mark
    with disable(made):
        assert torch.equal(made(X), plain(X))
    with use(made, "b"):
        torch.testing.assert_close(made(X), expected_b)
    unmerge(made, "a")
    with use(made, "b"):
        torch.testing.assert_close(made(X), expected_b)
    unmerge(made, "b")
    plain.load_state_dict(only_b)
    torch.testing.assert_close(plain(X), expected_b)
    detach(made)
    assert all(torch.equal(v, base[k]) for k, v in made.state_dict().items())


def test_saved_and_loaded(tmp_path: Path) -> None:
    made = adapted()
    save_adapter(made, tmp_path, "a")
    other = model()
    load_adapter(other, tmp_path)
    assert torch.equal(other(X), made(X))


def test_a_base_without_bias_has_no_place_for_it() -> None:
    made = model(bias=False)
    attach(made, LoraConfig(target_modules=["0"], lora_bias=True))
    with pytest.raises(MergeError, match="because the base layer has no bias") as error:
        merge(made)
    assert (error.value.where, error.value.field) == ("0", "lora_bias")
    with pytest.raises(MergeError, match="has no bias"):
        merged_state_dict(made)


def test_where_b_has_no_output_it_is_refused() -> None:
    made = nn.Sequential(nn.Embedding(4, 3))
    with pytest.raises(ConfigError, match="0: lora_bias=True is not supported for Embedding"):
        attach(made, LoraConfig(target_modules=["0"], lora_bias=True))
    assert isinstance(made[0], nn.Embedding)
