"""Measurements of `lorakit data`, and its page."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import Completion, Document, Record, Records, Split, encoding, quality, read_records, stored
from lorakit.data import records as records_module
from lorakit.data.encoding import Sequence, encode, shown_rows
from lorakit.data.quality import Quality, Token, marked, measure, tokens_of, write_page
from lorakit.errors import DataError

LONG = "the quick brown fox jumps over the lazy dogs and it is two plus two in the end of a long row of words"


def quality_of(parts: Split, tokenizer: Any, length: int) -> Quality:
    def shown(record: Record, count: int) -> Iterator[Sequence]:
        return itertools.islice(shown_rows(record, tokenizer, length, "truncate"), count)

    return measure(
        parts, tokenizer, length, lambda visit: encode(parts.train, tokenizer, length, visit=visit), shown, 2
    )


def test_duplicates_leaks_and_unusual_characters(tiny_tokenizer: Any) -> None:
    rows = [
        Completion("hello", LONG, "a.jsonl", 1),
        Completion("hello", LONG + " once", "a.jsonl", 2),  # shares nearly all of its 5-grams
        Completion("hello", "other terms altogether without a match above", "a.jsonl", 3),
        Completion("hello\x07", "odd \ufffd", "a.jsonl", 4),
        Completion("hello", "  ", "a.jsonl", 5),
    ]
    found = quality_of(Split(Records(rows), Records([rows[2]]), ""), tiny_tokenizer, 128)
    assert (found.compared, found.near_duplicates) == (4, 1)  # the empty row is not compared
    assert found.leaks == ("a.jsonl:3",)
    assert found.unusual == {"control characters": 1, "replacement characters (U+FFFD)": 1}
    assert found.report.empty_rows == 1
    assert sum(count for _, count in found.histogram) == found.report.sequences == 4
    lines = " ".join(found.warnings())
    assert "1 near duplicate among 4 compared rows (25.0%)" in lines
    assert "1 training row also in the evaluation data, the first at a.jsonl:3" in lines


def test_near_duplicates_of_evaluation_rows(tiny_tokenizer: Any) -> None:
    rows = [
        Completion("hello", LONG, "a.jsonl", 1),
        Completion("hello", LONG + " once", "a.jsonl", 2),
        Completion("hello", "other terms altogether without a match above", "a.jsonl", 3),
    ]
    held_out = Records([Completion("hello", LONG, "b.jsonl", 1), Completion("hello", " ", "b.jsonl", 2)])
    found = quality_of(Split(Records(rows), held_out, ""), tiny_tokenizer, 128)
    assert (found.leaks, found.near_leaks) == (("a.jsonl:1",), ("a.jsonl:2",))
    assert any("nearly the same as a row in the evaluation data" in line for line in found.warnings())


def test_each_row_is_read_once(tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "row {number} is here"}}\n' for number in range(9)))
    records, read, keys = read_records(path), list[int](), list[int]()
    whole = stored.DataFile.records

    def counted(file: Any, indexes: Any) -> Any:
        for index in indexes:
            read.append(index)
            yield from whole(file, [index])

    monkeypatch.setattr(stored.DataFile, "records", counted)
    for module in (quality, encoding):
        monkeypatch.setattr(
            module, "content_key", lambda record, _key=records_module.content_key: keys.append(1) or _key(record)
        )
    quality_of(Split(records.some(range(7)), records.some(range(7, 9)), ""), tiny_tokenizer, 64)
    assert sorted(read) == list(range(9)) and len(keys) == 9


def test_without_datasketch_near_duplicates_are_not_counted(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    rows = Records([Document("the fox"), Document("the fox")])
    found = quality_of(Split(rows, Records([rows[0]]), ""), tiny_tokenizer, 64)
    assert found.compared == found.near_duplicates == 0 and len(found.leaks) == 2
    assert len(found.notes) == 1 and "datasketch" in found.notes[0]


def test_clean_data_has_no_warnings(tiny_tokenizer: Any) -> None:
    rows = Records([Document("The quick fox\n\tjumps."), Document("hello world, twice")])
    found = quality_of(Split(rows, Records(), ""), tiny_tokenizer, 64)
    assert found.warnings() == [] and len(found.examples) == 2
    assert found.as_dict()["report"]["rows"] == 2


def test_tokens_show_what_is_trained(tiny_tokenizer: Any) -> None:
    found = quality_of(Split(Records([Completion("hello ", "wörld 🎉")]), Records(), ""), tiny_tokenizer, 64)
    (tokens,) = found.examples
    assert "".join(token.text for token in tokens if token.is_trained).startswith("wörld 🎉")
    assert "".join(token.text for token in tokens if not token.is_trained).endswith("hello ")
    assert not any("\ufffd" in token.text for token in tokens)


def test_no_marks_around_nothing() -> None:
    assert marked([Token("a", False, 1), Token("", True, 1)]) == "a"  # a pair of texts without a score


def test_a_character_that_never_ends_is_shown_as_it_decodes(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer("🎉", add_special_tokens=False)["input_ids"][:1]
    assert list(tokens_of(ids, [-100], tiny_tokenizer)) == [Token("\ufffd", False, 1)]


def test_nothing_to_train_is_an_error(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match="No token in the data contributes to the loss"):
        quality_of(Split(Records([Completion("a", " ")]), Records(), ""), tiny_tokenizer, 64)


class Reader(HTMLParser):
    """Collect what a page would load, and its text in colored tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.loads: list[str] = []
        self.trained = ""
        self._in_loss = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.loads += [str(value) for name, value in attrs if name in ("src", "href")]
        self._in_loss = tag == "span" and ("class", "loss") in attrs

    def handle_endtag(self, tag: str) -> None:
        self._in_loss = False

    def handle_data(self, data: str) -> None:
        self.trained += data if self._in_loss else ""


