"""The table INITS: how a fresh factor is filled.

Each row is a function from a `Blank` to A and B. Most fill the side that learns and leave the kind's zero side at
zero, so that a fresh adapter changes no output. Factors are made on the device of their site, in fp32 or wider. An init
may return a new base weight; the layer then keeps the old one.
"""

from __future__ import annotations

from lorakit.core.inits.init import Blank, Filled, Init, fresh_bias
from lorakit.core.inits.plain import GAUSSIAN, KAIMING, RANDOM
from lorakit.core.kinds import is_for
from lorakit.errors import ConfigError, NotYetSupported, nearest

__all__ = ["INITS", "Blank", "Filled", "Init", "fresh_bias", "init_for", "init_named"]

INITS: tuple[Init, ...] = (KAIMING, GAUSSIAN, RANDOM)

LATER = ("pissa", "olora", "orthogonal", "eva", "corda", "loftq", "lora_ga", "mica")
"""Names that the field knows and that are not built yet."""


def init_named(name: bool | str) -> Init:
    """The row for a value of `init_lora_weights`.

    Raises:
        NotYetSupported: A method that is not built yet.
        ConfigError: No such init; the message names the nearest.
    """
    for init in INITS:
        if init.name is name or (isinstance(name, str) and init.name == name.lower()):
            return init
    if any(str(name).lower().startswith(method) for method in LATER):
        raise NotYetSupported(f"init_lora_weights is {name!r}: this init is not built yet. Use True or 'gaussian'.")
    hint = nearest(str(name), ["gaussian", *LATER], 1)
    raise ConfigError(
        f"init_lora_weights is {name!r}; it must be True, False or 'gaussian'"
        + (f". Did you mean {hint[0]!r}?" if hint else ".")
    )


def init_for(name: bool | str, kind: str, path: str) -> Init:
    """The row for a value of `init_lora_weights` at a site.

    Args:
        name: The value.
        kind: Name of the kind of site.
        path: Where, for the message.

    Raises:
        ConfigError: There is no such init, or it has no meaning on this kind.
    """
    init = init_named(name)
    if not is_for(init.kinds, kind):
        raise ConfigError(
            f"init_lora_weights is {name!r}, which has no meaning on a {kind} ({path}); it has one on "
            f"{', '.join(init.kinds)}. Leave the module out, or use True."
        )
    return init
