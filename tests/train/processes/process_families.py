"""Gradients of small models of several families, with the base whole and sharded, in one of several processes.

python process_families.py FOLDER_FOR_OUTCOMES FAMILY…

Every process writes the largest relative difference of the gradients of each family to `<rank>.pt`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

import small_models
from lorakit import core
from lorakit.config import LoraConfig
from lorakit.speed import accelerate
from lorakit.train.processes.processes import Processes, joined
from lorakit.train.processes.sharding import Parallel, shard_base, without_hints


def gradients(family: str, processes: Processes, is_sharded: bool) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = getattr(small_models, family)()
    core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), "default", seed=0)
    accelerate(model.train())
    parallel = Parallel("fsdp", (processes.count,), torch.device("cpu"), "asked")
    if is_sharded:
        shard_base(model, parallel)
    ids = torch.randint(1, small_models.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(processes.rank))
    with without_hints():
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
    return [p.grad for _, p in core.trainable_parameters(model, "default") if p.grad is not None]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as processes:
        made = {}
        for family in sys.argv[2:]:
            ours, theirs = (gradients(family, processes, is_sharded) for is_sharded in (True, False))
            pairs = zip(ours, theirs, strict=True)
            made[family] = max(float((a - b).norm() / b.norm().clamp_min(1e-30)) for a, b in pairs)
        torch.save(made, Path(sys.argv[1], f"{processes.rank}.pt"))
