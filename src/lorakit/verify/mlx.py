"""The adapter in mlx-lm, in this process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lorakit import hub
from lorakit.errors import UsageError, require_packages
from lorakit.verify.loaded import encoded, package_versions
from lorakit.verify.prompts import Prompt
from lorakit.verify.runtime import BASE, Runtime, RuntimeRequest


@contextlib.contextmanager
def open_mlx(request: RuntimeRequest) -> Iterator[Runtime]:
    """Export the adapter for mlx-lm, and open it with the base, and the base alone.

    Raises:
        MissingExtra: mlx-lm is not installed.
        UsageError: The base is not a directory.
        AdapterError: The adapter cannot be exported.
    """
    require_packages("Verifying in mlx-lm", "runtimes", ["mlx", "mlx_lm"])
    source = request.spec.source
    base = hub.downloaded(source.path_or_id) if source.kind == "hub" else Path(source.path_or_id)
    if base is None or not base.is_dir():
        text = f"{source.given}: mlx-lm needs the base as a model directory; pass one as --model."
        raise UsageError(text, where=source.given, field="model")
    yield MlxRuntime(base, request.export("mlx"), request)


class MlxRuntime:
    """A model in mlx-lm, and its base."""

    parallel = 1

    def __init__(self, base: Path, adapter: Path, request: RuntimeRequest) -> None:
        self.title, self.dtype = "mlx-lm", request.dtype
        self.versions = package_versions("mlx", "mlx-lm")
        self.others: Sequence[str] = [BASE]
        self._request, self._ends = request, request.end_ids
        self._models = {None: _load(base, adapter, request.dtype), BASE: _load(base, None, request.dtype)}

    def encode(self, prompt: Prompt) -> list[int] | None:
        """Return the token ids of a prompt; mlx-lm uses transformers' tokenizer of the base."""
        return encoded(prompt, hub.load_tokenizer(self._request.spec.source))

    def log_probabilities(self, ids: Sequence[int], other: str | None = None) -> list[float]:
        """Return the log-probability of each token but the first, given those before it."""
        import mlx.core as mx

        scores = self._scores(ids, other)[:-1]
        values: Any = mx.take_along_axis(scores, mx.array([*ids[1:]])[:, None], axis=1)[:, 0].tolist()
        return list(values)

    def greedy(self, ids: Sequence[int], count: int) -> list[int] | None:
        """Return up to `count` most likely tokens, as mlx-lm generates them."""
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        new: list[int] = []
        for token, _ in generate_step(mx.array([*ids]), self._models[None], max_tokens=count):
            new.append(int(token))
            if new[-1] in self._ends:
                break
        return new

    def _scores(self, ids: Sequence[int], other: str | None) -> Any:
        """Return the log-probabilities of the next token after each of `ids`, an array of mlx (tokens, vocabulary)."""
        import mlx.core as mx

        logits = self._models[other](mx.array([[*ids]]))[0].astype(mx.float32)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def _load(base: Path, adapter: Path | None, dtype: str) -> Any:
    import mlx.core as mx
    import mlx_lm

    model = mlx_lm.load(str(base), adapter_path=None if adapter is None else str(adapter))[0]
    model.set_dtype(getattr(mx, dtype))
    return model
