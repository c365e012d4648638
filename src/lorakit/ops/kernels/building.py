"""The C compiler's part: rows.c, with what it includes, becomes a shared library, once for each machine, compiler and
dtype, kept in the cache.

Nothing is downloaded and nothing is installed: it is the C compiler that is there, or none. A library is built beside
its place and then moved to it, so that processes which build at the same time do not disturb each other.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch  # also for its thread library, which must be there before a kernel asks for it

from lorakit.machine import cache_directory

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
    """

    functions: ctypes.CDLL | None
    why: str


@functools.cache
def built(define: str) -> Built:
    """The library of rows.c, built where it is not there yet; a second's work, once in a process at most.

    Args:
        define: A name to define for the preprocessor, or "".
    """
    if os.environ.get(SWITCH, "").lower() == "off":
        return Built(None, f"{SWITCH}=off")
    compiler = _compiler()
    if compiler is None:
        return Built(None, f"no C compiler ({', '.join(COMPILERS)}) is on the path")
    name = f"rows-{_key(compiler, define)}.so"
    reasons = []
    for folder in (cache_directory() / "kernels", Path(tempfile.gettempdir()) / f"lorakit-{_user()}"):
        path = folder / name
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
                _build(compiler, define, path)
            _refuse_others(path)
            return Built(ctypes.CDLL(str(path)), f"compiled by {compiler}, kept in {folder}")
        except (OSError, subprocess.SubprocessError) as cause:
            reasons.append(f"{folder}: {_short(cause)}")
    return Built(None, "; ".join(reasons))


def _compiler() -> str | None:
    asked = os.environ.get("CC")
    return next((found for name in ([asked] if asked else COMPILERS) if (found := shutil.which(name))), None)


def _key(compiler: str, define: str) -> str:
    """What a library depends on: the source, the flags, the compiler, and the processor that it is for."""
    told = subprocess.run([compiler, "--version"], capture_output=True, timeout=SECONDS, check=False).stdout
    try:
        cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line[:5].lower() in _FLAGS), "")
        cpu = " ".join(sorted(cpu.split()))
    except OSError:
        cpu = ""
    machine = " ".join((*os.uname()[:1], os.uname().machine)) if hasattr(os, "uname") else ""
    flags = " ".join((*FLAGS, WIDEST, torch.__version__))
    source = b"\0".join(path.read_bytes() for path in sorted(SOURCE.parent.glob("*.[ch]")))
    parts = (source, flags.encode(), compiler.encode(), told, cpu.encode())
    return hashlib.sha256(b"\0".join((*parts, machine.encode(), define.encode()))).hexdigest()[:24]


_FLAGS = ("flags", "featu")


def _build(compiler: str, define: str, path: Path) -> None:
    """Compile into `path`; with threads where PyTorch's own thread library is there to be shared, else without.

    The library must not bring a second thread library: two pools on the same cores wait for each other. So it is linked
    without one, and finds the one that PyTorch has loaded; where that does not have what it needs, it has no threads.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made, whole = Path(scratch) / "rows.o", Path(scratch) / "rows.so"
        defines = [f"-D{define}"] if define else []
        for threads, width in (("-fopenmp", WIDEST), ("-fopenmp", ""), ("-fopenmp-simd", ""), ("", "")):
            flags = [*FLAGS, *(flag for flag in (threads, width) if flag), *defines]
            if not _runs([compiler, *flags, "-c", str(SOURCE), "-o", str(made)]):
                continue
            if _runs([compiler, "-shared", str(made), "-lm", "-o", str(whole)]) and _loads(whole):
                whole.chmod(0o700)
                whole.replace(path)
                return
    raise OSError(f"{compiler} could not compile {SOURCE.name}")


def _runs(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, timeout=SECONDS, check=False).returncode == 0


def _loads(path: Path) -> bool:
    try:
        ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    except OSError:
        return False
    return True


def _refuse_others(path: Path) -> None:
    """A library that another user could have put there is not loaded."""
    if hasattr(os, "getuid") and (path.stat().st_uid not in (os.getuid(), 0) or path.stat().st_mode & 0o022):
        raise OSError(f"{path.name} belongs to another user, or others may write to it")


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else "user"


def _short(cause: BaseException) -> str:
    return str(cause).splitlines()[0] if str(cause) else type(cause).__name__
