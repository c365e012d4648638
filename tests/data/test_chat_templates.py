"""The chat templates that TRL ships: what is trained is what the template renders for the assistant, and no more.

Three independent judges: `apply_chat_template` for the ids; for each family of templates, an expression that finds the
assistant's turns in the rendered text; and the generation marks of TRL's training variants.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from lorakit.data import Conversation, Message, encode
from lorakit.data.chat import TokenizedRow, conversation_tokens, end_tokens
from lorakit.errors import DataError
from lorakit.session.prompts import encode_prompts

trl = pytest.importorskip("trl")
TEMPLATES = Path(trl.__file__).parent / "chat_templates"


class Form(NamedTuple):
    """The form of an assistant's turn in a family of templates."""

    begin: str
    end: str
    tail: str = ""  # may follow the end of a turn, and may be trained
    specials: tuple[str, ...] = ()


CHATML = Form(r"<\|im_start\|>assistant\n", r"<\|im_end\|>")
COHERE = Form(r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>", r"<\|END_OF_TURN_TOKEN\|>")
COHERE2 = Form(COHERE.begin + r"<\|START_RESPONSE\|>", r"<\|END_RESPONSE\|>" + COHERE.end)
DEEPSEEK = Form("(?:<｜Assistant｜>|<｜tool▁outputs▁end｜>)(?=.)", "<｜end▁of▁sentence｜>")
GEMMA = Form(r"<start_of_turn>model\n", r"<end_of_turn>", "", ("<start_of_turn>", "<end_of_turn>"))
GEMMA4 = Form(
    r"(?:<\|turn>model\n|<tool_response\|>(?:<\|turn>model\n)?)",
    r"(?:<turn\|>|<tool_call\|>(?=<\|tool_response>))",
    r"(?:<\|tool_response>)?",
    ("<|turn>", "<turn|>", "<|tool_response>", "<tool_response|>", "<|tool_call>", "<tool_call|>"),
)
GLM = Form(  # without an end of its own: the next turn's mark ends it
    r"<\|assistant\|>\n?", r"(?=<\|user\|>|<\|observation\|>|\Z)", r"(?:<\|user\|>|<\|observation\|>)?"
)
HARMONY = Form(  # a turn may have several parts, and the model writes the beginning of each but the first
    r"<\|start\|>assistant", r"(?:<\|end\|>|<\|return\|>|<\|call\|>)(?!<\|start\|>assistant)"
)
LLAMA3 = Form(r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n", r"<\|eot_id\|>")
MUSE = Form(r"(?<!<\|eom\|>)<\|start\|>assistant", r"<\|eot\|>")
PHI3 = Form(r"<\|assistant\|>\n", r"<\|end\|>", r"(?:\n<\|endoftext\|>)?")

FORMS: dict[str, Form] = {
    "cohere": COHERE,
    "cohere2": COHERE2,
    "deepseek_r1_distill": DEEPSEEK,
    "deepseekv3": DEEPSEEK,
    "diffusion_gemma": GEMMA4,
    "gemma": GEMMA,
    "gemma3": GEMMA,
    "glm4moe": GLM,
    "gptoss": HARMONY,
    "lfm2": CHATML,
    "lfm2_v2": CHATML,
    "llama3": LLAMA3,
    "muse_glimmer": MUSE,
    "nemotron_3_5_lightning": CHATML,
    "nemotron_3_nano": CHATML,
    "nemotron_3_super": CHATML,
    "nemotron_3_ultra": CHATML,
    "phi3": PHI3,
    "phi3_5": PHI3,
    "qwen2_5": CHATML,
    "qwen2_5_vl": CHATML,
    "qwen3": CHATML,
    "qwen3_5_nothink": CHATML,
    "qwen3_5_think": CHATML,
    "qwen3_6": CHATML,
    "qwen3_8": CHATML,
    "qwen3_instruct_2507": CHATML,
    "qwen3_vl": CHATML,
}
PAIRED = list(FORMS)  # each has a training variant
FORMS |= {f"{name}_training": FORMS[name] for name in PAIRED}
FORMS |= {
    "gemma4": GEMMA4,
    "gemma4_v2": GEMMA4,
    "gemma4_v3": GEMMA4,
    "gemma4_v4": GEMMA4,
    "gemma4_v5": GEMMA4,
    "lfm2_2_5": CHATML,
    "lfm2_2_5_v2": CHATML,
    "lfm2_2_5_vl": CHATML,
    "llama3_1": LLAMA3,
    "llama3_2": LLAMA3,
}

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "lookup_tide",
        "description": "Tells the xylotool.",
        "parameters": {
            "type": "object",
            "properties": {"harbour": {"type": "string", "description": "The quayparam."}},
            "required": ["harbour"],
        },
    },
}


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str | None, *, trained: bool = True, **fields: Any) -> Message:
    return Message("assistant", text, fields, trained)


