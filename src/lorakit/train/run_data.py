"""Read and check the inputs of a run before any weights are loaded: device, data, new tokens, and model shape.

A failed check raises an error that names the problem.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from lorakit import data, hub, plan
from lorakit.config import LoraConfig
from lorakit.core.model.fingerprint import vocabulary_of
from lorakit.core.model.vocabulary import check_growth, with_trained_rows
from lorakit.errors import ConfigError, DataError, NotYetSupported, UsageError
from lorakit.tables import format_count
from lorakit.targets import unfitting_keys
from lorakit.train.defaults import DEFAULTS
from lorakit.train.progress import Progress
from lorakit.train.settings import TrainSettings


class SavedTokenizer(data.Tokenizer, Protocol):
    """The part of the transformers tokenizer interface that training runs and commands use."""

    def get_vocab(self) -> dict[str, int]:
        """Return a dict from token to id."""

    def save_pretrained(self, save_directory: Path) -> tuple[str, ...]:
        """Write the tokenizer's files to a directory and return their names."""


@dataclass(frozen=True)
class Forecast:
    """Properties of a run that are known from the settings and the model config, before the data is tokenized.

    Attributes:
        shape: Shape of the base model.
        config: The adapter's config.
        max_length: Maximum sequence length: the setting, or the model's limit if the setting is the default and exceeds
            the limit.
        notes: Messages to print.
        new_tokens: Tokens added to the vocabulary, or None.
    """

    shape: plan.ModelShape
    config: LoraConfig
    max_length: int
    notes: tuple[str, ...]
    new_tokens: NewTokens | None = None


def forecast(settings: TrainSettings, source: hub.ModelSource, tokenizer: data.Tokenizer) -> Forecast:
    """Read the model's shape and check the targets and the maximum length against it; no weights are loaded.

    Args:
        settings: Settings for the adapter and the maximum length.
        source: The model.
        tokenizer: The model's tokenizer; new tokens are added to it in place.

    Returns:
        The properties of the run that are known before the data is tokenized.

    Raises:
        ModelError: The model's config cannot be read, or the model or the tokenizer does not support new tokens.
        TargetError: A target matches nothing.
        ConfigError: A key in `learning_rate_pattern` matches no adapted module, or a new token already exists.
        UsageError: `max_length` is not the default and exceeds the model's limit.
    """
    shape = hub.shape_of(source)
    config, new, notes = settings.lora_config(), None, []
    length = max_length_for(shape, settings.max_length)
    if length != settings.max_length:
        notes.append(f"maximum sequence length: {length:,} tokens (the model's limit)")
    if settings.new_tokens:
        base = hub.skeleton(source)
        new = add_new_tokens(tokenizer, settings.new_tokens, base)
        config = with_trained_rows(config, base, new.rows)
        words = ", ".join(f"{token} ({number})" for token, number in new.added.ids.items())
        notes.append(f"New tokens: {words}; in the embedding and the head, only the rows of these tokens are trained.")
    counted = plan.count(shape, config, allow_partial=settings.allow_partial_targets)
    wrong = unfitting_keys(
        "learning_rate_pattern", settings.learning_rate_pattern, [*(site.path for site in counted.sites), *counted.rows]
    )
    if wrong:
        raise ConfigError(" ".join(map(str, wrong)), what=wrong[0].entry, field="learning_rate_pattern")
    return Forecast(shape, config, length, tuple(notes), new)


def max_length_for(shape: plan.ModelShape, wanted: int) -> int:
    """Return the maximum sequence length.

    Args:
        shape: The model's shape.
        wanted: The `max_length` setting; a value above the model's limit is reduced only if it is the default.

    Returns:
        `wanted`, or the model's limit if `wanted` is the default and exceeds the limit.

    Raises:
        UsageError: `wanted` is not the default and exceeds the model's limit.
    """
    if not 0 < shape.positions < wanted:
        return wanted
    if wanted != DEFAULTS["max_length"].value:
        raise UsageError(
            f"max_length is {wanted:,}, but {shape.name} supports at most {shape.positions:,} tokens; "
            f"pass --max-length {shape.positions} or less.",
            what=wanted,
            field="max_length",
            allowed=(str(shape.positions),),
        )
    return shape.positions


@dataclass(frozen=True)
class RunBatches:
    """The data of a run, split into batches.

    Attributes:
        loader: Endless iterator over the training batches, in a seeded order.
        held_out_sequences: The evaluation data, or None if there is none.
        train_report: Row and token counts for the training data.
        held_out_report: Row and token counts for the evaluation data, or None.
    """

    loader: data.Loader
    held_out_sequences: data.Sequences | None
    train_report: data.DataReport
    held_out_report: data.DataReport | None

    @property
    def held_out(self) -> Callable[[], Iterable[data.Batch]] | None:
        """Function that returns the evaluation batches, or None if there is no evaluation data."""
        if self.held_out_sequences is None:
            return None
        return partial(data.by_length, self.held_out_sequences, self.loader.batch_rows, self.loader.pad_id)

    @property
    def parts(self) -> list[Sequence[data.Sequence]]:
        """The training data and, if there is any, the evaluation data."""
        return (
            [self.loader.sequences]
            if self.held_out_sequences is None
            else [self.loader.sequences, self.held_out_sequences]
        )

    def with_rows(self, batch_rows: int) -> RunBatches:
        """Return the same data, in the same order, in batches of another size, from the beginning.

        Args:
            batch_rows: Number of rows per batch.
        """
        loader = self.loader
        return replace(self, loader=data.Loader(loader.sequences, batch_rows, loader.seed, pad_id=loader.pad_id))


