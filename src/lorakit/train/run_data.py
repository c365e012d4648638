"""What is checked and read before anything is loaded or written: place, machine, data.

Each check takes far less than a second and names what is wrong. Knows nothing about models beyond a tokenizer.

`--new-tokens`: a tokenizer that knows them, and what their rows ask of base and adapter.

The tokens are added by `lorakit.hub`, the rows grown and trained by `lorakit.core`; here the two are brought together.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lorakit import hub, plan
from lorakit.config import LoraConfig
from lorakit.core.model.fingerprint import vocabulary_of
from lorakit.core.model.vocabulary import begin_rows, check_growth, grow_vocabulary, with_trained_rows
from lorakit.data import (
    AnyRecords,
    Batch,
    DataReport,
    Encoded,
    Loader,
    StoredRecords,
    Tokenizer,
    by_length,
    encode,
    padding_id,
    read_records,
    split,
)
from lorakit.errors import DataError, NotYetSupported, UsageError
from lorakit.train.defaults import DEFAULTS
from lorakit.train.progress import Progress, Silence
from lorakit.train.settings import TrainSettings


def row_length(shape: plan.ModelShape, wanted: int) -> int:
    """Return the maximum sequence length.

    Args:
        shape: The model.
        wanted: The setting; its default is reduced to the model's limit.

    Returns:
        `wanted`, or the model's limit.

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
class RunData:
    """Records of a run, before a tokenizer has seen them.

    Attributes:
        train: What is trained on.
        held_out: What is evaluated on; may be empty.
        note: A sentence on what is held out, or why nothing is.
    """

    train: AnyRecords
    held_out: AnyRecords
    note: str


@dataclass(frozen=True)
class RunBatches:
    """Data of a run as batches.

    Attributes:
        loader: Training batches, endless, in a seeded order.
        held_out: Gives the evaluation batches anew, or None where nothing is held out.
        train_report: What became of the training records.
        held_out_report: What became of the others, or None.
    """

    loader: Loader
    held_out: Callable[[], Iterable[Batch]] | None
    train_report: DataReport
    held_out_report: DataReport | None


