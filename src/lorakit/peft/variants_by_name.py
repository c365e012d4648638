"""PEFT's classes of variants, by name alone: what computes a variant here is a row of `lorakit.core.variants`."""

from __future__ import annotations

from typing import Any

from lorakit.peft.elsewhere import placeholder


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return placeholder(name)
