"""Inputs and gradients of sites, compared with autograd and a plain loop; the model does not change."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.statistics.collecting import collect_gradients, collect_inputs, patches
from lorakit.errors import DataError, RunError, TargetError


class Net(nn.Module):
    """Embedding, convolution, dense layers (one called by keyword, one twice), dropout, an operation in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(10, 8)
        self.conv = nn.Conv1d(8, 6, 3, padding="same", padding_mode="circular", dilation=2)
        self.first = nn.Linear(6, 6)
        self.second = nn.Linear(6, 4)
        self.idle = nn.Linear(3, 3)
        self.dropout = nn.Dropout(0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.dropout(self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2))
        h = self.first(self.first(h).relu_())
        return (self.second(input=h).tanh() ** 2).mean() + h.square().mean()


def batches(count: int = 3) -> list[torch.Tensor]:
    return [torch.randint(0, 10, (2, 7), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def loss(model: nn.Module, batch: Any) -> Any:
    return model(batch)


SITES = ["embedding", "conv", "first", "second"]


@pytest.mark.parametrize("trained", [False, True])
def test_gradients_are_those_of_autograd(trained: bool) -> None:
    model = Net()
    model.requires_grad_(trained)
    found = collect_gradients(model, [*SITES, "idle"], batches(), loss)
    assert all(p.grad is None and p.requires_grad is trained for p in model.parameters())
    assert model.training
    model.requires_grad_(True)
    model.eval()
    torch.stack([model(batch) for batch in batches()]).mean().backward()
    for path in SITES:
        weight = model.get_submodule(path).weight
        expected = weight.grad.T if path == "embedding" else weight.grad
        torch.testing.assert_close(found[path].mean(), expected)
    assert found["first"].calls == 6
    assert found["idle"].calls == 0
    with pytest.raises(DataError, match="No loss depended on this site"):
        found["idle"].mean()


def test_gradients_of_a_tied_weight_are_apart(tiny_llama: Any) -> None:
    ids = torch.randint(0, 500, (2, 9))

    def forward(model: Any, batch: Any) -> Any:
        return F.cross_entropy(model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())

    found = collect_gradients(tiny_llama, ["model.embed_tokens", "lm_head"], [ids], forward)
    forward(tiny_llama, ids).backward()
    both = found["model.embed_tokens"].mean().T + found["lm_head"].mean()
    torch.testing.assert_close(both, tiny_llama.lm_head.weight.grad)
    assert float((found["model.embed_tokens"].mean().T - found["lm_head"].mean()).abs().max()) > 1e-4


def test_gradients_of_conv1d_and_bf16_are_canonical(tiny_gpt2: Any) -> None:
    def forward(model: Any, batch: Any) -> Any:
        return model(input_ids=batch).logits.float().square().mean()

    ids, path = torch.randint(0, 500, (2, 5)), "transformer.h.0.attn.c_attn"
    exact = collect_gradients(tiny_gpt2, [path], [ids], forward)[path].mean()
    assert exact.shape == (96, 32)
    wide = copy.deepcopy(tiny_gpt2)
    forward(wide, ids).backward()
    torch.testing.assert_close(exact, wide.get_submodule(path).weight.grad.T)
    rounded = collect_gradients(tiny_gpt2.to(torch.bfloat16), [path], [ids], forward)[path].mean()
    assert rounded.dtype == torch.float32
    assert float((rounded - exact).norm() / exact.norm()) < 0.1


def test_gradients_below_adapters_are_of_the_base_weight(tiny_llama: Any) -> None:
    path = "model.layers.0.mlp.up_proj"
    core.attach(tiny_llama, LoraConfig(r=2, target_modules=["up_proj"], init_lora_weights=False), seed=1)

    def forward(model: Any, batch: Any) -> Any:
        return model(input_ids=batch).logits.square().mean()

    ids = torch.randint(0, 500, (2, 5))
    found = collect_gradients(tiny_llama, [path], [ids], forward)[path].mean()
    weight = tiny_llama.get_submodule(path).base_layer.weight
    weight.requires_grad_(True)
    forward(tiny_llama, ids).backward()
    torch.testing.assert_close(found, weight.grad)
    assert all(
        p.grad is not None for _, p in core.trainable_parameters(tiny_llama)
    )  # by the backward, not by collecting


def test_inputs_are_those_of_a_plain_loop() -> None:
    model = Net()
    seen: dict[str, list[torch.Tensor]] = {"first": [], "second": []}
    handles = [
        model.get_submodule(p).register_forward_pre_hook(
            lambda m, a, k, p=p: seen[p].append((a[0] if a else k["input"]).reshape(-1, 6)), with_kwargs=True
        )
        for p in seen
    ]
    found = collect_inputs(model, [*seen, "idle"], batches(), loss)
    for handle in handles:
        handle.remove()
    assert model.training
    for path, rows in seen.items():
        x = torch.cat(rows)
        assert found[path].rows == len(x)
        torch.testing.assert_close(found[path].second_moment(), x.T @ x / len(x))
        torch.testing.assert_close(found[path].total, x.sum(0))
    assert found["idle"].rows == 0


def test_the_same_tensor_is_counted_at_each_site_and_a_changed_one_anew() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> None:
            x = x.clone()
            self.q(x), self.k(x)
            x.add_(1)
            self.v(x)

    x = torch.randn(5, 4)
    found = collect_inputs(Shared(), ["q", "k", "v"], [x, x], loss)
    torch.testing.assert_close(found["q"].second_moment(), x.T @ x / 5)
    assert torch.equal(found["q"].second_moment(), found["k"].second_moment())
    torch.testing.assert_close(found["v"].second_moment(), (x + 1).T @ (x + 1) / 5)
    found["q"].gram.zero_()  # each has its own
    assert float(found["k"].gram.abs().max()) > 0


def test_positions_that_do_not_count() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    x = torch.randn(2, 5, 4)
    keep = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    found = collect_inputs(model, ["0"], [x], loss, keep=lambda _: keep)["0"]
    rows = x[keep.bool()]
    assert found.rows == 4
    torch.testing.assert_close(found.second_moment(), rows.T @ rows / 4)
    with pytest.raises(
        DataError, match=r"The mask of shape \(1, 5\) does not match the input of 0, which has shape \(2, 5, 4\)"
    ):
        collect_inputs(model, ["0"], [x], loss, keep=lambda _: keep[:1])


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv1d(3, 5, 3, stride=2, padding=1, padding_mode="reflect"),
        nn.Conv2d(3, 4, (2, 3), dilation=2, padding="same", bias=False),
        nn.Conv3d(2, 3, 2, stride=(1, 2, 1)),
    ],
    ids=lambda conv: type(conv).__name__,
)
def test_patches_are_the_rows_that_a_convolution_multiplies(conv: Any) -> None:
    x = torch.randn(2, conv.in_channels, *([8] * (conv.weight.ndim - 2)))
    y = conv(x).flatten(2).transpose(1, 2).reshape(-1, conv.out_channels)
    made = patches(conv, x) @ conv.weight.flatten(1).T + (0 if conv.bias is None else conv.bias)
    torch.testing.assert_close(made, y)


