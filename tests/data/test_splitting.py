"""Rows that are held out, compared with scikit-learn's proportions, and where a single document is cut."""

from __future__ import annotations

import collections
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import (
    Completion,
    Document,
    Labeled,
    Record,
    Records,
    Request,
    check_rule,
    encode,
    few_rows,
    read_records,
    read_split,
    read_stream,
    split,
)
from lorakit.errors import ConfigError, DataError


def documents(count: int) -> Records:
    return Records((Document(f"text {index}", "a", index) for index in range(count)), ["a note"])


def test_whole_documents_are_held_out_by_the_seed() -> None:
    parts = split(documents(100), 0.05, seed=1)
    assert len(parts.held_out) == 5
    assert sorted(parts.train + parts.held_out, key=lambda r: r.line or 0) == list(documents(100))
    assert split(documents(100), 0.05, seed=1) == parts
    assert split(documents(100), 0.05, seed=2).held_out != parts.held_out
    assert parts.note == "5 of 100 documents are held out for evaluation (seed 1)."
    assert parts.train.notes == ["a note"]


def test_the_order_of_the_records_does_not_matter() -> None:
    backwards = split(list(reversed(documents(50))), 0.1, seed=3)
    assert set(backwards.held_out) == set(split(documents(50), 0.1, seed=3).held_out)


def test_equal_documents_stay_on_one_side() -> None:
    records = [Document(f"text {index % 10}", "a", index) for index in range(40)]
    parts = split(records, 0.3, seed=0)
    trained, held_out = ({r.text for r in side if isinstance(r, Document)} for side in (parts.train, parts.held_out))
    assert len(held_out) == 3
    assert not trained & held_out
    often = [*[Document("said often")] * 90, *documents(9)]
    for seed in range(5):  # the fraction counts texts, not repetitions
        assert len({r.text for r in split(often, 0.3, seed).held_out if isinstance(r, Document)}) == 3


@pytest.mark.parametrize("count", [0, 1])
def test_a_single_document_leaves_nothing_and_that_is_said(count: int) -> None:
    parts = split(documents(count), 0.05)
    assert len(parts.train) == count
    assert not parts.held_out
    assert "the data is a single document" in parts.note and "Pass --eval-data" in parts.note


def test_rows_that_are_no_documents_are_called_rows() -> None:
    rows = [Completion("p", str(index)) for index in range(3)]
    assert split(rows, 0.3).note == "1 of 3 rows is held out for evaluation (seed 0)."


def test_two_documents_leave_one_and_zero_leaves_none() -> None:
    assert len(split(documents(2), 0.01).held_out) == 1
    assert len(split(documents(2), 0.99).held_out) == 1
    assert split(documents(2), 0).note == "No data is held out for evaluation (eval_fraction is 0)."


@pytest.mark.parametrize("fraction", [-0.1, 1, 5])
def test_a_share_is_a_share(fraction: float) -> None:
    with pytest.raises(ConfigError, match=r"eval_fraction is .*; it must be in \[0, 1\)"):
        split(documents(3), fraction)


@pytest.mark.parametrize(
    ("rows", "held"), [(2, 1), (9, 1), (10, 2), (12, 2), (50, 10), (100, 20), (399, 20), (600, 30)]
)
def test_a_hundred_rows_hold_out_twenty_and_small_data_a_fifth(rows: int, held: int) -> None:
    assert len(split(documents(rows)).held_out) == held


def labeled(counts: dict[str, int]) -> list[Record]:
    rows: list[Record] = [Labeled((f"{name} {at}",), name) for name, count in counts.items() for at in range(count)]
    random.Random(0).shuffle(rows)
    return rows


def labels_of(rows: object) -> collections.Counter[object]:
    return collections.Counter(row.label for row in rows)  # type: ignore[attr-defined]


def test_labels_have_the_proportions_of_scikit_learn() -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    rng = random.Random(1)
    for case in range(60):
        counts = {f"l{at}": rng.randint(2, 200) for at in range(rng.randint(2, 6))}
        rows, fraction = labeled(counts), rng.choice([0.05, 0.1, 0.2, 0.3])
        held = round(fraction * len(rows))
        if held < len(counts):
            continue
        ours = labels_of(split(rows, fraction, case).held_out)
        names = [row.label for row in rows if isinstance(row, Labeled)]
        shuffled = selection.StratifiedShuffleSplit(1, test_size=held, random_state=case)
        theirs = collections.Counter(names[at] for at in next(shuffled.split(names, names))[1])
        assert ours.total() == held == theirs.total()
        exact = {name: held * count / len(rows) for name, count in counts.items()}
        floors = {name: math.floor(quota) for name, quota in exact.items()}
        for name in counts:  # both give each label its quota rounded up or down, by the largest remainders
            assert ours[name] in (floors[name], floors[name] + 1), (case, name)
            assert abs(ours[name] - theirs[name]) <= 1
        off = [sum((found[name] - exact[name]) ** 2 for name in counts) for found in (ours, theirs)]
        assert off[0] <= off[1] + 1e-9


