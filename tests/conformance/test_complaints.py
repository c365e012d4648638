"""Complaints of peft's users, measured on the installed peft and on lorakit (docs/from-peft.md)."""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit import peft as ours

WIDTH = 64


class Projections(nn.Module):
    """Three layers on one input, as an attention has them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False, dtype=dtype) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x) + self.k(x) + self.v(x)


def adapted(library: Any, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    fields = {"r": 4, "target_modules": ["q", "k", "v"], "init_lora_weights": False, **more}
    return library.get_peft_model(Projections(dtype), library.LoraConfig(**fields))


def activations_kept(model: Any, x: Tensor) -> list[Tensor]:
    """Return the bytes that a forward saves for backward, each storage once, without parameters and their casts."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.shape[:1] == x.shape[:1]:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model(x)
    result.float().sum().backward()
    return list(kept.values())


def test_a_bf16_input_is_kept_once_and_in_bf16() -> None:
    """Complaint 2: factors are fp32 on a bf16 base, and they are cast, not each layer's input."""
    x = torch.randn(32, WIDTH, dtype=torch.bfloat16)
    wide = {}
    for library in (peft, ours):
        model = adapted(library, torch.bfloat16)
        assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
        kept = activations_kept(model, x)
        wide[library] = [tensor for tensor in kept if tensor.shape == x.shape]
    assert [tensor.dtype for tensor in wide[ours]] == [torch.bfloat16]
    assert [tensor.dtype for tensor in wide[peft]] == [torch.float32] * 3


class Counting(TorchDispatchMode):
    """Counts the operations that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(call: Callable[[], Any]) -> int:
    with torch.no_grad(), Counting() as counting:
        call()
    return counting.count


def test_a_merged_model_runs_what_its_base_runs_and_an_unmerged_one_less_than_peft() -> None:
    """Complaint 8: how many operations a forward is made of; times are in benchmarks/."""
    x = torch.randn(2, WIDTH)
    plain = operations(lambda: Projections(torch.float32).eval()(x)) - operations(
        lambda: Projections(torch.float32).eval()
    )
    model, other = adapted(ours).eval(), adapted(peft).eval()
    assert operations(lambda: model(x)) <= operations(lambda: other(x))
    model.merge_adapter()
    assert operations(lambda: model(x)) == plain


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_needs_no_further_call(tiny_llama: Any, reentrant: bool) -> None:
    """Complaint 12: gradients are the same whether checkpointing is enabled before or after adapting."""
    ids = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(1))

    def gradients(before: bool, after: bool) -> dict[str, Tensor]:
        base = copy.deepcopy(tiny_llama).train()
        how = {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}}
        if before:
            base.activation_checkpointing_enable(**how)
        torch.manual_seed(0)
        model = ours.get_peft_model(base, ours.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        if after:
            model.activation_checkpointing_enable(**how)
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: value.grad for name, value in model.named_parameters() if value.requires_grad}

    expected = gradients(before=False, after=False)
    assert all(value is not None and value.any() for value in expected.values())
    for found in (gradients(before=True, after=False), gradients(before=False, after=True)):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    asked: list[Any] = []

    def refuse(*address: Any, **_: Any) -> Any:
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield asked


def test_saving_asks_nobody(no_network: list[Any], tiny_llama: Any, tmp_path: Path) -> None:
    """Complaint 13: a base that came from the hub, an embedding among the targets, and no network."""
    tiny_llama.name_or_path = tiny_llama.config._name_or_path = "somebody/some-model"
    config = ours.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        model = ours.get_peft_model(tiny_llama, config)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert not no_network
    assert "base_model.model.model.embed_tokens.lora_embedding_A" in names
    assert not any("base_layer" in name for name in names), "an adapter's file has no matrices of the base"


def test_an_adapter_that_goes_on_training_is_no_second_wrapper(tiny_llama: Any, tmp_path: Path) -> None:
    """Complaint 17: peft nests wrappers where a wrapped model is adapted again, and names on disk change."""
    config = ours.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    ours.get_peft_model(tiny_llama, config).save_pretrained(tmp_path / "first")
    base = ours.PeftModel.from_pretrained(tiny_llama, tmp_path / "first").unload()
    model = ours.PeftModel.from_pretrained(base, tmp_path / "first", is_trainable=True)
    assert {name for name, value in model.named_parameters() if value.requires_grad}
    with pytest.warns(UserWarning, match="gets another adapter, but no second wrapper"):
        again = ours.get_peft_model(model, ours.LoraConfig(r=2, target_modules=["v_proj"]), "second")
    assert again is model
    again.save_pretrained(tmp_path / "both")
    for part in ("adapter_model.safetensors", "second/adapter_model.safetensors"):
        names = load_file(tmp_path / "both" / part)
        assert names
        assert all(name.startswith("base_model.model.model.layers.") for name in names)
