"""The assistant's tokens against an independent judge: the generation marks of TRL's training templates.

Every `*_training` template, and the template that it was made from wherever both render the same text, on generated
conversations. Equal means token by token; what the two may differ in is listed below, and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from lorakit.data import Conversation, Message
from lorakit.data.chat import conversation_tokens

from .test_chat_templates import (
    DROPPED,
    PAIRED,
    REFUSED,
    SPLIT,
    TEMPLATES,
    TOOL,
    assistant,
    call,
    listed,
    rendered,
    tokenizer_for,
    user,
)

# What TRL's marks include of the generation prompt, which `generate` provides and training without marks leaves out.
PROVIDED: dict[str, tuple[str, ...]] = {
    "deepseek_r1_distill": ("<｜Assistant｜>",),
    "deepseekv3": ("<｜Assistant｜>", "<｜tool▁outputs▁end｜>"),
    "gptoss": ("<|start|>assistant",),
    "muse_glimmer": ("<|start|>assistant",),
    "nemotron_3_5_lightning": ("<think", "<think>", "<think>\n"),  # a token may contain the end of it
    "nemotron_3_nano": ("<think", "<think>", "<think>\n"),
    "nemotron_3_super": ("<think", "<think>", "<think>\n"),
    "nemotron_3_ultra": ("<think", "<think>", "<think>\n"),
    "qwen2_5": ("\n",),
    "qwen3_5_nothink": ("<think>\n\n</think>\n\n", "<think>\n"),
    "qwen3_5_think": ("<think>\n", "<think>"),
    "qwen3_6": ("<think>\n", "<think>"),
    "qwen3_8": ("<think>\n", "<think>"),
}
# Where a call ends and the answer to its result begins: what generation gives and needs there is not in TRL's marks.
BEYOND = {"diffusion_gemma": {"<|turn>", "model", "\n", "<|tool_response>"}}
ENDS = {"deepseek_r1_distill": "<｜end▁of▁sentence｜>", "gemma": "<end_of_turn>", "gptoss": "<|return|>"}
WORDS = ["a", "c", "e", "final", "message", "assistant", "user", "model", "think", "channel", "analysis", "function"]
MARKS = ["<", "<a", "<answer>four</answer>", "<think", "<thinking>x", "<|", "<｜", "<think>\n", "</", "[", "{"]
TAGS = ["x<tool_call>", "[gMASK]", "{{x}}", "<|endoftext|>", "quartz", "\x0b"]
SPACES = [" ", "\n", "\n\n", "\t ", " x", "\nx", "x ", "x\n", "\n\nx\n\n"]
OTHER = ["🎉", "שלום", "مرحبا\u200f", "é", "가", "x🎉", "0"]
ANSWERS = st.one_of(
    st.sampled_from(WORDS + MARKS + SPACES + OTHER),
    st.text("ab <>\n|é🎉ש{}\"'", max_size=3),
    st.text(max_size=3).filter(lambda text: text.isprintable()),
)
FEATURES = {
    "system": "system",
    "tools": "tools without a call",
    "call": "call, content empty",
    "call and text": "call and text",
    "reasoning": "reasoning",
    "reasoning and a call": "reasoning and a call",
}
"""Content of a conversation -> the scenario of the table in docs/chat-templates.md that decides about it."""

LEFT_OUT = listed(REFUSED) | listed(DROPPED) | {case for case in SPLIT if not case[0].endswith("_training")}


def feasible(template: str) -> set[str]:
    """Return what the page says that the template renders."""
    return {feature for feature, scenario in FEATURES.items() if (template, scenario) not in LEFT_OUT}


class Pair(NamedTuple):
    """A tokenizer with a training template, and one with the template that it was made from."""

    marked: Any
    original: Any


@pytest.fixture(scope="module")
def pairs() -> Callable[[str], Pair]:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # line feeds, tags and headers are merged, so that tokens cross the borders of answers
    texts = [path.read_text(encoding="utf-8") for path in sorted(TEMPLATES.glob("*_training.jinja"))]
    model.train_from_iterator([*texts, "<think>\n\n</think>\n\n\n\nassistant\n\n \n" * 200], trainer)

    def tokenizer(template: str) -> Any:
        made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(model.to_str()), eos_token="<|endoftext|>")
        return tokenizer_for(made, template)

    return functools.cache(lambda name: Pair(tokenizer(f"{name}_training"), tokenizer(name)))


def marks_of(tokenizer: Any, record: Conversation) -> tuple[list[int], list[bool]]:
    """Return TRL's tokens and marks."""
    found = tokenizer.apply_chat_template(
        record.as_dicts(), tools=list(record.tools) or None, return_dict=True, return_assistant_tokens_mask=True
    )
    return list(found["input_ids"]), [bool(mark) for mark in found["assistant_masks"]]


def runs_of(marks: list[bool]) -> list[tuple[int, int]]:
    borders = [at for at in range(len(marks) + 1) if (at and marks[at - 1]) != (at < len(marks) and marks[at])]
    return list(zip(borders[::2], borders[1::2], strict=True))


def exchange(draw: Any, features: set[str]) -> list[Message]:
    """Draw a question and its answer, or a question, a call, its result and an answer."""
    question = user(draw(st.sampled_from(["Userone?", "a", "assistant", "Say <answer>."])))
    reason = {"reasoning_content": draw(st.sampled_from(["Because.", "a", "<b>"]))}
    answer = assistant(draw(ANSWERS), **(reason if "reasoning" in features and draw(st.booleans()) else {}))
    if "call" not in features or not draw(st.booleans()):
        return [question, answer]
    called = call(draw(st.sampled_from(["", "Sure.", "a"])) if "call and text" in features else "")
    if "reasoning and a call" in features and not called.content and draw(st.booleans()):
        called = replace(called, fields={**called.fields, **reason})
    return [question, called, Message("tool", "Resultword", {"name": "lookup_tide"}), answer]


