"""Law 14: a row's result does not depend on its neighbours: a row alone equals the row in a batch of any size.

Models are saved and loaded as a run loads them, so that config and tokenizer must agree on the padding token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.auto import modeling_auto

from lorakit import hub
from lorakit.architectures.families import depends_on_padding
from lorakit.data import Labeled, Records, Tagged
from lorakit.data.records import Conversation, Document, Message
from lorakit.errors import ModelError
from lorakit.speed import accelerate
from lorakit.tasks import TASKS, EncodeOptions, Target, TaskOnData, agree_on_padding, load_model_for, on_model

from ..speed.architectures import NotBuilt, build, small_settings

pytestmark = pytest.mark.filterwarnings("ignore")  # some models warn; the comparison decides

MAPPINGS = {
    "classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "embedding": "MODEL_MAPPING_NAMES",
}
"""Task -> transformers' mapping from model types to the classes that the task loads."""

TARGETS = {
    "classification": Target("class", ("a", "b")),
    "token-classification": Target("tags", ("a", "b")),
    "embedding": Target("pairs"),
}
LENGTHS = (2, 13, 1, 7, 60, 33)
TOLERANCE = 2e-5  # of the largest output


class Subject(NamedTuple):
    """A task, a model type and the class that the task loads for it."""

    task: str
    kind: str
    name: str


SAMPLE = {
    *(("classification", kind) for kind in ("bert", "roberta", "llama", "gpt2", "opt", "t5", "bart", "gemma3_text")),
    *(("token-classification", kind) for kind in ("distilbert", "modernbert", "qwen3")),
    *(("seq2seq", kind) for kind in ("t5", "bart")),
    *(("causal-lm", kind) for kind in ("llama", "gpt2", "mamba", "gpt_oss")),
    *(("embedding", kind) for kind in ("bert", "electra", "qwen3", "gemma3_text")),
    *(("classification", "xlnet"), ("token-classification", "fnet"), ("classification", "canine")),
}


def subjects() -> Iterator[Any]:
    """Return every class of every task once per model type that handles text."""
    texts = {kind for task in MAPPINGS if task != "embedding" for kind in getattr(modeling_auto, MAPPINGS[task])}
    texts |= set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
    for task, mapping in MAPPINGS.items():
        for kind, names in getattr(modeling_auto, mapping).items():
            if kind in texts:
                name = names if isinstance(names, str) else names[0]
                marks = () if (task, kind) in SAMPLE else (pytest.mark.slow,)
                yield pytest.param(Subject(task, kind, name), id=f"{task}-{name}-{kind}", marks=marks)


