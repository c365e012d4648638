"""Full fine-tuning compared with LoRA: the same model and batches, each trained in a separate process, measured.

        python examples/full_fine_tuning.py [--quick]

This is the last part of `reference_project.py`, and uses its model, text and training loop.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from reference_project import FULL, PRACTICE, QUICK, Sizes, load, on_disk, topics, train, trained_parts
from safetensors.torch import save_file

import lorakit
from lorakit import LoraConfig
from lorakit.data import encode
from lorakit.machine import peak_rss_bytes
from lorakit.tables import format_bytes


def compare(sizes: Sizes, quick: bool) -> None:
    """Measure LoRA and full fine-tuning of the same model on the same batches."""
    found = {}
    for method in ("lora", "full"):
        command = [sys.executable, __file__, "--measure", method, *(["--quick"] if quick else [])]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[method] = json.loads(done.stdout.splitlines()[-1])
    lora, full = found["lora"], found["full"]
    print("| | LoRA, r = 8, all linear | full fine-tuning |\n|---|---|---|")
    print(f"| trained parameters | {lora['trained']:,} | {full['trained']:,} |")
    print(f"| seconds per step (median of {sizes.measured_steps}) | {lora['seconds']:.2f} | {full['seconds']:.2f} |")
    for label, key in (("peak memory of the process", "peak"), ("of that, above the loaded model", "above")):
        print(f"| {label} | {format_bytes(lora[key])} | {format_bytes(full[key])} |")
    print(f"| saved result | {lora['saved']} | {full['saved']} |")
    print(f"| additional state for resuming | {lora['besides']} | {full['besides']} |")
    print(
        f"\nSame model and batches of {sizes.rows} × {sizes.length} tokens. Full fine-tuning keeps an fp32 copy of the"
    )
    print("weights in addition to Adam's moments: added to bf16 weights, small steps would be lost in rounding.")


def measure(method: str, sizes: Sizes, quick: bool) -> None:
    """Train a few steps in this process and print one line of JSON."""
    model, tokenizer, _ = load(quick)
    sequences = encode(topics(PRACTICE), tokenizer, sizes.length).sequences
    for parameter in model.parameters():
        parameter.detach().float().sum()  # a weight read from a file is in memory only after it was accessed
    loaded = resident_bytes()
    job: Any = {"rows": sizes.rows, "epochs": 99, "limit": sizes.measured_steps}
    with tempfile.TemporaryDirectory() as folder:
        result, state = Path(folder) / "result", Path(folder) / "state"
        if method == "lora":
            lorakit.attach(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"), seed=0)
            parts = trained_parts(model, "default")
            told = train(model, parts, sequences, rate=1e-3, **job)
            peak = peak_rss_bytes()
            result.mkdir()
            lorakit.save_adapter(model, result)
        else:
            with master_copies(model) as parts:
                told = train(model, parts, sequences, rate=1e-5, **job)
            peak = peak_rss_bytes()
            model.save_pretrained(result)
        kept = [value for part in parts for value in told.optimizer.state[part].values() if value.ndim]
        kept += parts if method == "full" else []  # the fp32 copies; the adapter is fp32 already
        save_file({str(i): tensor.detach().contiguous() for i, tensor in enumerate(kept)}, state)
        sizes_found = {"saved": on_disk(result), "besides": on_disk(state)}
    facts = {"trained": sum(part.numel() for part in parts), "peak": peak, "above": peak - loaded}
    print(json.dumps({**facts, **sizes_found, "seconds": statistics.median(told.seconds)}))


@contextmanager
def master_copies(model: Any) -> Iterator[list[Any]]:
    """Yield fp32 copies for the optimizer: they receive gradients, and are copied back before each forward."""
    own = list(model.parameters())
    copies = [torch.nn.Parameter(parameter.detach().float().clone()) for parameter in own]

    def give(parameter: Any, copy: Any) -> Any:
        def hook(_: Any) -> None:
            copy.grad, parameter.grad = parameter.grad.float(), None

        return parameter.register_post_accumulate_grad_hook(hook)

    @torch.no_grad()
    def take(*_: Any) -> None:
        for parameter, copy in zip(own, copies, strict=True):
            parameter.copy_(copy)

    for parameter in own:
        parameter.requires_grad_(True)
    hooks = [give(parameter, copy) for parameter, copy in zip(own, copies, strict=True)]
    hooks.append(model.register_forward_pre_hook(take))
    try:
        yield copies
        take()
    finally:
        for hook in hooks:
            hook.remove()


def resident_bytes() -> int:
    """Return the resident memory of this process, on Linux."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure full fine-tuning and LoRA.")
    parser.add_argument("--quick", action="store_true", help="a tiny random model and a few steps")
    parser.add_argument("--measure", choices=["lora", "full"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = QUICK if arguments.quick else FULL
    if arguments.measure:
        measure(arguments.measure, sizes, arguments.quick)
    else:
        compare(sizes, arguments.quick)


if __name__ == "__main__":
    main()
