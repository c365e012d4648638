"""Base and adapters on the same data, side by side: what `lorakit eval` shows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit import core, hub
from lorakit.data import encode, padding_id, read_records
from lorakit.errors import AdapterFileError, ConfigError, RunError
from lorakit.plan.quantised import Quantization
from lorakit.train.defaults import DEFAULTS
from lorakit.train.evaluation import Evaluation, evaluate
from lorakit.train.forecast import row_length
from lorakit.train.preparing import evaluation_batches, pick_device


@dataclass(frozen=True)
class Compared:
    """One row of the comparison.

    Attributes:
        name: "base", or the adapter's directory as it was given.
        evaluation: Loss and tokens.
    """

    name: str
    evaluation: Evaluation

    def as_dict(self) -> dict[str, Any]:
        """The row as plain JSON values."""
        return {
            "name": self.name,
            "loss": self.evaluation.loss,
            "perplexity": self.evaluation.perplexity,
            "tokens": self.evaluation.tokens,
        }


@dataclass(frozen=True)
class EvalSettings:
    """What to evaluate on what.

    Attributes:
        model: What `hub.resolve` takes.
        data: Files to evaluate on.
        adapters: Adapter directories.
        max_length: Longest row in tokens; the default gives way where the model takes fewer.
        batch_rows: Rows of a batch.
        dtype: "auto", "bfloat16" or "float32".
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        allow: Refusals of `core.load_adapter` to lift.
        quantization: How to store the base, or None for as it is.
    """

    model: str
    data: Sequence[str]
    adapters: Sequence[str] = ()
    max_length: int = DEFAULTS["max_length"].value
    batch_rows: int = DEFAULTS["per_device_train_batch_size"].value
    dtype: str = "auto"
    device: str = "auto"
    allow: Collection[str] = ()
    quantization: Quantization | None = None


def compare(settings: EvalSettings, say: Callable[[str], None] = lambda _: None) -> list[Compared]:
    """Loss of a base, and of each adapter on it, over the same tokens.

    Args:
        settings: What to evaluate on what.
        say: Told what the data is and in which precision.

    Returns:
        The base first, then the adapters in the order given.

    Raises:
        ConfigError: The batch size is below 1, or the length is.
        AdapterFileError: There is no such adapter directory, or it cannot be used on this base.
        RunError: The evaluation was abandoned.
        LorakitError: Data or model cannot be used; class and message say what.
    """
    if settings.batch_rows < 1:
        raise ConfigError(f"batch_size is {settings.batch_rows}; it must be at least 1.")
    if settings.quantization is not None:
        hub.require_quantiser(settings.quantization)
    where = pick_device(settings.device)
    for folder in settings.adapters:
        if not Path(folder).is_dir():
            raise AdapterFileError(f"{folder}: there is no such adapter directory.")
    records = read_records(settings.data)
    source = hub.resolve(settings.model, say)
    hub.require(source, tokenizer=True)
    for folder in settings.adapters:
        core.inspect_adapter(folder)  # refuses what cannot be read before the base is loaded
    length = row_length(hub.shape_of(source), settings.max_length)
    tokenizer = hub.load_tokenizer(source)
    encoded = encode(records, tokenizer, length)
    for line in encoded.report.lines():
        say(line)
    choice = hub.choose_dtype(settings.dtype, hub.calibrate(where) if settings.dtype == "auto" else None)
    say(choice.reason)
    loaded = hub.load_model(source, choice.dtype, where, quantization=settings.quantization)
    batches = evaluation_batches(encoded, settings.batch_rows, padding_id(tokenizer))

    def measured(name: str) -> Compared:
        found = evaluate(loaded, batches(), where)
        if found is None:
            raise RunError("The evaluation was abandoned.")
        return Compared(name, found)

    rows = [measured("base")]
    for number, folder in enumerate(settings.adapters):
        name = f"adapter{number}"
        core.load_adapter(loaded, folder, name, allow=settings.allow)
        with core.use(loaded, name):
            rows.append(measured(folder))
        core.detach(loaded, name)
    return rows
