"""Runs a program of `programs/` in a fresh interpreter, with `peft` installed or really absent."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

import lorakit

PROGRAMS = Path(__file__).parent / "programs"
SOURCES = Path(lorakit.__file__).parent.parent
PACKAGES = Path(torch.__file__).parent.parent


def run(program: str | Path, *arguments: object, peft: bool, links: Path, processes: int = 1) -> list[str]:
    """Run a program and return what it prints: the parts that it completed, one per line.

    Args:
        program: File in `programs/` without its ending, or any file's path.
        arguments: Its arguments.
        peft: Whether the real `peft` can be imported there. Where not, the interpreter sees no site-packages (-S) but a
            folder of links to everything in it except peft and its metadata: nothing is blocked; the package is missing.
        links: Where that folder is made.
        processes: More than one are started together by torch.distributed.run.
    """
    path, flags = [str(SOURCES)], []
    if not peft:
        links = links / "site-packages"  # programs look for this word to know what is installed
        links.mkdir(parents=True)
        for entry in PACKAGES.iterdir():
            if entry.name != "peft" and not entry.name.startswith("peft-"):
                (links / entry.name).symlink_to(entry)
        path, flags = [*path, str(links)], ["-S"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONFAULTHANDLER": "1",  # a process that a signal ends says where it was
    }
    file = program if isinstance(program, Path) else PROGRAMS / f"{program}.py"
    together = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *flags, *together * (processes > 1), str(file), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    ours = [line for line in done.stderr.splitlines() if "UserWarning" in line or "/lorakit/" in line]
    assert not ours, ours
    return [line.removeprefix("ok: ") for line in done.stdout.splitlines() if line.startswith("ok: ")]
