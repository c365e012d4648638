"""Claim: fused decoder layers make generation faster than the model's own layers, for one row and for many adapters.

    OMP_NUM_THREADS=1 python benchmarks/bench_generate.py [--batches 1x1 8x8 32x1 32x32] [--rounds 5] [--new 16]

SmolLM2-135M's geometry with random weights, bf16, r 16 on all linear layers. K adapters are assigned to R rows in turn
(RxK; K is 0 for the base alone). One `lorakit.generate.Engine` per side reads prompts of 16 tokens and continues each
row by `--new` tokens. Its bank of adapters is kept between rounds, as in a server; the first round is not counted.
Sides: the model's own forward with `multiply_few_rows`, and after `fuse_decoding`, too. They are interleaved in one
process, and each round starts with another side.

A row has the new tokens per CPU-second of each round, and the ratio of the median to that of the model's own forward.
CPU-seconds depend less on other programs than wall time. Rows are appended to results/generate.jsonl.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

from runner import append_row
from stepping import Job, adapter_fields, geometry

OWN, FUSED = "own layers", "fused layers"
PROMPT = 16


def main() -> None:
    options = parsed()
    models = models_of(options)
    for rows, adapters in options.batches:
        names: list[str | None] = [str(k % adapters) if adapters else None for k in range(rows)]
        report({"rows": rows, "adapters": adapters, "new": options.new}, measured(models, names, options))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=batch, nargs="+", default=[(1, 0), (1, 1), (8, 8), (32, 1), (32, 32)])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=16)
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for quick trials")
    return parser.parse_args()


def batch(text: str) -> tuple[int, int]:
    rows, adapters = text.split("x")
    return int(rows), int(adapters)


def models_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the model of each side, with the same weights and adapters."""
    import torch

    from lorakit import core
    from lorakit.config import LoraConfig
    from lorakit.speed import fuse_decoding, multiply_few_rows

    torch.manual_seed(0)
    job = Job(model="smollm2", dtype="bfloat16", layers=options.layers)
    own = geometry(job).eval().requires_grad_(False)
    for name in range(max(adapters for _, adapters in options.batches)):
        core.attach(own, LoraConfig(**adapter_fields(job), init_lora_weights=False), str(name))
    fused = copy.deepcopy(own)
    for model in (own, fused):
        multiply_few_rows(model)
    assert fuse_decoding(fused) == own.config.num_hidden_layers
    return {OWN: own, FUSED: fused}


def measured(models: dict[str, Any], names: list[str | None], options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the new tokens per CPU-second of each round, by side."""
    import torch

    from lorakit.core import AdapterBank
    from lorakit.generate import Continuation, Engine

    ids = torch.randint(0, 49152, (len(names), PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    together = [*dict.fromkeys(filter(None, names))]
    bank = {"together": together, "slots": len(together), "by_row": True, "is_constant": True}
    engines = {side: Engine(model, rows=len(names), bank=AdapterBank(**bank)) for side, model in models.items()}
    found: dict[str, list[float]] = {side: [] for side in models}
    sides = list(models)
    for number in range(options.rounds + 1):
        rotated = number % len(sides)
        for side in sides[rotated:] + sides[:rotated]:
            began, tokens = time.process_time(), 0
            for name, prompt in zip(names, ids, strict=True):
                engines[side].submit(Continuation(tuple(prompt), options.new, adapter=name))
            while not engines[side].is_idle:
                tokens += len(engines[side].step(chunks=None))
            if number:
                found[side].append(tokens / (time.process_time() - began))
    return found


def report(facts: dict[str, Any], speeds: dict[str, list[float]]) -> None:
    """Append a row for each side."""
    import torch

    own = statistics.median(speeds[OWN])
    for side, found in speeds.items():
        more = {"threads": torch.get_num_threads(), "times_own": round(statistics.median(found) / own, 3)}
        append_row("generate", {"what": side, **facts, **more}, {"tokens_per_cpu_s": found})


if __name__ == "__main__":
    main()
