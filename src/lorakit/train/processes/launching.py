"""Start `lorakit train` in several processes, and read what a launcher told a process about itself.

Launchers pass the number of a process (its rank), the number of processes and the address of the first one in
environment variables: torchrun and accelerate with torch's names, SLURM's `srun` with its own. This module does not
import torch before processes are started or connected.

torch's elastic launcher starts all processes again, up to a limit, if one of them fails. Processes that `launch`
started therefore do not fail after a reported error, which would occur again: the first one writes its exit code to a
file, and `launch` returns it.

torch waits without a limit for an answer from a port that another program uses. Therefore each process first checks, in
a thread with a limit, that the first process answers.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.errors import RunError, UsageError
from lorakit.terminal import working, write_line

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

LOST = 76
"""Exit code with which a process tells `launch` that another process ended."""

PROCESS_ENDED = "processes"
"""Field of the error that a process raises if another one has ended."""

PATIENCE = 600
"""Seconds for which a process waits for the others by default: torch's limit for NCCL, and more than a step, an
evaluation or a checkpoint should take in one process while the others wait."""

_CONNECTING = 5  # seconds for which one attempt to connect waits until the first process listens
_ANSWERING = 15  # seconds more until a connection to a port is known to be one to another program

BROKEN = "MASTER_PORT"
"""Field of the error if the first process was reached or has failed, so that it tells the reason."""

UNREACHABLE = "MASTER_ADDR"
"""Field of the error if the first process was not reached."""

_CODE_FILE = "LORAKIT_EXIT_CODE_FILE"  # variable with the path of the file for the exit code after a reported error
_OWN = "lorakit-"  # beginning of the id of a job that `launch` started
_FIRST_PORT, _PORTS = 20_000, 20_000


@dataclass(frozen=True)
class Launched:
    """The place of this process among those that were started together.

    Attributes:
        rank: Number of the process, from 0.
        count: Number of processes.
        local_rank: Number of the process among those on the same machine, from 0.
        variables: Variables that torch reads to find the other processes.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    variables: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Launched:
        """Read the variables of torchrun or SLURM.

        Raises:
            UsageError: A variable is missing or not a number.
        """
        if _number(environment, "WORLD_SIZE", 1) > 1:
            return _by_torch(environment)
        if _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in environment:
            return _by_slurm(environment)
        return cls()


def job_of(environment: Mapping[str, str]) -> str:
    """Return the name of the job that started this process: the same after a restart, and another for another job.

    It is the id that the launcher was given or has chosen; without an id, this machine's name and the launcher's
    process id; "" if the launcher is not torch's.
    """
    job = _text(environment, "TORCHELASTIC_RUN_ID")
    return f"{socket.gethostname()}:{os.getppid()}" if job == "none" else job


def restarts_of(environment: Mapping[str, str]) -> int:
    """Return how often torch's launcher has started the processes again, as known on this machine.

    Raises:
        UsageError: The variable is not a number.
    """
    return _number(environment, "TORCHELASTIC_RESTART_COUNT", 0)


def is_first(environment: Mapping[str, str]) -> bool:
    """Return whether this process reports errors, as far as its variables tell: its rank is 0 or unknown."""
    rank = _text(environment, "RANK") or _text(environment, "SLURM_PROCID")
    return not (rank.isdecimal() and int(rank) > 0)


def is_started_by_lorakit() -> bool:
    """Return whether `launch` started this process."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "").startswith(_OWN)


def reported(code: int) -> int:
    """Return the code with which this process must exit, after the command ended with `code` and printed everything.

    That is 0 in the processes that `launch` started: it reads the code of the first one from a file.
    """
    file = os.environ.get(_CODE_FILE, "")
    if code == LOST or not file or not is_started_by_lorakit():
        return code
    if is_first(os.environ):
        Path(file).write_text(str(code), encoding="ascii")
    return 0


def silent_seconds() -> float:
    """Return how long nothing was written before this process started, in seconds: `launch` needs about three."""
    return 3.0 if is_started_by_lorakit() else 0.0


def quiet_torch() -> None:
    """Keep torch, which must not be imported yet, from printing connections that fail; `RunError` tells about them."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def _text(environment: Mapping[str, str], name: str) -> str:
    return environment.get(name, "").strip()


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = _text(environment, name)
    if not text and default is not None:
        return default
    if not text.isdecimal():
        raise UsageError(
            f"{name} is {text!r}; it must be a number, as torchrun sets it.", what=text, field=name, allowed=()
        )
    return int(text)


