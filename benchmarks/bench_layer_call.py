"""Time one call of an adapted layer, in microseconds, with no, one and four active adapters.

    python benchmarks/bench_layer_call.py [--rounds 21] [--calls 100]

A linear layer of 64 × 64 in float32, one row, rank 4: the arithmetic takes no time, so the overhead of a call is
measured. Cases: the plain `nn.Linear`; adapted layers with no, one or four active adapters, and with `lorakit.disable`;
one adapter chosen with `lorakit.use`, in a block around all calls and in a block per call; four rows with four adapters
(`lorakit.route`), also with cached stacks (`keep=True`); one block of a tiny Llama with adapters on its seven linear
layers and four tokens, as transformers runs it and with `lorakit.accelerate`. Modes: "eval" (no gradients), "train" (a
forward that records gradients) and "train, backward" (that forward and its backward).

Every round takes one sample of each case, the mean of all its calls, and starts with another case. Python's garbage
collector is off, torch has one thread. The script uses only the public names of `lorakit`, so it also measures an older
checkout: `PYTHONPATH=/path/to/src python benchmarks/bench_layer_call.py`; to compare two trees, use compare_trees.py.
Rows are appended to results/layer_call.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from runner import append_row
from torch import Tensor, nn

import lorakit

FEATURES, RANK, TOKENS = 64, 4, 4
NAMES = ("0", "1", "2", "3")
EVAL, TRAIN, BACKWARD = "eval", "train", "train, backward"
MODES = (EVAL, TRAIN, BACKWARD)


class Case(NamedTuple):
    """A call to time.

    Attributes:
        what: Its name.
        mode: One of `MODES`.
        call: Runs the forward and returns its output.
        block: Entered once per sample, around all calls.
    """

    what: str
    mode: str
    call: Callable[[], Tensor]
    block: AbstractContextManager[Any]


class Holder(nn.Module):
    """A model with one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, FEATURES)


def adapted(mode: str, *active: str) -> Any:
    """Return a `Holder` with four adapters, these ones active."""
    torch.manual_seed(0)
    model = Holder().train(mode != EVAL).requires_grad_(False)
    for name in NAMES:
        config = lorakit.LoraConfig(r=RANK, target_modules=["layer"], init_lora_weights=False)
        lorakit.attach(model, config, name)
    lorakit.activate(model, *active)
    return model


def hidden(mode: str, *shape: int) -> Tensor:
    """Return an input (…, 64), which requires a gradient unless the mode is "eval"."""
    values = torch.randn(*shape, FEATURES, generator=torch.Generator().manual_seed(1))
    return values.requires_grad_(mode != EVAL)


def all_cases() -> list[Case]:
    """Return the cases of all modes."""
    return [case for mode in MODES for case in (*layer_cases(mode), *block_cases(mode))]


def layer_cases(mode: str) -> list[Case]:
    """Return the cases of one linear layer, each on a separate model."""
    one, rows = hidden(mode, 1), hidden(mode, len(NAMES))

    def case(what: str, model: Any, block: AbstractContextManager[Any] | None = None, x: Tensor = one) -> Case:
        return Case(what, mode, lambda: model.layer(x), block or contextlib.nullcontext())

    torch.manual_seed(0)
    plain = Holder().train(mode != EVAL).requires_grad_(False)
    off, inside, each, mixed = (adapted(mode, NAMES[0]) for _ in range(4))

    def in_a_block_of_its_own() -> Tensor:
        with lorakit.use(each, NAMES[1]):
            output: Tensor = each.layer(one)
        return output

    made = [
        case("nn.Linear", plain),
        case("no active adapter", adapted(mode)),
        case("disable", off, lorakit.disable(off)),
        case("1 active adapter", adapted(mode, NAMES[0])),
        case("4 active adapters", adapted(mode, *NAMES)),
        case("use, one block for all calls", inside, lorakit.use(inside, NAMES[1])),
        Case("use, one block per call", mode, in_a_block_of_its_own, contextlib.nullcontext()),
        case("route of 4 rows", mixed, lorakit.route(mixed, NAMES), rows),
    ]
    if mode == EVAL:  # stacks are cached only if no gradient is recorded
        kept = adapted(mode, NAMES[0])
        made.append(case("route of 4 rows, kept", kept, lorakit.route(kept, NAMES, keep=True), rows))
    return made


def block_cases(mode: str) -> list[Case]:
    """Return the cases of one block of a tiny Llama with an adapter on each linear layer."""
    x = hidden(mode, 1, TOKENS)

    def case(what: str, accelerated: bool) -> Case:
        model = tiny_llama(mode)
        words = block_arguments(model)
        if accelerated:
            lorakit.accelerate(model)
        block = model.model.layers[0]  # read afterwards, because `accelerate` replaces it
        return Case(what, mode, lambda: block(x, **words), contextlib.nullcontext())

    return [case("decoder block", accelerated=False), case("decoder block, accelerated", accelerated=True)]


def tiny_llama(mode: str) -> Any:
    """Return a Llama of two blocks and width 64 with one adapter on its linear layers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": FEATURES, "intermediate_size": 2 * FEATURES, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    model.train(mode != EVAL).requires_grad_(False)
    config = lorakit.LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    lorakit.attach(model, config)
    return model


def block_arguments(model: Any) -> dict[str, Any]:
    """Return the keyword arguments that the model passes to its first block for `TOKENS` tokens."""
    given: list[dict[str, Any]] = []

    def note(_module: nn.Module, _args: tuple[Any, ...], words: dict[str, Any]) -> None:
        given.append(words)

    handle = model.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad():
        model(input_ids=torch.ones(1, TOKENS, dtype=torch.long), use_cache=False)
    handle.remove()
    return given[0]


def microseconds(case: Case, calls: int) -> float:
    """Return the mean time of a call in microseconds."""
    with torch.set_grad_enabled(case.mode != EVAL), case.block:
        call = case.call
        if case.mode == BACKWARD:
            gradient = torch.ones_like(call())

            def call() -> None:
                case.call().backward(gradient)

        began = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - began) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21, help="samples of each case (default: 21)")
    parser.add_argument("--calls", type=int, default=100, help="calls of a sample (default: 100)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cases = all_cases()
    samples: list[list[float]] = [[] for _ in cases]
    gc.disable()
    try:
        for number in range(options.rounds + 1):
            for position in range(len(cases)):
                index = (position + number) % len(cases)
                taken = microseconds(cases[index], options.calls)
                if number:  # the first round is a warm-up
                    samples[index].append(taken)
            gc.collect()
    finally:
        gc.enable()
    for case, taken in zip(cases, samples, strict=True):
        facts = {"what": case.what, "mode": case.mode, "features": FEATURES, "r": RANK, "calls": options.calls}
        append_row("layer_call", facts, {"microseconds": taken})


if __name__ == "__main__":
    main()
