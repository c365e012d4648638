"""The loss of each task equals that of transformers' own model, in value and gradient, whatever the batches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit import hub
from lorakit.data import Labeled, Loader, Records, Split, Tagged, padding_id
from lorakit.data.records import Conversation, Message
from lorakit.tasks import TASKS, EncodeOptions, LabelOptions, Target, TaskOnData
from lorakit.tasks.choosing import load_model_for

WORDS = ["the", "cat sat", "on a mat", "and", "slept all day long", "here"]


def classified(label: Callable[[int], Any], pairs: bool = False) -> list[Any]:
    texts = [(word, "no, " + word) if pairs else (word,) for word in WORDS]
    return [Labeled(text, label(at), "d", at + 1) for at, text in enumerate(texts)]


def translation(source: str, target: str) -> Conversation:
    return Conversation((Message("user", source), Message("assistant", target)), is_instruction=True)


CASES = {
    "class": ("classification", "Bert", classified(lambda at: "abc"[at % 3])),
    "pair": ("classification", "Bert", classified(lambda at: "ab"[at % 2], pairs=True)),
    "classes": ("classification", "Roberta", classified(lambda at: ("a", "b", "c")[: at % 3])),
    "score": ("classification", "DistilBert", classified(lambda at: at / 4)),
    "tags": (
        "token-classification",
        "Bert",
        [Tagged(tuple(w.split()), tuple("OB"[len(x) % 2] for x in w.split())) for w in WORDS],
    ),
    "seq2seq": ("seq2seq", "T5", [translation(word, f"{word} {word}!") for word in WORDS]),
}


def test_every_task_has_a_case() -> None:
    # transformers has no loss of embeddings; that of tokens is compared in tests/train/loop/test_step_against_peft.py
    assert {name for name, *_ in CASES.values()} == {*TASKS} - {"causal-lm", "embedding"}


def prepared(case: str, model_directory: Callable[..., Path]) -> tuple[TaskOnData, Any, list[Any], int]:
    name, family, records = CASES[case]
    task = TASKS[name]
    source = hub.resolve(model_directory(family))
    tokenizer = hub.load_tokenizer(source)
    target = task.target(Split(Records(records), Records(), ""), LabelOptions())
    found = TaskOnData(task, target)
    torch.manual_seed(0)
    model = load_model_for(found, source, tokenizer=tokenizer).model
    encoded = task.encode(Records(records), tokenizer, target, EncodeOptions(64))
    return found, model, list(encoded.sequences), padding_id(tokenizer)


def their_labels(batch: Any, target: Target) -> Any:
    return batch.labels.float() if target.kind in ("classes", "score") else batch.labels


@pytest.mark.parametrize("case", CASES)
def test_the_loss_is_that_of_transformers(case: str, model_directory: Callable[..., Path]) -> None:
    task, model, rows, pad = prepared(case, model_directory)
    batch = next(Loader(rows, len(rows), 0, pad_id=pad, collate=task.objective.collate))
    ours = task.objective.loss_sum(model, batch, "cpu", None) / batch.trained_tokens
    ours.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, **batch.extra}
    theirs = model(**inputs, labels=their_labels(batch, task.target)).loss
    theirs.backward()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    expected = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(gradients) == len(expected)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_loss_does_not_depend_on_the_batches(case: str, model_directory: Callable[..., Path]) -> None:
    task, model, rows, pad = prepared(case, model_directory)
    totals = []
    for size in (1, 4, len(rows)):
        batches = list(Loader(rows, size, 0, pad_id=pad, collate=task.objective.collate, epochs=1))
        assert sum(batch.trained_tokens for batch in batches) == sum(
            1 if task.task.unit == "row" else sum(label != -100 for label in row.labels) for row in rows
        )
        with torch.no_grad():
            totals.append(sum(task.objective.loss_sum(model, batch, "cpu", None) for batch in batches))
    torch.testing.assert_close(totals[0], totals[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(totals[0], totals[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_metrics_of_perfect_outputs(case: str, model_directory: Callable[..., Path]) -> None:
    task, _, rows, pad = prepared(case, model_directory)
    assert task.objective.meter is not None
    meter = task.objective.meter()
    for batch in Loader(rows, 4, 0, pad_id=pad, collate=task.objective.collate, epochs=1):
        labels, kind = batch.labels, task.target.kind
        if kind == "score":
            output = labels[:, None]
        elif kind == "classes":
            output = 8 * labels - 4
        else:
            output = torch.nn.functional.one_hot(labels.clamp(min=0), 600 if kind == "none" else len(task.target.names))
        meter.add(batch, output.float())
    found = meter.result()
    assert found["mse" if task.target.kind == "score" else task.task.summary[0]] == (
        0 if task.target.kind == "score" else 1
    )


@pytest.mark.parametrize("scored", [False, True])
def test_embedding_losses_and_metrics_are_those_of_sentence_transformers(
    scored: bool, model_directory: Callable[..., Path], tmp_path: Path
) -> None:
    from scipy.stats import spearmanr
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses, modules
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    source = hub.resolve(model_directory("Bert", initializer_range=0.5))
    tokenizer = hub.load_tokenizer(source)
    records = [Labeled((word, word + " again"), at / 5 if scored else None) for at, word in enumerate(WORDS)]
    task = TASKS["embedding"]
    target = task.on_model(task.target(Split(Records(records), Records(), ""), LabelOptions()), source)
    model = hub.load_model(source, task="encoder")
    assert model.pooler is None  # files of masked language models have none
    encoded = task.encode(Records(records), tokenizer, target, EncodeOptions(64))
    objective = task.objective(target)
    batch = next(
        Loader(list(encoded.sequences), 6, 0, shuffle=False, pad_id=padding_id(tokenizer), collate=objective.collate)
    )
    ours = objective.loss_sum(model, batch, "cpu", None) / 6

    theirs = SentenceTransformer(
        modules=[modules.Transformer(source.path_or_id), modules.Pooling(32, "mean"), modules.Normalize()]
    )
    loss = losses.CoSENTLoss(theirs) if scored else losses.MultipleNegativesRankingLoss(theirs)
    features = [
        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask},
        {"input_ids": batch.extra["input_ids_1"], "attention_mask": batch.extra["attention_mask_1"]},
    ]
    expected = loss(features, batch.labels)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert objective.forward is not None and objective.meter is not None
    meter = objective.meter()
    with torch.no_grad():
        meter.add(batch, objective.forward(model, batch, "cpu"))
    if scored:
        with torch.no_grad():
            first, second = (theirs(dict(texts))["sentence_embedding"] for texts in features)
        expected = spearmanr(batch.labels, torch.cosine_similarity(first, second)).statistic
        assert meter.result()["spearman"] == pytest.approx(expected)
    else:
        evaluator = InformationRetrievalEvaluator(
            {str(at): record.texts[0] for at, record in enumerate(records)},
            {str(at): record.texts[1] for at, record in enumerate(records)},
            {str(at): {str(at)} for at in range(len(records))},
        )
        assert meter.result()["ndcg@10"] == pytest.approx(evaluator(theirs)["cosine_ndcg@10"])


def test_a_triplet_has_a_third_text(model_directory: Callable[..., Path]) -> None:
    source = hub.resolve(model_directory("Bert"))
    tokenizer, model = hub.load_tokenizer(source), hub.load_model(source, task="encoder")
    records = Records(Labeled((word, word + " again", "something else")) for word in WORDS)
    task = TASKS["embedding"]
    target = task.on_model(Target("pairs"), source)
    encoded = task.encode(records, tokenizer, target, EncodeOptions(64))
    objective = task.objective(target)
    batch = next(Loader(list(encoded.sequences), 6, 0, pad_id=padding_id(tokenizer), collate=objective.collate))
    assert objective.forward is not None
    assert objective.forward(model, batch, "cpu").shape == (3, 6, 32)
    two = Records(Labeled(record.texts[:2]) for record in records)
    encoded = task.encode(two, tokenizer, target, EncodeOptions(64))
    plain = next(Loader(list(encoded.sequences), 6, 0, pad_id=padding_id(tokenizer), collate=objective.collate))
    with torch.no_grad():
        assert objective.loss_sum(model, batch, "cpu", None) > objective.loss_sum(model, plain, "cpu", None)


@pytest.mark.parametrize("name", ["classification", "token-classification", "embedding"])
def test_a_decoder_stores_no_keys_and_values(name: str, tiny_llama: Any, tiny_model_directory: Path) -> None:
    """They take memory, and fused forward methods leave calls that store them to the model."""
    (tiny_model_directory / "chat_template.jinja").unlink()
    from transformers import LlamaForSequenceClassification, LlamaForTokenClassification, LlamaModel

    from lorakit.data import Batch

    kinds = {"classification": LlamaForSequenceClassification, "token-classification": LlamaForTokenClassification}
    model = kinds.get(name, LlamaModel)(tiny_llama.config)
    returned: list[Any] = []
    inner = getattr(model, "model", model)
    inner.register_forward_hook(lambda module, inputs, output: returned.append(output.past_key_values))
    ids = torch.tensor([[5, 6, 7], [8, 9, 0]])
    kind = {"token-classification": "tags", "embedding": "pairs"}.get(name, "class")
    target = Target(kind, () if kind == "pairs" else ("a", "b"))  # type: ignore[arg-type]
    forward = TASKS[name].objective(TASKS[name].on_model(target, hub.resolve(tiny_model_directory))).forward
    assert forward is not None
    extra = {"input_ids_1": ids, "attention_mask_1": torch.ones_like(ids)} if name == "embedding" else {}
    forward(model, Batch(ids, torch.ones_like(ids), torch.zeros(2, dtype=torch.long), 0.0, 5, 2, extra), "cpu")
    assert returned and all(cache is None for cache in returned)


@pytest.mark.parametrize("family", ["M2M100", "FSMT"])
def test_sequence_to_sequence_of_models_that_shift_labels_otherwise(family: str) -> None:
    """M2M100 has no method for it, and FSMT's replaces -100 in the labels that it is given."""
    import transformers

    from lorakit.data import Batch

    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_position_embeddings": 32}
    words = (
        {"vocab_size": 50} if family == "M2M100" else {"langs": ["a", "b"], "src_vocab_size": 50, "tgt_vocab_size": 50}
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**sizes, **words, decoder_start_token_id=2)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    ids, labels = torch.tensor([[5, 6, 2], [7, 2, 1]]), torch.tensor([[8, 9, 2], [10, 2, -100]])
    batch = Batch(ids, (ids != 1).long(), labels.clone(), 0.0, 10, 5)
    task = TASKS["seq2seq"].objective(Target())
    with torch.no_grad():
        ours = task.loss_sum(model, batch, "cpu", None) / 5
        theirs = model(input_ids=ids, attention_mask=batch.attention_mask, labels=labels.clone()).loss
    assert torch.equal(batch.labels, labels)
    if family == "M2M100":
        torch.testing.assert_close(ours, theirs)