def call(text: str | None, arguments: Any = None, *, trained: bool = True) -> Message:
    function = {"name": "lookup_tide", "arguments": arguments or {"harbour": "Zeebrugge"}}
    return assistant(text, trained=trained, tool_calls=[{"type": "function", "function": function}])


def talk(*messages: Message, tools: bool = False, **options: Any) -> Conversation:
    return Conversation(tuple(messages), "talk.jsonl", 7, tools=(TOOL,) if tools else (), options=options)


SYSTEM = Message("system", "Sysword.")
RESULT = Message("tool", "Resultword", {"name": "lookup_tide"})
REASONS = (
    user("Userone?"),
    assistant("Answerone.", reasoning_content="Reasonone."),
    user("Usertwo?"),
    assistant("Answertwo.", reasoning_content="Reasontwo."),
)
SCENARIOS: dict[str, Conversation] = {
    "plain": talk(user("Userone?"), assistant("Answerone.")),
    "two turns": talk(user("Userone?"), assistant("Answerone."), user("Usertwo?"), assistant("Answertwo.")),
    "system": talk(SYSTEM, user("Userone?"), assistant("Answerone."), user("Usertwo?"), assistant("Answertwo.")),
    "weight": talk(user("Userone?"), assistant("Answerone.", trained=False), user("Usertwo?"), assistant("Answertwo.")),
    "call, content None": talk(user("Userone?"), call(None), RESULT, assistant("Answertwo."), tools=True),
    "call, content empty": talk(user("Userone?"), call(""), RESULT, assistant("Answertwo."), tools=True),
    "call and text": talk(user("Userone?"), call("Answerone."), RESULT, assistant("Answertwo."), tools=True),
    "call without weight": talk(user("Userone?"), call("", trained=False), RESULT, assistant("Answertwo."), tools=True),
    "call at the end": talk(user("Userone?"), call(""), tools=True),
    "call without tools": talk(user("Userone?"), call(""), RESULT, assistant("Answertwo.")),
    "call as text": talk(
        user("Userone?"), call("", json.dumps({"harbour": "Zeebrugge"})), RESULT, assistant("Answertwo.")
    ),
    "tools without a call": talk(user("Userone?"), assistant("Answerone."), tools=True),
    "reasoning": talk(*REASONS[:2]),
    "reasoning in two turns": talk(*REASONS),
    "reasoning and a call": talk(
        user("Userone?"),
        assistant("", reasoning_content="Reasonone.", tool_calls=call("").fields["tool_calls"]),
        RESULT,
        assistant("Answertwo.", reasoning_content="Reasontwo."),
        tools=True,
    ),
}

