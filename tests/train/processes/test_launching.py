"""Variables that a process reads from a launcher, and the exit code that the launcher derives from its processes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lorakit.errors import RunError, UsageError
from lorakit.train.processes.launching import (
    LOST,
    Launched,
    _silent_end,
    first_host,
    is_first,
    job_of,
    reported,
    restarts_of,
)

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
    for name, value in {"WORLD_SIZE": "many", "RANK": "4", "LOCAL_RANK": "-1", "MASTER_PORT": "http"}.items():
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


def test_a_job_and_its_restarts() -> None:
    assert (job_of({}), restarts_of({})) == ("", 0)
    assert job_of({"TORCHELASTIC_RUN_ID": "nightly"}) == "nightly"
    assert job_of({"TORCHELASTIC_RUN_ID": "none"}).endswith(f":{os.getppid()}")
    assert restarts_of({"TORCHELASTIC_RESTART_COUNT": "2"}) == 2
    with pytest.raises(UsageError) as caught:
        restarts_of({"TORCHELASTIC_RESTART_COUNT": "x"})
    assert caught.value.field == "TORCHELASTIC_RESTART_COUNT"


def test_who_reports() -> None:
    assert all(is_first(one) for one in ({}, {"RANK": "0"}, {"RANK": "x"}, {"RANK": "0", "SLURM_PROCID": "3"}))
    assert not any(is_first(one) for one in ({"RANK": "10"}, {"SLURM_PROCID": "1"}))


def test_the_code_of_a_reported_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "code"
    assert reported(2) == 2
    monkeypatch.setenv("LORAKIT_EXIT_CODE_FILE", str(file))
    monkeypatch.setenv("RANK", "0")
    assert reported(2) == 2  # torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "lorakit-1")
    assert (reported(LOST), file.exists()) == (LOST, False)
    assert (reported(2), file.read_text()) == (0, "2")
    assert (reported(0), file.read_text()) == (0, "0")
    monkeypatch.setenv("RANK", "1")
    assert (reported(1), file.read_text()) == (0, "0")


def test_exit_codes_of_processes_that_did_not_report() -> None:
    for codes, words in {
        ((0, LOST), (1, -9)): "process 1 was killed by SIGKILL",
        ((0, LOST), (1, 3)): "process 1 ended without a message",
        ((0, LOST),): "a process ended without a message",
        ((0, -15), (1, -9)): "process 1 was killed by SIGKILL",
        ((0, -15), (1, LOST)): "a process ended without a message",
    }.items():
        error = _silent_end(dict(codes), 0, "")
        assert isinstance(error, RunError)
        assert words in str(error)
    assert "2 restarts" in str(_silent_end({1: -9}, 2, ""))
