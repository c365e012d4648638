from typing import Any

import pytest

from lorakit.data import Conversation, Message, encode
from lorakit.data.chat import conversation_tokens
from lorakit.errors import DataError

TALK = Conversation(
    (
        Message("system", "Be brief."),
        Message("user", "what is two plus two?"),
        Message("assistant", "\n It is four."),
        Message("user", "hello"),
        Message("assistant", "wörld 🎉 "),
    ),
    "talk.jsonl",
    3,
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# renders earlier assistant turns differently from the last one, as templates of reasoning models do
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '(thought)' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def said(tokenizer: Any, turns: Any) -> list[str]:
    runs: list[list[int]] = []
    before = False
    for token, mark in zip(turns.ids, turns.trained, strict=True):
        if mark and not before:
            runs.append([])
        if mark:
            runs[-1].append(token)
        before = mark
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("marked", [False, True])
def test_what_is_trained_decodes_to_what_the_assistant_said(tiny_tokenizer: Any, marked: bool) -> None:
    if marked:
        tiny_tokenizer.chat_template = MARKED
        talk = Conversation((*TALK.messages[:2], Message("assistant", "It is four."), *TALK.messages[3:]))
    else:
        talk = TALK
    turns = conversation_tokens(talk, tiny_tokenizer)
    whole = tiny_tokenizer.apply_chat_template(talk.as_dicts(), tokenize=False)
    assert tiny_tokenizer.decode(turns.ids) == whole
    assert said(tiny_tokenizer, turns) == [f"{m.content}<|im_end|>" for m in talk.messages if m.role == "assistant"]
    assert turns.ended
    assert turns.untrained_turns == 0


def test_an_answer_gets_the_tokens_that_generation_will_make(tiny_tokenizer: Any) -> None:
    """The generation prompt ends in a line feed and the answer begins with one: no token may span both."""
    talk = Conversation(TALK.messages[:3])
    turns = conversation_tokens(talk, tiny_tokenizer)
    prompt = tiny_tokenizer.apply_chat_template(talk.as_dicts()[:2], add_generation_prompt=True)["input_ids"]
    assert turns.ids[: len(prompt)] == list(prompt)
    assert turns.trained.index(True) == len(prompt)


def test_marks_that_cover_nothing_give_way_to_the_prefixes(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = MARKED.replace(
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}",
        "{{ m['content'] + '<|im_end|>' }}{% generation %}{% endgeneration %}",
    )
    turns = conversation_tokens(TALK, tiny_tokenizer)
    assert said(tiny_tokenizer, turns) == ["\n It is four.<|im_end|>", "wörld 🎉 <|im_end|>"]


def test_turns_that_the_template_rewrites_are_counted(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = REWRITING
    encoded = encode([TALK], tiny_tokenizer, 256)
    assert encoded.report.untrained_turns == 1
    labels = [label for label in encoded.sequences[0].labels if label != -100]
    assert tiny_tokenizer.decode(labels) == "(thought)wörld 🎉 <|im_end|>"
    assert "1 assistant turn excluded from the loss: the chat template changes" in "\n".join(encoded.report.lines())


def test_a_template_without_an_end_is_noticed(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    encoded = encode([Conversation(TALK.messages[1:3])], tiny_tokenizer, 256)
    assert any("will not learn where to stop" in line for line in encoded.report.lines())


def test_long_conversations_are_cut_and_counted(tiny_tokenizer: Any) -> None:
    whole = len(conversation_tokens(TALK, tiny_tokenizer).ids)
    report = encode([TALK], tiny_tokenizer, whole - 4).report
    assert (report.cut_rows, report.cut_tokens, report.ended_rows) == (1, 4, 0)
    assert report.cut_trained_tokens == 3  # the line feed after the end never contributes to the loss


def test_a_token_that_hides_the_space_before_an_answer_is_found_out(tiny_tokenizer: Any) -> None:
    """Some tokenizers omit the space before a word from its offsets: tokens that decode to other text are not used."""
    from tokenizers import processors

    tiny_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    turns = conversation_tokens(Conversation((Message("user", "hello"), Message("assistant", "world"))), tiny_tokenizer)
    assert said(tiny_tokenizer, turns) == ["world<|im_end|>"]


def test_tokens_that_do_not_give_the_text_back_are_refused(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = iter(range(10_000))
    monkeypatch.setattr(tiny_tokenizer, "decode", lambda *_, **__: f"something else {next(count)}")
    with pytest.raises(DataError, match=r"talk.jsonl:3: the tokens of the assistant's turns do not decode to the text"):
        encode([TALK], tiny_tokenizer, 64)


def test_no_template_and_a_template_that_refuses(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"talk.jsonl:3: .*tokenizer has no chat template"):
        encode([TALK], tiny_tokenizer, 64)
    tiny_tokenizer.chat_template = "{{ raise_exception('only two turns') }}"
    with pytest.raises(
        DataError, match=r"talk.jsonl:3: the chat template rejects this conversation \(only two turns\)"
    ):
        encode([TALK], tiny_tokenizer, 64)


def test_a_template_that_leaves_the_sandbox_is_an_error(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = "{{ messages.__class__.__mro__[-1].__subclasses__() }}"
    with pytest.raises(DataError, match="unsafe"):
        conversation_tokens(TALK, tiny_tokenizer)
