"""Claim: on one H100, at least twice as fast as peft, at most 1.10 of the frozen model's time, at most half of peft's
memory.

    python benchmarks/bench_gpu.py [--models llama-1b llama-8b] [--rounds 2] [--steps 5] [--dropout 0 0.05]
    [--table-only]

Geometries of Llama-3.2-1B and Llama-3.1-8B with random bf16 weights, r 16 on all linear layers, 4 rows of 2048 tokens,
all labeled. Sides, each on a new model, interleaved in one process with nothing else on the device: the GEMM baseline
(matmuls with the base's weights: forward, input gradient, head); lorakit's and transformers' forward and backward
without an adapter; `lorakit train`'s step; peft with the model's loss and fused AdamW: default, with adapters in the
base's dtype, under bf16 autocast. With Llama-3.1-8B the step is also measured with gradient checkpointing on both
sides, since peft may not fit without. The first steps are not counted, because they compile.

A row has milliseconds per step between two CUDA events, tokens per second, peak device memory above the weights, and
ratios to peft in the same setting (with checkpointing if peft did not fit without), or "out of memory". Rows are
appended to results/gpu.jsonl, and the table of the last run is written to benchmarks/README.md; --table-only rewrites
the table from the rows. Without CUDA it exits with an error.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from runner import RESULTS, append_row
from stepping import (
    FROZEN_SIDES,
    GEMM,
    LARGE,
    OURS,
    OURS_FROZEN,
    PEFT,
    PEFT_SIDES,
    Job,
    geometry,
    prepared,
)

NAME, PAGE = "gpu", Path(__file__).resolve().parent / "README.md"
BEGIN, END = "<!-- gpu: written by bench_gpu.py -->", "<!-- gpu: end -->"
DEVICE = "cuda"
CHECKPOINTED = ("llama-8b",)
"""Models that are also measured with gradient checkpointing."""


class Case(NamedTuple):
    """A case measured on one model."""

    model: str
    side: str
    dropout: float
    checkpointing: bool


@dataclass
class Found:
    """Measurements of one case."""

    milliseconds: list[float] = field(default_factory=list)
    peak_bytes: list[float] = field(default_factory=list)
    loss: float = 0.0
    ran_out: bool = False


def main() -> None:
    options = parsed()
    if not options.table_only:
        import torch

        if not torch.cuda.is_available():
            raise SystemExit(f"bench_gpu needs a CUDA device; torch {torch.__version__} finds none.")
        run = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for model in options.models:
            report(rounds([case for case in cases_of(options) if case.model == model], options), options, run)
    write_table()


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=sorted(LARGE), default=list(LARGE))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for quick trials")
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.05])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="steps per round, after the warm-up")
    parser.add_argument("--warm-up", type=int, default=2, help="steps that are not counted")
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="do not start a round of a model that would exceed this time"
    )
    parser.add_argument(
        "--sides", nargs="+", choices=[*FROZEN_SIDES, OURS, *PEFT_SIDES], help="measure only these sides"
    )
    parser.add_argument("--table-only", action="store_true", help="only rewrite the table of the last run")
    return parser.parse_args()


def cases_of(options: argparse.Namespace) -> list[Case]:
    """Return all cases; a side without an adapter has no dropout and no checkpointing."""
    sides = options.sides or [*FROZEN_SIDES, OURS, *PEFT_SIDES]
    return [
        Case(model, side, dropout, checkpointing)
        for model in options.models
        for dropout in options.dropout
        for side in sides
        for checkpointing in ((False, True) if model in CHECKPOINTED else (False,))
        if side not in FROZEN_SIDES or (dropout == options.dropout[0] and not checkpointing)
    ]


def rounds(cases: list[Case], options: argparse.Namespace) -> dict[Case, Found]:
    """Measure every case in each round, starting with another case each time."""
    found = {case: Found() for case in cases}
    deadline = time.monotonic() + 60 * options.minutes
    for number in range(options.rounds):
        began = time.monotonic()
        rotated = number % len(cases)
        for case in cases[rotated:] + cases[:rotated]:
            if not found[case].ran_out:
                measure(case, options, found[case])
        if time.monotonic() + (time.monotonic() - began) > deadline and number + 1 < options.rounds:
            print(f"no time for more than {number + 1} of {options.rounds} rounds; raise --minutes")
            break
    return found


def measure(case: Case, options: argparse.Namespace, found: Found) -> None:
    """Measure some steps of a case, and free everything on the device."""
    import torch

    from lorakit.errors import RunError

    try:
        steps(case, options, found)
    except (torch.OutOfMemoryError, RunError) as failed:
        if "memory" not in str(failed):
            raise
        found.ran_out = True
    gc.collect()
    torch.cuda.empty_cache()


def steps(case: Case, options: argparse.Namespace, found: Found) -> None:
    """Measure steps of a new model: the time between two events, and the peak memory above the weights."""
    import torch

    job = Job(
        case.model, "bfloat16", options.rows, options.length, case.dropout, checkpointing=case.checkpointing,
        layers=options.layers, device=DEVICE,
    )  # fmt: skip
    torch.manual_seed(0)
    base = geometry(job).train()
    weights = sum(p.numel() * p.element_size() for p in base.parameters())
    _, step = prepared(case.side, base, job)
    for number in range(options.warm_up):
        step(number)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    for number in range(options.warm_up, options.warm_up + options.steps):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        found.loss = step(number)
        end.record()
        torch.cuda.synchronize()
        found.milliseconds.append(begin.elapsed_time(end))
    found.peak_bytes.append(torch.cuda.max_memory_allocated() - weights)


def report(found: dict[Case, Found], options: argparse.Namespace, run: str) -> None:
    """Append a row for each case of one model."""
    for case, measured in found.items():
        r, targets = LARGE[case.model]
        facts: dict[str, Any] = {"what": case.side, "model": case.model, "dropout": case.dropout}
        facts |= {"checkpointing": case.checkpointing, "rows": options.rows, "length": options.length, "r": r}
        facts |= {"targets": targets, "layers": options.layers, "run": run}
        if not measured.peak_bytes:
            append_row(NAME, facts | {"failed": "out of memory"}, {})
            continue
        facts |= {"last_loss": round(measured.loss, 4) if measured.loss > 0 else None}
        facts |= ratios(case, found, options.dropout[0])
        tokens = options.rows * options.length
        samples = {"milliseconds": measured.milliseconds, "peak_bytes": measured.peak_bytes}
        samples["tokens_per_second"] = [1000 * tokens / taken for taken in measured.milliseconds]
        append_row(NAME, facts, samples)


def ratios(case: Case, found: dict[Case, Found], without: float) -> dict[str, float]:
    """Return ratios of time to the GEMM baseline and our frozen model, and of time and memory to peft, possibly
    checkpointed.
    """
    mine, made = found[case], dict[str, float]()
    theirs = case._replace(side=PEFT)
    others = {
        "times_products": [Case(case.model, GEMM, without, False)],
        "times_frozen": [Case(case.model, OURS_FROZEN, without, False)],
        "of_peft": [theirs, theirs._replace(checkpointing=True)],
    }
    for name, candidates in others.items():
        other = next((found[one] for one in candidates if one in found and found[one].peak_bytes), None)
        if other is None or (name == "of_peft" and case.side in FROZEN_SIDES):
            continue
        made[name] = round(statistics.median(mine.milliseconds) / statistics.median(other.milliseconds), 3)
        if name == "of_peft":
            made["memory_of_peft"] = round(max(mine.peak_bytes) / max(max(other.peak_bytes), 1), 3)
    return made


def write_table() -> None:
    """Write the table of each model's last run between the markers of the README."""
    rows = RESULTS / f"{NAME}.jsonl"
    every = [json.loads(line) for line in rows.read_text("utf-8").splitlines()] if rows.exists() else []
    page = PAGE.read_text("utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{table(every)}{END}{after}", encoding="utf-8")


