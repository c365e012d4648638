"""Three adapters on one base: switched between calls, and mixed row by row in one batch.

The base's weights are stored once. Each row of a mixed batch has the same result as its adapter alone.
"""

from __future__ import annotations

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import lorakit
from lorakit import LoraConfig

TASKS = ("summarize", "translate", "classify")


def base_with_adapters() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ).eval()
    for seed, task in enumerate(TASKS):
        # init False initializes both factors at random, as if trained; ranks and targets may differ between adapters
        config = LoraConfig(r=2 + seed, lora_alpha=8, target_modules=["c_attn", "c_fc"], init_lora_weights=False)
        lorakit.attach(model, config, task, seed=seed)
    return model


@torch.no_grad()
def one_by_one(model: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    rows = []
    for row, task in zip(tokens, TASKS, strict=True):
        with lorakit.use(model, task):
            rows.append(model(row[None]).logits[0])
    return torch.stack(rows)


@torch.no_grad()
def mixed(model: GPT2LMHeadModel, tokens: torch.Tensor) -> torch.Tensor:
    with lorakit.route(model, list(TASKS)):
        return model(tokens).logits


def main() -> None:
    model = base_with_adapters()
    tokens = torch.randint(0, 100, (len(TASKS), 12))
    alone, together = one_by_one(model, tokens), mixed(model, tokens)
    print(f"adapters: {', '.join(lorakit.adapters(model))}")
    print(f"largest difference between a mixed batch and single rows: {(alone - together).abs().max().item():.1e}")
    base = sum(p.numel() for n, p in model.named_parameters() if "lora_" not in n)
    each = [sum(p.numel() for _, p in lorakit.trainable_parameters(model, task)) for task in TASKS]
    print(f"base {base:,} parameters, once; adapters {', '.join(f'{n:,}' for n in each)}")


if __name__ == "__main__":
    main()
