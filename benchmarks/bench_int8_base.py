"""Measure how long SmolLM2-135M takes to become an int8 base, and the memory of the process, next to the bf16 base.

    python benchmarks/bench_int8_base.py [--repeats 3] [--rows 8] [--length 256]

Each sample is a new process. The memory is that above the process before the model is loaded. The bf16 side runs the
same rows without labels and quantizes nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from resident import status
from runner import append_row

SIDES = ("bf16", "int8")


def measured(side: str, rows: int, length: int) -> dict[str, float]:
    """Return the seconds and the memory of this process for one side.

    Args:
        side: One of `SIDES`.
        rows: Calibration rows.
        length: Tokens per row.
    """
    import torch

    from lorakit.core import base_losses, quantize_base
    from lorakit.hub import load_model

    load_model("smollm2", dtype="bfloat16")  # imports what loading needs
    gc.collect()
    before = status("VmRSS")
    model = load_model("smollm2", dtype="bfloat16").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 49_000, (1, length), generator=generator)} for _ in range(rows)]
    began = time.perf_counter()
    if side == "int8":
        quantize_base(model, batches)
    else:
        base_losses(model, batches)
    seconds = time.perf_counter() - began
    gc.collect()
    memory = {"resident_mb": status("VmRSS") - before, "peak_mb": status("VmHWM") - before}
    return {"seconds": seconds, **{name: size / 1e6 for name, size in memory.items()}}


def samples_of(side: str, given: argparse.Namespace) -> Mapping[str, float]:
    """Return the values of one new process."""
    command = [sys.executable, str(Path(__file__)), "--side", side, "--rows", str(given.rows)]
    command += ["--length", str(given.length)]
    found: Mapping[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def main() -> None:
    """Alternate the sides, and append a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measured(given.side, given.rows, given.length)))
        return
    rounds = [{side: samples_of(side, given) for side in SIDES} for _ in range(given.repeats)]
    for side in SIDES:
        samples = {name: [one[side][name] for one in rounds] for name in rounds[0][side]}
        append_row("int8_base", {"side": side, "rows": given.rows, "length": given.length}, samples)


if __name__ == "__main__":
    main()
