"""The identity of a class is that of everything it runs: it changes with each of them, and with nothing else."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import activations
from transformers.integrations import sdpa_attention
from transformers.loss import loss_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer, MistralMLP
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from lorakit.identity.identities import Identities


def digest_of(kind: type[nn.Module]) -> str:
    return Identities().of_class(kind).digest


@pytest.mark.parametrize(
    ("one", "other"), [(LlamaDecoderLayer, MistralDecoderLayer), (LlamaMLP, MistralMLP), (LlamaRMSNorm, Qwen2RMSNorm)]
)
def test_copies_of_a_class_have_its_digest(one: type[nn.Module], other: type[nn.Module]) -> None:
    assert digest_of(one) == digest_of(other) != ""


def test_other_source_has_another_digest() -> None:
    kinds = (LlamaAttention, MistralAttention, LlamaMLP, LlamaRMSNorm, LlamaDecoderLayer, BertLayer)
    assert len({digest_of(kind) for kind in kinds}) == len(kinds)


def test_what_is_followed() -> None:
    found = Identities().of_class(LlamaAttention)
    names = {name.rpartition(":")[2] for name in found.functions}
    assert names >= {"LlamaAttention.forward", "apply_rotary_pos_emb", "rotate_half", "sdpa_attention_forward"}
    assert names >= {"repeat_kv", "eager_attention_forward", "AttentionInterface.get_interface"}
    assert "_attn_implementation" in found.fields and {"head_dim", "scaling", "is_causal"} <= found.reads
    methods = {name.rpartition(":")[2] for name in Identities().of_class(BertLayer).functions}
    assert {"BertLayer.feed_forward_chunk", "apply_chunking_to_forward"} <= methods


def replaced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of this package that computes the same."""

    @functools.wraps(function)
    def made(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return made


@pytest.mark.parametrize(
    ("holder", "name"),
    [
        (modeling_llama, "apply_rotary_pos_emb"),
        (modeling_llama, "rotate_half"),
        (modeling_llama, "eager_attention_forward"),
        (sdpa_attention, "repeat_kv"),
        (sdpa_attention, "use_gqa_in_sdpa"),
        (LlamaAttention, "forward"),
        (type(ALL_ATTENTION_FUNCTIONS), "get_interface"),
        (nn.Module, "__call__"),
    ],
)
def test_functions_of_other_packages_are_not_known(holder: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holder, name, replaced(getattr(holder, name)))
    found = Identities().of_class(LlamaAttention)
    assert found.digest == "" and found.why


def test_functions_exchanged_within_transformers_change_the_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_of(LlamaAttention)
    monkeypatch.setattr(modeling_llama, "rotate_half", modeling_llama.repeat_kv)
    assert digest_of(LlamaAttention) not in (before, "")


def test_registered_implementations_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_of(LlamaAttention)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", modeling_llama.eager_attention_forward)
    assert digest_of(LlamaAttention) not in (before, "")
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", replaced(sdpa_attention.sdpa_attention_forward))
    assert digest_of(LlamaAttention) == ""


def test_code_and_defaults_changed_in_place_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest_of(LlamaAttention)
    monkeypatch.setattr(modeling_llama.repeat_kv, "__defaults__", (2,))
    assert digest_of(LlamaAttention) not in (before, "")
    monkeypatch.undo()
    code = modeling_llama.rotate_half.__code__
    constants = tuple(-2 if one == -1 else one for one in code.co_consts)
    monkeypatch.setattr(modeling_llama.rotate_half, "__code__", code.replace(co_consts=constants))
    assert digest_of(LlamaAttention) == ""
    monkeypatch.undo()
    assert digest_of(LlamaAttention) == before


def test_flags_of_the_machine_do_not_count_but_are_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Identities().of_class(LlamaAttention)
    assert any(name == "_is_torch_xpu_available" for _, name, _ in before.facts)
    monkeypatch.setattr(sdpa_attention, "_is_torch_xpu_available", True)
    assert digest_of(LlamaAttention) == before.digest


def test_subclasses_are_known_by_what_they_override() -> None:
    same = type("Same", (LlamaMLP,), {"extra_repr": lambda self: "same"})
    assert digest_of(same) == digest_of(LlamaMLP)

    class Doubled(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert digest_of(Doubled) == ""


def test_functions_that_a_module_stores_count() -> None:
    identities = Identities()
    exact, tanh = activations.GELUActivation(), activations.ACT2FN["gelu_pytorch_tanh"]
    found = {identities.of(one).digest for one in (exact, tanh, activations.GELUActivation(use_gelu_python=True))}
    assert len(found) == 3 and "" not in found
    exact.act = types.MethodType(lambda self, x: x, exact)
    assert identities.of(exact).digest == ""


def test_classes_of_torch_have_no_functions_to_know(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Identities().of_class(nn.LayerNorm)
    assert found.digest and not found.functions
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: x)
    assert digest_of(nn.LayerNorm) == ""


def test_loss_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = Identities().of_function(loss_utils.ForCausalLMLoss).digest
    assert before
    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", replaced(loss_utils.fixed_cross_entropy))
    assert Identities().of_function(loss_utils.ForCausalLMLoss).digest == ""


def test_models_are_known_by_their_own_forward() -> None:
    identities = Identities()
    found = identities.of_forward(modeling_llama.LlamaForCausalLM)
    assert found.digest and [name.rpartition(":")[2] for name in found.functions] == ["LlamaForCausalLM.forward"]

    class Own(modeling_llama.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    assert identities.of_forward(Own).digest == "" and identities.of_forward(Own).why
