"""LoRA on the experts of an MoE model, which are fused in one parameter: `target_parameters`, with dropout.

Each expert applies its own B·A to its tokens, without a dense copy of the experts. The model is a tiny Mixtral, so
that this runs anywhere in seconds.
"""

from __future__ import annotations

import tempfile

import torch
from transformers import MixtralConfig, MixtralForCausalLM

import lorakit
from lorakit import LoraConfig
from lorakit.core import inspect_adapter

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def tiny_model() -> MixtralForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}
    mixture = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MixtralForCausalLM(MixtralConfig(vocab_size=100, initializer_range=0.2, **sizes, **mixture)).eval()


def main() -> None:
    model = tiny_model()
    config = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj"], target_parameters=EXPERTS)
    report = lorakit.attach(model, config, "counting", seed=0)
    print(f"{report.trainable_parameters:,} trainable parameters; every expert has its own A and B")

    tokens = torch.arange(24)[None]
    optimizer = torch.optim.AdamW([p for _, p in lorakit.trainable_parameters(model)], lr=1e-2, weight_decay=0.0)
    model.train()  # dropout applies to each expert's input
    for step in range(40):
        loss = model(tokens, labels=tokens).loss
        if step in (0, 39):
            print(f"loss {loss.item():.2f}")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        lorakit.save_adapter(model, folder, "counting")
        for site in inspect_adapter(folder).sites[:2]:
            print(f"{site.path}: {site.experts} experts, rank {site.r}, norm of the update {site.norm:.2f}")
        before = model(tokens).logits
        lorakit.merge_and_unload(model)
        print(f"merged: logits differ by {(model(tokens).logits - before).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