# A star: its training variant too. What `apply_chat_template` itself rejects:
REFUSED: dict[str, str] = {
    "call, content empty": "cohere* cohere2* deepseekv3 gemma* gemma3*",
    "call and text": "cohere* cohere2* deepseekv3 gemma* gemma3*",
    "call without weight": "cohere* cohere2* deepseekv3 gemma* gemma3*",
    "call without tools": "cohere* cohere2* deepseekv3 gemma* gemma3*",
    "call as text": "cohere* cohere2* diffusion_gemma* gemma* gemma3* glm4moe* lfm2_v2* muse_glimmer* nemotron_3_5_lightning* nemotron_3_nano* nemotron_3_super* nemotron_3_ultra* qwen3_5_nothink* qwen3_5_think* qwen3_6* qwen3_8* gemma4_v5 lfm2_2_5 lfm2_2_5_v2 lfm2_2_5_vl",
    "reasoning and a call": "cohere* cohere2* deepseekv3 gemma* gemma3*",
    "call at the end": "deepseekv3",
    "system": "gemma*",
}
# What the template silently leaves out: calls, tools, reasoning (of the last turn, where of others), content.
DROPPED: dict[str, str] = {
    "call at the end": "cohere* cohere2* deepseek_r1_distill* gemma* gemma3* lfm2* llama3* phi3* phi3_5* qwen2_5_vl* deepseekv3_training",
    "tools without a call": "cohere* cohere2* deepseek_r1_distill* deepseekv3* gemma* gemma3* llama3* phi3* phi3_5* qwen2_5_vl*",
    "reasoning": "cohere* cohere2* deepseek_r1_distill* deepseekv3* gemma* gemma3* lfm2* lfm2_v2* llama3* phi3* phi3_5* qwen2_5* qwen2_5_vl* qwen3_instruct_2507* qwen3_vl* gemma4 gemma4_v2 gemma4_v3 gemma4_v4 llama3_1 llama3_2",
    "reasoning in two turns": "cohere* cohere2* deepseek_r1_distill* deepseekv3* gemma* gemma3* lfm2* lfm2_v2* llama3* phi3* phi3_5* qwen2_5* qwen2_5_vl* qwen3_instruct_2507* qwen3_vl* gemma4 gemma4_v2 gemma4_v3 gemma4_v4 llama3_1 llama3_2",
    "call, content empty": "deepseek_r1_distill* lfm2* llama3* phi3* phi3_5* qwen2_5_vl* deepseekv3_training",
    "call and text": "deepseek_r1_distill* gptoss* lfm2* llama3* muse_glimmer* phi3* phi3_5* qwen2_5_vl* deepseekv3_training llama3_1 llama3_2",
    "call without weight": "deepseek_r1_distill* lfm2* llama3* phi3* phi3_5* qwen2_5_vl* deepseekv3_training",
    "call without tools": "deepseek_r1_distill* lfm2* llama3* phi3* phi3_5* qwen2_5_vl*",
    "call as text": "deepseek_r1_distill* lfm2* llama3* phi3* phi3_5* qwen2_5_vl*",
    "reasoning and a call": "deepseek_r1_distill* lfm2* lfm2_v2* llama3* phi3* phi3_5* qwen2_5* qwen2_5_vl* qwen3_instruct_2507* qwen3_vl* deepseekv3_training gemma4 gemma4_v2 gemma4_v3 gemma4_v4 llama3_1 llama3_2",
}


def tokenizer_for(tokenizer: Any, template: str) -> Any:
    text = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    marks = sorted(
        {*re.findall(r"<\|[A-Za-z_]+\|>|<｜[^｜<>]+｜>", text), *FORMS[template].specials} - {"<|endoftext|>"}
    )
    tokenizer.add_special_tokens({"bos_token": "<s>", "extra_special_tokens": ["<|im_start|>", "<|im_end|>", *marks]})
    tokenizer.chat_template = text
    return tokenizer


class Made(NamedTuple):
    """Values that are made once: a tokenizer per template, and the tokens of each scenario."""

    tokenizer: Callable[[str], Any]
    tokens: Callable[[str, str], TokenizedRow]


@pytest.fixture(scope="module")
def made(make_tiny_tokenizer: Callable[[], Any]) -> Made:
    tokenizer = functools.cache(lambda template: tokenizer_for(make_tiny_tokenizer(), template))
    return Made(
        tokenizer,
        functools.cache(lambda template, scenario: conversation_tokens(SCENARIOS[scenario], tokenizer(template))),
    )


