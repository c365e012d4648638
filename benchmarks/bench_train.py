"""Claim: `lorakit train` is at least as fast as peft in a plain loop on the same data.

    python benchmarks/bench_train.py [--steps 4] [--rounds 2] [--dropout 0 0.05]

SmolLM2-135M, bf16 base, fp32 adapters and optimizer, r 16 on all linear layers, 4 rows of 256 tokens, all labeled.
Four sides, interleaved in each round, each in a new process, on the same windows of the same text in the same order:
`lorakit train` (the command's own run, seconds from its metrics.jsonl), the same with `--base-matmul int8`, peft with
the model's own loss and fused AdamW, and lorakit.core in that same plain loop. The loops run with the C library's
default allocator, the command with its own. A step's seconds run from fetching the batch to the end of the optimizer
step; the first step of each process is not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runner import append_row

OURS, INT8, THEIRS, CORE = (
    "lorakit train",
    "lorakit train --base-matmul int8",
    "peft, plain loop",
    "lorakit.core, plain loop",
)
SIDES = {"lorakit": OURS, "int8": INT8, "peft": THEIRS, "core": CORE}
LENGTH, ROWS, RANK, ALPHA, RATE = 256, 4, 16, 32, 3e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.05])
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=list(SIDES))
    parser.add_argument("--child", nargs=3, metavar=("SIDE", "DROPOUT", "STEPS"))
    options = parser.parse_args()
    if options.child:
        side, dropout, steps = options.child
        print(json.dumps(measure(side, float(dropout), int(steps))))
        return
    sides = [side for name, side in SIDES.items() if name in options.sides]
    for dropout in options.dropout:
        samples: dict[str, list[float]] = {side: [] for side in sides}
        losses: dict[str, float] = {}
        for number in range(options.rounds):
            first = number % len(sides)  # each round starts with another side
            for side in sides[first:] + sides[:first]:
                found = child(side, dropout, options.steps)
                samples[side] += found["seconds"]
                losses[side] = found["last_loss"]
        report(dropout, samples, losses)


def report(dropout: float, samples: dict[str, list[float]], losses: dict[str, float]) -> None:
    """Append a row per side: seconds per step, tokens per second, and the ratio to peft's median."""
    theirs = samples.get(THEIRS)
    for side, seconds in samples.items():
        facts = {"what": side, "model": "smollm2", "dropout": dropout, "r": RANK, "rows": ROWS, "length": LENGTH}
        facts["last_loss"] = round(losses[side], 4)
        if theirs is not None:
            facts["times_peft"] = round(statistics.median(theirs) / statistics.median(seconds), 3)
        append_row("train", facts, {"seconds": seconds, "tokens_per_second": [ROWS * LENGTH / s for s in seconds]})


def child(side: str, dropout: float, steps: int) -> dict[str, Any]:
    """Measure one side in a new process."""
    command = [sys.executable, __file__, "--child", side, str(dropout), str(steps)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{side}: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(side: str, dropout: float, steps: int) -> dict[str, Any]:
    """Return the seconds of each step except the first, and the last step's loss."""
    if side in (OURS, INT8):
        return measure_command(dropout, steps, "int8" if side == INT8 else "dtype")
    model = adapted(side, dropout)
    return plain_loop(model, steps)


def text_file(folder: Path, steps: int) -> Path:
    """Write enough of Python's reference for the steps, as one document."""
    from lorakit import data

    records = data.python_reference()
    text = "\n".join(record.text for record in records if isinstance(record, data.Document))
    path = folder / "text.txt"
    path.write_text(text[: (steps + 2) * ROWS * LENGTH * 5], encoding="utf-8")
    return path


def measure_command(dropout: float, steps: int, base_matmul: str) -> dict[str, Any]:
    """Measure the command's own run; its metrics are what a user sees."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        flags = {
            "model": "smollm2",
            "data": text_file(Path(folder), steps),
            "output-dir": run,
            "dtype": "bfloat16",
            "base-matmul": base_matmul,
            "r": RANK,
            "lora-alpha": ALPHA,
            "lora-dropout": dropout,
            "max-length": LENGTH,
            "per-device-train-batch-size": ROWS,
            "gradient-accumulation-steps": 1,
            "max-steps": steps + 1,
            "learning-rate": RATE,
            "lr-scheduler-type": "constant",
            "warmup-ratio": 0,
            "weight-decay": 0,
            "seed": 0,
        }
        words = ["train", *(str(word) for flag, value in flags.items() for word in (f"--{flag}", value))]
        done = subprocess.run([sys.executable, "-m", "lorakit", *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        trained = [row for row in rows if "seconds" in row][1:]
        return {"seconds": [row["seconds"] for row in trained], "last_loss": trained[-1]["loss"]}


def adapted(side: str, dropout: float) -> Any:
    """Return SmolLM2 with the same adapter, from peft or lorakit."""
    import torch

    from lorakit import core, hub
    from lorakit.config import LoraConfig

    torch.manual_seed(0)
    model = hub.load_model("smollm2", dtype="bfloat16")
    fields: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": dropout, "target_modules": "all-linear"}
    if side == THEIRS:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    else:
        core.attach(model, LoraConfig(task_type="CAUSAL_LM", **fields))
    return model.train()


def plain_loop(model: Any, steps: int) -> dict[str, Any]:
    """Train as users commonly do: the model's own loss, backward, clip, fused AdamW."""
    import torch

    from lorakit import data, hub

    with tempfile.TemporaryDirectory() as folder:
        records = data.read_records([text_file(Path(folder), steps)])
        tokenizer = hub.load_tokenizer("smollm2")
        sequences = data.encode(records, tokenizer, LENGTH).sequences
    loader = data.Loader(sequences, ROWS, 0, pad_id=data.padding_id(tokenizer))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    seconds, loss = [], torch.zeros(())
    for _ in range(steps + 1):
        began = time.perf_counter()
        batch = next(loader)
        output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
        loss = output.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[1:], "last_loss": float(loss.detach())}


if __name__ == "__main__":
    main()
