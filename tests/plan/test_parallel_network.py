"""Bytes of collectives on a ring, rates of links, nodes, and the scaling that follows from them."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from lorakit.errors import ConfigError
from lorakit.plan.parallel import (
    LINKS,
    Cluster,
    Traffic,
    all_gather_bytes,
    all_reduce_bytes,
    link_named,
)


def ring_all_reduce(values: list[list[float]]) -> tuple[list[list[float]], int]:
    """Sum vectors of N processes with N elements each on a ring; also return how many elements each process sent."""
    count, held, sent = len(values), [list(one) for one in values], 0
    for phase in ("reduce-scatter", "all-gather"):
        for turn in range(count - 1):
            at = 0 if phase == "reduce-scatter" else 1
            moving = [
                (rank, (rank - turn + at) % count, held[rank][(rank - turn + at) % count]) for rank in range(count)
            ]
            for rank, index, value in moving:
                other = held[(rank + 1) % count]
                other[index] = other[index] + value if phase == "reduce-scatter" else value
            sent += 1
    return held, sent


@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_ring_sends_what_the_formula_says(count: int) -> None:
    values = [[float(rank * count + index) for index in range(count)] for rank in range(count)]
    held, sent = ring_all_reduce(values)
    assert all(one == [sum(column) for column in zip(*values, strict=True)] for one in held)
    assert all_reduce_bytes(4 * count, count) == 4 * sent
    assert all_gather_bytes(4, count) == 4 * sent // 2  # the second half of an all-reduce
    assert all_reduce_bytes(100, 1) == all_gather_bytes(100, 1) == 0


def test_links_have_nominal_rates_and_sources() -> None:
    assert LINKS["pcie4"].bytes_per_second == pytest.approx(31.5e9, rel=1e-3)
    assert LINKS["100gbe"].bytes_per_second == 12.5e9
    assert LINKS["nvlink4"].bytes_per_second == 450e9
    assert all(link.name == name and link.source for name, link in LINKS.items())
    assert link_named("PCIe4", "link") is LINKS["pcie4"]
    assert link_named("25GB/s", "link").bytes_per_second == 25e9
    for text in ("usb", "", "0GB/s", "25 apples"):
        with pytest.raises(ConfigError) as caught:
            link_named(text, "network")
        assert caught.value.field == "network" and caught.value.what == text and "pcie4" in caught.value.allowed


def test_processes_fill_nodes() -> None:
    assert (Cluster(4).local, Cluster(4).nodes) == (4, 1)
    assert (Cluster(64).local, Cluster(64).nodes) == (8, 8)
    assert (Cluster(6, 2).local, Cluster(6, 2).nodes) == (2, 3)
    assert Cluster(8).rate == LINKS["pcie4"].bytes_per_second
    assert Cluster(16).rate == LINKS["100gbe"].bytes_per_second
    slow = Cluster(16, link=LINKS["pcie3"], network=LINKS["400gbe"])
    assert slow.rate == LINKS["pcie3"].bytes_per_second
    json.dumps(asdict(slow))


@pytest.mark.parametrize(
    ("processes", "per_node", "field"), [(0, 8, "nproc"), (-1, 8, "nproc"), (4, 0, "gpus_per_node"), (12, 8, "nproc")]
)
def test_bad_numbers_of_processes(processes: int, per_node: int, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Cluster(processes, per_node)
    assert caught.value.field == field
    assert caught.value.what == str(per_node if field == "gpus_per_node" else processes)


def test_communication_hides_behind_computation_except_for_the_ends() -> None:
    traffic = Traffic(
        100, 10, gather_seconds=10.0, first_seconds=1.0, reduce_seconds=2.5, last_seconds=0.5, backward=0.5
    )
    assert traffic.sent_bytes == 110 and traffic.seconds == 12.5
    assert traffic.exposed_seconds(100.0) == traffic.exposed_seconds(11.0) == 1.0 + 0.5
    assert traffic.exposed_seconds(5.0) == 1.0 + 0.5 + (9.0 + 2.0 - 5.0)
    assert traffic.scaling(11.0) == 11.0 / 12.5
    only = Traffic(0, 10, 0.0, 0.0, reduce_seconds=2.5, last_seconds=0.5, backward=0.25)
    assert only.exposed_seconds(8.0) == 0.5  # the last backward pass takes 2 s, like the sum that it hides
    assert only.exposed_seconds(4.0) == 0.5 + (2.0 - 1.0)


@pytest.mark.parametrize("wanted", [0.1, 0.5, 0.8, 0.9, 0.99])
@pytest.mark.parametrize("first", [0.0, 0.5, 3.0])
@pytest.mark.parametrize(("reduced", "last"), [(0.2, 0.1), (0.0, 0.0), (9.0, 0.5)])
def test_the_shortest_computation_for_a_scaling(wanted: float, first: float, reduced: float, last: float) -> None:
    traffic = Traffic(0, 0, 3.0, first, reduced, last, 0.6)
    seconds = traffic.seconds_for(wanted)
    assert traffic.scaling(seconds) >= wanted - 1e-12
    assert traffic.scaling(0.99 * seconds) < wanted