def rendered(tokenizer: Any, record: Conversation, count: int | None = None, **options: Any) -> str:
    arguments = {"tools": list(record.tools) or None, **record.options, **options}
    return str(tokenizer.apply_chat_template(record.as_dicts()[:count], tokenize=False, **arguments))


def runs(tokenizer: Any, ids: list[int], marks: Any) -> list[str]:
    found: list[list[int]] = []
    before = False
    for token, mark in zip(ids, marks, strict=True):
        if mark and not before:
            found.append([])
        if mark:
            found[-1].append(token)
        before = bool(mark)
    return [tokenizer.decode(run) for run in found]


def shared(one: str, other: str) -> int:
    """Return the length of the text with which both texts begin."""
    return next(
        (place for place, pair in enumerate(zip(one, other, strict=False)) if len(set(pair)) > 1),
        min(len(one), len(other)),
    )


class Turn(NamedTuple):
    """An assistant's turn in the rendered text: what may be trained of it, and whether a prefix renders it otherwise."""

    message: Message
    said: set[str]
    rewritten: bool


def turns_of(tokenizer: Any, template: str, record: Conversation) -> list[Turn]:
    """The assistant's turns. One may begin after its header, or after what it shares with the generation prompt."""
    form = FORMS[template]
    text = rendered(tokenizer, record)
    found = list(re.finditer(f"(?P<begin>{form.begin})(?P<said>.*?{form.end})(?P<tail>{form.tail})", text, re.DOTALL))
    places = [place for place, message in enumerate(record.messages) if message.role == "assistant"]
    assert len(found) == len(places), text
    turns = []
    for place, match in zip(places, found, strict=True):
        before = rendered(tokenizer, record, place)
        prompt = rendered(tokenizer, record, place, add_generation_prompt=True)
        begins = {match.start("said")}
        if "endgeneration" in tokenizer.chat_template:  # some templates' marks cover the header
            begins.add(match.start("begin"))
        if text.startswith(before):
            begins.add(max(match.start("begin"), shared(prompt, text)))
        said = {text[begin:end].strip() for begin in begins for end in (match.end("said"), match.end("tail"))}
        after = rendered(tokenizer, record, place + 1)
        turns.append(Turn(record.messages[place], said, not text.startswith(after.rstrip())))
    return turns


def words_of(message: Message) -> list[str]:
    words = [message.content or "", str(message.fields.get("reasoning_content", ""))]
    return [word for word in words if word] + (["Zeebrugge", "lookup_tide"] if "tool_calls" in message.fields else [])


# The training variant renders other text than the template, since it keeps earlier turns as they were.
OTHER_TEXT: dict[str, str] = {
    "call as text": "deepseekv3 qwen3",
    "call at the end": "glm4moe",
    "two turns": "qwen3 qwen3_5_nothink qwen3_5_think qwen3_6",
    "system": "qwen3 qwen3_5_nothink qwen3_5_think qwen3_6",
    "weight": "qwen3 qwen3_5_nothink qwen3_5_think qwen3_6",
    "call, content empty": "qwen3",
    "call and text": "qwen3",
    "call without weight": "qwen3",
    "call without tools": "qwen3",
    "reasoning in two turns": "qwen3 qwen3_5_nothink qwen3_5_think qwen3_6",
}


for table in (REFUSED, DROPPED, OTHER_TEXT):  # null is rendered as an empty text
    table["call, content None"] = table["call, content empty"]


def listed(table: dict[str, str]) -> set[tuple[str, str]]:
    cases = set()
    for scenario, names in table.items():
        for name in names.split():
            cases |= {(name.rstrip("*"), scenario)} | (
                {(f"{name[:-1]}_training", scenario)} if name[-1] == "*" else set()
            )
    return cases


