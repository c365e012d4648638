"""lorakit.generate.detokenizing: pieces add up to the whole, and no piece holds a part of a character."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lorakit.generate import TextStream

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "Größe: 3 €, 日本語 and 👩‍👩‍👧 😀 end",
    "한국어 텍스트도 한 글자씩 온전히",
    "  two  spaces\n\n\ttab . , ! word's end",
    "a\ufffdb replacement in the text",
]


def pieces(tokenizer: Any, ids: list[int], after: list[int] = []) -> list[str]:  # noqa: B006 - only read
    stream = TextStream(tokenizer, after)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.fixture
def sentencepiece() -> Any:
    """Return a tokenizer like that of Llama 2: a space is "▁", and characters outside the vocabulary are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["▁hello", "▁world", "▁", "he", "llo", "h", "e", "l", "o", "▁h", "▁he"]
    vocabulary = {token: i for i, token in enumerate(["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture
def wordpiece() -> Any:
    """Return a tokenizer like that of BERT: parts of words start with "##"."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["[UNK]", "play", "##ing", "##ed", "the", "game", ".", "!"])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_and_no_piece_breaks_a_character(tiny_tokenizer: Any, text: str) -> None:
    ids = tiny_tokenizer(text, add_special_tokens=False)["input_ids"]
    found = pieces(tiny_tokenizer, ids)
    assert "".join(found) == text
    assert ("\ufffd" in text) == any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_one_by_one(tiny_tokenizer: Any, text: str) -> None:
    vocabulary = tiny_tokenizer.get_vocab()
    ids = []
    for character in text:
        for token in tiny_tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(character):
            ids += [vocabulary[unit] for unit in token[0]]
    assert len(ids) == len(text.encode())
    found = pieces(tiny_tokenizer, ids)
    assert "".join(found) == text
    assert ("\ufffd" in text) == any("\ufffd" in piece for piece in found)


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_at_all_add_up_to_decoding_them_at_once(tiny_tokenizer: Any, seed: int) -> None:
    dice = random.Random(seed)
    ids = [dice.randrange(len(tiny_tokenizer)) for _ in range(80)]
    whole = tiny_tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces(tiny_tokenizer, ids)) == whole


def test_text_comes_as_soon_as_it_is_certain(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("The quick brown fox", add_special_tokens=False)["input_ids"]
    assert all(pieces(tiny_tokenizer, ids)[: len(ids)])


def test_a_character_that_never_becomes_whole_comes_last(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("ok €", add_special_tokens=False)["input_ids"][:-1]
    found = pieces(tiny_tokenizer, ids)
    assert "".join(found[:-1]) == "ok "
    assert set(found[-1]) == {"\ufffd"}


def test_special_tokens_leave_no_text(tiny_tokenizer: Any) -> None:
    end = tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids = tiny_tokenizer("hello world", add_special_tokens=False)["input_ids"]
    assert "".join(pieces(tiny_tokenizer, [end, *ids, end])) == "hello world"
    stream = TextStream(tiny_tokenizer, skip_special_tokens=False)
    assert stream.push(end) == "<|im_end|>"


def test_the_space_before_the_first_word_is_kept_after_a_prompt(sentencepiece: Any) -> None:
    ids = sentencepiece.convert_tokens_to_ids(["▁hello", "▁world", "▁h", "e", "llo"])
    assert "".join(pieces(sentencepiece, ids)) == "hello world hello"
    assert "".join(pieces(sentencepiece, ids[1:], ids[:1])) == " world hello"


def test_bytes_that_stand_for_what_the_vocabulary_lacks(sentencepiece: Any) -> None:
    ids = sentencepiece.convert_tokens_to_ids(["▁hello", *(f"<0x{byte:02X}>" for byte in "é€😀".encode()), "▁world"])
    found = pieces(sentencepiece, ids)
    assert "".join(found) == "helloé€😀 world"
    assert not any("\ufffd" in piece for piece in found)


def test_parts_of_words_are_joined(wordpiece: Any) -> None:
    ids = wordpiece.convert_tokens_to_ids(["play", "##ing", "the", "game", ".", "play", "##ed", "!"])
    whole = wordpiece.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(pieces(wordpiece, ids)) == whole == "playing the game . played !"
