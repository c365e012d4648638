"""The reference pass of preference training: forwards without gradients around the policy's, in the same model.

With gradient checkpointing in either mode, the policy's gradients are bit for bit those without it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit
import lorakit.peft as ours

from .models import ids, randomise

Pass = Callable[[Any, Tensor], Tensor]


def disabled(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        return model(input_ids=tokens).logits


def second_adapter(model: Any, tokens: Tensor) -> Tensor:
    model.set_adapter("reference")
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    model.set_adapter("default")
    return logits


def nested(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad(), lorakit.use(model.get_base_model(), "reference"):
        first = model(input_ids=tokens).logits
        with model.disable_adapter():
            return first + model(input_ids=tokens).logits


def mixed(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad(), lorakit.route(model.get_base_model(), ["reference", None, "default"]):
        return model(input_ids=tokens).logits


def generated(model: Any, tokens: Tensor) -> Tensor:
    model.eval()
    model.generate(input_ids=tokens, max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.train()
    return disabled(model, tokens)


PASSES = {"disabled": disabled, "second": second_adapter, "nested": nested, "mixed": mixed, "generated": generated}


@pytest.fixture(autouse=True)
def _quiet_caches() -> Iterator[None]:
    import transformers

    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def policy(base: nn.Module, checkpointing: bool | None, accelerated: bool = False) -> Any:
    config = ours.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ours.get_peft_model(copy.deepcopy(base), config)
        model.add_adapter("reference", config)
    randomise(model)
    if checkpointing is not None:
        model.activation_checkpointing_enable({"use_reentrant": checkpointing})
    if accelerated:
        lorakit.accelerate(model)
    return model.train()


def gradients(model: Any, ask: Pass) -> list[dict[str, Tensor]]:
    """The gradients of two steps of a loss that reads the reference, asked before one step and after the other."""
    found, tokens = [], ids()
    for before in (True, False):
        reference = ask(model, tokens) if before else None
        logits = model(input_ids=tokens).logits
        reference = ask(model, tokens) if reference is None else reference
        (logits - reference).pow(2).mean().backward()
        trained = {
            name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and "default" in name
        }
        assert all(gradient.any() for gradient in trained.values())
        found.append(trained)
        model.zero_grad()
    return found


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # the pass has none
def test_checkpointing_changes_no_bit_of_the_policys_gradients(tiny_llama: Any, name: str, reentrant: bool) -> None:
    expected = gradients(policy(tiny_llama, None), PASSES[name])
    found = gradients(policy(tiny_llama, reentrant), PASSES[name])
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["disabled", "mixed"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_an_accelerated_policy(tiny_llama: Any, name: str, reentrant: bool) -> None:
    expected = gradients(policy(tiny_llama, None, accelerated=True), PASSES[name])
    found = gradients(policy(tiny_llama, reentrant, accelerated=True), PASSES[name])
    torch.testing.assert_close(found, expected)  # a recomputation may round differently


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
def test_a_pass_that_an_accelerated_part_leaves_to_its_module_is_remembered(tiny_llama: Any) -> None:
    """A mixed batch bypasses the fused parts; its recomputation must not take the adapter of the next forward."""
    model, tokens = policy(tiny_llama, True, accelerated=True), ids()
    plain = policy(tiny_llama, None, accelerated=True)
    found = []
    for each in (plain, model):
        with lorakit.route(each.get_base_model(), ["default", "reference", None]):
            loss = each(input_ids=tokens).logits.pow(2).mean()
        with torch.no_grad(), each.disable_adapter():
            each(input_ids=tokens)
        loss.backward()
        found.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert any("default" in name for name in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
