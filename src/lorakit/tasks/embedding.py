"""Embeddings of texts, trained on pairs with scores, or on pairs (or triplets) that belong together.

The losses and the metrics are those of sentence-transformers: CoSENT for scores, and the multiple negatives ranking
loss for pairs, in which the other rows of a batch serve as negatives. Both depend on the whole batch, so a larger batch
is not the same as gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.config import TaskType
from lorakit.data import AnyRecords, Batch, Record, Tokenizer
from lorakit.data.encoding import Sequence as Encoded
from lorakit.data.loader import padded_ids
from lorakit.durable import JsonObject
from lorakit.errors import MissingExtra
from lorakit.tasks.encoding import PAIRS, EncodedRows, encode_row, encode_rows
from lorakit.tasks.labels import pair_target
from lorakit.tasks.metrics import no_correlation
from lorakit.tasks.target import Target
from lorakit.tasks.task import EncodeOptions, Metrics, Objective, PredictContext, Task, finite, objective, without_cache

_DIGITS = 7  # of a number between -1 and 1 in float32


def encode(records: AnyRecords, tokenizer: Tokenizer, target: Target, options: EncodeOptions) -> EncodedRows:
    """Encode pairs of texts; see `encode_rows`.

    Raises:
        MissingExtra: The package `sentence-transformers` is not installed.
    """
    _losses()
    return encode_rows(records, tokenizer, target, options, PAIRS)


def collate(rows: list[Encoded], pad_id: int, epoch: float) -> Batch:
    """Combine sequences into a padded batch.

    The ids of the first texts are in `input_ids`; those of text number n, starting at 1, are in `extra` as
    `input_ids_n` and `attention_mask_n`. The labels, shape (rows,), are the scores; without scores, they are empty.
    """
    ids, mask = padded_ids([row.input_ids for row in rows], pad_id)
    extra = {}
    for number in range(1, 1 + min(len(row.others) for row in rows)):
        others = padded_ids([row.others[number - 1] for row in rows], pad_id)
        extra[f"input_ids_{number}"], extra[f"attention_mask_{number}"] = others
    labels = torch.tensor([float(row.labels[0]) for row in rows if row.labels])
    tokens = sum(len(part) for row in rows for part in (row.input_ids, *row.others))
    return Batch(ids, mask, labels, epoch, tokens, len(rows), extra)


def pooled(hidden: Tensor, mask: Tensor, pooling: str) -> Tensor:
    """Return the embedding of each text, scaled to length 1.

    Args:
        hidden: Hidden states of the last layer, shape (rows, length, width).
        mask: Attention mask, shape (rows, length).
        pooling: "mean" over the tokens, or "cls" for the first token.

    Returns:
        Embeddings, shape (rows, width), in float32.
    """
    hidden = hidden.float()
    if pooling == "cls":
        return functional.normalize(hidden[:, 0], dim=-1)
    weights = mask[..., None].to(hidden.dtype)
    return functional.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1), dim=-1)


def forward(model: nn.Module, batch: Batch, device: str | torch.device, pooling: str = "mean") -> Tensor:
    """Return the embeddings of all texts of a batch, shape (texts per row, rows, width)."""
    names = ["", *(f"_{number}" for number in range(1, 1 + len(batch.extra) // 2))]
    texts = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.extra}
    found = []
    for name in names:
        ids, mask = texts[f"input_ids{name}"].to(device), texts[f"attention_mask{name}"].to(device)
        output = model(input_ids=ids, attention_mask=mask, **without_cache(model))
        found.append(pooled(output.last_hidden_state, mask, pooling))
    return torch.stack(found)


def loss(embeddings: Tensor, batch: Batch, target: Target) -> Tensor:
    """Return the loss of a batch times its number of rows, a scalar.

    Args:
        embeddings: Embeddings, shape (texts per row, rows, width).
        batch: The batch.
        target: "score" for CoSENT, or "pairs" for the multiple negatives ranking loss.
    """
    losses = _losses()
    kind = losses.CoSENTLoss if target.kind == "score" else losses.MultipleNegativesRankingLoss
    labels = batch.labels.to(embeddings.device)
    return kind(nn.Identity()).compute_loss_from_embeddings(list(embeddings), labels) * len(batch.input_ids)


class EmbeddingMeter:
    """Collects the embeddings of an evaluation.

    Args:
        target: "score" for the rank correlation of the scores and the cosine similarities, or "pairs" for NDCG@10 of
            the second texts, among those of all rows, as results of a search for the first text.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._embeddings: list[Tensor] = []
        self._scores: list[float] = []
        self._texts: list[tuple[int, ...]] = []

    def add(self, batch: Batch, output: Tensor) -> None:
        """Add the embeddings of a batch, shape (texts per row, rows, width)."""
        self._embeddings.append(output[:2].cpu())
        self._scores += batch.labels.tolist()
        ids, mask = batch.extra["input_ids_1"], batch.extra["attention_mask_1"].bool()
        self._texts += [tuple(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)]

    def merge(self, other: EmbeddingMeter) -> None:
        """Add everything that another meter has collected."""
        self._embeddings += other._embeddings
        self._scores += other._scores
        self._texts += other._texts

    def result(self) -> Metrics:
        """Return "spearman", or "ndcg@10"; see `Metrics`."""
        first, second = torch.cat(self._embeddings, dim=1)
        if self._target.kind == "score":
            similarities = (first * second).sum(-1).numpy()
            if reason := no_correlation(similarities, np.asarray(self._scores)):
                return {"spearman": reason}
            found = _evaluated("EmbeddingSimilarityEvaluator", [first, second], scores=self._scores)
            return {"spearman": found["spearman_cosine"]}
        places: dict[tuple[int, ...], int] = {}  # of the first of equal texts
        for place, text in enumerate(self._texts):
            places.setdefault(text, place)
        numbers = {text: str(number) for number, text in enumerate(places)}
        queries = {str(number): str(number) for number in range(len(first))}
        relevant = {str(number): {numbers[text]} for number, text in enumerate(self._texts)}
        corpus = {name: name for name in numbers.values()}
        found = _evaluated(
            "InformationRetrievalEvaluator",
            [first, second[list(places.values())]],
            queries=queries,
            corpus=corpus,
            relevant_docs=relevant,
        )
        return {"ndcg@10": found["cosine_ndcg@10"]}


