"""`VARIANTS`, the registry of ways to combine the base output with a low-rank update."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterator, Sequence
from typing import Any

from lorakit.config import LoraConfig
from lorakit.core.kinds import Kind, check_fits
from lorakit.core.variants.alora import ALORA, last_invocation
from lorakit.core.variants.arrow import ARROW
from lorakit.core.variants.bdlora import BDLORA
from lorakit.core.variants.dora import DORA
from lorakit.core.variants.kasa import KASA
from lorakit.core.variants.lora_xs import LORA_XS
from lorakit.core.variants.monteclora import MONTECLORA
from lorakit.core.variants.qalora import QALORA
from lorakit.core.variants.variant import (
    NO_SETTING,
    NO_TENSORS,
    PLAIN,
    Addend,
    At,
    Factor,
    Move,
    OwnTensor,
    Parts,
    Penalty,
    Role,
    Setting,
    Start,
    Variant,
)
from lorakit.core.variants.velora import VELORA
from lorakit.errors import ConfigError

__all__ = [
    "NO_SETTING",
    "NO_TENSORS",
    "PLAIN",
    "VARIANTS",
    "Addend",
    "At",
    "Factor",
    "Move",
    "OwnTensor",
    "Parts",
    "Penalty",
    "Role",
    "Setting",
    "Start",
    "Variant",
    "asked_for",
    "check_invocation",
    "invocations_of",
    "is_kept",
    "last_invocation",
    "own_tensors",
    "variant_at",
    "variant_for",
    "variant_named",
    "variants_of",
    "without",
]

VARIANTS: tuple[Variant, ...] = (PLAIN, DORA, ALORA, KASA, BDLORA, VELORA, QALORA, MONTECLORA, ARROW, LORA_XS)


def variant_named(name: str) -> Variant:
    """Return the variant with the given name; a KeyError is a bug in lorakit, because users never pass such names."""
    for variant in VARIANTS:
        if variant.name == name:
            return variant
    raise KeyError(name)


def asked_for() -> tuple[Variant, ...]:
    """Return the variants that a config field can select: all except LoRA itself."""
    return tuple(variant for variant in VARIANTS if variant.field)


def own_tensors() -> Iterator[OwnTensor]:
    """Yield the description of each extra tensor that a variant stores in addition to A and B."""
    for variant in VARIANTS:
        yield from variant.parts.extras


def variants_of(config: LoraConfig) -> list[Variant]:
    """Return the variants other than LoRA itself that a config selects at one or more sites."""
    return [v for v in VARIANTS if v.field and getattr(config, v.field) not in (None, False)]


def invocations_of(config: LoraConfig) -> list[tuple[Variant, Sequence[int]]]:
    """Return the selected variants that wait for tokens, each with the ids of these tokens."""
    return [(variant, variant.invocation(config)) for variant in variants_of(config) if variant.invocation is not None]


def check_invocation(config: LoraConfig, known: Container[int], where: str, length: int | None = None) -> None:
    """Check that the tokens for which an adapter waits can occur; otherwise, it would never act.

    A ConfigError if one is not among the `known` ids that `where` has, or if all do not fit into a row of `length`
    tokens.
    """
    for variant, tokens in invocations_of(config):
        unknown = [token for token in tokens if token not in known]
        if unknown:
            text = f"{variant.field}: {where} does not have the token ids {', '.join(map(str, unknown))}."
            raise ConfigError(text, what=unknown[0], field=variant.field)
        if length is not None and len(tokens) >= length:
            text = f"{variant.field} has {len(tokens)} tokens, but rows have at most {length}, so it would never act."
            raise ConfigError(text, what=len(tokens), field=variant.field)


def moving_variant(config: LoraConfig) -> Variant | None:
    """Return the selected variant that replaces the base weight, or None if there is no such variant."""
    return next((variant for variant in variants_of(config) if variant.move is not None), None)


def is_kept(variant: Variant) -> bool:
    """Return whether combining adapters of a variant yields an adapter of the same variant instead of plain LoRA."""
    return variant.combine is not None


def without(config: LoraConfig, *variants: Variant) -> LoraConfig:
    """Return a copy of a config without the given variants."""
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{variant.field: defaults[variant.field] for variant in variants})


def variant_at(config: LoraConfig, path: str) -> tuple[Variant, Setting]:
    """Return the variant that a config selects at a site, and its settings there; a ConfigError if it selects two."""
    selected = variants_of(config)
    if not selected:
        return PLAIN, NO_SETTING
    settings = [(v, v.setting(config, path) if v.setting else NO_SETTING) for v in selected]
    chosen = [(variant, setting) for variant, setting in settings if setting is not None]
    if len(chosen) > 1:
        fields = " and ".join(variant.field for variant, _ in chosen)
        text = f"{fields} at {path}: these variants are mutually exclusive; choose one."
        raise ConfigError(text, what=[variant.field for variant, _ in chosen], where=path, field=chosen[0][0].field)
    return chosen[0] if chosen else (PLAIN, NO_SETTING)


def variant_for(config: LoraConfig, kind: Kind, path: str) -> tuple[Variant, Setting]:
    """Return the variant that a config selects at a site, and its settings; a ConfigError if the kind has none."""
    variant, setting = variant_at(config, path)
    off = next((f.default for f in dataclasses.fields(LoraConfig) if f.name == variant.field), None)
    advice = f"set {variant.field} to {off}"
    check_fits(variant.fits, kind, path, what=variant.title, field=variant.field, advice=advice)
    return variant, setting
