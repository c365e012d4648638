"""Adapters with different ranks and scales, and their updates of the weights, dense and in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core import (
    attach,
    use,
)
from lorakit.core.model.index import layers

from ...laws.zoo import (
    Specimen,
    randomise,
    run,
)

SCALES: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8},
    "b": {"r": 2, "lora_alpha": 5, "use_rslora": True},
    "c": {"r": 4, "lora_alpha": 3, "use_rslora": True, "alpha_pattern": {"last": 9}},
    "d": {"r": 3, "lora_alpha": 8, "rank_pattern": {"last": 5}},
}


def made(specimen: Specimen, *names: str, dtype: torch.dtype = torch.float64, **fields: Any) -> nn.Module:
    """Return a model with adapters of these names, each with the rank and scale of SCALES and different random values."""
    model = specimen.model(dtype)
    for number, name in enumerate(names):
        attach(model, specimen.config(**{**scales(name, specimen), **fields}), name)
        randomise(model, name, 30 + number)
    return model


def scales(name: str, specimen: Specimen) -> dict[str, Any]:
    """Return rank and scale of an adapter; patterns name the specimen's last target."""
    last = specimen.targets[-1]
    return {key: {last: v["last"]} if isinstance(v, dict) else v for key, v in SCALES[name].items()}


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return path -> scale·B·A, dense, in float64."""
    found = {}
    for path, layer in layers(model):
        if name in layer.r:
            factor = layer.factor(name)
            found[path] = (factor.B.double().flatten(1) @ factor.A.double().flatten(1) * factor.scale).detach()
    return found


def total(model: nn.Module, weights: dict[str, float]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for path, delta in deltas(model, name).items():
            found[path] = found.get(path, 0) + weight * delta
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for path, delta in found.items():
        torch.testing.assert_close(delta, expected[path], rtol=tolerance, atol=tolerance)


def nearest(delta: Tensor, rank: int) -> Tensor:
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def effect(model: nn.Module, specimen: Specimen, *names: str) -> Tensor:
    with use(model, *names):
        return run(model, specimen.given(torch.float64))
