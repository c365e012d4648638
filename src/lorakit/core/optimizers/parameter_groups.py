"""Learning rates of an adapter's tensors: LoRA+ and rates by pattern, worked out by what each tensor is.

What a tensor is (A, B, of an embedding, a vector, a copied module) is asked of the layer that holds it, not guessed
from its name. Knows nothing about optimizers, schedules or decay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from lorakit.core.layering.sitemap import layers
from lorakit.core.routes.activation import trainable_parameters
from lorakit.errors import ConfigError
from lorakit.targets import first_match, unfitting_keys

Role = Literal["A", "B", "embedding", "vector", "whole"]
"""A or B of a site; either factor of an embedding; a magnitude or bias (one axis); a matrix of a copied module."""


@dataclass(frozen=True)
class TrainedPart:
    """One trained tensor of an adapter.

    Attributes:
        name: Its name in the model.
        parameter: The tensor.
        role: What it is.
        site: Path of the module that it belongs to.
    """

    name: str
    parameter: nn.Parameter
    role: Role
    site: str


@dataclass(frozen=True)
class Rates:
    """Learning rates of one adapter.

    Attributes:
        learning_rate: Of A, and of all that nothing below speaks of.
        b_ratio: Rate of B over that of A: LoRA+'s λ. It also holds for vectors, which act on the output as B does.
        embedding: Of both factors of an embedding, or None for as any other site's.
        patterns: Pattern -> the rate that replaces `learning_rate` at the sites it fits, as `rank_pattern` is read;
            the first that fits wins, and `b_ratio` multiplies it for B. It wins over `embedding`.
    """

    learning_rate: float
    b_ratio: float = 1.0
    embedding: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)


def roles(model: nn.Module) -> dict[int, tuple[Role, str]]:
    """What each factor and magnitude in a model is: id of the tensor -> role and path of its site.

    Args:
        model: Any model; one without adapters has none.
    """
    found: dict[int, tuple[Role, str]] = {}
    for path, layer in layers(model):
        site = path.replace(".base_layer", "")  # layers can stand one inside the other
        factors: tuple[Role, Role] = ("embedding", "embedding") if layer.kind.zero_side == "A" else ("A", "B")
        for adapter in layer.r:
            own = layer.parameters_of(adapter)
            if not own:
                continue  # its factors are those of another, to which it is tied
            A, B, *vectors = own
            found.update(zip((id(A), id(B)), ((role, site) for role in factors), strict=True))
            found.update((id(vector), ("vector", site)) for vector in vectors if vector is not A and vector is not B)
    return found


def trained_parts(model: nn.Module, name: str | None = None) -> list[TrainedPart]:
    """The trained tensors of an adapter with what each is, in the model's order.

    Args:
        model: An adapted model.
        name: One adapter, or None for all.

    Raises:
        AdapterError: There is no such adapter.
    """
    known = roles(model)
    parts = []
    for path, parameter in trainable_parameters(model, name):
        plain: Role = "vector" if parameter.ndim == 1 else "whole"
        role, site = known.get(id(parameter), (plain, _owner(path)))
        parts.append(TrainedPart(path, parameter, role, site))
    return parts


def rates_by_name(parts: Sequence[TrainedPart], rates: Rates) -> dict[str, float]:
    """The learning rate of each tensor: η_B = λ·η_A at every site.   [docs/math.md (17)]

    Args:
        parts: The trained tensors.
        rates: What holds where.

    Returns:
        Name of the tensor -> its rate.

    Raises:
        ConfigError: A pattern is no regular expression or fits no trained tensor; the nearest names are given.

    Source:
        Hayou, Ghosh and Yu 2024, arXiv:2402.12354, section 4: B's rate has to be larger than A's by an order that
        grows with the width.
    """
    sites = list(dict.fromkeys(part.site for part in parts))
    wrong = unfitting_keys("learning_rate_pattern", rates.patterns, sites)
    if wrong:
        raise ConfigError(" ".join(wrong))
    return {part.name: _rate(part, rates) for part in parts}


def _rate(part: TrainedPart, rates: Rates) -> float:
    own: float | None = first_match(rates.patterns, part.site, None)
    if part.role == "embedding":
        return own if own is not None else rates.embedding if rates.embedding is not None else rates.learning_rate
    of_a = rates.learning_rate if own is None else own
    return of_a * rates.b_ratio if part.role in ("B", "vector") else of_a


def _owner(name: str) -> str:
    """Path of the module that a tensor outside the factors belongs to, as the base has it."""
    path = name.rpartition(".")[0]
    return path.partition(".modules_to_save.")[0].partition(".token_adapter.")[0].replace(".base_layer", "")
