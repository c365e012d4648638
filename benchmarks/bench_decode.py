"""Claims: decoding 32 rows with one adapter each takes at most 1.7 times as long as the base alone; decoding one row on
an int8 base takes at most two thirds of the time of the bf16 base.

    python benchmarks/bench_decode.py [--adapters 1 8 32 128] [--rounds 5] [--tokens 6] [--rows 32] [--dtype bfloat16]
    python benchmarks/bench_decode.py --int8 --rows 1 4 16 32 [--model llama-1b --layers 4] [--rounds 5] [--tokens 6]
    OMP_NUM_THREADS=1 python benchmarks/bench_decode.py --few-rows --cpu-time --adapters 1 --rows 1 8 32

SmolLM2-135M's geometry with random weights, bf16, r 16 on all linear layers, fp32 factors; one token per row and step,
with the KV cache of a prompt of 16 tokens. K adapters are assigned to the rows in turn; with more adapters than rows,
there are as many rows as adapters. Sides: the base alone; lorakit with an adapter per row, its stacks cached as
`generate_batch` does; the same without caching; lorakit with one adapter for all rows, cached; a copy of the base with
one adapter merged; peft with `adapter_names`. All run the same loop over the same tokens, interleaved in one process: a
round has the prompt (not counted) and some tokens of every side, and each round starts with another side.

The merged side computes the same as the side before it only in fp32. In bf16 the weights lose what is below their
rounding; its row has the fraction of the delta that was retained (`survived`), and whether the merge is exact.

`--int8` compares the base alone with a copy whose linear layers are in int8, as after `lorakit.core.quantize_base`; the
head and the embeddings keep their dtype. On a processor with AMX, `ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16` shows bf16
without it.

`--few-rows` adds the base alone after `lorakit.speed.multiply_few_rows`, as in a session; the other sides of lorakit
then have it too. `--cpu-time` measures CPU-seconds of the process, which depend less on other programs.

A row has the seconds per token of all rows, and the ratio of its median to that of the base with as many rows. Rows are
appended to results/decode.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import inspect
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

from runner import append_row
from stepping import Job, adapter_fields, geometry

BASE, MIXED, UNCACHED, ONE = "base alone", "lorakit", "lorakit, nothing kept", "lorakit, one adapter"
MERGED = "lorakit, one adapter, merged"
PEFT = "peft"
INT8 = "base alone, int8"
FEW = "base alone, few rows"
SIDES = (BASE, FEW, MIXED, UNCACHED, ONE, MERGED, PEFT)
PROMPT = 16

Forward = Callable[..., Any]
"""The model's forward arguments -> its output."""


def main() -> None:
    options = parsed()
    for least, adapters in itertools.product(options.rows, [1] if options.int8 else options.adapters):
        rows = max(least, adapters)
        forwards, merged = forwards_of(options, [str(k % adapters) for k in range(rows)])
        report(options, {"adapters": adapters, "rows": rows}, decoded(forwards, rows, options), merged)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--rows", type=int, nargs="+", default=[32])
    parser.add_argument("--model", choices=("smollm2", "llama-1b"), default="smollm2")
    parser.add_argument("--int8", action="store_true", help="the sides are the base alone, and with int8 matmuls")
    parser.add_argument("--few-rows", action="store_true", help="lorakit's sides have the kernel for few rows")
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for quick trials")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=6, help="tokens of each side in a round, after the prompt")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    options = parser.parse_args()
    options.sides = [BASE, INT8] if options.int8 else options.sides
    if not options.few_rows:
        options.sides = [side for side in options.sides if side != FEW]
    return options


def forwards_of(options: argparse.Namespace, names: list[str]) -> tuple[dict[str, Forward], dict[str, Any]]:
    """Return the forward of each side, all over the same weights, and properties of the merge."""
    import torch

    from lorakit import core
    from lorakit.config import LoraConfig
    from lorakit.speed import multiply_few_rows

    torch.manual_seed(0)
    job = Job(model=options.model, dtype=options.dtype, layers=options.layers)
    base, ours = (geometry(job).eval().requires_grad_(False) for _ in range(2))
    ours.load_state_dict(base.state_dict())
    if options.int8:
        core.quantize_base(ours, [{"input_ids": tokens_of((8, 64), 2)}])
        return {BASE: base, INT8: ours}, {}
    fields = adapter_fields(job)
    for name in dict.fromkeys(names):
        core.attach(ours, LoraConfig(**fields, init_lora_weights=False), name)
    blocks = {
        MIXED: core.route(ours, names, keep=True),
        UNCACHED: core.route(ours, names),
        ONE: core.use(ours, names[0], keep=True),
    }
    found: dict[str, Forward] = {BASE: base}
    if options.few_rows:
        found[FEW] = copy.deepcopy(base)
        for model in (found[FEW], ours):
            multiply_few_rows(model)
    for side, block in blocks.items():
        found[side] = within(block, ours)
    facts: dict[str, Any] = {}
    if MERGED in options.sides:
        found[MERGED], facts = merged_copy(base, fields, job)
    if PEFT in options.sides:
        theirs = of_peft(base, fields, dict.fromkeys(names), job)
        found[PEFT] = lambda **given: theirs(adapter_names=names, **given)
    return {side: found[side] for side in options.sides}, facts


