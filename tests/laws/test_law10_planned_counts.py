"""Law 10, for counts: the planned parameter counts equal those that attaching trains, exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core import attach, merge, trainable_parameters
from lorakit.core.optimizers import LoraFA, freeze_factors
from lorakit.core.variants import VARIANTS
from lorakit.errors import ConfigError
from lorakit.hub.shapes import shape_of_module
from lorakit.plan import Job, catalogue, count, estimate
from lorakit.plan.flops import matmuls
from lorakit.targets.resolving import SEVERAL_MODULES, match_path

from .zoo import BERT, GPT2, LLAMA, MIXTRAL, OF_VARIANT, T5, TIED, WITHOUT_A_CASE, Specimen, cased

FIELDS: dict[str, dict[str, Any]] = {
    "mica": {"init_lora_weights": "mica"},
    "plain": {},
    "dora": {"use_dora": True},
    "all-linear": {"target_modules": "all-linear"},
    "patterns": {
        "rank_pattern": {"0": 2, r".*\.1\..*": 3},
        "target_modules": r".*\.(0|1)\..*(q|v|query|c_attn|q_proj)",
    },
    "bias-all": {"bias": "all"},
    "rows": {"trainable_token_indices": [3, 1, 7]},
    "bias-lora-only": {"bias": "lora_only"},
    "bias-of-B": {"lora_bias": True},
}


def trained(model: Any, name: str | None = None) -> int:
    return sum(parameter.numel() for _, parameter in trainable_parameters(model, name))


FIRST, LATER = ([f"{word}.{n}" for word in ("layers", "encoder.layer", "block")] for n in (0, 1))
"""In the paths of the first block, and of the second."""
ON_LINEAR: dict[str, dict[str, Any]] = {
    "kasa": {"kasa_config": {}},
    "qalora": {"use_qalora": True, "qalora_group_size": 2},
    "velora": {"velora_config": {"num_groups": 7}},
    "monteclora": {"monteclora_config": {"num_samples": 3}},
    "bdlora": {"use_bdlora": {"target_modules_bd_a": FIRST, "match_strict": False, "nblocks": 2}},
    "bdlora-b": {"use_bdlora": {"target_modules_bd_b": FIRST, "target_modules_bd_a": LATER, "nblocks": 2}},
    "kasa-bias-of-B": {"kasa_config": {}, "lora_bias": True},
    "bdlora-bias-of-B": {
        "use_bdlora": {"target_modules_bd_a": FIRST, "match_strict": False, "nblocks": 2},
        "lora_bias": True,
    },
}
"""Variants of nn.Linear alone."""


@pytest.mark.parametrize("specimen", [LLAMA, TIED, BERT, T5], ids=str)
@pytest.mark.parametrize("which", ON_LINEAR)
def test_variants_of_linear_layers_are_counted(specimen: Specimen, which: str) -> None:
    model, config = specimen.model(), specimen.config(**ON_LINEAR[which])
    plan = estimate(shape_of_module(model, specimen.name, "here"), config, Job(dtype="float32"), ranks=[config.r])
    assert attach(model, config).trainable_parameters == plan.counted.trainable == trained(model)
    assert sum(group.trainable for group in plan.counted.groups()) == plan.counted.trainable
    assert plan.ranks is not None and plan.ranks.totals == (plan.counted.trainable,)


OF_VARIANT_HERE = {"bdlora": ON_LINEAR["bdlora"], "qalora": ON_LINEAR["qalora"]}
"""Variant -> config fields, where those of the zoo name other modules or do not divide these models' sizes."""


@pytest.mark.parametrize("variant", cased(VARIANTS, OF_VARIANT, WITHOUT_A_CASE))
@pytest.mark.parametrize("optimizer", ["adamw", "lorafa"])
def test_each_variant_is_counted(variant: str, optimizer: str) -> None:
    model, config = LLAMA.model(), LLAMA.config(**OF_VARIANT_HERE.get(variant, OF_VARIANT[variant]))
    shape = shape_of_module(model, "llama", "here")
    plan = estimate(shape, config, Job(optimizer=optimizer, dtype="float32"))
    attach(model, config)
    if optimizer == "lorafa":
        freeze_factors(model)
    assert plan.counted.trainable == trained(model)
    assert plan.lora.memory.bytes_of("gradients") == 4 * trained(model)


@pytest.mark.parametrize("specimen", [GPT2, LLAMA, TIED, BERT, T5], ids=str)
@pytest.mark.parametrize("which", FIELDS)
def test_planned_is_attached(specimen: Specimen, which: str) -> None:
    model = specimen.model()
    config = specimen.config(**FIELDS[which])
    if which == "patterns":
        config.rank_pattern = {r".*\.1\..*": 3}
    shape = shape_of_module(model, specimen.name, "here")
    planned = count(shape, config)
    assert planned.base == sum(parameter.numel() for parameter in model.parameters())
    report = attach(model, config)
    assert planned.trainable == report.trainable_parameters == trained(model)
    assert planned.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert [site.path for site in planned.sites] == [match.path for match in report.matches]
    assert [site.rank for site in planned.sites] == [match.rank for match in report.matches]


