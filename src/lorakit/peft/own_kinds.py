"""Layer classes of one's own (`LoraConfig._register_custom_module`) as kinds of site of the core."""

from __future__ import annotations

import dataclasses

from lorakit.config import LoraConfig
from lorakit.core.kinds import Kind, kind_named, kind_of
from lorakit.core.layering.layer_names import LAYERS
from lorakit.errors import NotYetSupported, warn_caller


def kinds_of(config: LoraConfig | None) -> list[Kind]:
    """The kinds that a config's custom modules ask for; a type that has none of the table's own is warned about.

    Args:
        config: The config, or None.

    Raises:
        NotYetSupported: A class is built on none of the layers here.
    """
    found = []
    for module_type, layer in (config.custom_modules or {}).items() if config is not None else ():
        like = next((name for name, made in LAYERS.items() if issubclass(layer, made)), None)
        if like is None:
            raise NotYetSupported(
                f"{layer.__name__} for {module_type.__name__}: a custom layer must be a subclass of one of the layers "
                "here, such as lora.Linear; for other arithmetic give attach a lorakit.core.Kind (kinds=[...])."
            )
        if kind_of(module_type) is None:
            warn_caller(f"Unsupported layer type '{module_type}' encountered, proceed at your own risk.", UserWarning)
        name = f"{layer.__name__} on {module_type.__name__}"
        found.append(dataclasses.replace(kind_named(like), name=name, types=(module_type,), layer=layer))
    return found
