"""Prompts and answers: how prompts are formatted and tokenized, which tokens end an answer, its text so far."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lorakit.data import Conversation, Message, Request, Tokenizer
from lorakit.data.chat import end_tokens
from lorakit.data.chat_rendering import check_rendered
from lorakit.data.messages import BadRow
from lorakit.data.shapes import recognize
from lorakit.data.tokens import beginning, token_ids
from lorakit.durable import JsonObject, JsonValue, as_object
from lorakit.errors import DataError, UsageError
from lorakit.generate import NewToken, StopStrings, TextStream


@dataclass(frozen=True)
class Remark:
    """What a user should know; a warning means that results may differ from what the user expects."""

    text: str
    is_warning: bool = False


def prompt_format(
    tokenizer: Tokenizer, facts: Sequence[Mapping[str, Any]], chat: bool | None
) -> tuple[str, Remark | None]:
    """Return how to format prompts, "chat", "instruction" or "text", and what the user should know about it.

    If `chat` is None, the format is that of the training data (`facts`), or else the chat template if there is one.

    Raises:
        UsageError: A chat template is requested, but there is none.
    """
    trained = {as_object(one.get("training")).get("prompt_format") for one in facts}
    form = next((name for name in _FORMATS if trained == {name}), None)  # files may contain anything
    if chat is None:
        usual = "chat" if tokenizer.chat_template else "text"
        if form is None or (form == "chat" and usual == "text"):
            return usual, None
        text = f"Prompts are formatted as in the adapter's training data ({_FORMATS[form]}); see --chat."
        return form, None if form == usual else Remark(text)
    if chat and not tokenizer.chat_template:
        text = "--chat needs a chat template, but the model's tokenizer has none; omit --chat."
        raise UsageError(text, field="chat")
    is_other = form is not None and (form == "chat") != chat
    text = f"the adapter was trained on prompts in another format ({_FORMATS[form]})." if is_other and form else ""
    wanted = "chat" if chat else "instruction" if form == "instruction" else "text"
    return wanted, Remark(text, is_warning=True) if text else None


_FORMATS = {
    "chat": "with the chat template",
    "instruction": "followed by a blank line, without a chat template",
    "text": "as plain text",
}


def encode_prompts(
    prompts: Sequence[str | Conversation],
    tokenizer: Tokenizer,
    form: str,
    system: str | None,
    tools: Sequence[JsonObject] = (),
) -> list[list[int]]:
    """Return the token ids of each prompt: a text, or a conversation to continue.

    Args:
        prompts: Texts, and conversations.
        tokenizer: A transformers tokenizer.
        form: Result of `prompt_format`; "chat" if there are conversations or tools.
        system: System message for the texts, or None.
        tools: JSON schemas of functions; of a conversation without its own, or of a text.

    Raises:
        UsageError: The system message cannot be used, or the chat template rejects a conversation.
        DataError: The chat template omits tools or a part of a conversation.
    """
    encoded = []
    for prompt in prompts:
        if isinstance(prompt, Conversation):
            chat = prompt if prompt.tools else replace(prompt, tools=tuple(tools))
        elif form == "chat":
            before = () if system is None else (Message("system", system),)
            chat = Conversation((*before, Message("user", prompt)), "--prompt", tools=tuple(tools))
        elif system is not None and form != "instruction":
            text = "--system needs a chat template, but prompts are plain text here; omit --system."
            raise UsageError(text, field="system")
        else:
            start = "" if system is None else f"{system}\n\n"
            text = f"{start}{prompt}\n\n" if form == "instruction" else prompt
            encoded.append(beginning(tokenizer) + token_ids(tokenizer, text))
            continue
        encoded.append(_chat_ids(chat, tokenizer))
    return encoded


def _chat_ids(chat: Conversation, tokenizer: Tokenizer) -> list[int]:
    """Render a conversation with the generation prompt, as in training, and return its token ids."""
    options: dict[str, Any] = {"tools": list(chat.tools) or None, "add_generation_prompt": True, **chat.options}
    try:
        encoded = tokenizer.apply_chat_template(chat.as_dicts(), return_dict=True, **options)
        text = tokenizer.apply_chat_template(chat.as_dicts(), tokenize=False, **options)
    except Exception as cause:  # a template is untrusted code and may raise anything
        advice = "" if len(chat.messages) > 2 or chat.tools else "; try --no-chat"
        raise UsageError(f"The chat template rejects this prompt ({cause}){advice}.", field="chat") from cause
    check_rendered(chat, tokenizer, text)
    return list(encoded["input_ids"])


def end_ids(model: nn.Module, tokenizer: Tokenizer, form: str) -> set[int]:
    """Return the ids of the tokens that end an answer; `form` is the result of `prompt_format`.

    These are the end-of-text tokens of the model's config, its generation config and the tokenizer, and in a chat also
    the tokens with which the chat template ends a turn, because those were trained.
    """
    found: set[int] = set(end_tokens(tokenizer)) if form == "chat" else set()
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, (list, tuple)) else {ids} if isinstance(ids, int) else set()
    return found


def conversation(value: JsonValue, source: str, line: int | None = None) -> Conversation:
    """Return a conversation to continue, from a list of messages, or an object with `messages`, `tools` and options.

    Raises:
        DataError: The conversation, at this line of its source, is invalid or ends with the assistant's message.
    """
    row = value if isinstance(value, dict) else {"messages": value}
    where = source if line is None else f"{source}:{line}"
    try:
        chat = recognize(list(row), Request(allowed=("messages", "sharegpt"))).record(row, source, line)
    except BadRow as cause:
        raise DataError(f"{where}: {cause}", where=where) from None
    assert isinstance(chat, Conversation)
    if chat.messages[-1].role == "assistant":
        text = "the last message is the assistant's, which generate writes; remove it."
        raise DataError(f"{where}: {text}", where=where)
    return chat


class Answer:
    """An answer that is being generated by a model or adapter; its text does not include the token that ends it.

    Args:
        name: Name of the adapter or the base.
        tokenizer: The tokenizer.
        prompt_ids: Token ids of the prompt.
        stop: Texts that end the answer, which does not include them.
        min_tokens: Number of tokens in whose text they have no effect.

    Attributes:
        text: The text so far.
        tokens: Number of tokens so far, with the one that ends the answer.
        ended: Why the answer ended: "stop" (at a stop string) or a `lorakit.generate.Ending`; None before.
        seconds: Time from the creation of this object to the last token.
    """

    def __init__(
        self,
        name: str,
        tokenizer: Tokenizer,
        prompt_ids: Sequence[int],
        stop: Sequence[str] = (),
        min_tokens: int = 0,
    ) -> None:
        self.name = name
        self.text = ""
        self.tokens = 0
        self.ended: str | None = None
        self.seconds = 0.0
        self._started = time.perf_counter()
        self._stream = TextStream(tokenizer, prompt_ids)
        self._stops = StopStrings(stop)
        self._min_tokens = min_tokens

    def add(self, new: NewToken) -> str:
        """Add a token to an answer that has not ended, and return the text that it adds."""
        self.tokens += 1
        self.seconds = time.perf_counter() - self._started
        self.ended = new.ended
        text = "" if new.ended == "eos" else self._stream.push(new.token)
        piece = text if self.tokens <= self._min_tokens else self._stops.push(text)
        if new.ended is not None:
            piece += self._stops.push(self._stream.finish()) + self._stops.finish()
        if self._stops.found is not None:
            self.ended = "stop"
        self.text += piece
        return piece

    def as_dict(self) -> dict[str, Any]:
        """Return the answer as plain JSON values."""
        return {
            "name": self.name,
            "text": self.text,
            "tokens": self.tokens,
            "ended": self.ended,
            "seconds": self.seconds,
        }


def until_ended(answers: Sequence[Answer], stream: Iterable[NewToken]) -> Iterator[NewToken]:
    """Yield the tokens of answers that have not ended, one row per answer, until all have ended, also at stop strings.

    The caller adds each token to its answer before it takes the next one.
    """
    for new in stream:
        if answers[new.row].ended is None:
            yield new
        if all(answer.ended is not None for answer in answers):
            return