def _evaluated(name: str, embeddings: list[Tensor], **data: Any) -> dict[str, float]:
    """Return the metrics of an evaluator of sentence-transformers, given the embeddings that it would compute."""
    from sentence_transformers.sentence_transformer import evaluation
    from sentence_transformers.util import cos_sim

    class Known(getattr(evaluation, name)):  # type: ignore[misc]
        def embed_inputs(self, model: object, texts: list[str], **options: object) -> Any:
            return remaining.pop(0)

        def store_metrics_in_model_card_data(self, *values: object) -> None:
            """Do nothing: lorakit writes the model card."""

    remaining = list(embeddings)
    count = [str(number) for number in range(embeddings[0].shape[0])]
    if name == "EmbeddingSimilarityEvaluator":
        evaluator = Known(
            count, count, **data, main_similarity="cosine", similarity_fn_names=["cosine"], write_csv=False
        )
    else:
        evaluator = Known(**data, score_functions={"cosine": cos_sim}, write_csv=False)
    return {key: float(value) for key, value in evaluator(None).items()}


def predict(model: nn.Module, batch: Batch, records: Sequence[Record], context: PredictContext) -> list[JsonObject]:
    """Return the embedding of each text, or, for a pair of texts, their cosine similarity as `score`."""
    embeddings = finite(forward(model, batch, context.device, context.target.pooling).cpu())
    if len(embeddings) == 1:
        return [{"embedding": [round(value, _DIGITS) for value in row]} for row in embeddings[0].tolist()]
    return [{"score": score} for score in (embeddings[0] * embeddings[1]).sum(-1).tolist()]


def _losses() -> Any:
    """Return the module with the losses of sentence-transformers.

    Raises:
        MissingExtra: The package is not installed.
    """
    try:
        from sentence_transformers.sentence_transformer import losses
    except ImportError as cause:
        raise MissingExtra(
            "the task embedding needs the package sentence-transformers: pip install 'lorakit[embedding]'",
            what="sentence-transformers",
        ) from cause
    return losses


def _objective(target: Target) -> Objective:
    run: Callable[[nn.Module, Batch, str | torch.device], Tensor] = partial(forward, pooling=target.pooling)
    return objective(collate, run, partial(loss, target=target), partial(EmbeddingMeter, target))


EMBEDDING = Task(
    name="embedding",
    adapter_task=TaskType.FEATURE_EXTRACTION,
    loader="encoder",
    formats=("text-pair",),
    unit="row",
    target=pair_target,
    encode=encode,
    encode_one=partial(encode_row, encoder=PAIRS),
    objective=_objective,
    predict=predict,
    inputs=("classification", "text-pair"),
    summary=("spearman", "ndcg@10"),
    needs_batch=True,
)
