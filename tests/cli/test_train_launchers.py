"""`lorakit train` in two processes under each launcher that docs/distributed.md lists, and restarts after a fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.report import read_metrics

from ..train.processes.processes import FAULTS, SOURCES, free_port

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed"),
]

LORAKIT = [sys.executable, "-m", "lorakit"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
ADAPTER = "adapter/adapter_model.safetensors"


@pytest.fixture
def train(tmp_path: Path, tiny_model_directory: Path) -> list[str]:
    """`train` and the flags of a run of six steps with dropout and a checkpoint after every second step."""
    texts = [tmp_path / f"{number}.txt" for number in range(5)]
    for number, path in enumerate(texts):
        path.write_text(f"The quick fox number {number} jumps over {number + 3} lazy dogs. " * 3, encoding="utf-8")
    numbers = {
        "lora-alpha": 8,
        "max-length": 24,
        "max-steps": 6,
        "save-steps": 2,
        "eval-fraction": 0,
        "lora-dropout": 0.2,
    }
    named = {"model": tiny_model_directory, "dtype": "float32", "device": "cpu", **numbers}
    flags = [f"--{name}={value}" for name, value in named.items()] + [f"--data={path}" for path in texts]
    return ["train", *flags, "--no-tuning", "--no-token-cache"]


def start(command: list[str], **variables: str) -> subprocess.Popen[str]:
    common = {"PYTHONPATH": f"{SOURCES}{os.pathsep}{FAULTS}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        command, env={**own, **common, **variables}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(*started: subprocess.Popen[str]) -> list[tuple[int, str, str]]:
    try:
        said = [process.communicate(timeout=500) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def record_of(folder: Path) -> Any:
    return json.loads((folder / "run.json").read_text())


def check_finished(folder: Path, out: str, restarts: int = 0) -> None:
    record = record_of(folder)
    assert (record["status"], record["processes"]["count"]) == ("finished", 2)
    assert (record["launch"] or {"restarts": 0})["restarts"] == restarts
    assert [row["step"] for row in read_metrics(folder).train] == list(range(1, 7))
    assert out.count("Adapter: ") == 1


def test_restarts_give_the_same_bits(train: list[str], tmp_path: Path) -> None:
    nproc = [*LORAKIT, *train, "--nproc=2"]
    ((code, out, messages),) = end(start([*nproc, f"--output-dir={tmp_path / 'whole'}"]))
    assert (code, messages) == (0, "")
    check_finished(tmp_path / "whole", out)
    expected = (tmp_path / "whole" / ADAPTER).read_bytes()

    again = [*nproc, "--max-restarts=1", f"--output-dir={tmp_path / 'run'}"]
    ((code, out, messages),) = end(start(again, FAULT="kill 1"))
    assert (code, messages) == (0, ""), messages
    check_finished(tmp_path / "run", out, restarts=1)
    assert "started again (1 time so far)" in out and "checkpoint-2" in out
    assert (tmp_path / "run" / ADAPTER).read_bytes() == expected

    without = ["--save-steps=10" if flag.startswith("--save-steps") else flag for flag in again]
    ((code, out, messages),) = end(start([*without, "--overwrite"], FAULT="kill 0"))
    assert (code, messages) == (0, ""), messages
    check_finished(tmp_path / "run", out, restarts=1)  # without a checkpoint, from the first step
    assert (tmp_path / "run" / ADAPTER).read_bytes() == expected


def test_an_error_that_was_reported_is_not_tried_again(train: list[str], tmp_path: Path) -> None:
    command = [*LORAKIT, *train, "--nproc=2", "--max-restarts=2", f"--output-dir={tmp_path / 'run'}"]
    ((code, _, messages),) = end(start(command, FAULT="nan 1"))
    assert code == messages.count("error: ") == messages.count("\n") == 1, messages
    assert "checkpoint-2" in messages
    assert record_of(tmp_path / "run")["launch"]["restarts"] == 0


def test_torchrun_with_a_restart(train: list[str], tmp_path: Path) -> None:
    flags = ["--nproc-per-node=2", "--max-restarts=1", f"--master-port={free_port()}", "-m", "lorakit", "--"]
    ((code, out, messages),) = end(
        start([*TORCHRUN, *flags, *train, "--r=2", f"--output-dir={tmp_path / 'run'}"], FAULT="kill 1")
    )
    assert code == 0, messages
    check_finished(tmp_path / "run", out, restarts=1)


def test_accelerate(train: list[str], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    flags = ["--multi_gpu", "--num_processes=2", f"--main_process_port={free_port()}", "--module", "lorakit"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *flags]
    ((code, out, messages),) = end(start([*launcher, *train, f"--output-dir={tmp_path / 'run'}"]))
    assert code == 0, messages
    check_finished(tmp_path / "run", out)


def test_the_variables_of_slurm(train: list[str], tmp_path: Path) -> None:
    step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(free_port())}
    command = [*LORAKIT, *train, f"--output-dir={tmp_path / 'run'}"]
    first, second = end(*(start(command, **step, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)) for rank in range(2)))
    assert (first[0], first[2], second) == (0, "", (0, "", ""))
    check_finished(tmp_path / "run", first[1])


NODES = {
    "by rank": "--node-rank=$JOB_COMPLETION_INDEX --master-addr=localhost --master-port=$PORT",
    "by rendezvous": "--rdzv-backend=c10d --rdzv-endpoint=localhost:$PORT --rdzv-id=job7",
}


@pytest.mark.parametrize("how", NODES)
def test_two_nodes(train: list[str], tmp_path: Path, how: str) -> None:
    """Two torchruns on one machine, with the command of a pod of an indexed job."""
    flags = f"--nnodes=2 --nproc-per-node=1 --max-restarts=1 {NODES[how]}"
    shell = f'mkdir -p {tmp_path}/run && exec "$0" -m torch.distributed.run {flags} -m lorakit "$@" --resume'
    command = ["sh", "-c", shell, sys.executable, *train, f"--output-dir={tmp_path / 'run'}"]
    port = str(free_port())
    ends = end(*(start(command, JOB_COMPLETION_INDEX=str(node), PORT=port, FAULT="kill 1") for node in range(2)))
    assert [code for code, _, _ in ends] == [0, 0], ends
    check_finished(tmp_path / "run", "".join(out for _, out, _ in ends), restarts=1)
