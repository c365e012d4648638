"""Claim: quantizing rows to int8 in the pass that makes them saves less than 1% of a training step.

    python benchmarks/bench_fused_quantization.py [--rounds 200] [--step 1.25]

SmolLM2's widths, bf16, 512 rows, as one of two threads computes them for 4 × 256 tokens: the norm before attention and
before the gate, the activation before the down projection, and its gradient. Side "apart": all rows are made, then all
are quantized, as in a step now. Side "fused": each row is quantized right after it was made. Both use the functions of
lorakit/ops/kernels, compiled into one program (fused_quantization.c), and take turns; other data is written before
each.

A row has seconds of both sides, what fusing would save in a step of 30 layers, and the fraction of a step of `--step`
seconds (the int8 step of bench_int8.py). It is appended to results/fused_quantization.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import tempfile
from pathlib import Path

from runner import append_row

from lorakit.ops.kernels import building

KINDS = {"norm": (0, 576, 2), "activation": (1, 1536, 1), "gradient of the activation": (2, 1536, 1)}
"""Number in the program, width, and times per layer and step."""
ROWS, LAYERS = 512, 30
SOURCE = Path(__file__).with_name("fused_quantization.c")


def main() -> None:
    """Measure each kind, and append a row per kind and side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--step", type=float, default=1.25, help="seconds of a step")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fused"
        flags = [*building.FLAGS, building.WIDEST, "-fopenmp-simd", "-DBF16", "-I", str(building.SOURCE.parent)]
        subprocess.run(["gcc", *flags, str(SOURCE), "-o", str(program), "-lm"], check=True)
        for name, (kind, width, times) in KINDS.items():
            words = [str(program), *map(str, (kind, width, ROWS, options.rounds))]
            lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
            apart, fused = zip(*(map(float, line.split()) for line in lines), strict=True)
            saved = (statistics.median(apart) - statistics.median(fused)) * times * LAYERS
            facts = {"kind": name, "width": width, "rows": ROWS, "saved_in_a_step": round(saved, 5)}
            facts["fraction_of_step"] = round(saved / options.step, 5)
            for side, seconds in (("apart", apart), ("fused", fused)):
                append_row("fused_quantization", {"side": side, **facts}, {"seconds": list(seconds)})


if __name__ == "__main__":
    main()
