"""Properties of this machine: processor, usable cores, memory, allocator, and the cache directory.

On systems other than Linux, most properties are unknown and reported as such.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from lorakit.errors import DiskError

FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "amx_fp16", "bf16", "sve")
"""Processor flags that determine matmul speed; "bf16" and "sve" are ARM flags."""

BF16_UNITS = ("amx_bf16", "avx512_bf16", "bf16")
"""Entries of `FEATURES` that multiply bf16 numbers, fastest first."""

INT8_UNITS = ("amx_int8", "avx512_vnni")
"""Entries of `FEATURES` that multiply int8 numbers, fastest first."""


@dataclass(frozen=True)
class Machine:
    """Resources of the machine that are available to this process.

    Attributes:
        cores: Number of cores that this process may use, limited by its container's quota.
        memory_bytes: Total memory in bytes, or the container's limit if that is lower; None if unknown.
        available_bytes: Memory that can be used without swapping, in bytes; None if unknown.
        allocator: Name of this process's malloc implementation, with ", tuned" appended if its settings were changed.
        load: Load average over the last minute; None if unknown.
    """

    system: str
    cpu: str
    cores: int
    features: tuple[str, ...]
    memory_bytes: int | None
    available_bytes: int | None
    allocator: str
    load: float | None


LIBRARY_VARIABLES = (
    *("MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS", "MKL_DISABLE_FAST_MM", "MKL_NUM_STRIPES", "DNNL_MAX_CPU_ISA"),
    *("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE"),
    *("NVIDIA_TF32_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG", "TORCH_BLAS_PREFER_CUBLASLT"),
)
"""Environment variables with which libraries of PyTorch choose kernels, in addition to `ONEDNN_MAX_CPU_ISA`."""


def library_variables() -> dict[str, str]:
    """Return the variables of `LIBRARY_VARIABLES` that are set, which change the bits of results."""
    return {name: os.environ[name] for name in LIBRARY_VARIABLES if name in os.environ}


def this_machine() -> Machine:
    """Return the current properties of the machine that this process runs on."""
    cpuinfo, meminfo = _read("/proc/cpuinfo"), _read("/proc/meminfo")
    limit = _number(_read("/sys/fs/cgroup/memory.max"))
    memory = _bytes_of(meminfo, "MemTotal")
    available = _bytes_of(meminfo, "MemAvailable")
    if limit is not None and memory is not None and limit < memory:
        memory = limit
        used = _number(_read("/sys/fs/cgroup/memory.current")) or 0
        available = min(available or limit, limit - used)
    return Machine(
        system=f"{platform.system()} {platform.machine()}",
        cpu=cpu_name(cpuinfo) or platform.processor() or "unknown",
        cores=usable_cores(_read("/sys/fs/cgroup/cpu.max")),
        features=cpu_features(cpuinfo),
        memory_bytes=memory,
        available_bytes=available,
        allocator=allocator(_read("/proc/self/maps"), os.environ),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    )


def cpu_name(cpuinfo: str) -> str:
    """Return the processor's name from the contents of /proc/cpuinfo, or an empty string if none is listed."""
    return _value(cpuinfo, "model name")


def cpu_features(cpuinfo: str) -> tuple[str, ...]:
    """Return the entries of `FEATURES` that are listed in the contents of /proc/cpuinfo."""
    flags = set((_value(cpuinfo, "flags") or _value(cpuinfo, "Features")).split())
    return tuple(feature for feature in FEATURES if feature in flags)


def usable_cores(cpu_max: str = "") -> int:
    """Return the number of cores that this process may use; `cpu.max` of its control group is "<quota> <period>"."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _number(cpu_max)
    period = _number(cpu_max.partition(" ")[2]) or 100_000
    return max(1, min(cores, round(quota / period))) if quota else max(1, cores)


def allocator(maps: str, environment: os._Environ[str] | dict[str, str]) -> str:
    """Return "jemalloc", "tcmalloc", "mimalloc", "glibc", "glibc, tuned" or "unknown", by /proc/self/maps."""
    for name in ("jemalloc", "tcmalloc", "mimalloc"):
        if name in maps:
            return name
    if "libc.so" not in maps and "libc-" not in maps:
        return "unknown"
    is_tuned = "glibc.malloc" in environment.get("GLIBC_TUNABLES", "") or "MALLOC_TRIM_THRESHOLD_" in environment
    return "glibc, tuned" if is_tuned else "glibc"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _value(text: str, key: str) -> str:
    """Return the value of the first `key : value` line with this key, or an empty string."""
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def _bytes_of(text: str, key: str) -> int | None:
    kibibytes = _number(_value(text, key))  # the kernel writes "kB"
    return None if kibibytes is None else kibibytes * 1024


def _number(text: str) -> int | None:
    first = text.split()[:1]
    return int(first[0]) if first and first[0].isdigit() else None


def home_directory() -> Path | None:
    """Return the user's home directory, or None if neither HOME nor a passwd entry exists, as in many containers."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def cache_directory() -> Path:
    """Return lorakit's cache directory: `LORAKIT_CACHE` if set, else `lorakit` in `XDG_CACHE_HOME` or in ~/.cache.

    A DiskError if there is no home directory to find it.
    """
    ours, shared = os.environ.get("LORAKIT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if ours:
        try:
            return Path(ours).expanduser()
        except RuntimeError:
            raise DiskError(
                f"LORAKIT_CACHE={ours}: unknown home directory; use an absolute path.", field="LORAKIT_CACHE"
            ) from None
    if shared:
        return Path(shared) / "lorakit"
    home = home_directory()
    if home is None:
        raise DiskError("no home directory for the cache; set LORAKIT_CACHE to a directory.", field="LORAKIT_CACHE")
    return home / ".cache" / "lorakit"


def rss_bytes() -> int:
    """Return this process's current resident set size in bytes, or 0 if the system does not report it."""
    return _bytes_of(_read("/proc/self/status"), "VmRSS") or 0


def peak_rss_bytes() -> int:
    """Return this process's peak resident set size so far, in bytes, or 0 if the system does not report it.

    On Linux, the value is the kernel's high-water mark (VmHWM), which covers only the current program. The value from
    `getrusage` would also include memory that the process used before `exec`.
    """
    peak = _bytes_of(_read("/proc/self/status"), "VmHWM")
    if peak is not None:
        return peak
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


DEVICE_FORM = "auto, cpu, cuda, cuda:N or mps"
"""Allowed values of `--device`, as shown in messages."""


def is_device_name(word: str) -> bool:
    """Return whether a string is a valid value for `--device`, even if this machine lacks the device."""
    return re.fullmatch(r"auto|(cpu|cuda|mps)(:\d+)?", word) is not None
