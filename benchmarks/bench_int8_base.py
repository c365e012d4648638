"""Measure how long SmolLM2-135M takes to become an int8 base, and the memory of the process, next to the bf16 base.

    python benchmarks/bench_int8_base.py [--repeats 3] [--rows 8] [--length 256]

Each sample is a new process, whose model is loaded in bf16: from a file in bf16, which is mapped, or from one in fp32,
which is converted. The memory is that above the process before the model is loaded, from then on: all of it, and the
part that is not pages of files, which the system cannot drop. The bf16 side runs the same rows without labels and
quantizes nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from resident import peaks, status
from runner import append_row

SIDES = ("bf16", "int8")
FILES = ("bfloat16", "float32")


def measured(side: str, source: str, rows: int, length: int) -> dict[str, float]:
    """Return the seconds, the processor's seconds and the memory of this process for one side.

    Args:
        side: One of `SIDES`.
        source: Name or folder of the model.
        rows: Calibration rows.
        length: Tokens per row.
    """
    import torch

    from lorakit.core import base_losses, quantize_base
    from lorakit.hub import load_model

    load_model("smollm2", dtype="bfloat16")  # imports what loading needs
    gc.collect()
    before = {name: status(name) for name in ("VmRSS", "RssAnon")}
    with peaks() as loading:
        model = load_model(source, dtype="bfloat16", convert_in_files=side == "int8").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    batches = [{"input_ids": torch.randint(0, 49_000, (1, length), generator=generator)} for _ in range(rows)]
    with peaks() as found:
        began, used = time.perf_counter(), time.process_time()
        if side == "int8":
            quantize_base(model, batches)
        else:
            base_losses(model, batches)
        seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - used}
    gc.collect()
    memory = {
        "resident_mb": status("VmRSS") - before["VmRSS"],
        "loading_peak_mb": loading["VmHWM"] - before["VmRSS"],
        "peak_mb": found["VmHWM"] - before["VmRSS"],
        "anonymous_peak_mb": found["RssAnon"] - before["RssAnon"],
    }
    return {**seconds, **{name: size / 1e6 for name, size in memory.items()}}


def write_fp32(folder: str) -> None:
    """Write the model in fp32 to a folder."""
    from lorakit.hub import load_model

    load_model("smollm2", dtype="float32").save_pretrained(folder)


def samples_of(side: str, source: str, given: argparse.Namespace) -> Mapping[str, float]:
    """Return the values of one new process."""
    command = [sys.executable, str(Path(__file__)), "--side", side, "--source", source]
    command += ["--rows", str(given.rows), "--length", str(given.length)]
    found: Mapping[str, float] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return found


def main() -> None:
    """Alternate the sides, and append a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--source", default="smollm2", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        print(json.dumps(measured(given.side, given.source, given.rows, given.length)))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_fp32(folder)
        sources = dict(zip(FILES, ("smollm2", folder), strict=True))
        cases = [(file, side) for file in FILES for side in SIDES]
        rounds = [{case: samples_of(case[1], sources[case[0]], given) for case in cases} for _ in range(given.repeats)]
    for file, side in cases:
        samples = {name: [one[file, side][name] for one in rounds] for name in rounds[0][file, side]}
        labels = {"side": side, "file": file, "rows": given.rows, "length": given.length}
        append_row("int8_base", labels, samples)


if __name__ == "__main__":
    main()
