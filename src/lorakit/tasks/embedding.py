"""Embeddings of texts, trained on pairs with scores, or on pairs (or triplets) that belong together.

A text's embedding is that of `SentenceTransformer.encode`: sentence-transformers reads the modules after the
transformer (pooling, dense layers, normalization) and the prompts, and computes them. The losses are its own, too:
CoSENT for scores, and the multiple negatives ranking loss for pairs, in which the other rows of a batch serve as
negatives. Both depend on the whole batch, so a larger batch is not the same as gradient accumulation.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit import hub
from lorakit.config import TaskType
from lorakit.data import AnyRecords, Batch, Encoded, Record, Tokenizer
from lorakit.data.encoding import Sequence as Row
from lorakit.data.loader import padded_ids
from lorakit.durable import JsonObject, JsonValue, write_json
from lorakit.errors import AdapterFileError, ConfigError, MissingExtra, ModelError
from lorakit.hub.packaged import quiet_imports
from lorakit.hub.sources import WEIGHTS
from lorakit.tasks.encoding import PAIRS, encode_row, encode_rows
from lorakit.tasks.labels import pair_target
from lorakit.tasks.metrics import score_metrics
from lorakit.tasks.target import Target
from lorakit.tasks.task import (
    EncodeOptions,
    Meter,
    Metrics,
    Objective,
    PredictContext,
    Task,
    finite,
    objective,
    without_cache,
)

_DIGITS = 7  # of a number between -1 and 1 in float32
_RANKED, _COMPARED = 10, 1024

MODULES = ("Pooling", "Dense", "Normalize", "LayerNorm", "Dropout")
"""Modules of sentence-transformers that may follow the transformer; the others need more than its hidden states."""

PLAIN = {
    "transformer_task": "feature-extraction",
    "module_output_name": "token_embeddings",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
}
"""Settings of the transformer module that lorakit computes; empty values have no effect."""

LONGEST = 1 << 30
"""Smallest length of a tokenizer without a limit."""

_READ = ("max_seq_length", "do_lower_case", "unpad_inputs")
"""Settings that `Embedder` reads, or that do not change embeddings."""


class Embedder:
    """Turns hidden states into embeddings, as `SentenceTransformer.encode` does.

    A model without files of sentence-transformers gets the mean over the tokens or, if causal, the last token. `prompt`
    is put before each text; `max_length` is the maximum length of a text in tokens, or None.

    Raises:
        MissingExtra: The package `sentence-transformers` is not installed.
        ModelError: The model has modules, settings or a chat template that lorakit does not support or cannot read.
    """

    def __init__(self, source: hub.ModelSource) -> None:
        _check_installed()
        tokenizer = hub.load_tokenizer(source)
        self._pipeline, settings = _pipeline_of(source, has_template=tokenizer.chat_template is not None)
        self._pipeline.requires_grad_(False)
        if settings.get("do_lower_case") and tokenizer("A")["input_ids"] != tokenizer("a")["input_ids"]:
            raise _unsupported(source, "do_lower_case, which its tokenizer does not apply")
        if any(tokenizer("a").get("token_type_ids") or ()):
            raise _unsupported(source, "token types, which lorakit gives to pairs only")
        self.max_length = settings.get("max_seq_length") or _longest(tokenizer, hub.config_of(source))
        self.prompt: str = self._pipeline.prompts.get(self._pipeline.default_prompt_name) or ""
        ids = tokenizer(self.prompt)["input_ids"] if self.prompt else []
        # the end token follows the text
        self._prompt_length = len(ids) - (ids[-1] in tokenizer.all_special_ids) if ids else 0

    def as_dict(self) -> JsonObject:
        """Return the modules and the settings as plain JSON values, for `lorakit.json`."""
        modules: list[JsonValue] = []
        for module in self._pipeline:
            digest = hashlib.sha256()
            for name, tensor in sorted(module.state_dict().items()):
                digest.update(name.encode() + tensor.float().numpy().tobytes())
            weights = {"weights_sha256": digest.hexdigest()} if module.state_dict() else {}
            settings = json.loads(json.dumps(module.get_config_dict()))  # tuples become lists
            modules.append({"type": type(module).__name__, **settings, **weights})
        rest: JsonObject = {"prompt": self.prompt, "max_length": self.max_length, "width": self._pipeline.truncate_dim}
        return {"modules": modules, **rest}

    def limited(self, options: EncodeOptions) -> EncodeOptions:
        """Return the options for the encoding of texts, with the model's prompt and within its length."""
        length = options.max_length if self.max_length is None else min(options.max_length, self.max_length)
        return replace(options, max_length=length, prompt=self.prompt)

    def embed(self, hidden: Tensor, ids: Tensor, mask: Tensor, *, is_training: bool = False) -> Tensor:
        """Return the embedding of each text (rows, width) in float32, from hidden states (rows, length, width)."""
        features: dict[str, Any] = {"token_embeddings": hidden.float(), "input_ids": ids, "attention_mask": mask}
        if self._prompt_length:
            features["prompt_length"] = self._prompt_length
        embedding = self._pipeline.to(hidden.device).train(is_training)(features)["sentence_embedding"]
        return embedding[..., : self._pipeline.truncate_dim]