# A turn is excluded from the loss if the model would generate other text than the conversation contains, since the
# template changes the turn, or the text before it, when other turns follow.
EXCLUDED: dict[str, str] = {
    "two turns": "qwen3 qwen3_5_nothink qwen3_5_think qwen3_6",
    "system": "qwen3 qwen3_5_nothink qwen3_5_think qwen3_6",
    "call, content empty": "qwen3",
    "call, content None": "qwen3",
    "call and text": "qwen3 diffusion_gemma gemma4 gemma4_v3 gemma4_v4 gemma4_v5",
    "call without tools": "qwen3",
    "call as text": "qwen3",
    "reasoning in two turns": "diffusion_gemma gemma4_v5 glm4moe gptoss nemotron_3_5_lightning nemotron_3_nano "
    "nemotron_3_super nemotron_3_ultra qwen3 qwen3_5_nothink qwen3_5_think qwen3_6",
    "reasoning and a call": "gptoss",
}
# gpt-oss without marks: a turn that ended with <|return|> ends with <|end|> once others follow, after which the model
# would not stop; the end is not trained.
OTHER_END = {("gptoss", "two turns"), ("gptoss", "system")}
# gpt-oss removes the reasoning of a call from the text before the answer.
OTHER_HISTORY = {("gptoss", "reasoning and a call")}

ALL = [(template, scenario) for template in FORMS for scenario in SCENARIOS]
RENDERED = [case for case in ALL if case not in listed(REFUSED) | listed(DROPPED)]
# Gemma 4 puts the text of a turn that calls after the result of the call: not one stretch of text.
SPLIT = {(name, "call and text") for name, form in FORMS.items() if form is GEMMA4}
APART = pytest.mark.axes(alone=("template", "scenario"))
cases = pytest.mark.parametrize(
    ("template", "scenario"), [pytest.param(*case, id="-".join(case), marks=APART) for case in RENDERED]
)


def left_out_words(tokenizer: Any, record: Conversation) -> list[str]:
    text = rendered(tokenizer, record)
    words = [word for message in record.messages for word in words_of(message)]
    return [word for word in [*words, *(["xylotool"] if record.tools else [])] if word not in text]


def test_enough_templates() -> None:
    assert len(PAIRED) >= 20
    assert {case[0] for case in RENDERED} == set(FORMS)
    for table in (listed(REFUSED), listed(DROPPED)):
        assert table <= set(ALL)
    assert not listed(REFUSED) & listed(DROPPED)


@cases
def test_ids_are_those_of_apply_chat_template(made: Made, template: str, scenario: str) -> None:
    tokenizer, record = made.tokenizer(template), SCENARIOS[scenario]
    turns = made.tokens(template, scenario)
    whole = tokenizer.apply_chat_template(record.as_dicts(), tools=list(record.tools) or None, **record.options)
    assert list(turns.ids) == list(whole["input_ids"])
    assert tokenizer.decode(turns.ids) == rendered(tokenizer, record)
    assert len(turns.trained) == len(turns.ids)


@cases
def test_trained_are_whole_turns_of_the_assistant(made: Made, template: str, scenario: str) -> None:
    """Each stretch of trained tokens is one turn from its header to its end marker; those without are counted."""
    if (template, scenario) in SPLIT:
        pytest.skip("the template splits this turn")
    tokenizer, record = made.tokenizer(template), SCENARIOS[scenario]
    result = made.tokens(template, scenario)
    trained = runs(tokenizer, result.ids, result.trained)
    wanted = [turn for turn in turns_of(tokenizer, template, record) if turn.message.is_trained]
    assert len(trained) + result.untrained_turns == len(wanted)
    assert bool(result.reason) == bool(result.untrained_turns)
    rest = iter(wanted)
    ends = ("", "<|end|>") if (template, scenario) in OTHER_END else ("",)
    for run in trained:  # in order; a turn may be left out
        assert any(run.strip() + end in turn.said for turn in rest for end in ends), (run, wanted)


