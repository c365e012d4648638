"""What each process holds and sends under DDP, FSDP2 and HSDP, and which of them is chosen for a memory limit."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorakit.config import LoraConfig
from lorakit.errors import ConfigError, UsageError
from lorakit.plan import Job, Plan, Speed, catalogue, choose_parallel, estimate
from lorakit.plan.memory import OPTIMIZING
from lorakit.plan.network import LINKS, Cluster
from lorakit.plan.parallel import AUTO, DDP, FSDP, HSDP, SUMMING, WAYS, RankPlan, parts_of_base, rank_plan
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


def test_ddp_holds_everything_and_a_buffer_when_gradients_are_summed() -> None:
    plan = planned("SmolLM2-135M", batch_rows=1, length_tokens=16)
    memory = plan.lora.memory
    rank = rank_plan(plan, Cluster(2), DDP)
    assert rank.peak_moment == SUMMING
    assert rank.held["buffer"] == memory.bytes_of("gradients") == 4 * plan.counted.trainable
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
    assert recomputing.traffic == found[FSDP].traffic  # a recomputed block has been gathered already
    rate = LINKS["pcie4"].bytes_per_second
    assert found[FSDP].traffic.gather_seconds == found[FSDP].traffic.gathered_bytes / rate


def test_the_first_way_that_fits_is_chosen() -> None:
    plan, cluster = planned("Llama-3.1-70B"), Cluster(64)
    found = ranks(plan, cluster)
    assert found[FSDP].needed_bytes < found[HSDP].needed_bytes < found[DDP].needed_bytes
    for way in WAYS:
        chosen = choose_parallel(plan, cluster, AUTO, found[way].needed_bytes)
        assert chosen.way == chosen.chosen.way == way
        assert chosen.reason.startswith(f"{way}: needs ")
        assert [rank.way for rank in chosen.ranks] == list(WAYS)
        assert [chosen.fits(rank) for rank in chosen.ranks] == [
            WAYS.index(rank.way) >= WAYS.index(way) for rank in chosen.ranks
        ]
    assert "ddp needs" in choose_parallel(plan, cluster, AUTO, found[FSDP].needed_bytes).reason
    assert choose_parallel(plan, cluster, FSDP, found[DDP].needed_bytes).way == FSDP


def test_without_a_limit_nothing_is_sharded_unless_asked() -> None:
    plan = planned()
    chosen = choose_parallel(plan, Cluster(8))
    assert chosen.way == DDP and chosen.fits(chosen.chosen) is None
    assert [rank.way for rank in chosen.ranks] == [DDP, FSDP]  # HSDP needs several nodes
    assert choose_parallel(plan, Cluster(8), FSDP).way == FSDP
    assert [rank.way for rank in choose_parallel(plan, Cluster(1)).ranks] == [DDP]


@pytest.mark.parametrize(
    ("cluster", "parallel", "kind"),
    [(Cluster(8), HSDP, UsageError), (Cluster(1), FSDP, UsageError), (Cluster(8), "zero3", ConfigError)],
)
def test_ways_that_are_not_possible(cluster: Cluster, parallel: str, kind: type[ConfigError]) -> None:
    with pytest.raises(kind) as caught:
        choose_parallel(planned(), cluster, parallel)
    assert caught.value.field == "parallel" and caught.value.what == parallel


def test_a_quantized_base_is_not_sharded() -> None:
    plan = planned(quantization="nf4", accelerated=False)
    assert [rank.way for rank in choose_parallel(plan, Cluster(8), AUTO, 80_000_000_000).ranks] == [DDP]
    with pytest.raises(ConfigError) as caught:
        choose_parallel(plan, Cluster(8), FSDP)
    assert caught.value.field == "parallel" and "quantized" in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        choose_parallel(plan, Cluster(8), AUTO, 4_000_000_000)
    assert "--nproc" not in str(caught.value) and "--quantization" not in str(caught.value)


def test_what_would_fit_is_named_and_fits() -> None:
    plan, cluster = planned("Llama-3.1-70B", batch_rows=8, length_tokens=2048), Cluster(8)
    with pytest.raises(ConfigError) as caught:
        choose_parallel(plan, cluster, AUTO, 40_000_000_000)
    error = caught.value
    assert error.field == "gpu" and error.what == "40.0 GB" and error.exit_code == 2
    text = str(error)
    assert "8 GPUs" in text and "fsdp needs at least" in text and "--quantization" in text
    flags = text.partition("--parallel fsdp --per-device-train-batch-size ")[2].split()
    rows, recompute = int(flags[0]), flags[2]
    fields = {"batch_rows": rows, "length_tokens": 2048, "recompute": recompute}
    assert choose_parallel(planned("Llama-3.1-70B", **fields), cluster, AUTO, 40_000_000_000).way == FSDP
    with pytest.raises(ConfigError) as caught:
        choose_parallel(plan, cluster, DDP, 40_000_000_000)
    assert "ddp needs at least" in str(caught.value) and "fsdp" not in str(caught.value)


@pytest.mark.parametrize(("rows", "limit"), [(1, 24), (8, 24)])
def test_more_processes_are_suggested_if_they_help(rows: int, limit: int) -> None:
    plan, size = planned("Llama-3.1-70B", batch_rows=rows), limit * 1_000_000_000
    with pytest.raises(ConfigError) as caught:
        choose_parallel(plan, Cluster(6), AUTO, size)
    flags = str(caught.value).rpartition("--nproc ")[2].split()
    count, fields = int(flags[0]), {"batch_rows": int(flags[4]), "recompute": flags[6]}
    assert choose_parallel(planned("Llama-3.1-70B", **fields), Cluster(count, 6), AUTO, size).way == FSDP
    with pytest.raises(ConfigError):
        choose_parallel(planned("Llama-3.1-70B", **fields), Cluster(count // 2, 6), AUTO, size)


def test_scaling_follows_from_the_speed_of_one_process() -> None:
    shape = catalogue.published("Llama-3.1-8B")
    assert shape is not None
    plan = estimate(shape, CONFIG, Job(4, 512, process_bytes=None), Speed(tokens_per_second=2000.0))
    found = choose_parallel(plan, Cluster(8), AUTO, 80_000_000_000)
    rank, seconds = found.chosen, 4 * 512 / 2000
    assert found.step_seconds == seconds and found.step_tokens == 8 * 4 * 512
    assert found.scaling(rank) == seconds / (seconds + rank.traffic.seconds)
    assert found.tokens_per_second(rank) == pytest.approx(8 * 2000 * (found.scaling(rank) or 0))
    values = json.loads(json.dumps(found.as_dict()))
    assert values["parallel"] == "ddp" and values["nodes"] == 1 and values["link"]["name"] == "pcie4"
    by_way = {rank["way"]: rank for rank in values["ranks"]}
    assert by_way["fsdp"]["expected_scaling"] < by_way["ddp"]["expected_scaling"] < 1
    assert by_way["fsdp"]["held"]["weights"] < by_way["ddp"]["held"]["weights"]
    assert choose_parallel(planned(), Cluster(8)).as_dict()["ranks"][0]["expected_scaling"] is None


def test_saved_modules_are_summed_in_the_dtype_of_the_base() -> None:
    config = with_full_modules(CONFIG, ["lm_head"])
    plan = planned("Llama-3.1-8B", config)
    rank = rank_plan(plan, Cluster(2), DDP)
    assert rank.traffic.reduced_bytes == 4 * plan.counted.factors + 2 * plan.counted.copied


def test_a_cpu_holds_the_whole_base_until_it_is_sharded() -> None:
    plan = planned("SmolLM2-135M", batch_rows=1, length_tokens=16, process_bytes=560_000_000)
    shape = plan.shape
    rank = rank_plan(plan, Cluster(2), FSDP)
    assert rank.held["weights"] in (2 * shape.parameters, sum(parts_of_base(shape, 2, 2).values()))
    assert rank.held["process"] > 560_000_000
