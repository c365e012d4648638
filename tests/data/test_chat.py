import itertools
import json
from typing import Any

import pytest

from lorakit.data import Completion, Conversation, Message, encode
from lorakit.data.chat import conversation_tokens
from lorakit.errors import DataError
from lorakit.session.prompts import encode_prompts

from ..conftest import CHAT_TEMPLATE

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
    after = "" if marked else "\n"  # the template renders it for the turn, and the marks leave it out
    answers = [message.content for message in talk.messages if message.role == "assistant"]
    assert said(tiny_tokenizer, turns) == [f"{answer}<|im_end|>{after}" for answer in answers]
    assert turns.ended
    assert turns.untrained_turns == 0


def test_an_answer_gets_the_tokens_that_generation_will_make(tiny_tokenizer: Any) -> None:
    talk = Conversation((*TALK.messages[:2], Message("assistant", "It is four.")))
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
    assert said(tiny_tokenizer, turns) == ["\n It is four.<|im_end|>\n", "wörld 🎉 <|im_end|>\n"]


def test_turns_that_the_template_rewrites_are_counted(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.chat_template = REWRITING
    encoded = encode([TALK], tiny_tokenizer, 256)
    assert encoded.report.untrained_turns == 1
    labels = [label for label in encoded.sequences[0].labels if label != -100]
    assert tiny_tokenizer.decode(labels) == "(thought)wörld 🎉 <|im_end|>\n"
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
    assert report.cut_trained_tokens == 4


@pytest.mark.parametrize("trimmed", [False, True])
def test_a_token_across_the_beginning_of_an_answer_is_trained_and_counted(tiny_tokenizer: Any, trimmed: bool) -> None:
    """Some tokenizers omit the space before a word from its offsets."""
    from tokenizers import processors

    tiny_tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=trimmed)
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    talk = Conversation((Message("user", "hello"), Message("assistant", "world")))
    turns = conversation_tokens(talk, tiny_tokenizer)
    assert turns.ids == tiny_tokenizer.apply_chat_template(talk.as_dicts())["input_ids"]
    assert said(tiny_tokenizer, turns) == [" world<|im_end|>"]
    assert turns.joined_turns == 1
    lines = encode([talk], tiny_tokenizer, 64).report.lines()
    assert any("first token also contains the end of the generation prompt" in line for line in lines)


@pytest.mark.parametrize(
    "template", [CHAT_TEMPLATE, MARKED, MARKED.replace("<|im_end|>' }}{% endgen", "' }}{% endgen")]
)
@pytest.mark.parametrize("answer", ["  x  ", " ", "    return x", "x ", "\n  x", "é  🎉 "])
def test_spaces_that_offsets_omit_do_not_change_what_is_trained(
    make_tiny_tokenizer: Any, answer: str, template: str
) -> None:
    from tokenizers import Tokenizer, processors

    found = []
    for is_trimmed in (False, True):
        tokenizer = make_tiny_tokenizer()
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        number = max(backend["model"]["vocab"].values()) + 1
        backend["model"]["vocab"]["\u010a\u0120"] = number  # a line feed and a space in one token, as indented code has
        backend["model"]["merges"].insert(0, ["\u010a", "\u0120"])
        tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=is_trimmed)
        tokenizer.chat_template = template
        turns = (Message("user", "hello"), Message("assistant", answer))
        found.append(conversation_tokens(Conversation((*turns, *turns)), tokenizer))
    assert found[0] == found[1]


# marks the reasoning and the content of a turn, each on its own
TWO_MARKS = MARKED.replace(
    "{% generation %}",
    "{% if m['reasoning_content'] %}<think>{% generation %}{{ m['reasoning_content'] }}{% endgeneration %}</think>"
    "{% endif %}{% generation %}",
)


@pytest.mark.parametrize(
    ("turns", "wanted"),
    [
        ([("", "", True), ("secret", "why", False)], ["<|im_end|>"]),
        ([("secret", "why", False), ("one", "", True)], ["one<|im_end|>"]),
        ([("one", "why", True), ("secret", "", False)], ["why", "one<|im_end|>"]),
        ([("</think>", "", True), ("secret", "", False)], ["</think><|im_end|>"]),
        ([("a", "b", True), ("b", "a", False), ("a", "", True)], ["b", "a<|im_end|>", "a<|im_end|>"]),
    ],
)
def test_marks_belong_to_turns(tiny_tokenizer: Any, turns: list[tuple[str, str, bool]], wanted: list[str]) -> None:
    tiny_tokenizer.chat_template = TWO_MARKS
    answers = [Message("assistant", text, {"reasoning_content": why} if why else {}, on) for text, why, on in turns]
    talk = Conversation(tuple(one for answer in answers for one in (Message("user", "hello"), answer)))
    assert said(tiny_tokenizer, conversation_tokens(talk, tiny_tokenizer)) == wanted


@pytest.mark.parametrize("contents", [["", "a"], ["a", ""], ["", ""], ["", "b", ""], ["<|im_end|>", "", "</think>"]])
@pytest.mark.parametrize(
    ("template", "reason"), [(MARKED, ""), (TWO_MARKS, ""), (TWO_MARKS, "why"), (TWO_MARKS, "</think>")]
)
def test_a_weight_applies_to_its_turn(tiny_tokenizer: Any, template: str, contents: list[str], reason: str) -> None:
    """The marks of all turns, which transformers returns, less those in the text of turns with weight 0."""
    tiny_tokenizer.chat_template = template
    for weights in itertools.product([True, False], repeat=len(contents)):
        turns = list[Message]()
        kept = list[bool]()
        for content, weight in zip(contents, weights, strict=True):
            turns += [
                Message("user", "hello"),
                Message("assistant", content, {"reasoning_content": reason} if reason and content else {}, weight),
            ]
            dicts = [turn.as_dict() for turn in turns]
            found = tiny_tokenizer.apply_chat_template(dicts, return_assistant_tokens_mask=True, return_dict=True)
            kept += [bool(mark) and weight for mark in found["assistant_masks"][len(kept) :]]
        row = conversation_tokens(Conversation(tuple(turns)), tiny_tokenizer)
        assert row.ids == found["input_ids"]
        assert row.trained == kept, weights