def _longest(tokenizer: Any, config: Any) -> int | None:
    """Return the length to which sentence-transformers truncates texts if its own files do not say it."""
    context = getattr(config, "max_position_embeddings", -1)
    length = min(tokenizer.model_max_length, context if context > 0 else tokenizer.model_max_length)
    return length if length < LONGEST else None


def _pipeline_of(source: hub.ModelSource, *, has_template: bool) -> tuple[Any, dict[str, Any]]:
    """Return a SentenceTransformer with the modules after the transformer, and the transformer's settings."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    config, folder = hub.config_of(source), hub.embedding_folder(source)
    if config.is_encoder_decoder:
        raise _unsupported(source, "an encoder and a decoder")
    if folder is None and has_template:
        text = (
            f"{source.given}: has a chat template, but no {hub.EMBEDDING_LIST}: SentenceTransformer would embed each "
            "text as a chat message, which lorakit does not support. Use a copy of the model without the template "
            "(chat_template.jinja, or chat_template in tokenizer_config.json)."
        )
        raise ModelError(text, what="chat_template", where=source.given, field=hub.EMBEDDING_LIST)
    if folder is None:
        name = (config.architectures or [""])[0]
        mode = "lasttoken" if name.endswith("ForCausalLM") and getattr(config, "is_causal", True) else "mean"
        return SentenceTransformer(modules=[Pooling(config.get_text_config().hidden_size, mode)], device="cpu"), {}
    pickled = [path for path in folder.glob("*/*.bin") if not path.with_name(WEIGHTS).is_file()]
    if pickled:
        raise _unsupported(source, f"pickle weights ({pickled[0].relative_to(folder)}), which are not loaded")
    try:
        settings = Transformer.load_config(str(folder))
        listed = json.loads((folder / hub.EMBEDDING_LIST).read_text(encoding="utf-8"))
        with tempfile.TemporaryDirectory() as place:
            for name in ("config_sentence_transformers.json", *(one["path"] for one in listed[1:])):
                if (folder / name).exists():
                    (Path(place) / name).parent.mkdir(parents=True, exist_ok=True)
                    (Path(place) / name).symlink_to((folder / name).resolve())
            write_json(Path(place) / hub.EMBEDDING_LIST, listed[1:])
            pipeline = SentenceTransformer(place, device="cpu", local_files_only=True)
    except Exception as cause:  # modules may raise anything
        raise _unsupported(source, f"modules that cannot be loaded ({' '.join(str(cause).split())[:240]})") from cause
    other = [key for key, value in settings.items() if value and value != PLAIN.get(key) and key not in _READ]
    kinds = [listed[0]["type"].rpartition(".")[2], *(type(module).__name__ for module in pipeline)]
    unknown = [kind for kind in kinds[1:] if kind not in MODULES]
    if kinds[0] != "Transformer" or unknown or other:
        raise _unsupported(source, [*other, *unknown, kinds[0]][0])
    return pipeline, settings


def _unsupported(source: hub.ModelSource, what: str) -> ModelError:
    text = (
        f"{source.given}: embeds texts with {what}; lorakit supports one transformer followed by "
        f"{', '.join(MODULES)}. If the model is in an older format, save it again with SentenceTransformer.save."
    )
    return ModelError(text, what=what, where=source.given, field=hub.EMBEDDING_LIST)


def embedder_of(target: Target) -> Embedder:
    """Return the embedder of a target; a ConfigError if `on_model` was not called for it."""
    if target.embedder is None:
        text = "the target does not say how the model embeds texts; see lorakit.tasks.on_model."
        raise ConfigError(text, field="embedder")
    return target.embedder


def on_model(target: Target, source: hub.ModelSource) -> Target:
    """Return a target, which records how its base embeds texts if it is that of an adapter, with a model's embedder.

    Raises:
        AdapterFileError: The adapter was trained with other modules or settings.
        LorakitError: The model's embeddings are not supported; see `Embedder`.
    """
    embedder = Embedder(source)
    current = embedder.as_dict()
    if target.embedding and not _is_same(target.embedding, current):
        text = (
            f"{source.given}: embeds texts with {json.dumps(current)}, but the adapter was trained with "
            f"{json.dumps(target.embedding)}; use the base that it was trained on, or train again."
        )
        raise AdapterFileError(text, where=source.given, field="embedding")
    return replace(target, embedding=current, embedder=embedder)


def _is_same(recorded: JsonObject, current: JsonObject) -> bool:
    """Return whether a record describes the same embeddings, as far as both describe them."""
    before, now = (_parts(one) for one in (recorded, current))
    if "pooling" in recorded:  # earlier releases knew no other modules, and normalized always
        is_simple = {one["type"] for one in now[1:]} <= {"Pooling", "Normalize"}
        return is_simple and recorded["pooling"] == now[1].get("pooling_mode")
    return len(before) == len(now) and all(
        {key: value for key, value in one.items() if key in other} == {key: other[key] for key in one if key in other}
        for one, other in zip(before, now, strict=True)
    )


def _parts(record: JsonObject) -> list[JsonObject]:
    modules = record.get("modules")
    rest: JsonObject = {key: value for key, value in record.items() if key != "modules"}
    return [rest, *(one for one in (modules if isinstance(modules, list) else ()) if isinstance(one, dict))]


def encode(records: AnyRecords, tokenizer: Tokenizer, target: Target, options: EncodeOptions) -> Encoded:
    """Encode pairs of texts; see `encode_rows`."""
    return encode_rows(records, tokenizer, target, embedder_of(target).limited(options), PAIRS)


def encode_one(record: Record, tokenizer: Tokenizer, target: Target, options: EncodeOptions) -> list[Row]:
    """Encode a pair of texts; see `encode_row`."""
    return encode_row(record, tokenizer, target, embedder_of(target).limited(options), PAIRS)


def collate(rows: list[Row], pad_id: int, epoch: float) -> Batch:
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


def forward(model: nn.Module, batch: Batch, device: str | torch.device, target: Target) -> Tensor:
    """Return the embeddings of all texts of a batch, shape (texts per row, rows, width), in float32."""
    names = ["", *(f"_{number}" for number in range(1, 1 + len(batch.extra) // 2))]
    texts = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.extra}
    embeddings = []
    for name in names:
        ids, mask = texts[f"input_ids{name}"].to(device), texts[f"attention_mask{name}"].to(device)
        output = model(input_ids=ids, attention_mask=mask, **without_cache(model))
        embeddings.append(embedder_of(target).embed(output.last_hidden_state, ids, mask, is_training=model.training))
    return torch.stack(embeddings)


def loss(embeddings: Tensor, batch: Batch, target: Target) -> Tensor:
    """Return the loss of embeddings (texts per row, rows, width) times the number of rows, a scalar.

    It is CoSENT for scores, and the multiple negatives ranking loss for pairs.
    """
    _check_installed()
    from sentence_transformers.sentence_transformer import losses

    kind = losses.CoSENTLoss if target.kind == "score" else losses.MultipleNegativesRankingLoss
    labels = batch.labels.to(embeddings.device)
    plain: Any = nn.Identity()  # the embeddings are computed already
    return kind(plain).compute_loss_from_embeddings(list(embeddings), labels) * len(batch.input_ids)


_Pair: TypeAlias = tuple[Tensor, "float | None", tuple[int, ...]]
"""The embeddings (2, width) of the first two texts of a row, its score if it has one, and its second text's tokens."""


