"""Open a session by names: of the base, of directories with adapters, of options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lorakit.choices import TASK_NAMES
from lorakit.data.tokens import beginning, token_ids
from lorakit.errors import UsageError, did_you_mean
from lorakit.session.coding import to_predict
from lorakit.session.session import Session
from lorakit.session.spec import SessionOptions, read_adapter, session_spec


def open_session(
    model: str | None = None,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    task: str | None = None,
    calibration: Sequence[str] = (),
    **options: Any,
) -> Session:
    """Load a base and its adapters.

    Args:
        model: Model directory, GGUF file, Hub id, or "smollm2"; None for the base that the adapters name.
        adapters: Name -> directory of an adapter or a run, or Hub id ("owner/name[@revision]").
        task: Name of the task of a model without adapters; None selects that of the model's own head.
        calibration: Texts by which the input scales of `base_matmul="int8"` are chosen, if no run directory has them.
        options: Fields of `lorakit.session.SessionOptions`, such as `dtype`, `device` and `quantization`.

    Raises:
        UsageError: The adapters name different bases, or none, or have different tasks or classes; or an option or the
            task is unknown.
        LorakitError: The base or an adapter cannot be loaded; the error class and message say why.
    """
    known = [one.name for one in fields(SessionOptions)]
    for name in options:
        if name not in known:
            text = f"open_session has no option {name!r}; the options are {', '.join(known)}."
            raise UsageError(text + did_you_mean(name, known), what=name, field=name, allowed=tuple(known))
    if adapters is not None and not isinstance(adapters, Mapping):
        text = 'adapters must be a mapping, such as {"notes": "runs/notes"}.'  # type: ignore[unreachable]
        raise UsageError(text, what=str(adapters), field="adapters")
    if task is not None and task not in TASK_NAMES:
        raise UsageError.of("task", task, allowed=TASK_NAMES)
    files = {name: read_adapter(given) for name, given in (adapters or {}).items()}
    spec = session_spec(model, files, SessionOptions(**options), task)
    ids = [beginning(spec.tokenizer) + token_ids(spec.tokenizer, text) for text in calibration]
    return Session.load(spec if spec.task.task.generates else to_predict(spec), ids)
