"""The C compiler's part: rows.c, with what it includes, becomes a shared library, once for each machine, compiler and
dtype, kept in the cache.

Nothing is downloaded and nothing is installed: it is the C compiler that is there, or none. A library is code, so it is
built and loaded only in a directory that no other user can write to (`lorakit.ops.kernels.private`). It is built in a
private folder next to its final path and then moved there, so that processes that build at once do not disturb each
other. Whatever prevents a library is a reason in `Built`, never an exception.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch  # also for its thread library, which must be there before a kernel asks for it

from lorakit.machine import cache_directory
from lorakit.ops.kernels.private import is_private_file, private_directory

SWITCH = "LORAKIT_KERNELS"
"""Environment variable: "off" leaves everything to PyTorch's own operations."""

SOURCE = Path(__file__).with_name("rows.c")
COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
WIDEST = "-mprefer-vector-width=512"
"""Asked for where the compiler knows it: by default GCC uses half the vectors' width of the processors that have it."""
SECONDS = 120
"""After which a compiler is given up."""


class Built(NamedTuple):
    """A library, or why there is none.

    Attributes:
        functions: Those of the library, or None.
        why: How it was made, or why not; for people.
        lacks_compiler: There is none because no C compiler was found.
    """

    functions: ctypes.CDLL | None
    why: str
    lacks_compiler: bool = False


@functools.cache
def built(define: str) -> Built:
    """The library of rows.c, built where it is not there yet; a second's work, once in a process at most.

    Args:
        define: A name to define for the preprocessor, or "".
    """
    if os.environ.get(SWITCH, "").lower() == "off":
        return Built(None, f"{SWITCH}=off")
    compiler = _compiler()
    if not compiler:
        asked = os.environ.get("CC", "").strip()
        why = f"no C compiler ({asked or ', '.join(COMPILERS)}) is on the path"
        return Built(None, why, lacks_compiler=True)
    try:
        folder = private_directory(cache_directory() / "kernels")
    except OSError as cause:
        return _without(f"{_short(cause)}; set LORAKIT_CACHE to a directory that only you can write to")
    try:
        return Built(_library(compiler, define, folder), f"compiled by {shlex.join(compiler)}, kept in {folder}")
    except (OSError, subprocess.SubprocessError) as cause:
        return _without(_short(cause))


def _without(why: str) -> Built:
    """No library although there is a compiler: also a line in the log, since steps are slower than they could be."""
    logging.getLogger(__name__).warning(
        "lorakit uses PyTorch's operations instead of its faster kernels for CPUs: %s (%s=off omits this message)",
        why,
        SWITCH,
    )
    return Built(None, why)


def _compiler() -> list[str]:
    """The compiler's command, as CC says it, with options or without; empty if there is none."""
    try:
        asked = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quote that is not closed
        return []
    commands = [asked] if asked else [[name] for name in COMPILERS]
    return next(([found, *options] for name, *options in commands if (found := shutil.which(name))), [])


def _library(compiler: list[str], define: str, folder: Path) -> ctypes.CDLL:
    """The library in the private folder; built if it is missing, damaged or not ours alone."""
    path = folder / f"rows-{_key(compiler, define)}.so"
    if is_private_file(path):
        with contextlib.suppress(OSError):
            return ctypes.CDLL(str(path))
    _build(compiler, define, path)
    return ctypes.CDLL(str(path))


def _key(compiler: list[str], define: str) -> str:
    """What a library depends on: the source, the flags, the compiler, and the processor that it is for."""
    told = subprocess.run(
        [*compiler, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False
    ).stdout
    machine = f"{platform.system()} {platform.machine()}"
    flags = " ".join((*FLAGS, WIDEST, torch.__version__))
    source = b"\0".join(path.read_bytes() for path in sorted(SOURCE.parent.glob("*.[ch]")))
    words = (flags, shlex.join(compiler), _instructions(), machine, define)
    return hashlib.sha256(b"\0".join((source, told, *map(os.fsencode, words)))).hexdigest()[:24]


def _instructions() -> str:
    """What the processor can do; the name of the machine if it does not say."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    line = next((line for line in text.splitlines() if line.lower().startswith(_INSTRUCTIONS)), "")
    return " ".join(sorted(line.split())) or platform.node()


_INSTRUCTIONS = ("flags", "features")


def _build(compiler: list[str], define: str, path: Path) -> None:
    """Compile into `path`; with threads where PyTorch's own thread library is there to be shared, else without.

    The library must not bring a second thread library: two pools on the same cores wait for each other. So it is linked
    without one, and finds the one that PyTorch has loaded; where that does not have what it needs, it has no threads.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made, whole = Path(scratch) / "rows.o", Path(scratch) / "rows.so"
        defines = [f"-D{define}"] if define else []
        for threads, width in (("-fopenmp", WIDEST), ("-fopenmp", ""), ("-fopenmp-simd", ""), ("", "")):
            flags = [*FLAGS, *(flag for flag in (threads, width) if flag), *defines]
            if not _runs([*compiler, *flags, "-c", str(SOURCE), "-o", str(made)]):
                continue
            if _runs([*compiler, "-shared", str(made), "-lm", "-o", str(whole)]) and _loads(whole):
                whole.chmod(0o700)
                _flush(whole)
                whole.replace(path)
                return
    raise OSError(f"{shlex.join(compiler)} could not compile {SOURCE.name}, or {path.parent} allows no programs")


def _runs(command: list[str]) -> bool:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False)
    return done.returncode == 0


def _loads(path: Path) -> bool:
    """Whether a library can be loaded, and shows its functions, which an option in CC may hide."""
    try:
        return hasattr(ctypes.CDLL(str(path), mode=os.RTLD_NOW), "rms_forward")
    except OSError:
        return False


def _flush(path: Path) -> None:
    """Write a file through to the disk, so that a crash leaves no library that is half of one."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _short(cause: BaseException) -> str:
    """Return the first line of an error of the operating system or a subprocess, to be quoted in a message."""
    return str(cause).splitlines()[0].removesuffix(".") if str(cause) else type(cause).__name__
