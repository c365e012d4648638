"""Claim: a plan's peak memory equals that of a real run: within 10%, 15% with gradient checkpointing.

    python benchmarks/bench_plan_memory.py [--steps 6] [--allocators kept pinned] [--markdown docs/memory.md]

Each case runs in a new process: a model with random weights of the published shape, adapted by lorakit.core, trained
for a few steps by lorakit.train's own step, accelerated as in `lorakit train` by default, or not. Measured is the peak
resident size minus what was resident once every weight was touched; planned is `Memory.above_weights_bytes`. Each case
runs twice: with the allocator as the command line sets it, which keeps freed blocks, and with MALLOC_MMAP_THRESHOLD_
pinned, so that a freed tensor returns to the system at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from resident import resident_with_weights, status
from runner import append_row

from lorakit.config import LoraConfig
from lorakit.plan import Job, Memory, catalogue, count
from lorakit.plan.memory import of_lora

CASES: tuple[dict[str, Any], ...] = tuple(
    {"model": model, "dtype": dtype, "dropout": dropout, "accelerated": fast, "checkpointing": again}
    for model, dtype, dropout in (("SmolLM2-135M", "bfloat16", 0.0), ("gpt2", "float32", 0.1), ("gpt2", "float32", 0.0))
    for fast in (True, False)
    for again in (False, True)
    if fast or dropout or model != "gpt2"
)
PINNED = {"MALLOC_MMAP_THRESHOLD_": "131072"}
ALLOCATORS: dict[str, dict[str, str]] = {"kept": {}, "pinned": PINNED}
ROWS, LENGTH, RANK = 4, 256, 16
BOUNDS = {False: 0.10, True: 0.15}


def planned(case: dict[str, Any]) -> Memory:
    shape = catalogue.published(case["model"])
    if shape is None:
        raise SystemExit(f"{case['model']} is not in the catalogue")
    shape = dataclasses.replace(shape, dropouts=shape.dropouts if case["dropout"] else {})
    job = Job(
        ROWS,
        LENGTH,
        dtype=case["dtype"],
        recompute="layers" if case["checkpointing"] else "none",
        accelerated=case["accelerated"],
    )
    return of_lora(shape, count(shape, _config()), 0.0, job)


def measure(case: dict[str, Any], steps: int, environment: dict[str, str]) -> list[int]:
    """Run one case in a new process; returns its growth in bytes after each step."""
    kept = not environment
    command = [sys.executable, __file__, "--child", json.dumps({**case, "kept": kept}), "--steps", str(steps)]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr}")
    growth: list[int] = json.loads(done.stdout.splitlines()[-1])
    return growth


def child(case: dict[str, Any], steps: int) -> list[int]:
    """Return how far the peak exceeds what was resident with every weight touched, in bytes, after each step."""
    import torch

    from lorakit import core
    from lorakit.allocator import keep_large_blocks
    from lorakit.data.loader import Batch
    from lorakit.speed import accelerate
    from lorakit.train.loop.optimizer import build_adamw
    from lorakit.train.loop.step import StepOptions, train_step

    if case["kept"] and not keep_large_blocks():
        raise SystemExit("malloc of this C library cannot be configured to keep freed memory")
    torch.manual_seed(0)
    model = _model(case)
    core.attach(model, _config())
    model.train()
    if case["checkpointing"]:
        model.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False, "context_fn": core.checkpoint_contexts(model)}
        )
    named = core.trainable_parameters(model)
    optimizer = build_adamw(named, 1e-4, 0.0)
    acceleration = accelerate(model) if case["accelerated"] else None
    options = StepOptions(torch.device("cpu"), acceleration=acceleration)
    resident, growth = resident_with_weights(model), list[int]()
    for _ in range(steps):
        ids = torch.randint(0, model.config.vocab_size, (ROWS, LENGTH))
        labels = ids.clone()
        batch = Batch(ids, torch.ones_like(ids), labels, 0.0, ids.numel(), ROWS * (LENGTH - 1))
        train_step(model, named, optimizer, [batch], 1e-4, options)
        growth.append(status("VmHWM") - resident)
    return growth


def _model(case: dict[str, Any]) -> Any:
    import torch
    import transformers

    shape = catalogue.published(case["model"])
    if shape is None:
        raise SystemExit(f"{case['model']} is not in the catalogue")
    dtype = getattr(torch, case["dtype"])
    if shape.architecture == "GPT2LMHeadModel":
        config: Any = transformers.GPT2Config(
            dtype=dtype, resid_pdrop=case["dropout"], embd_pdrop=case["dropout"], attn_pdrop=case["dropout"]
        )
    else:
        config = transformers.LlamaConfig(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.positions,
            tie_word_embeddings=shape.tied,
            dtype=dtype,
        )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def _config() -> LoraConfig:
    return LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")


def _word(is_on: bool) -> str:
    return "yes" if is_on else "no"


def _markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| model | dtype | model dropout | accelerated | checkpointing | allocator | planned | first step "
        "| peak of all steps | difference |",
        "|---|---|---:|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['model']} | {row['dtype']} | {row['dropout']:g} | {_word(row['accelerated'])} "
            f"| {_word(row['checkpointing'])} | {row['allocator']} "
            f"| {row['planned_bytes'] / 1e6:,.0f} MB | {row['growth'][0] / 1e6:,.0f} MB "
            f"| {row['growth'][-1] / 1e6:,.0f} MB | {100 * row['difference']:+.1f}% |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--allocators", nargs="+", choices=tuple(ALLOCATORS), default=list(ALLOCATORS))
    parser.add_argument("--markdown", type=Path, help="also write the table to this file, between its markers")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child), arguments.steps)))
        return
    rows, missed = [], []
    for case in CASES:
        for allocator in arguments.allocators:
            growth = measure(case, arguments.steps, ALLOCATORS[allocator])
            wanted = planned(case).above_weights_bytes
            difference = growth[-1] / wanted - 1
            facts = {**case, "tokens": f"{ROWS}x{LENGTH}", "r": RANK, "allocator": allocator, "planned_bytes": wanted}
            append_row("plan_memory", facts, {"peak_bytes": growth[-1:], "first_step_bytes": growth[:1]})
            rows.append({**facts, "growth": growth, "difference": difference})
            if allocator == "pinned" and abs(difference) > BOUNDS[case["checkpointing"]]:
                missed.append(facts)
    table = _markdown(rows)
    print(table)
    if arguments.markdown:
        _insert(arguments.markdown, table)
    if missed:
        raise SystemExit(f"outside of the limits: {missed}")


def _insert(path: Path, table: str) -> None:
    begin, end = "<!-- begin: bench_plan_memory -->", "<!-- end: bench_plan_memory -->"
    text = path.read_text(encoding="utf-8")
    head, _, rest = text.partition(begin)
    path.write_text(f"{head}{begin}\n{table}\n{end}{rest.partition(end)[2]}", encoding="utf-8")


if __name__ == "__main__":
    main()
