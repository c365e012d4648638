"""What is known of a run before any weights are loaded: device, task, model shape, adapter config and new tokens.

A failed check raises an error that names the problem.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from lorakit import data, hub, plan
from lorakit.config import LoraConfig
from lorakit.core import check_invocation, invocations_of
from lorakit.core.model.fingerprint import vocabulary_of
from lorakit.core.model.vocabulary import check_growth, with_trained_rows
from lorakit.errors import ConfigError, UsageError
from lorakit.machine import this_machine
from lorakit.plan.budget import needed_bytes
from lorakit.plan.job import ASSUMED_LENGTH
from lorakit.plan.params import for_task
from lorakit.session.lengths import max_length_for, usual_length
from lorakit.tables import format_count
from lorakit.targets import unfitting_keys
from lorakit.tasks import TaskOnData, task_for
from lorakit.train.processes.processes import ALONE, Processes
from lorakit.train.settings.defaults import DEFAULTS
from lorakit.train.settings.settings import TrainSettings


@dataclass(frozen=True)
class Forecast:
    """Properties of a run that are known from the settings and the model config, before the data is tokenized.

    Attributes:
        shape: Shape of the base model.
        config: The adapter's config.
        max_length: Maximum sequence length: the setting, or chosen by the data, the model's limit and the memory.
        notes: Messages to print.
        new_tokens: Tokens added to the vocabulary, or None.
    """

    shape: plan.ModelShape
    config: LoraConfig
    max_length: int
    notes: tuple[str, ...]
    new_tokens: NewTokens | None = None


def chosen_task(
    settings: TrainSettings,
    records: data.Split,
    source: hub.ModelSource,
    saved: TaskOnData | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> TaskOnData:
    """Choose the task of a run, and check that the settings apply to it.

    Args:
        settings: The run's settings.
        records: Training and evaluation records.
        source: The model.
        saved: The task of the adapter that the run starts from, or of the run that is resumed, or None.
        say: Function that receives a message before the labels of a stream are read, which may take minutes.

    Returns:
        The task, and what it predicts.

    Raises:
        UsageError: No task fits the data and the model, or a setting does not apply to the task.
        DataError: The labels cannot be used.
    """
    name: str | None = settings.task
    if saved is not None and name not in (None, saved.task.name):
        text = f"task is {name}, but the adapter was trained for {saved.task.name}; omit it."
        raise UsageError(text, what=name, field="task")
    is_streamed = isinstance(records, data.StreamSplit)
    if is_streamed and isinstance(next(iter(records.train), None), data.Labeled | data.Tagged):
        say("Reading the labels of all rows, because they must be known before the first step.")
    found = task_for(name, records, source, settings.label_options(), saved)
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
    records: data.Split,
    config: LoraConfig | None = None,
    recorded: int | None = None,
) -> Forecast:
    """Read the model's shape and check the targets and the maximum length against it; no weights are loaded.

    Args:
        settings: Settings for the adapter and the maximum length.
        source: The model.
        tokenizer: The model's tokenizer; new tokens are added to it in place.
        task: The run's task.
        records: Training and evaluation records, by which the maximum length is chosen if none is given.
        config: The config of an existing adapter; None builds the config of a new adapter from the settings.
        recorded: The maximum length of the run that is resumed, or None.

    Returns:
        The properties of the run that are known before the data is tokenized.

    Raises:
        ModelError: The model's config cannot be read, or the model or the tokenizer does not support new tokens.
        TargetError: A target matches nothing.
        ConfigError: A key in `learning_rate_pattern` matches no adapted module, a new token already exists, or the
            adapter waits for tokens that do not exist.
        UsageError: `max_length` exceeds the model's limit.
    """
    shape = hub.shape_for_task(source, task.task.loader, task.target.config_values())
    new, notes = None, [task.note] if task.note else []
    if config is None:
        given = settings.lora_config(task.task.adapter_task)
        config = for_task(given, shape)
        if config.exclude_modules != given.exclude_modules:
            notes.append(f"not adapted, because the task does not use their output: {', '.join(shape.unused_modules)}")
    if settings.new_tokens:
        base = hub.skeleton(source)
        new = add_new_tokens(tokenizer, settings.new_tokens, base)
        config = with_trained_rows(config, base, new.rows)
        words = ", ".join(f"{token} ({number})" for token, number in new.added.ids.items())
        notes.append(f"New tokens: {words}; in the embedding and the head, only the rows of these tokens are trained.")
    length, reason = _length(settings, shape, config, lambda: usual_length(records.train, tokenizer, task), recorded)
    notes += [f"maximum sequence length: {length:,} tokens ({reason})"] if reason else []
    if invocations_of(config):
        check_invocation(config, set(tokenizer.get_vocab().values()), "the tokenizer", length)
    counted = plan.count(shape, config, allow_partial=settings.allow_partial_targets)
    wrong = unfitting_keys(
        "learning_rate_pattern", settings.learning_rate_pattern, [*(site.path for site in counted.sites), *counted.rows]
    )
    if wrong:
        raise ConfigError(" ".join(map(str, wrong)), what=wrong[0].entry, field="learning_rate_pattern")
    return Forecast(shape, config, length, tuple(notes), new)


def _length(
    settings: TrainSettings,
    shape: plan.ModelShape,
    config: LoraConfig,
    usual: Callable[[], int],
    recorded: int | None,
) -> tuple[int, str]:
    """Return the maximum sequence length, and the reason if it is chosen here; a resumed run keeps its recorded one."""
    if recorded is not None or settings.max_length is not None:
        return recorded or max_length_for(shape, settings.max_length, usual), ""
    by_data = usual()
    length = min(by_data, shape.positions or by_data)
    fitting = fitting_length(length, shape, config, settings)
    if fitting < length:
        return fitting, f"{length:,} would exceed the memory"
    if length < by_data:
        return length, "the model's limit"
    return length, "at least 99% of the rows are not longer" if length != ASSUMED_LENGTH else "documents are split"


def fitting_length(length: int, shape: plan.ModelShape, config: LoraConfig, settings: TrainSettings) -> int:
    """Return a length whose planned memory fits: halved as often as needed, but not below `ASSUMED_LENGTH`.

    Args:
        length: The wanted length in tokens.
        shape: The model's shape.
        config: The adapter's config.
        settings: The run's settings; a limit of memory selects the smallest batch and the most recomputation.
    """
    given = settings.fit or settings.memory_budget
    limit = plan.bytes_of(given) if given else _memory_bytes(settings.device)
    while limit is not None and length > ASSUMED_LENGTH:
        job = plan.Job(
            batch_rows=1 if settings.fit else settings.per_device_train_batch_size,
            length_tokens=length,
            dtype=shape.dtype if settings.dtype == "auto" else settings.dtype,
            recompute="layers" if given else settings.recomputed,
            optimizer=settings.optimizer,
            quantization=settings.quantization,
            double_quantization=settings.double_quantization,
            base_matmul="dtype" if settings.quantization else settings.base_matmul,
            accelerated=settings.accelerate,
        )
        if needed_bytes(plan.estimate(shape, config, job, allow_partial=settings.allow_partial_targets)) <= limit:
            break
        length = max(ASSUMED_LENGTH, length // 2)
    return length


def _memory_bytes(device: str) -> int | None:
    """Return the memory of the device that the setting selects, in bytes; None if it is not known."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return this_machine().memory_bytes if device in ("auto", "cpu") else None


