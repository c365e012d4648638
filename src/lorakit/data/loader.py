"""Group sequences into padded batches, in an order that a seed determines; a loader can resume at any batch.

A batch depends only on the data, the loader's settings, the epoch and the batch number.
"""

from __future__ import annotations

import copy
import hashlib
import random
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Many
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from lorakit.data.encoding import IGNORED, Sequence, lengths
from lorakit.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from lorakit.data.tokens import Tokenizer


EPOCHS_READ = 10
"""Number of epochs in which `Loader.most_tokens` looks for the largest batch."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows padded on the right to the length of the longest row.

    Attributes:
        input_ids: Token ids, shape (rows, length), int64.
        attention_mask: 1 for a token, 0 for padding, shape (rows, length), int64.
        labels: Token ids at positions that contribute to the loss, -100 elsewhere, shape (rows, length), int64.
        epoch: Progress through the data after this batch, in epochs.
        tokens: Number of tokens, excluding padding.
        trained_tokens: Number of targets that contribute to the loss: positions whose label is not -100, or rows.
        extra: Other inputs of the model, such as `token_type_ids`, keyed by name.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    epoch: float
    tokens: int
    trained_tokens: int
    extra: Mapping[str, torch.Tensor] = field(default_factory=dict)


Collate: TypeAlias = Callable[[list[Sequence], int, float], Batch]
"""Function that combines sequences into a padded batch, given the padding token's id and the progress in epochs."""


@dataclass(eq=False, repr=False)
class BatchLoader(Iterator[Batch], ABC):
    """Iterator over batches that can resume at any of them.

    Attributes:
        sequences: Sequences from `encode`; of a stream, those of the first part of the data.
        pad_id: Id of the padding token, which the attention mask hides; see `padding_id`.
        collate: Function that combines sequences into a batch; None selects `padded`.

    Raises:
        ConfigError: `batch_rows` is below 1.
    """

    sequences: Many[Sequence]
    batch_rows: int
    seed: int
    _: KW_ONLY
    pad_id: int = 0
    collate: Collate | None = None

    def __post_init__(self) -> None:
        if self.batch_rows < 1:
            raise ConfigError.of("batch_rows", self.batch_rows, "at least 1")

    @property
    @abstractmethod
    def batches_per_epoch(self) -> int:
        """The (estimated) number of batches per epoch, including a smaller last batch."""

    @property
    @abstractmethod
    def epoch(self) -> float:
        """Progress through the data in epochs; an integer exactly at the end of an epoch."""

    @abstractmethod
    def most_tokens(self, batches: int) -> int | None:
        """Return the most tokens, without padding, of a batch among the first ones; None if that is not known."""

    @abstractmethod
    def next_rows(self) -> list[Sequence]:
        """Return the rows of the next batch, and advance to the batch after it."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return the position, the settings and the identity of the data as plain JSON values."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Resume at the saved position of another loader; the next batches are those that it would have yielded.

        Raises:
            DataError: The state is invalid, or comes from a loader with other data or settings.
        """

    def __next__(self) -> Batch:
        return self.batch_of(self.next_rows())

    def batch_of(self, rows: list[Sequence]) -> Batch:
        """Combine rows from `next_rows`, at least one, into a batch."""
        return (self.collate or padded)(rows, self.pad_id, self.epoch)

    def _check_state(self, state: dict[str, Any], data: str, *settings: str) -> None:
        """Check that a state has the same data, under the key `data`, and the same settings as this loader's."""
        mine = self.state()
        different = [key for key in (data, *settings) if state.get(key) != mine.get(key)]
        if different:
            shown = ", ".join("the data" if key == data else key for key in different)
            text = f"The position in the data cannot be restored: {shown} changed after the position was saved."
            raise DataError(text, what=shown)


