"""Tokens of a long text in parts equal those of the whole text."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest

from lorakit.data import tokens

WORDS = "the quick brown fox jumps, it's over; the lazy dog's (not) mind\nfor i in range(10): 3.14 Wörter 速い狐。 émoji 😀".split()  # noqa: SIM905


def _text(words: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    between = [" ", " ", " ", "\n", "\n\n    ", ", "]
    return "".join(rng.choice(WORDS) + rng.choice(between) for _ in range(words))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "PART_CHARACTERS", 1024)
    monkeypatch.setattr(tokens, "SHARED_CHARACTERS", 256)


class Counted:
    """A tokenizer that records the length of every text it gets."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.is_fast = tokenizer.is_fast
        self.lengths: list[int] = []

    def __call__(self, text: str, **options: Any) -> Any:
        self.lengths.append(len(text))
        return self.tokenizer(text, **options)


def _sentencepiece(tokenizer: Any) -> Any:
    """Return a tokenizer that merges without splitting first, and marks a space before the text."""
    from tokenizers import Tokenizer, models, normalizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False, max_token_length=8)
    made.train_from_iterator(_text(400, seed=5).split(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def _byte_level(tokenizer: Any) -> Any:
    return tokenizer


@pytest.mark.parametrize("kind", [_byte_level, _sentencepiece])
@pytest.mark.parametrize("size", [1, 900, 1023, 1024, 1025, 2048, 7000])
def test_parts_joined_are_the_whole(kind: Any, size: int, tiny_tokenizer: Any) -> None:
    tokenizer = Counted(kind(tiny_tokenizer))
    text = _text(4000, seed=size)[:size]
    whole = tokenizer.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    parts = list(tokens.token_parts(tokenizer, (text[at : at + 100] for at in range(0, size, 100))))
    assert [token for part, _ in parts for token in part] == whole
    written = tokens.token_parts(tokenizer.tokenizer, [text], with_text=True)
    ids, pieces = zip(*written, strict=True)
    assert [token for part in ids for token in part] == whole and "".join(itertools.chain(*pieces)) == text
    if size == 7000:
        assert len(parts) > 4
        assert max(tokenizer.lengths) < 3500  # one part may have been extended


@pytest.mark.parametrize(
    "odd", [" " * 5000, "a" * 5000, "\n" * 3000, "ab 12 " * 800, "<|endoftext|>" * 400, "速" * 3000]
)
def test_text_without_a_place_to_part_is_taken_as_long_as_it_is(odd: str, tiny_tokenizer: Any) -> None:
    text = _text(300) + odd + _text(900, seed=1)
    whole = tiny_tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    assert [token for part, _ in tokens.token_parts(tiny_tokenizer, [text]) for token in part] == whole


def test_a_tokenizer_without_offsets_takes_the_whole_text() -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return {"input_ids": [ord(character) for character in text]}

    text = _text(2000)
    ((ids, _),) = tokens.token_parts(Slow(), [text])  # type: ignore[arg-type]
    assert ids == [ord(character) for character in text]


def test_no_more_is_read_than_is_needed(tiny_tokenizer: Any) -> None:
    read = 0

    def pieces() -> Iterator[str]:
        nonlocal read
        for at in range(40):
            read += 1
            yield _text(30, seed=at)

    parts = tokens.token_parts(tiny_tokenizer, pieces())
    assert next(parts)
    assert read < 30
