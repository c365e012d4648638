"""Claim: the fastest LoRA step, compared with the GEMM baseline, the frozen model and peft at its best settings.

    python benchmarks/bench_step.py [--model gpt2] [--rounds 1] [--steps 5] [--dropout 0 0.05] [--ablate]
    python benchmarks/bench_step.py --model "smollm2, q and v" --dtype float32
    python benchmarks/bench_step.py --ablate --trained 0.3     only the last tokens of each row have a loss

SmolLM2-135M's geometry with random weights, bf16, r 16 on all linear layers, 4 rows of 256 tokens, all labeled. Each
side has a new process in every round, and the processes take one step each in turn, so that other load on the machine
affects all sides alike. Both sides run with the C library's default allocator ("stock") and with one that keeps large
freed blocks ("tuned"). Sides: the GEMM baseline (matmuls with the base's weights: forward, input gradient, head, in the
best slices); lorakit's and transformers' forward and backward without an adapter; `lorakit train`'s step; peft with the
model's loss and fused AdamW: default, with adapters in the base's dtype, under bf16 autocast. The first step of a
process is not counted. `--ablate` disables one optimization at a time.

A row has seconds per step, tokens per second, the peak memory above the touched weights, and its ratios to the other
sides' medians with the same allocator and dropout. Rows are appended to results/step.jsonl and results/ablation.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from resident import resident_with_weights, status
from runner import append_row
from stepping import (
    FROZEN_SIDES,
    GEMM,
    OPTIMIZATIONS,
    OURS,
    OURS_FROZEN,
    PEFT,
    PEFT_SIDES,
    TARGETS,
    THEIRS_FROZEN,
    Job,
    prepare,
)

ALLOCATORS = ("tuned", "stock")


class Case(NamedTuple):
    """A case measured by one process."""

    side: str
    dropout: float
    allocator: str
    off: str = ""


@dataclass
class Found:
    """Measurements of one case."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[float] = field(default_factory=list)
    loss: float = 0.0
    threads: int = 0