def _by_torch(environment: Mapping[str, str]) -> Launched:
    count = _number(environment, "WORLD_SIZE")
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not _text(environment, name)]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {count}, but {', '.join(missing)} is not set, so the processes cannot find each other; "
            "start them with torchrun or `lorakit train --nproc N`, or unset WORLD_SIZE.",
            what=count,
            field="WORLD_SIZE",
            allowed=(),
        )
    rank, _ = _number(environment, "RANK"), _number(environment, "MASTER_PORT")
    if rank >= count:
        raise UsageError(f"RANK is {rank}; it must be below WORLD_SIZE, {count}.", what=rank, field="RANK")
    return Launched(rank, count, _number(environment, "LOCAL_RANK", rank))


def _by_slurm(environment: Mapping[str, str]) -> Launched:
    rank, count = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_STEP_NUM_TASKS")
    local = _number(environment, "SLURM_LOCALID", 0)
    nodes = _text(environment, "SLURM_STEP_NODELIST")
    port = _FIRST_PORT + _number(environment, "SLURM_JOB_ID", 0) % _PORTS
    variables = {
        "RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_RANK": str(local),
        "MASTER_ADDR": _text(environment, "MASTER_ADDR") or first_host(nodes),
        "MASTER_PORT": _text(environment, "MASTER_PORT") or str(port),
    }
    return Launched(rank, count, local, tuple(variables.items()))


def first_host(nodes: str) -> str:
    """Return the first host of a list in SLURM's notation, such as "node03" for "node[03-05,9],login".

    Raises:
        UsageError: The list has another form.
    """
    match = re.match(r"([\w.-]+)(?:\[(\w+)[^\]]*\]([\w.-]*))?(?:,|$)", nodes)
    if match is None:
        raise UsageError(
            f"SLURM_STEP_NODELIST is {nodes!r}, which names no host; set MASTER_ADDR to the first host.",
            what=nodes,
            field="SLURM_STEP_NODELIST",
        )
    name, number, rest = match.groups()
    return f"{name}{number or ''}{rest or ''}"


def launch(arguments: Sequence[str], count: int, max_restarts: int, saved: str) -> int:
    """Run `lorakit` in several processes on this machine, with torch's elastic launcher, and wait for their end.

    Args:
        arguments: Arguments of `lorakit`.
        count: Number of processes, at least 2.
        max_restarts: How often all processes are started again after one of them ended without a message.
        saved: Sentence for errors that says how to continue.

    Returns:
        The exit code of the process that has printed the reason.

    Raises:
        RunError: A process ended without a message, for example because it was killed, and no restart is left.
        KeyboardInterrupt: A signal arrived; the processes have finished their step and saved a checkpoint.
    """
    from torch.distributed.elastic.agent.server import api as agent
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"{_OWN}{secrets.token_hex(6)}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
        monitor_interval=0.1,
    )
    for name in ("torch.distributed.elastic", agent.__name__):  # the first process prints the reason
        logging.getLogger(name).setLevel(logging.CRITICAL)
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(_threads_of_each(count))}
    if sys.stderr.isatty():
        write_line(f"starting {count} processes", sys.stderr)
    with tempfile.TemporaryDirectory(prefix=_OWN) as folder:
        file = Path(folder, "exit_code")
        try:
            with _variables({**threads, _CODE_FILE: str(file)}), working(None):  # the first process says what it does
                elastic_launch(config, sys.executable)("-m", "lorakit", *arguments)
        except SignalException:
            raise KeyboardInterrupt("interrupted") from None
        except ChildFailedError as cause:
            if not file.exists():
                codes = {rank: failure.exitcode for rank, failure in cause.failures.items()}
                raise _silent_end(codes, max_restarts, saved) from None
        return int(file.read_text(encoding="ascii")) if file.exists() else 0


