"""Loss and perplexity of a model on batches, over all trained tokens alike.

Knows nothing about training; the command `lorakit eval` uses it too.

Base and adapters on the same data, side by side: what `lorakit eval` shows.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit import core, hub
from lorakit.data import Batch, encode, padding_id, read_records
from lorakit.errors import AdapterFileError, ConfigError, DataError, NonFiniteError, RunError
from lorakit.plan.quantized import Quantization
from lorakit.speed import Acceleration, accelerate
from lorakit.train.defaults import DEFAULTS
from lorakit.train.run_data import evaluation_batches, pick_device, row_length
from lorakit.train.step import loss_sum, memory, relief_of_evaluation


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        loss: Mean cross entropy per trained token, in nats.
        tokens: Trained tokens that it is the mean of.
    """

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); held below infinity, for which JSON has no word.   [docs/math.md (15)]"""
        return math.exp(min(self.loss, 700.0))


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    device: str | torch.device,
    stop: Callable[[], bool] = lambda: False,
    fast: Acceleration | None = None,
) -> Evaluation | None:
    """Mean loss over the trained tokens of all batches, without gradients and without dropout.

    Args:
        model: A causal language model; its training mode is put back afterwards.
        batches: Batches on the CPU.
        device: Where the model is.
        stop: Asked between batches; True abandons the evaluation.
        fast: What `lorakit.speed.accelerate` made of the model, or None.

    Returns:
        The evaluation, or None when it was abandoned.

    Raises:
        DataError: No batch holds a trained token.
        NonFiniteError: The loss is NaN or infinite.
        RunError: Memory ran out; the message names the batch and what helps.
    """
    total, tokens = 0.0, 0
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            if stop():
                return None
            with memory(batch, "while evaluating", relief_of_evaluation):
                total += loss_sum(model, batch, device, fast).item()
            tokens += batch.trained_tokens
    if tokens == 0:
        raise DataError("The evaluation data holds no trained token; give --eval-data with more text.")
    if not math.isfinite(total):
        raise NonFiniteError(
            f"The evaluation loss is {total}; the adapter or the base holds values that are not finite."
        )
    return Evaluation(total / tokens, tokens)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each module back in its own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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
        batch_rows: Rows of a batch of the longest; of shorter ones it takes more.
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


def compare(
    settings: EvalSettings,
    say: Callable[[str], None] = lambda _: None,
    detail: Callable[[str], None] = lambda _: None,
) -> list[Compared]:
    """Measure the loss of a base, and of each adapter on it, over the same tokens.

    An adapter with a tokenizer of its own, such as one with new tokens, reads the same data with that.

    Args:
        settings: What to evaluate on what.
        say: Called with what was cut or left out of the data, and which adapter uses a tokenizer of its own.
        detail: Called with the counts of the data, and the precision and its reason.

    Returns:
        The base first, then the adapters in the order given.

    Raises:
        ConfigError: The batch size is below 1, or the length is.
        AdapterFileError: There is no such adapter directory, or it cannot be used on this base.
        RunError: The evaluation was abandoned.
        LorakitError: Data or model cannot be used; class and message say what.
    """
    where = _checked(settings)
    records = read_records(settings.data)
    source = hub.resolve(settings.model, say)
    hub.require(source, tokenizer=True)
    bases = [core.inspect_adapter(folder).base for folder in settings.adapters]  # refuses what cannot be read
    length = row_length(hub.shape_of(source), settings.max_length)
    tokenizer = hub.load_tokenizer(source)
    encoded = encode(records, tokenizer, length)
    total, *losses = encoded.report.lines()
    detail(f"data: {total}")
    for line in losses:
        say(line)
    batches = evaluation_batches(encoded, settings.batch_rows, padding_id(tokenizer))
    given = []
    for folder in settings.adapters:
        own = own_tokenizer(folder, tokenizer)
        if own is not None:
            say(f"{folder}: has a tokenizer of its own, so its loss is over its own tokens.")
            encoded = encode(records, own, length)
        given.append(batches if own is None else evaluation_batches(encoded, settings.batch_rows, padding_id(own)))
    choice = hub.choose_dtype(settings.dtype, hub.calibrate(where) if settings.dtype == "auto" else None)
    detail(f"precision: {choice.reason}")
    loaded = hub.load_model(source, choice.dtype, where, quantization=settings.quantization)
    first = _measured(loaded, "base", batches, where)
    found = {}
    # the base grows for new tokens and stays so, and more logits are another loss: fewer tokens come first
    for number in sorted(range(len(bases)), key=lambda n: 0 if (base := bases[n]) is None else base.vocabulary):
        folder, name = settings.adapters[number], f"adapter{number}"
        core.load_adapter(loaded, folder, name, allow=settings.allow)
        with core.use(loaded, name):
            found[number] = _measured(loaded, folder, given[number], where)
        core.detach(loaded, name)
    return [first, *(found[number] for number in range(len(bases)))]


def _checked(settings: EvalSettings) -> torch.device:
    """The device, after what can be refused at once."""
    if settings.batch_rows < 1:
        raise ConfigError(f"batch_size is {settings.batch_rows}; it must be at least 1.")
    if settings.quantization is not None:
        hub.require_quantizer(settings.quantization)
    where = pick_device(settings.device)
    for folder in settings.adapters:
        if not Path(folder).is_dir():
            raise AdapterFileError(f"{folder}: there is no such adapter directory.", where=folder)
    return where


def _measured(model: Any, name: str, batches: Callable[[], Iterable[Batch]], where: torch.device) -> Compared:
    fast = accelerate(model)
    try:
        found = evaluate(model, batches(), where, fast=fast)
    finally:
        fast.undo()  # the next adapter may grow the base
    if found is None:
        raise RunError("The evaluation was abandoned.")
    return Compared(name, found)


def own_tokenizer(folder: str, tokenizer: Any) -> Any | None:
    """The tokenizer that lies with an adapter, where it is another than the base's.

    Args:
        folder: The adapter's directory.
        tokenizer: The base's.

    Raises:
        ModelError: It cannot be read.
    """
    if not (Path(folder) / "tokenizer_config.json").is_file():
        return None
    found = hub.load_tokenizer(hub.ModelSource("directory", folder, folder, None, folder))
    same = hub.tokenizer_hash(found) == hub.tokenizer_hash(tokenizer)
    return None if same and hub.chat_template_hash(found) == hub.chat_template_hash(tokenizer) else found
