"""Time attaching, loading and detaching adapters on 560 sites of a tiny model, compared with peft in the same process.

    python benchmarks/bench_attach.py [--sites 560] [--repeats 9]

The model is a Llama of width 16, so arithmetic takes no time and the overhead per site is measured. Python's garbage
collector is off during a call, as in `timeit`: a full collection of all objects of transformers takes longer than the
call, and happens in about every second one. `--collector` leaves it on.
"""

from __future__ import annotations

import argparse
import copy
import gc
import os
import tempfile
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from runner import append_row, seconds_of

from lorakit.config import LoraConfig
from lorakit.core import attach, detach, load_adapter, merge, save_adapter, unmerge

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_model(sites: int) -> torch.nn.Module:
    """Return a Llama with `sites` dense modules, seven per block."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=sites // len(TARGETS),
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


def of_lorakit(model: torch.nn.Module, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each call, on one model that is restored after each."""
    config = LoraConfig(r=8, target_modules=TARGETS)

    def timed(work: Callable[[], Any], before: Callable[[], Any], after: Callable[[], Any]) -> list[float]:
        samples = []
        for _ in range(repeats + 1):
            before()
            samples += seconds_of(work, repeats=1, warmup=0)
            after()
        return samples[1:]

    def nothing() -> None:
        return None

    with tempfile.TemporaryDirectory() as folder:
        attach(model, config)
        save_adapter(model, folder)
        detach(model)
        return {
            "attach_seconds": timed(lambda: attach(model, config), nothing, lambda: detach(model)),
            "load_seconds": timed(lambda: load_adapter(model, folder), nothing, lambda: detach(model)),
            "detach_seconds": timed(lambda: detach(model), lambda: attach(model, config), nothing),
            "merge_seconds": timed(
                lambda: merge(model), lambda: attach(model, config), lambda: (unmerge(model), detach(model))
            ),
        }


def of_peft(model: torch.nn.Module, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each call in peft, which cannot restore the model, so each call gets an untimed copy."""
    import peft

    config = peft.LoraConfig(r=8, target_modules=TARGETS)
    attached, loaded = [], []
    with tempfile.TemporaryDirectory() as folder:
        peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(folder)
        for _ in range(repeats + 1):
            fresh = [copy.deepcopy(model) for _ in range(2)]
            attached += seconds_of(lambda m=fresh[0]: peft.get_peft_model(m, config), repeats=1, warmup=0)
            loaded += seconds_of(lambda m=fresh[1]: peft.PeftModel.from_pretrained(m, folder), repeats=1, warmup=0)
    return {"attach_seconds": attached[1:], "load_seconds": loaded[1:]}


def main() -> None:
    """Measure both libraries and append a row for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=560)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--collector", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model = make_model(given.sites)
    if not given.collector:
        gc.disable()
    for library, measure in (("peft", of_peft), ("lorakit", of_lorakit)):
        append_row(
            "attach",
            {"library": library, "sites": given.sites, "collector": given.collector},
            measure(model, given.repeats),
        )


if __name__ == "__main__":
    main()
