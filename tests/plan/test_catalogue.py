"""Every entry compared with its transformers class, built on the meta device."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.architectures.shapes import ModelShape
from lorakit.plan import catalogue

EXPERTS = {
    "Mixtral": "num_local_experts",
    "Qwen3Moe": "num_experts",
    "Olmoe": "num_experts",
    "GptOss": "num_local_experts",
    "Glm4Moe": "n_routed_experts",
}
"""Family with experts -> the field of its config with their number."""


def _of_experts(shape: ModelShape, family: str) -> dict[str, Any]:
    """Return the fields of a config that describe experts."""
    found: dict[str, Any] = {EXPERTS[family]: shape.fused[0][0], "num_experts_per_tok": shape.experts_per_token}
    if family in ("Qwen3Moe", "Glm4Moe"):
        found["moe_intermediate_size"] = shape.intermediate
    if family == "Glm4Moe":
        dense = [s.out_features for s in shape.sites if s.path.endswith("mlp.up_proj")]
        found |= {"first_k_dense_replace": len(dense), "intermediate_size": dense[0], "n_shared_experts": 1}
        found |= {"attention_bias": True, "use_qk_norm": False}
    return found


def _config(shape: ModelShape) -> Any:
    import transformers

    if shape.architecture == "GPT2LMHeadModel":
        return transformers.GPT2Config(n_embd=shape.hidden, n_layer=shape.layers, n_head=shape.heads)
    common = {
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.intermediate,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.positions,
    }
    if shape.architecture == "BertModel":
        return transformers.BertConfig(**common)
    family = shape.architecture.removesuffix("ForCausalLM")
    if family in EXPERTS:
        common |= _of_experts(shape, family)
    if family != "Qwen2":  # its head_dim is always hidden / heads
        common["head_dim"] = shape.head_dim
    config_class = getattr(transformers, f"{family}Config")
    return config_class(**common, num_key_value_heads=shape.kv_heads, tie_word_embeddings=shape.tied)


def on_meta(shape: ModelShape) -> Any:
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, shape.architecture)(_config(shape))


def _found(model: Any) -> tuple[list[tuple[Any, ...]], dict[str, tuple[int, int]]]:
    """Return sites in order as (path, kind, out, in, bias, tied to), and the other owners of parameters."""
    import torch

    owner: dict[int, str] = {}
    sites, others = [], {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        kind = type(module).__name__
        if kind in ("Linear", "Conv1D", "Embedding"):
            rows, columns = module.weight.shape
            out, inner = (rows, columns) if isinstance(module, torch.nn.Linear) else (columns, rows)
            first = owner.setdefault(id(module.weight), path)
            sites.append((path, kind, out, inner, own.get("bias") is not None, None if first == path else first))
        elif own:
            biases = sum(p.numel() for name, p in own.items() if "bias" in name)
            others[path] = (sum(p.numel() for p in own.values()), biases)
    return sites, others


@pytest.mark.parametrize("name", catalogue.names())
def test_an_entry_is_what_transformers_builds(name: str) -> None:
    shape = catalogue.published(name)
    assert shape is not None
    model = on_meta(shape)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.parameters == sum(part.parameters for part in (*shape.sites, *shape.others))
    sites, others = _found(model)
    assert [(s.path, s.kind, s.out_features, s.in_features, s.bias, s.tied_to) for s in shape.sites] == sites
    assert {o.path: (o.parameters, o.biases) for o in shape.others} == others
    biases = sum(s.bias_parameters for s in shape.sites) + sum(o.biases for o in shape.others)
    assert biases == sum(p.numel() for n, p in model.named_parameters() if "bias" in n)
    containers = {path for path, module in model.named_modules() if path and next(module.children(), None) is not None}
    assert set(shape.containers) == containers - others.keys()
    head = model.get_output_embeddings()
    assert {s.path for s in shape.sites if not s.dense} == {
        path
        for path, module in model.named_modules()
        if type(module).__name__ == "Embedding" or (head is not None and module is head)
    }


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gpt2", 124_439_808),
        ("openai-community/gpt2", 124_439_808),
        ("GPT2", 124_439_808),
        ("gpt2-xl", 1_557_611_200),
        ("bert-base", 109_482_240),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("llama-3.1-8b-instruct", 8_030_261_248),
        ("meta-llama/Llama-3.3-70B-Instruct", 70_553_706_496),
        ("Qwen/Qwen2.5-0.5B-Instruct", 494_032_768),
        ("Qwen3-8B", 8_190_735_360),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", 134_515_008),
    ],
)
def test_names_and_hub_ids(name: str, parameters: int) -> None:
    shape = catalogue.published(name)
    assert shape is not None
    assert shape.parameters == parameters


def test_an_unknown_name_is_none() -> None:
    assert catalogue.published("gpt5") is None


def test_no_name_stands_for_two_models() -> None:
    folded = [name.casefold() for name in catalogue.aliases()]
    assert len(folded) == len(set(folded))


def test_every_entry_says_where_it_comes_from() -> None:
    for name in catalogue.names():
        shape = catalogue.published(name)
        assert shape is not None
        assert "config.json of " in shape.source
        assert "/" in shape.source


def test_the_hub_reads_the_same_shape_from_a_module() -> None:
    from lorakit import hub

    experts = ("Mixtral-8x7B-v0.1", "Qwen3-30B-A3B", "OLMoE-1B-7B-0924", "GLM-4.5-Air")
    for name in ("gpt2", "Qwen2.5-0.5B", "Qwen3-0.6B", *experts):
        shape = catalogue.published(name)
        assert shape is not None
        read = hub.shape_of_module(on_meta(shape), "read", "module")
        for field in (
            "parameters", "hidden", "layers", "heads", "kv_heads", "head_dim", "vocab", "tied", "gated", "sites",
            "others", "containers", "causal", "dropouts", "intermediate", "experts_per_token", "active_parameters",
        ):  # fmt: skip
            assert getattr(read, field) == getattr(shape, field), field
