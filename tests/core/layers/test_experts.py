"""Fused experts run with factors at the tokens only while their source is known and unchanged."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.activations import GELUActivation
from transformers.integrations import moe
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from lorakit import LoraConfig, accelerate, core
from lorakit.core.layers.experts import KnownExperts, experts_forward
from lorakit.errors import ConfigError, ModelError

IDS = torch.randint(0, 30, (2, 7), generator=torch.Generator().manual_seed(0))
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def mixtral() -> Any:
    """Return a small Mixtral, the same every time."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()


def adapted(**fields: Any) -> Any:
    """Return a small Mixtral with an adapter on its experts, with distinct random A and B."""
    model = mixtral()
    core.attach(model, LoraConfig(r=2, target_modules=[], target_parameters=PARAMETERS, **fields))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in core.trainable_parameters(model, "default"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def layers(model: Any) -> list[Any]:
    return [site.layer for site in core.sites(model)]


def by_merging(model: Any) -> Tensor:
    """Return the logits of a copy with merged weights, whose experts run themselves."""
    merged = copy.deepcopy(model)
    core.merge(merged)
    logits: Tensor = merged(IDS).logits
    return logits


def other_gate(self: Any, gate_up_out: Tensor) -> Tensor:
    gate, up = gate_up_out.chunk(2, dim=-1)
    return gate.tanh() * up


def other_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return hidden_states * self.down_proj.sum() * top_k_weights.sum(-1, keepdim=True)


def replaced_gate(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MixtralExperts, "_apply_gate", other_gate)


def replaced_forward(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MixtralExperts, "forward", other_forward)


def replaced_implementation(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, model.config._experts_implementation, other_forward)


def registered_implementation(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(moe.ALL_EXPERTS_FUNCTIONS._local_mapping, model.config._experts_implementation, other_forward)


def own_implementation(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(moe.ALL_EXPERTS_FUNCTIONS._global_mapping, "own", other_forward)
    model.config._experts_implementation = "own"


def other_activation(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in model.model.layers:
        layer.mlp.experts.act_fn = GELUActivation()


def function_of_the_activation(model: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(type(layers(model)[0].owner.act_fn), "forward", lambda self, x: x.tanh())


def hook(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in layers(model):
        layer.owner.register_forward_hook(lambda module, args, output: output * 2)


def forward_of_one(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in layers(model):
        layer.owner.forward = other_forward.__get__(layer.owner)


class Doubles(ModelHook):
    """A hook of accelerate, which replaces `forward` by a partial function that refers to the module."""

    def post_forward(self, module: nn.Module, output: Tensor) -> Tensor:
        return output * 2


def hook_of_accelerate(model: Any, patch: pytest.MonkeyPatch) -> None:
    for layer in layers(model):
        add_hook_to_module(layer.owner, Doubles())


CHANGES = [
    replaced_gate,
    replaced_forward,
    replaced_implementation,
    registered_implementation,
    own_implementation,
    function_of_the_activation,
    hook,
    forward_of_one,
    hook_of_accelerate,
]


def test_known_experts_run_with_factors_at_the_tokens() -> None:
    model = adapted()
    torch.testing.assert_close(model(IDS).logits, by_merging(model), atol=1e-5, rtol=1e-5)
    assert [layer.why_dense() for layer in layers(model)] == [""] * 4


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_model_computes_what_its_own_forward_computes(
    change: Callable[..., None], when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change before the first call, or after it, is not bypassed."""
    model = adapted()
    plain = model(IDS).logits if when == "after" else None
    change(model, monkeypatch)
    found = model(IDS).logits
    torch.testing.assert_close(found, by_merging(model), atol=1e-5, rtol=1e-5)
    if plain is not None:
        assert not torch.allclose(found, plain, atol=1e-3)
    assert all(layer.why_dense() for layer in layers(model))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_implementation_of_transformers_is_known(implementation: str) -> None:
    model = adapted()
    model.config._experts_implementation = implementation
    torch.testing.assert_close(model(IDS).logits, by_merging(model), atol=1e-5, rtol=1e-5)
    assert not any(layer.why_dense() for layer in layers(model))


def test_another_activation_is_used() -> None:
    model = adapted()
    model(IDS)
    other_activation_of(model)
    torch.testing.assert_close(model(IDS).logits, by_merging(model), atol=1e-5, rtol=1e-5)


def other_activation_of(model: Any) -> None:
    for layer in layers(model):
        layer.owner.act_fn = nn.Tanh()


def test_dropout_is_an_error_while_the_input_is_not_accessible(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(lora_dropout=0.5).train()
    model(IDS)
    replaced_gate(model, monkeypatch)
    with pytest.raises(ModelError, match="lora_dropout") as caught:
        model(IDS)
    assert caught.value.field == "lora_dropout" and caught.value.where == "MixtralExperts"
    torch.testing.assert_close(model.eval()(IDS).logits, by_merging(model), atol=1e-5, rtol=1e-5)


def test_dropout_on_unknown_experts_is_an_error_when_attaching(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MixtralExperts, "_apply_gate", other_gate)
    model = mixtral()
    with pytest.raises(ConfigError, match="lora_dropout"):
        core.attach(model, LoraConfig(target_modules=[], target_parameters=PARAMETERS, lora_dropout=0.1))
    assert not core.adapters(model)


def test_copies_are_asked_again() -> None:
    model = adapted()
    model(IDS)
    found = copy.deepcopy(model)
    assert layers(found)[0].experts.why == "" and layers(found)[0].experts is not layers(model)[0].experts
    torch.testing.assert_close(found(IDS).logits, model(IDS).logits)


def test_an_index_without_an_expert_adds_nothing() -> None:
    """transformers' own forward skips the index that follows the last expert."""
    experts = mixtral().model.layers[0].mlp.experts.requires_grad_(False)
    experts.config._experts_implementation = "eager"
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    index, weights = (
        torch.tensor([[0, 4], [4, 4], [2, 1]]),
        torch.rand(3, 2, generator=torch.Generator().manual_seed(3)),
    )
    torch.testing.assert_close(experts_forward(experts, {}, x, index, weights), experts(x, index, weights))


def test_the_report_of_acceleration_says_how_experts_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()
    found = accelerate(model)
    assert "ParamWrapper" not in str(found)
    found.undo()
    replaced_gate(model, monkeypatch)
    assert "4 × ParamWrapper: unchanged (dense weights" in str(accelerate(model))


def test_a_module_that_is_not_experts() -> None:
    known = KnownExperts()
    assert not known.runs(nn.Linear(2, 2)) and "Linear" in known.why
