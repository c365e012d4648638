"""Fifty steps in float64, with accumulation and packing, in one of several processes; started by `processes.start`.

python process_steps.py MODEL_DIRECTORY FOLDER_FOR_OUTCOMES

Every process writes the losses, the trained tensors and the number of fused modules to `<rank>.pt`.
"""

from __future__ import annotations

import random
import sys
from array import array
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from lorakit import core, data
from lorakit.config import LoraConfig
from lorakit.data.encoding import Sequence
from lorakit.speed import accelerate
from lorakit.tasks import CAUSAL_LM, Target, TaskOnData
from lorakit.train.optimizer import build_adamw
from lorakit.train.processes import joined
from lorakit.train.run_data import RunBatches
from lorakit.train.step import StepOptions, train_step

STEPS, BATCHES_PER_STEP = 50, 4


def rows() -> list[Sequence]:
    drawn = random.Random(0)
    made = []
    for _ in range(37):
        ids = [drawn.randrange(1, 200) for _ in range(drawn.randrange(3, 40))]
        made.append(Sequence(array("i", ids), array("i", [-100, *ids[1:]])))
    return made


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as processes:
        model = LlamaForCausalLM.from_pretrained(sys.argv[1]).double()
        core.attach(model, LoraConfig(r=4, target_modules="all-linear"), "default", seed=0)
        model.double()
        named = core.trainable_parameters(model, "default")
        optimizer, acceleration = build_adamw(named, 1e-3, 0.01), accelerate(model)
        options = StepOptions(torch.device("cpu"), acceleration=acceleration, processes=processes)
        loader = data.Loader(rows(), 3, 0)
        batches = RunBatches(loader, None, data.DataReport(64), None, TaskOnData(CAUSAL_LM, Target()))
        model.train()
        results = [
            train_step(model, named, optimizer, batches.next_share(BATCHES_PER_STEP, processes), 1e-3, options)
            for _ in range(STEPS)
        ]
        made = {
            "losses": [result.loss for result in results],
            "tokens": [result.tokens for result in results],
            "tensors": {name: parameter.detach() for name, parameter in named},
            "fused": len(acceleration.swaps),
            "packs": bool(acceleration.packs),
        }
        torch.save(made, Path(sys.argv[2], f"{processes.rank}.pt"))
