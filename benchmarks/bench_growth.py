"""Claim: time and memory grow with tokens, layers, rank and adapters as estimated, and no faster.

    python benchmarks/bench_growth.py [--axes tokens length layers rank attached decoded] [--steps 2] [--rounds 1]

SmolLM2-135M's geometry with random weights, bf16; `lorakit train`'s step with r 16 on all linear layers and 4 rows of
256 tokens, without dropout; each axis varies one property. Axes: tokens, as more rows of 256, and as one longer row, in
which attention is quadratic; layers; rank; adapters attached while one is trained; adapters assigned to 32 decoded
rows. Each point is a new process, and a point on several axes is measured once per round; every other round runs in
reverse order. The first step of a process is not counted.

A row has a point's seconds (per step, or per decoded token of all rows), its peak memory above the touched weights,
including adapters, and its FLOPs and bytes by `lorakit.plan`. Another row has an axis's least-squares slopes of
log(seconds) and log(bytes) over log(point), with those of the estimate: 1 is proportional, 0 is constant. For decoding
also the slope of the bytes of weights and factors read per token. Rows are appended to results/growth.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from growth import Work, of_decoding, of_step, slope
from resident import resident_with_weights, status
from runner import append_row
from stepping import OURS, TARGETS, Job, adapter_fields, geometry, prepare

from lorakit import plan

ROWS, ROUNDS, TOKENS = 32, 2, 6
"""Settings of a decoding process: rows, rounds after the warm-up, tokens per round."""


class Case(NamedTuple):
    """A case measured by one process: a training step, or, with `adapters`, decoding."""

    job: Job
    adapters: int = 0


class Axis(NamedTuple):
    """A property that is varied, its values, and how a value changes the default step."""

    what: str
    points: tuple[int, ...]
    case: Callable[[Job, int], Case]


@dataclass
class Found:
    """Measurements of one case."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: list[float] = field(default_factory=list)


