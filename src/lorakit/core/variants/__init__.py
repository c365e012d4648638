"""The table VARIANTS: how a base output and a low-rank update combine."""

from __future__ import annotations

from lorakit.config import LoraConfig
from lorakit.core.kinds import is_for
from lorakit.core.variants.alora import ALORA
from lorakit.core.variants.dora import DORA, row_norms
from lorakit.core.variants.lora import PLAIN
from lorakit.core.variants.variant import At, Variant
from lorakit.errors import ConfigError

__all__ = ["VARIANTS", "At", "Variant", "row_norms", "variant_for", "variant_named"]

VARIANTS: tuple[Variant, ...] = (PLAIN, DORA, ALORA)

_NAMED = {variant.name: variant for variant in VARIANTS}


def variant_named(name: str) -> Variant:
    """The variant with that name; names are the table's own, so a miss is a mistake in lorakit."""
    return _NAMED[name]


def variant_for(config: LoraConfig, kind: str, path: str) -> Variant:
    """The variant that a config asks for at a site.

    Args:
        config: The adapter's config.
        kind: Name of the kind of site.
        path: Where, for the message.

    Raises:
        ConfigError: The variant has no meaning on this kind.
    """
    asked = {
        "use_dora": "dora" if config.use_dora else None,
        "alora_invocation_tokens": "alora" if config.alora_invocation_tokens is not None else None,
    }
    chosen = {field: name for field, name in asked.items() if name is not None}
    if len(chosen) > 1:
        raise ConfigError(f"{' and '.join(chosen)} at {path}: these variants exclude each other; choose one.")
    field, name = next(iter(chosen.items()), ("", "plain"))
    variant = variant_named(name)
    if not is_for(variant.kinds, kind):
        raise ConfigError(
            f"{field} at {path}: {variant.name} cannot act on a {kind}; it can on {', '.join(variant.kinds)}. Take "
            "the module out of target_modules, or leave the variant off."
        )
    return variant
