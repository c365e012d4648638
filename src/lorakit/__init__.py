"""lorakit: Low-Rank Adaptation for PyTorch and Transformers models.

The public names are imported lazily (PEP 562): `import lorakit` does not load torch, and accessing a name imports
only the module that defines it.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "AdapterError": "errors",
    "HubOptions": "hub_cache",
    "LoraConfig": "config",
    "LoraLayer": "core",
    "LoraTrainerMixin": "peft",
    "LorakitError": "errors",
    "Session": "session",
    "PeftModel": "peft",
    "TaskType": "config",
    "accelerate": "speed",
    "activate": "core",
    "adapters": "core",
    "attach": "core",
    "detach": "core",
    "disable": "core",
    "estimate": "plan",
    "get_peft_model": "peft",
    "install_as_peft": "peft",
    "load_adapter": "core",
    "merge": "core",
    "merge_and_unload": "core",
    "merged_state_dict": "core",
    "open_session": "session",
    "route": "core",
    "save_adapter": "core",
    "sites": "core",
    "trainable_parameters": "core",
    "unmerge": "core",
    "use": "core",
}

__all__ = ["__version__", *sorted(_HOMES)]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'lorakit' has no attribute {name!r}")
    return getattr(import_module(f"lorakit.{home}"), name)


def __dir__() -> list[str]:
    return __all__
