"""`INITS`, the table of initializations for a new adapter's factors.

Most entries fill one factor and leave the other (the kind's `zero_side`) at zero, so that a new adapter does not change
the output. Others move part of the base weight into A and B; the layer then keeps the original weight and the residual.
Factors are created on the device of their site, in fp32 or wider.
"""

from __future__ import annotations

import re

from lorakit.config import LoraConfig
from lorakit.core.inits.from_data import CORDA, EVA, LORA_GA
from lorakit.core.inits.from_weight import LOFTQ, MICA, OLORA, PISSA
from lorakit.core.inits.init import Init, InitContext, InitResult, fresh_bias
from lorakit.core.inits.random import GAUSSIAN, KAIMING, ORTHOGONAL, RANDOM, discard_first_draws
from lorakit.core.kinds import Kind, check_fits
from lorakit.errors import ConfigError, did_you_mean

__all__ = [
    "INITS",
    "Init",
    "InitContext",
    "InitResult",
    "discard_first_draws",
    "fresh_bias",
    "init_for",
    "init_named",
    "known_init",
]

INITS: tuple[Init, ...] = (KAIMING, GAUSSIAN, RANDOM, PISSA, OLORA, ORTHOGONAL, EVA, CORDA, LOFTQ, LORA_GA, MICA)


def init_named(name: bool | str) -> Init:
    """Return the entry for a value of `init_lora_weights`; a ConfigError suggests the most similar name."""
    for init in INITS:
        if init.name is name or (isinstance(name, str) and init.name == name.lower()):
            return init
        if isinstance(name, str) and init.family and re.fullmatch(init.family, name.lower()):
            return init
    words = [str(init.name) for init in INITS if isinstance(init.name, str)]
    text = (
        f"Unknown initialization init_lora_weights={name!r}; it must be True, False or one of {', '.join(words)}."
        + did_you_mean(str(name), words)
    )
    raise ConfigError(text, what=name, field="init_lora_weights", allowed=words)


def known_init(config: LoraConfig) -> Init | None:
    """Return the init that a config specifies, or None if lorakit has no such init."""
    try:
        return init_named(config.init_lora_weights)
    except ConfigError:
        return None


def init_for(name: bool | str, kind: Kind, path: str) -> Init:
    """Return the entry for a value of `init_lora_weights` at a site; a ConfigError if it does not support the kind."""
    init = init_named(name)
    what, field = f"init_lora_weights={name!r}", "init_lora_weights"
    check_fits(init.fits, kind, path, what=what, field=field, advice=f"set {field} to True")
    return init
