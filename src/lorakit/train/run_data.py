"""Read and check the inputs of a run before any weights are loaded: device, data, new tokens, and model shape.

A failed check raises an error that names the problem.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from lorakit import data, hub, plan
from lorakit.config import LoraConfig
from lorakit.core.model.fingerprint import vocabulary_of
from lorakit.core.model.vocabulary import check_growth, with_trained_rows
from lorakit.data.sources import weights_of
from lorakit.errors import ConfigError, DataError, DiskError, NotYetSupported, UsageError
from lorakit.machine import cache_directory
from lorakit.tables import format_count
from lorakit.targets import unfitting_keys
from lorakit.tasks import EncodedData, EncodeOptions, Report, TaskOnData, Texts, task_for
from lorakit.train import run_folder
from lorakit.train.defaults import DEFAULTS
from lorakit.train.progress import Progress
from lorakit.train.settings import TrainSettings

STREAMED_BYTES = 1 << 30
"""Size of the training data above which `--streaming auto` reads it while training."""


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


def chosen_task(
    settings: TrainSettings, records: data.Split, source: hub.ModelSource, adapter: TaskOnData | None = None
) -> TaskOnData:
    """Choose the task of a run, and check that the settings apply to it.

    Args:
        settings: The run's settings.
        records: Training and evaluation records.
        source: The model.
        adapter: The task of the adapter that the run starts from, or None.

    Returns:
        The task, and what it predicts.

    Raises:
        UsageError: No task fits the data and the model, or a setting does not apply to the task.
        DataError: The labels cannot be used.
    """
    name: str | None = settings.task
    if adapter is not None:
        if name not in (None, adapter.task.name):
            text = f"task is {name}, but the adapter was trained for {adapter.task.name}; omit it."
            raise UsageError(text, what=name, field="task")
        name = adapter.task.name
    found = task_for(name, records, source, settings.label_type, settings.eval_data is not None)
    if adapter is not None and adapter.target.kind != "none":
        found = adapter  # its head has these classes; encoding rejects others
    if isinstance(records, data.StreamSplit) and not found.task.generates:
        raise UsageError(
            f"The task {found.task.name} needs all labels before the first step, so its data cannot be streamed; pass "
            "--streaming off.",
            what=settings.streaming,
            field="streaming",
        )
    unused = [] if found.task.generates else ["chat_template", "new_tokens"]
    unused += [] if found.task.loader == "classification" else ["label_type"]
    for setting in unused:
        value = getattr(settings, setting)
        if value != DEFAULTS[setting].value:
            text = f"{setting} does not apply to the task {found.task.name}; omit it."
            raise UsageError(text, what=value, field=setting)
    if found.task.needs_batch and settings.fit is not None:
        raise UsageError(
            f"fit would change the batches, which the task {found.task.name} compares row by row; omit it.",
            what=settings.fit,
            field="fit",
        )
    if found.task.needs_batch and settings.per_device_train_batch_size < MINIMUM_ROWS:
        raise UsageError(
            f"per_device_train_batch_size is {settings.per_device_train_batch_size}, but the task {found.task.name} "
            f"compares the rows of a batch; pass at least {MINIMUM_ROWS}, better 16 or more.",
            what=settings.per_device_train_batch_size,
            field="per_device_train_batch_size",
        )
    return found


MINIMUM_ROWS = 2
"""Smallest batch of a task that compares the rows of a batch."""


def forecast(
    settings: TrainSettings,
    source: hub.ModelSource,
    tokenizer: data.Tokenizer,
    task: TaskOnData,
    config: LoraConfig | None = None,
) -> Forecast:
    """Read the model's shape and check the targets and the maximum length against it; no weights are loaded.

    Args:
        settings: Settings for the adapter and the maximum length.
        source: The model.
        tokenizer: The model's tokenizer; new tokens are added to it in place.
        task: The run's task.
        config: The config of an existing adapter; None builds the config of a new adapter from the settings.

    Returns:
        The properties of the run that are known before the data is tokenized.

    Raises:
        ModelError: The model's config cannot be read, or the model or the tokenizer does not support new tokens.
        TargetError: A target matches nothing.
        ConfigError: A key in `learning_rate_pattern` matches no adapted module, or a new token already exists.
        UsageError: `max_length` is not the default and exceeds the model's limit.
    """
    shape = hub.shape_for_task(source, task.task.loader, task.target.config_values())
    config, new, notes = config or settings.lora_config(task.task.adapter_task), None, [task.note] if task.note else []
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
    held_out_sequences: Texts | None
    train_report: Report
    held_out_report: Report | None

    @property
    def held_out(self) -> Callable[[], Iterable[data.Batch]] | None:
        """Function that returns the evaluation batches, or None if there is no evaluation data."""
        if self.held_out_sequences is None:
            return None
        loader = self.loader
        return partial(data.by_length, self.held_out_sequences, loader.batch_rows, loader.pad_id, loader.collate)

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
        if batch_rows == self.loader.batch_rows:
            return self
        return replace(self, loader=replace(self.loader, batch_rows=batch_rows))


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


def read_data(
    settings: TrainSettings,
    record: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> data.Split:
    """Read the training and evaluation files; if no evaluation files are given, hold out some training data.

    Args:
        settings: The run's settings; only those about data and the seed are used.
        record: Contents of `run.json` if the run is resumed, or None.
        say: Function that receives a message about the first row that is skipped while streaming.

    Returns:
        The training and evaluation records.

    Raises:
        DataError: A file cannot be read, or a record is invalid; the message names the file and the line.
        ConfigError: A name in `data_weights` is not one of the training data.
        UsageError: The data is to be streamed, but cannot be, or the number of steps is not given.
    """
    request = settings.row_request()
    weights_of(settings.data, settings.data_weights)
    if is_streamed(settings, record):
        if settings.max_steps is None:
            raise UsageError(
                "streaming needs the number of steps, because the number of rows is not known; pass --max-steps.",
                field="max_steps",
            )
        first = _First(say)
        return data.read_stream(
            settings.data, settings.eval_data, settings.eval_fraction, settings.seed, request, first.skipped
        )
    if record is None and settings.streaming == "auto" and data.streamable_bytes(settings.data) > STREAMED_BYTES:
        say("The training data is checked and tokenized as a whole; with --max-steps, it is read while training.")
    return data.read_split(settings.data, settings.eval_data, settings.eval_fraction, settings.seed, request)


def is_streamed(settings: TrainSettings, record: Mapping[str, Any] | None) -> bool:
    """Return whether the training data is read while training.

    Args:
        settings: The run's settings.
        record: Contents of `run.json` if the run is resumed, which is then streamed as before, or None.
    """
    before = (record or {}).get("data_sha256")
    if isinstance(before, Mapping):
        return any(str(value).startswith(data.PARTIAL) for value in before.values())
    if settings.streaming != "auto":
        return settings.streaming == "on"
    return settings.max_steps is not None and data.streamable_bytes(settings.data) > STREAMED_BYTES


class _First:
    """Receiver of skipped rows that passes on only the first one."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say: Callable[[str], None] | None = say

    def skipped(self, where: str, reason: str) -> None:
        """Report a skipped row, if it is the first one."""
        if self._say is not None:
            self._say(f"{where}: row skipped, as later ones will be: {reason}")
        self._say = None


