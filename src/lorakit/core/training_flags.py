"""Which parameters of adapters are trained: the one place that switches `requires_grad` of a whole adapter.

What an init freezes (MiCA's B) stays frozen, whatever is switched. Knows nothing of which adapter is active.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from lorakit.core.activation import parameters_by_adapter
from lorakit.core.sitemap import layers


def set_trained(model: nn.Module, names: Collection[str], trained: bool = True) -> None:
    """Train adapters, or freeze them.

    Args:
        model: An adapted model; only `requires_grad` is changed.
        names: Adapters; one that has nothing here is passed over.
        trained: Whether their parameters require gradients, apart from those that their init froze.
    """
    for parameters in parameters_by_adapter(model, names).values():
        for parameter in parameters:
            parameter.requires_grad_(trained and parameter.is_floating_point())
    for _, layer in layers(model) if trained else ():
        for name in layer.r.keys() & set(names):
            for word, parameter in zip("AB", layer.parameters_of(name), strict=False):
                if word not in layer.trains[name]:
                    parameter.requires_grad_(False)
