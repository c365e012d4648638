"""`accelerate(model, logits=False)`: the model's own loss without logits in training, and nowhere else."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

from lorakit import LoraConfig, core
from lorakit.speed import accelerate

from ..laws.snapshots import bits
from ..small_models import gemma2
from .test_acceleration import MODELS, adapted, close, given, step

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft calls it
CAUSAL = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "mixtral", "opt", "neox")


def masked(model: Any) -> dict[str, Tensor]:
    batch = given(model)
    labels = batch["labels"].clone()
    labels[0, :5] = labels[2] = -100
    return {**batch, "labels": labels}


def one(model: Any, **words: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**{**masked(model), **words}).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CAUSAL)
def test_the_loss_is_the_same_and_logits_are_none_in_training_alone(name: str) -> None:
    model = adapted(name)
    theirs, logits = one(model), model(**masked(model)).logits
    acceleration = accelerate(model, logits=False)
    assert acceleration.loss is not None, str(acceleration)
    close(one(model), theirs, 2e-5)
    output = model(**masked(model))
    assert output.logits is None and "logits" not in output
    torch.testing.assert_close(model(input_ids=masked(model)["input_ids"]).logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.eval()(**masked(model)).logits, logits, rtol=1e-4, atol=1e-5)
    tuples = model.train()(**masked(model), return_dict=False)
    torch.testing.assert_close(tuples[1], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "neox", "opt"])
def test_a_cache_that_nobody_asked_for_is_not_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the attention of a loop that keeps the default is fused as well."""
    model = adapted(name)
    model.config.use_cache = True
    theirs = one(model)
    accelerate(model, logits=False)
    given = masked(model)
    asked = model(**given, use_cache=True)
    assert asked.cache is not None and asked.logits is None
    further = model(**given, cache=transformers.DynamicCache(config=model.config))
    assert further.cache.get_seq_length() == 10
    assert model.eval()(**given).cache is not None
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    output = model.train()(**given)
    assert output.cache is None
    close(one(model), theirs, 2e-5)


def test_by_default_logits_stay() -> None:
    model = adapted("llama")
    accelerate(model)
    assert model(**given(model)).logits is not None


@pytest.mark.parametrize("count", [11, torch.tensor(11)])
def test_the_number_of_items_is_honoured(count: Any) -> None:
    model = adapted("llama")
    theirs, mean = one(model, num_items_in_batch=count), one(model)
    accelerate(model, logits=False)
    close(one(model, num_items_in_batch=count), theirs, 2e-5)
    assert abs(float(theirs[0] - mean[0])) > 0.1


def test_in_inference_mode_whose_tensors_have_no_change_counter() -> None:
    model = adapted("llama")
    with torch.inference_mode():
        wanted = model(**given(model)).loss
        accelerate(model, logits=False)
        output = model(**given(model))
    assert output.logits is None
    torch.testing.assert_close(output.loss, wanted, rtol=2e-5, atol=2e-5)


def test_shifted_labels_and_the_ignored_one_are_honoured() -> None:
    model = adapted("llama")
    ids = given(model)["input_ids"]
    shifted = ids.roll(1, 1).masked_fill(ids < 20, -7)
    words = {"shift_labels": shifted, "ignore_index": -7}
    theirs = one(model, **words)
    seventh = one(model, labels=ids, ignore_index=7)  # a label that could also be valid: the stock loss
    accelerate(model, logits=False)
    close(one(model, **words), theirs, 2e-5)
    close(one(model, labels=ids, ignore_index=7), seventh, 2e-5)


def test_undoing_gives_the_models_own_loss_back() -> None:
    model = adapted("llama")
    theirs, stock, hooks = step(model), model.loss_function, (len(model._forward_hooks), len(model._forward_pre_hooks))
    acceleration = accelerate(model, logits=False)
    assert model.loss_function is not stock
    acceleration.undo()
    assert model.loss_function is stock and "_loss_function" not in model.__dict__
    assert (len(model._forward_hooks), len(model._forward_pre_hooks)) == hooks
    assert bits(step(model)[0]) == bits(theirs[0])
    assert model(**given(model)).logits is not None


@pytest.mark.parametrize("from_outside", [True, False])
def test_it_holds_for_peft_around_the_model_and_for_the_model_inside(from_outside: bool) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    outer = peft.get_peft_model(MODELS["llama"](), config).train()
    model = outer if from_outside else outer.get_base_model()
    theirs = one(model)
    accelerate(outer, logits=False)
    close(one(model), theirs, 2e-5)
    assert model(**given(model)).logits is None


def test_it_holds_for_our_face() -> None:
    from lorakit import get_peft_model

    torch.manual_seed(0)
    outer = get_peft_model(MODELS["llama"](), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    theirs = one(outer.train())
    accelerate(outer, logits=False)
    close(one(outer), theirs, 2e-5)
    assert outer(**given(outer)).logits is None
    assert outer.get_base_model()(**given(outer)).logits is None


def test_a_soft_cap_is_honoured() -> None:
    torch.manual_seed(0)
    model = gemma2(final_logit_softcapping=3.0)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    core.attach(model, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False), seed=1)
    theirs = one(model.train())
    assert accelerate(model, logits=False).loss is not None
    close(one(model), theirs, 5e-5)


def test_a_loss_of_somebodys_own_is_left_alone() -> None:
    model = adapted("llama")
    model.loss_function = own = lambda logits, labels, vocab_size, **_: logits.square().mean()
    theirs = step(model)
    acceleration = accelerate(model, logits=False)
    assert acceleration.loss is None and "its loss function is not the next-token loss" in str(acceleration)
    assert model.loss_function is own
    close(step(model), theirs, 2e-5)


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_other_losses_keep_their_logits(name: str) -> None:
    model = adapted(name)
    theirs = step(model)
    assert accelerate(model, logits=False).loss is None
    close(step(model), theirs, 2e-5)
    assert model(**given(model)).logits is not None


def test_a_failed_forward_leaves_nothing_behind() -> None:
    model = adapted("llama")
    wanted = model(input_ids=given(model)["input_ids"]).logits
    accelerate(model, logits=False)
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[0, 61]]), labels=torch.tensor([[0, 1]]))
    torch.testing.assert_close(model(input_ids=given(model)["input_ids"]).logits, wanted, rtol=1e-4, atol=1e-5)


def test_copies_give_logits() -> None:
    model = adapted("llama")
    theirs = model(**given(model))
    accelerate(model, logits=False)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        output = twin(**given(twin))
        torch.testing.assert_close(output.logits, theirs.logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.loss, theirs.loss, rtol=1e-4, atol=1e-5)


def test_a_head_that_is_trained_after_all_gets_its_gradient() -> None:
    model = adapted("llama")
    accelerate(model, logits=False)
    model.lm_head.weight.requires_grad_(True)
    output = model(**given(model))
    output.loss.backward()
    assert output.logits is not None and float(model.lm_head.weight.grad.norm()) > 0
