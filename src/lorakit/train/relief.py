"""What is left to do for a run whose memory ran out. Knows settings by name, nothing of models."""

from __future__ import annotations

from lorakit.plan.job import RECOMPUTED


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