def pick_device(word: str, processes: Processes = ALONE) -> torch.device:
    """Return the device selected by the `device` setting; each of several processes on a machine gets its own GPU.

    Args:
        word: "auto", "cpu", "cuda", "cuda:N" or "mps".
        processes: The processes of the run.

    Raises:
        UsageError: The device is not available on this machine, or several processes would share it.
    """
    return hub.pick_device(word if processes.is_alone else _word_of(word, processes))


def gpu_of(processes: Processes, devices: int) -> int:
    """Return the number of the GPU of one of several processes: no two processes on a machine share one.

    Args:
        processes: The processes of the run.
        devices: Number of CUDA devices that torch finds on this machine.

    Raises:
        UsageError: There is no GPU for this process.
    """
    local = processes.local_rank
    if local >= devices:
        raise UsageError(
            f"no GPU is left for process {processes.rank}, which is number {local} on its machine (LOCAL_RANK): torch "
            f"finds {format_count(devices, 'CUDA device')} there, and processes cannot share one; start one process "
            "for each GPU, or use --device cpu.",
            what=local,
            field="device",
        )
    return local


def _word_of(word: str, processes: Processes) -> str:
    """Return the device of one of several processes as a value of the setting `device`."""
    if word == "auto":
        word = "cuda" if torch.cuda.is_available() else "cpu"
    if word == "cuda":
        return f"cuda:{gpu_of(processes, torch.cuda.device_count() if torch.cuda.is_available() else 0)}"
    if word != "cpu":
        raise UsageError(
            f"device is {word!r}, which the {processes.count} processes of this run cannot share; use --device cuda "
            "(one GPU for each process on a machine) or --device cpu.",
            what=word,
            field="device",
            allowed=("auto", "cuda", "cpu"),
        )
    return word


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

    def unseen(self, loader: data.BatchLoader) -> tuple[str, ...]:
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