def tokenizer_of(side: str = "right", words: int = 57) -> Any:
    """Return a tokenizer of 60 words that writes an end token after each text, without a padding token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": 3 + number for number in range(words)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", padding_side=side
    )


def with_tokens(settings: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """Return a config's settings, and those of its parts, with the tokenizer's special tokens."""
    parts = {key: with_tokens(part, values) for key, part in settings.items() if isinstance(part, dict)}
    own = {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0} | values
    return settings | parts | {key: own[key] for key in own if key in settings or key in values}


def saved(subject: Subject, folder: Path, **values: Any) -> Path:
    """Write a small model with random weights and a tokenizer."""
    settings = with_tokens(small_settings(subject.kind, subject.name), values)
    settings |= {"decoder_start_token_id": 0} if subject.task == "seq2seq" else {}
    if "index_topk" in settings:  # at least the longest row, as in published models; see `families`
        settings["index_topk"] = max(LENGTHS) + 1
    if subject.kind == "encoder-decoder":  # as `from_encoder_decoder_pretrained` sets them
        settings["decoder"] |= {"is_decoder": True, "add_cross_attention": True}
    model = build(subject.kind, subject.name, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)  # new biases and scores are often zero or tiny
    model.save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


def records_for(task: str) -> list[Any]:
    texts = [" ".join(f"w{(3 * row + 5 * at) % 57}" for at in range(size)) for row, size in enumerate(LENGTHS)]
    if task == "token-classification":
        return [Tagged(tuple(text.split()), tuple("ab"[at % 2] for at in range(len(text.split())))) for text in texts]
    if task == "causal-lm":
        return [Document(text) for text in texts]
    if task == "seq2seq":
        pairs = zip(texts, reversed(texts), strict=True)
        return [Conversation((Message("user", a), Message("assistant", b)), is_instruction=True) for a, b in pairs]
    label = None if task == "embedding" else "a"
    return [Labeled((text, text[:20]) if task == "embedding" else (text,), label) for text in texts]


def results(task: TaskOnData, model: Any, rows: list[Any], pad: int) -> Tensor:
    """Return the total of what a batch says about its rows: outputs where the rows have text, and the loss."""
    batch = task.objective.collate(rows, pad, 0.0)
    with torch.no_grad():
        if task.objective.forward is None:
            return task.objective.loss_sum(model, batch, "cpu", None)[None].double()
        output = task.objective.forward(model, batch, "cpu").double()
    if task.task.name == "token-classification":
        return output[batch.attention_mask.bool()]
    if task.task.name == "seq2seq":
        return output[batch.labels != -100]
    return output.flatten(0, 1) if output.ndim == 3 and len(output) == 1 else output.transpose(0, -2).flatten(0, -2)


def check(subject: Subject, folder: Path, tokenizer: Any, *, accelerated: bool = False) -> None:
    source = hub.resolve(folder)
    task = on_model(TaskOnData(TASKS[subject.task], TARGETS.get(subject.task, Target())), source)
    pad = agree_on_padding(task, source, [tokenizer])
    model: Any = load_model_for(task, source, hub.LoadOptions("auto"), tokenizer).model
    if accelerated:
        accelerate(model)
    options = EncodeOptions(100, "split" if subject.task == "causal-lm" else "truncate")
    rows = list(task.task.encode(Records(records_for(subject.task)), tokenizer, task.target, options).sequences)
    alone = [results(task, model, [row], pad) for row in rows]
    limit = TOLERANCE * max(float(one.abs().max()) for one in alone)
    for size in (2, 3, len(rows)):
        for at in range(0, len(rows), size):
            together, apart = results(task, model, rows[at : at + size], pad), alone[at : at + size]
            expected = torch.stack(apart).sum(0) if subject.task == "causal-lm" else torch.cat(apart)
            torch.testing.assert_close(together, expected, rtol=0, atol=limit)


@pytest.mark.parametrize("subject", list(subjects()))
def test_a_row_alone_is_the_row_in_a_batch(subject: Subject, tmp_path: Path) -> None:
    head = TASKS[subject.task].loader
    try:
        folder = saved(subject, tmp_path / "model")
        model = getattr(transformers, hub.TASKS[head]).from_pretrained(folder)
    except (NotBuilt, ValueError, RuntimeError) as error:
        pytest.skip(f"transformers cannot save and load a small one: {error}")
    if subject.task == "seq2seq" and not model.config.is_encoder_decoder:
        pytest.skip("it reads speech")
    tokenizer = tokenizer_of()
    if depends_on_padding(subject.kind, head) or (head == "encoder" and model.config.is_encoder_decoder):
        with pytest.raises(ModelError, match=r"depend|an encoder and a decoder"):
            check(subject, folder, tokenizer)
        return
    check(subject, folder, tokenizer)


LLAMA = Subject("classification", "llama", "LlamaForSequenceClassification")
PADDINGS = {
    "config only": ({"pad_token_id": 1}, None, 1),
    "tokenizer only": ({"pad_token_id": None}, "<s>", 1),
    "neither": ({"pad_token_id": None}, None, 2),
    "both": ({"pad_token_id": 0}, "<s>", 0),
    "outside the vocabulary": ({"pad_token_id": None}, "[PAD]", 2),
    "config outside": ({"pad_token_id": -1}, None, 2),
}
"""Name -> config, the tokenizer's padding token, the id that both get."""


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", PADDINGS)
def test_model_and_tokenizer_agree_on_padding(case: str, side: str, tmp_path: Path) -> None:
    values, token, expected = PADDINGS[case]
    folder = saved(LLAMA, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))
    tokenizer = tokenizer_of(side, 61 if token == "[PAD]" else 57)
    if token is not None:
        tokenizer.add_special_tokens({"pad_token": token})
    tokenizer.save_pretrained(folder)
    tokenizer = hub.load_tokenizer(folder)
    check(LLAMA, folder, tokenizer)
    check(LLAMA, folder, tokenizer, accelerated=True)
    assert tokenizer.pad_token_id == expected
    task = TaskOnData(TASKS["classification"], TARGETS["classification"])
    assert load_model_for(task, hub.resolve(folder), tokenizer=tokenizer).model.config.pad_token_id == expected


@pytest.mark.parametrize(
    "subject", [LLAMA, Subject("causal-lm", "llama", "LlamaForCausalLM")], ids=lambda one: one.task
)
def test_an_ordinary_token_is_not_padding(subject: Subject, tmp_path: Path) -> None:
    """Defect 5: a head would read the last padding position, or skip the token where it ends a text."""
    folder = saved(subject, tmp_path / "model", pad_token_id=3)
    tokenizer = hub.load_tokenizer(folder)
    if subject is LLAMA:
        with pytest.raises(ModelError) as caught:
            check(subject, folder, tokenizer)
        assert (caught.value.field, caught.value.what, caught.value.where) == ("pad_token_id", "3", str(folder))
        assert tokenizer.pad_token is None
        return
    check(subject, folder, tokenizer)  # nothing reads the config's id
    assert tokenizer.pad_token == "</s>"
    model = load_model_for(TaskOnData(TASKS["causal-lm"], Target()), hub.resolve(folder), tokenizer=tokenizer).model
    assert (model.config.pad_token_id, model.generation_config.pad_token_id) == (2, 2)


def test_a_head_that_reads_the_end_token_needs_other_padding(tmp_path: Path) -> None:
    subject = Subject("classification", "t5", "T5ForSequenceClassification")
    folder = saved(subject, tmp_path / "model", pad_token_id=2)
    with pytest.raises(ModelError) as caught:
        check(subject, folder, hub.load_tokenizer(folder))
    assert caught.value.field == "pad_token_id"