@st.composite
def talks(draw: Any, features: set[str], most: int) -> Conversation:
    """Draw a conversation with the given features."""
    first = [Message("system", "Sysword.")] if "system" in features and draw(st.booleans()) else []
    parts = [exchange(draw, features) for _ in range(draw(st.integers(1, most)))]
    messages = [*first, *(message for part in parts for message in part)]
    has_tools = "tools" in features and (draw(st.booleans()) or any(m.role == "tool" for m in messages))
    return Conversation(tuple(messages), "talk.jsonl", 7, tools=(TOOL,) if has_tools else ())


def check_marked(pair: Pair, record: Conversation) -> None:
    """A template with marks: exactly TRL's tokens and marks."""
    ids, marks = marks_of(pair.marked, record)
    result = conversation_tokens(record, pair.marked)
    assert result.ids == ids
    assert result.trained == marks
    assert result.untrained_turns == 0


def check_original(template: str, pair: Pair, record: Conversation) -> bool:
    """A template without marks that renders the same text; return whether it does."""
    text, after = rendered(pair.marked, record), "<|user|>" if template == "glm4moe" else ""
    if text != rendered(pair.original, record) + after:  # TRL's GLM ends the last turn too
        return False
    ids, marks = marks_of(pair.marked, record)
    ids, marks = (ids[:-1], marks[:-1]) if after else (ids, marks)
    result = conversation_tokens(record, pair.original)
    assert result.ids == ids
    runs = runs_of(marks)
    turns = [at for at, message in enumerate(record.messages) if message.role == "assistant"]
    assert len(runs) == len(turns)
    excluded = 0
    for at, (start, end) in zip(turns, runs, strict=True):
        if not any(result.trained[start:end]):
            excluded += 1
            assert is_rewritten(pair.original, record, at) or is_blank(pair.original, record, at)
            continue
        starts = {start + size for size in sizes_provided(template, pair.original, ids[start:end])}
        ends = {end - 1} if ends_otherwise(template, record, at) else {end}
        allowed = [
            [start <= k < end and begin <= k < stop for k in range(len(ids))] for begin in starts for stop in ends
        ]
        mine = [trained and start <= k < end for k, trained in enumerate(result.trained)]
        assert mine in allowed, (
            record,
            pair.original.decode(ids[start:end]),
            pair.original.decode([ids[k] for k, trained in enumerate(mine) if trained]),
        )
    assert excluded == result.untrained_turns
    beyond = {pair.original.decode([ids[k]]) for k, trained in enumerate(result.trained) if trained and not marks[k]}
    assert beyond <= BEYOND.get(template, set())
    return True


def sizes_provided(template: str, tokenizer: Any, ids: list[int]) -> set[int]:
    """Return how many tokens at the beginning of a turn may be text of the generation prompt."""
    texts = PROVIDED.get(template, ())
    return {0} | {size for size in range(1, len(ids)) if tokenizer.decode(ids[:size]) in texts}


def is_rewritten(tokenizer: Any, record: Conversation, at: int) -> bool:
    """Return whether the model would generate another turn than the conversation contains, or after other text."""
    text, through = rendered(tokenizer, record), rendered(tokenizer, record, at + 1)
    history = rendered(tokenizer, record, at) if at else ""
    return not text.startswith(through.rstrip()) or not text.startswith(history)


def is_blank(tokenizer: Any, record: Conversation, at: int) -> bool:
    message = record.messages[at]
    without = (*record.messages[:at], replace(message, content=""))
    return not message.fields and rendered(tokenizer, record, at + 1) == rendered(
        tokenizer, replace(record, messages=without)
    )


def ends_otherwise(template: str, record: Conversation, at: int) -> bool:
    """gpt-oss: an answer that others follow ends with <|end|>, after which the model would not stop."""
    return template == "gptoss" and at + 1 < len(record.messages) and "tool_calls" not in record.messages[at].fields


@pytest.mark.costly(cases=10)
@pytest.mark.parametrize("template", PAIRED)
def test_short_answers(pairs: Callable[[str], Pair], template: str) -> None:
    """The answers that a search in the text would find elsewhere."""
    pair, compared = pairs(template), 0
    for answer in [*WORDS, *MARKS, *TAGS, *SPACES, *OTHER, *(f"yes{end}" for end in ENDS.values()), "<|im_end|>"]:
        record = Conversation(
            (user("Userone?"), assistant(answer), user("b"), assistant("c"), user("d"), assistant(answer)),
            "talk.jsonl",
            7,
        )
        check_marked(pair, record)
        compared += check_original(template, pair, record)
        compared += check_original(template, pair, Conversation(record.messages[:2]))
    assert compared > 40


@pytest.mark.parametrize("template", PAIRED)
def test_generated_conversations(pairs: Callable[[str], Pair], template: str) -> None:
    explore(pairs(template), template, 5, 2)


@pytest.mark.slow
@pytest.mark.parametrize("template", PAIRED)
def test_many_generated_conversations(pairs: Callable[[str], Pair], template: str) -> None:
    explore(pairs(template), template, 100, 9)


def explore(pair: Pair, template: str, count: int, most: int) -> None:
    rules = settings(max_examples=count, deadline=None, database=None, derandomize=True, phases=[Phase.generate])

    @rules
    @given(talks(feasible(f"{template}_training"), most), talks(feasible(template), most))
    def check(record: Conversation, other: Conversation) -> None:
        check_marked(pair, record)
        check_original(template, pair, other)

    check()
