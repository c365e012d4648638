"""Which adapters cannot act at once: those that put something of their own in one place."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from lorakit.core.parts.extras import ModuleCopies
from lorakit.core.parts.token_rows import TokenRows
from lorakit.core.routes.switching import Switched
from lorakit.errors import ConfigError, RouteError
from lorakit.peft import standing

ALONE = "Only one adapter can be set at a time for {wrapper}, got {names}: {why}"


def check_together(modules: Iterable[Switched], names: Sequence[str]) -> None:
    """Refuse adapters that stand in each other's place; nothing is changed.

    Args:
        modules: The adapted modules of a model.
        names: The adapters that shall act at once.

    Raises:
        ConfigError: Two of them copy the same module, or train the same row of a table.
    """
    for module in modules:
        if isinstance(module, ModuleCopies) and len(set(names) & standing.available_at(module)) > 1:
            why = "each has its own copy of the module."
            raise ConfigError(ALONE.format(wrapper="ModulesToSaveWrapper", names=list(names), why=why))
        if isinstance(module, TokenRows):
            try:
                module.token_adapter.replacements(names)
            except RouteError as refused:
                text = ALONE.format(wrapper="TrainableTokensWrapper", names=list(names), why=refused)
                raise ConfigError(text) from refused