@cases
def test_words_of_others_are_never_trained(made: Made, template: str, scenario: str) -> None:
    tokenizer, record = made.tokenizer(template), SCENARIOS[scenario]
    result = made.tokens(template, scenario)
    trained = "".join(runs(tokenizer, result.ids, result.trained))
    others = ["Sysword", "Userone", "Usertwo", "Resultword", "xylotool", "quayparam"]
    silent = [m for m in record.messages if m.role == "assistant" and not m.is_trained]
    assert not [word for word in others if word in trained]
    assert not [word for message in silent for word in words_of(message) if word in trained]
    if not result.untrained_turns:
        text = rendered(tokenizer, record)
        words = [word for m in record.messages if m.role == "assistant" and m.is_trained for word in words_of(m)]
        assert not [word for word in words if word in text and word not in trained]


@cases
def test_nothing_to_train_is_an_error_with_the_reason(made: Made, template: str, scenario: str) -> None:
    tokenizer, record = made.tokenizer(template), SCENARIOS[scenario]
    result = made.tokens(template, scenario)
    if any(result.trained):
        assert encode([record], tokenizer, 4096).report.untrained_turns == result.untrained_turns
        return
    assert result.untrained_turns
    with pytest.raises(DataError, match=re.escape(result.reason)):
        encode([record], tokenizer, 4096)


@cases
def test_a_turn_is_left_out_only_if_the_template_rewrites_it(made: Made, template: str, scenario: str) -> None:
    """Generation marks locate every turn. Without them, a turn that is rendered alike when others follow is there."""
    if (template, scenario) in SPLIT:
        pytest.skip("the template splits this turn")
    tokenizer, record = made.tokenizer(template), SCENARIOS[scenario]
    wanted = [turn for turn in turns_of(tokenizer, template, record) if turn.message.is_trained]
    rewritten = 0 if "endgeneration" in tokenizer.chat_template else sum(turn.rewritten for turn in wanted)
    result = made.tokens(template, scenario)
    assert result.untrained_turns <= rewritten + ((template, scenario) in OTHER_HISTORY), result.reason


def test_excluded_turns_are_those_of_the_list(made: Made) -> None:
    assert {case for case in RENDERED if made.tokens(*case).untrained_turns} == listed(EXCLUDED)


@cases
def test_the_end_is_noticed(made: Made, template: str, scenario: str) -> None:
    result, messages = made.tokens(template, scenario), SCENARIOS[scenario].messages
    followed = any(message.role == "assistant" and message.is_trained for message in messages[:-1])
    # glm4moe writes no end marker: the mark of the next turn ends a turn
    assert result.ended == (
        any(result.trained) and (template != "glm4moe" or (followed and result.untrained_turns == 0))
    )


@pytest.mark.parametrize("template", FORMS)
def test_generation_continues_where_training_begins(made: Made, template: str) -> None:
    """With a system prompt or without, the ids of `generate` are the ids before the first token with loss.

    What the generation prompt has more is reported; the marks of some templates also cover the end of the prompt.
    """
    tokenizer = made.tokenizer(template)
    for name in ("plain", "system"):
        if (template, name) not in RENDERED:
            continue
        record = SCENARIOS[name]
        system = SYSTEM.content if name == "system" else None
        (prompt,) = encode_prompts([f"{record.messages[-2].content}"], tokenizer, "chat", system)
        record = replace(record, messages=(*record.messages[: 1 if system else 0], *record.messages[-2:]))
        result = conversation_tokens(record, tokenizer)
        size = next((at for at, (a, b) in enumerate(zip(prompt, result.ids, strict=False)) if a != b), len(prompt))
        if "endgeneration" not in tokenizer.chat_template:
            assert tokenizer.decode(prompt[size:]) == result.prompt
            assert result.trained.index(True) == size
        assert not set(result.trained[size : size + 2]) - {True}
        assert result.trained.index(True) <= size