def test_every_label_stays_in_training_and_other_seeds_hold_out_other_rows() -> None:
    rows = labeled({"often": 90, "twice": 2, "once": 1})
    held = [split(rows, seed=seed).held_out for seed in range(5)]
    for seed, part in enumerate(held):
        assert set(labels_of(split(rows, seed=seed).train)) == {"often", "twice", "once"}
        assert len(part) == 18
    assert len({tuple(sorted(row.texts[0] for row in part)) for part in held}) == 5  # type: ignore[union-attr]


def test_scores_are_split_as_if_they_had_no_labels() -> None:
    scores: list[Record] = [Labeled((f"text {at}",), at / 7) for at in range(100)]
    parts = split(scores)
    assert len(parts.held_out) == 20 and "stratified" not in parts.note


def grouped(folder: Path, seed: int) -> tuple[Path, list[dict[str, str]]]:
    rng, rows = random.Random(seed), []
    for group in range(rng.randint(30, 80)):
        leaning = rng.choice(["a", "a", "b"])
        for at in range(rng.randint(1, 6)):
            label = leaning if rng.random() < 0.8 else rng.choice("abc")
            rows.append({"text": f"{group} {at}", "label": label, "user": f"u{group}"})
    rng.shuffle(rows)
    path = folder / f"{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path, rows


def test_groups_stay_whole_and_labels_are_as_close_as_in_scikit_learns_folds(tmp_path: Path) -> None:
    selection = pytest.importorskip("sklearn.model_selection")
    ours, theirs = [], []
    for seed in range(30):
        path, rows = grouped(tmp_path, seed)
        parts = read_split([str(path)], None, 0.2, seed, Request(group="user"))
        users = [{row.texts[0].split()[0] for row in part} for part in (parts.train, parts.held_out)]  # type: ignore[union-attr]
        assert not users[0] & users[1] and "groups)" in parts.note
        labels = [row["label"] for row in rows]
        every, size = collections.Counter(labels), len(rows)

        def off(found: collections.Counter[object], every: collections.Counter[str] = every, size: int = size) -> float:
            return max(abs(found[name] - 0.2 * count) / size for name, count in every.items())

        ours.append(off(labels_of(parts.held_out)))
        folds = selection.StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        found = [test for _, test in folds.split(labels, labels, [row["user"] for row in rows])]
        theirs += [off(collections.Counter(labels[at] for at in test)) for test in found]
    assert sum(ours) / len(ours) <= sum(theirs) / len(theirs)
    assert max(ours) <= max(theirs)


def test_a_group_with_every_row_of_a_label_is_trained(tmp_path: Path) -> None:
    rows = [
        {"text": f"{at}", "label": "rare" if at < 2 else "often", "user": "r" if at < 2 else f"u{at}"}
        for at in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for seed in range(20):
        parts = read_split([str(path)], None, None, seed, Request(group="user"))
        assert labels_of(parts.train)["rare"] == 2 and len(parts.held_out) == 8


def test_two_large_groups_leave_one_to_train_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"{at}", "user": f"u{at % 2}"} for at in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    parts = read_split([str(path)], None, None, 0, Request(group="user"))
    assert (len(parts.train), len(parts.held_out)) == (20, 20)


def test_groups_that_each_have_every_row_of_a_label_leave_nothing(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"{at}", "label": "ab"[at % 2], "user": f"u{at % 2}"} for at in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for seed in range(5):
        parts = read_split([str(path)], None, None, seed, Request(group="user"))
        assert (len(parts.train), len(parts.held_out)) == (40, 0)
        assert "label" in parts.note and "--eval-data" in parts.note


def test_a_group_has_the_same_rows_in_every_format(tmp_path: Path) -> None:
    """Numbers are text in CSV, and integers next to nulls are floats in tables that pandas wrote."""
    values = {"a.csv": "7", "b.jsonl": 7, "c.jsonl": 7.0, "d.jsonl": "7"}
    for at, (name, value) in enumerate(values.items()):
        rows = [(f"{name} {row}", value if row % 2 else f"u{at} {row}") for row in range(8)]
        text = "".join(f"{json.dumps({'text': text, 'user': user})}\n" for text, user in rows)
        table = "text,user\n" + "".join(f"{text},{user}\n" for text, user in rows)
        (tmp_path / name).write_text(table if name.endswith("csv") else text, encoding="utf-8")
    for seed in range(10):
        parts = read_split([str(tmp_path)], None, 0.4, seed, Request(group="user"))
        sides = [
            sum(int(row.text[-1]) % 2 for row in part if isinstance(row, Document))
            for part in (parts.train, parts.held_out)
        ]
        assert sorted(sides) == [0, 16]


