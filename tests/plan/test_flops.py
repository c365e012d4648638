"""FLOPs compared with torch's own counter on a small model."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from lorakit.config import LoraConfig
from lorakit.plan import Job, catalogue, count, flops


def test_the_products_of_gpt2_are_twice_its_matrices() -> None:
    shape = catalogue.published("gpt2")
    assert shape is not None
    assert flops.matmuls(shape) == 2 * (12 * 12 * 768 * 768 + 50_257 * 768)


def test_attention_counts_the_keys_a_query_meets() -> None:
    shape = catalogue.published("gpt2")
    assert shape is not None
    assert flops.attention(shape, 1) == 4 * 12 * 768
    assert flops.attention(shape, 255) == 4 * 12 * 768 * 128
    assert flops.attention(dataclasses.replace(shape, causal=False), 255) == 4 * 12 * 768 * 255


def test_lora_saves_a_third_of_full_fine_tuning() -> None:
    shape = catalogue.published("Llama-3.1-8B")
    assert shape is not None
    counted = count(shape, LoraConfig(r=8, target_modules=["q_proj", "v_proj"]))
    job = Job(length_tokens=512)
    ratio = flops.lora(shape, counted, job).total / flops.full(shape, job).total
    assert 0.66 < ratio < 0.68


def test_checkpointing_computes_the_blocks_again() -> None:
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    counted = count(shape, LoraConfig(target_modules="all-linear"))
    plain = flops.lora(shape, counted, Job())
    again = flops.lora(shape, counted, Job(recompute="layers"))
    assert (again.forward, again.backward) == (plain.forward, plain.backward)
    assert again.recomputed == plain.forward - 2 * 49_152 * 576


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], "all-linear"])
def test_forward_and_backward_are_what_torch_counts(targets: Any, tiny_llama: Any) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from lorakit import core, hub

    shape = hub.shape_of_module(tiny_llama, "tiny", "here")
    config = LoraConfig(r=4, target_modules=targets)
    core.attach(tiny_llama, config)
    tiny_llama.train()
    job = Job(batch_rows=2, length_tokens=16, dtype="float32")
    ids = torch.randint(0, 512, (2, 16))
    with FlopCounterMode(display=False) as forward:
        loss = tiny_llama(input_ids=ids, labels=ids, use_cache=False).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    planned = flops.lora(shape, count(shape, config), job)
    outside_attention = 32 * flops.attention(shape, 16)  # the counter does not know the CPU's fused attention
    assert forward.get_total_flops() == pytest.approx(32 * planned.forward - outside_attention)
    # the input of the first block needs no gradient, which the plan does not subtract
    missed = (
        32
        * 2
        * sum(
            s.weight_parameters
            for s in shape.sites
            if s.path.startswith("model.layers.0.self_attn") and "o_proj" not in s.path
        )
    )
    assert backward.get_total_flops() == pytest.approx(32 * planned.backward - 2 * outside_attention - missed, rel=0.03)
