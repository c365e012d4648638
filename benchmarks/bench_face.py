"""Time the PEFT-compatible API, compared with peft on 560 sites of a tiny model: CPU seconds, interleaved in one
process.

    python benchmarks/bench_face.py [--repeats 5]

A model of 80 layers with 7 targets each has as many modules as a 70B model, but little to compute. Each call is timed
on a new model, after a warm-up model.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import torch
from runner import append_row

import lorakit.peft

SITES = 560
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def model() -> Any:
    """Return a Llama of 80 layers and width 8."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": SITES // len(TARGETS)}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))


def config(library: ModuleType) -> Any:
    return library.LoraConfig(r=2, target_modules=list(TARGETS), task_type="CAUSAL_LM")


class Clock:
    """CPU seconds by call."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Add the CPU time of a block to this call."""
        start = time.process_time()
        yield
        self.seconds[what] = time.process_time() - start


def once(library: ModuleType, base: Callable[[], Any], folder: Path) -> dict[str, float]:
    """Run every call once, on one model."""
    clock = Clock()
    with clock.on("get_peft_model"):
        wrapped = library.get_peft_model(base(), config(library))
    with clock.on("second add_adapter"):
        wrapped.add_adapter("b", config(library))
    with clock.on("set_adapter"):
        wrapped.set_adapter("b")
    with clock.on("third add_adapter"):
        wrapped.add_adapter("c", config(library))
    with clock.on("disable_adapter, enter and exit"), wrapped.disable_adapter():
        pass
    with clock.on("state_dict"):
        wrapped.state_dict()
    with clock.on("get_peft_model_state_dict"):
        library.get_peft_model_state_dict(wrapped, adapter_name="b")
    with clock.on("save_pretrained"):
        wrapped.save_pretrained(folder, selected_adapters=["b"])
    with clock.on("load_adapter"):
        wrapped.load_adapter(folder / "b", "d")
    tokens = torch.ones(2, 4, dtype=torch.long)
    wrapped.eval()
    with torch.no_grad():
        wrapped(input_ids=tokens)
        with clock.on("forward"):
            wrapped(input_ids=tokens)
        wrapped(input_ids=tokens, adapter_names=["b", "c"])
        with clock.on("forward, an adapter per row"):
            wrapped(input_ids=tokens, adapter_names=["b", "c"])
    with clock.on("merge_adapter"):
        wrapped.merge_adapter(["b"])
    with clock.on("unmerge_adapter"):
        wrapped.unmerge_adapter()
    with clock.on("delete_adapter"):
        wrapped.delete_adapter("c")
    with clock.on("unload"):
        wrapped.unload()
    return clock.seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured models per library (default: 5)")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    libraries = {"lorakit": lorakit.peft, "peft": peft}
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in libraries}
    for repeat in range(repeats + 1):
        for name, library in libraries.items():
            plain = model()
            with tempfile.TemporaryDirectory() as folder:
                seconds = once(library, lambda plain=plain: plain, Path(folder))
            for what, value in seconds.items() if repeat else ():  # the first one is a warm-up
                samples[name].setdefault(what, []).append(value)
    for what in samples["peft"]:
        numbers = {f"{name}_cpu_seconds": samples[name][what] for name in libraries}
        append_row("face", {"what": what, "sites": SITES}, numbers)


if __name__ == "__main__":
    main()
