"""Shared by the benchmarks of a training step: models of published geometry, and the sides that train them.

A side is a name; `prepare` returns a function that runs one whole step on batch `number` and returns the loss. Weights
are random, batches are drawn by their number, so that all sides get the same. Nothing here measures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

RATE = 1e-4
TRAINED = "default"  # name of the adapter
ALPHA_OVER_R = 2
ALL_LINEAR = "all-linear"
TARGETS: dict[str, tuple[int, str | list[str]]] = {
    "smollm2": (16, ALL_LINEAR),
    "smollm2, q and v": (8, ["q_proj", "v_proj"]),
    "gpt2": (8, ["c_attn", "c_proj"]),
}
"""Model -> its measured rank and targets."""
LARGE: dict[str, tuple[int, str | list[str]]] = {"llama-1b": (16, ALL_LINEAR), "llama-8b": (16, ALL_LINEAR)}
"""The same for models that need a GPU."""

LLAMAS: dict[str, dict[str, Any]] = {
    "smollm2": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    },
    "llama-1b": {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
    },
}  # fmt: skip
"""Published sizes of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B."""

GEMM, OURS, OURS_FROZEN, THEIRS_FROZEN = "GEMM baseline", "lorakit", "lorakit, frozen", "transformers, frozen"
PEFT, PEFT_NARROW, PEFT_AUTOCAST = "peft", "peft, adapters in the base's dtype", "peft, bf16 autocast"
FROZEN_SIDES = (GEMM, OURS_FROZEN, THEIRS_FROZEN)
PEFT_SIDES = (PEFT, PEFT_NARROW, PEFT_AUTOCAST)

OPTIMIZATIONS: dict[str, frozenset[str]] = {
    "fused sublayers": frozenset({"decoder layer"}),
    "attention": frozenset({"decoder layer", "attention"}),
    "feed-forward": frozenset({"decoder layer", "feed-forward"}),
    "norms": frozenset({"decoder layer", "norm"}),
    "loss without logits": frozenset({"loss without logits"}),
    "sampled dropout positions": frozenset({"sampled dropout positions"}),
    "autotuning": frozenset({"autotuning"}),
    "compiled kernels": frozenset({"compiled kernels"}),
    "attention kernel": frozenset({"attention kernel"}),
    "low-rank kernel": frozenset({"low-rank kernel"}),
    "saved gate and up": frozenset({"saved gate and up"}),
    "skipped rows in the last layer": frozenset({"skipped rows in the last layer"}),
    "all fused forwards": frozenset({"decoder layer", "attention", "feed-forward", "norm", "loss without logits"}),
}
"""Optimization that can be disabled -> the fused forwards of `accelerate`, and other parts, that are disabled with it:
if attention or feed-forward is the model's own, a sublayer cannot be one function.
"""

Step = Callable[..., float]
"""Number of the batch, and optionally a length other than the job's -> the loss."""


@dataclass(frozen=True)
class Job:
    """Settings of a step.

    Attributes:
        model: "smollm2" (135M), "gpt2" (124M), "llama-1b" or "llama-8b"; after a comma, non-default targets.
        dtype: Dtype of the base.
        rows: Sequences per batch.
        length: Tokens per sequence.
        dropout: Dropout of the adapters.
        base_dropout: Dropout of GPT-2 itself; 0.1 as published.
        checkpointing: Whether to recompute each layer in the backward.
        layers: Fewer layers than the model has, for quick trials.
        device: Device of weights and steps.
        trained: Fraction of the tokens labeled, the last ones of each sequence.
        rank: Rank of the adapters, if not the model's default.
        idle: Additional adapters on "lorakit"'s model that are not trained.
    """

    model: str = "smollm2"
    dtype: str = "bfloat16"
    rows: int = 4
    length: int = 256
    dropout: float = 0.0
    base_dropout: float = 0.0
    checkpointing: bool = False
    layers: int | None = None
    device: str = "cpu"
    trained: float = 1.0
    rank: int | None = None
    idle: int = 0

    @property
    def tokens(self) -> int:
        """Return the tokens of a step."""
        return self.rows * self.length


def prepare(side: str, job: Job, off: Collection[str] = ()) -> tuple[Any, Step]:
    """Return a side's model and its step.

    Args:
        side: One of the names above.
        job: The settings.
        off: Parts to disable in "lorakit", from the values of `OPTIMIZATIONS`.
    """
    import torch

    torch.manual_seed(0)
    model = geometry(job).train()
    return prepared(side, model, job, off)


def prepared(side: str, model: Any, job: Job, off: Collection[str] = ()) -> tuple[Any, Step]:
    """Return the model and its step, like `prepare`, for an existing model, which is modified."""
    if side == GEMM:
        from products import gemm_baseline

        return model, gemm_baseline(model, job)
    if side in (OURS_FROZEN, THEIRS_FROZEN):
        model.requires_grad_(False)
        return model, _frozen(model, job, ours=side == OURS_FROZEN)
    return (model, _ours(model, job, off)) if side == OURS else _peft(model, job, side)


def geometry(job: Job) -> Any:
    """Return a model of published sizes with random weights."""
    import torch
    import transformers

    dtype, positions = getattr(torch, job.dtype), max(job.length, 1024)
    if job.model == "gpt2":
        p, layers = job.base_dropout, job.layers or 12
        config: Any = transformers.GPT2Config(
            n_positions=positions, n_layer=layers, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p, dtype=dtype
        )
    else:
        sizes = LLAMAS[job.model.partition(",")[0]] | ({"num_hidden_layers": job.layers} if job.layers else {})
        config = transformers.LlamaConfig(**sizes, max_position_embeddings=positions, dtype=dtype)
    with torch.device(job.device):
        model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model


