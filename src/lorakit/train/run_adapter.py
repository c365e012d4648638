"""`--allocate-ranks`: what the first training rows say about the base, made into a config with a rank for each module.

The criteria are `lorakit.core.operations.rank_allocation`'s; here the data is brought to it, a row at a time, so that
less memory is taken than by a training step. Nothing random is drawn and the run's own loader is not moved.

`--init-lora-weights`: what the first training rows show, for inits that look at data.

The inits are `lorakit.core`'s; here the data is brought to them, a row at a time, in the order in which the run will
see it. Nothing random is drawn and the run's own loader is not moved; a run that is resumed has its beginning in its
checkpoint.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import Tensor

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.inits import init_named
from lorakit.core.operations.rank_allocation import allocate
from lorakit.data import Batch, Loader
from lorakit.errors import UsageError
from lorakit.train.progress import Progress
from lorakit.train.run_spec import Request
from lorakit.train.step import loss_sum

ROWS = 32
"""Training rows that are looked at."""


def first_rows(request: Request, loader: Loader) -> list[Batch]:
    """The first training rows, one to a batch, in the order of the run's first epoch.

    Args:
        request: Names the seed.
        loader: The run's; it is not moved.
    """
    own = Loader(loader.sequences, 1, request.settings.seed, epochs=1, pad_id=loader.pad_id)
    return [batch for batch in islice(own, ROWS) if batch.trained_tokens]


def loss_of_a_row(device: torch.device) -> Callable[[Any, Batch], torch.Tensor]:
    """The mean loss over a batch's trained tokens, as a function of model and batch, a scalar.

    Args:
        device: Where the model is.
    """

    def loss(model: Any, batch: Batch) -> torch.Tensor:
        wide = device.type == "cpu" or next(model.parameters()).dtype == torch.float32
        with contextlib.nullcontext() if wide else torch.autocast(device.type, dtype=torch.bfloat16):
            return loss_sum(model, batch, device) / batch.trained_tokens

    return loss


def allotted(model: Any, request: Request, loader: Loader, progress: Progress) -> LoraConfig:
    """The run's config with the ranks that the base and the first rows propose.

    Args:
        model: The base, on the run's device.
        request: Names the criterion, the config, the seed.
        loader: The run's; its rows are taken in the order of its first epoch.
        progress: Told what came of it.

    Returns:
        The config; its adapter trains at most as many numbers as the run's config would.

    Raises:
        LorakitError: As `lorakit.core.operations.rank_allocation.allocate`.
    """
    settings, rows = request.settings, first_rows(request, loader)
    progress.busy(f"looking at {len(rows)} rows for the ranks")
    found = allocate(
        model,
        request.forecast.config,
        rows,
        loss_of_a_row(request.device),
        by=cast(Literal["gradients", "inputs"], settings.allocate_ranks),
        allow=("partial_targets",) if settings.allow_partial_targets else (),
    )
    ranks = sorted(found.ranks.values())
    progress.say(
        f"Ranks by {settings.allocate_ranks} of {len(rows)} rows: {ranks[0]} to {ranks[-1]}, the middle one "
        f"{ranks[len(ranks) // 2]}; {found.parameters:,} numbers in A and B, of {found.budget:,} with r {settings.r}."
    )
    return found.config


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
            "is left would be rounded a second time. Leave quantization out, or use another init.",
            what=init.name,
            field="init_lora_weights",
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
