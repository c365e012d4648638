"""Which optional packages are installed, under PEFT's names; nothing is imported to find out."""

from __future__ import annotations

from importlib import metadata
from importlib.util import find_spec
from typing import Any

_PACKAGES = {
    "is_aqlm_available": ("aqlm",),
    "is_bnb_4bit_available": ("bitsandbytes",),
    "is_bnb_available": ("bitsandbytes",),
    "is_diffusers_available": ("diffusers",),
    "is_eetq_available": ("eetq",),
    "is_gptqmodel_available": ("gptqmodel",),
    "is_hqq_available": ("hqq",),
    "is_inc_available": ("neural_compressor",),
    "is_optimum_available": ("optimum",),
    "is_te_available": ("transformer_engine",),
    "is_te_pytorch_available": ("transformer_engine",),
    "is_torch_tpu_available": ("torch_xla",),
    "is_torchao_available": ("torchao",),
}
"""Question -> the packages that it is about."""

_LEVELS: dict[str, bool | tuple[int, int]] = {
    "is_transformers_le_4_53": False,
    "is_transformers_ge_v4_57_0": True,
    "is_transformers_ge_v5": (5, 0),
    "is_transformers_ge_v5_1_0": (5, 1),
    "is_transformers_ge_v5_4_0": (5, 4),
    "is_transformers_ge_v5_6_0": (5, 6),
    "is_transformers_ge_v5_13_0": (5, 13),
    "is_transformers_ge_v5_17_0": (5, 17),
}
"""Constant -> the release of transformers that it asks for, or what it always is (transformers 5 is needed here)."""


def is_xpu_available(check_device: bool = False) -> bool:
    """Whether an Intel GPU is here.

    Args:
        check_device: Accepted; it is always looked for.
    """
    import torch

    return hasattr(torch, "xpu") and torch.xpu.is_available()


def is_torchao_ge_v0_18_0() -> bool:
    """Whether torchao is installed in release 0.18 or newer."""
    return find_spec("torchao") is not None and _release("torchao") >= (0, 18)


def _release(package: str) -> tuple[int, ...]:
    words = metadata.version(package).split(".")[:2]
    return tuple(int("".join(filter(str.isdigit, word)) or 0) for word in words)


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return lambda *_, **__: all(find_spec(package) is not None for package in _PACKAGES[name])
    if name in _LEVELS:
        level = _LEVELS[name]
        return level if isinstance(level, bool) else _release("transformers") >= level
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