def test_what_cannot_be_collected_is_refused_by_name() -> None:
    model = Net()
    with pytest.raises(TargetError, match="'frist' not found in the model; nearest: first"):
        collect_inputs(model, ["frist"], batches(), loss)
    with pytest.raises(TargetError, match="embedding is an embedding: its inputs are indices"):
        collect_inputs(model, ["embedding"], batches(), loss)
    with pytest.raises(TargetError, match="0 is a convolution with 2 groups"):
        collect_inputs(nn.Sequential(nn.Conv1d(4, 4, 1, groups=2)), ["0"], batches(), loss)
    for collect in (collect_inputs, collect_gradients):
        with pytest.raises(DataError, match="`batches` is empty; pass at least one batch"):
            collect(model, ["first"], [], loss)  # type: ignore[operator]
    with pytest.raises(RunError, match="The loss depends on none of the sites"):
        collect_gradients(model, ["idle"], batches(), lambda m, b: torch.zeros(()))


@pytest.mark.parametrize("collect", [collect_inputs, collect_gradients])
def test_nothing_is_left_behind_by_an_error(collect: Any) -> None:
    model = Net()
    model.second.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def forward(model: nn.Module, batch: torch.Tensor) -> Any:
        model(batch)
        raise ValueError("from the user's own function")

    with pytest.raises(ValueError, match="the user's own"):
        collect(model, ["first", "second"], batches(), forward)
    assert not any(m._forward_hooks for m in model.modules())
    assert model.training
    assert not model.second.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()
