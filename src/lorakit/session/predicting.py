"""Rows without labels for a task that predicts rows: how they are encoded, before weights are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lorakit import hub
from lorakit.data import AnyRecords, Batch, Encoded, Record, padding_id
from lorakit.errors import UsageError
from lorakit.plan.job import ASSUMED_LENGTH
from lorakit.session.coding import max_length_for
from lorakit.session.spec import SessionSpec
from lorakit.session.tokenizers import SavedTokenizer
from lorakit.tasks import EncodeOptions, LabelOptions, agree_on_padding, named_as, on_model


def to_predict(spec: SessionSpec, tag_scheme: str = "auto") -> SessionSpec:
    """Return a session's spec with everything that its task needs to predict rows.

    The tag scheme "auto" is that of the adapter or the model.

    Raises:
        UsageError: The task generates text, or the model has no head for it.
        LorakitError: The files of the model or the adapter do not fit the task.
    """
    if spec.task.task.predict is None:
        raise UsageError(f"the task {spec.task.task.name} generates text; use `lorakit generate`.", field="task")
    hub.require(spec.source, tokenizer=True)
    named = named_as(spec.task, hub.ModelFacts.of(spec.source))
    labeled = replace(named, target=named.target.with_options(LabelOptions(tag_scheme=tag_scheme)))
    return replace(spec, task=on_model(labeled, spec.source))


@dataclass(frozen=True)
class RowsToPredict:
    """Encoded rows, each with the record that it was made from, and the tokenizer that encoded them."""

    rows: Encoded
    batch_rows: int
    tokenizer: SavedTokenizer

    @classmethod
    def of(
        cls,
        spec: SessionSpec,
        records: AnyRecords,
        max_length: int | None,
        batch_rows: int,
        tokenizer: SavedTokenizer | None = None,
    ) -> RowsToPredict:
        """Encode rows for the result of `to_predict`; `max_length` is `ASSUMED_LENGTH` tokens if it is None.

        Raises:
            LorakitError: The rows cannot be encoded.
        """
        length = max_length_for(hub.shape_of(spec.source), max_length, lambda: ASSUMED_LENGTH)
        tokenizer = tokenizer or spec.tokenizer
        agree_on_padding(spec.task, spec.source, [tokenizer])
        options = EncodeOptions(length, is_labeled=False)
        encoded = spec.task.task.encode(records, tokenizer, spec.task.target, options)
        return cls(encoded, batch_rows, tokenizer)

    @property
    def notes(self) -> list[str]:
        """Messages, for example about truncated or empty rows."""
        return self.rows.report.lines()[1:]

    def batches(self, spec: SessionSpec) -> Iterator[tuple[Batch, Sequence[Record]]]:
        """Yield batches with the records of their rows, in order."""
        collate, pad = spec.task.objective.collate, padding_id(self.tokenizer)
        for at in range(0, len(self.rows.sequences), self.batch_rows):
            end = at + self.batch_rows
            yield collate(list(self.rows.sequences[at:end]), pad, 0.0), self.rows.records[at:end]
