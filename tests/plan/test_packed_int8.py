"""The plan of a base that is multiplied in int8: bytes as stored, FLOPs, and time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lorakit import core, hub
from lorakit.config import LoraConfig
from lorakit.core.int8.quantized_base import base_bytes, quantize_base
from lorakit.core.model.index import AdapterIndex
from lorakit.errors import ConfigError
from lorakit.plan import Job, Speed, catalogue, count, estimate, flops
from lorakit.plan.packed import int8_base

CONFIG = LoraConfig(r=4, target_modules="all-linear")
BATCHES = [{"input_ids": torch.arange(40).reshape(2, 20)}]


@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["tiny_llama", "tiny_gpt2"])
def test_the_bytes_are_those_of_a_quantized_model(
    architecture: str, dtype: str, adapted: bool, request: pytest.FixtureRequest
) -> None:
    model: Any = request.getfixturevalue(architecture).to(getattr(torch, dtype)).requires_grad_(False)
    shape = hub.shape_of_module(model, "tiny", "a test")
    planned = estimate(shape, CONFIG, Job(2, 16, dtype=dtype, base_matmul="int8")).lora.memory
    if adapted:
        core.attach(model, CONFIG)
    made = quantize_base(model, BATCHES)
    assert made.bytes_before == shape.parameters * (4 if dtype == "float32" else 2)
    assert planned.bytes_of("weights") == made.bytes_after == base_bytes(AdapterIndex.of(model))
    assert planned.lines[0].equation == 108


SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
EXPERTS: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4, "head_dim": 8, "pad_token_id": 0},
    "Qwen3Moe": {"num_experts": 4, "head_dim": 8, "moe_intermediate_size": 24},
    "Qwen2Moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "DeepseekV3": {
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", EXPERTS)
def test_the_bytes_of_models_with_experts(family: str, dtype: str) -> None:
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES | EXPERTS[family], num_experts_per_tok=2)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(getattr(torch, dtype)).requires_grad_(False)
    shape = hub.shape_of_module(model, "tiny", "a test")
    planned = estimate(shape, CONFIG, Job(2, 16, dtype=dtype, base_matmul="int8")).lora.memory.bytes_of("weights")
    experts = {name: p for name, p in model.named_parameters() if ".experts." in name or name.endswith(".gate.weight")}
    sites = {site.path for site in int8_base(shape, 2).sites}
    made = quantize_base(model, BATCHES)
    assert set(made.paths) == sites
    buffers = made.bytes_before - shape.parameters * model.dtype.itemsize  # a plan counts parameters
    assert buffers == sum(buffer.nbytes for name, buffer in model.named_buffers() if name.endswith("_bias"))
    assert planned == made.bytes_after - buffers
    after = dict(model.named_parameters())
    assert experts and all(after[name] is p and p.dtype == model.dtype for name, p in experts.items())


def test_the_head_and_the_embedding_are_not_in_int8() -> None:
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    base = int8_base(shape, 2)
    assert base.elements == 106_168_320 and base.rest == 28_346_688
    assert not any("lm_head" in site.path or "embed" in site.path for site in base.sites)


def test_flops_in_int8_take_less_time() -> None:
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    job = Job(4, 256, accelerated=True, base_matmul="int8")
    costs = flops.lora(shape, count(shape, CONFIG), job)
    assert costs.int8 == 2 * 2 * 106_168_320
    assert flops.lora(shape, count(shape, CONFIG), Job(4, 256, recompute="layers", base_matmul="int8")).int8 == (
        3 * 2 * 106_168_320
    )
    plain = flops.lora(shape, count(shape, CONFIG), Job(4, 256, accelerated=True))
    assert plain.int8 == 0 and plain.total == costs.total
    speed = Speed(4e11, threads=2, int8_flops_per_second=8e11)
    assert costs.at_dtype_rate(speed) == costs.total - costs.int8 / 2
    assert costs.at_dtype_rate(Speed(4e11)) == costs.total == plain.at_dtype_rate(speed)
    for accelerated in (True, False):
        seconds = [
            estimate(shape, CONFIG, Job(4, 256, accelerated=accelerated, base_matmul=how), speed).lora.step_seconds
            for how in ("dtype", "int8")
        ]
        assert seconds[0] is not None and seconds[1] is not None and 0.5 * seconds[0] < seconds[1] < 0.9 * seconds[0]


def test_notes_say_int8_and_whether_its_speed_is_known() -> None:
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    job = Job(4, 256, base_matmul="int8")
    assert "multiplied in int8" in " ".join(estimate(shape, CONFIG, job).notes)
    assert "was not measured" in " ".join(estimate(shape, CONFIG, job, Speed(4e11)).notes)
    assert "was not measured" not in " ".join(
        estimate(shape, CONFIG, job, Speed(4e11, int8_flops_per_second=1e12)).notes
    )


@pytest.mark.parametrize(
    ("fields", "keyword"),
    [
        ({"base_matmul": "int4"}, "base_matmul is 'int4'"),
        ({"base_matmul": "int8", "quantization": "nf4"}, "quantization nf4"),
    ],
    ids=["unknown", "quantized"],
)
def test_a_wrong_job_is_an_error(fields: dict[str, str], keyword: str) -> None:
    with pytest.raises(ConfigError, match=keyword) as found:
        Job(**fields)  # type: ignore[arg-type]
    assert found.value.field == "base_matmul"