def _embedded(batch: Batch, embeddings: Tensor) -> list[_Pair]:
    """Return what the metrics need of each row, given the embeddings (texts per row, rows, width) of a batch."""
    ids, mask = batch.extra["input_ids_1"], batch.extra["attention_mask_1"].bool()
    texts = [tuple(row[kept].tolist()) for row, kept in zip(ids, mask, strict=True)]
    pairs = [pair.clone() for pair in embeddings[:2].cpu().unbind(1)]  # a view would be sent with the whole batch
    return list(zip(pairs, batch.labels.tolist() or [None] * len(texts), texts, strict=True))


def _metrics(rows: Sequence[_Pair], target: Target) -> Metrics:
    """Return "spearman" of scores and cosine similarities, or "ndcg@10" of pairs.

    The latter ranks the second texts of all rows as results of a search for the first text of each row.
    """
    first, second = functional.normalize(torch.stack([pair for pair, _, _ in rows], dim=1), dim=-1)
    if target.kind == "score":
        scores = [score for _, score, _ in rows if score is not None]
        return {"spearman": score_metrics((first * second).sum(-1).numpy(), scores)["spearman"]}
    texts = [text for _, _, text in rows]
    places = {text: place for place, text in reversed(list(enumerate(texts)))}  # of the first of equal texts
    if len(places) < 2:
        return {"ndcg@10": "a ranking needs at least 2 different second texts, but the evaluation data has 1"}
    numbers = {text: number for number, text in enumerate(places)}
    gains = _gains(first, second[list(places.values())], torch.tensor([numbers[text] for text in texts]))
    return {"ndcg@10": float(gains.mean())}


