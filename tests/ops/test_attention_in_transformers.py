"""The attention block computes what transformers' own modules do: tiny models, random weights, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lorakit.ops.adapted import Adapted, LowRank
from lorakit.ops.attention_block import SelfAttention, attention_block
from lorakit.ops.attention_pattern import Pattern
from lorakit.ops.norm import Norm
from lorakit.ops.rotary import Rotary

TOKENS, WIDTH = 11, 32
SIZES = {"hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 32, "head_dim": 8}
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Case:
    """A tiny model's config, and its attention in our terms."""

    config: dict[str, Any]
    residual: bool = True
    offset: float = 0.0
    pattern: Callable[[nn.Module], Pattern] = lambda attn: Pattern(scale=attn.scaling)  # type: ignore[assignment]
    names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    half_tables: bool = False  # the module's cos and sin have one column for each pair
    children: tuple[str, str] = ("self_attn", "input_layernorm")


def windowed(attn: nn.Module) -> Pattern:
    cap: Any = getattr(attn, "attn_logit_softcapping", None)
    window: Any = getattr(attn, "sliding_window", None) or getattr(attn.config, "sliding_window", None)
    return Pattern(scale=attn.scaling, window=window, softcap=cap)  # type: ignore[arg-type]


def with_sinks(attn: nn.Module) -> Pattern:
    return replace(windowed(attn), sinks=attn.sinks)  # type: ignore[arg-type]


CASES = {
    "llama": Case({**SIZES, **GROUPED}),
    "qwen2": Case({**SIZES, **GROUPED, "num_attention_heads": 4}),
    "qwen3": Case({**SIZES, **GROUPED}),
    "mistral": Case({**SIZES, **GROUPED, "sliding_window": 4}, pattern=windowed),
    "gemma2": Case(
        {**SIZES, **GROUPED, "sliding_window": 4, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 1.5},
        residual=False,
        offset=1.0,
        pattern=windowed,
    ),
    "gemma3_text": Case({**SIZES, **GROUPED, "sliding_window": 4}, residual=False, offset=1.0, pattern=windowed),
    "olmo2": Case({**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}, residual=False),
    "phi3": Case(
        {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2, "partial_rotary_factor": 0.5, "pad_token_id": 0},
        names=("qkv_proj", "o_proj"),
    ),
    "gpt_oss": Case(
        {**SIZES, **GROUPED, "sliding_window": 4, "num_local_experts": 2, "num_experts_per_tok": 1},
        pattern=with_sinks,
        half_tables=True,
    ),
    "phi": Case(
        {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 4},
        False,
        names=("q_proj", "k_proj", "v_proj", "dense"),
    ),
    "gpt2": Case(
        {"n_embd": WIDTH, "n_head": 4, "n_layer": 2, "vocab_size": 32, "attn_pdrop": 0.0, "resid_pdrop": 0.0},
        names=("c_attn", "c_proj"),
        children=("attn", "ln_1"),
    ),
}


class Made:
    """Return a tiny model with random weights, adapters on the projections of its first layer, and our block of them."""

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.case = CASES[name]
        torch.manual_seed(0)
        config = CONFIG_MAPPING[name](**self.case.config, attn_implementation="eager")
        self.model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
        for parameter in self.model.parameters():
            parameter.normal_(0, 0.3)
        self.model.to(dtype)
        self.layer = self.model.get_submodule("transformer.h" if name == "gpt2" else "model.layers")[0]
        self.attn = getattr(self.layer, self.case.children[0])
        self.norm = getattr(self.layer, self.case.children[1], None)
        self.parts = {name: getattr(self.attn, name) for name in self.case.names}
        self.low = {name: self._low(part, dtype) for name, part in self.parts.items()}
        self.x = torch.randn(2, TOKENS, WIDTH, dtype=dtype).requires_grad_()

    def _low(self, part: Any, dtype: torch.dtype) -> LowRank:
        out, into = part.weight.shape if isinstance(part, nn.Linear) else part.weight.shape[::-1]
        A, B = (torch.randn(shape, dtype=dtype) * 0.3 for shape in ((3, into), (out, 3)))
        return LowRank(A.requires_grad_(), B.requires_grad_(), 0.7)

    def leaves(self) -> list[Tensor]:
        return [self.x, *(t for low in self.low.values() for t in (low.A, low.B))]

    def block(self) -> SelfAttention:
        sites = [
            Adapted(part.weight, part.bias, self.low[name], not isinstance(part, nn.Linear))
            for name, part in self.parts.items()
        ]
        own = [self.described(getattr(self.attn, name, None)) for name in ("q_norm", "k_norm")]
        kv = getattr(self.attn.config, "num_key_value_heads", None) or self.attn.config.num_attention_heads
        return SelfAttention(tuple(sites[:-1]), sites[-1], self.attn.head_dim, kv, self.described(self.norm), *own)

    def described(self, norm: Any) -> Norm | None:
        if norm is None:
            return None
        eps = next(getattr(norm, name) for name in ("eps", "variance_epsilon") if hasattr(norm, name))
        if isinstance(norm, nn.LayerNorm):
            return Norm("layer", norm.weight, getattr(norm, "bias", None), eps)
        return Norm("rms", norm.weight, None, eps, self.case.offset)

    def tables(self) -> tuple[Tensor, Tensor] | None:
        rotary = getattr(self.model.base_model, "rotary_emb", None)
        if rotary is None:
            return None
        targets = torch.arange(TOKENS)[None]
        kinds = (self.attn.layer_type,) if "layer_types" in rotary.__dict__ or hasattr(rotary, "layer_types") else ()
        cos, sin = rotary(self.x, targets, *kinds)
        return cos.detach(), sin.detach()

    def ours(self) -> Tensor:
        made = self.tables()
        if made is not None and self.case.half_tables:
            made = torch.cat((made[0],) * 2, -1), torch.cat((made[1],) * 2, -1)
        turn = None if made is None else Rotary(*made)
        return attention_block(self.x, self.block(), self.case.pattern(self.attn), turn, self.case.residual)

    def theirs(self) -> Tensor:
        """Return the module itself, with W + s·B·A instead of W."""
        weights = {}
        for name, part in self.parts.items():
            low = self.low[name]
            delta = low.scale * low.B @ low.A
            weights[f"{name}.weight"] = part.weight + (delta if isinstance(part, nn.Linear) else delta.t())
        n = self.x if self.norm is None else self.norm(self.x)
        pattern = self.case.pattern(self.attn)
        seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
        if pattern.window is not None:
            seen &= ~torch.ones_like(seen).tril(-pattern.window)
        call: dict[str, Any] = {
            "attention_mask": torch.zeros(1, 1, TOKENS, TOKENS).to(n).masked_fill(~seen, -torch.inf)
        }
        if self.tables() is not None:
            call["position_embeddings"] = self.tables()
        y = torch.func.functional_call(self.attn, weights, (n,), call)[0]
        return self.x + y if self.case.residual else y


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_module(name: str, dtype: torch.dtype) -> None:
    made = Made(name, dtype)
    torch.manual_seed(1)
    weight = torch.randn(2, TOKENS, WIDTH, dtype=dtype)
    found = [[out, *torch.autograd.grad(out, made.leaves(), weight)] for out in (made.ours(), made.theirs())]
    for ours, theirs in zip(*found, strict=True):
        # norms and rotary embeddings of many models compute in fp32 even if the model is in float64
        assert torch.linalg.vector_norm(ours - theirs) <= 5e-6 * torch.linalg.vector_norm(theirs)
