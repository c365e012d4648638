"""Small models whose transformers code and settings are changed, and the comparison of their results."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lorakit import LoraConfig, core

from ..small_models import ENCODER, GROUPED, SMALL, VOCABULARY

TOLERANCE = 1e-4
"""Largest relative difference between equal results. The models are in fp32, in which all fused forwards run."""

MOVED = 10
"""Factor by which the effect of a mutant must exceed the tolerance."""

LARGEST = 1e6
"""Largest absolute value in a plain model with a mutant that counts: squares of larger values overflow in fp32."""

SHAKE = 1e-6
"""Relative change of all weights by which it is measured how much a mutant amplifies rounding errors."""


@dataclass(frozen=True)
class Family:
    """A small model.

    Attributes:
        folder: Name of the folder of transformers that contains its modeling file.
        model: Name of the model's class.
        words: Arguments of its config.
    """

    folder: str
    model: str
    words: Mapping[str, Any]

    @property
    def module(self) -> str:
        return f"transformers.models.{self.folder}.modeling_{self.folder}"

    def build(self, module: ModuleType | None = None) -> Any:
        """Return the model with one adapter, in training mode, built from the classes of a module or of the real one."""
        torch.manual_seed(0)
        kind = getattr(module or importlib.import_module(self.module), self.model)
        return prepared(kind(kind.config_class(**self.words)))


WINDOW = {"sliding_window": 4, "head_dim": 8}
QUERY = {"query_pre_attn_scalar": 16}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
EAGER = {"attn_implementation": "eager"}
GEMMA3 = GROUPED | WINDOW | QUERY | {"layer_types": ["sliding_attention", "full_attention"]}

GPT_OSS = GROUPED | WINDOW | {"num_local_experts": 2, "num_experts_per_tok": 1, "pad_token_id": 0}
MODERNBERT = SMALL | {"pad_token_id": 0, "global_attn_every_n_layers": 2, "local_attention": 6, "cls_token_id": 1}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", GROUPED),
    "llama-eager": Family("llama", "LlamaForCausalLM", GROUPED | EAGER),
    "mistral": Family("mistral", "MistralForCausalLM", GROUPED | {"sliding_window": 4}),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", GROUPED),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", GROUPED | {"head_dim": 16}),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", GROUPED | WINDOW | QUERY | EAGER),
    "gemma3": Family("gemma3", "Gemma3ForCausalLM", GEMMA3),
    "phi3": Family("phi3", "Phi3ForCausalLM", GROUPED | {"pad_token_id": 0}),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", GROUPED),
    "mixtral": Family("mixtral", "MixtralForCausalLM", GROUPED | {"num_local_experts": 2}),
    "gpt_oss": Family("gpt_oss", "GptOssForCausalLM", GPT_OSS),
    "gpt2": Family("gpt2", "GPT2LMHeadModel", GPT2 | NO_DROPOUT),
    "gpt_neox": Family("gpt_neox", "GPTNeoXForCausalLM", SMALL),
    "opt": Family("opt", "OPTForCausalLM", OPT | {"num_hidden_layers": 2, "num_attention_heads": 4}),
    "bert": Family("bert", "BertForMaskedLM", ENCODER),
    "roberta": Family("roberta", "RobertaForMaskedLM", ENCODER),
    "distilbert": Family(
        "distilbert", "DistilBertForMaskedLM", DISTILBERT | {"dropout": 0.0, "attention_dropout": 0.0}
    ),
    "modernbert": Family("modernbert", "ModernBertForMaskedLM", MODERNBERT),
    "t5": Family("t5", "T5ForConditionalGeneration", T5 | {"dropout_rate": 0.0, "decoder_start_token_id": 0}),
}


def prepared(model: Any) -> Any:
    """Attach an adapter to a model and make its weights large enough that each operation has an effect."""
    model.to(torch.float32)
    for one in (model.config, getattr(getattr(model, "decoder", None), "config", None)):
        if hasattr(one, "use_cache"):
            one.use_cache = False  # fused forwards do not support a forward that fills a cache
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_norm = path.endswith("weight") and parameter.ndim == 1
            parameter.copy_(1 + 0.3 * drawn if is_norm else 0.3 * drawn)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    core.attach(model, config, seed=1)
    return model.train()


# ---- results

IDS = torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
PADDING = torch.ones_like(IDS).index_fill_(1, torch.tensor([10, 11]), 0)
ANSWERS = IDS.masked_fill(torch.arange(IDS.shape[1]) < 8, -100).masked_fill(PADDING == 0, -100)
CALLS: tuple[dict[str, Tensor], ...] = (
    {"input_ids": IDS, "labels": IDS},
    {"input_ids": IDS, "labels": ANSWERS, "attention_mask": PADDING},
)

Results = dict[str, Tensor]


def results(model: Any) -> Results:
    """Return the losses, logits and gradients of a step without padding and of one with padding."""
    found: Results = {}
    for target, call in enumerate(CALLS):
        model.zero_grad(set_to_none=True)
        output = model(**call)
        output.loss.backward()
        found[f"loss {target}"] = output.loss.detach().clone()
        if output.logits is not None:
            found[f"logits {target}"] = output.logits.detach().clone()
        for path, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"{path} {target}"] = parameter.grad.clone()
    return found


def difference(ours: Results, theirs: Results) -> float:
    """Return the largest relative difference; a gradient that only one has counts as 0 in the other.

    Logits are compared only if both have them.
    """
    names = {name for name in ours.keys() | theirs.keys() if not name.startswith("logits")}
    names |= {name for name in ours.keys() & theirs.keys() if name.startswith("logits")}
    return max(_difference(ours.get(name), theirs.get(name)) for name in names)


def noise(model: Any, theirs: Results) -> float:
    """Return the relative difference of a plain model's results after a small relative change of its weights.

    The result is infinite if the output of a module exceeds `LARGEST`.
    """
    weights = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    generator = torch.Generator().manual_seed(7)
    kept = [weight.detach().clone() for weight in weights]
    largest = [0.0]

    def watch(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            largest.append(float(output.detach().abs().max()))

    with torch.no_grad():
        for weight in weights:
            weight.mul_(1 + SHAKE * torch.randn(weight.shape, generator=generator))
    handle = register_module_forward_hook(watch)
    try:
        found = difference(results(model), theirs)
    finally:
        handle.remove()
        with torch.no_grad():
            for weight, own in zip(weights, kept, strict=True):
                weight.copy_(own)
    return found if max(largest) <= LARGEST else float("inf")


def _difference(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return 0.0 if not (other if one is None else one).any() else 1.0
    if one.shape != other.shape or not bool(one.isfinite().all()):
        return float("inf")
    return float((one - other).norm()) / max(float(one.norm()), float(other.norm()), 1e-9)


@functools.cache
def usual(family: str) -> Results:
    """Return the results of the plain model without a mutant."""
    return results(FAMILIES[family].build())
