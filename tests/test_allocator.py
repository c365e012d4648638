"""glibc's malloc is told to keep large blocks by the command line alone, where it can be told, and is left on request."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from lorakit import allocator

GLIBC = platform.libc_ver()[0] == "glibc"
PROGRAM = """
import resource, sys
from lorakit import allocator
print(allocator.keep_large_blocks())
import torch
for _ in range(3): torch.ones(16 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): torch.ones(16 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def told(**environment: str) -> tuple[bool, int]:
    """Whether malloc took it, and the pages that five tensors of 64 MiB, each freed at once, had cleared."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    took, faults = done.stdout.split()
    return took == "True", int(faults)


@pytest.mark.skipif(not GLIBC, reason="glibc alone")
def test_freed_memory_is_used_again() -> None:
    took, faults = told(LORAKIT_ALLOCATOR="")
    stock, more = told(LORAKIT_ALLOCATOR="stock")
    assert (took, stock) == (True, False)
    assert faults * 100 < more


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libjemalloc.so.2")
    assert not allocator.keep_large_blocks()


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not allocator.keep_large_blocks()
