"""Read and encode the data of a run, and divide it into batches: as a whole, or while training (`streaming`)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lorakit import data, hub
from lorakit.caches import TOKENS, code
from lorakit.config import LoraConfig
from lorakit.core import invocation_offsets, invocations_of
from lorakit.data.encoding import IGNORED
from lorakit.data.loader import padded_ids
from lorakit.data.records import content_key
from lorakit.data.sources import weights_of
from lorakit.durable import JsonValue, as_object
from lorakit.errors import DataError, DiskError, LorakitError, UsageError
from lorakit.tables import format_count
from lorakit.tasks import EncodeOptions
from lorakit.train.files import run_folder
from lorakit.train.loop.run import RunBatches
from lorakit.train.progress import Progress
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.spec import RunSpec

MOST_COMPARED_BYTES = 1 << 28
"""Maximum size of training data that is read again to compare rows."""

STREAMED_BYTES = 1 << 30
"""Size of the training data above which `--streaming auto` reads it while training."""


def count_inactive(config: LoraConfig, sequences: Sequence[data.Sequence]) -> int:
    """Return the number of sequences in which an adapter with invocation tokens acts on no token with loss."""
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
        settings: The run's settings.
        record: Contents of `run.json` if the run is resumed, or None.
        say: Receives a message about the first row that is skipped while streaming.
        trained: Shape and columns of the training data of the adapter that a new run starts from, or None.

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
        return data.read_stream(
            settings.data, settings.eval_data, settings.eval_fraction, settings.seed, request, _first_skipped(say)
        )
    if record is None and settings.streaming == "auto" and data.streamable_bytes(settings.data) > STREAMED_BYTES:
        say("The training data is checked and tokenized as a whole; with --max-steps, it is read while training.")
    resolved = (record or {}).get("resolved")
    if resolved and settings.eval_data is None:  # runs of previews named no rule
        data.check_rule(resolved.get("split", "hashed"))
    return data.read_split(settings.data, settings.eval_data, settings.eval_fraction, settings.seed, request)


def is_streamed(settings: TrainSettings, record: Mapping[str, Any] | None) -> bool:
    """Return whether the training data is read while training; a run that is resumed reads it as before."""
    before = (record or {}).get("data_sha256")
    if isinstance(before, Mapping):
        return any(str(value).startswith(data.PARTIAL) for value in before.values())
    if settings.streaming != "auto":
        return settings.streaming == "on"
    return settings.max_steps is not None and data.streamable_bytes(settings.data) > STREAMED_BYTES


def _first_skipped(say: Callable[[str], None]) -> Callable[[str, str], None]:
    """Return a receiver of skipped rows that reports only the first one."""
    reported = list[str]()

    def receive(where: str, reason: str) -> None:
        if not reported:
            say(f"{where}: row skipped, as later ones will be: {reason}")
            reported.append(where)

    return receive


def make_batches(spec: RunSpec) -> RunBatches:
    """Tokenize the records of a run, create the loaders, and count rows and tokens.

    Raises:
        DataError: The training data or the evaluation data has no tokens that contribute to the loss, or no end marker
            in the training data does.
    """
    settings, records, task, tokenizer = spec.settings, spec.data, spec.task, spec.tokenizer
    options = EncodeOptions(
        spec.forecast.max_length,
        settings.overlong,
        _listener(spec.progress, "training data", records.train),
        _token_cache(spec),
    )
    train = task.task.encode(records.train, tokenizer, task.target, options)
    if not settings.allow_missing_end:
        train.report.check_end()
    loader = _loader(spec, train)
    if not records.held_out:
        return RunBatches(loader, None, train.report, None, task)
    try:
        options = replace(options, watch=_listener(spec.progress, "evaluation data", records.held_out))
        held_out = task.task.encode(records.held_out, tokenizer, task.target, options)
    except DataError as cause:
        raise DataError(f"evaluation data: {cause}", **cause.fields) from cause
    return RunBatches(loader, held_out.sequences, train.report, held_out.report, task)


def _token_cache(spec: RunSpec) -> data.TokenCache | None:
    """Return the cache of tokens, or None if it is off or has no directory."""
    if not spec.settings.token_cache:
        return None
    try:
        folder = TOKENS.path()
    except DiskError as cause:
        spec.progress.detail(f"The tokens are not kept for later runs: {cause}")
        return None
    inputs: dict[str, JsonValue] = {
        "reading": [asdict(spec.settings.row_request()), spec.settings.task],
        "tokenizer": [spec.tokenizer_sha256, hub.tokenizer_settings(spec.tokenizer)],
        "template": hub.chat_template_hash(spec.tokenizer),
        "code": code(),
    }
    return data.TokenCache(folder, inputs, spec.progress.say)


def _loader(spec: RunSpec, train: data.Encoded) -> data.BatchLoader:
    """Return the loader of the training data; of a stream, only the first part has been encoded."""
    settings, records, task = spec.settings, spec.data, spec.task
    weights = weights_of(settings.data, settings.data_weights)
    train.report.notes += [f"{name}: {weight:g} times per epoch." for name, weight in settings.data_weights.items()]
    given = (train.sequences, settings.per_device_train_batch_size, settings.seed)
    pad, collate = data.padding_id(spec.tokenizer), task.objective.collate
    if isinstance(records, data.StreamSplit):
        options = EncodeOptions(spec.forecast.max_length, settings.overlong)
        return data.StreamLoader(
            *given,
            pad_id=pad,
            collate=collate,
            rows=records.rows,
            encode=lambda record: task.task.encode_one(record, spec.tokenizer, task.target, options),
            source_weights=weights,
        )
    parts = tuple((count, weights.get(source, 1.0)) for source, count in train.sources) if weights else ()
    return data.Loader(*given, pad_id=pad, weights=parts, collate=collate)


def _listener(progress: Progress, what: str, records: data.AnyRecords) -> Callable[[int], None] | None:
    if not isinstance(records, data.StoredRecords):
        return None
    total = records.total_bytes
    return lambda done: progress.reading(what, done, total)


def seen_note(
    adapter: Path, facts: Mapping[str, Any], records: data.StoredRecords, *, by_file: bool = True
) -> str | None:
    """Return a message about rows that an adapter was trained on, or None if there are none or nothing is known.

    Args:
        adapter: The adapter's directory: `adapter/` or a checkpoint of a run, or a copy.
        facts: Contents of its `lorakit.json`.
        records: The rows to evaluate on.
        by_file: Whether they are all rows of their files, so that data of its run is a reason to doubt.
    """
    hashes = as_object(as_object(facts.get("training")).get("data_sha256"))
    if not hashes:
        return None
    parts = _split_of(adapter.parent, hashes)
    if parts is None:
        same = [path for path, digest in records.digests().items() if by_file and digest in hashes.values()]
        return (
            f"{adapter}: {same[0]} was data of its training run (for training or evaluation); rows that it was trained "
            "on say little about new data."
            if same
            else None
        )
    trained = {content_key(record) for record in parts.training_records()}
    seen = sum(content_key(record) in trained for record in records)
    if seen:
        total = format_count(len(records), "row")
        return f"{adapter}: trained on {seen:,} of these {total}, which say little about new data."
    if not by_file:
        return None
    texts = {record.source for record in parts.train if isinstance(record, data.Document)}
    part = [path for path, digest in records.digests().items() if path in texts and digest in hashes.values()]
    return f"{adapter}: trained on a part of {part[0]}, which says little about new data." if part else None


def _split_of(run: Path, hashes: Mapping[str, Any]) -> data.Split | None:
    """Return the training and evaluation rows of a run, or None if they cannot be read again or have changed."""
    with contextlib.suppress(LorakitError, OSError):
        record = run_folder.read_record(run)
        if record is None or record.get("data_sha256") != hashes:
            return None
        settings = TrainSettings(**record["settings"])
        if is_streamed(settings, record) or data.streamable_bytes(settings.data) > MOST_COMPARED_BYTES:
            return None
        parts = read_data(settings, record)
        return parts if parts.digests() == hashes else None
    return None