AXES: dict[str, Axis] = {
    "tokens": Axis(
        "tokens, rows of 256", (256, 512, 1024, 2048), lambda job, n: Case(replace(job, rows=n // job.length))
    ),
    "length": Axis("tokens of one row", (256, 512, 1024, 2048), lambda job, n: Case(replace(job, rows=1, length=n))),
    "layers": Axis("layers", (4, 8, 16, 30), lambda job, n: Case(replace(job, layers=n))),
    "rank": Axis("rank", (4, 16, 64, 256), lambda job, n: Case(replace(job, rank=n))),
    "attached": Axis("adapters attached, one trained", (1, 4, 16, 64), lambda job, n: Case(replace(job, idle=n - 1))),
    "decoded": Axis(
        f"adapters of {ROWS} decoded rows", (1, 4, 16, 32), lambda job, n: Case(replace(job, rows=ROWS, length=1), n)
    ),
}


def main() -> None:
    options = parsed()
    if options.child:
        asked = json.loads(options.child)
        print(json.dumps(measure(Case(Job(**asked["job"]), asked["adapters"]), asked["steps"])))
        return
    along = {name: cases_along(AXES[name], options.layers) for name in options.axes}
    found = {case: Found() for cases in along.values() for case in cases.values()}
    for number in range(options.rounds):
        for case in list(found)[:: -1 if number % 2 else 1]:
            add(found[case], child(case, options))
    table = [report(name, cases, found, options) for name, cases in along.items()]
    print("\n| axis | points | seconds: slope | FLOPs: slope | bytes: slope | planned bytes: slope |")
    print("|---|---|---|---|---|---|", *table, sep="\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--layers", type=int, default=30, help="fewer layers than the model has, for quick trials")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2, help="steps of each process, after the warm-up")
    parser.add_argument("--allocator", choices=("tuned", "stock"), default="tuned", help="as in bench_step.py")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if "layers" in options.axes and options.layers <= min(AXES["layers"].points):
        parser.error(f"--axes layers needs --layers above {min(AXES['layers'].points)}; one point has no slope")
    return options


def cases_along(axis: Axis, layers: int) -> dict[int, Case]:
    """Return point -> case; layers are limited to those of the model."""
    usual = Job(layers=layers, rank=TARGETS[Job.model][0])
    points = [n for n in axis.points if n < layers] + [layers] if axis.what == "layers" else axis.points
    return {point: axis.case(usual, point) for point in points}


def child(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one case in a new process."""
    asked = {"job": asdict(case.job), "adapters": case.adapters, "steps": options.steps}
    environment = {**os.environ, "LORAKIT_ALLOCATOR": "" if options.allocator == "tuned" else "stock"}
    command = [sys.executable, __file__, "--child", json.dumps(asked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr}")
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(case: Case, steps: int) -> dict[str, Any]:
    """Return the seconds of each counted step or token, and the peak above the weights."""
    from lorakit.allocator import keep_large_blocks

    keep_large_blocks()  # unless the environment is set to "stock"; before torch allocates memory
    if case.adapters:
        return measure_decoding(case)
    model, step = prepare(OURS, case.job)
    resident = resident_with_weights(model)
    seconds = []
    for number in range(steps + 1):
        began = time.perf_counter()
        step(number)
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "peak_bytes": status("VmHWM") - resident}


def measure_decoding(case: Case) -> dict[str, Any]:
    """Measure decoding, in the loop of bench_decode.py."""
    from bench_decode import decoded, within

    from lorakit import core
    from lorakit.config import LoraConfig

    model, rows = geometry(case.job).eval().requires_grad_(False), case.job.rows
    names = [str(row % case.adapters) for row in range(rows)]
    for name in dict.fromkeys(names):
        core.attach(model, LoraConfig(**adapter_fields(case.job), init_lora_weights=False), name)
    resident = resident_with_weights(model)
    forwards = {OURS: within(core.route(model, names, keep=True), model)}
    seconds = decoded(forwards, rows, argparse.Namespace(rounds=ROUNDS, tokens=TOKENS))
    return {"seconds": seconds[OURS], "peak_bytes": status("VmHWM") - resident}


def add(found: Found, measured: dict[str, Any]) -> None:
    found.seconds += measured["seconds"]
    found.peak_bytes.append(measured["peak_bytes"])


def work_of(case: Case) -> Work:
    """Return the estimated work of a case."""
    job, fields = case.job, adapter_fields(case.job)
    planned = plan.Job(job.rows, job.length, dtype=job.dtype, accelerated=True)
    if case.adapters:
        return of_decoding(fields, planned, case.adapters, job.layers)
    return of_step(fields, planned, job.layers)


def report(name: str, cases: dict[int, Case], found: dict[Case, Found], options: argparse.Namespace) -> str:
    """Append a row for each point and one for the slopes; returns the axis's line of the table."""
    axis, works = AXES[name], {point: work_of(case) for point, case in cases.items()}
    settings = {"layers": options.layers, "allocator": options.allocator}
    for point, case in cases.items():
        job, work = case.job, works[point]
        facts: dict[str, Any] = {"what": axis.what, "point": point, "rows": job.rows, "length": job.length}
        facts |= {"r": job.rank, "dtype": job.dtype, **settings, "layers": job.layers}
        facts |= {"flops": work.flops, "planned_bytes": work.memory_bytes}
        facts |= {"read_bytes": work.read_bytes} if case.adapters else {}
        samples = {"seconds": found[case].seconds, "peak_bytes": found[case].peak_bytes}
        append_row("growth", facts, samples)
    values = {
        "seconds": [statistics.median(found[case].seconds) for case in cases.values()],
        "flops": [work.flops for work in works.values()],
        "bytes": [max(found[case].peak_bytes) for case in cases.values()],
        "planned_bytes": [work.memory_bytes for work in works.values()],
    }
    if name == "decoded":
        values["read_bytes"] = [work.read_bytes for work in works.values()]
    slopes = {f"{what}_slope": round(slope(list(cases), numbers), 3) for what, numbers in values.items()}
    append_row("growth", {"what": f"slopes: {axis.what}", "points": list(cases), **settings, **slopes}, {})
    seconds, flops, taken, planned, *read = slopes.values()
    arithmetic = f"{flops:.2f}" + "".join(f", of bytes read {number:.2f}" for number in read)
    points = ", ".join(map(str, cases))
    return f"| {axis.what} | {points} | {seconds:.2f} | {arithmetic} | {taken:.2f} | {planned:.2f} |"


if __name__ == "__main__":
    main()
