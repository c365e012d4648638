import hashlib
import json
import random
from array import array
from pathlib import Path
from typing import Any

import pytest

from lorakit.data import (
    Completion,
    Conversation,
    Document,
    Loader,
    Message,
    Records,
    Sequence,
    encode,
    read_records,
    split,
    stored,
    tokens,
)
from lorakit.data.chat import conversation_tokens
from lorakit.data.records import is_empty
from lorakit.data.stored import PiecewiseDocument
from lorakit.errors import ConfigError, DataError

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def _plain(record: Any, tokenizer: Any, length: int) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of a record by the docstring of `encode`, with lists and the whole text at once."""

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []

    end = [tokenizer.eos_token_id]
    if isinstance(record, Conversation):
        turns = conversation_tokens(record, tokenizer)
        ids, marks = turns.ids, turns.trained
    elif isinstance(record, Completion):
        prompt, both = ids_of(record.prompt), ids_of(record.prompt + record.completion)
        said = both[len(prompt) :] if both[: len(prompt)] == prompt else ids_of(record.completion)
        said += [] if said[-1:] == end else end
        ids, marks = prompt + said, [False] * len(prompt) + [True] * len(said)
    else:
        ids = ids_of(record.text)
        ids += [] if ids[-1:] == end else end
        marks = [True] * len(ids)
    labels = [token if mark else -100 for token, mark in zip(ids, marks, strict=True)]
    starts = range(0, max(1, len(ids) - 1), length - 1) if isinstance(record, Document) else [0]
    rows = [(ids[at : at + length], [-100, *labels[at + 1 : at + length]]) for at in starts]
    return [row for row in rows if any(label != -100 for label in row[1])]


def _files(folder: Path) -> list[Path]:
    """Return one long text, one short one, and rows of every kind, some of them twice."""
    rng = random.Random(3)
    words = "the quick brown fox jumps over lazy dogs and it's two plus two Wörter 狐。 😀".split()  # noqa: SIM905

    def text(count: int) -> str:
        return " ".join(rng.choice(words) for _ in range(count))

    long, short = folder / "long.txt", folder / "short.md"
    long.write_text("\ufeff" + text(6_000), encoding="utf-8")
    short.write_text(text(20) + "\r\n", encoding="utf-8")
    made: list[dict[str, Any]] = [{"text": " "}, {"prompt": "x", "completion": ""}]
    for at in range(40):
        made += [
            {"text": text(at), "id": at},
            {"prompt": text(at % 7), "completion": " " + text(at + 1)},
            {"messages": [{"role": "user", "content": text(3)}, {"role": "assistant", "content": text(at % 20 + 1)}]},
        ]
    files = [long, short]
    for field in ("text", "prompt", "messages"):  # a file has one shape
        rows = [row for row in [*made, *made[:9]] if field in row]
        lines = [json.dumps(row, ensure_ascii=bool(at % 2)) for at, row in enumerate(rows)]
        files.append(folder / f"{field}.jsonl")
        files[-1].write_text("\n\n".join(lines), encoding="utf-8")
    return files


@pytest.mark.costly
@pytest.mark.parametrize("length", [2, 7, 64])
def test_files_give_the_sequences_that_the_records_give_in_memory(
    length: int, tmp_path: Path, tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = _files(tmp_path)
    monkeypatch.setattr(stored, "READ_BYTES", 1 << 12)
    monkeypatch.setattr(tokens, "PART_CHARACTERS", 1 << 13)
    monkeypatch.setattr(tokens, "SHARED_CHARACTERS", 1 << 10)
    records = read_records(paths)
    assert isinstance(records[0], PiecewiseDocument)
    texts = [paths[0].read_bytes().decode("utf-8-sig"), paths[1].read_bytes().decode()]
    in_memory = [Document(texts[0], str(paths[0])), Document(texts[1], str(paths[1])), *records[2:]]
    for seed in (0, 1):
        parted, plainly = split(records, 0.2, seed), split(Records(in_memory), 0.2, seed)
        assert [(r.source, r.line) for r in parted.held_out] == [(r.source, r.line) for r in plainly.held_out]
        assert [(r.source, r.line) for r in parted.train] == [(r.source, r.line) for r in plainly.train]
        assert parted.note == plainly.note
        assert parted.train.total_bytes + parted.held_out.total_bytes <= sum(path.stat().st_size for path in paths)
    seen: list[int] = []
    encoded = encode(records, tiny_tokenizer, length, seen.append)
    wanted = [row for record in in_memory if not is_empty(record) for row in _plain(record, tiny_tokenizer, length)]
    assert [(list(s.input_ids), list(s.labels)) for s in encoded.sequences] == wanted
    assert encoded.report.as_dict() == {
        **encode(in_memory, tiny_tokenizer, length).report.as_dict(),
        "notes": records.notes,
    }
    assert encoded.report.duplicate_rows == 9
    assert encoded.report.tokens == sum(len(ids) for ids, _ in wanted)
    assert encoded.report.trained_tokens == sum(label != -100 for _, labels in wanted for label in labels)
    assert seen == sorted(seen)
    assert seen[-1] == sum(path.stat().st_size for path in paths)
    assert len({done for done in seen if done < paths[0].stat().st_size}) > 2
    digest = hashlib.sha256()
    for ids, labels in wanted:
        digest.update(len(ids).to_bytes(8, "little") + array("i", ids).tobytes() + array("i", labels).tobytes())
    assert Loader(encoded.sequences, 4, 0).state()["data_sha256"] == digest.hexdigest()
    listed = [Sequence(array("i", ids), array("i", labels)) for ids, labels in wanted]
    assert _batches(encoded.sequences) == _batches(listed)


def _batches(sequences: Any) -> list[Any]:
    loader = Loader(sequences, 3, 1, epochs=2)
    return [(batch.input_ids.tolist(), batch.labels.tolist(), batch.epoch) for batch in loader]


def test_a_file_that_changes_between_checking_and_encoding_is_said(tmp_path: Path, tiny_tokenizer: Any) -> None:
    for name in ("a.txt", "b.jsonl"):
        path = tmp_path / name
        path.write_text('{"text": "one"}\n', encoding="utf-8")
        records = read_records(path)
        path.write_text('{"text": "one and more"}\n', encoding="utf-8")
        with pytest.raises(DataError, match=f"{name}: the data file changed"):
            encode(records, tiny_tokenizer, 8)


def trained(sequence: Any) -> list[int]:
    return [label for label in sequence.labels if label != -100]


def test_every_token_of_a_document_but_the_first_is_trained_once(tiny_tokenizer: Any) -> None:
    ids = tiny_tokenizer(TEXT, add_special_tokens=False)["input_ids"] + [tiny_tokenizer.eos_token_id]
    for length in (2, 3, 7, 16, len(ids) - 1, len(ids), len(ids) + 1, 1000):
        encoded = encode([Document(TEXT)], tiny_tokenizer, length)
        assert [token for s in encoded.sequences for token in trained(s)] == ids[1:]
        assert all(1 < len(s) <= length for s in encoded.sequences)
        assert all(s.labels[0] == -100 for s in encoded.sequences)
        joined = list(encoded.sequences[0].input_ids)
        for sequence in encoded.sequences[1:]:
            assert sequence.input_ids[0] == joined[-1]
            joined += sequence.input_ids[1:]
        assert joined == ids
        assert encoded.report.trained_tokens == len(ids) - 1
        assert encoded.report.tokens == sum(map(len, encoded.sequences))


def test_a_beginning_token_is_set_where_the_tokenizer_sets_one(tiny_tokenizer: Any) -> None:
    from tokenizers import processors

    tiny_tokenizer.bos_token = "<|im_start|>"
    tiny_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tiny_tokenizer.bos_token_id)]
    )
    ids = tiny_tokenizer("hello world", add_special_tokens=False)["input_ids"]
    whole = [tiny_tokenizer.bos_token_id, *ids, tiny_tokenizer.eos_token_id]
    document, completion = encode(
        [Document("hello world"), Completion("", "hello world")], tiny_tokenizer, 64
    ).sequences
    for sequence in (document, completion):
        assert list(sequence.input_ids) == whole
        assert trained(sequence) == whole[1:]


def test_of_a_completion_the_answer_and_its_end_are_trained(tiny_tokenizer: Any) -> None:
    (sequence,) = encode([Completion("what is two plus two?", " It is four.")], tiny_tokenizer, 64).sequences
    assert tiny_tokenizer.decode(list(sequence.input_ids)) == "what is two plus two? It is four.<|endoftext|>"
    assert tiny_tokenizer.decode(trained(sequence)) == " It is four.<|endoftext|>"


def test_the_prompt_keeps_its_tokens_where_one_lies_across_the_border(tiny_tokenizer: Any) -> None:
    prompt, completion = "hel", "lo world"
    alone = tiny_tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert tiny_tokenizer(prompt + completion, add_special_tokens=False)["input_ids"][: len(alone)] != alone
    (sequence,) = encode([Completion(prompt, completion)], tiny_tokenizer, 64).sequences
    assert list(sequence.input_ids[: len(alone)]) == alone
    assert tiny_tokenizer.decode(trained(sequence)) == "lo world<|endoftext|>"


def test_an_end_that_the_text_brings_is_not_doubled(tiny_tokenizer: Any) -> None:
    (sequence,) = encode([Document("hello<|endoftext|>")], tiny_tokenizer, 64).sequences
    assert list(sequence.input_ids).count(tiny_tokenizer.eos_token_id) == 1


def test_long_completions_are_cut_and_counted(tiny_tokenizer: Any) -> None:
    prompt = tiny_tokenizer("hello world", add_special_tokens=False)["input_ids"]
    answer = tiny_tokenizer(" It is four.", add_special_tokens=False)["input_ids"]
    total = len(prompt) + len(answer) + 1
    rows = [Completion("hello world", " It is four."), Document("hello world")]
    report = encode(rows, tiny_tokenizer, total - 2).report
    assert (report.cut_rows, report.cut_tokens, report.cut_trained_tokens, report.dropped_rows) == (1, 2, 2, 0)
    line = f"1 row (50.0%) truncated to {total - 2} tokens: 2 tokens removed (2 would have contributed to the loss, in 1 row);"
    assert line in "\n".join(report.lines())
    report = encode(rows, tiny_tokenizer, len(prompt)).report
    assert (report.cut_rows, report.cut_tokens, report.dropped_rows) == (1, len(answer) + 1, 1)
    assert "1 row left out: nothing to train on within the maximum length." in report.lines()
    assert report.sequences == 2  # the document alone


def test_nothing_is_left_out_without_a_count(tiny_tokenizer: Any) -> None:
    records = Records(
        [
            Document("hello"),
            Document("hello", "other file", 7),
            Document("  \n"),
            Completion("what?", ""),
            Conversation((Message("user", "hello"),)),
        ],
        ["a note of the reader."],
    )
    report = encode(records, tiny_tokenizer, 64).report
    assert (report.rows, report.documents, report.completions, report.conversations) == (5, 3, 1, 1)
    assert (report.empty_rows, report.duplicate_rows, report.sequences) == (3, 1, 2)
    assert report.lines() == [
        f"3 documents, 1 prompt with completion, 1 conversation: 2 sequences of at most 64 tokens; total: {report.tokens} "
        f"tokens; {report.trained_tokens} contribute to the loss ({report.trained_fraction:.1%}).",
        "3 rows left out: empty.",
        "1 duplicate row kept.",
        "a note of the reader.",
    ]
    assert report.as_dict()["rows"] == 5


def test_a_tokenizer_without_an_end_is_said(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.eos_token = None
    lines = encode([Document("hello world")], tiny_tokenizer, 64).report.lines()
    assert "The tokenizer has no end-of-text token, so the end of a text is not marked." in lines
    assert any("will not learn where to stop" in line for line in lines)


def test_no_trained_token_at_all_is_an_error(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError) as error:
        encode([Completion("hello world " * 9, "x", "a.jsonl", 1), Document(" ", "a.jsonl", 2)], tiny_tokenizer, 4)
    for part in ("rows: 2", "a.jsonl:1", "1 empty", "1 with nothing to train on in the first 4 tokens", "--max-length"):
        assert part in str(error.value)
    with pytest.raises(DataError, match="The data has no rows"):
        encode([], tiny_tokenizer, 4)


def test_a_window_needs_two_tokens(tiny_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="max_length is 1; it must be at least 2"):
        encode([Document("x")], tiny_tokenizer, 1)


@pytest.mark.parametrize("overlong", ["truncate", "drop", "split"])
def test_rows_that_are_too_long(overlong: Any, tiny_tokenizer: Any) -> None:
    words = "hello world " * 40
    whole = len(tiny_tokenizer(words, add_special_tokens=False)["input_ids"])
    rows = [Completion("", words, "a.jsonl", 1), Completion("hello", " world", "a.jsonl", 2)]
    encoded = encode(rows, tiny_tokenizer, 16, overlong=overlong)
    found = [len(row) for row in encoded.sequences]
    short = found[-1]
    assert encoded.report.cut_rows == 1
    if overlong == "split":
        ids = [token for row in encoded.sequences[:-1] for token in row.input_ids[1:]]
        assert ids == (tiny_tokenizer(words, add_special_tokens=False)["input_ids"] + [tiny_tokenizer.eos_token_id])[1:]
        assert sum(row.trained_tokens for row in encoded.sequences[:-1]) == whole
        assert any("split because of more than 16 tokens" in line for line in encoded.report.lines())
    else:
        assert found == ([16] if overlong == "truncate" else []) + [short]
    assert (encoded.report.cut_answers, encoded.report.overlong) == (int(overlong == "truncate"), overlong)
    words_of = {"drop": "1 row (50.0%) left out because", "truncate": "in 1 row)", "split": "1 row (50.0%) split"}
    assert any(words_of[overlong] in line for line in encoded.report.lines())


def test_a_row_that_is_too_long_can_be_an_error(tiny_tokenizer: Any) -> None:
    rows = [Completion("", "hello world " * 40, "a.jsonl", 7)]
    with pytest.raises(DataError, match=r"a\.jsonl:7: the row has \d+ tokens, but max_length is 16; see --overlong"):
        encode(rows, tiny_tokenizer, 16, overlong="error")
