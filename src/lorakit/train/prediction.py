"""Predictions for rows without labels (`lorakit predict`): labels with scores, tags, generated texts or embeddings."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from lorakit import core, hub
from lorakit.data import AnyRecords, Request, padding_id, read_records, text_records
from lorakit.durable import JsonObject
from lorakit.errors import UsageError
from lorakit.plan.quantized import Quantization
from lorakit.speed import accelerate
from lorakit.tasks import (
    EncodeOptions,
    LabelOptions,
    PredictContext,
    TaskOnData,
    agree_on_padding,
    load_model_for,
    named_as,
    on_model,
)
from lorakit.tasks.encoding import EncodedRows
from lorakit.train.defaults import ASSUMED_LENGTH
from lorakit.train.evaluation import evaluating, own_tokenizer
from lorakit.train.forecast import max_length_for, pick_device
from lorakit.train.step import oom_advice_for_evaluation, oom_as_run_error

ADAPTER = "adapter"


@dataclass(frozen=True)
class PredictSettings:
    """Settings for `predict`.

    Attributes:
        model: Model directory, Hub id, packaged model, or resolved source.
        data: Files, directories or Hub data sets to predict.
        adapter: The adapter's files, or None to use the model's own head.
        task: The task of the adapter or the model.
        max_length: Maximum length of a text in tokens; None selects `ASSUMED_LENGTH`, within the model's limit.
        batch_rows: Number of rows per batch.
        dtype: "auto", "bfloat16", "float16" or "float32".
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        allow: Names of the `core.load_adapter` checks to override.
        quantization: How to quantize the base, or None.
        request: How the rows of the data are read.
        max_new_tokens: Maximum length of a generated text in tokens.
        texts: Texts to predict instead of `data`.
        tag_scheme: The scheme of the tags; "auto" selects that of the adapter or the model.
    """

    model: str | hub.ModelSource
    data: Sequence[str]
    adapter: core.AdapterFiles | None
    task: TaskOnData
    max_length: int | None
    batch_rows: int
    dtype: str = "auto"
    device: str = "auto"
    allow: Collection[str] = ()
    quantization: Quantization | None = None
    request: Request = field(default_factory=Request)
    max_new_tokens: int = 256
    texts: Sequence[str] = ()
    tag_scheme: str = "auto"


def predict(settings: PredictSettings, say: Callable[[str], None] = lambda _: None) -> Iterator[JsonObject]:
    """Predict rows in the order of the data.

    Args:
        settings: Model, adapter and data.
        say: Function that receives messages, for example about truncated or empty rows.

    Yields:
        For each row that is not empty, the prediction of its task as JSON values, with the row's `source` and `line`.

    Raises:
        UsageError: The task generates text, or the model has no head for it.
        AdapterFileError: The adapter does not match this base, or has no weights for a module that the base lacks.
        LorakitError: The data or the model cannot be used; the error class and message say why.
    """
    adapter, where, run = settings.adapter, pick_device(settings.device), settings.task.task.predict
    if run is None:
        raise UsageError(f"the task {settings.task.task.name} generates text; use `lorakit generate`.", field="task")
    texts, request = settings.texts, settings.request
    records: AnyRecords = text_records(texts, request) if texts else read_records(settings.data, request)
    source = hub.resolve(settings.model, say)
    hub.require(source, tokenizer=True)
    named = named_as(settings.task, hub.ModelFacts.of(source))
    labeled = replace(named, target=named.target.with_options(LabelOptions(tag_scheme=settings.tag_scheme)))
    task = on_model(labeled, source)
    length = max_length_for(hub.shape_of(source), settings.max_length, lambda: ASSUMED_LENGTH)
    tokenizer = hub.load_tokenizer(source)
    own = None if adapter is None else own_tokenizer(str(adapter.folder), tokenizer)
    tokenizer = tokenizer if own is None else own
    agree_on_padding(task, source, [tokenizer])
    encoded = task.task.encode(records, tokenizer, task.target, EncodeOptions(length, is_labeled=False))
    assert isinstance(encoded, EncodedRows)  # all tasks that predict rows return this type
    for line in encoded.report.lines()[1:]:
        say(line)
    how = hub.LoadOptions(hub.choose_dtype(settings.dtype, where).dtype, where, settings.quantization)
    folders = [] if adapter is None else [adapter.folder]
    loaded = load_model_for(task, source, how, tokenizer, folders)
    if adapter is not None:
        core.load_adapter(loaded.model, adapter, ADAPTER, allow=settings.allow)
    accelerate(loaded.model)
    context = PredictContext(where, task.target, tokenizer, settings.max_new_tokens)
    collate, pad, rows = task.objective.collate, padding_id(tokenizer), settings.batch_rows
    with evaluating(loaded.model):
        for at in range(0, len(encoded.sequences), rows):
            batch = collate(encoded.sequences[at : at + rows], pad, 0.0)
            some = encoded.records[at : at + rows]
            with torch.inference_mode(), oom_as_run_error(batch, " while predicting", oom_advice_for_evaluation):
                found = run(loaded.model, batch, some, context)
            for record, values in zip(some, found, strict=True):
                yield {"source": record.source, "line": record.line, **values}
