"""`lorakit train` in two processes: started by `--nproc`, by torchrun's variables, and when one of them is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import lorakit
from lorakit.train.files import checkpoint

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")

PROGRAM = [sys.executable, "-m", "lorakit", "train"]


@pytest.fixture
def arguments(tmp_path: Path, tiny_model_directory: Path) -> list[str]:
    texts = [tmp_path / f"{number}.txt" for number in range(5)]
    for number, path in enumerate(texts):
        path.write_text(f"The quick fox number {number} jumps over {number + 3} lazy dogs. " * 3, encoding="utf-8")
    named = {"model": tiny_model_directory, "output-dir": tmp_path / "run", "max-length": 24, "dtype": "float32"}
    plain = {"device": "cpu", "r": 2, "eval-fraction": 0, "save-steps": 5, "data": texts[0]}
    flags = [f"--{name}={value}" for name, value in {**named, **plain}.items()]
    return [*flags, *(f"--data={path}" for path in texts[1:]), "--no-tuning", "--no-token-cache"]


def begin(arguments: list[str]) -> subprocess.Popen[str]:
    paths = {"PYTHONPATH": str(Path(lorakit.__file__).parent.parent), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [*PROGRAM, *arguments], env={**os.environ, **paths}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def started(launcher: int, rank: int) -> int | None:
    """Return the id of a process that a launcher has started, or None if it has not started yet."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in variables:
            return int(folder.name)
    return None


@pytest.mark.slow
def test_the_first_process_alone_prints(arguments: list[str], tmp_path: Path) -> None:
    process = begin([*arguments, "--nproc=2", "--max-steps=2"])
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out.count("Adapter: ") == out.count("step 2/2") == 1
    assert err == ""
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds processes in /proc")
@pytest.mark.slow
def test_a_killed_process_ends_the_job_with_one_message(arguments: list[str], tmp_path: Path) -> None:
    process = begin([*arguments, "--nproc=2", "--max-steps=1000000"])
    try:
        until = time.monotonic() + 200
        while time.monotonic() < until and process.poll() is None and not checkpoint.newest_valid(tmp_path / "run"):
            time.sleep(0.1)
        victim = started(process.pid, 1)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1
    assert err.count("error:") == 1
    assert "process 1 was killed by SIGKILL" in err
    assert "--resume" in err
    assert checkpoint.newest_valid(tmp_path / "run") is not None
    assert started(process.pid, 0) is None


def test_bad_numbers_and_missing_variables(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorakit import cli

    assert cli.main(["train", *arguments, "--nproc=0"]) == 2
    assert "nproc is 0" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["train", *arguments]) == 2
    assert "WORLD_SIZE is 2, but RANK, MASTER_ADDR, MASTER_PORT is not set" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
