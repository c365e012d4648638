"""`--init-lora-weights`: what the first training rows show, for inits that look at data.

The inits are `lorakit.core`'s; here the data is brought to them, a row at a time, in the order in which the run will
see it. Nothing random is drawn and the run's own loader is not moved; a run that is resumed has its beginning in its
checkpoint.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.inits import init_named
from lorakit.data import Batch, Loader
from lorakit.errors import UsageError
from lorakit.train.allotting import first_rows, loss_of_a_row
from lorakit.train.progress import Progress
from lorakit.train.request import Request


def begun(
    model: Any, config: LoraConfig, request: Request, loader: Loader, progress: Progress
) -> tuple[LoraConfig, core.Statistics | None]:
    """What to attach: the config, and what its init wants to know of the data.

    Args:
        model: The base, on the run's device.
        config: The adapter's config.
        request: Names the seed, the device and how the base is stored.
        loader: The run's; its rows are taken in the order of its first epoch.
        progress: Told what is looked at.

    Returns:
        The config, with EVA's ranks where that is the init, and the statistics, or None.

    Raises:
        UsageError: The init would change a base that is stored in fewer bits.
        LorakitError: As `lorakit.core.collect_for`.
    """
    init = init_named(config.init_lora_weights)
    if init.changes_base and request.stored is not None:
        raise UsageError(
            f"init_lora_weights is {init.name!r}, which changes the base, and this base is stored in fewer bits: what "
            "is left would be rounded a second time. Leave quantization out, or use another init."
        )
    if not init.needs:
        return config, None
    rows = first_rows(request, loader)
    progress.busy(f"looking at {len(rows)} rows for {init.name}")
    found = core.collect_for(
        model,
        config,
        rows,
        loss_of_a_row(request.device),
        keep=_trained if init.name == "eva" else None,
        allow=("partial_targets",) if request.settings.allow_partial_targets else (),
    )
    ranks = sorted(set(found.config.rank_pattern.values()) | {found.config.r})
    spread = f", ranks from {ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else ""
    progress.say(f"The adapter begins with {init.name}, at what {len(rows)} rows show{spread}.")
    return found.config, found


def _trained(batch: Batch) -> Tensor:
    """The positions whose label is trained, (rows, length), as EVA's `use_label_mask` has it."""
    return (batch.labels != -100) & batch.attention_mask.bool()