def check_single_process() -> None:
    """Check that this process is not one of several that were started together, for example by torchrun.

    Raises:
        NotYetSupported: WORLD_SIZE is above 1.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size.strip() not in ("", "0", "1"):
        raise NotYetSupported(
            f"WORLD_SIZE is {size}: training in several processes is not supported yet; start a single process.",
            what=size,
            field="WORLD_SIZE",
        )


def pick_device(word: str) -> torch.device:
    """Return the device selected by the `device` setting.

    Args:
        word: "auto", "cpu", "cuda", "cuda:N" or "mps".

    Returns:
        The device; for "auto", an accelerator if one is available.

    Raises:
        UsageError: The device is not available on this machine.
    """
    if word == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device, found = torch.device(word), ""
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found = format_count(count, "CUDA device") if device.index >= count else ""
    elif device.type == "mps" and not torch.backends.mps.is_available():
        found = "no MPS device"
    if found:
        text = f"device is {word!r}, but torch {torch.__version__} finds {found}."
        raise UsageError(text, what=word, field="device")
    return device


def read_data(settings: TrainSettings) -> data.Split:
    """Read the training and evaluation files; if no evaluation files are given, hold out some training data.

    Args:
        settings: The run's settings; only those about data and the seed are used.

    Returns:
        The training and evaluation records.

    Raises:
        DataError: A file cannot be read, or a record is invalid; the message names the file and the line.
    """
    request = settings.row_request()
    return data.read_split(settings.data, settings.eval_data, settings.eval_fraction, settings.seed, request)


def make_batches(
    settings: TrainSettings, records: data.Split, tokenizer: data.Tokenizer, max_length: int, progress: Progress
) -> RunBatches:
    """Tokenize the records and create the loaders.

    Args:
        settings: The run's settings; only the batch size, the seed and `overlong` are used.
        records: Training and evaluation records, from `read_data`.
        tokenizer: The model's tokenizer.
        max_length: Maximum sequence length in tokens.
        progress: Receives reports on the progress of tokenization.

    Returns:
        The training loader, a function that returns the evaluation batches (or None without evaluation data), and
        the row and token counts of the training and evaluation data.

    Raises:
        DataError: The training data or the evaluation data has no tokens that contribute to the loss, or no end marker
            in the training data does.
    """
    rows, pad = settings.per_device_train_batch_size, data.padding_id(tokenizer)
    listener, overlong = _listener(progress, "training data", records.train), settings.overlong
    train = data.encode(records.train, tokenizer, max_length, listener, overlong=overlong)
    if not settings.allow_missing_end:
        train.report.check_end()
    loader = data.Loader(train.sequences, rows, settings.seed, pad_id=pad)
    if not records.held_out:
        return RunBatches(loader, None, train.report, None)
    try:
        listener = _listener(progress, "evaluation data", records.held_out)
        held_out = data.encode(records.held_out, tokenizer, max_length, listener, overlong=overlong)
    except DataError as cause:
        raise DataError(f"evaluation data: {cause}", **cause.fields) from cause
    return RunBatches(loader, held_out.sequences, train.report, held_out.report)


def _listener(progress: Progress, what: str, records: data.AnyRecords) -> Callable[[int], None] | None:
    if not isinstance(records, data.StoredRecords):
        return None
    total = records.total_bytes
    return lambda done: progress.reading(what, done, total)


@dataclass(frozen=True)
class NewTokens:
    """The tokens that a run adds to the tokenizer and the base.

    Attributes:
        added: Ids of the new tokens, and how the tokenizer encoded their text before they were added.
        vocabulary: Number of rows that the base's embedding needs.
        rows: Embedding rows to train: those of the new tokens, and those of existing tokens that have no row in the
            base.
    """

    added: hub.AddedTokens
    vocabulary: int
    rows: tuple[int, ...]

    def unseen(self, loader: data.Loader) -> tuple[str, ...]:
        """Return a tuple with a warning if any new tokens do not occur in the training data, or else an empty tuple.

        Args:
            loader: The loader of the training data.
        """
        seen = Counter(number for sequence in loader.sequences for number in sequence.input_ids)
        never = ", ".join(token for token, number in self.added.ids.items() if not seen[number])
        return (
            (f"These new tokens are not in the training data, so their rows stay untrained: {never}.",) if never else ()
        )


def add_new_tokens(tokenizer: data.Tokenizer, tokens: list[str], base: nn.Module) -> NewTokens:
    """Add tokens to a run's tokenizer.

    Args:
        tokenizer: The base's tokenizer; changed in place.
        tokens: The tokens to add.
        base: The base model; its weights are not read.

    Returns:
        The added tokens, and the embedding rows that the base needs for them.

    Raises:
        ConfigError: A token is already in the vocabulary.
        ModelError: The tokenizer or the base does not support new tokens.
    """
    added = hub.add_tokens(tokenizer, tokens)
    present = vocabulary_of(base)
    check_growth(base, added.vocabulary)
    rows = sorted({*added.ids.values(), *range(present, added.vocabulary)})
    return NewTokens(added, max(present, added.vocabulary), tuple(rows))
