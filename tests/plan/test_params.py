"""Counts: published values, and equality with what attaching creates."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.architectures.shapes import ModelShape
from lorakit.config import LoraConfig, TaskType
from lorakit.errors import TargetError, UsageError
from lorakit.plan import catalogue, count, params, rank_table

REFERENCE: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": TaskType.CAUSAL_LM,
    "target_modules": ["c_attn", "c_proj"],
}


def gpt2() -> ModelShape:
    shape = catalogue.published("gpt2")
    assert shape is not None
    return shape


def test_the_reference_project() -> None:
    counted = count(gpt2(), LoraConfig(**REFERENCE))
    assert counted.trainable == 811_008
    assert counted.base == 124_439_808
    assert f"{100 * counted.share:.2f}" == "0.65"
    assert [(g.label, g.kind, g.sites, g.each, g.scale) for g in counted.groups()] == [
        ("c_attn", "Conv1D", 12, 24_576, 2.0),
        ("attn.c_proj", "Conv1D", 12, 12_288, 2.0),
        ("mlp.c_proj", "Conv1D", 12, 30_720, 2.0),
    ]
    assert 12 * (24_576 + 12_288 + 30_720) == 811_008


def test_the_rank_table() -> None:
    table = rank_table(gpt2(), LoraConfig(**REFERENCE), [4, 8, 16, 32])
    assert [(row.labels, row.out_features, row.in_features, row.sites, row.each) for row in table.rows] == [
        (("c_attn",), 2304, 768, 12, (12_288, 24_576, 49_152, 98_304)),
        (("attn.c_proj",), 768, 768, 12, (6_144, 12_288, 24_576, 49_152)),
        (("mlp.c_proj",), 768, 3072, 12, (15_360, 30_720, 61_440, 122_880)),
    ]
    assert table.totals == (405_504, 811_008, 1_622_016, 3_244_032)


def test_a_row_of_the_rank_table_is_a_shape() -> None:
    shape = catalogue.published("Llama-3.2-1B")
    assert shape is not None
    table = rank_table(shape, LoraConfig(target_modules="all-linear", rank_pattern={"q_proj": 64}), [8])
    assert [row.labels for row in table.rows] == [
        ("q_proj", "o_proj"),
        ("k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
        ("down_proj",),
    ]
    assert sum(row.sites * row.each[0] for row in table.rows) == table.totals[0]


@pytest.mark.parametrize("ranks", [[], [0], [4, -1]])
def test_ranks_that_cannot_be(ranks: list[int]) -> None:
    with pytest.raises(UsageError, match="one or more positive integers"):
        rank_table(gpt2(), LoraConfig(**REFERENCE), ranks)


def test_a_wrong_name_is_explained() -> None:
    with pytest.raises(TargetError, match="nearest: c_attn"):
        count(gpt2(), LoraConfig(target_modules=["c_atn", "c_proj"]))
    assert count(gpt2(), LoraConfig(target_modules=["c_atn", "c_proj"]), allow_partial=True).missing


def test_a_module_that_cannot_take_lora_is_named() -> None:
    with pytest.raises(TargetError, match=r"transformer.h.0.ln_1.*does not support"):
        count(gpt2(), LoraConfig(target_modules=["ln_1"]))
    with pytest.raises(TargetError, match="container of modules"):
        count(gpt2(), LoraConfig(target_modules=["attn"]))


CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["c_attn", "c_proj"]},
    {"target_modules": "all-linear"},
    {"target_modules": ["wte", "c_fc"]},
    {"target_modules": ["c_attn"], "bias": "all"},
    {"target_modules": ["c_attn"], "bias": "lora_only"},
    {"target_modules": ["c_attn", "c_proj"], "use_dora": True},
    {"target_modules": ["c_attn"], "modules_to_save": ["ln_f", "wpe"]},
    {"target_modules": ["c_attn"], "modules_to_save": ["h.1.mlp"], "bias": "all"},
    {"target_modules": ["c_attn"], "modules_to_save": ["h.1.attn"], "bias": "lora_only"},
    {"target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 3}, "exclude_modules": ["h.0.attn.c_attn"]},
    {"target_modules": ["c_attn"], "layers_to_transform": [1]},
    {"target_modules": r".*\.mlp\.c_(fc|proj)"},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_counts_are_those_of_an_adapted_model(fields: dict[str, Any], tiny_gpt2: Any) -> None:
    from lorakit import core, hub

    shape = hub.shape_of_module(tiny_gpt2, "tiny", "here")
    config = LoraConfig(r=4, **fields)
    report = core.attach(tiny_gpt2, config)
    counted = params.count(shape, config)
    assert counted.trainable == sum(p.numel() for p in tiny_gpt2.parameters() if p.requires_grad)
    assert [(m.path, m.rank) for m in report.matches] == [(s.path, s.rank) for s in counted.sites]


@pytest.mark.parametrize("fields", [{"target_modules": "all-linear"}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_counts_are_those_of_an_adapted_llama(fields: dict[str, Any], tiny_llama: Any) -> None:
    from lorakit import core, hub

    shape = hub.shape_of_module(tiny_llama, "tiny", "here")
    config = LoraConfig(r=4, **fields)
    core.attach(tiny_llama, config)
    trainable = sum(p.numel() for p in tiny_llama.parameters() if p.requires_grad)
    assert params.count(shape, config).trainable == trainable
