"""Let one of several processes fail; Python imports this module at its start if this folder is in PYTHONPATH.

The variable FAULT has the form "NAME RANK": the process with that rank fails in its third step, before the first restart.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

STEP = 3


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def crash() -> None:
    raise RuntimeError("the device is lost")


def in_a_step(fail: Any) -> None:
    from lorakit.train.loop import loop

    step, steps = loop.train_step, [0]

    def train_step(model: Any, named: Any, *others: Any) -> Any:
        steps[0] += 1
        if steps[0] == STEP:
            fail() if fail is not None else named[0][1].data.fill_(float("nan"))
        return step(model, named, *others)

    loop.train_step = train_step


def other_version() -> None:
    from lorakit.train.files import run_folder

    found = run_folder.versions()
    run_folder.versions = lambda: {**found, "transformers": "5.0.0"}


def tell_writes() -> None:
    """Print the path of each file or directory that the process makes in the folder FAULT_FOLDER."""

    def watch(event: str, values: tuple[Any, ...]) -> None:
        is_made = event == "os.mkdir" or (event == "open" and values[2] & os.O_CREAT)
        if is_made and str(values[0]).startswith(os.environ["FAULT_FOLDER"]):
            os.write(2, f"{event} {values[0]}\n".encode())

    sys.addaudithook(watch)


FAULTS = {
    "kill": lambda: in_a_step(kill),
    "stop": lambda: in_a_step(stop),
    "crash": lambda: in_a_step(crash),
    "nan": lambda: in_a_step(None),
    "version": other_version,
    "writes": tell_writes,
}

name, _, rank = os.environ.get("FAULT", "").partition(" ")
if name and os.environ.get("RANK") == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    FAULTS[name]()
