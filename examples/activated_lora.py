"""Activated LoRA: an adapter that is active from its invocation tokens on, so that it can share the base's cache.

A tiny model learns to answer 7 when invoked; before the invocation its outputs are bit-identical to the base's.
"""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lorakit import LoraConfig, core
from lorakit.generate import generate_batch

INVOCATION, ANSWER = [40, 41], 7
CONFIG = LoraConfig(
    r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=INVOCATION
)


def base() -> LlamaForCausalLM:
    """Return a Llama of two layers with random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2))


def train(model: LlamaForCausalLM, steps: int = 60) -> None:
    """Train on random tokens followed by the invocation and the answer; only the answer has loss."""
    parameters = [parameter for _, parameter in core.trainable_parameters(model)]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for _ in range(steps):
        texts = torch.cat([torch.randint(0, 40, (8, 10)), torch.tensor([[*INVOCATION, ANSWER]] * 8)], 1)
        labels = texts.clone()
        labels[:, :-1] = -100
        optimizer.zero_grad()
        model(input_ids=texts, labels=labels).loss.backward()
        optimizer.step()


def main() -> None:
    """Train, compare with the base position by position, and let base and adapter share a cache."""
    core.attach(model := base(), CONFIG, "judge")
    train(model)
    model.eval()
    invoked = torch.cat([torch.randint(0, 40, (1, 12)), torch.tensor([INVOCATION])], 1)
    with torch.no_grad():
        adapted: Tensor = model(input_ids=invoked).logits
        with core.disable(model):
            plain: Tensor = model(input_ids=invoked).logits
    changed = (adapted - plain).abs().amax(-1)[0] > 0
    print(f"positions that the adapter changes: {[int(i) for i in changed.nonzero()]} of {invoked.shape[1]}")
    long = torch.cat([torch.randint(0, 40, (1, 140)), torch.tensor([INVOCATION])], 1)[0].tolist()
    read: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda _, args, output: read.append(args[0].numel()))
    tokens = generate_batch(model, [long, long], max_new_tokens=1, adapters=["judge", None])
    print("from a shared cache:", {("judge", "base")[new.row]: new.token for new in tokens})
    print(f"tokens read: {read}")  # the base reads the first chunk once for both


if __name__ == "__main__":
    main()
