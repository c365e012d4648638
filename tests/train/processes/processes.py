"""Start a program in several processes that find each other through torch's variables, as torchrun starts it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import lorakit

SOURCES = Path(lorakit.__file__).parent.parent
FAULTS = Path(__file__).parent / "faults"


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def environment(rank: int, count: int, port: int) -> dict[str, str]:
    """Return the variables of a process."""
    common = {"PYTHONPATH": f"{SOURCES}{os.pathsep}{FAULTS}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    return {**os.environ, **common, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def begin(
    command: list[str], count: int, own: Sequence[Mapping[str, str]] = (), where: Sequence[Path] = ()
) -> list[subprocess.Popen[str]]:
    """Start a command of Python in several processes, which may have variables and working directories of their own."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={**environment(rank, count, port), **(own[rank] if own else {})},
            cwd=where[rank] if where else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Wait for processes; return the exit code, the output and the messages of each."""
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def start(program: str, *arguments: object, count: int = 2) -> None:
    """Run a program of this folder in several processes, and check that each of them succeeds."""
    command = [str(Path(__file__).with_name(f"{program}.py")), *map(str, arguments)]
    for code, _, messages in end(begin(command, count)):
        assert code == 0, messages