def make_batches(
    settings: TrainSettings,
    records: data.Split,
    task: TaskOnData,
    tokenizer: data.Tokenizer,
    max_length: int,
    progress: Progress,
) -> RunBatches:
    """Tokenize the records and create the loaders.

    Args:
        settings: The run's settings; only the batch size, the seed and those about data are used.
        records: Training and evaluation records, from `read_data`.
        task: The run's task.
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
    cache = _token_cache(settings, tokenizer, progress)
    options = EncodeOptions(max_length, settings.overlong, _listener(progress, "training data", records.train), cache)
    train = task.task.encode(records.train, tokenizer, task.target, options)
    if not settings.allow_missing_end:
        train.report.check_end()
    loader = _loader(settings, records, train, task, tokenizer, max_length)
    if not records.held_out:
        return RunBatches(loader, None, train.report, None)
    try:
        options = replace(options, watch=_listener(progress, "evaluation data", records.held_out))
        held_out = task.task.encode(records.held_out, tokenizer, task.target, options)
    except DataError as cause:
        raise DataError(f"evaluation data: {cause}", **cause.fields) from cause
    return RunBatches(loader, held_out.sequences, train.report, held_out.report)


def _token_cache(settings: TrainSettings, tokenizer: data.Tokenizer, progress: Progress) -> data.TokenCache | None:
    """Return the cache of tokens, or None if it is off or has no directory."""
    if not settings.token_cache:
        return None
    try:
        folder = cache_directory() / "tokens"
    except DiskError as cause:
        progress.detail(f"The tokens are not kept for later runs: {cause}")
        return None
    installed = run_folder.versions()
    context = {
        "tokenizer": hub.tokenizer_hash(tokenizer),
        "template": hub.chat_template_hash(tokenizer),
        "rows": [settings.format, settings.columns, settings.on_bad_row, settings.group, settings.task],
        "versions": {name: installed.get(name) for name in ("lorakit", "transformers", "tokenizers")},
    }
    return data.TokenCache(folder, context, progress.say)


def _loader(
    settings: TrainSettings,
    records: data.Split,
    train: EncodedData,
    task: TaskOnData,
    tokenizer: data.Tokenizer,
    max_length: int,
) -> data.Loader:
    """Return the loader of the training data; of a stream, only the first part has been encoded."""
    rows, pad = settings.per_device_train_batch_size, data.padding_id(tokenizer)
    weights = weights_of(settings.data, settings.data_weights)
    train.report.notes += [f"{name}: {weight:g} times per epoch." for name, weight in settings.data_weights.items()]
    if isinstance(records, data.StreamSplit):
        overlong = settings.overlong
        return data.StreamLoader(
            train.sequences,
            rows,
            settings.seed,
            pad_id=pad,
            collate=task.objective.collate,
            rows=records.rows,
            encode=lambda record: data.encode_record(record, tokenizer, max_length, overlong),
            source_weights=weights,
        )
    parts = tuple((count, weights.get(source, 1.0)) for source, count in train.sources) if weights else ()
    collate = task.objective.collate
    return data.Loader(train.sequences, rows, settings.seed, pad_id=pad, weights=parts, collate=collate)


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
        if not never:
            return ()
        if isinstance(loader, data.StreamLoader):
            return (f"These new tokens are not in the first part of the training data: {never}.",)
        return (f"These new tokens are not in the training data, so their rows stay untrained: {never}.",)


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
