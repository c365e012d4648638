"""Memory and communication of each process under DDP, FSDP2 and HSDP."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.config import LoraConfig
from lorakit.plan import Job, Plan, catalogue, estimate
from lorakit.plan.memory import LOADING, OPTIMIZING
from lorakit.plan.parallel import (
    BUCKET_BYTES,
    DDP,
    FSDP,
    HSDP,
    LINKS,
    SUMMING,
    WAYS,
    Cluster,
    RankPlan,
    parts_of_base,
    rank_plan,
)
from lorakit.plan.parallel import tensors_of_base as tensors
from lorakit.plan.params import with_full_modules

CONFIG = LoraConfig(r=16, target_modules="all-linear")


def planned(name: str = "Llama-3.1-8B", config: LoraConfig = CONFIG, **fields: Any) -> Plan:
    shape = catalogue.published(name)
    assert shape is not None
    job = Job(**{"batch_rows": 4, "length_tokens": 512, "accelerated": True, "process_bytes": None, **fields})
    return estimate(shape, config, job)


def ranks(plan: Plan, cluster: Cluster) -> dict[str, RankPlan]:
    return {way: rank_plan(plan, cluster, way) for way in WAYS}


@pytest.mark.parametrize("name", catalogue.names())
def test_the_tensors_are_those_of_the_base(name: str) -> None:
    shape = catalogue.published(name)
    assert shape is not None
    assert sum(rows * columns for _, rows, columns in tensors(shape)) == shape.parameters
    assert sum(parts_of_base(shape, 2, 1).values()) == 2 * shape.parameters
    assert set(parts_of_base(shape, 2, 8)) == {None, *shape.blocks}


def test_parts_are_padded_to_whole_rows() -> None:
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    parts = parts_of_base(shape, 4, 7)
    assert parts[None] == 4 * (-(-49_152 // 7) * 576 + -(-576 // 7))
    by_row = parts_of_base(catalogue.published("gpt2") or shape, 4, 5)["transformer.h.0"]
    sizes = [(768, 2304), (768, 768), (768, 3072), (3072, 768)]  # Conv1D weights are (in, out)
    biases = [2304, 768, 3072, 768]
    assert by_row == 4 * sum([*(-(-rows // 5) * columns for rows, columns in sizes), *(-(-n // 5) for n in biases)]) + (
        4 * 2 * -(-2 * 768 // 5)
    )


def test_one_process_holds_what_the_plan_says_and_sends_nothing() -> None:
    plan = planned()
    alone = rank_plan(plan, Cluster(1), DDP)
    assert (alone.peak_bytes, alone.peak_moment) == (plan.lora.memory.peak_bytes, plan.lora.memory.peak_moment)
    assert alone.traffic.sent_bytes == 0 and alone.held["buffer"] == 0


def test_ddp_holds_everything_and_a_buffer_of_the_last_gradients() -> None:
    plan = planned("SmolLM2-135M", batch_rows=1, length_tokens=16)
    memory = plan.lora.memory
    rank = rank_plan(plan, Cluster(2), DDP)
    assert rank.peak_moment == SUMMING
    assert rank.held["buffer"] == BUCKET_BYTES < memory.bytes_of("gradients")
    assert rank.peak_bytes == sum(memory.sizes_at(OPTIMIZING).values()) + rank.held["buffer"] > memory.peak_bytes
    large = planned()
    assert rank_plan(large, Cluster(2), DDP).peak_bytes == large.lora.memory.peak_bytes


def test_fsdp_holds_a_part_of_the_base_and_the_blocks_in_flight() -> None:
    plan = planned()
    memory, shape = plan.lora.memory, plan.shape
    rank = rank_plan(plan, Cluster(8), FSDP)
    assert rank.held["weights"] == memory.bytes_of("weights") // 8
    block = parts_of_base(shape, 2, 1)["model.layers.0"]
    assert rank.held["gathered"] == parts_of_base(shape, 2, 1)[None] + 2 * block
    for line in memory.lines:
        assert line.cause == "weights" or rank.held[line.cause] == line.at_peak_bytes
    assert rank.peak_bytes == sum(rank.held.values())
    saved = memory.bytes_of("weights") - rank.held["weights"] - rank.held["gathered"]
    assert rank.peak_bytes == memory.peak_bytes - saved


def test_trained_biases_of_the_base_stay_whole() -> None:
    plan = planned("Qwen2.5-7B", LoraConfig(r=16, target_modules="all-linear", bias="all"))
    other = planned("Qwen2.5-7B")
    held = [rank_plan(one, Cluster(8), FSDP).held["weights"] for one in (plan, other)]
    assert held[0] - held[1] == 2 * plan.counted.biases > 0


def test_hsdp_shards_within_a_node() -> None:
    plan, cluster = planned("Llama-3.1-70B"), Cluster(64)
    found = ranks(plan, cluster)
    assert found[HSDP].held["weights"] == rank_plan(plan, Cluster(8), FSDP).held["weights"]
    assert found[FSDP].held["weights"] < found[HSDP].held["weights"] < found[DDP].held["weights"]
    assert found[FSDP].traffic.gather_seconds > found[HSDP].traffic.gather_seconds
    assert len({rank.traffic.reduced_bytes for rank in found.values()}) == 1


def test_a_step_gathers_each_block_twice_per_batch_and_sums_gradients_once() -> None:
    plan, cluster = planned(), Cluster(8)
    parts = parts_of_base(plan.shape, 2, 8)
    blocks = sum(part for block, part in parts.items() if block is not None)
    found = ranks(plan, cluster)
    assert found[FSDP].traffic.gathered_bytes == 7 * (parts[None] + 2 * blocks)
    assert found[DDP].traffic.gathered_bytes == 0
    assert found[DDP].traffic.reduced_bytes == round(2 * 7 / 8 * 4 * plan.counted.trainable)
    again = rank_plan(planned(accumulation=3), cluster, FSDP)
    assert again.traffic.gathered_bytes == 3 * found[FSDP].traffic.gathered_bytes
    assert again.traffic.reduced_bytes == found[FSDP].traffic.reduced_bytes
    recomputing = rank_plan(planned(recompute="layers"), cluster, FSDP)
    assert (
        recomputing.traffic.sent_bytes == found[FSDP].traffic.sent_bytes
    )  # a recomputed block has been gathered already
    rate = LINKS["pcie4"].bytes_per_second
    assert found[FSDP].traffic.gather_seconds == found[FSDP].traffic.gathered_bytes / rate


def test_saved_modules_are_summed_in_the_dtype_of_the_base() -> None:
    config = with_full_modules(CONFIG, ["lm_head"])
    plan = planned("Llama-3.1-8B", config)
    rank = rank_plan(plan, Cluster(2), DDP)
    assert rank.traffic.reduced_bytes == 4 * plan.counted.factors + 2 * plan.counted.copied


def test_a_process_on_a_cpu_holds_the_whole_base_until_the_first_step() -> None:
    plan = planned("SmolLM2-135M", batch_rows=1, length_tokens=16, dtype="float32", process_bytes=560_000_000)
    memory, rank = plan.lora.memory, rank_plan(plan, Cluster(2), FSDP)
    assert memory.peak_moment == rank.peak_moment == LOADING
    assert rank.peak_bytes == memory.peak_bytes
    assert rank.base_bytes < rank.held["weights"] == memory.bytes_of("weights")


def test_the_last_bucket_and_the_first_blocks_are_not_hidden() -> None:
    plan = planned()
    traffic, parts = rank_plan(plan, Cluster(8), FSDP).traffic, parts_of_base(plan.shape, 2, 8)
    rate = LINKS["pcie4"].bytes_per_second
    assert traffic.first_seconds == 7 * (parts[None] + parts["model.layers.0"]) / rate
    assert traffic.last_seconds == 2 * 7 / 8 * BUCKET_BYTES / rate
    assert traffic.backward == plan.lora.flops.backward / plan.lora.flops.total
    assert rank_plan(planned(accumulation=4), Cluster(8), FSDP).traffic.backward == traffic.backward / 4
    small = rank_plan(planned("SmolLM2-135M", LoraConfig(r=1, target_modules=["q_proj"])), Cluster(8), DDP).traffic
    assert small.last_seconds == small.reduce_seconds
