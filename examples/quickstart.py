"""Attach, train, use, route, merge, save and load: the core API on one page.

The model is tiny and random, so that this runs anywhere in seconds. Load yours with `from_pretrained`.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit
from lorakit import LoraConfig


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, initializer_range=0.2, **sizes)).eval()


def train(model: LlamaForCausalLM, name: str, tokens: torch.Tensor, steps: int = 40) -> float:
    parameters = [parameter for _, parameter in lorakit.trainable_parameters(model, name)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    with lorakit.use(model, name):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
    return loss.item()


def main() -> None:
    model = tiny_model()
    report = lorakit.attach(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), "up", seed=0)
    print(f"{report.trainable_parameters:,} trainable parameters at {len(report.matches)} sites")
    lorakit.attach(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]), "down", seed=1)

    rising = torch.arange(16)[None]
    print(f"loss of up: {train(model, 'up', rising):.2f}, of down: {train(model, 'down', rising.flip(1)):.2f}")

    batch = rising.repeat(3, 1)
    with torch.no_grad(), lorakit.route(model, ["up", "down", None]):  # one adapter per row; None is the base
        mixed = model(batch).logits
    with torch.no_grad(), lorakit.disable(model):
        print("the base's row equals the base:", torch.allclose(mixed[2], model(batch[2:]).logits[0], atol=1e-5))

    merged = lorakit.merge(model, "up")  # written into the weights; unmerge restores them bit for bit
    print(f"merged: {merged.retained:.1%} of the update retained after rounding")
    lorakit.unmerge(model, "up")

    with tempfile.TemporaryDirectory() as folder:  # PEFT's files, and lorakit.json with the base's fingerprint
        lorakit.save_adapter(model, folder, "up")
        print("loaded:", lorakit.load_adapter(tiny_model(), folder).base, "base")


if __name__ == "__main__":
    main()
