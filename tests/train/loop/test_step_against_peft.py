"""Accelerated training learns the same as peft in a plain loop.

The step of `lorakit train` on an accelerated model is compared with a hand-written loop over peft's model, from the same
weights, factors and batches, without dropout. Small models of seven families, accelerated, give the gradients of the
plain forward in double precision.
"""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lorakit import LoraConfig, core
from lorakit.data import Batch
from lorakit.speed import accelerate
from lorakit.train.loop.optimizer import build_adamw
from lorakit.train.loop.step import StepOptions, loss_sum, train_step

from ... import small_models
from ...doubles import InDouble
from ...small_models import VOCABULARY, bert, gemma2, llama, qwen3, t5

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # optional dependencies of peft warn when they are imported
    import peft

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft reads it

STEPS, RATE, ROWS, LENGTH = 50, 3e-3, 2, 12


def gpt2(**words: Any) -> Any:
    return small_models.gpt2(n_positions=64, **words)


def wider_gpt2() -> Any:
    return gpt2(n_embd=96, n_layer=4)


def mixtral() -> Any:
    return small_models.mixtral(experts_implementation="eager")  # the others do not support float64


def batches(steps: int) -> list[Batch]:
    """Return rows of a noisy token chain that can be learned; a third of the tokens has no loss."""
    drawn = torch.Generator().manual_seed(7)
    made = []
    for _ in range(steps):
        ids = torch.randint(0, VOCABULARY, (ROWS, 1), generator=drawn)
        ids = (ids + 3 * torch.arange(LENGTH)) % VOCABULARY
        noise = torch.rand(ids.shape, generator=drawn) < 0.1
        ids = torch.where(noise, torch.randint(0, VOCABULARY, ids.shape, generator=drawn), ids)
        labels = ids.clone()
        labels[:, : LENGTH // 3] = -100
        made.append(Batch(ids, torch.ones_like(ids), labels, 0.0, ids.numel(), int((labels[:, 1:] != -100).sum())))
    return made


def pair(make: Callable[[], Any], dtype: torch.dtype, seed: int) -> tuple[Any, Any]:
    """Return the same base with the same factors, adapted by lorakit and by peft."""
    torch.manual_seed(seed)
    base = make().to(dtype)
    theirs = copy.deepcopy(base)
    fields: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": "all-linear"}
    fields["fan_in_fan_out"] = type(base).__name__.startswith("GPT2")
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    core.attach(base, LoraConfig(task_type="CAUSAL_LM", **fields))
    named = dict(core.trainable_parameters(base))
    with torch.no_grad():
        copied = {
            name.removeprefix("base_model.model."): p for name, p in wrapped.named_parameters() if p.requires_grad
        }
        assert copied.keys() == named.keys()
        for name, own in named.items():
            own.copy_(copied[name])
    return base.train(), wrapped.train()


def our_losses(model: Any, data: Sequence[Batch]) -> list[float]:
    named = core.trainable_parameters(model)
    acceleration = accelerate(model)
    assert acceleration.head is not None and acceleration.swaps
    options, optimizer = StepOptions(torch.device("cpu"), acceleration=acceleration), build_adamw(named, RATE, 0.0)
    return [train_step(model, named, optimizer, [batch], RATE, options).loss for batch in data]


def their_losses(model: Any, data: Sequence[Batch]) -> list[float]:
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    losses = []
    for batch in data:
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def both(make: Callable[[], Any], dtype: torch.dtype, seed: int = 0) -> tuple[list[float], list[float]]:
    ours, theirs = pair(make, dtype, seed)
    data = batches(STEPS)
    return our_losses(ours, data), their_losses(theirs, data)


@pytest.mark.parametrize("make", [llama, pytest.param(wider_gpt2, marks=pytest.mark.slow)])
def test_fifty_steps_in_single_precision_are_pefts(make: Callable[[], Any]) -> None:
    ours, theirs = both(make, torch.float32)
    for step, (found, wanted) in enumerate(zip(ours, theirs, strict=True)):
        assert abs(found - wanted) <= 1e-5 * wanted, step
    assert statistics.mean(ours[-5:]) < statistics.mean(ours[:5]) - 0.05  # there was something to compare


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, gpt2])
def test_in_bf16_the_difference_is_within_the_spread_of_seeds(make: Callable[[], Any]) -> None:
    """At each fifth of the run, the means over five seeds differ by less than two standard deviations of the seeds'
    losses, and each run stays close to its counterpart."""
    runs = [both(make, torch.bfloat16, seed) for seed in range(5)]
    for begin in range(0, STEPS, 10):
        ours, theirs = ([statistics.mean(run[side][begin : begin + 10]) for run in runs] for side in (0, 1))
        assert abs(statistics.mean(ours) - statistics.mean(theirs)) <= 2 * statistics.stdev(theirs)
        assert all(abs(a - b) <= 0.01 * b for a, b in zip(ours, theirs, strict=True))


def loss_of(model: Any, ids: Tensor, labels: Tensor, fast: Any) -> Tensor:
    """Return the mean over the tokens with loss, by the function of `lorakit train` if the model is causal."""
    if isinstance(model, (transformers.BertForMaskedLM, transformers.T5ForConditionalGeneration)):
        words = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        logits = model(input_ids=ids, **words).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    batch = Batch(ids, torch.ones_like(ids), labels, 0.0, ids.numel(), int((labels[:, 1:] != -100).sum()))
    return loss_sum(model, batch, "cpu", fast) / batch.trained_tokens


@pytest.mark.parametrize("make", [llama, gpt2, qwen3, gemma2, mixtral, bert, t5])
def test_gradients_of_whole_models_in_double_precision(make: Callable[[], Any]) -> None:
    torch.manual_seed(0)
    model = make().double()
    core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), seed=1)
    model.train()
    ids = torch.randint(0, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0, :4] = -100

    def gradients(fast: Any) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        loss = loss_of(model, ids, labels, fast)
        loss.backward()
        return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    with InDouble():
        plain = gradients(None)
        fast = accelerate(model)
        ours = gradients(fast)
    assert {recipe for recipe, _ in fast.swaps} >= RECIPES.get(make.__name__, set()), str(fast)
    assert plain[0].dtype == torch.float64
    assert abs(float(ours[0] - plain[0])) <= 1e-10 * float(plain[0])
    assert ours[1].keys() == plain[1].keys() == dict(core.trainable_parameters(model)).keys()
    for name, wanted in plain[1].items():
        assert float((ours[1][name] - wanted).norm()) <= 1e-10 * float(wanted.norm()) + 1e-15, name


RECIPES = {
    **{name: {"decoder layer", "loss without logits"} for name in ("llama", "gpt2", "qwen3", "mixtral")},
    "gemma2": {"attention", "feed-forward", "norm", "loss without logits"},
    "bert": {"encoder layer", "norm"},
    "t5": {"sublayer", "norm", "adapted linear"},
}
"""Parts that must be used for the comparison to say something."""
