"""One answer to a request, from the engine's events to pieces: text, calls of tools and tokens that belong together.

A reply in parts sends each piece; a whole reply joins them, so both have the same contents.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.durable import JsonObject
from lorakit.generate import NewToken, PromptRead, TokenLogprobs
from lorakit.serve.served import Served
from lorakit.serve.tool_calls import ToolStream
from lorakit.session import Answer

_FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}
"""`Answer.ended` -> finish_reason."""


@dataclass(frozen=True)
class Prompt:
    """A prompt: its token ids, and its text if a reply repeats it."""

    ids: tuple[int, ...]
    echo: str | None = None


@dataclass(frozen=True)
class Options:
    """Settings of answers: stop strings, tokens before which they have no effect, and whether calls are parsed.

    `called`: the function whose arguments are the answer. `most_calls`: later calls are dropped.
    `drops_tokens`: the engine makes at least one token, and the request wants none.
    """

    stops: tuple[str, ...] = ()
    min_tokens: int = 0
    has_tools: bool = False
    called: str | None = None
    most_calls: int | None = None
    drops_tokens: bool = False


@dataclass(frozen=True)
class Piece:
    """An addition to an answer.

    Attributes:
        text: The text, with that of the prompt in the first piece if the reply repeats it.
        calls: Calls of tools, in the last piece.
        tokens: The tokens since the last piece.
        prompt: Log-probabilities of the prompt's tokens from the second on, in the first piece of such a reply.
        is_first: Whether it is the answer's first piece.
    """

    text: str = ""
    calls: tuple[JsonObject, ...] = ()
    tokens: tuple[NewToken, ...] = ()
    prompt: tuple[TokenLogprobs, ...] | None = None
    is_first: bool = False

    def __add__(self, later: Piece) -> Piece:
        prompt = self.prompt if later.prompt is None else later.prompt
        calls, tokens = self.calls + later.calls, self.tokens + later.tokens
        return Piece(self.text + later.text, calls, tokens, prompt, self.is_first or later.is_first)

    @property
    def is_visible(self) -> bool:
        """Return whether the piece has text or a call; tokens alone wait for the next piece."""
        return bool(self.text or self.calls)


class Choice:
    """An answer that is being generated.

    Attributes:
        index: Number of the answer in the reply.
        prompt: The prompt.
        made: Number of tokens.
        finish_reason: Why the answer has ended, in OpenAI's terms, or None.
    """

    def __init__(self, index: int, served: Served, prompt: Prompt, options: Options) -> None:
        self.index, self.prompt = index, prompt
        self.made = 0
        self.finish_reason: str | None = None
        self._drops_tokens, self._most_calls = options.drops_tokens, options.most_calls
        self._answer = Answer(served.id, served.tokenizer, prompt.ids, options.stops, options.min_tokens)
        self._tools = ToolStream(options.called) if options.has_tools else None
        self._waiting = Piece(prompt.echo or "", is_first=True)

    def add(self, event: NewToken | PromptRead) -> Piece | None:
        """Add an event, and return the next piece if there is one; after the end, events have no effect."""
        if self.finish_reason is not None:
            return None
        if isinstance(event, PromptRead):
            self._waiting += Piece(prompt=event.logprobs)
            return None
        if self._drops_tokens:
            self.finish_reason = "length"
            return self._waiting
        self.made += 1
        text = self._answer.add(event)
        calls: list[JsonObject] = []
        if self._tools is not None:
            text = self._tools.push(text)
            if self._answer.ended is not None:
                rest, calls = self._tools.finish()
                text, calls = text + rest, calls[: self._most_calls]
        self._waiting += Piece(text, tuple(calls), (event,))
        if self._answer.ended is not None:
            self.finish_reason = "tool_calls" if calls else _FINISH[self._answer.ended]
        elif not self._waiting.is_visible:
            return None
        piece, self._waiting = self._waiting, Piece()
        return piece
