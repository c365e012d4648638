"""Short trainings with a sharded base, in one of several processes; started by `processes.start`.

python process_sharding.py FOLDER_FOR_OUTCOMES CASE…

Each case is trained with the base sharded, with the base as a whole, and by the first process alone. Every process
writes, for each of them, losses, trained tensors, the number of calls of fused forwards, and sizes, to `<rank>.pt`.
"""

from __future__ import annotations

import gc
import random
import sys
from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

import small_models
from lorakit import core, data
from lorakit.config import LoraConfig
from lorakit.data.encoding import Sequence
from lorakit.speed import accelerate
from lorakit.speed.patching import BOUND, Fused
from lorakit.tasks import CAUSAL_LM, Target, TaskOnData
from lorakit.train.loop.loop import evaluate
from lorakit.train.loop.optimizer import build_adamw
from lorakit.train.loop.run import RunBatches
from lorakit.train.loop.step import StepOptions, train_step
from lorakit.train.processes.processes import ALONE, Processes, joined
from lorakit.train.processes.sharding import ShardedBase, shard_base, without_hints
from lorakit.train.setup.agreement import _hybrid

STEPS = 3


@dataclass(frozen=True)
class Case:
    """A training: the model, the adapter, the dtype of the base, and what is recomputed."""

    dtype: torch.dtype = torch.float64
    model: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    is_fused: bool = True
    batches_per_step: int = 4


CASES = {
    "packed": Case(),
    "uneven": Case(batches_per_step=3),
    "recomputed": Case(model={"tie_word_embeddings": True}, recompute="layers"),
    "dora": Case(config={"use_dora": True, "modules_to_save": ["lm_head"], "trainable_token_indices": [3, 7]}),
    "pissa": Case(config={"init_lora_weights": "pissa"}, recompute="feed-forward"),
    "float32": Case(torch.float32),
    "bfloat16": Case(torch.bfloat16, is_fused=False, recompute="layers"),
}


def rows(count: int) -> list[Sequence]:
    """Return rows whose second half contributes to the loss."""
    drawn = random.Random(0)
    made = []
    for _ in range(count):
        ids = [drawn.randrange(1, small_models.VOCABULARY) for _ in range(drawn.randrange(4, 40))]
        half = len(ids) // 2
        made.append(Sequence(array("i", ids), array("i", [-100] * half + ids[half:])))
    return made


def counted(acceleration: Any) -> Counter[str]:
    """Count the calls of each kind of fused forward that return a result."""
    calls = Counter[str]()
    for name, swap in acceleration.swaps:
        fused: Fused = getattr(swap.replacement, BOUND)

        def run(x: torch.Tensor, options: Any, fused: Fused = fused, name: str = name) -> Any:
            made = fused.run(x, options)
            calls[name] += made is not None
            return made

        setattr(swap.replacement, BOUND, fused._replace(run=run))
    return calls


def whole_weights(shapes: set[torch.Size]) -> int:
    """Return the number of frozen matrices with these shapes that hold memory in this process."""
    gc.collect()
    found = [one for one in gc.get_objects() if type(one) in (torch.Tensor, nn.Parameter) and one.shape in shapes]
    return len({one.data_ptr() for one in found if one.untyped_storage().size() and not one.requires_grad})


def train(case: Case, processes: Processes, way: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = small_models.llama(num_hidden_layers=3, attention_dropout=0.0, **case.model).to(case.dtype)
    config = LoraConfig(r=4, **{"target_modules": "all-linear", **case.config})
    core.attach(model, config, "default", seed=0)
    if case.dtype == torch.float64:
        model.double()
    if case.recompute == "layers":
        model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": core.checkpoint_contexts(model)})
    acceleration = accelerate(model, keep_feed_forward=case.recompute != "feed-forward") if case.is_fused else None
    calls = Counter[str]() if acceleration is None else counted(acceleration)
    sharded: ShardedBase | None = None
    shapes = {layer.mlp.down_proj.get_submodule("base_layer").weight.shape for layer in model.model.layers}
    if way == "sharded":
        parallel = _hybrid(processes.exchange(processes.local_rank), torch.device("cpu"), "asked")
        sharded = shard_base(model, parallel)
        processes = replace(processes, in_lockstep=True)
    named = core.trainable_parameters(model, "default")
    optimizer = build_adamw(named, 1e-3, 0.01)
    options = StepOptions(torch.device("cpu"), acceleration=acceleration, processes=processes)
    batches = RunBatches(data.Loader(rows(37), 3, 0), None, data.DataReport(64), None, TaskOnData(CAUSAL_LM, Target()))
    held_out = list(data.Loader(rows(7), 2, 0, epochs=1))
    found = {"losses": [], "tokens": []}
    with without_hints():
        for _ in range(2):
            result = evaluate(model, held_out, "cpu", acceleration=acceleration, processes=processes)
            assert result is not None
            found["losses"].append(result.loss)
            model.train()
            for _ in range(STEPS):
                taken = batches.next_share(case.batches_per_step, processes)
                step = train_step(model, named, optimizer, taken, 1e-3, options)
                found["losses"].append(step.loss)
                found["tokens"].append(step.tokens)
    return {
        **found,
        "tensors": {name: parameter.detach().clone() for name, parameter in named},
        "calls": dict(calls),
        "whole": whole_weights(shapes),
        "sharded": None if sharded is None else sharded.as_dict(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    with joined() as processes:
        here = replace(processes, local_rank=processes.rank % 2)  # as on machines with two processes
        made = {}
        for name in sys.argv[2:]:
            case = CASES[name]
            made[name] = {way: train(case, here, way) for way in ("whole", "sharded")}
            if here.is_first:
                made[name]["alone"] = train(case, ALONE, "whole")
        torch.save(made, Path(sys.argv[1], f"{processes.rank}.pt"))
