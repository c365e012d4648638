"""Train on files that are too large to be tokenized before the first batch: read, tokenize and shuffle them in passing.

    files --RowStream--> rows --tokenizer--> sequences --blocks of `BUFFER` sequences, shuffled--> batches

The order of the sequences is that of the files, shuffled within consecutive blocks. The seed, the epoch and the block's
first position determine the order of a block, so the position of a loader is a few numbers: after an interruption, the
current block is read again and yields the same batches.

Whether a row is held out for evaluation depends only on its content (or its group) and the seed. Evaluation uses the
held-out rows of the first part of the data, and no row with the same content as an evaluation row is trained on.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any

from lorakit.data.encoding import Sequence
from lorakit.data.loader import BatchLoader
from lorakit.data.reading import RowStream, StreamedRow, open_stream, read_records
from lorakit.data.records import Record, Records, content_key
from lorakit.data.shapes import Request, common_layout
from lorakit.data.sources import Place
from lorakit.data.splitting import DEFAULT_FRACTION, Split
from lorakit.data.stored import StoredRecords
from lorakit.errors import ConfigError, DataError
from lorakit.tables import format_bytes, format_count

BUFFER = 1024
"""Minimum number of sequences in a block."""

SAMPLE_BYTES = 4 << 20
"""Size of the first part of the data in bytes, from which counts, evaluation rows and initial weights are taken."""

_LEAST_BYTES = 1 << 16  # of each file, if there are many


@dataclass(frozen=True)
class TrainingRows:
    """The rows of a stream that are not held out: neither among a fraction of the rows nor of excluded content."""

    stream: RowStream
    fraction: float = 0.0
    seed: int = 0
    excluded: frozenset[bytes] = frozenset()

    def rows(self, start: Place) -> Iterator[StreamedRow]:
        """Yield the training rows from a position to the end of the last file."""
        return (
            row
            for row in self.stream.rows(start)
            if not self.is_held_out(row) and not (self.excluded and content_key(row.record) in self.excluded)
        )

    def is_held_out(self, row: StreamedRow) -> bool:
        """Return whether a row is held out."""
        if not self.fraction:
            return False
        salt = str(self.seed)
        key = hashlib.sha256(salt.encode() + row.group).digest() if row.group else content_key(row.record, salt)
        return int.from_bytes(key[:8], "big") < self.fraction * 2**64


@dataclass(frozen=True, slots=True)
class StreamSplit(Split):
    """Training and evaluation rows of a stream; `train` contains the training rows of the first part of the data."""

    rows: TrainingRows

    def training_records(self) -> Iterable[Record]:
        """Return all training records, which are read one after another."""
        return (row.record for row in self.rows.rows(Place()))

    def digests(self) -> dict[str, str]:
        """Return a dict from the path or name of each file or data set to its identity, partial if it is streamed."""
        held_out = self.held_out.digests() if isinstance(self.held_out, StoredRecords) else {}
        contents = [source.content for source in self.rows.stream.sources]
        return {**held_out, **{content.label: content.identity() for content in contents}}


def read_stream(
    train: Iterable[str],
    held_out: Iterable[str] | None,
    fraction: float | None,
    seed: int,
    request: Request,
    skipped: Callable[[str, str], None] | None = None,
) -> StreamSplit:
    """Open training data as a stream, and read its first part; `held_out` is read as a whole.

    Raises:
        DataError: The data cannot be read, or a row in the first part does not fit and is not to be skipped.
        UsageError: A file cannot be read as a stream.
        ConfigError: The fraction is outside [0, 1).
    """
    fraction = DEFAULT_FRACTION if fraction is None else fraction
    if not 0 <= fraction < 1:
        raise ConfigError.of("eval_fraction", fraction, "in [0, 1), such as 0.05")
    stream = open_stream(train, request, skipped)
    if held_out is not None:
        names = list(held_out)
        evaluation = read_records(names, dataclasses.replace(request, group=None))
        excluded = frozenset(map(content_key, evaluation))
        rows = TrainingRows(stream, 0.0, seed, excluded)
        sample, _ = _sample(rows, request)
        sample.shape, sample.columns = common_layout(source.layout for source in stream.sources)
        return StreamSplit(sample, evaluation, f"Evaluation data: {', '.join(names)}. {_note(stream)}", rows)
    rows = TrainingRows(stream, fraction, seed)
    sample, chosen = _sample(rows, request)
    if request.group is not None:  # otherwise, rows with the same content are all held out or none of them is
        rows = dataclasses.replace(rows, excluded=frozenset(map(content_key, chosen)))
        kept = [at for at, record in enumerate(sample) if content_key(record) not in rows.excluded]
        sample = sample.some(kept, sample.notes)
    sample.shape, sample.columns = common_layout(source.layout for source in stream.sources)
    note = (
        f"{format_count(len(chosen), 'row')} of this part held out for evaluation (by a hash of each row, seed {seed})"
    )
    if not chosen:
        note = "no row of this part is held out for evaluation"
    return StreamSplit(sample, chosen, f"{_note(stream)}; {note}.", rows)


def _note(stream: RowStream) -> str:
    part = min(SAMPLE_BYTES, stream.total_bytes)
    if not all(source.content.size for source in stream.sources):
        return (
            f"Streaming a data set of unknown size: the counts are those of the first {format_bytes(SAMPLE_BYTES)}, "
            "only these rows were checked, and the progress within an epoch is not known"
        )
    return (
        f"Streaming {format_bytes(stream.total_bytes)}: the counts are those of the first {format_bytes(part)}, and "
        "only these rows were checked"
    )


def _sample(rows: TrainingRows, request: Request) -> tuple[Records, Records]:
    """Return the training rows and the held-out rows of the first part of each file or data set."""
    skipped = list[str]()
    stream = RowStream(rows.stream.sources, request, lambda where, reason: skipped.append(f"{where}: {reason}"))
    most = max(_LEAST_BYTES, SAMPLE_BYTES // len(stream.sources))
    train, held_out = Records(), Records()
    for number, source in enumerate(stream.sources):
        for row in stream.rows(Place(number), number):
            if source.content.bytes_before(row.start.offset) >= most:
                break
            if rows.is_held_out(row):
                held_out.append(row.record)
            elif content_key(row.record) not in rows.excluded:
                train.append(row.record)
    train.notes += _notes(stream, request, skipped)
    return train, held_out


def _notes(stream: RowStream, request: Request, skipped: Many[str]) -> list[str]:
    """Return messages about the shapes, the unused columns and the skipped rows of the first part."""
    layouts = [(source.content.label, source.layout) for source in stream.sources if source.layout is not None]
    notes = [f"{label}: {layout.text()}." for label, layout in layouts if layout.is_notable()]
    names = [f"'{name}' ({count:,} rows)" for name, count in sorted(stream.unused.items()) if name != request.group]
    if names:
        notes.append(f"unused columns in the first part: {', '.join(names)}.")
    if skipped:
        notes.append(f"{format_count(len(skipped), 'row')} skipped in the first part; the first is {skipped[0]}")
    return notes


@dataclass(frozen=True, slots=True)
class _Point:
    """The position of a sequence: that of its row, and the number of the row's sequences before it."""

    place: Place
    skip: int = 0

    def values(self) -> list[int]:
        return [self.place.file, self.place.offset, self.place.line, self.skip]


