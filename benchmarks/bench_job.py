"""Claim: an instruction-tuning job, from process start to the same evaluation loss, compared with `Trainer` + peft.

    python benchmarks/bench_job.py [--steps 60] [--dropout 0.05] [--rounds 1] [--sides peft lorakit again int8]

SmolLM2-135M, bf16, r 16 on all linear layers. Prompts and completions are cut from Python's language reference, with
skewed lengths (log-normal), 30% of the tokens labeled. Both sides start a new process, import, load, encode the same
files, take the same number of steps of 4 rows at the same constant rate, evaluate before and after on the same rows and
save the adapter: `lorakit train`, and transformers' Trainer with peft, padding each batch to its longest row, with
fused AdamW (its default). The wall time of the whole process counts. Both sides run with the default allocator and with
one that keeps freed blocks: `lorakit train` configures it itself, the peft process gets it at its start. The first run
of `lorakit train` finds no evaluation in its cache; the side "again" repeats it, and reads the one that it kept. The
side "int8" multiplies the base in int8 (`--base-matmul int8`), also without an evaluation in its cache.
Afterwards one function evaluates both saved adapters on the evaluation rows; if lorakit's loss is more than 1% above
peft's, the row records it and the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from runner import append_row

OURS, AGAIN, THEIRS = "lorakit train", "lorakit train, again", "Trainer + peft"
INT8 = "lorakit train --base-matmul int8"
SIDES = {"peft": THEIRS, "lorakit": OURS, "again": AGAIN, "int8": INT8}
ROWS, EVALUATED, MAX_LENGTH, RANK, ALPHA, RATE = 4, 32, 512, 16, 32, 3e-4
CHARACTERS, SPREAD, TRAINED = 300, 0.9, 0.285  # median length of a row, std of its logarithm, fraction of the answer
SLACK = 1.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--allocators", nargs="+", choices=("stock", "tuned"), default=["stock", "tuned"])
    parser.add_argument("--sides", nargs="+", choices=tuple(SIDES), default=["peft", "lorakit"])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        trainer(json.loads(options.child))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, options.steps)
        sides = [side for name, side in SIDES.items() if name in options.sides]
        if AGAIN in sides and OURS not in sides:
            parser.error('the side "again" repeats the side "lorakit"; add that to --sides')
        cases = [(side, allocator) for allocator in options.allocators for side in sides]
        seconds: dict[tuple[str, str], list[float]] = {case: [] for case in cases}
        for number in range(options.rounds):
            for case in cases[number % 2 :] + cases[: number % 2]:  # each round starts with another case
                seconds[case].append(run(*case, folder, options))
        losses = {case: evaluated(saved(*case, folder), folder) for case in cases}
        facts = about(folder)
    report(seconds, losses, {**facts, "steps": options.steps, "dropout": options.dropout})


def write_rows(folder: Path, steps: int) -> None:
    """Write train.jsonl, with enough rows for the steps, and eval.jsonl."""
    from lorakit import data

    drawn = random.Random(0)
    text = "\n".join(record.text for record in data.python_reference() if isinstance(record, data.Document))
    rows, at = [], 0
    while len(rows) < steps * ROWS + EVALUATED:
        size = max(40, min(int(drawn.lognormvariate(0, SPREAD) * CHARACTERS), 3 * MAX_LENGTH))
        if at + size > len(text):
            raise SystemExit(f"the text gives {len(rows)} rows; use fewer --steps")
        answer = at + int(size * (1 - TRAINED))
        rows.append({"prompt": text[at:answer], "completion": text[answer : at + size]})
        at += size
    drawn.shuffle(rows)
    for name, part in (("eval", rows[:EVALUATED]), ("train", rows[EVALUATED:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")


def run(side: str, allocator: str, folder: Path, options: argparse.Namespace) -> float:
    """Return the seconds of a whole process."""
    target = saved(side, allocator, folder)
    if side != THEIRS:
        matmul = ["--base-matmul", "int8"] if side == INT8 else []
        command = [sys.executable, "-m", "lorakit", "train", *flags(folder, target.parent, options), *matmul]
    else:
        asked = {"folder": str(folder), "saved": str(target), "steps": options.steps, "dropout": options.dropout}
        command = [sys.executable, __file__, "--child", json.dumps(asked)]
    environment = {**os.environ, "LORAKIT_ALLOCATOR": "stock" if allocator == "stock" else ""}
    if side != THEIRS:
        kept = folder / f"cache-{allocator}-{'int8' if side == INT8 else 'dtype'}"
        environment["LORAKIT_CACHE"] = str(cache(kept, is_new=side != AGAIN))
    began = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    taken = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr}")
    return taken


def saved(side: str, allocator: str, folder: Path) -> Path:
    """Return where a side saves its adapter."""
    name = next(name for name, one in SIDES.items() if one == side)
    return folder / f"{name}-{allocator}" / "adapter"


def cache(found: Path, *, is_new: bool) -> Path:
    """Return a cache directory with what this machine's has, except for evaluations; `is_new` removes those kept since.

    The converted model, the compiled kernels and the results of autotuning stay, as after any earlier run.
    """
    from lorakit.caches import EVALUATIONS

    found.mkdir(exist_ok=True)
    for path in EVALUATIONS.path().parent.iterdir():
        if path != EVALUATIONS.path() and not (found / path.name).exists():
            (found / path.name).symlink_to(path.absolute())
    if is_new:
        (found / EVALUATIONS.place).unlink(missing_ok=True)
    return found


def flags(folder: Path, target: Path, options: argparse.Namespace) -> list[str]:
    """Return the command line of `lorakit train`."""
    given = {
        "model": "smollm2",
        "data": folder / "train.jsonl",
        "eval-data": folder / "eval.jsonl",
        "output-dir": target,
        "dtype": "bfloat16",
        "r": RANK,
        "lora-alpha": ALPHA,
        "lora-dropout": options.dropout,
        "max-length": MAX_LENGTH,
        "per-device-train-batch-size": ROWS,
        "gradient-accumulation-steps": 1,
        "max-steps": options.steps,
        "eval-steps": options.steps,
        "learning-rate": RATE,
        "lr-scheduler-type": "constant",
        "warmup-ratio": 0,
        "seed": 0,
    }
    return [str(word) for flag, value in given.items() for word in (f"--{flag}", value)] + ["--overwrite"]


def sequences(folder: Path, name: str) -> Any:
    """Return the rows of a file, encoded as in `lorakit train`."""
    from lorakit import data, hub

    records = data.read_records([folder / f"{name}.jsonl"])
    return data.encode(records, hub.load_tokenizer("smollm2"), MAX_LENGTH).sequences


def trainer(asked: dict[str, Any]) -> None:
    """Train as users commonly do: a model with peft, Trainer, a collator that pads."""
    from lorakit.allocator import keep_large_blocks

    keep_large_blocks()  # unless the environment is set to "stock"
    import peft
    import transformers

    from lorakit import hub

    folder = Path(asked["folder"])
    tokenizer, model = hub.load_tokenizer("smollm2"), hub.load_model("smollm2", dtype="bfloat16")
    fields = {"r": RANK, "lora_alpha": ALPHA, "lora_dropout": asked["dropout"], "target_modules": "all-linear"}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **fields))
    rows = {name: [_row(one) for one in sequences(folder, name)] for name in ("train", "eval")}
    arguments = transformers.TrainingArguments(
        output_dir=str(Path(asked["saved"]).parent),
        max_steps=asked["steps"],
        per_device_train_batch_size=ROWS,
        per_device_eval_batch_size=ROWS,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        eval_strategy="steps",
        eval_steps=asked["steps"],
        eval_on_start=True,
        prediction_loss_only=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        seed=0,
    )
    transformers.Trainer(
        model,
        arguments,
        train_dataset=rows["train"],
        eval_dataset=rows["eval"],
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, padding=True),
    ).train()
    model.save_pretrained(asked["saved"])


def _row(one: Any) -> dict[str, list[int]]:
    return {"input_ids": list(one.input_ids), "attention_mask": [1] * len(one), "labels": list(one.labels)}


def evaluated(adapter: Path, folder: Path) -> float:
    """Return the loss of a saved adapter on the evaluation rows."""
    import torch

    from lorakit import core, data, hub
    from lorakit.train.loop.loop import evaluate

    model = hub.load_model("smollm2", dtype="bfloat16")
    core.load_adapter(model, adapter)
    found = evaluate(model, data.by_length(sequences(folder, "eval"), ROWS), torch.device("cpu"))
    if found is None:
        raise SystemExit("the evaluation was interrupted")
    return found.loss


def about(folder: Path) -> dict[str, Any]:
    """Return fractions and lengths of the training rows."""
    rows = sequences(folder, "train")
    lengths = sorted(len(row) for row in rows)
    trained = sum(row.trained_tokens for row in rows) / sum(lengths)
    quantiles = {"length_p50": lengths[len(lengths) // 2], "length_p90": lengths[9 * len(lengths) // 10]}
    return {"tokens": sum(lengths), "trained_share": round(trained, 3), **quantiles, "longest": lengths[-1]}


def report(
    seconds: dict[tuple[str, str], list[float]], losses: dict[tuple[str, str], float], facts: dict[str, Any]
) -> None:
    """Append a row for each side and allocator."""
    worse = []
    for (side, allocator), taken in seconds.items():
        row = {"what": side, "model": "smollm2", "allocator": allocator, "r": RANK, **facts}
        row["eval_loss"] = round(losses[side, allocator], 4)
        theirs = seconds.get((THEIRS, allocator))
        if theirs is not None:
            row["times_peft"] = round(min(theirs) / min(taken), 3)
            row["same_loss"] = losses[side, allocator] <= SLACK * losses[THEIRS, allocator]
            worse += [] if row["same_loss"] else [f"{side}, {allocator}"]
        append_row("job", row, {"seconds": taken})
    if worse:
        raise SystemExit(f"more than 1% above peft's evaluation loss: {worse}; times are not comparable")


if __name__ == "__main__":
    main()
