from typing import Any

import pytest

from lorakit.data import Completion, Conversation, Document, Message, Records, encode
from lorakit.errors import ConfigError, DataError

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


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
    assert f"1 row cut to {total - 2} tokens: 2 tokens lost, 2 of them to be trained; a larger" in "\n".join(
        report.lines()
    )
    report = encode(rows, tiny_tokenizer, len(prompt)).report
    assert (report.cut_rows, report.cut_tokens, report.dropped_rows) == (1, len(answer) + 1, 1)
    assert "1 row left out: no trained token within the length." in report.lines()
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
        f"3 documents, 1 prompt with completion, 1 conversation: 2 sequences of at most 64 tokens, {report.tokens} "
        f"tokens, {report.trained_tokens} of them trained ({report.trained_share:.1%}).",
        "3 rows left out: nothing in them to train.",
        "1 row repeats an earlier one; it is kept.",
        "a note of the reader.",
    ]
    assert report.as_dict()["rows"] == 5


def test_a_tokenizer_without_an_end_is_said(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.eos_token = None
    lines = encode([Document("hello world")], tiny_tokenizer, 64).report.lines()
    assert "The tokenizer has no end-of-text token, so nothing marks where a text ends." in lines
    assert "No row trains an end of text, so the model will not learn where to stop." in lines


def test_no_trained_token_at_all_is_an_error(tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError) as error:
        encode([Completion("hello world " * 9, "x", "a.jsonl", 1), Document(" ", "a.jsonl", 2)], tiny_tokenizer, 4)
    assert str(error.value) == (
        "No token is left to train in 2 rows from a.jsonl:1 on (1 empty, 1 without a trained token within 4 tokens). "
        "Look at the data, or raise --max-length."
    )
    with pytest.raises(DataError, match="There are no rows of data"):
        encode([], tiny_tokenizer, 4)


def test_a_window_needs_two_tokens(tiny_tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match="max_length is 1; at least 2 tokens are needed"):
        encode([Document("x")], tiny_tokenizer, 1)
