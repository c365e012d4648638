"""Only the command line configures glibc's malloc to keep large blocks, if it is supported and not disabled.

Steps over rows of varying lengths do not take more and more memory: compiled matmuls are evicted.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import subprocess
import sys

import pytest

from lorakit import allocator

STEPS = """
import json, random, sys
from lorakit import allocator
allocator.set_up()
import torch, transformers
from lorakit import core
from lorakit.config import LoraConfig
from lorakit.data.loader import Batch
from lorakit.speed import accelerate
from lorakit.train.loop.optimizer import build_adamw
from lorakit.train.loop.step import StepOptions, train_step

torch.set_num_threads(1)
random.seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
config = transformers.LlamaConfig(vocab_size=256, **sizes, **heads, dtype=torch.bfloat16)
model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
core.attach(model, LoraConfig(r=4, target_modules="all-linear"))
model.train()
named = core.trainable_parameters(model)
optimizer = build_adamw(named, 1e-4, 0.0)
options = StepOptions(torch.device("cpu"), acceleration=accelerate(model))
assert options.acceleration.packs
resident = []
for _ in range(30):
    lengths = [random.randint(20, 200) for _ in range(4)]
    ids = torch.randint(0, 256, (4, max(lengths)))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    batch = Batch(ids, mask, labels, 0.0, sum(lengths), sum(lengths) - 4)
    train_step(model, named, optimizer, [batch], 1e-4, options)
    resident.append(int(open("/proc/self/statm").read().split()[1]) * 4096)
print(json.dumps([resident, torch.ops.mkldnn._is_mkldnn_bf16_supported()]))
"""
GLIBC = platform.libc_ver()[0] == "glibc"
LARGE = """
import torch
from lorakit import allocator
allocator.keep_large_blocks()
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
tensor = torch.ones(64 << 20)
held = resident() - before
del tensor
print(held, resident() - before)
"""
GATHERED = """
import torch
from lorakit import allocator
allocator.{setting}()
def resident(): return int(open("/proc/self/statm").read().split()[1]) * 4096
before = resident()
for _ in range(3):
    gathered = [torch.ones(1 << 20) for _ in range(8)]
    small = [torch.ones(1 << 8) for _ in range(8)]
    del gathered
print(resident() - before)
"""
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
    """Return whether malloc was configured, and the page faults of five tensors of 64 MiB, each freed at once."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    took, faults = done.stdout.split()
    return took == "True", int(faults)


@pytest.mark.skipif(not GLIBC, reason="glibc alone")
def test_the_memory_of_the_largest_tensors_is_returned() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    held, left = map(int, done.stdout.split())
    assert held > 250 << 20
    assert left < 32 << 20


@pytest.mark.costly
@pytest.mark.skipif(not GLIBC, reason="glibc alone")
@pytest.mark.parametrize(("setting", "is_returned"), [("return_large_blocks", True), ("keep_large_blocks", False)])
def test_gathered_weights_of_a_sharded_base_are_returned(setting: str, is_returned: bool) -> None:
    done = subprocess.run(
        [sys.executable, "-c", GATHERED.format(setting=setting)], capture_output=True, text=True, check=True
    )
    assert (int(done.stdout) < 8 << 20) is is_returned


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


def grown(**environment: str) -> int:
    """Return the bytes that a process gained from its tenth to its thirtieth step, each with rows of other lengths."""
    clean = {name: value for name, value in os.environ.items() if name not in allocator.CACHES}
    done = subprocess.run(
        [sys.executable, "-c", STEPS], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    resident, compiled = json.loads(done.stdout.splitlines()[-1])
    if not compiled:
        pytest.skip("this processor's bfloat16 products are not compiled by shape")
    return int(resident[-1] - resident[9])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_steps_over_ever_other_lengths_do_not_take_ever_more() -> None:
    assert grown() < 50e6
    assert (
        grown(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024", LRU_CACHE_CAPACITY="1024") > 150e6
    )  # the user's own values are kept


def test_only_the_bounds_that_nobody_set_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*allocator.CACHES, "DNNL_PRIMITIVE_CACHE_CAPACITY"):
        monkeypatch.setenv(name, "7")  # so that the settings below are undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "9")
    assert allocator.limit_compiled_matmuls()
    assert {name: os.environ[name] for name in allocator.CACHES} == {
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
        "LRU_CACHE_CAPACITY": "9",
    }
    assert not allocator.limit_compiled_matmuls()


def test_the_older_name_of_a_bound_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LRU_CACHE_CAPACITY", "9")
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "")
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    monkeypatch.setenv("DNNL_PRIMITIVE_CACHE_CAPACITY", "300")
    assert not allocator.limit_compiled_matmuls()
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY" not in os.environ


def test_messages_match_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "keep_large_blocks", lambda: False)
    monkeypatch.setattr(allocator, "limit_compiled_matmuls", lambda: True)
    monkeypatch.setattr(allocator, "return_large_blocks", lambda: True)
    assert allocator.set_up() == [allocator.MATMUL_MESSAGE]
    assert allocator.set_up(is_sharded=True) == [allocator.RETURNS_MESSAGE, allocator.MATMUL_MESSAGE]
    assert "the last 128" in allocator.MATMUL_MESSAGE


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallinfo2 is glibc's")
def test_freed_memory_is_counted() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    size, count = 64 << 10, 100  # below the smallest threshold of mmap
    blocks = [libc.malloc(ctypes.c_size_t(size)) for _ in range(count)]
    before = allocator.free_bytes()
    for block in blocks[:-1]:  # the last one keeps the others from being returned to the system
        libc.free(block)
    assert allocator.free_bytes() - before == pytest.approx(size * count, rel=0.05)
    libc.free(blocks[-1])
