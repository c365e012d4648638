"""Which adapters are part of a model's weights already, so that none is applied a second time.

The note stands in the model's config, which travels with the weights through every save and load, whatever program
does them. It knows nothing of how a merge is done.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from lorakit.errors import OVERRIDE, BaseMismatchError

CONFIG_KEY = "lorakit_merged"
"""Field of the model's config: a list of {"sha256", "name"}, one per adapter that was merged for good."""


def applied(model: nn.Module) -> dict[str, str]:
    """SHA-256 of the weights -> name of every adapter that was merged into a model for good.

    Args:
        model: Any model; one without a config, or without a sound note in it, has none.
    """
    noted: Any = getattr(getattr(model, "config", None), CONFIG_KEY, None)
    entries = noted if isinstance(noted, (list, tuple)) else []
    return {str(e["sha256"]): str(e.get("name", "")) for e in entries if isinstance(e, Mapping) and "sha256" in e}


def note_applied(model: nn.Module, adapters: Mapping[str, str]) -> None:
    """Write into a model's config that adapters were merged for good.

    Args:
        model: A merged model with a config.
        adapters: SHA-256 of an adapter's weights -> its name; they join those that are noted already.
    """
    known = {**applied(model), **adapters}
    setattr(model.config, CONFIG_KEY, [{"sha256": sha, "name": name} for sha, name in known.items()])


def check_not_applied(model: nn.Module, folder: Path, weights_sha256: str, allow: Collection[str]) -> None:
    """Refuse an adapter that is part of the weights already, unless "base_mismatch" is allowed.

    Args:
        model: The base.
        folder: The adapter's folder, for the message.
        weights_sha256: Of its weights.
        allow: As in `load_adapter`.

    Raises:
        BaseMismatchError: It was merged into this model.
    """
    known = applied(model)
    if weights_sha256 in known and "base_mismatch" not in allow:
        was = f" (as {known[weights_sha256]})" if known[weights_sha256] else ""
        raise BaseMismatchError(
            f"{folder}: this adapter was merged into the model already{was}, and would act twice.",
            advice=f"Use the model as it is, load the adapter's own base, or {OVERRIDE}.",
            where=folder,
            override="base_mismatch",
        )
