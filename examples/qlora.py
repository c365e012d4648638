"""QLoRA: a 4-bit base with an fp32 adapter; its savings, its cost, and merging.

    python examples/qlora.py        (needs bitsandbytes: pip install 'lorakit[quant]')

The same on the command line: lorakit train --quantization nf4 ..., and lorakit merge --quantization nf4 ...
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from lorakit import LoraConfig, core, hub

IDS = torch.arange(3, 99).reshape(4, 24)
STEPS = 40


def loss_of(model: Any) -> Any:
    return model(input_ids=IDS, labels=IDS, use_cache=False).loss


def train(model: Any) -> tuple[float, float]:
    before = loss_of(model).item()
    optimizer = torch.optim.AdamW([parameter for _, parameter in core.trainable_parameters(model)], lr=1e-2)
    for _ in range(STEPS):
        loss = loss_of(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return before, loss.item()


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).save_pretrained(folder)
        small = hub.load_model(folder, "float32", quantization="nf4")
        core.attach(small, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"), seed=0)
        before, after = train(small)
        print(f"nf4 base: loss {before:.2f} -> {after:.2f} in {STEPS} steps")
        core.save_adapter(small, f"{folder}/adapter")
        plain = hub.load_model(folder, "float32")
        report = core.load_adapter(plain, f"{folder}/adapter")
        print(f"the same adapter on the unquantized base ({report.base}): loss {loss_of(plain).item():.2f}")
        packed = core.merge(small)
        print(f"merged into nf4: error {packed.error:.1%} of W, {packed.retained:.0%} of B·A retained")
        core.unmerge(small)
        plainly = core.merge(small, dense=True)
        print(f"merged into dense weights: error {plainly.error:.1e}, loss {loss_of(small).item():.2f}")


if __name__ == "__main__":
    main()