class Slow:
    """A tokenizer that returns no offsets."""

    def __init__(self, tokenizer: Any) -> None:
        self.fast = tokenizer

    def __getattr__(self, name: str) -> Any:
        return False if name == "is_fast" else getattr(self.fast, name)

    def __call__(self, text: str, **options: Any) -> Any:
        if options.get("return_offsets_mapping"):
            raise NotImplementedError
        return self.fast(text, **options)


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, MARKED])
def test_a_slow_tokenizer_gives_the_same_tokens(tiny_tokenizer: Any, template: str) -> None:
    tiny_tokenizer.chat_template = template
    talk = Conversation((*TALK.messages[:2], Message("assistant", "It is four."), *TALK.messages[3:]))
    slow, fast = conversation_tokens(talk, Slow(tiny_tokenizer)), conversation_tokens(talk, tiny_tokenizer)
    assert slow.ids == fast.ids
    assert slow.trained == fast.trained or template == MARKED  # marks need offsets


def test_a_slow_tokenizer_with_a_token_across_a_border_is_refused(tiny_tokenizer: Any) -> None:
    tiny_tokenizer.name_or_path = "some/model"
    tiny_tokenizer.chat_template = CHAT_TEMPLATE.replace("assistant\n", "assistant\n ").replace(
        "message['content']", "(' ' if message['role'] == 'assistant' else '') + message['content']"
    )
    talk = Conversation((Message("user", "hello"), Message("assistant", "world")), "talk.jsonl", 3)
    with pytest.raises(DataError, match=r"talk.jsonl:3: .*chat template of some/model") as found:
        conversation_tokens(talk, Slow(tiny_tokenizer))
    assert found.value.where == "talk.jsonl:3"


@pytest.mark.parametrize("answer", ["a", "assistant", "hello", "e"])
@pytest.mark.parametrize("condition", ["m['role'] != 'assistant'", "not m['tool_calls']"])
def test_a_dropped_answer_that_other_text_contains_is_noticed(tiny_tokenizer: Any, answer: str, condition: str) -> None:
    """The text of each conversation contains the answer, but not where it would be trained."""
    tiny_tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if CONDITION %}{{ m['content'] }}{% endif %}"
        "{% for call in m['tool_calls'] %}{{ call['function']['name'] }}{% endfor %}<|im_end|>\n{% endfor %}"
    ).replace("CONDITION", condition)
    call = {"tool_calls": [{"type": "function", "function": {"name": "lookup", "arguments": {}}}]}
    talk = Conversation((Message("user", "hello assistant"), Message("assistant", answer, call)))
    with pytest.raises(DataError, match="does not render the content of an assistant turn"):
        conversation_tokens(talk, tiny_tokenizer)


@pytest.mark.parametrize("answer", ["<think></think>", "</think>", " ", ""])
def test_an_answer_of_which_nothing_is_rendered_is_counted(tiny_tokenizer: Any, answer: str) -> None:
    tiny_tokenizer.chat_template = CHAT_TEMPLATE.replace(
        "message['content']", "'<think></think>' + message['content'].split('</think>')[-1].strip()"
    ).replace("assistant\n", "assistant\n<think>\n")
    turns = conversation_tokens(Conversation((*TALK.messages[:2], Message("assistant", answer))), tiny_tokenizer)
    assert not any(turns.trained)
    assert turns.untrained_turns == 1
    assert turns.reason == "the turn is empty"


def test_fields_that_are_not_text_reach_the_template(tiny_tokenizer: Any) -> None:
    tools: tuple[Any, ...] = ({"type": "function", "function": {"name": "lookup", "description": ["b"]}},)
    fields: dict[str, Any] = {"reasoning": ["a"], "thinking": {"b": 1}}
    tiny_tokenizer.chat_template = "{{ tools }}" + CHAT_TEMPLATE
    talk = Conversation((Message("user", "hello"), Message("assistant", "a", fields)), tools=tools)
    assert said(tiny_tokenizer, conversation_tokens(talk, tiny_tokenizer)) == ["a<|im_end|>\n"]


@pytest.mark.parametrize("form", ["text", "instruction"])
@pytest.mark.parametrize("prompt", ["hello", "what is", "a\n", "two plus ", " 🎉"])
def test_without_a_chat_template_generation_starts_from_the_trained_tokens(
    tiny_tokenizer: Any, form: str, prompt: str
) -> None:
    tiny_tokenizer.chat_template = None
    turns = (Message("user", prompt), Message("assistant", " two\n"))
    row = Conversation(turns, is_instruction=True) if form == "instruction" else Completion(prompt, " two\n")
    sequence = encode([row], tiny_tokenizer, 64).sequences[0]
    (ids,) = encode_prompts([prompt], tiny_tokenizer, form, None)
    assert list(sequence.input_ids[: len(ids)]) == ids
    assert [label != -100 for label in sequence.labels] == [at >= len(ids) for at in range(len(sequence.labels))]


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


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_templates_find_reasoning_under_each_name(name: str) -> None:
    found = Message("assistant", None, {name: "Because."}).as_dict()
    assert found == {"role": "assistant", "content": "", name: "Because."} | dict.fromkeys(
        ("thinking", "reasoning_content"), "Because."
    )
