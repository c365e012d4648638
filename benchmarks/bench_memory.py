"""Claim: the planned peak memory of `lorakit train` is within 15% of what the process holds at its peak.

    python benchmarks/bench_memory.py [--models smollm2 gemma3] [--sizes 4x256] [--dtypes bfloat16 float32]
        [--recompute none] [--accelerate both] [--markdown docs/memory.md]

Each case is a whole run of three steps in a new process, set up like the command: imports, data, weights, steps and the
saved adapter. Planned is `peak_bytes` of the plan that the run writes to run.json; measured is the peak resident size
of the process at the end (VmHWM), and at the moments in between. Rows have exactly the given number of tokens, and all
of them contribute to the loss. `smollm2` has its published weights; `gemma3` has the widths and the vocabulary of
Gemma 3 270M, fewer layers, random weights, and the tokenizer of `smollm2`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from resident import status
from runner import append_row

BOUND = 0.15
RECOMPUTED = ("none", "feed-forward", "layers")
SIZES = ((1, 32), (8, 32), (4, 128), (4, 256), (2, 512), (2, 1024))
"""Rows per batch and tokens per row."""
DTYPES = ("bfloat16", "float32")
ACCELERATE = {"both": (True, False), "yes": (True,), "no": (False,)}

GEMMA = {"hidden_size": 640, "intermediate_size": 2048, "num_attention_heads": 4, "num_key_value_heads": 1}
GEMMA |= {"head_dim": 256, "vocab_size": 262_144, "max_position_embeddings": 32_768, "sliding_window": 512}
GEMMA_LAYERS = 6


def cases(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the cases: every selected model, dtype, size, kind of forward pass and recomputation."""
    for model, dtype, (rows, length) in itertools.product(options.models, options.dtypes, options.sizes):
        for accelerate, recompute in itertools.product(ACCELERATE[options.accelerate], options.recompute):
            if accelerate or recompute != "feed-forward":
                case = {"model": model, "dtype": dtype, "length": length, "rows": rows}
                yield {**case, "accelerate": accelerate, "recompute": recompute}


def gemma_directory(folder: Path) -> Path:
    """Write a small Gemma 3 with random weights and return its directory."""
    import torch
    import transformers

    from lorakit import hub

    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(**GEMMA, num_hidden_layers=GEMMA_LAYERS, dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    hub.load_tokenizer(hub.resolve("smollm2")).save_pretrained(folder)
    return folder


def write_rows(path: Path, length: int, count: int) -> None:
    """Write rows that are truncated to exactly `length` tokens; all but the first contribute to the loss."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(count):
            file.write(json.dumps({"prompt": "a", "completion": f" {number}" + " a" * length}) + "\n")


def measure(case: dict[str, Any], model: str, steps: int) -> dict[str, Any]:
    """Run one case in a new process and return its planned and measured sizes in bytes."""
    command = [sys.executable, __file__, "--child", json.dumps({**case, "model": model}), "--steps", str(steps)]
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train for a few steps, and return what was planned and what the process held at its peak."""
    from lorakit import allocator

    allocator.set_up()
    from lorakit.train import TrainSettings, run
    from lorakit.train.progress import Progress

    peaks = {"imports": status("VmRSS")}

    class Phases(Progress):
        def begin(self, step: int, total_steps: int) -> None:
            peaks["prepare"], peaks["before_steps"] = status("VmHWM"), status("VmRSS")

        def train_row(self, row: Any) -> None:
            peaks[f"step_{row['step']}"] = status("VmHWM")

    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder, "rows.jsonl")
        write_rows(data, case["length"], case["rows"] * steps)
        settings = TrainSettings(
            model=case["model"],
            data=[str(data)],
            output_dir=str(Path(folder, "run")),
            eval_fraction=0.0,
            max_length=case["length"],
            per_device_train_batch_size=case["rows"],
            max_steps=steps,
            dtype=case["dtype"],
            recompute=case["recompute"],
            accelerate=case["accelerate"],
            allow_missing_end=True,
            save_steps=steps,
            device="cpu",
        )
        run(settings, Phases())
        plan = json.loads(Path(folder, "run", "run.json").read_text(encoding="utf-8"))["plan"]
    memory = plan["lora"]["memory"]
    lines = {line["cause"]: line["at_peak_bytes"] for line in memory["lines"]}
    return {
        "planned_bytes": memory["peak_bytes"],
        "peak_bytes": status("VmHWM"),
        "moment": memory["peak_moment"],
        "tokens": plan["job"]["length_tokens"],
        "lines": lines,
        "peaks": peaks,
    }


HEADER = (
    "| model | dtype | rows × tokens | accelerated | recompute | planned | measured | planned / measured "
    "| planned peak |",
    "|---|---|---:|---|---|---:|---:|---:|---|",
)
KEYS = 5
"""Number of columns that identify a case."""


def line(row: dict[str, Any]) -> str:
    """Return a result as a row of a Markdown table."""
    return (
        f"| {row['model']} | {row['dtype']} | {row['rows']} × {row['length']} "
        f"| {'yes' if row['accelerate'] else 'no'} | {row['recompute']} "
        f"| {row['planned_bytes'] / 1e6:,.0f} MB | {row['peak_bytes'] / 1e6:,.0f} MB "
        f"| {row['planned_bytes'] / row['peak_bytes']:.2f} | {row['moment']} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--models", nargs="+", choices=("smollm2", "gemma3"), default=["smollm2", "gemma3"])
    parser.add_argument("--sizes", nargs="+", type=_size, default=SIZES, metavar="ROWSxTOKENS")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--recompute", nargs="+", choices=RECOMPUTED, default=RECOMPUTED)
    parser.add_argument("--accelerate", choices=ACCELERATE, default="both")
    parser.add_argument("--markdown", type=Path, help="also replace the rows of these cases in this file's table")
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(json.loads(arguments.child), arguments.steps)))
        return
    lines, missed = [], []
    with tempfile.TemporaryDirectory() as folder:
        models = {"smollm2": "smollm2"}
        if "gemma3" in arguments.models:
            models["gemma3"] = str(gemma_directory(Path(folder)))
        for case in cases(arguments):
            found = measure(case, models[case["model"]], arguments.steps)
            ratio = found["planned_bytes"] / found["peak_bytes"]
            samples = {"peak_bytes": [found["peak_bytes"]], "ratio": [ratio]}
            append_row("memory", {**case, "planned_bytes": found["planned_bytes"]}, samples, quiet=True)
            lines.append(line({**case, **found}))
            print(lines[-1], flush=True)
            if abs(ratio - 1) > BOUND:
                missed.append(case)
    if arguments.markdown:
        _insert(arguments.markdown, lines)
    if missed:
        raise SystemExit(f"outside of {BOUND:.0%}: {missed}")


def _size(text: str) -> tuple[int, int]:
    rows, _, tokens = text.partition("x")
    return int(rows), int(tokens)


def _insert(path: Path, lines: list[str]) -> None:
    """Replace the rows of cases in a table, and append the rows of new cases."""
    begin, end = "<!-- begin: bench_memory -->", "<!-- end: bench_memory -->"
    head, _, rest = path.read_text(encoding="utf-8").partition(begin)
    before, _, after = rest.partition(end)
    rows = {
        tuple(text.split("|")[1 : KEYS + 1]): text for text in (*before.strip().splitlines()[len(HEADER) :], *lines)
    }
    path.write_text("\n".join([head + begin, *HEADER, *rows.values(), end]) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