def main() -> None:
    options = parsed()
    if options.child:
        measure(json.loads(options.child))
        return
    cases, found = cases_of(options), dict[Case, Found]()
    together = [cases] if options.ablate else [[c for c in cases if c.allocator == a] for a in options.allocators]
    for _ in range(options.rounds):
        for group in together:
            in_turn(group, options, found)
    report(found, options)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=sorted(TARGETS), default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--trained", type=float, default=1.0, help="fraction of the tokens labeled")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for quick trials")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--base-dropout", type=float, default=0.0, help="dropout of GPT-2 itself; 0.1 as published")
    parser.add_argument("--rounds", type=int, default=1, help="number of new processes for every side")
    parser.add_argument("--steps", type=int, default=5, help="steps of each process, after the warm-up")
    parser.add_argument(
        "--sides", nargs="+", choices=[*FROZEN_SIDES, OURS, *PEFT_SIDES], help="measure only these sides"
    )
    parser.add_argument("--allocators", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument(
        "--ablate", action="store_true", help="measure lorakit with one optimization disabled at a time"
    )
    parser.add_argument(
        "--optimizations",
        nargs="+",
        choices=list(OPTIMIZATIONS),
        default=list(OPTIMIZATIONS),
        help="optimizations to disable with --ablate",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Return all cases of a round; a side without an adapter has no dropout."""
    if options.ablate:
        dropout = max(options.dropout)
        from lorakit.speed.last_layer import SHARE

        idle = {"sampled dropout positions": dropout == 0, "skipped rows in the last layer": options.trained >= SHARE}
        optimizations = [one for one in options.optimizations if not idle.get(one)]
        return [Case(OURS, dropout, "tuned", off) for off in ("", *optimizations)] + [Case(OURS, dropout, "stock")]
    sides = options.sides or [*FROZEN_SIDES, OURS, *PEFT_SIDES]
    return [
        Case(side, dropout, allocator)
        for allocator in options.allocators
        for dropout in options.dropout
        for side in sides
        if side not in FROZEN_SIDES or dropout == options.dropout[0]
    ]


def in_turn(cases: list[Case], options: argparse.Namespace, found: dict[Case, Found]) -> None:
    """Run a process for each case; all exist at once, and one takes a step at a time."""
    with contextlib.ExitStack() as held:
        running = dict[Case, subprocess.Popen[str]]()
        for case in cases:  # one after the other, since a process may autotune before its first step
            running[case] = held.enter_context(started(case, options))
            answer(case, running[case])  # the first step, which is not counted
        for number in range(options.steps):
            rotated = number % len(cases)
            for case in cases[rotated:] + cases[:rotated]:  # each step starts with another case
                found.setdefault(case, Found()).seconds.append(answer(case, running[case])["seconds"])
        for case in cases:
            add(found.setdefault(case, Found()), answer(case, running[case], "end"))


def answer(case: Case, process: subprocess.Popen[str], word: str = "step") -> dict[str, Any]:
    """Return a process's answer to a command: "step" or the end."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    with contextlib.suppress(BrokenPipeError):
        print(word, file=process.stdin, flush=True)
    for line in process.stdout:
        if line.startswith("{"):
            said: dict[str, Any] = json.loads(line)
            return said
    raise SystemExit(f"{case} failed:\n{process.stderr.read()}")


def started(case: Case, options: argparse.Namespace) -> subprocess.Popen[str]:
    """Start the process of one case, which waits for commands."""
    job = Job(
        options.model, options.dtype, options.rows, options.length, case.dropout, options.base_dropout,
        layers=options.layers, trained=options.trained,
    )  # fmt: skip
    asked = {"job": asdict(job), "side": case.side, "off": case.off}
    environment = {**os.environ, "LORAKIT_ALLOCATOR": "" if case.allocator == "tuned" else "stock"}
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def measure(asked: dict[str, Any]) -> None:
    """Take a step per input line and print its seconds; at the end print the peak above the weights and the loss."""
    from lorakit.allocator import keep_large_blocks

    keep_large_blocks()  # unless the environment is set to "stock"; before torch allocates memory
    import torch

    model, step = prepare(asked["side"], Job(**asked["job"]), OPTIMIZATIONS.get(asked["off"], frozenset()))
    resident, loss = resident_with_weights(model), 0.0
    for number, line in enumerate(sys.stdin):
        if line.strip() == "end":
            break
        began = time.perf_counter()
        loss = step(number)
        print(json.dumps({"seconds": time.perf_counter() - began}), flush=True)
    peak = status("VmHWM") - resident
    print(json.dumps({"peak_bytes": peak, "loss": loss, "threads": torch.get_num_threads()}), flush=True)


def add(found: Found, measured: dict[str, Any]) -> None:
    found.peak_bytes.append(measured["peak_bytes"])
    found.loss, found.threads = measured["loss"], measured["threads"]


def report(found: dict[Case, Found], options: argparse.Namespace) -> None:
    """Append a row for each case, and print a table of medians."""
    tokens, (r, targets) = options.rows * options.length, TARGETS[options.model]
    for case, measured in found.items():
        facts: dict[str, Any] = {"what": case.side, "model": options.model, "dtype": options.dtype}
        facts |= {"dropout": case.dropout, "allocator": case.allocator, "rows": options.rows, "length": options.length}
        facts |= {"r": r, "targets": targets, "base_dropout": options.base_dropout, "layers": options.layers}
        facts |= {"trained": options.trained}
        facts |= {"threads": measured.threads, "last_loss": round(measured.loss, 4) if measured.loss > 0 else None}
        if options.ablate:
            facts["off"] = case.off or ("allocator" if case.allocator == "stock" else "nothing")
            facts |= ratios(case, found, {"times_all_on": Case(OURS, case.dropout, "tuned")})
        else:
            facts |= ratios(case, found, compared(case, options.dropout[0]))
        samples = {"seconds": measured.seconds, "peak_bytes": measured.peak_bytes}
        samples["tokens_per_second"] = [tokens / taken for taken in measured.seconds]
        append_row("ablation" if options.ablate else "step", facts, samples)
    for dropout, allocator in dict.fromkeys((case.dropout, case.allocator) for case in found):
        print(f"\nseconds/step, p50: dropout {dropout:g}, {allocator} allocator")
        for case, measured in found.items():
            if (case.dropout, case.allocator) == (dropout, allocator):
                name = f"{case.side} without {case.off}" if case.off else case.side
                print(f"{name:55} {statistics.median(measured.seconds):.3f}")


def compared(case: Case, without: float) -> dict[str, Case]:
    """Return the cases whose medians a side is compared with: name of the ratio -> case."""
    frozen = {
        f"times_{name}": Case(side, without, case.allocator)
        for name, side in (("products", GEMM), ("frozen", OURS_FROZEN), ("their_frozen", THEIRS_FROZEN))
    }
    return {**frozen, "of_peft": Case(PEFT, case.dropout, case.allocator)}


def ratios(case: Case, found: dict[Case, Found], others: dict[str, Case]) -> dict[str, float]:
    """Return ratios of seconds to other cases, and of memory to peft; nothing for cases that were not measured."""
    mine, made = found[case], dict[str, float]()
    for name, other in others.items():
        if other in found:
            theirs = found[other]
            made[name] = round(statistics.median(mine.seconds) / statistics.median(theirs.seconds), 3)
            if other.side == PEFT:
                made["memory_of_peft"] = round(max(mine.peak_bytes) / max(theirs.peak_bytes), 3)
    if made.get("of_peft"):
        made["faster_than_peft"] = round(1 / made["of_peft"], 3)
    return made


if __name__ == "__main__":
    main()
