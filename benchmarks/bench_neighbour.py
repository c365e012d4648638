"""Claim: `lorakit train` costs at most 3% alone, and is three times as fast next to a busy process, if spins are few.

    python benchmarks/bench_neighbour.py [--spins 300000 20000 0] [--steps 12] [--rounds 3]

Waiting threads of libgomp spin before they give their core away. Each run is `lorakit train` on the packaged SmolLM2
in a new process, with two threads and a value of GOMP_SPINCOUNT (300,000 is libgomp's default; without --spins, that
and the command line's), alone or next to one process that keeps a core busy. The sides take turns. Measured are the
tokens per second of each step but the first two. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

from runner import append_row

from lorakit.startup import SPIN_VARIABLE, SPINS, WAITING

DEFAULT = 300_000
TEXT = "A step over rows of one length, so that all runs have the same work to do in each step. "
BUSY = "while True: pass"


def tokens_per_second(spins: int, steps: int, folder: Path) -> list[float]:
    """Return the rate of each step of one run, without the first two."""
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps({"text": TEXT * 13}) + "\n" for _ in range(4 * steps)), encoding="utf-8")
    words = ["--model", "smollm2", "--data", str(data), "--output-dir", str(folder / "run"), "--overwrite"]
    words += ["--max-steps", str(steps), "--eval-fraction", "0", "--max-length", "256"]
    environment = {name: value for name, value in os.environ.items() if name not in WAITING}
    command = [sys.executable, "-m", "lorakit", "train", *words]
    done = subprocess.run(
        command, env=environment | {SPIN_VARIABLE: str(spins)}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [row["tokens_per_second"] for row in rows if "tokens_per_second" in row][2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spins", type=int, nargs="+", default=[DEFAULT, SPINS])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rates = defaultdict[tuple[int, bool], list[float]](list)
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(options.rounds):
            for has_neighbour in (False, True):
                neighbour = subprocess.Popen([sys.executable, "-c", BUSY]) if has_neighbour else None
                try:
                    for spins in options.spins:
                        rates[spins, has_neighbour] += tokens_per_second(spins, options.steps, Path(folder))
                finally:
                    if neighbour is not None:
                        neighbour.kill()
                        neighbour.wait()
    for (spins, has_neighbour), found in rates.items():
        facts = {"spins": spins, "beside": "one busy process" if has_neighbour else "nothing"}
        ratio = statistics.median(found) / statistics.median(rates[options.spins[0], has_neighbour])
        append_row("neighbour", facts | {"ratio_to_first": round(ratio, 3)}, {"tokens_per_second": found})


if __name__ == "__main__":
    main()