def _gains(queries: Tensor, results: Tensor, wanted: Tensor) -> Tensor:
    """Return 1 / log2(1 + rank) of the wanted result of each query (queries,), or 0 below `_RANKED` results.

    Queries (queries, width) and results (results, width) have length 1. Of equally similar results, the wanted one is
    the last.
    """
    ranks = list[Tensor]()
    for part, number in zip(queries.split(_COMPARED), wanted.split(_COMPARED), strict=True):
        similar = part @ results.T
        ranks.append((~(similar < similar.gather(1, number[:, None]))).sum(1))  # NaN is last, too
    rank = torch.cat(ranks)
    return torch.where(rank <= _RANKED, 1 / torch.log2(1 + rank), 0.0)


def predict(model: nn.Module, batch: Batch, records: Sequence[Record], context: PredictContext) -> list[JsonObject]:
    """Return the embedding of each text, or, for a pair of texts, their cosine similarity as `score`."""
    embeddings = finite(forward(model, batch, context.device, context.target).cpu())
    if len(embeddings) == 1:
        return [{"embedding": [round(value, _DIGITS) for value in row]} for row in embeddings[0].tolist()]
    return [{"score": score} for score in functional.cosine_similarity(embeddings[0], embeddings[1]).tolist()]


def _check_installed() -> None:
    """Raise MissingExtra if sentence-transformers is not installed."""
    try:
        with quiet_imports():
            import sentence_transformers  # noqa: F401
    except ImportError as cause:
        text = "the task embedding needs the package sentence-transformers: pip install 'lorakit[embedding]'"
        raise MissingExtra(text, what="sentence-transformers") from cause


def _objective(target: Target) -> Objective:
    run: Callable[[nn.Module, Batch, str | torch.device], Tensor] = partial(forward, target=target)
    return objective(
        collate, run, partial(loss, target=target), partial(Meter, _embedded, partial(_metrics, target=target))
    )


EMBEDDING = Task(
    name="embedding",
    adapter_task=TaskType.FEATURE_EXTRACTION,
    loader="encoder",
    formats=("text-pair",),
    unit="row",
    target=pair_target,
    on_model=on_model,
    encode=encode,
    encode_one=encode_one,
    objective=_objective,
    predict=predict,
    inputs=("classification", "text-pair"),
    summary=("spearman", "ndcg@10"),
    needs_batch=True,
)
