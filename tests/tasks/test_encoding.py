"""Labeled rows as sequences: tokens as transformers makes them, tags at the first token of a word, counts."""

from __future__ import annotations

from typing import Any

import pytest

from lorakit.data import Labeled, Records, Tagged
from lorakit.data.encoding import IGNORED
from lorakit.data.records import Completion
from lorakit.errors import ConfigError, DataError, ModelError
from lorakit.tasks import TASKS, EncodeOptions, Target

CLASSES = Target("class", ("a", "b"))


def encoded(task: str, records: list[Any], tokenizer: Any, target: Target = CLASSES, **options: Any) -> Any:
    return TASKS[task].encode(Records(records), tokenizer, target, EncodeOptions(**{"max_length": 32, **options}))


def test_texts_and_pairs_are_tokenized_as_by_transformers(tiny_tokenizer: Any) -> None:
    found = encoded("classification", [Labeled(("one text",), "a"), Labeled(("one", "two"), "b")], tiny_tokenizer)
    for row, given in zip(found.sequences, [("one text",), ("one", "two")], strict=True):
        assert list(row.input_ids) == tiny_tokenizer(*given)["input_ids"]
    assert [list(row.labels) for row in found.sequences] == [[0], [1]]
    assert found.report.labels == {"a": 1, "b": 1}


def test_long_rows(tiny_tokenizer: Any) -> None:
    rows = [Labeled(("word " * 50,), "a", "f", 1), Labeled(("short",), "b", "f", 2)]
    found = encoded("classification", rows, tiny_tokenizer, max_length=8)
    assert len(found.sequences[0]) == 8
    assert found.report.cut_rows == 1
    assert any("truncated to 8 tokens" in line for line in found.report.lines())
    dropped = encoded("classification", rows, tiny_tokenizer, max_length=8, overlong="drop")
    assert (dropped.report.sequences, dropped.report.cut_rows) == (1, 1)
    with pytest.raises(DataError, match=r"f:1.*max_length is 8"):
        encoded("classification", rows, tiny_tokenizer, max_length=8, overlong="error")
    with pytest.raises(ConfigError, match="labels belong to whole rows"):
        encoded("classification", rows, tiny_tokenizer, overlong="split")


def test_rows_that_do_not_fit(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="the model has a, b; use `--label-map c=NAME`") as caught:
        encoded("classification", [Labeled(("x",), "c", "f", 3)], tiny_tokenizer)
    assert (caught.value.what, caught.value.where, caught.value.field) == ("c", "f:3", "label_map")
    with pytest.raises(DataError, match=r"f:1.*needs 'text' and 'label'"):
        encoded("classification", [Tagged(("x",), ("O",), "f", 1)], tiny_tokenizer)
    with pytest.raises(DataError, match="No row contributes"):
        encoded("classification", [Labeled((" ",), "a")], tiny_tokenizer)


def test_counts_and_warnings(tiny_tokenizer: Any) -> None:
    rows = [Labeled((f"text {at}",), "a" if at else "b") for at in range(40)] + [Labeled(("",), "a")] * 2
    report = encoded("classification", rows, tiny_tokenizer).report
    lines = "\n".join(report.lines())
    assert (report.rows, report.sequences, report.empty_rows, report.duplicate_rows) == (42, 40, 2, 1)
    assert "labels: a 39 (98%), b 1 (2%)" in lines
    assert "98% of the labels are the same class" in lines
    assert "1 class with fewer than 10 rows: b" in lines
    assert report.as_dict()["labels"] == {"a": 39, "b": 1}


@pytest.mark.parametrize(
    "words", [["Hello", "world", "!"], ["naïve", "café", "日本語", "x"], ["a", "", "b"], ["<|im_end|>", "a"]]
)
def test_each_word_is_tagged_at_its_first_token(words: list[str], tiny_tokenizer: Any) -> None:
    text = " ".join(words)
    offsets = tiny_tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    begin = 0
    (row,) = encoded("token-classification", [Tagged(tuple(words))], tiny_tokenizer, is_labeled=False).sequences
    places = {word: place for place, word in enumerate(row.labels) if word != IGNORED}
    for word, place in zip(words, map(places.get, range(len(words))), strict=True):
        if word:
            assert place is not None
            first, last = offsets[place]
            assert begin - 1 <= first < begin + len(word) and last > begin
            assert place == 0 or offsets[place - 1][1] <= begin
        else:
            assert place is None
        begin += len(word) + 1


