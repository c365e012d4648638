"""Compile rows.c and its headers into a shared library, once per machine, compiler and dtype, and cache the library.

The system's C compiler is used, if there is one. A library contains executable code, so it is built in, and loaded
from, a private directory, in a temporary directory first, so that concurrent builds do not interfere. Failures are
never raised; they are reported in `Built`.

A directory is private if it belongs to the user and has mode 0700, and if each of its parents belongs to the user or to
root and is not writable by others, unless it has the sticky bit, as /tmp: only the owner of an entry can rename or
remove it, and the owner of each entry is checked too. After the check, no other user can replace any part of the path.
It cannot detect mounts over a path, actions by root, or NFSv4 access control lists, which no mode bits reflect.
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
import stat
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch  # also loads torch's thread library, which must be loaded before a kernel uses it

from lorakit.caches import KERNELS
from lorakit.durable import sha256_file

SWITCH = "LORAKIT_KERNELS"
"""Environment variable; "off" disables the compiled kernels."""

SOURCE = Path(__file__).with_name("rows.c")
COMPILERS = ("gcc", "cc", "clang")
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
WIDEST = "-mprefer-vector-width=512"
"""Flag for compilers that support it: by default, GCC uses only half the vector width of AVX-512."""
SECONDS = 120
"""Timeout in seconds for one run of the compiler."""
WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Built(NamedTuple):
    """A loaded library or None, how it was built or why it was not, and whether no C compiler was found."""

    functions: ctypes.CDLL | None
    why: str
    lacks_compiler: bool = False


@functools.cache
def built(define: str) -> Built:
    """Return the library compiled from rows.c with a macro, or "" for none; a missing one is built in seconds."""
    if os.environ.get(SWITCH, "").lower() == "off":
        return Built(None, f"{SWITCH}=off")
    compiler = _compiler()
    if not compiler:
        command = os.environ.get("CC", "").strip()
        why = f"no C compiler ({command or ', '.join(COMPILERS)}) found on PATH"
        return Built(None, why, lacks_compiler=True)
    try:
        folder = private_directory(KERNELS.path())
    except OSError as cause:
        return _without(f"{_short(cause)}; set LORAKIT_CACHE to a directory that only you can write to")
    try:
        return Built(_library(compiler, define, folder), f"compiled by {shlex.join(compiler)}, cached in {folder}")
    except (OSError, subprocess.SubprocessError) as cause:
        return _without(_short(cause))


def _without(why: str) -> Built:
    """Log a warning that the kernels could not be built, and return a `Built` without a library."""
    logging.getLogger(__name__).warning(
        "CPU kernels are not available, falling back to PyTorch: %s (set %s=off to silence this warning)", why, SWITCH
    )
    return Built(None, why)


def _compiler() -> list[str]:
    """Return the compiler command, taken from CC if it is set; return an empty list if no compiler is found."""
    try:
        command = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # unbalanced quote
        return []
    commands = [command] if command else [[name] for name in COMPILERS]
    return next(([path, *options] for name, *options in commands if (path := shutil.which(name))), [])


def _library(compiler: list[str], define: str, folder: Path) -> ctypes.CDLL:
    """Load the library, whose name ends in its hash, or build it if it is missing, damaged or writable by others. A
    damaged library can compute wrong numbers, and loading a truncated one can end the process.
    """
    name = f"rows-{_key(compiler, define)}"
    for path in folder.glob(f"{name}-*.so"):
        with contextlib.suppress(OSError):
            if is_private_file(path) and path.stem == f"{name}-{_hash(path)}":
                return ctypes.CDLL(str(path))
    return ctypes.CDLL(str(_build(compiler, define, folder, name)))


def _hash(path: Path) -> str:
    return sha256_file(path)[:24]


def _key(compiler: list[str], define: str) -> str:
    """Return a hash of everything that a library depends on: the source, flags, compiler and processor."""
    told = subprocess.run(
        [*compiler, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False
    ).stdout
    sources = sorted(SOURCE.parent.glob("*.[ch]"))
    return KERNELS.key(
        source=[[path.name, hashlib.sha256(path.read_bytes()).hexdigest()] for path in sources],
        flags=[*FLAGS, WIDEST],
        compiler=[hashlib.sha256(told).hexdigest(), *compiler],
        instructions=_instructions(),
        system=f"{platform.system()} {platform.machine()}",
        define=define,
        torch=torch.__version__,
    )[:24]


def _instructions() -> str:
    """Return the processor's instruction sets, or the host name if they are unknown."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    line = next((line for line in text.splitlines() if line.lower().startswith(("flags", "features"))), "")
    return " ".join(sorted(line.split())) or platform.node()