def merged_copy(base: Any, fields: Mapping[str, Any], job: Job) -> tuple[Forward, dict[str, Any]]:
    """Return the forward of a copy of the base with one adapter merged, and properties of the merge."""
    from lorakit import core
    from lorakit.config import LoraConfig

    model = geometry(job).eval().requires_grad_(False)
    model.load_state_dict(base.state_dict())
    core.attach(model, LoraConfig(**fields, init_lora_weights=False), "one")
    exact = core.explain_inexact_merge(model, "one") is None
    taken = core.merge(model, "one", keep_base=False)
    return within(core.use(model, "one"), model), {"exact": exact, "survived": round(taken.retained, 4)}


def of_peft(base: Any, fields: Mapping[str, Any], names: Mapping[str, None], job: Job) -> Any:
    """Return a peft model with these adapters over a copy of the base."""
    import peft

    model = geometry(job).eval()
    model.load_state_dict(base.state_dict())
    first, *others = names
    config = peft.LoraConfig(**fields, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name=first)
    for name in others:
        wrapped.add_adapter(name, config)
    return wrapped.eval()


def within(block: contextlib.AbstractContextManager[None], model: Any) -> Forward:
    """Return a forward that enters the contexts for each call, as `generate_batch` does."""
    from lorakit import core

    def forward(**given: Any) -> Any:
        with block, core.one_pass(model):
            return model(**given)

    return forward


def decoded(forwards: dict[str, Forward], rows: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of each token of all rows, by side; the first round is not counted."""
    import torch

    cache, last = (
        cache_name(),
        torch.tensor([-1]),
    )  # an index: torch is slow with a slice, which is what 1 would mean
    prompt, following = tokens_of((rows, PROMPT), 0), tokens_of((options.tokens, rows, 1), 1)
    seconds: dict[str, list[float]] = {side: [] for side in forwards}
    clock = time.process_time if options.cpu_time else time.perf_counter
    sides = list(forwards)
    with torch.no_grad():
        for number in range(options.rounds + 1):
            rotated = number % len(sides)
            for side in sides[rotated:] + sides[:rotated]:
                read = getattr(forwards[side](input_ids=prompt, use_cache=True, logits_to_keep=last), cache)
                for ids in following:
                    began = clock()
                    forwards[side](input_ids=ids, use_cache=True, **{cache: read})
                    if number:
                        seconds[side].append(clock() - began)
    return seconds


def tokens_of(shape: tuple[int, ...], seed: int) -> Any:
    """Return random token ids of this shape."""
    import torch

    return torch.randint(0, 49152, shape, generator=torch.Generator().manual_seed(seed))


def cache_name() -> str:
    """Return the argument name of the KV cache in the installed transformers."""
    from transformers import LlamaForCausalLM

    takes = inspect.signature(LlamaForCausalLM.forward).parameters
    return "cache" if "cache" in takes else "past_key_values"


def report(
    options: argparse.Namespace, batch: dict[str, int], seconds: dict[str, list[float]], merged: dict[str, Any]
) -> None:
    """Append a row for each side; the merged one includes properties of the merge."""
    import torch

    base = statistics.median(seconds[BASE]) if BASE in seconds else None
    for side, taken in seconds.items():
        facts: dict[str, Any] = {"what": side, **batch, "model": options.model, "dtype": options.dtype}
        facts |= {"layers": options.layers, "prompt": PROMPT, "threads": torch.get_num_threads()}
        facts |= {"few_rows": options.few_rows, "cpu_time": options.cpu_time}
        facts["times_base"] = base and round(statistics.median(taken) / base, 3)
        facts |= merged if side == MERGED else {}
        append_row("decode", facts, {"seconds": taken})


if __name__ == "__main__":
    main()
