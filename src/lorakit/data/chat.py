"""Render conversations with a chat template, and find the assistant's tokens, which contribute to the loss.

If the template marks the assistant's text with `{% generation %}`, those marks are used. Otherwise, the conversation is
rendered up to each assistant turn, with the generation prompt, and including the turn: what the second text adds to the
first is what the model would have to generate. No answer is searched in a text. If a template begins or ends a turn
differently from the generation prompt or the whole conversation, the answer is replaced by words that occur
nowhere else, and two such renderings show which text is the template's. The tokens are those of the whole text.
"""

from __future__ import annotations

import itertools
import re
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from operator import itemgetter

from lorakit.data.chat_rendering import (
    absent,
    answer_parts,
    check_rendered,
    contains,
    in_words,
    rendered,
    row_error,
    template_name,
    with_marks,
)
from lorakit.data.records import REASONING, Completion, Conversation, Message, Record
from lorakit.data.tokens import Span, Tokenizer, beginning, text_of, token_ids, with_spaces
from lorakit.durable import JsonObject
from lorakit.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True, slots=True)
class TokenizedRow:
    """A tokenized conversation or completion.

    Attributes:
        trained: Whether each token contributes to the loss; True in assistant turns and in completions.
        ended: Whether an end marker contributes to the loss: the template's end-of-turn marker, or the end-of-text
            token.
        untrained_turns: Number of assistant turns excluded from the loss because the model would generate other text.
        reason: Why the first of these turns is excluded, or "".
        prompt: Text that ends the generation prompt but does not precede the answer in the conversation, or "".
        joined_turns: Number of assistant turns whose first token also contains the end of the generation prompt.
        texts: The texts whose tokens these are, in order, without special tokens around them.
    """

    ids: list[int]
    trained: list[bool]
    ended: bool
    untrained_turns: int = 0
    reason: str = ""
    prompt: str = ""
    joined_turns: int = 0
    texts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Span:
    """The text of an assistant turn in the rendered conversation.

    Attributes:
        is_cut: Whether other text follows the end than in generation; a token across the end is then not the model's.
        prompt: Text that ends the generation prompt but does not precede this turn.
    """

    start: int
    end: int
    is_cut: bool
    prompt: str


def is_plain_instruction(record: Record, tokenizer: Tokenizer) -> bool:
    """Return whether a record is an instruction that must be rendered without a chat template."""
    return isinstance(record, Conversation) and record.is_instruction and not tokenizer.chat_template


def row_tokens(record: Completion | Conversation, tokenizer: Tokenizer) -> TokenizedRow:
    """Tokenize a completion, or a conversation as `conversation_tokens` does, and mark the tokens with loss."""
    if isinstance(record, Conversation):
        if not is_plain_instruction(record, tokenizer):
            return conversation_tokens(record, tokenizer)
        record = record.as_completion()
    prompt = token_ids(tokenizer, record.prompt) if record.prompt else []
    both = token_ids(tokenizer, record.prompt + record.completion)
    # if a token spans the boundary, tokenize prompt and completion separately: generation tokenizes the prompt alone
    is_whole = both[: len(prompt)] == prompt
    texts = (record.prompt + record.completion,) if is_whole else (record.prompt, record.completion)
    answer = both[len(prompt) :] if is_whole else token_ids(tokenizer, record.completion)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    answer += end if answer[-1:] != end else []
    prompt = beginning(tokenizer) + prompt
    return TokenizedRow(prompt + answer, [False] * len(prompt) + [True] * len(answer), bool(end), texts=texts)


