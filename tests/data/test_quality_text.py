"""Rows are shown as they were written: the judge is the string that went in, for tokenizers that all change it."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lorakit.data import Completion, Conversation, Document, Labeled, Message, Record, Records, Split, Tagged
from lorakit.data.encoding import shown_rows
from lorakit.data.quality import shown_tokens
from lorakit.tasks import TASKS, EncodeOptions, LabelOptions

from ..conftest import CHAT_TEMPLATE

WORDS = [
    "don't realize that the café serves naïve jalapeños",
    "한글 문장과 이모지 🎉 and 👨‍👩‍👧, ﬁve ① ½ words\n\n\tindented  text ",
    "Ünïcödé  e\u0301 \u200b ... https://example.org/a?b=c",
]
SPECIAL = ["<s>", "</s>", "[UNK]", "[CLS]", "[SEP]", "<|im_start|>", "<|im_end|>"]


def word_piece() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece()
    made.train_from_iterator(WORDS * 3, trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL))
    return made


def unigram() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made.train_from_iterator(
        WORDS * 3, trainers.UnigramTrainer(vocab_size=150, special_tokens=SPECIAL, unk_token="[UNK]")
    )
    return made


def byte_fallback() -> Tokenizer:
    """Like Llama 2's: spaces are letters of the vocabulary, and unknown characters are bytes."""
    names = [*SPECIAL, *(f"<0x{number:02X}>" for number in range(256)), *"▁abcdefghijklmnopqrstuvwxyz'"]
    made = Tokenizer(
        models.BPE({name: number for number, name in enumerate(names)}, [], unk_token="[UNK]", byte_fallback=True)
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(SPECIAL)
    return made


def byte_level(trim_offsets: bool) -> Tokenizer:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        WORDS * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    made.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return made


KINDS = {
    "WordPiece": word_piece,
    "Unigram": unigram,
    "byte fallback": byte_fallback,
    "byte-level": functools.partial(byte_level, trim_offsets=False),
    "byte-level, trimmed": functools.partial(byte_level, trim_offsets=True),
}


@functools.cache
def tokenizer_of(kind: str) -> Any:
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    made = KINDS[kind]()
    ends = [(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    around = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", ends)
    steps = [around] if made.post_processor is None else [made.post_processor, around]
    made.post_processor = processors.Sequence(steps)
    return PreTrainedTokenizerFast(tokenizer_object=made, **names, chat_template=CHAT_TEMPLATE)


ODD = [
    "don't",
    "café",
    "cafe\u0301",
    "한글",
    "🎉",
    "👨‍👩‍👧",
    "ﬁ①½",
    "  ",
    "\n\n",
    "\t",
    "\x00",
    "\u200b",
    "שלום",
    "ǅ",
    "İ",
    "[SEP]",
]
TEXTS = st.lists(st.one_of(st.sampled_from([*ODD, " ", "a", "realize"]), st.text(max_size=6)), max_size=8).map("".join)
WITH_KINDS = pytest.mark.parametrize("kind", KINDS)


def shown(row: Any, tokenizer: Any, names: tuple[str, ...] = ()) -> str:
    return "".join(token.text for token in shown_tokens(row, tokenizer, names))


def has_tokens(tokenizer: Any, *texts: str) -> bool:
    return all(text.strip() and tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts)


@WITH_KINDS
@given(text=TEXTS, length=st.integers(2, 9))
@example(text="".join(f" {one} " for one in ODD), length=3)
@settings(max_examples=60, deadline=None)
def test_documents(kind: str, text: str, length: int) -> None:
    tokenizer = tokenizer_of(kind)
    assume(has_tokens(tokenizer, text))
    (whole,) = shown_rows(Document(text), tokenizer, 10_000, "truncate")
    end = "" if tokenizer(text, add_special_tokens=False)["input_ids"][-1] == tokenizer.eos_token_id else "</s>"
    assert shown(whole, tokenizer) == text + end
    assert sum(token.count for token in shown_tokens(whole, tokenizer)) == len(whole)
    first, *others = shown_rows(Document(text), tokenizer, length, "truncate")
    pieces = [*first.pieces[0], *(piece for row in others for piece in row.pieces[0][1:])]  # the first is context
    assert "".join(pieces) == text + end


@WITH_KINDS
@given(prompt=TEXTS, answer=TEXTS, length=st.integers(2, 12))
@settings(max_examples=60, deadline=None)
def test_completions(kind: str, prompt: str, answer: str, length: int) -> None:
    tokenizer = tokenizer_of(kind)
    assume(has_tokens(tokenizer, prompt, answer))
    record = Completion(prompt, answer)
    (row,) = shown_rows(record, tokenizer, 10_000, "truncate")
    text = shown(row, tokenizer)
    assert text.removesuffix("</s>") == (prompt + answer).removesuffix("</s>")
    for cut in shown_rows(record, tokenizer, length, "truncate"):
        assert cut.pieces[0] == row.pieces[0][: len(cut)] and text.startswith(shown(cut, tokenizer))


@pytest.mark.parametrize("kind", ["byte-level", "byte-level, trimmed", "byte fallback"])
@given(answers=st.lists(TEXTS, min_size=1, max_size=3))
@settings(max_examples=40, deadline=None)
def test_conversations(kind: str, answers: list[str]) -> None:
    tokenizer = tokenizer_of(kind)
    turns = tuple(turn for text in answers for turn in (Message("user", f"café {text}"), Message("assistant", text)))
    for row in shown_rows(Conversation(turns), tokenizer, 10_000, "truncate"):
        text = tokenizer.apply_chat_template([turn.as_dict() for turn in turns], tokenize=False)
        assert shown(row, tokenizer) == text


OTHERS = {"classification": Labeled(("a",), "ham"), "token-classification": Tagged(("a", "b"), ("B-X", "O"))}


def encoded(task: str, record: Record, tokenizer: Any, length: int = 10_000) -> Any:
    found, other = TASKS[task], OTHERS.get(task, record)
    target = found.target(Split(Records([record, other]), Records(), ""), LabelOptions())
    (row,) = found.encode_one(record, tokenizer, target, EncodeOptions(length, shown=1))
    return row, target


@WITH_KINDS
@given(first=TEXTS, second=TEXTS, length=st.integers(6, 16), side=st.sampled_from(["left", "right"]))
@settings(max_examples=60, deadline=None)
def test_labeled_texts_and_pairs(kind: str, first: str, second: str, length: int, side: str) -> None:
    tokenizer = tokenizer_of(kind)
    assume(has_tokens(tokenizer, first, second))
    tokenizer.truncation_side = side
    for texts in ((first,), (first, second)):
        record = Labeled(texts, "spam")
        row, target = encoded("classification", record, tokenizer)
        assert shown(row, tokenizer, target.names) == f"[CLS]{'[SEP]'.join(texts)}[SEP] spam"
        kept = tokenizer(*texts, truncation=True, max_length=length)
        cut, _ = encoded("classification", record, tokenizer, length)
        assert list(cut.input_ids) == kept["input_ids"]
        for number, text in enumerate(texts):
            own = [piece for piece, one in zip(cut.pieces[0], kept.sequence_ids(), strict=True) if one == number]
            assert text.startswith("".join(own)) if side == "right" else text.endswith("".join(own))


@WITH_KINDS
@given(first=TEXTS, second=TEXTS)
@settings(max_examples=40, deadline=None)
def test_texts_of_their_own(kind: str, first: str, second: str) -> None:
    tokenizer = tokenizer_of(kind)
    assume(has_tokens(tokenizer, first, second, first.strip()))
    tokenizer.truncation_side = "right"
    row, _ = encoded("seq2seq", Completion(first, second), tokenizer)
    tokens = list(shown_tokens(row, tokenizer))
    assert "".join(token.text for token in tokens if token.is_trained) == f"[CLS]{second}[SEP]"
    assert "".join(token.text for token in tokens if not token.is_trained) == f"[CLS]{first.strip()}[SEP] "


@WITH_KINDS
@given(words=st.lists(TEXTS.map(str.strip).filter(bool), min_size=1, max_size=5))
@settings(max_examples=40, deadline=None)
def test_words_with_tags(kind: str, words: list[str]) -> None:
    tokenizer = tokenizer_of(kind)
    assume(has_tokens(tokenizer, *words))
    record = Tagged(tuple(words), tuple(itertools.islice(itertools.cycle(["B-X", "O"]), len(words))))
    row, _ = encoded("token-classification", record, tokenizer)
    assert shown(row, tokenizer) == f"[CLS]{' '.join(words)}[SEP]"


@pytest.mark.parametrize("text", ["a realize cafe don't", "café 한글 realizing", "Ünïcödé words"])
def test_a_truncated_row_is_the_text_of_its_tokens(text: str) -> None:
    """The shown text is the shortest that begins with the tokens of the row; a letter may have several tokens."""
    tokenizer = tokenizer_of("WordPiece")
    for length in range(3, len(tokenizer(text)["input_ids"])):
        row, _ = encoded("classification", Labeled((text,), "spam"), tokenizer, length)
        part = "".join(row.pieces[0]).removeprefix("[CLS]").removesuffix("[SEP]")
        own = list(row.input_ids)[1:-1]
        assert text.startswith(part) and tokenizer(part)["input_ids"][1 : len(own) + 1] == own
        assert tokenizer(part[:-1])["input_ids"][1:-1][: len(own)] != own


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
@pytest.mark.parametrize("character", ["👨‍👩‍👧", "👍🏽", "e\u0301", "한", "❤\ufe0f", "की"])
def test_characters_of_several_tokens_stay_whole(kind: str, character: str) -> None:
    tokenizer = tokenizer_of(kind)
    (row,) = shown_rows(Document(f"a {character}{character} b"), tokenizer, 64, "truncate")
    texts = [token.text.strip() for token in shown_tokens(row, tokenizer)]
    assert texts.count(character) == 2 or character * 2 in texts


def test_a_tokenizer_without_offsets_decodes() -> None:
    tokenizer = KINDS["WordPiece"]()

    class Slow(PreTrainedTokenizerFast):
        is_fast = False

    slow = Slow(tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="</s>")
    (row,) = shown_rows(Document("The café"), slow, 64, "truncate")
    assert row.pieces == () and shown(row, slow) == slow.decode(row.input_ids)
