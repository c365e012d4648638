"""PEFT's optimizers for LoRA: groups of LoRA+ and LoRA-FA, over `lorakit.core`; the Riemannian one is not built."""

from lorakit.peft.optimizers.lorafa import create_lorafa_optimizer
from lorakit.peft.optimizers.loraplus import create_loraplus_optimizer
from lorakit.peft.optimizers.riemannian import create_riemannian_optimizer

__all__ = ["create_lorafa_optimizer", "create_loraplus_optimizer", "create_riemannian_optimizer"]
