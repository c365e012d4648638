"""Mixed batches that raise: PEFT's messages, and the built-in classes that callers of PEFT catch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.errors import RouteError, RowCountError
from lorakit.peft import LoraConfig, get_peft_model

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.mha(x, x, x)[0]  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.gru = nn.Linear(4, 4), nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(self.lin(x)[:, None])[0]  # type: ignore[no-any-return]


def two(base: nn.Module, **fields: Any) -> Any:
    model = get_peft_model(base, LoraConfig(**fields), adapter_name="a").eval()
    model.add_adapter("b", LoraConfig(**fields))
    return model


@pytest.mark.parametrize("name", ["a", "__base__"])
def test_too_few_rows_also_where_all_are_the_bases(name: str) -> None:
    model = two(nn.Sequential(nn.Linear(4, 4)), target_modules=["0"])
    text = "Length of `adapter_names` should be the same as the number of inputs, but"
    with pytest.raises(ValueError, match=text) as caught:
        model(X, adapter_names=[name] * 2)
    assert isinstance(caught.value, RowCountError)


def test_one_weight_for_all_rows() -> None:
    model = two(Attention(), target_modules=["mha"])
    with pytest.raises(TypeError, match=r"lora\.MultiheadAttention does not support mixed adapter batches") as caught:
        model(X[:, None], adapter_names=["a", "b", "__base__"])
    assert isinstance(caught.value, RouteError) and caught.value.what == "MultiheadAttention"
    model(X[:, None], adapter_names=["a"] * 3)  # the same adapter for all rows is not a mixed batch


def test_a_copied_module_that_returns_no_tensor() -> None:
    model = two(Recurrent(), target_modules=["lin"], modules_to_save=["gru"])
    text = "only supported for the following modules: Linear, Embedding, Conv1d, Conv2d, Conv3d."
    with pytest.raises(TypeError, match=text) as caught:
        model(X, adapter_names=["a", "b", "__base__"])
    assert isinstance(caught.value, RouteError) and caught.value.field == "modules_to_save"