@dataclass(eq=False, repr=False)
class StreamLoader(BatchLoader):
    """Iterator over the batches of a stream; rows are read and tokenized when they are needed.

    Attributes:
        source_weights: Source of a record -> how often its sequences occur per epoch; 1 for other sources. For a weight
            with a fractional part, the seed, the epoch and the position of a sequence determine whether it occurs once
            more.
        sample_bytes: Size of the part that `sequences` covers.

    Raises:
        ConfigError: `batch_rows` is below 1.
    """

    _: KW_ONLY
    rows: TrainingRows
    encode: Callable[[Record], Many[Sequence]]
    source_weights: Mapping[str, float] = field(default_factory=dict)
    sample_bytes: int = SAMPLE_BYTES
    _block: list[Sequence] = field(init=False, default_factory=list)
    _following: tuple[_Point, Sequence] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._go_to(0, _Point(Place()))

    @property
    def batches_per_epoch(self) -> int:
        """The estimated number of batches per epoch, from the first part of the data."""
        scale = max(1.0, self.rows.stream.total_bytes / max(1, self.sample_bytes))
        return max(1, round(scale * len(self.sequences) / self.batch_rows))

    @property
    def epoch(self) -> float:
        """Progress through the data in epochs, measured in bytes; an integer exactly at the end of an epoch."""
        taken = self._batch * self.batch_rows
        if taken == 0 and self._point == _Point(Place()):
            return float(self._epoch)
        if self._following is None and self._block and taken >= len(self._block):
            return self._epoch + 1.0
        begin = self._bytes(self._point)
        end = self._bytes(None if self._following is None else self._following[0])
        done = begin + (end - begin) * taken / max(1, len(self._block))
        return self._epoch + min(max(done / max(1, self.rows.stream.total_bytes), 1e-9), 1 - 1e-9)

    def most_tokens(self, batches: int) -> int | None:
        """Return None, because the rows are not known before they are read."""
        return None

    def next_rows(self) -> list[Sequence]:
        """Return the rows of the next batch, and advance to the batch after it."""
        while not self._block or self._batch * self.batch_rows >= len(self._block):
            if self._block:
                self._advance()
            self._fill()
        at = self._batch * self.batch_rows
        rows = self._block[at : at + self.batch_rows]
        self._batch += 1
        return rows

    def state(self) -> dict[str, Any]:
        """Return the loader's position, its settings and the identity of its data as plain JSON values."""
        return {
            "epoch": self._epoch,
            "block": self._point.values(),
            "batch": self._batch,
            "seed": self.seed,
            "batch_rows": self.batch_rows,
            "buffer": BUFFER,
            "stream_sha256": self._identity,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume at the saved position of another loader (see `BatchLoader`); the current block is read again.

        Raises:
            DataError: The state is invalid, or comes from a loader with other data or settings.
        """
        self._check_state(state, "stream_sha256", "seed", "batch_rows", "buffer")
        epoch, batch, at = state.get("epoch"), state.get("batch"), state.get("block")
        numbers = [epoch, batch, *(at if isinstance(at, list) else [])]
        is_valid = len(numbers) == 6 and all(isinstance(one, int) and one >= 0 for one in numbers)
        if not is_valid or numbers[2] >= len(self.rows.stream.sources):
            raise DataError(f"The saved position in the data is not valid: {state}.", what=state)
        self._go_to(numbers[0], _Point(Place(*numbers[2:5]), numbers[5]))
        if numbers[1]:
            self._fill()
            self._batch = numbers[1]

    def _go_to(self, epoch: int, point: _Point) -> None:
        self._epoch, self._point, self._batch = epoch, point, 0
        self._block, self._following = [], None
        self._source = self._sequences(point)

    def _advance(self) -> None:
        """Go to the start of the next block, or of the next epoch."""
        if self._following is None:
            self._go_to(self._epoch + 1, _Point(Place()))
        else:
            self._point, self._batch, self._block = self._following[0], 0, []

    def _fill(self) -> None:
        """Read and shuffle the block that starts at the current point; the first sequence after it is read too."""
        size = -(-BUFFER // self.batch_rows) * self.batch_rows
        first = [] if self._following is None else [self._following]
        block, following = list[Sequence](), None
        try:
            for pair in itertools.chain(first, self._source):
                if len(block) == size:
                    following = pair
                    break
                block.append(pair[1])
        except DataError:
            self._go_to(self._epoch, self._point)
            raise
        if not block:
            raise DataError("The data has no sequences to make batches from.", field="data")
        key = ":".join(map(str, [self.seed, self._epoch, *self._point.values()]))
        random.Random(key).shuffle(block)
        self._block, self._following = block, following

    def _sequences(self, start: _Point) -> Iterator[tuple[_Point, Sequence]]:
        """Yield the sequences of the training rows from a point on, each with its own point."""
        skip = start.skip
        for row in self.rows.rows(start.place):
            sequences = self._repeated(row)
            for number in range(skip, len(sequences)):
                yield _Point(row.start, number), sequences[number]
            skip = 0

    def _repeated(self, row: StreamedRow) -> Many[Sequence]:
        """Return the sequences of a row, each as often as the weight of its source says."""
        sequences, weight = self.encode(row.record), self.source_weights.get(row.record.source, 1.0)
        if weight == 1:
            return sequences
        drawn = random.Random(f"{self.seed}:{self._epoch}:{row.start.file}:{row.start.offset}:weights")
        return [one for one in sequences for _ in range(int(weight) + (drawn.random() < weight % 1))]

    def _bytes(self, point: _Point | None) -> int:
        stream = self.rows.stream
        return stream.total_bytes if point is None else stream.bytes_before(point.place)

    @cached_property
    def _identity(self) -> str:
        digest = hashlib.sha256()
        for source in self.rows.stream.sources:
            digest.update(source.content.identity().encode())
        return digest.hexdigest()
