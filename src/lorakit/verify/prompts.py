"""Prompts that an adapter was not trained on, from the package or from data, and their token ids in lorakit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lorakit.data import Completion, Conversation, Document, Message, Record, Tokenizer, read_records
from lorakit.durable import JsonObject
from lorakit.errors import DataError
from lorakit.session import SessionSpec
from lorakit.session.prompts import encode_prompts, prompt_format

PROMPTS = (
    "Write a sentence about the sea.",
    "What is the capital of Australia?",
    "Explain in two sentences why the sky is blue.",
    "List three uses for an old newspaper.",
    "Translate 'good morning' into Spanish, French and German.",
    "17 * 23 =",
    "def fibonacci(n):\n    ",
    "SELECT name, COUNT(*) FROM orders WHERE",
    '{"name": "Ada", "born": 1815, "field":',
    "The train to Lisbon leaves at",
    "Dear Ms. Okafor,\n\nThank you for your letter of 3 March.",
    "Once upon a time, in a village at the foot of a mountain, there lived",
    "How do I remove a coffee stain from a wool coat?",
    "Summarize: The committee met on Tuesday and postponed the vote until June.",
    "¿Qué tiempo hace hoy en Bogotá?",
    "Größe und Maße: 3,5 m × 2 m — reicht das?",
    "오늘 회의는 몇 시에 시작하나요?",
    "Решите уравнение: x² − 5x + 6 = 0.",
    "🙂🚀 Reply with one emoji.",
    "  Two leading spaces, a tab\tand\r\na line break.",
)
"""Default prompts: questions, beginnings of texts, code and data, other scripts, and white space."""

MOST_CHARACTERS = 2000
"""A document is cut here; a prompt's beginning tells as much as all of it."""

MOST_TOKENS = 256
"""Maximum number of tokens of a prompt whose log-probabilities are compared."""


@dataclass(frozen=True)
class Prompt:
    """A prompt and its token ids in lorakit.

    Attributes:
        text: The text to be tokenized; empty for a conversation.
        chat: The conversation to be rendered with the chat template, or None.
    """

    text: str
    chat: Conversation | None
    ids: tuple[int, ...]

    @property
    def messages(self) -> list[JsonObject]:
        """The conversation in the form that chat templates and servers expect."""
        return [] if self.chat is None else self.chat.as_dicts()


def read_prompts(spec: SessionSpec, data: Sequence[str], count: int) -> list[Prompt]:
    """Return up to `count` prompts: the first ones of the data, or else the packaged ones, in the adapter's format.

    Raises:
        DataError: The data has no prompts, or cannot be read.
    """
    tokenizer = spec.tokenizer
    form, _ = prompt_format(tokenizer, spec.facts, None)
    if not data:
        given: list[str | Conversation] = [*PROMPTS[:count]]
    else:
        records = read_records(data, spec.request())
        found = (_prompt_of(record) for record in records)
        given = [prompt for prompt, _ in zip((one for one in found if one is not None), range(count), strict=False)]
    if not given:
        text = f"{', '.join(data)}: no row has a prompt; pass texts, prompts with completions, or conversations."
        raise DataError(text, where=data[0] if data else None, field="data")
    return [_encoded(prompt, tokenizer, form) for prompt in given]


def _prompt_of(record: Record) -> str | Conversation | None:
    """Return the part of a record that precedes the answer, or None if that is blank."""
    if isinstance(record, (Document, Completion)):
        text = record.text if isinstance(record, Document) else record.prompt
        return text[:MOST_CHARACTERS] if text[:MOST_CHARACTERS].strip() else None
    if not isinstance(record, Conversation):
        return None
    messages = [*record.messages]
    while messages and messages[-1].role == "assistant":
        messages.pop()
    return replace(record, messages=tuple(messages)) if messages else None


def _encoded(prompt: str | Conversation, tokenizer: Tokenizer, form: str) -> Prompt:
    if isinstance(prompt, str) and form == "chat":
        prompt = Conversation((Message("user", prompt),), "prompt")
    (ids,) = encode_prompts([prompt], tokenizer, form, None)
    if isinstance(prompt, Conversation):
        return Prompt("", prompt, tuple(ids))
    return Prompt(f"{prompt}\n\n" if form == "instruction" else prompt, None, tuple(ids))