@pytest.mark.parametrize("specimen", [GPT2, LLAMA, BERT], ids=str)
@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"target_modules": "embedding"}], ids=str)
def test_lora_fa_trains_one_factor_of_two(specimen: Specimen, fields: dict[str, Any]) -> None:
    model = specimen.model()
    if fields.get("target_modules"):
        fields = {
            "target_modules": [
                "wte" if specimen is GPT2 else "embed_tokens" if specimen is LLAMA else "word_embeddings"
            ]
        }
    config = specimen.config(**fields)
    shape = shape_of_module(model, specimen.name, "here")
    planned, whole = count(shape, config, optimizer="lorafa"), count(shape, config)
    plan = estimate(shape, config, Job(optimizer="lorafa", dtype="float32"))
    attach(model, config)
    held = trained(model)
    pairs = freeze_factors(model)
    assert planned.trainable == trained(model) == held - planned.frozen
    assert planned.saved_parameters == whole.trainable == held
    optimizer = LoraFA([p for _, p in trainable_parameters(model)], pairs)
    for _, parameter in trainable_parameters(model):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    assert plan.lora.memory.bytes_of("optimizer") == sum(t.numel() * t.element_size() for t in moments)
    assert plan.lora.memory.bytes_of("gradients") == 4 * planned.trainable
    assert plan.files[0].size_bytes == 4 * held
    assert plan.files[1].size_bytes == 4 * held + 8 * planned.trainable
    assert plan.lora.flops.backward < estimate(shape, config, Job(dtype="float32")).lora.flops.backward


@pytest.mark.parametrize(
    "fields",
    [
        {"task_type": "SEQ_CLS"},
        {"modules_to_save": ["classifier"], "bias": "all"},
        {"modules_to_save": ["pooler", "word_embeddings"]},
        {"target_modules": ["word_embeddings", "query"]},
        {"task_type": "SEQ_CLS", "bias": "lora_only", "target_modules": ["query", "classifier.dense"]},
    ],
    ids=str,
)
def test_copies_and_embeddings(fields: dict[str, Any]) -> None:
    model = BERT.model()
    config = BERT.config(**fields)
    if "classifier.dense" in (config.target_modules or ()):
        config.target_modules = {"query"}
    planned = count(shape_of_module(model, "bert", "here"), config)
    attach(model, config)
    assert planned.trainable == trained(model) == sum(p.numel() for p in model.parameters() if p.requires_grad)


def test_a_second_adapter_and_a_merge_change_no_count() -> None:
    model, config = GPT2.model(), GPT2.config()
    planned = count(shape_of_module(model, "gpt2", "here"), config).trainable
    attach(model, config, "a")
    attach(model, config, "b")
    merge(model, "a")
    assert trained(model, "a") == trained(model, "b") == planned
    assert trained(model) == 2 * planned


REFERENCE = LoraConfig(
    r=8, lora_alpha=16, lora_dropout=0.05, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM"
)


def test_the_widely_taught_project() -> None:
    """GPT-2 Small, r = 8, c_attn and c_proj: 811,008 of 124,439,808; c_proj names two modules of each block."""
    shape = catalogue.published("gpt2")
    assert shape is not None
    planned = count(shape, REFERENCE)
    assert (planned.trainable, planned.base) == (811_008, 124_439_808)
    assert f"{100 * planned.share:.2f}" == "0.65"


@pytest.mark.parametrize(
    ("r", "c_attn", "c_proj"), [(4, 12_288, 6_144), (8, 24_576, 12_288), (16, 49_152, 24_576), (32, 98_304, 49_152)]
)
def test_counts_by_rank(r: int, c_attn: int, c_proj: int) -> None:
    shape = catalogue.published("gpt2")
    assert shape is not None
    planned = count(shape, LoraConfig(r=r, target_modules=["c_attn", "c_proj"]))
    by_path = {site.path.removeprefix("transformer.h.0."): site.factors for site in planned.sites}
    assert (by_path["attn.c_attn"], by_path["attn.c_proj"]) == (c_attn, c_proj)


def test_the_whole_gpt2_attached() -> None:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config())
    model.tie_weights()
    report = attach(model, REFERENCE)
    assert report.trainable_parameters == trained(model) == 811_008
    per_block = {m.path.split(".", 3)[3]: None for m in report.matches}
    assert list(per_block) == ["attn.c_attn", "attn.c_proj", "mlp.c_proj"]
    assert any(note.kind == SEVERAL_MODULES and "c_proj" in note.text for note in report.notes)


def _qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    experts = {"moe_intermediate_size": 10, "num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": [1]}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, **experts))


def _gpt_oss() -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    return GptOssForCausalLM(GptOssConfig(**sizes, **heads, num_local_experts=3, num_experts_per_tok=2))


