"""Shared by all benchmarks: time a function, summarize the samples, append a row to benchmarks/results/<name>.jsonl.

A row contains the machine, the versions, the commit and the quantiles of what was measured, so that readers can judge a
value. Use it from a script in the same directory:

    from runner import append_row, seconds_of
    append_row("startup", {"what": "import lorakit"}, {"seconds": seconds_of(work, repeats=7)})
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from lorakit.machine import this_machine

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("lorakit", "torch", "transformers", "safetensors", "peft", "numpy", "cyclopts", "triton")
RELEVANT_ENVIRONMENT = (
    "OMP_NUM_THREADS",
    "GLIBC_TUNABLES",
    "LD_PRELOAD",
    "OMP_WAIT_POLICY",
    "GOMP_SPINCOUNT",
    "ONEDNN_MAX_CPU_ISA",
    "CUDA_VISIBLE_DEVICES",
)


def seconds_of(work: Callable[[], object], *, repeats: int, warmup: int = 1) -> list[float]:
    """Return how long each call of `work` takes, after a warm-up.

    Args:
        work: What to measure.
        repeats: Calls that count.
        warmup: Calls before them.

    Returns:
        Seconds, one per counted call.
    """
    for _ in range(warmup):
        work()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        samples.append(time.perf_counter() - start)
    return samples


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Return the quantiles of samples: {"n", "best", "p20", "p50", "p80"}; "best" is the smallest.

    Args:
        samples: At least one value.
    """
    if len(samples) == 1:
        return {"n": 1} | dict.fromkeys(("best", "p20", "p50", "p80"), samples[0])
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    middle = statistics.median(samples)
    return {"n": len(samples), "best": min(samples), "p20": fifths[0], "p50": middle, "p80": fifths[-1]}


def append_row(
    name: str, facts: Mapping[str, Any], samples: Mapping[str, Sequence[float]], *, quiet: bool = False
) -> dict[str, Any]:
    """Append one row to results/<name>.jsonl and print its values.

    Args:
        name: The claim that the row is about; the file's name.
        facts: What was measured and with which settings, as JSON values.
        samples: Measured values by quantity; the quantity's name ends with its unit.
        quiet: Print nothing.

    Returns:
        The row.
    """
    numbers = {quantity: summary(values) for quantity, values in samples.items()}
    row = {**facts, **numbers, **circumstances()}
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")
    about = ", ".join(str(value) for value in facts.values())
    for quantity, number in () if quiet else numbers.items():
        print(f"{name}: {about}: {quantity} p50 {number['p50']:.4g} (p20 {number['p20']:.4g}, p80 {number['p80']:.4g})")
    return row


def circumstances() -> dict[str, Any]:
    """Return when, where and with what a value was measured: time, commit, machine, versions, environment, threads."""
    torch = sys.modules.get("torch")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit_of(RESULTS.parent.parent),
        "machine": asdict(this_machine()) | _gpu(torch),
        "versions": {"python": platform.python_version()} | _versions(),
        "environment": {name: os.environ[name] for name in RELEVANT_ENVIRONMENT if name in os.environ},
        "threads": torch.get_num_threads() if torch else None,
    }


def commit_of(root: Path) -> str:
    """Return the short commit of a directory, with "-dirty" if tracked files other than results were changed.

    Args:
        root: A checkout, or a directory in it, to whose files the changes are limited.
    """

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def _gpu(torch: Any) -> dict[str, Any]:
    has_gpu = torch is not None and torch.cuda.is_available()
    return {"gpu": torch.cuda.get_device_name(0) if has_gpu else None}


def _versions() -> dict[str, str]:
    installed = {
        distribution.metadata["Name"].lower(): distribution.version for distribution in metadata.distributions()
    }
    return {name: installed[name] for name in PACKAGES if name in installed}
