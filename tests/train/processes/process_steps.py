"""Fifty steps with accumulation and packing, in one of several processes; started by `processes.start`.

python process_steps.py FOLDER_FOR_OUTCOMES DTYPE...

For each dtype, every process writes what `trained` returns to `<rank>.pt`.
"""

from __future__ import annotations

import random
import sys
from array import array
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import core, data
from lorakit.config import LoraConfig
from lorakit.data.encoding import Sequence
from lorakit.speed import accelerate
from lorakit.tasks import CAUSAL_LM, Target, TaskOnData
from lorakit.train.loop.optimizer import Named, build_adamw
from lorakit.train.loop.run import RunBatches
from lorakit.train.loop.step import StepOptions, train_step
from lorakit.train.processes.processes import Processes, joined

STEPS, BATCHES_PER_STEP = 50, 4


def rows() -> list[Sequence]:
    drawn = random.Random(0)
    made = []
    for _ in range(37):
        ids = [drawn.randrange(1, 200) for _ in range(drawn.randrange(3, 40))]
        made.append(Sequence(array("i", ids), array("i", [-100, *ids[1:]])))
    return made


OPERATIONS = ("all_gather_object", "all_reduce", "broadcast")


def counted(counts: Counter[str]) -> None:
    """Count the calls of operations between processes in this process."""
    for name in OPERATIONS:
        call = getattr(torch.distributed, name)

        def recorded(*arguments: Any, name: str = name, call: Any = call, **options: Any) -> Any:
            counts[name] += 1
            return call(*arguments, **options)

        setattr(torch.distributed, name, recorded)


def model_of(dtype: torch.dtype) -> LlamaForCausalLM:
    sizes = {"vocab_size": 200, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(dtype)


def deltas(named: Named) -> dict[str, torch.Tensor]:
    """Return the product B·A of each site, in float64; the scale is the same at all sites."""
    tensors = {name: parameter.detach().double() for name, parameter in named}
    return {name: tensors[name.replace("lora_A", "lora_B")] @ A for name, A in tensors.items() if "lora_A" in name}


def trained(name: str, processes: Processes, counts: Counter[str]) -> dict[str, Any]:
    """Train a small model for `STEPS` steps.

    Args:
        name: Name of the dtype of the base and the adapter.
        processes: The processes of the run.
        counts: The calls of operations between processes so far, which are set to zero.

    Returns:
        The losses, the trained tensors, the deltas, what is accelerated, and the calls of operations.
    """
    dtype = getattr(torch, name)
    model = model_of(dtype)
    core.attach(model, LoraConfig(r=4, target_modules="all-linear"), "default", seed=0)
    model.to(dtype)
    named = core.trainable_parameters(model, "default")
    optimizer, acceleration = build_adamw(named, 1e-3, 0.01), accelerate(model)
    options = StepOptions(torch.device("cpu"), acceleration=acceleration, processes=processes)
    loader = data.Loader(rows(), 3, 0)
    batches = RunBatches(loader, None, data.DataReport(64), None, TaskOnData(CAUSAL_LM, Target()))
    model.train()
    counts.clear()
    results = [
        train_step(model, named, optimizer, batches.next_share(BATCHES_PER_STEP, processes), 1e-3, options)
        for _ in range(STEPS)
    ]
    return {
        "losses": [result.loss for result in results],
        "tokens": [result.tokens for result in results],
        "tensors": {name: parameter.detach() for name, parameter in named},
        "deltas": deltas(named),
        "fused": len(acceleration.swaps),
        "packs": bool(acceleration.packs),
        "operations": dict(counts),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    counts = Counter[str]()
    counted(counts)
    with joined() as processes:
        made = {name: trained(name, processes, counts) for name in sys.argv[2:]}
        torch.save(made, Path(sys.argv[1], f"{processes.rank}.pt"))