def test_tags_that_are_cut_off_are_counted(tiny_tokenizer: Any) -> None:
    target = Target("tags", ("B", "O"))
    row = Tagged(tuple("abcdefgh"), tuple("BOBOBOBO"), "f", 1)
    found = encoded("token-classification", [row], tiny_tokenizer, target, max_length=4)
    assert found.report.cut_words == 8 - found.report.trained_tokens > 0
    with pytest.raises(DataError) as caught:
        encoded("token-classification", [Tagged(("a",), ("X",))], tiny_tokenizer, target)
    assert (caught.value.what, caught.value.allowed) == ("X", ("B", "O"))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("length", range(1, 12))
def test_truncation_leaves_out_words_and_moves_no_tag(side: str, length: int, tiny_tokenizer: Any) -> None:
    """Several tokens have the offsets of one character, so the first of them may be the one that is left out."""
    words = ("a", "\U0001f984", "naïve", "\u65e5\u672c", "x")
    tiny_tokenizer.truncation_side = side
    whole, cut = (
        encoded("token-classification", [Tagged(words)], tiny_tokenizer, is_labeled=False, max_length=most).sequences[0]
        for most in (99, length)
    )
    assert len(whole) > 12 and len(cut) == length
    assert list(cut.labels) == list(whole.labels)[-length if side == "left" else 0 :][:length]


def translator(target: str | None) -> Any:
    from transformers import NllbTokenizer

    words = {word: at for at, word in enumerate(("<s>", "<pad>", "</s>", "<unk>", "▁", "a"))}
    return NllbTokenizer(vocab=words, merges=[], src_lang="eng_Latn", tgt_lang=target)


@pytest.mark.parametrize(("language", "is_told"), [("deu_Latn", False), ("eng_Latn", True), (None, True)])
def test_targets_marked_with_the_language_of_the_sources_are_reported(language: str | None, is_told: bool) -> None:
    tokenizer, twin = translator(language), translator(language)
    report = encoded("seq2seq", [Completion("a a", "a")], tokenizer, Target()).report
    assert any("eng_Latn" in line and "tgt_lang" in line for line in report.lines()) == is_told
    found = twin("a a", text_target="a")
    assert (
        report.tokens == len(found["input_ids"]) + len(found["labels"]) > report.trained_tokens == len(found["labels"])
    )


def test_a_tokenizer_that_needs_a_target_language(monkeypatch: pytest.MonkeyPatch) -> None:
    """M2M100's tokenizer, which needs the package sentencepiece, looks up the language that it lacks."""
    tokenizer = translator(None)

    def look_up() -> None:
        raise KeyError(tokenizer.tgt_lang)

    monkeypatch.setattr(tokenizer, "_switch_to_target_mode", look_up)
    with pytest.raises(ModelError, match="tgt_lang") as caught:
        encoded("seq2seq", [Completion("a a", "a")], tokenizer, Target())
    assert caught.value.field == "tgt_lang"
    (row,) = encoded("seq2seq", [Completion("a a", "")], tokenizer, Target(), is_labeled=False).sequences
    assert list(row.input_ids) == translator(None)("a a")["input_ids"]


@pytest.mark.parametrize("overlong", ["truncate", "drop"])
@pytest.mark.parametrize(("source", "target"), [(50, 50), (50, 1), (1, 50)])
def test_a_row_is_counted_once_if_source_and_target_are_too_long(
    source: int, target: int, overlong: str, tiny_tokenizer: Any
) -> None:
    rows = [Completion("b " * source, "b " * target), Completion("b", "b")]
    report = encoded("seq2seq", rows, tiny_tokenizer, Target(), max_length=8, overlong=overlong).report
    assert (report.cut_rows, report.sequences) == (1, 2 if overlong == "truncate" else 1)
