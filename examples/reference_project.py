"""The LoRA project of many tutorials, measured: counts, memorization, tasks, rules of thumb, full fine-tuning.

    python examples/reference_project.py            # SmolLM2-135M on Python's reference, about 20 minutes on 2 cores
    python examples/reference_project.py --quick    # the same on a tiny random model, in seconds

It prints Markdown; docs/reference_project.md is the output of a full run. The file has data, training, one function per
part, and `main` at the end.
"""

from __future__ import annotations

import argparse
import inspect
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lorakit
from lorakit import LoraConfig, TaskType, hub
from lorakit.data import Completion, Document, Loader, Records, Sequence, encode, padding_id, python_reference
from lorakit.plan import catalogue, estimate
from lorakit.tables import format_bytes
from lorakit.train.loop.loop import evaluate
from lorakit.train.loop.step import loss_sum

CONFIG: dict[str, Any] = {
    "r": 8,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "bias": "none",
    "task_type": TaskType.CAUSAL_LM,
    "target_modules": ["c_attn", "c_proj"],
}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

MEMORIZED = ("with", "for", "while", "lambda")
HELD_OUT = ("try", "raise", "import")
PRACTICE = ("compound", "execmodel", "function", "assignment", "strings", "comparisons", "calls", "objects")
MODULES = (
    "textwrap",
    "json",
    "math",
    "statistics",
    "shutil",
    "bisect",
    "heapq",
    "itertools",
    "glob",
    "random",
    "string",
)


@dataclass(frozen=True)
class Sizes:
    """Sizes of all parts: of the full run, and of the quick one for tests."""

    length: int
    epochs: int
    practice_steps: int
    task_epochs: int
    measured_steps: int
    evaluated: int  # sequences of the held-out text
    rows: int  # per batch


FULL = Sizes(length=256, epochs=20, practice_steps=20, task_epochs=4, measured_steps=8, evaluated=16, rows=4)
QUICK = Sizes(length=32, epochs=2, practice_steps=2, task_epochs=1, measured_steps=2, evaluated=2, rows=1)


# --- model and data


class ByteTokenizer:
    """One token per byte, for the quick run."""

    eos_token_id, bos_token_id, pad_token_id, chat_template = 0, None, 0, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Return the bytes of a text as ids."""
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int], **_: Any) -> str:
        """Return the text of ids."""
        return bytes(ids).decode("utf-8", "replace")


def load(quick: bool) -> tuple[Any, Any, str]:
    """Return a new base, its tokenizer and its name."""
    if quick:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        return LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).eval(), ByteTokenizer(), "a tiny random Llama"
    name = "SmolLM2-135M-Instruct (dequantized Q4_1, bf16)"
    return hub.load_model("smollm2", "bfloat16"), hub.load_tokenizer("smollm2"), name


def topics(names: tuple[str, ...]) -> Records:
    """Return topics of Python's language reference, one document each."""
    return Records(r for r in python_reference() if isinstance(r, Document) and r.source.rpartition("/")[2] in names)


def tasks() -> dict[str, Records]:
    """Return three tasks over functions of the standard library: equal prompts, different answers."""
    rows: dict[str, Records] = {"summary": Records(), "signature": Records(), "module": Records()}
    seen: set[str] = set()  # a function that several modules export is used once
    for module_name in MODULES:
        module = __import__(module_name)
        for name, function in sorted(vars(module).items()):
            if name in seen or name.startswith("_") or not inspect.isroutine(function) or not function.__doc__:
                continue
            try:
                parameters = ", ".join(inspect.signature(function).parameters)
            except ValueError:  # some built-in functions have no signature
                continue
            seen.add(name)
            answers = {"summary": function.__doc__.split(".")[0], "signature": parameters, "module": module_name}
            for task, answer in answers.items():
                rows[task].append(Completion(f"{name}: ", " ".join(answer.split())[:120], task))
    return rows


# --- training


