"""Claim: checking the contracts of fused forwards takes at most 1% of a training step and of a decoding step.

    python benchmarks/bench_contract.py [--rounds 7] [--layers 30]

SmolLM2-135M's geometry with random weights, bf16, r 16 on all linear layers, accelerated. A training step has 4 rows of
256 tokens; a decoding step has one row and one token, with the KV cache of 16 tokens. Every step is run once to count
the calls of each contract. Each contract is then timed alone in a loop; the sum over its calls is the cost per step.
The steps themselves are timed in rounds. The row also has the number of contracts that were checked. Three more rows
have the training step with known source, with unknown source (as after an update of transformers that changes every
class, so that only linear modules are fused), and without acceleration.

Rows are appended to results/contract.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from runner import append_row, seconds_of
from stepping import Job, adapter_fields, geometry

import lorakit
from lorakit.architectures.known_forwards import KnownForwards
from lorakit.identity.identities import Identities
from lorakit.speed.acceleration import accelerate_known
from lorakit.speed.admission import Known
from lorakit.speed.patching import BOUND, Fused

LOOPS = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=30)
    options = parser.parse_args()
    job = Job(layers=options.layers)
    torch.manual_seed(0)
    model = geometry(job)
    lorakit.attach(model, lorakit.LoraConfig(**adapter_fields(job)))
    acceleration = lorakit.accelerate(model)
    ids = torch.randint(0, 1000, (4, 256))
    for name, work in {"training step": training(model, ids), "decoding step": decoding(model, ids[:1, :16])}.items():
        counts = counted(acceleration, work)
        seconds = sum(count * seconds_of_one(check) for check, count in counts.items())
        steps = seconds_of(work, repeats=options.rounds)
        facts = {"what": name, "layers": options.layers, "checks": sum(counts.values())}
        append_row("contract", facts, {"contract_seconds": [seconds], "step_seconds": steps})
    acceleration.undo()
    of_sources(model, training(model, ids), options)


def of_sources(model: Any, step: Callable[[], None], options: argparse.Namespace) -> None:
    """Time training steps with known and unknown source, and without acceleration; the sides alternate."""
    nothing = Known(Identities(), KnownForwards(("none",), {}))
    seconds: dict[str, list[float]] = {"known source": [], "unknown source": [], "not accelerated": []}
    for _ in range(options.rounds):
        for side, samples in seconds.items():
            acceleration = None
            if side == "known source":
                acceleration = lorakit.accelerate(model)
            elif side == "unknown source":
                acceleration = accelerate_known(model, nothing, logits=True, keep_feed_forward=True)
            samples += seconds_of(step, repeats=1)
            if acceleration is not None:
                acceleration.undo()
    for side, samples in seconds.items():
        append_row("contract", {"what": f"training step, {side}", "layers": options.layers}, {"step_seconds": samples})


def training(model: Any, ids: Any) -> Callable[[], None]:
    """Return a training step without the optimizer."""

    def step() -> None:
        model.train().zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()

    return step


def decoding(model: Any, prompt: Any) -> Callable[[], None]:
    """Return a step that decodes one token after a prompt."""
    with torch.no_grad():
        cache = model.eval()(input_ids=prompt, use_cache=True).past_key_values

    def step() -> None:
        with torch.no_grad():
            model.eval()(input_ids=prompt[:, -1:], past_key_values=cache, use_cache=True)
        cache.crop(-1)

    return step


def counted(acceleration: Any, work: Callable[[], None]) -> Counter[Callable[[], bool]]:
    """Return how often each contract is checked in one step."""
    counts: Counter[Callable[[], bool]] = Counter()
    before = [(swap.replacement, getattr(swap.replacement, BOUND)) for _, swap in acceleration.swaps]
    for module, fused in before:
        setattr(module, BOUND, Fused(fused.accepts, counting(fused.holds, counts), fused.run))
    try:
        work()
    finally:
        for module, fused in before:
            setattr(module, BOUND, fused)
    return counts


def counting(holds: Callable[[], bool], counts: Counter[Callable[[], bool]]) -> Callable[[], bool]:
    def check() -> bool:
        counts[holds] += 1
        return holds()

    return check


def seconds_of_one(check: Callable[[], bool]) -> float:
    """Return the mean duration of one check."""
    start = time.perf_counter()
    for _ in range(LOOPS):
        check()
    return (time.perf_counter() - start) / LOOPS


if __name__ == "__main__":
    main()
