"""Choice of how the base is sharded under a memory limit, and what would fit if nothing does."""

from __future__ import annotations

import json

import pytest

from lorakit.errors import ConfigError, NotYetSupported, UsageError
from lorakit.plan import Job, Speed, catalogue, choose_parallel, estimate
from lorakit.plan.choosing import AUTO
from lorakit.plan.parallel import DDP, FSDP, HSDP, WAYS, Cluster

from .test_parallel import CONFIG, planned, ranks


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
    alone = choose_parallel(plan, Cluster(1), AUTO, 80_000_000_000)
    assert [rank.way for rank in alone.ranks] == [DDP] and "nothing is sent" in alone.reason


@pytest.mark.parametrize(
    ("cluster", "parallel", "kind"),
    [(Cluster(1), HSDP, UsageError), (Cluster(1), FSDP, UsageError), (Cluster(8), "zero3", ConfigError)],
)
def test_ways_that_are_not_possible(cluster: Cluster, parallel: str, kind: type[ConfigError]) -> None:
    with pytest.raises(kind) as caught:
        choose_parallel(planned(), cluster, parallel)
    assert caught.value.field == "parallel" and caught.value.what == parallel


def test_a_quantized_base_is_not_sharded() -> None:
    plan = planned(quantization="nf4", accelerated=False)
    assert [rank.way for rank in choose_parallel(plan, Cluster(8), AUTO, 80_000_000_000).ranks] == [DDP]
    with pytest.raises(NotYetSupported) as unsupported:
        choose_parallel(plan, Cluster(8), FSDP)
    assert unsupported.value.field == "parallel" and "quantized" in str(unsupported.value)
    with pytest.raises(ConfigError) as caught:
        choose_parallel(plan, Cluster(8), AUTO, 4_000_000_000)
    assert "--nproc" not in str(caught.value) and "--quantization" not in str(caught.value)


@pytest.mark.costly(cases=0)
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


@pytest.mark.costly(cases=0)
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
    assert found.scaling(rank) == rank.traffic.scaling(seconds)
    assert found.tokens_per_second(rank) == pytest.approx(8 * 2000 * (found.scaling(rank) or 0))
    values = json.loads(json.dumps(found.as_dict()))
    assert values["parallel"] == "ddp" and values["nodes"] == 1 and values["link"]["name"] == "pcie4"
    by_way = {rank["way"]: rank for rank in values["ranks"]}
    assert by_way["fsdp"]["expected_scaling"] < by_way["ddp"]["expected_scaling"] < 1
    assert by_way["fsdp"]["held"]["weights"] < by_way["ddp"]["held"]["weights"]
    assert choose_parallel(planned(), Cluster(8)).as_dict()["ranks"][0]["expected_scaling"] is None


def test_on_one_node_hsdp_is_fsdp() -> None:
    chosen = choose_parallel(planned(), Cluster(8), HSDP)
    assert chosen.way == FSDP and "the same" in chosen.reason


def test_a_run_whose_base_cannot_be_sharded_replicates_it() -> None:
    plan, obstacle = planned(), "KaSA changes the base's weights"
    chosen = choose_parallel(plan, Cluster(8), AUTO, 80_000_000_000, obstacle=obstacle)
    assert chosen.way == DDP and obstacle in chosen.reason and len(chosen.ranks) == 1
    with pytest.raises(NotYetSupported) as caught:
        choose_parallel(plan, Cluster(8), FSDP, obstacle=obstacle)
    assert obstacle in str(caught.value)


def test_what_does_not_fit_can_be_tried_with_the_least_memory() -> None:
    chosen = choose_parallel(planned(), Cluster(8), AUTO, 2_000_000_000, must_fit=False)
    assert chosen.way == FSDP and chosen.fits(chosen.chosen) is False and "too much" in chosen.reason
