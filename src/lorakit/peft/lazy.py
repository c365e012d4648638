"""Tables of names whose homes are imported when a name is asked for (PEP 562), so that they cost nothing before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

OURS = "lorakit."
ELSEWHERE = "elsewhere"
"""Home of names that are placeholders for PEFT's other methods."""


def names_of(module: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """A module's `__getattr__` and `__dir__` over a table of names.

    Args:
        module: The module's own name, for the message.
        homes: A home below `lorakit` -> the names that live there, separated by spaces.

    Returns:
        The two functions.
    """
    table = {name: home for home, names in homes.items() for name in names.split()}

    def find(name: str) -> Any:
        home = table.get(name)
        if home is None:
            return _submodule(module, name)
        if home == ELSEWHERE:
            return import_module(f"{OURS}peft.elsewhere").placeholder(name)
        return getattr(import_module(OURS + home), name)

    return find, lambda: sorted(table)


def _submodule(module: str, name: str) -> Any:
    """A module below another, as programs reach it that imported the one above alone (`peft.tuners.lora.layer`)."""
    wanted = f"{module}.{name}"
    try:
        if not name.startswith("_"):
            return import_module(wanted)
    except ModuleNotFoundError as missing:
        if missing.name != wanted:
            raise
    raise AttributeError(f"module {module!r} has no attribute {name!r}")