def adapter_fields(job: Job) -> dict[str, Any]:
    """Return the fields of a LoraConfig that both libraries accept."""
    usual, targets = (TARGETS | LARGE)[job.model]
    r = job.rank or usual
    return {
        "r": r,
        "lora_alpha": ALPHA_OVER_R * r,
        "lora_dropout": job.dropout,
        "target_modules": targets,
        "task_type": "CAUSAL_LM",
        "fan_in_fan_out": job.model == "gpt2",
    }


def token_ids(model: Any, job: Job, number: int, length: int | None = None) -> Any:
    """Return the token ids of batch `number`, (rows, length), on the CPU."""
    import torch

    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, model.config.vocab_size, (job.rows, length or job.length), generator=generator)


def labels_of(ids: Any, job: Job) -> Any:
    """Return the ids (rows, length) with -100 for unlabeled tokens."""
    labels = ids.clone()
    labels[:, : ids.shape[1] - round(job.trained * ids.shape[1])] = -100
    return labels


def _frozen(model: Any, job: Job, *, ours: bool) -> Step:
    """Return forward and backward to the embedded input, without any adapter."""
    from lorakit.ops.choices import activate
    from lorakit.speed import accelerate, choose

    fast = accelerate(model) if ours else None
    chosen = choose(model, job.tokens, job.length).choices if ours else {}

    def step(number: int) -> float:
        ids = token_ids(model, job, number).to(job.device)
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        with activate(chosen):
            if fast is not None and fast.head is not None:
                labels = labels_of(ids, job)
                trained = (labels[:, 1:] != -100).sum()
                loss = fast.head.loss_sum(model, labels, inputs_embeds=embedded, use_cache=False) / trained
            else:
                loss = model(inputs_embeds=embedded, labels=labels_of(ids, job), use_cache=False).loss
            loss.backward()
        return float(loss.detach())

    return step


def _ours(model: Any, job: Job, off: Collection[str]) -> Step:
    """Return `lorakit train`'s own step."""
    import torch

    from lorakit import core
    from lorakit.config import LoraConfig
    from lorakit.data import Batch
    from lorakit.ops.choices import activate
    from lorakit.speed import choose
    from lorakit.train.loop.optimizer import build_adamw
    from lorakit.train.loop.step import StepOptions, train_step

    config = LoraConfig(**adapter_fields(job))
    core.attach(model, config, TRAINED)
    for number in range(job.idle):  # the first one stays active
        core.attach(model, config, f"idle-{number}")
    if job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": core.checkpoint_contexts(model)})
    named = core.trainable_parameters(model, TRAINED)
    fast = _accelerated(model, off)
    chosen = {} if "autotuning" in off else choose(model, job.tokens, job.length).choices
    device = torch.device(job.device)
    autocast = torch.bfloat16 if device.type != "cpu" and job.dtype == "bfloat16" else None  # as `lorakit train` has it
    optimizer, options = build_adamw(named, RATE, 0.0), StepOptions(device, 1.0, autocast, fast)

    def step(number: int, length: int | None = None) -> float:
        ids = token_ids(model, job, number, length)
        labels = labels_of(ids, job)
        batch = Batch(ids, torch.ones_like(ids), labels, 0.0, ids.numel(), int((labels[:, 1:] != -100).sum()))
        with activate(chosen):
            return train_step(model, named, optimizer, [batch], RATE, options).loss

    return step


def _accelerated(model: Any, off: Collection[str]) -> Any:
    """Accelerate the model, except for the disabled parts."""
    from lorakit.ops import linear
    from lorakit.ops.kernels import compiled
    from lorakit.ops.kernels.building import SWITCH
    from lorakit.speed import accelerate

    if "compiled kernels" in off:
        os.environ[SWITCH] = "off"  # before anything loads them
    kernels = compiled.kernels()
    if kernels is not None:  # the operations have no switch for these, and need none
        kernels.attention = None if "attention kernel" in off else kernels.attention
        kernels.low_rank = None if "low-rank kernel" in off else kernels.low_rank
    fast = accelerate(model, keep_feed_forward="saved gate and up" not in off)
    if "skipped rows in the last layer" in off and fast.head is not None:
        fast.head.last = None
    for recipe, swap in fast.swaps:
        if recipe in off:
            swap.undo()
    if "loss without logits" in off:
        fast = replace(fast, head=None)
    if "sampled dropout positions" in off:  # the operations have no switch for it, and need none
        linear.draw = _mask
    return fast


def _mask(like: Any, p: float) -> Any:
    """Draw a mask for every element of a tensor (any shape), as `torch.nn.functional.dropout` does."""
    import torch

    return torch.empty(like.shape, dtype=torch.bool).bernoulli_(p)


def _peft(model: Any, job: Job, side: str) -> tuple[Any, Step]:
    """Return peft in a plain loop: the model's own loss, clipping, fused AdamW."""
    import contextlib

    import peft
    import torch

    config = peft.LoraConfig(**adapter_fields(job))
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=side != PEFT_NARROW).train()
    if job.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)

    device = torch.device(job.device)

    def step(number: int, length: int | None = None) -> float:
        ids = token_ids(model, job, number, length).to(device)
        narrow = torch.autocast(device.type, torch.bfloat16) if side == PEFT_AUTOCAST else contextlib.nullcontext()
        with narrow:
            labels = labels_of(ids, job)
            loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels, use_cache=False).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return float(loss.detach())

    return model, step
