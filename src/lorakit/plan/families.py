"""The row of the table of architectures by which a model's activations are counted."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.architectures.families import BERT, BERT_BLOCK, GPT2, GPT2_BLOCK, LLAMA, PRE_NORM, architecture_of
from lorakit.architectures.layouts import Block, SublayerName
from lorakit.architectures.shapes import ModelShape, block_of

SHARED_INPUTS = (
    ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate"),
    ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj"),
)
"""Modules that read the same tensor in blocks whose layout is not in the table: latent attention and shared experts."""


@dataclass(frozen=True)
class Family:
    """Layout of a model's blocks; `is_known` if the bytes that they save are exact, not estimated."""

    title: str
    block: Block
    is_known: bool

    def sublayer_of(self, path: str) -> SublayerName | None:
        """Return the sublayer that the module at this path belongs to, or None."""
        block = block_of(path)
        return None if block is None else self.block.sublayer_of(_inside(path))

    def reads_norm(self, path: str) -> bool:
        """Return whether the input of a linear module comes from a norm, not from attention or the activation."""
        return any(_inside(path) in group for group in self.block.inputs)

    def group_of(self, path: str) -> str:
        """Return a key that all linear modules (or their weights) share that read the same tensor."""
        path = path.removesuffix(".weight")
        groups = (*self.block.inputs, *SHARED_INPUTS)
        return next((f"{block_of(path)}.{group[0]}" for group in groups if _inside(path) in group), path)


def _inside(path: str) -> str:
    """Return the path of a module relative to its block, or the path itself for a module outside any block."""
    return path.removeprefix(f"{block_of(path)}.")


def family_of(shape: ModelShape) -> Family:
    """Return the family used for a model.

    An unknown architecture counts as Llama-like if its MLP is gated, else GPT-2-like if causal, else BERT-like.
    """
    nearest, block = (LLAMA, PRE_NORM) if shape.gated else (GPT2, GPT2_BLOCK) if shape.causal else (BERT, BERT_BLOCK)
    found = architecture_of(shape.architecture)
    if found is None or found.block is None:
        return Family(nearest.title, block, False)
    return Family(found.title or nearest.title, found.block, found.is_planned)