def test_the_page_is_self_contained_and_escapes_the_data(tmp_path: Path, tiny_tokenizer: Any) -> None:
    answer = "a <script>alert(1)</script> & <b>\x1b[31m"
    found = quality_of(Split(Records([Completion("hello", answer)]), Records(), ""), tiny_tokenizer, 128)
    write_page(tmp_path / "page.html", ["<data>.jsonl"], found, "nothing held out")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Reader()
    page.feed(text)
    assert page.loads == [] and "script" not in page.tags and "b" not in page.tags
    assert "a <script>alert(1)</script> & <b>\u241b[31m" in page.trained
    assert "Data: &lt;data&gt;.jsonl" in text and "nothing held out" in text and "\x1b" not in text


def trained(model: Any, trainer: Any, pre: Any, decoder: Any) -> Any:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(model)
    made.pre_tokenizer, made.decoder = pre, decoder
    made.train_from_iterator(TEXTS * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")


def tokenizer_of(kind: str) -> Any:
    from tokenizers import decoders, models, pre_tokenizers, trainers

    special = ["[UNK]", "[CLS]", "[SEP]"]
    if kind == "WordPiece":
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=special)
        model = models.WordPiece(unk_token="[UNK]")
        return trained(model, trainer, pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False))
    if kind == "Unigram":
        unigram = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="[UNK]")
        return trained(models.Unigram(), unigram, pre_tokenizers.Metaspace(), decoders.Metaspace())
    from lorakit import hub

    return hub.load_tokenizer(hub.resolve("smollm2"))


TEXTS = [
    "realizing that the quick brown fox jumps over the lazy dog",
    "words of several pieces are unrealizable and jumping",
    "one two three four five six seven eight nine ten",
]


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "smollm2"])
@pytest.mark.parametrize("border", [None, 0, 3, 7])
def test_words_are_not_glued(kind: str, border: int | None) -> None:
    """Pieces joined are the text as the tokenizer decodes it as a whole, and here the text itself."""
    tokenizer = tokenizer_of(kind)
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        labels = [-100 if border is None or at < border else number for at, number in enumerate(ids)]
        shown = list(tokens_of(ids, labels, tokenizer))
        assert "".join(token.text for token in shown) == tokenizer.decode(ids) == text
        assert sum(token.count for token in shown) == len(ids)
        assert sum(token.count for token in shown if token.is_trained) == sum(label != -100 for label in labels)


def test_the_page_numbers_rows_and_counts_tokens(tmp_path: Path, tiny_tokenizer: Any) -> None:
    rows = Records([Completion("hello ", "wörld 🎉"), Completion("a", " b")])
    found = quality_of(Split(rows, Records(), ""), tiny_tokenizer, 64)
    write_page(tmp_path / "page.html", ["a"], found, "")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    for number, row in enumerate(rows, start=1):
        assert isinstance(row, Completion)
        prompt, answer = (
            tiny_tokenizer(text, add_special_tokens=False)["input_ids"] for text in (row.prompt, row.completion)
        )
        title = f"Row {number}: {len(prompt) + len(answer) + 1} tokens, {len(answer) + 1} with loss"
        assert f"<h3>{title}</h3>" in page
