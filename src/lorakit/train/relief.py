"""Whether memory ran out, and what is left to do for the run. Knows settings by name, nothing of models."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from lorakit.data import Batch
from lorakit.errors import RunError
from lorakit.plan.job import RECOMPUTED


@contextlib.contextmanager
def memory(batch: Batch, where: str, helps: Callable[[int], str]) -> Iterator[None]:
    """A block in which memory that runs out becomes an error that names the batch and a way out.

    Args:
        batch: What is computed in the block.
        where: "in" or the like, before "a batch of …".
        helps: Gives a sentence for so many rows.

    Raises:
        RunError: Memory ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as cause:
        if not _is_out_of_memory(cause):
            raise
        rows, length = batch.input_ids.shape
        raise RunError(f"memory ran out {where} a batch of {rows} rows of {length} tokens. {helps(rows)}") from cause


def relief(rows: int, recompute: str, *, accelerated: bool, budgeted: bool) -> str:
    """What makes a step need less, in the order in which to try it, without what is done already.

    Args:
        rows: Rows of the batch that memory ran out in.
        recompute: What the backward computes again, a word of `lorakit.plan.job.RECOMPUTED`.
        accelerated: Whether the model runs by the functions of `lorakit.speed.accelerate`.
        budgeted: Whether `recompute` was chosen for a memory budget, beside which it cannot be given.

    Returns:
        A sentence.
    """
    more = [way for way in RECOMPUTED[RECOMPUTED.index(recompute) + 1 :] if accelerated or way != "feed-forward"]
    helps = [] if accelerated else ["accelerated forwards (leave --no-accelerate out)"]
    if budgeted:
        helps += ["a smaller --memory-budget"] if more else []
    else:
        helps += [f"--recompute {way}" + (" (or --gradient-checkpointing)" if way == "layers" else "") for way in more]
        helps += ["--memory-budget, which chooses between these two"] if len(more) > 1 else []
    if rows > 1:
        helps.append(
            "half the --per-device-train-batch-size and twice the --gradient-accumulation-steps: the same result"
        )
    return f"What helps, to try in this order: {'; '.join([*helps, 'a smaller --max-length'])}."


def relief_of_evaluation(rows: int) -> str:
    """The same of an evaluation, which computes nothing for a backward.

    Args:
        rows: Rows of the batch that memory ran out in.
    """
    fewer = "fewer rows (--per-device-train-batch-size of train, --batch-size of eval) or " if rows > 1 else ""
    return f"What helps: {fewer}a smaller --max-length."


def _is_out_of_memory(cause: BaseException) -> bool:
    if isinstance(cause, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(cause)
    return "can't allocate memory" in text or "not enough memory" in text or "out of memory" in text
