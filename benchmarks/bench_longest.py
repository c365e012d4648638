"""Claim: the longest sequence that trains within a memory limit is at least three times peft's.

    python benchmarks/bench_longest.py [--gib 2] [--checkpointing] [--dropout 0]

SmolLM2-135M's geometry with random weights, bf16, r 16 on all linear layers, one sequence, all tokens labeled. A
trial is a short step, which creates the optimizer state, and one of that length, in a new process; it fits if the peak
resident size exceeds that with the weights by no more than the limit. Memory grows about linearly with the tokens, so
each trial's length is predicted from earlier ones; the search ends when the longest that fits and the shortest that
does not are within 7% of each other. The allocator is the C library's default: one that keeps freed blocks holds more
than it needs.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from resident import resident_with_weights, status
from runner import append_row
from stepping import OURS, PEFT, TARGETS, Job, prepare

GRAIN, CLOSE, FIRST, SHORT = 64, 1.07, 512, 16
MARGIN = 0.99  # aim slightly below the limit: a length that fits is found sooner
NEAR = 1.06  # a trial this far from a known length ends the search, if it follows the line
GROWTH = 2  # maximum ratio of a length to one that was tried


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=2.0, help="memory above the weights")
    parser.add_argument("--model", choices=sorted(TARGETS), default="smollm2")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument(
        "--checkpointing", action="store_true", help="recompute each layer in the backward, on both sides"
    )
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for quick trials")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "JOB"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.child[0], Job(**json.loads(options.child[1])))))
        return
    limit, found = options.gib * 2**30, dict[str, tuple[int, dict[str, float]]]()
    for side in (PEFT, OURS):

        def trial(length: int, side: str = side) -> dict[str, float]:
            job = Job(options.model, "bfloat16", 1, length, options.dropout)
            fields = {**asdict(job), "checkpointing": options.checkpointing, "layers": options.layers}
            return child(side, fields)

        found[side] = longest(trial, limit)
    for side, (length, measured) in found.items():
        facts = {"what": side, "model": options.model, "gib": options.gib, "dropout": options.dropout}
        facts |= {"checkpointing": options.checkpointing, "layers": options.layers, "allocator": "stock"}
        facts["times_peft"] = round(length / found[PEFT][0], 3) if found[PEFT][0] else None
        samples = {"longest_tokens": [length], "peak_bytes": [measured["peak_bytes"]], "seconds": [measured["seconds"]]}
        append_row("longest", facts, samples)


def longest(trial: Callable[[int], dict[str, float]], limit: float) -> tuple[int, dict[str, float]]:
    """Return the longest sequence that fits, to 7%, and the measurements of its trial.

    Args:
        trial: Length in tokens -> its "peak_bytes" above the weights, and "seconds".
        limit: Bytes.
    """
    fits, exceeds, length = {0: {"peak_bytes": 0.0, "seconds": 0.0}}, dict[int, dict[str, float]](), FIRST
    while True:
        measured = trial(length)
        within = measured["peak_bytes"] <= limit
        print(f"  {length} tokens: {measured['peak_bytes'] / 2**30:.2f} GiB, {measured['seconds']:.1f} s/step")
        (fits if within else exceeds)[length] = measured
        low, high = max(fits), min(exceeds, default=None)
        if high is not None and (high <= CLOSE * low or high - low <= GRAIN):
            return low, fits[low]
        length = follows({**fits, **exceeds}, low, high, limit)


def follows(tried: dict[int, dict[str, float]], low: int, high: int | None, limit: float) -> int:
    """Return the next length: where a line through the two nearest trials meets the limit, within low and high."""
    known = [n for n in tried if math.isfinite(tried[n]["peak_bytes"])]
    nearest = sorted(sorted(known, key=lambda n: abs(tried[n]["peak_bytes"] - limit))[:2])
    first, second = nearest[0], nearest[-1]
    slope = (tried[second]["peak_bytes"] - tried[first]["peak_bytes"]) / max(second - first, 1)
    wanted = second + (MARGIN * limit - tried[second]["peak_bytes"]) / max(slope, 1.0)
    if high is None:
        wanted = min(max(wanted, NEAR * low), GROWTH * max(low, FIRST))
    elif math.isinf(tried[high]["peak_bytes"]):
        wanted = (low + high) / 2
    else:
        wanted = min(max(wanted, NEAR * low), high / NEAR)
    return max(int(wanted) // GRAIN * GRAIN, low + GRAIN)


def child(side: str, fields: dict[str, Any]) -> dict[str, float]:
    """Run one trial in a new process; if the kernel kills it or malloc fails, it does not fit."""
    environment = {**os.environ, "LORAKIT_ALLOCATOR": "stock"}
    command = [sys.executable, __file__, "--child", side, json.dumps(fields)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == -9 or "allocate memory" in done.stderr or "memory ran out" in done.stderr:
        return {"peak_bytes": float("inf"), "seconds": 0.0}
    if done.returncode:
        raise SystemExit(f"{side} {fields} failed:\n{done.stderr}")
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured


def measure(side: str, job: Job) -> dict[str, float]:
    """Return the peak of a step above the weights, and its seconds."""
    model, step = prepare(side, job)
    resident = resident_with_weights(model)
    step(0, SHORT)
    began = time.perf_counter()
    step(1)
    return {"peak_bytes": status("VmHWM") - resident, "seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main()