def _build(compiler: list[str], define: str, folder: Path, name: str) -> Path:
    """Compile rows.c into `folder`, with threads if PyTorch's thread library can be shared.

    Two thread pools on the same cores would wait for each other, so the library is linked without one and uses that of
    PyTorch. If a required symbol is missing there, rows.c is compiled without threads.
    """
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        compiled, library = Path(scratch) / "rows.o", Path(scratch) / "rows.so"
        defines = [f"-D{define}"] if define else []
        for threads, width in (("-fopenmp", WIDEST), ("-fopenmp", ""), ("-fopenmp-simd", ""), ("", "")):
            flags = [*FLAGS, *(flag for flag in (threads, width) if flag), *defines]
            if not _runs([*compiler, *flags, "-c", str(SOURCE), "-o", str(compiled)]):
                continue
            if _runs([*compiler, "-shared", str(compiled), "-lm", "-o", str(library)]) and _loads(library):
                library.chmod(0o700)
                _flush(library)
                return library.replace(folder / f"{name}-{_hash(library)}.so")
    raise OSError(f"{shlex.join(compiler)} could not compile {SOURCE.name}, or {folder} does not allow executables")


def _runs(command: list[str]) -> bool:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False)
    return done.returncode == 0


def _loads(path: Path) -> bool:
    """Return whether a library can be loaded and exports its functions (compiler options in CC may hide them)."""
    try:
        return hasattr(ctypes.CDLL(str(path), mode=os.RTLD_NOW), "rms_forward")
    except OSError:
        return False


def _flush(path: Path) -> None:
    """Flush a file to disk, so that a crash does not leave a partial library."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _short(cause: BaseException) -> str:
    """Return the first line of an operating system or subprocess error, to include in a message."""
    return str(cause).splitlines()[0].removesuffix(".") if str(cause) else type(cause).__name__


def private_directory(path: Path) -> Path:
    """Return the real path of a directory that only the user can write to, creating missing directories.

    Raises:
        PermissionError: The directory or a parent belongs to another user or is writable by others.
    """
    if not hasattr(os, "geteuid"):
        raise PermissionError(f"{path}: cannot check file owners on this system")
    real = Path(os.path.realpath(path))
    for parent in reversed(real.parents):
        info = _directory(parent)
        if _is_writable_by_others(info) and not info.st_mode & stat.S_ISVTX:
            raise PermissionError(f"{parent}: other users can write to this directory")
    info = _directory(real)
    if info.st_uid != os.geteuid():
        raise PermissionError(f"{real}: this directory belongs to another user")
    if _is_writable_by_others(info):
        raise PermissionError(f"{real}: other users may have written to this directory; remove it")
    if stat.S_IMODE(info.st_mode) != stat.S_IRWXU:
        real.chmod(stat.S_IRWXU)
    return real


def is_private_file(path: Path) -> bool:
    """Return whether a path is a regular file (not a link) owned by the user or root and not writable by others."""
    try:
        info = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(info.st_mode) and info.st_uid in (os.geteuid(), 0) and not info.st_mode & WRITABLE_BY_OTHERS


def _directory(path: Path) -> os.stat_result:
    """Create a directory if it is missing, check that it belongs to the user or root, and return its `lstat` result."""
    if not os.path.lexists(path):
        path.mkdir(mode=stat.S_IRWXU, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(f"{path}: not a directory")
    if info.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{path}: this directory belongs to another user")
    return info


def _is_writable_by_others(info: os.stat_result) -> bool:
    if info.st_mode & stat.S_IWOTH:
        return True
    return bool(info.st_mode & stat.S_IWGRP) and not _is_group_of_one(info.st_gid)


def _is_group_of_one(gid: int) -> bool:
    """Return whether a group is the user's private group, which many systems use with a umask of 002. It is the user's
    primary group, has the user's name, and has no other members; never group 0.
    """
    import grp
    import pwd

    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    is_own = gid != 0 and gid == user.pw_gid and group.gr_name == user.pw_name
    return is_own and set(group.gr_mem) <= {user.pw_name}