EXPERTS = MIXTRAL.parameters
QWEN3_MOE = Specimen("qwen3-moe", _qwen3_moe, ("q_proj",), MIXTRAL.inputs, "", EXPERTS)
GPT_OSS = Specimen("gpt-oss", _gpt_oss, ("q_proj",), MIXTRAL.inputs, "", EXPERTS)
BARE: dict[str, dict[str, Any]] = {
    "experts": {"target_modules": []},
    "experts-and-modules": {"target_parameters": ["gate_up_proj"], "rank_pattern": {"0.mlp.experts.gate_up_proj": 1}},
    "matrices": {"target_modules": [], "target_parameters": ["q_proj.weight", "layers.0.self_attn.k_proj.weight"]},
    "rslora": {"use_rslora": True, "target_modules": "all-linear"},
    "dropout": {"target_modules": ["q_proj"], "lora_dropout": 0.1},
    "mica": {"target_modules": [], "init_lora_weights": "mica"},
}


@pytest.mark.parametrize("specimen", [MIXTRAL, QWEN3_MOE, GPT_OSS], ids=str)
@pytest.mark.parametrize("which", BARE)
def test_bare_parameters_and_experts_are_counted(specimen: Specimen, which: str) -> None:
    model = specimen.model()
    config = specimen.config(**BARE[which])
    shape = shape_of_module(model, specimen.name, "here")
    plan = estimate(shape, config, Job(dtype="float32"), ranks=[config.r])
    planned = plan.counted
    assert planned.base == sum(parameter.numel() for parameter in model.parameters())
    report = attach(model, config)
    assert planned.trainable == report.trainable_parameters == trained(model)
    wanted = {(match_path(match), match.rank) for match in report.matches}
    assert {(site.path, site.rank) for site in planned.sites} == wanted
    assert sum(group.trainable for group in planned.groups()) == planned.trainable
    held = sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    assert plan.lora.memory.bytes_of("adapter") == 4 * held
    assert plan.lora.memory.bytes_of("optimizer") == 2 * plan.lora.memory.bytes_of("gradients") == 8 * trained(model)
    if not config.rank_pattern:
        assert plan.ranks is not None and plan.ranks.totals == (planned.trainable,)


@pytest.mark.parametrize("specimen", [MIXTRAL, QWEN3_MOE, GPT_OSS], ids=str)
def test_lora_fa_of_experts_freezes_what_sees_the_tokens(specimen: Specimen) -> None:
    model = specimen.model()
    config = specimen.config()
    planned = count(shape_of_module(model, specimen.name, "here"), config, optimizer="lorafa")
    attach(model, config)
    frozen = sum(p.numel() for name, p in model.named_parameters() if ".lora_A." in name)
    assert (planned.frozen, planned.trainable) == (frozen, trained(model) - frozen)


def test_experts_cost_what_a_token_passes() -> None:
    """A token uses 2 of 3 experts: FLOPs count these alone, memory and trained parameters count all."""
    shape = shape_of_module(MIXTRAL.model(), "m", "here")
    plan = estimate(shape, MIXTRAL.config(target_modules=[]), Job(2, 8))
    bare = estimate(shape, MIXTRAL.config(target_parameters=[]), Job(2, 8))
    experts = 2 * 2 * (48 * 16 + 16 * 24)
    heads = 2 * 2 * (16 * 16 + 2 * 8 * 16 + 16 * 16) + 2 * 50 * 16
    assert matmuls(shape) == 2 * experts + heads
    added = 2 * 2 * 2 * 4 * ((48 + 16) + (16 + 24))  # layers × experts × FLOPs × rank
    assert plan.lora.flops.forward - bare.lora.flops.forward == added - 2 * 2 * 4 * (16 + 16)
    assert any("each token passes through 2 experts" in note for note in plan.notes)
    assert "2 × 3 experts in one parameter" in " ".join(plan.reasons)


@pytest.mark.parametrize(("specimen", "ranges"), [(LLAMA, [(0, 2), (0, 1)]), (BERT, [(1, 2), (0, 2)])], ids=str)
def test_stacked_layers_are_counted(specimen: Specimen, ranges: list[tuple[int, int]]) -> None:
    model = specimen.model()
    if specimen is BERT:
        model = model.bert
    shape = shape_of_module(model, specimen.name, "here")
    config = specimen.config(layer_replication=ranges)
    planned, base = count(shape, config), sum(parameter.numel() for parameter in model.parameters())
    report = attach(model, config)
    assert planned.base == base
    assert planned.trainable == report.trainable_parameters
    assert [site.path for site in planned.sites] == [match.path for match in report.matches]
    assert estimate(shape, config).counted.trainable == planned.trainable
    with pytest.raises(ConfigError, match=r"\(0, 9\) is out of bounds"):
        count(shape, specimen.config(layer_replication=[(0, 9)]))
