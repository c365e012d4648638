"""Adapters whose init moved the base: what the base becomes, and the same adapter as plain LoRA on the original.

Such an adapter acts on W − s·B₀·A₀, where B₀ and A₀ are its factors before training. On the original W it is plain LoRA
of twice the rank, exactly. Everything here is about one site's tensors and one config; files and models are elsewhere.

Put another base weight in place for an adapter whose init moves the base, and take it back.

One adapter of a site can move it. The original stays with the layer, so that `disable`, other adapters, `detach` and
merges see it. Knows nothing of how an init makes its factors.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.core.inits import Init
from lorakit.core.kinds import Kind, Slot
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import AdapterIndex, Place
from lorakit.core.quantization import base_of
from lorakit.core.quantization.weight_format import NOT_WRITTEN
from lorakit.errors import ConfigError

AGAIN = ("init_lora_weights", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "corda_config", "lora_ga_config")
"""Fields of a config that writing it as plain LoRA changes."""


def what_is_left(kind: Kind, slot: Slot, W: Tensor, factors: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """W − s·B·A, canonical (out, in) or as its kind has it.   [docs/math.md (60)]

    Args:
        kind: The kind of the site.
        slot: Its weight.
        W: Canonical, fp32 or wider.
        factors: A (r, in) and B (out, r).
        scale: s.
    """
    A, B = (factor.detach().to(device=W.device, dtype=W.dtype) for factor in factors)
    return W - kind.delta(slot, A, B) * scale


def as_plain(slot: Slot, A: Tensor, B: Tensor, initial: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """[A; A₀] and [B | −B₀], whose product is B·A − B₀·A₀.   [docs/math.md (62)]

    Args:
        slot: The weight.
        A: (r, in).
        B: (out, r).
        initial: A₀ and B₀, like A and B.

    Returns:
        (2r, in) and (out, 2r); with kernels, and expert by expert, as their kind lays them.
    """
    A0, B0 = (factor.to(like) for factor, like in zip(initial, (A, B), strict=True))
    E = max(slot.experts, 1)
    wide_A = torch.cat([A.reshape(E, -1, *A.shape[1:]), A0.reshape(E, -1, *A.shape[1:])], dim=1)
    if not slot.experts:
        return wide_A.flatten(0, 1), torch.cat([B, -B0], dim=1)
    wide_B = torch.cat([B.reshape(len(B), -1, E), -B0.reshape(len(B), -1, E)], dim=1)
    return wide_A.flatten(0, 1), wide_B.flatten(1)


def apart(slot: Slot, A: Tensor, B: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """`as_plain`, backwards.

    Args:
        slot: The weight.
        A: (2r, in).
        B: (out, 2r).

    Returns:
        A (r, in) and B (out, r); A₀ and B₀.
    """
    E = max(slot.experts, 1)
    A, A0 = (part.flatten(0, 1) for part in A.reshape(E, -1, *A.shape[1:]).chunk(2, dim=1))
    if slot.experts:
        B, B0 = (part.flatten(1) for part in B.reshape(len(B), -1, E).chunk(2, dim=1))
    else:
        B, B0 = B.chunk(2, dim=1)
    return (A.contiguous(), B.contiguous()), (A0.contiguous(), -B0.contiguous())


def plain_config(config: LoraConfig) -> LoraConfig:
    """The config of such an adapter written as plain LoRA: twice the rank at the same scale.

    Args:
        config: As it was attached; it is only read.
    """
    more = math.sqrt(2) if config.use_rslora else 2
    return config.with_fields(
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=more * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: more * alpha for key, alpha in config.alpha_pattern.items()},
        loftq_config={},
        corda_config=None,
        lora_ga_config=None,
        eva_config=None,
    )


def beginning(config: LoraConfig) -> dict[str, Any]:
    """What a plain config has lost of the one it was made from, as plain JSON values."""
    values = config.as_json()
    return {name: values[name] for name in AGAIN}


def check_can_move(index: AdapterIndex, place: Place, init: Init | None = None) -> None:
    """Refuse to move a base weight that is moved or merged into already, or that a second rounding would harm.

    Args:
        index: The model's map.
        place: The site.
        init: Who wants to; None for one that comes from a file.

    Raises:
        ConfigError: The message says who stands in the way and what to do.
    """
    standing, module = index.layer(place), index.holder(place)
    if base_of(module, place.slot.parameter).device(module, place.slot.parameter).type == "meta":
        raise ConfigError(
            f"{place.path}: this init moves the base weight, and on the meta device there are no numbers to move. Load "
            "the base first, or use init_lora_weights=True.",
            where=place.path,
        )
    if standing is not None and (standing.moved_by is not None or standing.merged_adapters):
        who = standing.moved_by or standing.merged_adapters[0]
        raise ConfigError(
            f"{place.path}: this init moves the base weight, which adapter {who!r} has moved or is merged into. Detach "
            "or unmerge it first, or use an init that leaves the base alone.",
            where=place.path,
        )
    sharing = index.shared.get(id(module._parameters.get(place.slot.parameter)), [])
    if sharing or len(index.parents.get(id(index.modules[place.outer]), ())) > 1:
        other = next((path for path in sharing if path != place.outer), "another place")
        raise ConfigError(
            f"{place.path} shares its weight with {other}, and this init would move it for both. Leave the module out, "
            "or use an init that leaves the base alone."
        )
    if not base_of(module, place.slot.parameter).written:
        raise ConfigError(NOT_WRITTEN.format(parameter=place.path, type=type(module).__name__))
    if init is not None and base_of(module, place.slot.parameter).quantised and not init.requantises:
        raise ConfigError(
            f"{place.path}: init_lora_weights is {init.name!r}, which needs the weight in float32, float16 or "
            "bfloat16, and this one is quantised: what is left would be rounded a second time. Attach to the base as "
            "it was before it was quantised, or use True.",
            where=place.path,
        )


def moved_base(index: AdapterIndex, place: Place, factors: tuple[Tensor, Tensor], scale: float) -> Any:
    """What a site's module shall store for W − s·B·A, with W the base as it is.

    Args:
        index: The model's map.
        place: The site.
        factors: A (r, in) and B (out, r).
        scale: s.
    """
    W = index.weight(place)
    return written(index, place, what_is_left(place.kind, place.slot, W, factors, scale))


class Cost(NamedTuple):
    """What moving one site's base costs.

    Attributes:
        kept_bytes: Memory that the original and the first factors take beside it.
        lost: What rounding a quantised weight a second time changes, over the weight; 0 of a plain one.
    """

    kept_bytes: int
    lost: float


UNMOVED = Cost(0, 0.0)
"""Of a site whose base stays."""


def cost_of(index: AdapterIndex, place: Place, moved: Any, initial: tuple[Tensor, Tensor] | None, scale: float) -> Cost:
    """What putting another base weight in place costs.

    Args:
        index: The model's map.
        place: The site.
        moved: What its module shall store.
        initial: A (r, in) and B (out, r) where that is W − s·B·A, or None.
        scale: s.
    """
    base = base_of(index.holder(place), place.slot.parameter)
    kept_bytes = sum(t.numel() * t.element_size() for t in (*base.tensors(moved), *(initial or ())))
    if not base.quantised or initial is None:
        return Cost(kept_bytes, 0.0)
    wanted = what_is_left(place.kind, place.slot, index.weight(place), initial, scale)
    lost = torch.linalg.vector_norm(base.read(index.holder(place), moved) - wanted)
    return Cost(kept_bytes, float(lost / torch.linalg.vector_norm(wanted).clamp_min(torch.finfo(wanted.dtype).tiny)))


def written(index: AdapterIndex, place: Place, W: Tensor) -> Any:
    """What a site's module shall store for a canonical weight (out, in)."""
    module, parameter = index.holder(place), place.slot.parameter
    base = base_of(module, parameter, place.slot.as_stored)
    with torch.no_grad():
        return base.write(module, base.stored(module, parameter), W)


def give_base_back(layer: LoraLayer) -> None:
    """Put the original in place of a moved base weight; adapters that are merged into it stay merged.

    Args:
        layer: A site whose base was moved.
    """
    layer.moved_by = layer.moved = layer.initial = None
    layer.place(layer.stored_with(layer.merged_adapters))
    if not layer.merged_adapters:
        layer.kept = None
