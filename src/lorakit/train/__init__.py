"""Training: settings, the training loop, checkpoints for bit-exact resumption, metrics and evaluation.

Public names are imported lazily (PEP 562), so that reading the settings for `--help` does not import torch. This
package accesses models, data and adapters only through `lorakit.hub`, `lorakit.data` and `lorakit.core`.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Evaluation": "loop.loop",
    "RunResult": "trainer",
    "TrainSettings": "settings.settings",
    "evaluate": "loop.loop",
    "run": "trainer",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'lorakit.train' has no attribute {name!r}")
    return getattr(import_module(f"lorakit.train.{home}"), name)


def __dir__() -> list[str]:
    return __all__