def _silent_end(codes: Mapping[int, int], restarts: int, saved: str) -> RunError:
    """Return the error for failed processes, given their exit codes: minus the signal's number after a signal."""
    silent = {rank: code for rank, code in codes.items() if code not in (LOST, -signal.SIGTERM)}
    rank, code = min(silent.items(), key=lambda one: one[1], default=(None, LOST))  # a signal first
    who = "a process" if rank is None else f"process {rank}"
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else "ended without a message"
    after = f" This was after {restarts} restart{'s' if restarts > 1 else ''}." if restarts else ""
    return RunError(f"{who} {how}, so the others were stopped.{after} {saved}", what=rank, field=PROCESS_ENDED)


def _threads_of_each(count: int) -> int:
    """Return the number of threads of one of several processes on this machine."""
    import torch

    return max(1, torch.get_num_threads() // count)


@contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables, which are not set yet, for the processes that are started in a block."""
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def connect(launched: Launched, seconds: float) -> Store:
    """Start the process group of a run, and return the store that the processes share until they end.

    `seconds` limits the wait for the other processes, now and in each operation of the group.

    Raises:
        RunError: Not all processes could be reached; `field` is `BROKEN` or `UNREACHABLE`.
    """
    import torch
    from torch.distributed.distributed_c10d import PrefixStore, init_process_group
    from torch.distributed.rendezvous import rendezvous

    for name, value in launched.variables:
        os.environ[name] = value
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    limit = timedelta(seconds=seconds)
    if torch.cuda.is_available() and launched.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(launched.local_rank)
    if launched.rank > 0 and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ:
        _wait_for_first(launched, address, seconds)
    try:
        common, rank, count = next(rendezvous("env://", launched.rank, launched.count, timeout=limit))
        store = PrefixStore(f"lorakit/{_attempt(common, rank)}", common)
        init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=rank,
            world_size=count,
            timeout=limit,
        )
    except (RuntimeError, ValueError) as cause:
        raise RunError(
            f"process {launched.rank} of {launched.count} cannot reach the others at {address} within {seconds:g} s "
            f"({_first_line(cause)}); check that the port is free, and that every process was started.",
            what=address,
            field=BROKEN,
        ) from cause
    return store


def _attempt(store: Store, rank: int) -> int:
    """Return how often the processes were started before; torch's launcher keeps its store, with old addresses.

    The launcher of each machine counts only the restarts that a process on it has caused. Therefore the arrivals of
    each process are counted, too, which leaves out a process that has ended before.
    """
    return max(restarts_of(os.environ), store.add(f"lorakit/arrivals/{rank}", 1) - 1)


def _first_line(cause: Exception) -> str:
    """Return the first line of an error's message; torch adds its C++ frames below."""
    return next(iter(str(cause).splitlines()), type(cause).__name__).rstrip(".")


def _wait_for_first(launched: Launched, address: str, seconds: float) -> None:
    """Wait until the first process answers.

    Raises:
        RunError: Another program answers, or no answer arrives within the limit.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    host, _, port = address.rpartition(":")
    until = time.monotonic() + seconds

    def attempt(failures: list[Exception]) -> None:
        try:
            TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_CONNECTING))
        except (RuntimeError, ValueError) as cause:
            failures.append(cause)

    while True:
        failures = list[Exception]()
        thread = threading.Thread(target=attempt, args=(failures,), daemon=True)
        thread.start()
        thread.join(min(_CONNECTING, seconds) + _ANSWERING)
        if thread.is_alive():
            text = f"{address} is used by another program, not by process 0; use another MASTER_PORT."
            raise RunError(text, what=address, field=BROKEN)
        if not failures:
            return
        if time.monotonic() > until:
            raise RunError(
                f"process {launched.rank} of {launched.count} cannot reach process 0 at {address} within {seconds:g} s "
                f"({_first_line(failures[0])}); check MASTER_ADDR and MASTER_PORT, and that process 0 runs.",
                what=address,
                field=UNREACHABLE,
            )
