"""Inits that look at data or gradients, under PEFT's names."""

from __future__ import annotations

from typing import Any

from lorakit.peft.elsewhere import placeholder


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return placeholder(name)
