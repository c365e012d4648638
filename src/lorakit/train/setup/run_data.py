"""Read and encode the data of a run, and divide it into batches: as a whole, or while training (`streaming`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from lorakit import data, hub
from lorakit.caches import TOKENS, code
from lorakit.config import LoraConfig
from lorakit.core import invocation_offsets, invocations_of
from lorakit.data.encoding import IGNORED
from lorakit.data.loader import padded_ids
from lorakit.data.sources import weights_of
from lorakit.durable import JsonValue
from lorakit.errors import DataError, DiskError, UsageError
from lorakit.tasks import EncodedData, EncodeOptions, TaskOnData, Texts, evaluation_batches
from lorakit.train.loop.progress import Progress
from lorakit.train.processes.processes import Processes
from lorakit.train.settings.settings import TrainSettings

STREAMED_BYTES = 1 << 30
"""Size of the training data above which `--streaming auto` reads it while training."""


@dataclass(frozen=True)
class RunBatches:
    """The data of a run, split into batches.

    Attributes:
        loader: Endless iterator over the training batches, in a seeded order.
        held_out_sequences: The evaluation data, or None if there is none.
        train_report: Row and token counts for the training data.
        held_out_report: Row and token counts for the evaluation data, or None.
        task: The run's task.
    """

    loader: data.BatchLoader
    held_out_sequences: Texts | None
    train_report: data.Report
    held_out_report: data.Report | None
    task: TaskOnData

    @property
    def held_out(self) -> Callable[[], Iterable[data.Batch]] | None:
        """Function that returns the evaluation batches, or None if there is no evaluation data."""
        if self.held_out_sequences is None:
            return None
        loader, collate = self.loader, self.task.objective.collate
        rows, pad = loader.batch_rows, loader.pad_id
        return partial(evaluation_batches, self.task.task, collate, self.held_out_sequences, rows, pad)

    @property
    def parts(self) -> list[Sequence[data.Sequence]]:
        """The training data and, if there is any, the evaluation data."""
        return (
            [self.loader.sequences]
            if self.held_out_sequences is None
            else [self.loader.sequences, self.held_out_sequences]
        )

    def next_share(self, accumulation: int, processes: Processes) -> list[data.Batch]:
        """Return this process's batches of the next step; a step never mixes rows from two epochs.

        Every process advances its loader over all batches of the step, so the order of the data does not depend on the
        number of processes.

        Args:
            accumulation: Number of batches per step in all processes together.
            processes: The processes of the run.

        Returns:
            The batches, which may be none if the step has fewer rows than there are processes.

        Raises:
            DataError: A row of streamed data does not fit.
        """
        groups = list[list[data.Sequence]]()
        while len(groups) < accumulation:
            groups.append(self.loader.next_rows())
            if self.loader.epoch.is_integer():  # that was the last batch of the epoch
                break
        mine = share_of(groups, processes.rank, processes.count, self.task.task.needs_batch)
        return [self.loader.batch_of(rows) for rows in mine]

    def count_inactive(self, config: LoraConfig) -> None:
        """Record in the report how many sequences the adapter would not learn from; see `count_inactive`."""
        self.train_report.inactive_sequences = count_inactive(config, self.loader.sequences)

    def with_rows(self, batch_rows: int) -> RunBatches:
        """Return the same data, in the same order, in batches of another size, from the beginning.

        Args:
            batch_rows: Number of rows per batch.
        """
        if batch_rows == self.loader.batch_rows:
            return self
        return replace(self, loader=replace(self.loader, batch_rows=batch_rows))


def count_inactive(config: LoraConfig, sequences: Sequence[data.Sequence]) -> int:
    """Return the number of sequences in which an adapter acts on no token that contributes to the loss.

    Args:
        config: The adapter's config; without invocation tokens, the result is 0.
        sequences: The training data.
    """
    count = 0
    for _, tokens in invocations_of(config):
        for begin in range(0, len(sequences), _SEARCHED_AT_ONCE):
            rows = [sequences[at] for at in range(begin, min(begin + _SEARCHED_AT_ONCE, len(sequences)))]
            ids, mask = padded_ids([row.input_ids for row in rows], 0)
            for row, back in zip(rows, invocation_offsets(ids, tokens, mask), strict=True):
                # the token at a position is predicted at the one before
                after = [] if back is None else row.labels[ids.shape[1] - back + 1 :]
                count += all(label == IGNORED for label in after)
    return count


_SEARCHED_AT_ONCE = 256


def read_data(
    settings: TrainSettings,
    record: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
    trained: JsonValue = None,
) -> data.Split:
    """Read the training and evaluation files; if no evaluation files are given, hold out some training data.

    Args:
        settings: The run's settings; only those about data and the seed are used.
        record: Contents of `run.json` if the run is resumed, or None.
        say: Function that receives a message about the first row that is skipped while streaming.
        trained: Shape and columns of the training data of the adapter that a new run starts from, or None.

    Returns:
        The training and evaluation records.

    Raises:
        DataError: A file cannot be read, or a record is invalid; the message names the file and the line.
        ConfigError: A name in `data_weights` is not one of the training data.
        UsageError: The data is to be streamed, but cannot be, or the number of steps is not given.
    """
    if record is not None:
        trained = (record.get("from_adapter") or {}).get("rows")
    request = settings.row_request().with_usual(trained)
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
    name = data.STRATIFIED.name if record is None else (record.get("resolved") or {}).get("split")
    chosen = settings.data, settings.eval_data, settings.eval_fraction, settings.seed, request
    return data.read_split(*chosen, data.rule_named(name))


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
    tokenizer_sha256: str | None = None,
) -> RunBatches:
    """Tokenize the records and create the loaders.

    Args:
        settings: The run's settings; only the batch size, the seed and those about data are used.
        records: Training and evaluation records, from `read_data`.
        task: The run's task.
        tokenizer: The model's tokenizer.
        max_length: Maximum sequence length in tokens.
        progress: Receives reports on the progress of tokenization.
        tokenizer_sha256: Result of `hub.tokenizer_hash` for the tokenizer if it is known.

    Returns:
        The training loader, a function that returns the evaluation batches (or None without evaluation data), and
        the row and token counts of the training and evaluation data.

    Raises:
        DataError: The training data or the evaluation data has no tokens that contribute to the loss, or no end marker
            in the training data does.
    """
    cache = _token_cache(settings, tokenizer, tokenizer_sha256, progress)
    options = EncodeOptions(max_length, settings.overlong, _listener(progress, "training data", records.train), cache)
    train = task.task.encode(records.train, tokenizer, task.target, options)
    if not settings.allow_missing_end:
        train.report.check_end()
    loader = _loader(settings, records, train, task, tokenizer, max_length)
    if not records.held_out:
        return RunBatches(loader, None, train.report, None, task)
    try:
        options = replace(options, watch=_listener(progress, "evaluation data", records.held_out))
        held_out = task.task.encode(records.held_out, tokenizer, task.target, options)
    except DataError as cause:
        raise DataError(f"evaluation data: {cause}", **cause.fields) from cause
    return RunBatches(loader, held_out.sequences, train.report, held_out.report, task)


def _token_cache(
    settings: TrainSettings, tokenizer: data.Tokenizer, tokenizer_sha256: str | None, progress: Progress
) -> data.TokenCache | None:
    """Return the cache of tokens, or None if it is off or has no directory."""
    if not settings.token_cache:
        return None
    try:
        folder = TOKENS.path()
    except DiskError as cause:
        progress.detail(f"The tokens are not kept for later runs: {cause}")
        return None
    inputs: dict[str, JsonValue] = {
        "reading": [asdict(settings.row_request()), settings.task],
        "tokenizer": [tokenizer_sha256 or hub.tokenizer_hash(tokenizer), hub.tokenizer_settings(tokenizer)],
        "template": hub.chat_template_hash(tokenizer),
        "code": code(),
    }
    return data.TokenCache(folder, inputs, progress.say)


def _loader(
    settings: TrainSettings,
    records: data.Split,
    train: EncodedData,
    task: TaskOnData,
    tokenizer: data.Tokenizer,
    max_length: int,
) -> data.BatchLoader:
    """Return the loader of the training data; of a stream, only the first part has been encoded."""
    rows, pad = settings.per_device_train_batch_size, data.padding_id(tokenizer)
    weights = weights_of(settings.data, settings.data_weights)
    train.report.notes += [f"{name}: {weight:g} times per epoch." for name, weight in settings.data_weights.items()]
    if isinstance(records, data.StreamSplit):
        options = EncodeOptions(max_length, settings.overlong)
        return data.StreamLoader(
            train.sequences,
            rows,
            settings.seed,
            pad_id=pad,
            collate=task.objective.collate,
            rows=records.rows,
            encode=lambda record: task.task.encode_one(record, tokenizer, task.target, options),
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


def share_of(
    groups: Sequence[list[data.Sequence]], rank: int, processes: int, is_whole: bool = False
) -> list[list[data.Sequence]]:
    """Return the part of a step's batches that one process computes; the parts together contain each row once.

    Rows are given out in order of length, longest first, each to the process that has the fewest tokens so far. No
    process gets more batches than it would if whole batches were given out, and no batch has more rows than before.

    Args:
        groups: The rows of each batch of the step, as one process would compute them; at least one.
        rank: Number of the process, from 0.
        processes: Number of processes.
        is_whole: Whether batches must stay whole, because the loss compares the rows of a batch.

    Returns:
        The rows of each batch of the process; empty if the step has fewer rows than there are processes.
    """
    if processes == 1:
        return list(groups)
    if is_whole:
        sizes = [sum(map(len, group)) for group in groups]
        return [groups[index] for index in _shares(sizes, processes, -(-len(groups) // processes))[rank]]
    batch_rows = max(map(len, groups))
    rows = [row for group in groups for row in group]
    most = -(-len(groups) // processes) * batch_rows
    mine = [rows[index] for index in _shares(list(map(len, rows)), processes, most)[rank]]
    return [mine[at : at + batch_rows] for at in range(0, len(mine), batch_rows)]


def _shares(sizes: Sequence[int], processes: int, most: int) -> list[list[int]]:
    """Divide items by size among processes, at most `most` each; return the items of each, in ascending order."""
    shares, totals = [list[int]() for _ in range(processes)], [0] * processes
    for index in sorted(range(len(sizes)), key=lambda one: (-sizes[one], one)):
        free = (rank for rank in range(processes) if len(shares[rank]) < most)
        least = min(free, key=lambda rank: (totals[rank], rank))
        shares[least].append(index)
        totals[least] += sizes[index]
    return [sorted(share) for share in shares]