def test_evaluation_data_needs_no_group(tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.write_text('{"text": "a", "user": 1}\n{"text": "b", "user": 2}\n')
    held_out.write_text('{"text": "c"}\n')
    for read in (read_split, read_stream):
        parts = read([str(train)], [str(held_out)], None, 0, Request(group="user"))
        assert (len(parts.train), len(parts.held_out)) == (2, 1)


def test_another_rule_is_rejected() -> None:
    check_rule(None)
    check_rule(split([Document("a"), Document("b")]).rule)
    with pytest.raises(DataError) as caught:
        check_rule("later")
    assert caught.value.fields["allowed"] == ("stratified",)


PARAGRAPHS = [f"Paragraph {at} has a few words, and a second sentence. It ends here." for at in range(200)]


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize("text", ["\n\n".join(PARAGRAPHS), "\n".join(PARAGRAPHS), " ".join(PARAGRAPHS)])
def test_the_end_of_a_single_document_is_held_out(tmp_path: Path, text: str, suffix: str) -> None:
    path = tmp_path / f"notes{suffix}"
    path.write_text(text if suffix == ".txt" else json.dumps({"text": text}) + "\n", encoding="utf-8")
    for records in (read_records([str(path)]), [Document(text)]):
        for fraction, wanted in [(None, 0.2), (0.1, 0.1), (0.5, 0.5)]:
            parts = split(records, fraction)
            (train,), (held,) = parts.train, parts.held_out
            assert isinstance(train, Document) and isinstance(held, Document)
            assert train.text + held.text == text == "".join([*train.pieces(), *held.pieces()])
            assert held.text.startswith(("Paragraph ", "It ends here. P")) and train.text.rstrip().endswith(".")
            assert len(held.text) / len(text) == pytest.approx(wanted, abs=wanted / 2)
            assert parts.rule == "stratified" and "characters of the document are held out" in parts.note


@pytest.mark.parametrize(
    "text", ["word " * 1000, "一二三四五六。" * 400, "Ein Satz ohne Ende und ohne Punkt " * 100, "a\u0301 b " * 400]
)
def test_a_cut_falls_between_words_or_sentences(text: str) -> None:
    (train,), (held,) = (part for part in (split([Document(text)]).train, split([Document(text)]).held_out))
    assert isinstance(train, Document) and isinstance(held, Document)
    assert train.text + held.text == text and not held.text[0].isspace()
    assert train.text[-1].isspace() or train.text[-1] == "。"


@pytest.mark.parametrize("text", ["x" * 5000, "A short text. " * 10])
def test_a_document_without_a_place_to_cut_is_left_whole(text: str) -> None:
    parts = split([Document(text)])
    assert len(parts.train) == 1 and not parts.held_out and parts.rule == ""


def test_a_long_document_holds_out_the_default_fraction_and_different_cuts_differ(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("A sentence of a long document.\n" * 40_000, encoding="utf-8")
    records = read_records([str(path)])
    parts = split(records)
    assert sum(map(len, parts.held_out[0].pieces())) == pytest.approx(62_000, rel=0.01)  # type: ignore[union-attr]
    other = split(records, 0.1)
    stored = [part for one in (parts, other) for part in (one.train, one.held_out)]
    assert len({part.identity() for part in stored}) == 4  # type: ignore[union-attr]
    assert parts.digests() == other.digests() == {str(path): records.digests()[str(path)]}


def test_a_document_that_is_repeated_is_cut_everywhere() -> None:
    parts = split([Document("Some words. " * 300)] * 3)
    assert (len(parts.train), len(parts.held_out)) == (3, 1)
    assert len({record.text for record in parts.train}) == 1  # type: ignore[union-attr]


@pytest.mark.parametrize("length", [16, 100_000])
def test_a_text_that_goes_on_has_no_end(tmp_path: Path, tiny_tokenizer: Any, length: int) -> None:
    """The tokens of both parts are those of the text, and the end-of-text token is only where the text ends."""
    text = "\n\n".join(PARAGRAPHS)
    path = tmp_path / "notes.txt"
    path.write_text(text, encoding="utf-8")
    for records in (read_records([str(path)]), [Document(text)] * 2):
        parts = split(records)
        train, held = ([*encode(part, tiny_tokenizer, length).sequences] for part in (parts.train, parts.held_out))
        ids = [token for row in [*train[: len(train) // len(parts.train)], *held] for token in row.labels if token >= 0]
        assert ids.count(tiny_tokenizer.eos_token_id) == 1 and ids[-1] == tiny_tokenizer.eos_token_id


def test_few_rows_are_described_by_the_width_of_an_interval() -> None:
    stats = pytest.importorskip("scipy.stats")
    assert few_rows(20, True, "") == few_rows(0, True, "") == ""
    for count in range(4, 20):
        half = stats.norm.ppf(0.975) * math.sqrt(0.25 / count)
        assert f"±{100 * half:.0f}% " in few_rows(count, True, "")
        assert f"±{stats.norm.ppf(0.975) / math.sqrt(count):.1f} standard deviations" in few_rows(count, False, "")
    shown = few_rows(1, True, "More rows.")
    assert shown.startswith("warning: 1 row shows little: an accuracy near 50% is known to ±50%")
    assert shown.endswith("More rows.")
