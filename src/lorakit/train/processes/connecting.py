"""Connect the processes of a run, within a time limit.

torch waits without a limit for an answer from a port that another program uses. Therefore each process first checks, in
a thread with a limit, that the first process answers.
"""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from lorakit.errors import RunError
from lorakit.train.processes.launching import Launched, restarts_of

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

_CONNECTING = 5  # seconds for which one attempt to connect waits until the first process listens
_ANSWERING = 15  # seconds more until a connection to a port is known to be one to another program

BROKEN = "MASTER_PORT"
"""Field of the error if the first process was reached or has failed, so that it tells the reason."""

UNREACHABLE = "MASTER_ADDR"
"""Field of the error if the first process was not reached."""


def connect(launched: Launched, seconds: float) -> Store:
    """Start the process group of a run, and return the store that the processes share until they end.

    `seconds` limits the wait for the other processes, now and in each operation of the group.

    Raises:
        RunError: Not all processes could be reached; `field` is `BROKEN` or `UNREACHABLE`.
    """
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
