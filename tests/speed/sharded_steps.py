"""Run three steps of a tiny model in one of two processes, plain or accelerated, under DDP or FSDP2 over gloo.

Arguments: rank, rendezvous file, method ("ddp", "fsdp by layer", "fsdp whole", "fsdp head"), fast (0 or 1), file for
losses and gradients.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import LoraConfig, attach
from lorakit.speed import accelerate

SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


def main(rank: int, meeting: str, way: str, fast: bool, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_attention_heads=4, num_key_value_heads=2, use_cache=False)
    model: Any = LlamaForCausalLM(config)
    attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), seed=1)
    model.train()
    if fast:
        acceleration = accelerate(model, logits=False)
        assert "decoder layer" in str(acceleration) and acceleration.loss is not None
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if way == "ddp":
        model = DistributedDataParallel(model)
    else:
        if way == "fsdp head":  # and a part of a layer, which the layer's fused forward must not bypass
            fully_shard(model.lm_head)
            fully_shard(model.model.layers[0].mlp.up_proj)
        for layer in model.model.layers if way != "fsdp whole" else ():
            fully_shard(layer)
        fully_shard(model)
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        again = accelerate(model)
        assert not again.swaps and "sharded" in str(again)
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    losses, gradients = [], {}
    for step in range(3):
        ids = torch.randint(0, 61, (2, 10), generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        labels = ids.clone()
        labels[:, : 3 + step] = -100
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients = {name: whole(parameter.grad) for name, parameter in trained.items()}
        optimizer.step()
    torch.save((losses, gradients), f"{result}.{rank}")
    dist.barrier()  # otherwise one process may tear down the connection that the other still uses, and both wait
    dist.destroy_process_group()


def whole(gradient: Any) -> torch.Tensor:
    made: torch.Tensor = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return made.clone()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4] == "1", sys.argv[5])
