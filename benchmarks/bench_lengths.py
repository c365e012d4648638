"""Claim: a step over rows of varying lengths needs no more memory after many steps than after a few.

    python benchmarks/bench_lengths.py [--steps 40] [--layers 6] [--markdown docs/memory.md]

Each case runs in a new process: a Llama of SmolLM2's widths with few layers, random weights in bfloat16, adapted,
accelerated and trained by lorakit.train's own step on 4 packed rows of 30 to 256 tokens. Measured are the resident size
above what was resident once every weight was touched, and the page faults of a step at the end. Cases differ in malloc
(default, as the command line sets it, the same and trimmed after each step, separate pages for each block above 128
KiB) and in how many compiled matmuls are cached (PyTorch's default, the command line's limits).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resident import resident_with_weights, status
from runner import append_row

from lorakit import allocator

DEFAULT = dict.fromkeys(allocator.CACHES, "1024")
BOUNDED = {name: str(entries) for name, entries in allocator.CACHES.items()}
PINNED = {"MALLOC_MMAP_THRESHOLD_": "131072"}
CASES: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("default", "1,024", DEFAULT),
    ("kept", "1,024", DEFAULT),
    ("kept", "bounded", BOUNDED),
    ("kept, trimmed after each step", "bounded", BOUNDED),
    ("separate pages for each block", "bounded", BOUNDED | PINNED),
)
ROWS, SHORTEST, LONGEST, RANK, VOCABULARY = 4, 30, 256, 8, 16_384
SHOWN = (1, 5, 10, 20, 30, 40, 60, 100, 200)


def measure(malloc: str, environment: dict[str, str], steps: int, layers: int) -> dict[str, list[int]]:
    """Run one case in a new process: bytes and page faults per step, and the peak."""
    command = [sys.executable, __file__, "--child", malloc, "--steps", str(steps), "--layers", str(layers)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{malloc} failed:\n{done.stderr}")
    found: dict[str, list[int]] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(malloc: str, steps: int, layers: int) -> dict[str, list[int]]:
    """Run the steps of one case."""
    import torch

    if malloc.startswith("kept") and not allocator.keep_large_blocks():
        raise SystemExit("malloc of this C library cannot be configured to keep freed memory")
    torch.manual_seed(0)
    random.seed(0)
    model, step = _step(layers)
    held = resident_with_weights(model)
    resident, faults = list[int](), list[int]()
    for _ in range(steps):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step([_batch()])
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        resident.append(status("VmRSS") - held)
        if "trimmed" in malloc:
            ctypes.CDLL(None).malloc_trim(0)
    return {"resident_bytes": resident, "faults": faults, "peak_bytes": [status("VmHWM") - held]}


def _batch() -> Any:
    """Return a batch; most rows are truncated at the maximum, as those of long texts are."""
    import torch

    from lorakit.data.loader import Batch

    lengths = [LONGEST if random.random() < 0.75 else random.randint(SHORTEST, LONGEST) for _ in range(ROWS)]
    longest, tokens = max(lengths), sum(lengths)
    ids = torch.randint(0, VOCABULARY, (ROWS, longest))
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return Batch(ids, mask, ids.masked_fill(mask == 0, -100), 0.0, tokens, tokens - ROWS)


def _step(layers: int) -> tuple[Any, Callable[[list[Any]], object]]:
    """Return a model and a function that trains it for one step."""
    import torch
    import transformers

    from lorakit import core
    from lorakit.config import LoraConfig
    from lorakit.speed import accelerate
    from lorakit.train.loop.optimizer import build_adamw
    from lorakit.train.loop.step import StepOptions, train_step

    widths = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    config = transformers.LlamaConfig(**widths, **heads, dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    core.attach(model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"))
    model.train()
    named = core.trainable_parameters(model)
    optimizer = build_adamw(named, 1e-4, 0.0)
    options = StepOptions(torch.device("cpu"), acceleration=accelerate(model))
    if not options.acceleration.packs:
        raise SystemExit(f"rows are not packed:\n{options.acceleration}")
    return model, lambda batches: train_step(model, named, optimizer, batches, 1e-4, options)


def _markdown(rows: list[dict[str, Any]], steps: int) -> str:
    shown = [step for step in SHOWN if step <= steps]
    lines = [
        f"| malloc | compiled matmuls | {' | '.join(f'step {step}' for step in shown)} | peak | page faults per step |",
        f"|---|---|{'---:|' * (len(shown) + 2)}",
    ]
    for row in rows:
        resident = " | ".join(f"{row['resident_bytes'][step - 1] / 1e6:,.0f} MB" for step in shown)
        last = row["faults"][-10:]
        lines.append(
            f"| {row['malloc']} | {row['products']} | {resident} | {row['peak_bytes'][0] / 1e6:,.0f} MB "
            f"| {sum(last) / len(last):,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--markdown", type=Path, help="also write the table to this file, between its markers")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.steps, arguments.layers)))
        return
    rows = []
    for malloc, products, environment in CASES:
        found = measure(malloc, environment, arguments.steps, arguments.layers)
        facts = {"malloc": malloc, "products": products, "layers": arguments.layers, "steps": arguments.steps}
        first, last = found["resident_bytes"][:1], found["resident_bytes"][-1:]
        samples = {"first_step_bytes": first, "last_step_bytes": last, "peak_bytes": found["peak_bytes"]}
        append_row("lengths", facts, samples | {"faults": found["faults"][-10:]})
        rows.append({**facts, **found})
    table = _markdown(rows, arguments.steps)
    print(table)
    if arguments.markdown:
        begin, end = "<!-- begin: bench_lengths -->", "<!-- end: bench_lengths -->"
        head, _, rest = arguments.markdown.read_text(encoding="utf-8").partition(begin)
        arguments.markdown.write_text(f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
