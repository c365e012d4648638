"""Claim: the fastest LoRA step: beside the bare products, the frozen model and peft at its best settings.

python benchmarks/bench_step.py [--model gpt2] [--rounds 1] [--steps 5] [--dropout 0 0.05] [--ablate]
python benchmarks/bench_step.py --model "smollm2, q and v" --dtype float32
python benchmarks/bench_step.py --ablate --trained 0.3     where the last tokens of each row alone are trained

SmolLM2-135M's geometry with random weights, bf16, r 16 on all linear layers, 4 rows of 256 tokens, all trained. Each
side has a fresh process in every round, and the processes take one step after the other in turn, so that what else the
machine does meets all sides alike. The C library's allocator is as it is ("stock") in some and told to keep large
blocks ("tuned") in others, so both sides have both. Sides: the products with the base's weights alone (forward, input
gradient, head, in the best slices); lorakit's stack and transformers' without an adapter, forward and backward to the
embeddings; `lorakit train`'s step; peft with the model's loss and fused AdamW: as it comes, with adapters in the base's
dtype, under bf16 autocast. The first step of a process does not count. `--ablate` turns one lever after the other off.

A row has seconds a step, tokens a second, the peak of memory above the touched weights, and its ratios to the other
sides' medians under the same allocator and dropout. The numbers go into results/step.jsonl and results/ablation.jsonl.
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
    LEVERS,
    OURS,
    OURS_FROZEN,
    PEFT,
    PEFT_SIDES,
    PRODUCTS,
    TARGETS,
    THEIRS_FROZEN,
    Job,
    prepare,
)

ALLOCATORS = ("tuned", "stock")


class Case(NamedTuple):
    """What one process measures."""

    side: str
    dropout: float
    allocator: str
    off: str = ""


@dataclass
class Found:
    """What the processes of one case measured."""

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
    parser.add_argument("--trained", type=float, default=1.0, help="share of the tokens that is trained")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to try things")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--base-dropout", type=float, default=0.0, help="GPT-2's own; as published 0.1")
    parser.add_argument("--rounds", type=int, default=1, help="fresh processes for every side, so many times")
    parser.add_argument("--steps", type=int, default=5, help="of each process, after the one that does not count")
    parser.add_argument("--sides", nargs="+", choices=[*FROZEN_SIDES, OURS, *PEFT_SIDES], help="these alone")
    parser.add_argument("--allocators", nargs="+", choices=ALLOCATORS, default=list(ALLOCATORS))
    parser.add_argument("--ablate", action="store_true", help="lorakit alone, with each lever off in turn")
    parser.add_argument(
        "--levers", nargs="+", choices=list(LEVERS), default=list(LEVERS), help="of --ablate, these alone"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def cases_of(options: argparse.Namespace) -> list[Case]:
    """All that a round measures; a side without an adapter has no dropout."""
    if options.ablate:
        dropout = max(options.dropout)
        from lorakit.speed.last_layer import SHARE

        idle = {"dropout by gaps": dropout == 0, "last layer of trained rows": options.trained >= SHARE}
        levers = [lever for lever in options.levers if not idle.get(lever)]
        return [Case(OURS, dropout, "tuned", off) for off in ("", *levers)] + [Case(OURS, dropout, "stock")]
    sides = options.sides or [*FROZEN_SIDES, OURS, *PEFT_SIDES]
    return [
        Case(side, dropout, allocator)
        for allocator in options.allocators
        for dropout in options.dropout
        for side in sides
        if side not in FROZEN_SIDES or dropout == options.dropout[0]
    ]


def in_turn(cases: list[Case], options: argparse.Namespace, found: dict[Case, Found]) -> None:
    """A process for each case; all are there at once, and one takes a step at a time."""
    with contextlib.ExitStack() as held:
        running = dict[Case, subprocess.Popen[str]]()
        for case in cases:  # one after the other, since a process may measure which way is faster before it steps
            running[case] = held.enter_context(started(case, options))
            answer(case, running[case])  # the first step, which does not count
        for number in range(options.steps):
            turned = number % len(cases)
            for case in cases[turned:] + cases[:turned]:  # who begins changes with the step
                found.setdefault(case, Found()).seconds.append(answer(case, running[case])["seconds"])
        for case in cases:
            add(found.setdefault(case, Found()), answer(case, running[case], "end"))


def answer(case: Case, process: subprocess.Popen[str], word: str = "step") -> dict[str, Any]:
    """What a process says of the step, or the end, that it is asked for."""
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    with contextlib.suppress(BrokenPipeError):
        print(word, file=process.stdin, flush=True)
    for line in process.stdout:
        if line.startswith("{"):
            said: dict[str, Any] = json.loads(line)
            return said
    raise SystemExit(f"{case} failed:\n{process.stderr.read()}")


def started(case: Case, options: argparse.Namespace) -> subprocess.Popen[str]:
    """The process of one case, which waits to be asked."""
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
    """Take a step for each line that comes, and say its seconds; at the end the peak above the weights and the loss."""
    from lorakit.allocator import keep_large_blocks

    keep_large_blocks()  # unless the environment says "stock"; before torch takes any memory
    import torch

    model, step = prepare(asked["side"], Job(**asked["job"]), LEVERS.get(asked["off"], frozenset()))
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
    """A row for each case, and a table of medians."""
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
            facts |= ratios(case, found, beside(case, options.dropout[0]))
        samples = {"seconds": measured.seconds, "peak_bytes": measured.peak_bytes}
        samples["tokens_per_second"] = [tokens / taken for taken in measured.seconds]
        append_row("ablation" if options.ablate else "step", facts, samples)
    for dropout, allocator in dict.fromkeys((case.dropout, case.allocator) for case in found):
        print(f"\nseconds a step, p50: dropout {dropout:g}, {allocator} allocator")
        for case, measured in found.items():
            if (case.dropout, case.allocator) == (dropout, allocator):
                name = f"{case.side} without {case.off}" if case.off else case.side
                print(f"{name:55} {statistics.median(measured.seconds):.3f}")


def beside(case: Case, without: float) -> dict[str, Case]:
    """The cases whose medians a side is given in: name of the ratio -> case."""
    frozen = {
        f"times_{name}": Case(side, without, case.allocator)
        for name, side in (("products", PRODUCTS), ("frozen", OURS_FROZEN), ("their_frozen", THEIRS_FROZEN))
    }
    return {**frozen, "of_peft": Case(PEFT, case.dropout, case.allocator)}


def ratios(case: Case, found: dict[Case, Found], others: dict[str, Case]) -> dict[str, float]:
    """Seconds in those of other cases, and memory in that of peft; nothing where the other was not measured."""
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
