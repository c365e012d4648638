"""Combine two adapters: exactly, at a lower rank, and pruned; print each result's deviation from the plain sum."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import lorakit
from lorakit import LoraConfig, core


def base_with_adapters() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ).eval()
    # init False initializes both factors at random, as if trained
    settings = {"target_modules": ["c_attn", "c_fc"], "init_lora_weights": False}
    lorakit.attach(model, LoraConfig(r=8, lora_alpha=8, **settings), "polite", seed=1)
    lorakit.attach(model, LoraConfig(r=4, lora_alpha=6, use_rslora=True, **settings), "brief", seed=2)
    return model


@torch.no_grad()
def main() -> None:
    model, tokens = base_with_adapters(), torch.randint(0, 100, (2, 12))
    with lorakit.use(model, "polite", "brief"):
        together = model(tokens).logits

    core.combine(model, ["polite", "brief"], [1.0, 1.0], "both", way="cat")
    with lorakit.use(model, "both"):
        print(f"one adapter for two: logits differ by {(model(tokens).logits - together).abs().max().item():.1e}")

    for way in (
        core.CombinationType("svd", rank=8),
        core.CombinationType("svd", rank=4),
        core.CombinationType("ties_svd", rank=8, density=0.5),
    ):
        report = core.combine(model, ["polite", "brief"], [1.0, 1.0], f"{way.name}-{way.rank}", way=way)
        print(f"{way.name} of rank {way.rank}: {report.deviation:.0%} deviation at the worst site")

    report = core.subtract(model, "both", "brief", "polite-again")
    alike = core.compare_adapters(model, "polite-again", "polite")
    print(f"both - brief = polite: cosine {alike.cosine:.6f}")

    with tempfile.TemporaryDirectory() as folder:  # folders are combined without a base
        for name in ("polite", "brief"):
            lorakit.save_adapter(model, Path(folder) / name, name)
        core.combine_folders([Path(folder) / "polite", Path(folder) / "brief"], [0.5, 0.5], Path(folder) / "mean")
        smaller = core.compress_folder(Path(folder) / "mean", Path(folder) / "small", rank=2)
        print(f"the mean at rank 2 loses {smaller.energy_lost:.0%} of its energy")


if __name__ == "__main__":
    main()