@dataclass(eq=False, repr=False)
class Loader(BatchLoader):
    """Iterator over the batches of successive epochs; each epoch has its own order and may end with a smaller batch.

    Attributes:
        shuffle: Whether to shuffle the sequences; False keeps their order.
        epochs: Number of epochs; None means unlimited.
        weights: (sequences, weight) pairs for consecutive sequences: how often each of them occurs per epoch. The
            fractional part of a weight is the fraction of the sequences that occur once more; each epoch has its own
            choice. Empty means that each sequence occurs once.

    Raises:
        ConfigError: `batch_rows` is below 1.
        DataError: There are no sequences, or the weights leave none.
    """

    _: KW_ONLY
    shuffle: bool = True
    epochs: int | None = None
    weights: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.sequences:
            raise DataError("The data has no sequences to make batches from.", field="data")
        self._seek(0, 0)
        if not self._order:
            text = "The weights leave no sequences to make batches from; increase them."
            raise DataError(text, what=self.weights, field="data_weights")

    @property
    def batches_per_epoch(self) -> int:
        """The number of batches per epoch, including a smaller last batch."""
        return -(-len(self._order) // self.batch_rows)

    @property
    def epoch(self) -> float:
        """Progress through the data, in epochs."""
        return self._epoch + self._batch / self.batches_per_epoch

    def next_rows(self) -> list[Sequence]:
        """Return the rows of the next batch, and advance to the batch after it; StopIteration after the last epoch."""
        if self._batch == self.batches_per_epoch:
            self._seek(self._epoch + 1, 0)
        if self.epochs is not None and self._epoch >= self.epochs:
            raise StopIteration
        at = self._batch * self.batch_rows
        rows = [self.sequences[index] for index in self._order[at : at + self.batch_rows]]
        self._batch += 1
        return rows

    def most_tokens(self, batches: int) -> int | None:
        """Return the most tokens, without padding, of a batch among the first ones, in at most `EPOCHS_READ` epochs."""
        sizes, other, most = np.array(lengths(self.sequences)), copy.copy(self), 0
        for epoch in range(min(EPOCHS_READ, -(-batches // self.batches_per_epoch))):
            other._seek(epoch, 0)
            order = np.array(other._order)[: (batches - epoch * self.batches_per_epoch) * self.batch_rows]
            sums = np.add.reduceat(sizes[order], np.arange(0, len(order), self.batch_rows))
            most = max(most, int(sums.max()))
        return most

    def state(self) -> dict[str, Any]:
        """Return the loader's position, its settings and a digest of its data as plain JSON values."""
        return {
            "epoch": self._epoch,
            "batch": self._batch,
            "seed": self.seed,
            "batch_rows": self.batch_rows,
            "shuffle": self.shuffle,
            "data_sha256": self._data_digest,
            **({"weights": [list(pair) for pair in self.weights]} if self.weights else {}),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Resume at the saved position of another loader; a DataError for an invalid state or other data."""
        self._check_state(state, "data_sha256", "seed", "batch_rows", "shuffle", "weights")
        epoch, batch = state.get("epoch"), state.get("batch")
        if isinstance(epoch, int) and isinstance(batch, int) and epoch >= 0 and 0 <= batch <= self.batches_per_epoch:
            self._seek(epoch, batch)
        else:
            text = f"The saved position in the data is not valid: epoch {epoch!r}, batch {batch!r}."
            raise DataError(text, what=(epoch, batch))

    def _seek(self, epoch: int, batch: int) -> None:
        self._epoch, self._batch = epoch, batch
        self._order = array("q", range(len(self.sequences)))
        if self.weights:
            self._order = self._weighted(random.Random(f"{self.seed}:{epoch}:weights"))
        if self.shuffle:
            random.Random(f"{self.seed}:{epoch}").shuffle(self._order)

    def _weighted(self, drawn: random.Random) -> array[int]:
        """Return the indices of the sequences of an epoch in ascending order, each as often as its weight says."""
        chosen, begin = array("q"), 0
        for count, weight in self.weights:
            here, whole = range(begin, begin + count), int(weight)
            some = drawn.sample(here, round((weight - whole) * count))
            chosen.extend(sorted([*(index for index in here for _ in range(whole)), *some]))
            begin += count
        return chosen

    @cached_property
    def _data_digest(self) -> str:
        digest = hashlib.sha256()
        for sequence in self.sequences:
            digest.update(len(sequence).to_bytes(8, "little"))
            for ids in (sequence.input_ids, *sequence.others):
                digest.update(ids.tobytes())
            digest.update(sequence.labels.tobytes())
        return digest.hexdigest()


def padded(rows: list[Sequence], pad_id: int, epoch: float) -> Batch:
    """Combine sequences into a padded batch."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    input_ids, attention_mask = padded_ids([row.input_ids for row in rows], pad_id)
    labels = [torch.frombuffer(row.labels, dtype=torch.int32).long() for row in rows]
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        labels=pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        epoch=epoch,
        tokens=sum(len(row) for row in rows),
        trained_tokens=sum(row.trained_tokens for row in rows),
    )


def padded_ids(rows: list[array[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ids of several texts, padded on the right, and the attention mask, both of shape (rows, length)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = [torch.frombuffer(row, dtype=torch.int32).long() for row in rows]
    # based on lengths, not ids: padding and end of text may share an id, and the latter must not be masked
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    return pad_sequence(ids, batch_first=True, padding_value=pad_id), mask


def by_length(sequences: Many[Sequence], rows: int, pad_id: int = 0, collate: Collate | None = None) -> Iterator[Batch]:
    """Yield batches that cover each sequence exactly once, shortest first; batches of short sequences have more rows.

    Including padding, no batch contains more than `rows` × (length of the longest sequence) tokens, which bounds
    memory.

    Raises:
        ConfigError: `rows` is below 1.
    """
    if rows < 1:
        raise ConfigError.of("rows", rows, "at least 1")
    join, order, batch = collate or padded, order_by_length(sequences), list[Sequence]()
    positions = rows * len(sequences[order[-1]])
    for seen, index in enumerate(order):
        row = sequences[index]
        if batch and (len(batch) + 1) * len(row) > positions:
            yield join(batch, pad_id, seen / len(sequences))
            batch = []
        batch.append(row)
    yield join(batch, pad_id, 1.0)


def order_by_length(sequences: Many[Sequence]) -> list[int]:
    """Return the positions of the sequences, shortest first."""
    sizes = lengths(sequences)
    return sorted(range(len(sizes)), key=sizes.__getitem__)


def padding_id(tokenizer: Tokenizer) -> int:
    """Return a tokenizer's padding token (see `lorakit.hub.agree_on_padding`); a ConfigError if it has none."""
    if tokenizer.pad_token_id is None:
        text = "the tokenizer has no padding token; call lorakit.hub.agree_on_padding, or set tokenizer.pad_token."
        raise ConfigError(text, field="pad_token")
    return tokenizer.pad_token_id
