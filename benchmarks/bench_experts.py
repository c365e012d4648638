"""Claim: adapters on fused experts train at least 3 times as fast as peft's, and almost as fast as the frozen model.

    python benchmarks/bench_experts.py [--only qwen3_moe] [--rounds 5] [--dtype bfloat16]

Random weights in the geometries of Mixtral (8 experts, 2 per token, width 1024) and Qwen3-MoE (64 experts, 8 per token,
width 1024, experts of width 384), two layers, r 8 on all experts (`target_parameters`), 4 rows of 128 tokens. A step is
forward and backward from a fixed random sum of the output. Sides, in turn in one process: the frozen model with
gradients of its input embeddings, under transformers' experts implementations; lorakit; peft. lorakit's and peft's
gradients are compared in float32 before the first measurement.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from runner import append_row

ROWS, LENGTH, RANK = 4, 128, 8
COMMON = {
    "vocab_size": 512,
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "use_cache": False,
}
GEOMETRIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"intermediate_size": 1792, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 384, "num_experts": 64, "num_experts_per_tok": 8}),
}
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]
FROZEN = ("eager", "grouped_mm")
TOLERANCE = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=tuple(GEOMETRIES), default=list(GEOMETRIES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    given = parser.parse_args()
    for name in given.only:
        check(name)
        steps = sides(name, given.dtype)
        seconds: dict[str, list[float]] = {side: [] for side in steps}
        for number in range(given.rounds + 1):
            for side, step in steps.items():
                start = time.perf_counter()
                step()
                if number:  # the first round is a warm-up
                    seconds[side].append(time.perf_counter() - start)
        samples = {f"{side} (s)": values for side, values in seconds.items()}
        for other in [side for side in seconds if side != "lorakit"]:
            ratios = [theirs / ours for ours, theirs in zip(seconds["lorakit"], seconds[other], strict=True)]
            samples[f"{other} / lorakit"] = ratios
        append_row("experts", {"geometry": name, "dtype": given.dtype, "rank": RANK}, samples)


def model_of(name: str, dtype: str, experts: str = "eager") -> Any:
    """Return a frozen model with random weights."""
    kind, sizes = GEOMETRIES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**COMMON, **sizes)
    config._experts_implementation = experts
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(getattr(torch, dtype))
    return model.requires_grad_(False).train()


def sides(name: str, dtype: str) -> dict[str, Callable[[], list[torch.Tensor]]]:
    """Return a function that takes one step, for each side."""
    found = {f"frozen, {experts}": frozen(model_of(name, dtype, experts)) for experts in FROZEN}
    return found | {side: adapted(side, model_of(name, dtype)) for side in ("lorakit", "peft")}


def adapted(side: str, model: Any) -> Callable[[], list[torch.Tensor]]:
    """Return a function that returns the gradients of the adapter on the experts, in the order of their names."""
    package = __import__("lorakit.peft" if side == "lorakit" else "peft", fromlist=["LoraConfig"])
    config = package.LoraConfig(r=RANK, target_modules=[], target_parameters=PARAMETERS)
    model = package.get_peft_model(model, config)
    factors = sorted((path, p) for path, p in model.named_parameters() if p.requires_grad)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in factors:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    trained = [parameter for _, parameter in factors]
    return lambda: list(torch.autograd.grad(summed(model(input_ids=ids())[0]), trained, materialize_grads=True))


def frozen(model: Any) -> Callable[[], list[torch.Tensor]]:
    """Return a function that returns the gradient of the input embeddings."""
    embeddings = model.get_input_embeddings()(ids()).detach().requires_grad_()
    return lambda: list(torch.autograd.grad(summed(model(inputs_embeds=embeddings)[0]), [embeddings]))


def ids() -> torch.Tensor:
    return torch.randint(0, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))


def summed(output: torch.Tensor) -> torch.Tensor:
    return (output.float() * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).sum()


def check(name: str) -> None:
    """Stop if a gradient differs from peft's."""
    for ours, theirs in zip(*(adapted(side, model_of(name, "float32"))() for side in ("lorakit", "peft")), strict=True):
        error = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))
        if error > TOLERANCE:
            raise SystemExit(f"{name}: a gradient differs by {error:.1e}")


if __name__ == "__main__":
    main()
