"""What `make_batches` reads of a run's specification."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from lorakit import hub
from lorakit.train.progress import Progress


def specified(settings: Any, data: Any, task: Any, tokenizer: Any, max_length: int) -> Any:
    """Return a specification with these settings and data, and without a model."""
    return SimpleNamespace(
        settings=settings,
        data=data,
        task=task,
        tokenizer=tokenizer,
        tokenizer_sha256=hub.tokenizer_hash(tokenizer),
        forecast=SimpleNamespace(max_length=max_length),
        progress=Progress(),
    )