@dataclass(frozen=True)
class Trained:
    """Losses and costs of a training."""

    tokens: int
    seconds: list[float]  # per step
    optimizer: torch.optim.Optimizer


def train(
    model: Any, parameters: list[Any], sequences: list[Sequence], *, rows: int, epochs: int, rate: float, limit: int = 0
) -> Trained:
    """Train with AdamW, a short warm-up and a cosine schedule; the loss is the mean over the labeled tokens."""
    loader = Loader(sequences, rows, seed=0, epochs=epochs)
    steps = limit or epochs * loader.batches_per_epoch
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0, fused=True)
    model.train()
    times, tokens = [], 0
    for step, batch in zip(range(steps), loader, strict=False):
        began = time.perf_counter()
        warm = min(1.0, (step + 1) / max(1, steps // 20))
        optimizer.param_groups[0]["lr"] = rate * warm * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        (loss_sum(model, batch, "cpu") / batch.trained_tokens).backward()
        optimizer.step()
        times.append(time.perf_counter() - began)
        tokens += batch.tokens
    model.eval()
    return Trained(tokens, times, optimizer)


def perplexity(model: Any, sequences: list[Sequence], tokenizer: Any) -> float:
    """Return the exponential of the mean loss over all labeled tokens, without dropout."""
    found = evaluate(model, Loader(sequences, 4, 0, shuffle=False, epochs=1, pad_id=padding_id(tokenizer)), "cpu")
    assert found is not None
    return found.perplexity


def trained_parts(model: Any, name: str) -> list[Any]:
    """Return the parameters of one adapter."""
    return [parameter for _, parameter in lorakit.trainable_parameters(model, name)]


def on_disk(*paths: Path) -> str:
    """Return the total size of files and folders."""
    files = [inner for path in paths for inner in ([path] if path.is_file() else path.rglob("*")) if inner.is_file()]
    return format_bytes(sum(file.stat().st_size for file in files))


# --- the parts


def count_part(sizes: Sizes, quick: bool) -> None:
    """Print the usual counts, and how they come about."""
    print("## 1. Number of trained parameters\n")
    config = LoraConfig(**CONFIG)
    shape = catalogue.published("gpt2")
    assert shape is not None
    plan = estimate(shape, config)
    with torch.device("meta"):  # shapes only: nothing is downloaded or initialized
        gpt2 = GPT2LMHeadModel(GPT2Config())
    total = sum(parameter.numel() for parameter in gpt2.parameters())
    trainable = lorakit.attach(gpt2, config).trainable_parameters
    assert (trainable, total) == (plan.counted.trainable, plan.counted.base)
    print(f"GPT-2 Small: **{trainable:,}** trainable of **{total:,}** ({trainable / total:.2%}).\n")
    for reason in plan.reasons:
        print(f"- {reason}")
    print("\nFiles of this adapter:\n\n| | bytes |\n|---|---|")
    for file in plan.files:
        print(f"| {file.what} | {file.formula} = {file.size_bytes:,} |")


def memorize_part(sizes: Sizes, quick: bool) -> None:
    """Train twenty epochs on a small text: the model memorizes it, which its loss on that text cannot show."""
    print("\n## 2. Twenty epochs on a small text\n")
    model, tokenizer, name = load(quick)
    text = encode(topics(MEMORIZED), tokenizer, sizes.length)
    learned = text.sequences[: 8 if quick else None]
    other = encode(topics(HELD_OUT), tokenizer, sizes.length).sequences[: sizes.evaluated]
    before = [perplexity(model, part, tokenizer) for part in (learned, other)]
    report = lorakit.attach(model, LoraConfig(**{**CONFIG, "target_modules": "all-linear"}), seed=0)
    trained = train(model, trained_parts(model, "default"), learned, rows=1, epochs=sizes.epochs, rate=1e-3)
    after = [perplexity(model, part, tokenizer) for part in (learned, other)]
    print(f"{name}, r = 8, alpha = 16, dropout 0.05 on all linear layers: {report.trainable_parameters:,} parameters.")
    print(
        f"{sum(map(len, learned)):,} tokens of the topics {', '.join(MEMORIZED)}; "
        f"{sizes.epochs} epochs, {len(trained.seconds)} steps, "
        f"{sum(trained.seconds):.0f} s ({trained.tokens / sum(trained.seconds):.0f} tokens/s).\n"
    )
    print("| perplexity | before | after |\n|---|---|---|")
    for label, was, now in zip(("the trained text", "held-out topics"), before, after, strict=True):
        print(f"| {label} | {was:.2f} | {now:.2f} |")
    trend = "rose: memorizing one text makes the model worse on others" if after[1] > before[1] else "fell"
    print("\nThe first row shows memorization. Only the second shows generalization.", f"Perplexity there {trend}.")
    print()
    with tempfile.TemporaryDirectory() as folder:
        sizes_on_disk(model, trained.optimizer, Path(folder))


def sizes_on_disk(model: Any, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Print the sizes on disk."""
    named = lorakit.trainable_parameters(model)
    lorakit.save_adapter(model, folder / "adapter")
    pairs = [(f"{key}/{name}", optimizer.state[p][key]) for name, p in named for key in ("exp_avg", "exp_avg_sq")]
    save_file(dict(pairs), folder / "moments")
    lorakit.merge_and_unload(model)  # a plain model again, with the adapter merged
    model.save_pretrained(folder / "full")
    adapter = folder / "adapter" / "adapter_model.safetensors"
    print("| file | size |\n|---|---|")
    print(f"| adapter, fp32 | {on_disk(adapter)} |")
    print(f"| adapter with Adam's two moments | {on_disk(adapter, folder / 'moments')} |")
    print(f"| the whole model, the adapter merged | {on_disk(folder / 'full')} |")


def tasks_part(sizes: Sizes, quick: bool) -> None:
    """Train three tasks as three adapters on one base; evaluate each on each task, and all of them in one batch."""
    print("\n## 3. Three tasks, one base\n")
    model, tokenizer, _ = load(quick)
    train_rows, test_rows = {}, {}
    records = tasks()
    for task, rows in records.items():  # every fifth function is held out, the same ones in all tasks
        test_rows[task] = encode(rows[::5], tokenizer, sizes.length).sequences[: 2 * sizes.evaluated]
        kept = [row for number, row in enumerate(rows) if number % 5]
        train_rows[task] = encode(kept, tokenizer, sizes.length).sequences[: 12 if quick else None]
    seconds = 0.0
    for number, (task, sequences) in enumerate(train_rows.items()):
        lorakit.attach(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), task, seed=number)
        with lorakit.use(model, task):
            trained = train(model, trained_parts(model, task), sequences, rows=4, epochs=sizes.task_epochs, rate=1e-3)
        seconds += sum(trained.seconds)
    print(f"The prompt is a function's name in all tasks; the adapter selects the answer. {seconds:.0f} s in total.\n")
    print(f"| held-out perplexity | {' | '.join(test_rows)} |\n|---|{'---|' * len(test_rows)}")
    for task in (None, *train_rows):
        with lorakit.disable(model) if task is None else lorakit.use(model, task):
            cells = [f"{perplexity(model, rows, tokenizer):.2f}" for rows in test_rows.values()]
        print(f"| {task or 'base'} | {' | '.join(cells)} |")
    unseen = records["summary"][100]
    mixed_batch(model, tokenizer, list(train_rows), unseen, 8 if quick else 24)


@torch.no_grad()
def mixed_batch(model: Any, tokenizer: Any, names: list[str], unseen: Any, length: int) -> None:
    """Decode one prompt with a different adapter in each row, and compare with single rows."""
    prompt = tokenizer(unseen.prompt, add_special_tokens=False)["input_ids"]
    start = torch.tensor([prompt] * len(names))
    with lorakit.route(model, names):
        together = model(start).logits
        rows = start
        for _ in range(length):
            rows = torch.cat([rows, model(rows).logits[:, -1:].argmax(-1)], dim=1)
    alone = []
    for name in names:
        with lorakit.use(model, name):
            alone.append(model(start[:1]).logits)
    difference = (torch.cat(alone) - together).abs().max().item()
    print(f"\nThree rows of one batch, each with a different adapter, prompt `{unseen.prompt}` (held out).")
    print(f"The logits differ from those of single rows by at most {difference:.2g}.\n")
    print("| adapter | answer |\n|---|---|")
    for name, row in zip(names, rows.tolist(), strict=True):
        ids = row[len(prompt) :]
        ids = ids[: ids.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in ids else ids
        print(f"| {name} | `{' '.join(tokenizer.decode(ids).split()).replace('|', '/').replace('`', '')}` |")


def rules_part(sizes: Sizes, quick: bool) -> None:
    """Test rules of thumb: rank, alpha = 2r, attention only or all linear layers."""
    print("\n## 4. Rules of thumb, tested\n")
    model, tokenizer, _ = load(quick)
    practice = encode(topics(PRACTICE), tokenizer, sizes.length).sequences
    other = encode(topics(HELD_OUT), tokenizer, sizes.length).sequences[: sizes.evaluated]
    print(f"{sizes.practice_steps} steps of {sizes.rows} × {sizes.length} tokens, learning rate 1e-3, seed 0.\n")
    print("| targets | r | alpha | alpha / r | trained | held-out perplexity |\n|---|---|---|---|---|---|")
    print(f"| none: the base | | | | 0 | {perplexity(model, other, tokenizer):.2f} |")
    runs: list[tuple[str | list[str], int, int]] = [("all-linear", r, 2 * r) for r in (4, 8, 16, 32)]
    runs += [("all-linear", 8, 8), ("all-linear", 8, 32), (ATTENTION, 8, 16), (ATTENTION, 21, 42)]
    for targets, r, alpha in runs[:: 3 if quick else 1]:
        report = lorakit.attach(model, LoraConfig(r=r, lora_alpha=alpha, target_modules=targets), seed=0)
        parts = trained_parts(model, "default")
        train(model, parts, practice, rows=sizes.rows, epochs=99, rate=1e-3, limit=sizes.practice_steps)
        found = perplexity(model, other, tokenizer)
        lorakit.detach(model)
        label = "all linear" if targets == "all-linear" else "attention only"
        print(f"| {label} | {r} | {alpha} | {alpha / r:g} | {report.trainable_parameters:,} | {found:.2f} |")
    print(
        "\nOne seed and a short run: differences of a few hundredths are noise. Attention only with r = 21 trains about"
    )
    print("as many parameters as all linear layers with r = 8.")


def full_part(sizes: Sizes, quick: bool) -> None:
    """Compare full fine-tuning with LoRA, each in a separate process, to measure separate peaks."""
    print("\n## 5. Full fine-tuning and LoRA, measured\n", flush=True)
    script = Path(__file__).with_name("full_fine_tuning.py")
    subprocess.run([sys.executable, str(script), *(["--quick"] if quick else [])], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny random model and a few steps")
    parser.add_argument("--parts", type=int, nargs="*", default=range(1, 6), help="1 to 5")
    arguments = parser.parse_args()
    quick, began = arguments.quick, time.perf_counter()
    sizes = QUICK if quick else FULL
    print("# Reference project\n")
    parts = (count_part, memorize_part, tasks_part, rules_part, full_part)
    for number in arguments.parts:
        parts[number - 1](sizes, quick)
        sys.stdout.flush()
    threads, version = torch.get_num_threads(), torch.__version__
    print(f"\nTotal: {(time.perf_counter() - began) / 60:.1f} minutes, {threads} threads, torch {version}.")


if __name__ == "__main__":
    main()