@pytest.mark.parametrize(("template", "scenario"), sorted(listed(REFUSED)), ids=lambda value: value)
def test_what_the_template_rejects_is_an_error(tiny_tokenizer: Any, template: str, scenario: str) -> None:
    tokenizer, record = tokenizer_for(tiny_tokenizer, template), SCENARIOS[scenario]
    with pytest.raises(Exception, match=r"\S") as rejected:
        rendered(tokenizer, record)
    with pytest.raises(DataError, match=r"talk.jsonl:7: the chat template rejects this conversation") as error:
        conversation_tokens(record, tokenizer)
    assert str(rejected.value) in str(error.value)


@pytest.mark.parametrize(("template", "scenario"), sorted(listed(DROPPED)), ids=lambda value: value)
def test_what_the_template_leaves_out_is_an_error(tiny_tokenizer: Any, template: str, scenario: str) -> None:
    tokenizer, record = tokenizer_for(tiny_tokenizer, template), SCENARIOS[scenario]
    assert left_out_words(tokenizer, record)
    with pytest.raises(DataError, match=r"talk.jsonl:7: .*does not render the (tool calls|tools|reasoning|content) of"):
        conversation_tokens(record, tokenizer)


@cases
def test_tables_name_all_that_is_left_out(made: Made, template: str, scenario: str) -> None:
    tokenizer, record = made.tokenizer(template), SCENARIOS[scenario]
    earlier = {"Reasonone."} if "Reasontwo." in rendered(tokenizer, record) else set()  # dropped from earlier turns
    assert set(left_out_words(tokenizer, record)) <= earlier


@pytest.mark.parametrize(
    ("template", "scenario"),
    [case for case in RENDERED if (f"{case[0]}_training", case[1]) in RENDERED and case not in SPLIT],
)
def test_the_marks_of_the_training_variant_agree(tiny_tokenizer: Any, template: str, scenario: str) -> None:
    """Wherever both render the same text, up to white space, the header and what the generation prompt gives."""
    record, variant = SCENARIOS[scenario], f"{template}_training"
    tokenizer = tokenizer_for(tiny_tokenizer, variant)
    marked = tokenizer.apply_chat_template(
        record.as_dicts(), tools=list(record.tools) or None, return_dict=True, return_assistant_tokens_mask=True
    )
    judged = runs(tokenizer, marked["input_ids"], marked["assistant_masks"])
    texts = [rendered(tokenizer, record)]
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    texts.append(rendered(tokenizer, record))
    if texts[0] != texts[1] and not (FORMS[template] is GLM and texts[0] == texts[1] + "<|user|>"):
        assert (template, scenario) in listed(OTHER_TEXT)
        return
    assert (template, scenario) not in listed(OTHER_TEXT)
    result = conversation_tokens(record, tokenizer)
    said = [
        turn for turn in zip(turns_of(tokenizer, template, record), judged, strict=True) if turn[0].message.is_trained
    ]
    found = runs(tokenizer, result.ids, result.trained)

    def agrees(run: str, mark: str) -> bool:
        tail = r"\s*(<\|endoftext\|>|<\|user\|>|<\|observation\|>|<\|tool_response>)?\s*$"
        run, mark = re.sub(tail, "", run), re.sub(tail, "", mark)
        run = re.sub(r"^<\|turn>model\n", "", run).strip()  # the generation prompt after a call's result has none
        header = FORMS[template].begin.replace("(?=.)", "")
        before = rf"({header})?\s*(<think>\n?)?(\n</think>\n\n)?\s*"  # header, and end of the prompt
        return mark.endswith(run) and re.fullmatch(before, mark.removesuffix(run)) is not None

    assert len(found) + result.untrained_turns == len(said)
    rest = iter(said)
    ends = ("", "<|end|>") if (template, scenario) in OTHER_END else ("",)
    for run in found:
        assert any(agrees(run + end, mark) for _, mark in rest for end in ends), (run, judged)


