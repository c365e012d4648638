"""Which way the products and the attention of a run go, where there are several: chosen before its first step.

What was chosen acts from the first step to the last and stands in every checkpoint. A run that goes on where nothing
else has changed takes the checkpoint's, so that its bits are the same though another measurement might say otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lorakit.data import Loader, lengths
from lorakit.ops import choices
from lorakit.speed import choose
from lorakit.train.progress import Progress
from lorakit.train.request import Request
from lorakit.train.state import differences, environment
from lorakit.train.step import Trainee


def choices_of_run(
    request: Request, trainee: Trainee, loader: Loader, before: Mapping[str, Any] | None, dtype: str, progress: Progress
) -> dict[str, int]:
    """What acts in a run, as `lorakit.ops.choices.acting` takes it; says what it cost where something was measured.

    Args:
        request: The request; without its `tuning` nothing is chosen.
        trainee: The model; where it is not accelerated nothing looks at choices.
        loader: Its batches.
        before: The environment of the checkpoint that is taken up, or None.
        dtype: Precision of the base.
        progress: Told the cost.
    """
    if not request.settings.tuning or trainee.fast is None or request.device.type != "cpu":
        return {}
    here = environment(request.device, dtype, request.quantization)
    if before is not None and not differences({**before, "kernels": here["kernels"]}, here):
        return choices.from_words(before.get("kernels"))
    longest = max(lengths(loader.sequences))
    found = choose(trainee.model, most_tokens(loader, trainee.fast.packs), longest)
    if str(found):
        progress.say(str(found))
    return dict(found.choices)


def most_tokens(loader: Loader, packs: bool) -> int:
    """Tokens of the largest batch that a loader can give.

    Args:
        loader: The batches.
        packs: Rows lie end to end, without padding.
    """
    longest = sorted(lengths(loader.sequences), reverse=True)[: loader.batch_rows]
    return sum(longest) if packs else longest[0] * len(longest)
