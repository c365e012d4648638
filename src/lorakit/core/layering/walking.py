"""A walk over a model that leaves out what carries factors: most modules of an adapted model are such carriers."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lorakit.core.layering.layer import LoraLayer


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, as `named_modules` in name and order, without the carriers of factors.

    Args:
        model: Any module.

    Yields:
        Path, and the module.
    """
    seen: set[int] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        if not module._modules:
            continue
        prefix = f"{path}." if path else ""
        if isinstance(module, LoraLayer):
            waiting.append((f"{prefix}base_layer", module.base_layer))
        else:
            inside = [(prefix + name, child) for name, child in module._modules.items() if child is not None]
            waiting.extend(reversed(inside))
