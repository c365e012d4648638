"""Claim: the blocks of every architecture in the table are faster accelerated than with transformers' own forward.

    python benchmarks/bench_blocks.py [--only modernbert gpt_oss] [--rounds 7] [--dtype bfloat16]

For each row of `lorakit.architectures.families` with blocks, the first model of the row with random weights (4 blocks,
width 512, 8 heads, vocabulary of 512), r 16 on all linear layers, 4 rows of 256 tokens. Measured are forward and
backward from a fixed random sum of the output, plain and accelerated in turn, in one process; the loss is not part of
it. Both models have the same adapters, and their gradients are compared in float32 before the first measurement.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
import transformers
from runner import append_row

from lorakit import LoraConfig, accelerate, core
from lorakit.architectures.families import ARCHITECTURES

ROWS, LENGTH = 4, 256
SIZES: dict[int, tuple[str, ...]] = {
    2: ("num_experts_per_tok", "num_key_value_heads"),
    4: (
        *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"),
        *("num_experts", "num_local_experts"),
    ),
    8: ("num_attention_heads", "n_head", "n_heads", "num_heads"),
    64: ("head_dim", "d_kv", "query_pre_attn_scalar"),
    512: ("hidden_size", "n_embd", "d_model", "dim", "word_embed_proj_dim", "vocab_size", "moe_intermediate_size"),
    1536: ("intermediate_size", "d_ff", "ffn_dim", "hidden_dim", "n_inner"),
}
TOLERANCE = 1e-2
"""Largest relative difference of a gradient, in float32."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    given = parser.parse_args()
    for row in ARCHITECTURES:
        if row.block is not None and (given.only is None or row.name in given.only):
            seconds = measured(row.models[0], given.rounds, given.dtype)
            ratios = [ours / theirs for theirs, ours in zip(*seconds.values(), strict=True)]
            facts = {"architecture": row.name, "model": row.models[0], "dtype": given.dtype}
            append_row("blocks", facts, {**seconds, "accelerated / plain": ratios})


def measured(name: str, rounds: int, dtype: str) -> dict[str, list[float]]:
    """Return the seconds of each round, plain and accelerated."""
    for theirs, ours in zip(*map(step, both(name, "float32").values()), strict=True):
        error = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))
        if error > TOLERANCE:
            raise SystemExit(f"{name}: a gradient differs by {error:.1e}")
    models = both(name, dtype)
    for model in models.values():
        step(model)
    seconds: dict[str, list[float]] = {side: [] for side in models}
    for _ in range(rounds):
        for side, model in models.items():
            start = time.perf_counter()
            step(model)
            seconds[side].append(time.perf_counter() - start)
    return seconds


def both(name: str, dtype: str) -> dict[str, Any]:
    """Return a plain and an accelerated model."""
    models = {"plain (s)": model_of(name, dtype), "accelerated (s)": model_of(name, dtype)}
    accelerate(models["accelerated (s)"])
    return models


def model_of(name: str, dtype: str) -> Any:
    """Return a model with adapters, in training mode without dropout and cache."""
    kind = getattr(transformers, name)
    fields = kind.config_class().to_dict()
    sizes = {field: size for size, names in SIZES.items() for field in names if field in fields}
    sizes |= {field: 0.0 for field, value in fields.items() if "drop" in field and isinstance(value, float)}
    if isinstance(fields.get("layer_types"), list):
        sizes["layer_types"] = fields["layer_types"][:4]
    sizes |= {field: 1 for field in fields if field.endswith("token_id")}
    torch.manual_seed(0)
    model = kind(kind.config_class(**sizes)).to(getattr(torch, dtype)).requires_grad_(False)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    core.attach(model, LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False), seed=1)
    return model.train()


def step(model: Any) -> list[torch.Tensor]:
    """Return the gradients of the adapter after one forward and backward pass."""
    ids = torch.randint(2, 500, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    call = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    output = model(**call)[0].float()
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    return list(torch.autograd.grad((output * weights).sum(), trained, materialize_grads=True))


if __name__ == "__main__":
    main()
