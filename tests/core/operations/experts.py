"""Reference updates of adapters on fused experts: each expert's update, dense and in float64, from its form on disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core import attach
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import INSIDE, layers

from ...laws.zoo import Specimen, randomise

RULES: dict[str, dict[str, Any]] = {
    "a": {"r": 4, "lora_alpha": 8},
    "b": {"r": 2, "lora_alpha": 5, "use_rslora": True},
    "c": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "d": {"r": 3, "lora_alpha": 8, "rank_pattern": {}},
}


def made(specimen: Specimen, *names: str, dtype: torch.dtype = torch.float64, **fields: Any) -> nn.Module:
    """Return a model with adapters of these names, each with the rank and scale of RULES and different random values.

    The one called "d" has rank 5 at the specimen's first parameter.
    """
    model = specimen.model(dtype)
    for number, name in enumerate(names):
        pattern = {"rank_pattern": {specimen.parameters[0]: 5}} if "rank_pattern" in RULES[name] else {}
        attach(model, specimen.config(**{**RULES[name], **pattern, **fields}), name)
        randomise(model, name, 30 + number)
    return model


def experts(path: str, layer: LoraLayer) -> list[str]:
    """Return the names of the matrices of one site: the path of the parameter, and an index."""
    parameter = f"{path.partition(INSIDE)[0]}.{layer.spec.parameter}"
    return [f"{parameter}[{e}]" for e in range(max(1, layer.spec.experts))]


def factors(model: nn.Module, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Return matrix -> A_e (r, in) and B_e (out, r), in the order of the paths."""
    found = {}
    for path, layer in sorted(layers(model)):
        if name in layer.r:
            A, B = (t.detach().double() for t in (layer.factor(name).A, layer.factor(name).B))
            r, names = layer.r[name], experts(path, layer)
            for e, where in enumerate(names):
                found[where] = A[e * r : (e + 1) * r], B[:, e :: len(names)]
    return found


def scale(model: nn.Module, name: str) -> float:
    """Return the scale of an adapter without patterns."""
    (found,) = {layer.scaling[name] for _, layer in layers(model) if name in layer.r}
    return found


def deltas(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Return matrix -> s·B_e·A_e, (out, in)."""
    scales = {w: la.scaling[name] for path, la in layers(model) if name in la.r for w in experts(path, la)}
    return {where: scales[where] * B @ A for where, (A, B) in factors(model, name).items()}


def total(model: nn.Module, weights: dict[str, float]) -> dict[str, Tensor]:
    """Return matrix -> the weighted sum of the updates, (out, in)."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        for where, delta in deltas(model, name).items():
            found[where] = found.get(where, 0) + weight * delta
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return matrix -> the base's W_e, (out, in)."""
    found = {}
    for path, layer in layers(model):
        W = layer.read().double()
        for e, where in enumerate(experts(path, layer)):
            one = W[e] if layer.spec.experts else W
            found[where] = one.T if layer.spec.in_first else one
    return found


def norms(model: nn.Module, found: dict[str, Tensor]) -> dict[str, float]:
    """Return path of each layer -> Frobenius norm over all its matrices."""
    return {path: float(torch.stack([found[w].norm() for w in experts(path, la)]).norm()) for path, la in layers(model)}
