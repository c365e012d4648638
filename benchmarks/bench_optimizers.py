"""Claim: what each optimizer of `lorakit train` learns in the same number of steps, its time per step and its memory.

    python benchmarks/bench_optimizers.py [--steps 60] [--seeds 0] [--only adamw muon]

SmolLM2-135M, bf16, r 16 on all linear layers, the prompts and completions of bench_job.py, batches of 4 rows, a cosine
schedule with a warm-up of 5%. Each case is a new process of `lorakit train` with the same data, seed and steps; only
the optimizer and its rates differ. The rates of a case are in CASES: AdamW and Muon with three each, because no single
rate is known to suit both, and the others at AdamW's. Rows contain the evaluation loss after the last step, the
milliseconds per step (the first two steps are left out), the peak memory of the process and the planned size of the
optimizer's state, and are appended to results/optimizers.jsonl. A case whose optimizer is not available is left out.
`--steps 3` is a quick try.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_job import ALPHA, MAX_LENGTH, RANK, ROWS, write_rows
from runner import append_row

CASES: dict[str, tuple[tuple[float, ...], dict[str, str]]] = {
    "adamw": ((1e-4, 3e-4, 1e-3), {}),
    "adamw8bit": ((3e-4,), {"optimizer": "adamw8bit"}),
    "lorafa": ((3e-4,), {"optimizer": "lorafa"}),
    "LoRA+ 4": ((3e-4,), {"loraplus-lr-ratio": "4"}),
    "LoRA+ 16": ((1e-4,), {"loraplus-lr-ratio": "16"}),
    "muon": ((1e-4, 3e-4, 1e-3), {"optimizer": "muon"}),
}
"""Case -> the learning rates to try (of A, with LoRA+), and its flags of `lorakit train`."""

SKIPPED = 2  # steps at the beginning, which load kernels and create the state


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    if options.steps <= SKIPPED:
        parser.error(f"--steps must be above {SKIPPED}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, options.steps)
        for case in options.only:
            for rate in CASES[case][0]:
                measure(case, rate, folder, options)


def measure(case: str, rate: float, folder: Path, options: argparse.Namespace) -> None:
    """Train a case with every seed and append one row; print a message if its optimizer is not available."""
    samples: dict[str, list[float]] = {"eval_loss": [], "milliseconds": [], "peak_megabytes": []}
    planned = 0.0
    for seed in options.seeds:
        target = folder / "run"
        command = [sys.executable, "-m", "lorakit", "train", *flags(case, rate, seed, folder, target, options.steps)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{case} is left out: {done.stderr.strip()}")
            return
        record = json.loads((target / "run.json").read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (target / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [row for row in rows if "loss" in row]
        samples["eval_loss"].append(next(row["eval_loss"] for row in reversed(rows) if "eval_loss" in row))
        samples["milliseconds"] += [1e3 * row["seconds"] for row in steps[SKIPPED:]]
        samples["peak_megabytes"].append(steps[-1]["peak_rss_bytes"] / 1e6)
        planned = size_of_state(record)
    facts = {"what": case, "rate": rate, "steps": options.steps, "seeds": options.seeds, "state_megabytes": planned}
    append_row("optimizers", facts, samples)


def flags(case: str, rate: float, seed: int, folder: Path, target: Path, steps: int) -> list[str]:
    """Return the command line of `lorakit train`."""
    given = {
        "model": "smollm2",
        "data": folder / "train.jsonl",
        "eval-data": folder / "eval.jsonl",
        "output-dir": target,
        "dtype": "bfloat16",
        "r": RANK,
        "lora-alpha": ALPHA,
        "max-length": MAX_LENGTH,
        "per-device-train-batch-size": ROWS,
        "max-steps": steps,
        "eval-steps": steps,
        "learning-rate": rate,
        "seed": seed,
        **CASES[case][1],
    }
    return [str(word) for flag, value in given.items() for word in (f"--{flag}", value)] + ["--overwrite"]


def size_of_state(record: dict[str, Any]) -> float:
    """Return the size of the optimizer's state in MB, as the run planned it."""
    lines = record["plan"]["lora"]["memory"]["lines"]
    return float(next(line["size_bytes"] for line in lines if line["cause"] == "optimizer") / 1e6)


if __name__ == "__main__":
    main()