def refuse_many_processes() -> None:
    """Refuse to run as one of several processes that know nothing of each other.

    Raises:
        NotYetSupported: WORLD_SIZE is above 1.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if size.strip() not in ("", "0", "1"):
        raise NotYetSupported(
            f"WORLD_SIZE is {size}: training on several processes is not built yet; start one, without torchrun."
        )


def pick_device(word: str) -> torch.device:
    """The device that a word means on this machine.

    Args:
        word: "auto", "cpu", "cuda", "cuda:N" or "mps".

    Returns:
        The device; for "auto" an accelerator where there is one.

    Raises:
        UsageError: There is no such device here.
    """
    if word == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(word)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UsageError(
                f"device is {word!r}, but torch {torch.__version__} finds {count} CUDA devices here.",
                what=word,
                field="device",
            )
        return torch.device("cuda", device.index or 0)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError(
            f"device is {word!r}, but torch {torch.__version__} finds no MPS device here.", what=word, field="device"
        )
    return device


def read_data(settings: TrainSettings) -> RunData:
    """Read training and evaluation files, and hold out a share where no evaluation files are given.

    Args:
        settings: `data`, `eval_data`, `eval_fraction` and `seed` are read.

    Returns:
        The records.

    Raises:
        DataError: A file cannot be read, or a row is bad; the message has file and line.
    """
    records = read_records(settings.data)
    if settings.eval_data is not None:
        held_out = read_records(settings.eval_data)
        return RunData(records, held_out, f"Evaluation on {', '.join(settings.eval_data)}.")
    parted = split(records, settings.eval_fraction, settings.seed)
    return RunData(parted.train, parted.held_out, parted.note)


def make_batches(
    settings: TrainSettings, data: RunData, tokenizer: Tokenizer, max_length: int, progress: Progress | None = None
) -> RunBatches:
    """Encode the records and set up the loaders.

    Args:
        settings: Batch size and seed are read.
        data: The records.
        tokenizer: The model's.
        max_length: Longest row, in tokens.
        progress: Shows how far tokenizing is; None is silent.

    Returns:
        Loader, evaluation batches and reports.

    Raises:
        DataError: No token is left to train or to evaluate on.
    """
    rows, pad = settings.per_device_train_batch_size, padding_id(tokenizer)
    progress = progress or Silence()
    train = encode(data.train, tokenizer, max_length, _watch(progress, "training data", data.train))
    loader = Loader(train.sequences, rows, settings.seed, pad_id=pad)
    if not data.held_out:
        return RunBatches(loader, None, train.report, None)
    try:
        watch = _watch(progress, "evaluation data", data.held_out)
        held_out = encode(data.held_out, tokenizer, max_length, watch)
    except DataError as cause:
        raise DataError(f"In the evaluation data: {cause}", **cause.fields) from cause
    return RunBatches(loader, evaluation_batches(held_out, rows, pad), train.report, held_out.report)


def _watch(progress: Progress, what: str, records: AnyRecords) -> Callable[[int], None] | None:
    if not isinstance(records, StoredRecords):
        return None
    return partial(_tell, progress, what, records.total_bytes)


def _tell(progress: Progress, what: str, total: int, done: int) -> None:
    progress.reading(what, done, total)


def evaluation_batches(encoded: Encoded, rows: int, pad: int) -> Callable[[], Iterable[Batch]]:
    """Batches for evaluation: each sequence once, `by_length`.

    Args:
        encoded: The sequences.
        rows: Rows of a batch of the longest.
        pad: The id that fills rows up.

    Returns:
        A function that gives the batches anew.
    """
    return lambda: by_length(encoded.sequences, rows, pad)


@dataclass(frozen=True)
class NewTokens:
    """Tokens that a run adds.

    Attributes:
        added: Their ids, and what their texts were until then.
        vocabulary: Rows that the base's embedding must have.
        rows: The rows that are trained: theirs, and any that the base lacked for older tokens.
    """

    added: hub.AddedTokens
    vocabulary: int
    rows: tuple[int, ...]

    def sentence(self) -> str:
        """What is done, for a person."""
        words = ", ".join(f"{token} ({number})" for token, number in self.added.ids.items())
        return f"New tokens: {words}; of the embedding and the head, their rows alone are trained."

    def config(self, config: LoraConfig, model: nn.Module) -> LoraConfig:
        """A config that trains the rows as well.

        Args:
            config: The adapter's.
            model: The base; its numbers are not needed.
        """
        return with_trained_rows(config, model, self.rows)

    def grow(self, model: nn.Module) -> None:
        """Give a base the rows that it lacks.

        Args:
            model: The base.
        """
        grow_vocabulary(model, self.vocabulary)

    def begin(self, model: nn.Module, name: str) -> None:
        """Let the rows of a fresh adapter begin where the tokens' pieces are.

        Args:
            model: The adapted model.
            name: The adapter.
        """
        begin_rows(model, name, self.added.pieces)

    def unseen(self, loader: Loader) -> list[str]:
        """A sentence about tokens that the training data does not have, whose rows stay as they begin.

        Args:
            loader: The run's.
        """
        seen = Counter(number for sequence in loader.sequences for number in sequence.input_ids)
        never = [token for token, number in self.added.ids.items() if not seen[number]]
        if not never:
            return []
        return [f"Not in the training data, so their rows are not trained: {', '.join(never)}."]


def add_new_tokens(tokenizer: Any, tokens: list[str], base: nn.Module) -> NewTokens:
    """Add tokens to a run's tokenizer.

    Args:
        tokenizer: The base's; changed in place.
        tokens: The setting.
        base: The base's modules; their numbers are not needed.

    Returns:
        What that asks of the base.

    Raises:
        ConfigError: A token is in the vocabulary already.
        ModelError: Tokenizer or base cannot take new ones.
    """
    added = hub.add_tokens(tokenizer, tokens)
    present = vocabulary_of(base)
    check_growth(base, added.vocabulary)
    return NewTokens(
        added,
        max(present, added.vocabulary),
        tuple(sorted({*added.ids.values(), *range(present, added.vocabulary)})),
    )
