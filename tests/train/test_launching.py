"""What a process reads from the variables of a launcher, and what the launcher makes of exit codes."""

from __future__ import annotations

import pytest

from lorakit.errors import RunError, UsageError
from lorakit.train.launching import LOST, Launched, _code_of, first_host

TORCH = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n[07-08]"}


def test_one_process() -> None:
    for variables in ({}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}):
        assert Launched.of(variables) == Launched()


def test_variables_of_torchrun() -> None:
    assert Launched.of(TORCH) == Launched(3, 4, 1)
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        with pytest.raises(UsageError, match=name):
            Launched.of({**TORCH, name: ""})
    for name, value in {"WORLD_SIZE": "many", "RANK": "4", "LOCAL_RANK": "-1"}.items():
        with pytest.raises(UsageError) as caught:
            Launched.of({**TORCH, name: value})
        assert caught.value.field == name


def test_variables_of_slurm() -> None:
    found = Launched.of({**SLURM, "SLURM_JOB_ID": "41"})
    assert (found.rank, found.count, found.local_rank) == (3, 4, 1)
    variables = dict(found.variables)
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("n07", "20041")
    assert dict(Launched.of({**SLURM, "MASTER_ADDR": "x"}).variables)["MASTER_ADDR"] == "x"


@pytest.mark.parametrize(
    ("nodes", "host"),
    [("node03", "node03"), ("node[03-05,9],login", "node03"), ("a-b.c,d", "a-b.c"), ("r[1-2].site", "r1.site")],
)
def test_the_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_a_list_without_a_host() -> None:
    with pytest.raises(UsageError, match="MASTER_ADDR"):
        first_host("")


def test_exit_codes() -> None:
    assert _code_of({0: 2}, "") == 2
    for codes, words in {
        ((0, LOST), (1, -9)): "process 1 was killed by SIGKILL",
        ((0, LOST), (1, 3)): "process 1 ended without a message",
        ((0, LOST),): "a process ended without a message",
    }.items():
        with pytest.raises(RunError, match=words):
            _code_of(dict(codes), "")