MARKED = {name for name in FORMS if "endgeneration" in (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")}


@pytest.mark.parametrize(
    ("template", "scenario"),
    [case for case in RENDERED if case[0] in MARKED and all(m.is_trained for m in SCENARIOS[case[1]].messages)],
)
def test_marks_decide_where_there_are_any(made: Made, template: str, scenario: str) -> None:
    """Just those tokens, white space after an end marker aside."""
    record, tokenizer = SCENARIOS[scenario], made.tokenizer(template)
    marked = tokenizer.apply_chat_template(
        record.as_dicts(), tools=list(record.tools) or None, return_dict=True, return_assistant_tokens_mask=True
    )
    judged = runs(tokenizer, marked["input_ids"], marked["assistant_masks"])
    result = made.tokens(template, scenario)
    assert [run.strip() for run in runs(tokenizer, result.ids, result.trained)] == [run.strip() for run in judged]


@pytest.mark.parametrize("template", ["smolvlm", "smolvlm_training", "idefics3", "idefics3_training"])
def test_a_template_that_wants_lists_as_content_is_refused(tiny_tokenizer: Any, template: str) -> None:
    """It renders no letter of content that is text."""
    tiny_tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    assert "Answerone" not in rendered(tiny_tokenizer, SCENARIOS["plain"])
    with pytest.raises(DataError, match="does not render the content of an assistant turn"):
        conversation_tokens(SCENARIOS["plain"], tiny_tokenizer)


@pytest.mark.parametrize(
    ("template", "options", "sign"),
    [
        ("gptoss", {"reasoning_effort": "high"}, "Reasoning: high"),
        ("gptoss_training", {"reasoning_effort": "high"}, "Reasoning: high"),
        ("llama3_1", {"date_string": "31 Feb 2020"}, "31 Feb 2020"),
        ("llama3_2", {"date_string": "31 Feb 2020"}, "31 Feb 2020"),
        ("gemma4_v5", {"enable_thinking": True}, "<|think|>"),
        ("qwen3", {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ("qwen3_5_think", {"enable_thinking": False}, "<think>\n\n</think>\n\n"),
        ("nemotron_3_nano", {"enable_thinking": False}, "<think></think>"),
        ("glm4moe", {"enable_thinking": False}, "/nothink"),
    ],
)
def test_keywords_reach_the_template(tiny_tokenizer: Any, template: str, options: dict[str, Any], sign: str) -> None:
    tokenizer = tokenizer_for(tiny_tokenizer, template)
    record = talk(user("Userone?"), assistant("Answerone."), **options)
    result = conversation_tokens(record, tokenizer)
    whole = tokenizer.apply_chat_template(record.as_dicts(), **options)
    assert list(result.ids) == list(whole["input_ids"])
    assert sign in tokenizer.decode(result.ids)
    (turn,) = turns_of(tokenizer, template, record)
    (run,) = runs(tokenizer, result.ids, result.trained)
    assert run.strip() in turn.said
    assert "Answerone." in run


# The tokens at which the models of each family end an answer or a call, by their generation configs on the Hub.
ENDS = {
    CHATML: {"<|im_end|>"},
    COHERE: {"<|END_OF_TURN_TOKEN|>"},
    COHERE2: {"<|END_OF_TURN_TOKEN|>"},
    DEEPSEEK: {"<|endoftext|>", "<｜end▁of▁sentence｜>"},
    GEMMA: {"<end_of_turn>"},
    GEMMA4: {"<turn|>", "<|tool_response>"},
    GLM: {"<|user|>", "<|observation|>", "<|endoftext|>"},
    HARMONY: {"<|return|>", "<|call|>", "<|endoftext|>"},
    LLAMA3: {"<|eot_id|>", "<|eom_id|>"},
    MUSE: {"<|eot|>", "<|eom|>"},
    PHI3: {"<|end|>", "<|endoftext|>"},
}


@pytest.mark.parametrize("template", FORMS)
def test_the_ends_are_those_of_the_models(made: Made, template: str) -> None:
    tokenizer = made.tokenizer(template)
    found = {tokenizer.decode([token]) for token in end_tokens(tokenizer)}
    assert found, template
    assert found <= ENDS[FORMS[template]]
