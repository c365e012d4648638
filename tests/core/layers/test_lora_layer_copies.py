"""A copy or pickle of one adapted module holds the parameters of that module only; the whole model still copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core import activate, attach, detach, merge_and_unload
from lorakit.core.model.index import AdapterIndex

Again = Callable[[Any], Any]
AGAIN: dict[str, Again] = {"deepcopy": copy.deepcopy, "pickle": lambda value: pickle.loads(pickle.dumps(value))}
CONFIGS = {
    "LoRA": {"target_modules": ["q_proj"]},
    "saved module": {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
    "token embeddings": {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
    "biases": {"target_modules": ["q_proj"], "bias": "all"},
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
    "PiSSA": {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
    "replicated": {"target_modules": ["q_proj"], "layer_replication": [(0, 2), (0, 2)]},
    "aLoRA": {"target_modules": ["q_proj"], "alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"},
}
IDS = torch.tensor([[1, 2, 3, 4]])


def parts(model: nn.Module) -> dict[str, nn.Module]:
    return {type(module).__name__: module for module in AdapterIndex.of(model).components.values()}


def values_in(data: bytes) -> int:
    """The number of values in all tensors of a pickle."""
    found: list[torch.Tensor] = []

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            made = super().find_class(module, name)
            if name not in ("_rebuild_tensor_v2", "_rebuild_device_tensor_from_numpy"):
                return made

            def build(*args: Any) -> Any:
                found.append(made(*args))
                return found[-1]

            return build

    import io

    Reader(io.BytesIO(data)).load()
    return sum(tensor.numel() for tensor in found)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pickled_module_holds_its_own_parameters_only(name: str, tiny_llama: Any) -> None:
    attach(tiny_llama, LoraConfig(r=2, **CONFIGS[name]))
    base = sum(parameter.numel() for parameter in tiny_llama.parameters())
    for module in parts(tiny_llama).values():
        own = sum(parameter.numel() for parameter in module.parameters())
        more = sum(
            t.numel()
            for kept in (getattr(module, "kept", None), getattr(module, "moved", None))
            for t in [kept]
            if t is not None
        )
        initial = sum(t.numel() for t in getattr(module, "initial", None) or ())
        held = values_in(pickle.dumps(module))
        assert own <= held <= own + more + initial < base
        assert len(pickle.dumps(copy.deepcopy(module))) < len(pickle.dumps(tiny_llama)) / 2


@pytest.mark.parametrize("again", AGAIN)
def test_a_copied_layer_works_by_itself(again: str, tiny_llama: Any) -> None:
    attach(tiny_llama, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    layer = tiny_llama.model.layers[0].self_attn.q_proj
    x = torch.randn(3, 32)
    twin = AGAIN[again](layer)
    assert torch.equal(twin(x), layer(x))
    activate(nn.Sequential(twin))
    assert not torch.equal(twin(x), layer(x))
    plain = nn.Sequential(twin)
    detach(plain)
    assert type(plain[0]) is nn.Linear and plain[0].weight.requires_grad


@pytest.mark.parametrize("end", [detach, merge_and_unload])
@pytest.mark.parametrize("again", AGAIN)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_copied_model_gets_its_flags_back(name: str, again: str, end: Any, tiny_llama: Any) -> None:
    if name in ("replicated", "aLoRA") and end is merge_and_unload:
        pytest.skip("cannot be merged, or merges with a warning")
    tiny_llama.model.norm.weight.requires_grad_(False)
    before = {path: parameter.requires_grad for path, parameter in tiny_llama.named_parameters()}
    attach(tiny_llama, LoraConfig(r=2, **CONFIGS[name]))
    twin = AGAIN[again](tiny_llama)
    y = tiny_llama(IDS).logits
    assert torch.equal(twin(IDS).logits, y)
    end(twin)
    assert not any(
        hasattr(module, word) for module in twin.modules() for word in ("_lorakit_frozen", "_lorakit_replication")
    )
    after = {path: parameter.requires_grad for path, parameter in twin.named_parameters()}
    if name == "saved module" and end is merge_and_unload:
        before["model.norm.weight"] = after["model.norm.weight"]  # the trained copy replaces the module
    assert after == before
    assert sum(p.requires_grad for p in tiny_llama.parameters()) < len(before)  # the original is still frozen