def conversation_tokens(record: Conversation, tokenizer: Tokenizer) -> TokenizedRow:
    """Render and tokenize a conversation, and mark the tokens that overlap the assistant's turns and end markers.

    Raises:
        DataError: The tokenizer has no chat template, the template rejects the conversation or omits tools, tool calls,
            content or reasoning, or a turn cannot be located.
    """
    if not tokenizer.chat_template:
        raise row_error(
            record,
            "the data contains conversations, but the model's tokenizer has no chat template. Use an instruct model, "
            "--chat-template, or rows with 'prompt' and 'completion'.",
        )
    text = rendered(record, tokenizer)
    check_rendered(record, tokenizer, text)
    words = in_words(record, absent("quartz", text), "k")
    check_rendered(words, tokenizer, rendered(words, tokenizer))  # short answers occur in any text, these words do not
    row = _by_marks(record, words, tokenizer) or _by_prompts(record, words, tokenizer, text)
    return replace(row, texts=(text,))


def end_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids of the special tokens that end answers and calls in training; empty without a chat template."""
    function: JsonObject = {"name": "velvet", "description": "opal", "parameters": {"type": "object", "properties": {}}}
    call: JsonObject = {"type": "function", "function": {"name": "velvet", "arguments": {"amber": "jade"}}}
    tools: tuple[JsonObject, ...] = ({"type": "function", "function": function},)
    calls = [Message("assistant", None, {"tool_calls": [call] * count}) for count in (2, 1)]  # some accept only one
    user, result, ends = Message("user", "opal"), Message("tool", "opal", {"name": "velvet"}), set[int]()
    for turns, following, given in (([Message("assistant", "quartz")], user, ()), (calls, result, tools)):
        for turn in turns:
            try:
                ends |= _end_token(Conversation((user, turn, following), "the end of a turn", tools=given), tokenizer)
            except DataError:
                continue
            break
    return frozenset(ends)


def _end_token(talk: Conversation, tokenizer: Tokenizer) -> set[int]:
    """Return the special token that ends the second turn, or else the one with which the third begins, if any."""
    for count in (2, 3):
        row = conversation_tokens(replace(talk, messages=talk.messages[:count]), tokenizer)
        for run in _runs(row.trained)[:1]:
            if _special_end(tokenizer, row.ids, run):
                ids = [row.ids[at] for at in run]
                end = next(token for token in reversed(ids) if text_of(tokenizer, [token]).strip())
                return {end} if ids.count(end) == 1 else set()  # the end of each call is not that of the turn
    return set()


def _by_marks(record: Conversation, words: Conversation, tokenizer: Tokenizer) -> TokenizedRow | None:
    """Use the template's marks; return None if there are none or if they do not cover the assistant's turns."""
    template = tokenizer.chat_template
    if not (isinstance(template, str) and _GENERATION.search(template) and getattr(tokenizer, "is_fast", False)):
        return None
    marked = "".join(_marked(words, tokenizer))
    parts = [part for turn in _answers(words) for part in answer_parts(turn)]
    if not contains(marked, parts):
        return None
    text, spans = with_marks(record, tokenizer)
    if not all(turn.is_trained for turn in _answers(record)):
        turns = _marked_turns(words, tokenizer)
        if len(turns) != len(spans):
            return None
        spans = [span for span, turn in zip(spans, turns, strict=True) if turn.is_trained]
    ids, offsets = _tokenized(record, tokenizer, text, [])
    marks = [False] * len(ids)
    for position in (at for begin, end in spans for at in _run(offsets, _Span(begin, end, False, ""))):
        marks[position] = True
    tail = marked.rpartition(parts[-1])[2] if parts else ""
    ended = bool(tail.strip()) or any(_special_end(tokenizer, ids, run) for run in _runs(marks))
    return TokenizedRow(ids, marks, ended)


def _answers(record: Conversation) -> list[Message]:
    return [message for message in record.messages if message.role == "assistant"]


def _marked(record: Conversation, tokenizer: Tokenizer) -> list[str]:
    """Return the texts that the template marks."""
    text, spans = with_marks(record, tokenizer)
    return [text[begin:end] for begin, end in spans]


def _marked_turns(words: Conversation, tokenizer: Tokenizer) -> list[Message]:
    """Return the turn of each mark, by its words; nothing if a mark has words of several turns or none."""
    numbers, turns = itertools.count(), list[Message]()
    stem = absent("velvet", "".join(map(str, words.messages)))
    for turn in words.messages:
        if turn.role == "assistant" and not answer_parts(turn):
            turn = replace(turn, content=f"{turn.content or ''}{stem}{next(numbers):06}k")
        turns.append(turn)
    filled = replace(words, messages=tuple(turns))
    matches = [[turn for turn in _answers(filled) if _has_word(text, turn)] for text in _marked(filled, tokenizer)]
    return [turn for [turn] in matches] if all(len(owners) == 1 for owners in matches) else []


def _has_word(text: str, turn: Message) -> bool:
    """Return whether a text contains a part of a turn that is in words; a turn may have several marked parts."""
    parts = [*answer_parts(turn), *map(turn.fields.get, REASONING), *(turn.content or "").split("</think>")]
    return any(contains(text, [part.removeprefix("<think>")]) for part in parts if isinstance(part, str) and part)


def _runs(marks: list[bool]) -> list[list[int]]:
    """Return the positions of each unbroken run of marked tokens."""
    groups = itertools.groupby(range(len(marks)), key=marks.__getitem__)
    return [list(group) for is_marked, group in groups if is_marked]


def _by_prompts(record: Conversation, words: Conversation, tokenizer: Tokenizer, text: str) -> TokenizedRow:
    """Locate each turn by the generation prompt before it."""
    spans, missed, reason = list[_Span](), 0, ""
    for index, message in enumerate(record.messages):
        if message.role != "assistant" or not message.is_trained:
            continue
        span = _span(record, words, tokenizer, index, text)
        if isinstance(span, str) or (spans and span.start < spans[-1].end):
            missed += 1
            reason = reason or (span if isinstance(span, str) else _REWRITTEN)
        else:
            spans.append(span)
    ids, offsets = _tokenized(record, tokenizer, text, spans)
    trained, ended, joined = [False] * len(ids), False, 0
    for span in spans:
        run = _run(offsets, span)
        if not run:
            continue
        last, following = _special_end(tokenizer, ids, run), run[-1] + 1
        if not span.is_cut and (not last or any(last in (turn.content or "") for turn in record.messages)):
            if _end_marker(record, tokenizer):
                ended = True
            else:  # without an end of its own, a turn is ended by the special token that begins the next one
                last = _special_end(tokenizer, ids, [following]) if following < len(ids) else ""
                run += [following] if last else []
        ended = ended or bool(last)
        joined += offsets[run[0]][0] < span.start
        for position in run:
            trained[position] = True
    prompt = next((span.prompt for span in spans if span.prompt), "")
    return TokenizedRow(ids, trained, ended, missed, reason, prompt, joined)


_REWRITTEN = "the chat template changes assistant turns when other turns follow"
_EMPTY = "the turn is empty"


def _span(record: Conversation, words: Conversation, tokenizer: Tokenizer, index: int, text: str) -> _Span | str:
    """Return the span of an assistant turn in the rendered conversation, or why the turn is excluded."""
    try:
        before = rendered(record, tokenizer, index, add_generation_prompt=True)
        through = text if index + 1 == len(record.messages) else rendered(record, tokenizer, index + 1)
    except DataError:
        return "the chat template rejects the conversation without the turns that follow"
    if _is_empty(record, tokenizer, index, through):
        return _EMPTY
    is_usual = through.startswith(before)
    if is_usual and text.startswith(through) and not _may_repeat(before, record.messages[index]):
        return _Span(len(before), len(through), False, "")
    one, other = (_with_turn(record, tokenizer, index, turns.messages[index]) for turns in _pair(record, words, text))
    if one == other:  # nothing of the turn is its own text, such as in "<think></think>"
        return _EMPTY
    start = min(_shared(before, one), _shared(before, other))  # a turn may lack the end of the prompt, as "<think>"
    history = "" if is_usual or not index else rendered(record, tokenizer, index)
    if start < len(history) or before[:start] != through[:start]:
        return _REWRITTEN
    tail = _shared(one[::-1], other[::-1])
    body = len(through) - (tail if through.endswith(one[len(one) - tail :]) else 0)
    end = _shared(through, text)
    return _REWRITTEN if end < body else _Span(start, end, end < len(through), "" if is_usual else before[start:])


def _may_repeat(before: str, turn: Message) -> bool:
    """Return whether a turn may begin with text that also ends the generation prompt, such as "<think>"."""
    parts = [part for part in (turn.content, *map(turn.fields.get, REASONING)) if isinstance(part, str)]
    begins = {part[:size] for one in parts for part in (one, one.lstrip()) for size in range(1, _LONGEST_TAG)}
    return before.endswith(tuple(begins - {""}))


_LONGEST_TAG = 64
"""Number of characters within which a text that templates add to a generation prompt ends."""


def _is_empty(record: Conversation, tokenizer: Tokenizer, index: int, through: str) -> bool:
    """Return whether the template renders nothing for a turn without text."""
    turn = record.messages[index]
    if turn.fields or (turn.content or "").strip():
        return False
    return not turn.content or through == _with_turn(record, tokenizer, index, replace(turn, content=""))


def _with_turn(record: Conversation, tokenizer: Tokenizer, index: int, turn: Message) -> str:
    """Render the conversation up to a turn, which another turn replaces."""
    return rendered(replace(record, messages=(*record.messages[:index], turn)), tokenizer)


def _end_marker(record: Conversation, tokenizer: Tokenizer) -> str:
    """Return the text that the template renders after the text of the last assistant turn."""
    index = max(at for at, message in enumerate(record.messages) if message.role == "assistant")
    answer = absent("velvet", "".join(str(message) for message in record.messages))
    return _with_turn(record, tokenizer, index, Message("assistant", answer)).rpartition(answer)[2].strip()


def _pair(record: Conversation, words: Conversation, text: str) -> tuple[Conversation, Conversation]:
    """Return the conversation in two sets of words whose first and last letters differ."""
    return words, in_words(record, absent("velvet", text), "m")


def _shared(one: str, other: str) -> int:
    """Return the length of the text with which both texts begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _tokenized(
    record: Conversation, tokenizer: Tokenizer, text: str, spans: list[_Span]
) -> tuple[list[int], list[Span]]:
    """Tokenize a text as a whole, and return the ids with their (start, end) offsets."""
    try:
        result = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids = list(result["input_ids"])
        return ids, with_spaces(tokenizer.convert_ids_to_tokens(ids), result["offset_mapping"])
    except NotImplementedError:  # slow tokenizers do not return offsets
        borders = [0, *(at for span in spans for at in (span.start, span.end)), len(text)]
    ids, offsets = list[int](), list[Span]()
    for start, end in itertools.pairwise(borders):
        part = token_ids(tokenizer, text[start:end])
        ids, offsets = ids + part, offsets + [(start, end)] * len(part)
    if ids != token_ids(tokenizer, text):
        problem = f"a token contains both text of the assistant and other text that {template_name(tokenizer)} renders"
        raise row_error(record, f"{problem}; use a fast tokenizer, which returns the offsets of tokens.")
    return ids, offsets


def _run(offsets: list[Span], span: _Span) -> list[int]:
    """Return the positions of the tokens that are in a span at least in part."""
    first = bisect_right(offsets, span.start, key=itemgetter(1))
    last = bisect_left(offsets, span.end, key=itemgetter(0))
    return [at for at in range(first, last) if not (span.is_cut and offsets[at][1] > span.end)]


def _special_end(tokenizer: Tokenizer, ids: list[int], run: list[int]) -> str:
    """Return the last token of a run that is not white space, if it is a special token, else ""."""
    texts = ((ids[at], text_of(tokenizer, [ids[at]])) for at in reversed(run))
    token, text = next(((token, text) for token, text in texts if text.strip()), (None, ""))
    return "" if token is None or tokenizer.decode([token], skip_special_tokens=True) else text