def table(rows: Iterable[dict[str, Any]]) -> str:
    """Return the table of each model's last run as Markdown, or a message if there is none."""
    last: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        same = last.get(row["model"], [])
        last[row["model"]] = [*same, row] if same and same[0]["run"] == row["run"] else [row]
    if not last:
        return "No rows yet: this benchmark has not been run on a device.\n"
    lines = []
    for model, measured in last.items():
        at = measured[0]
        lines += [f"\n**{model}**, {at['rows']} × {at['length']} tokens, r {at['r']} {at['targets']}, bf16"]
        lines[-1] += (
            f" · {at['machine']['gpu']}, torch {at['versions'].get('torch')}, commit {at['commit']}, {at['run']}\n"
        )
        lines += ["| | dropout | checkpointing | ms/step, p50 (p20–p80) | tokens/s | GiB above the weights |"]
        lines[-1] += " × GEMM | × frozen | speedup over peft | memory / peft |"
        lines += ["|---|" + "---|" * 9, *(_line(row) for row in measured)]
    return "\n".join(lines) + "\n"


def _line(row: dict[str, Any]) -> str:
    has = row["what"] not in FROZEN_SIDES
    cells = [
        row["what"],
        f"{row['dropout']:g}" if has else "",
        ("yes" if row["checkpointing"] else "no") if has else "",
    ]
    if "failed" in row:
        return f"| {' | '.join([*cells, row['failed'], *[''] * 6])} |"
    taken, tokens = row["milliseconds"], row["tokens_per_second"]["p50"]
    cells += [f"{taken['p50']:.1f} ({taken['p20']:.1f}–{taken['p80']:.1f})", f"{tokens:.0f}"]
    cells += [f"{row['peak_bytes']['p50'] / 2**30:.2f}"]
    faster = f"{1 / row['of_peft']:.2f}" if has and row.get("of_peft") else ""
    cells += [_number(row, "times_products"), _number(row, "times_frozen"), faster, _number(row, "memory_of_peft")]
    return f"| {' | '.join(cells)} |"


def _number(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.2f}" if row.get(name) else ""


if __name__ == "__main__":
    main()
