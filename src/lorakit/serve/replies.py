"""Replies in OpenAI's forms: whole ones and parts, for completions and for chats."""

from __future__ import annotations

import itertools
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lorakit.durable import JsonObject
from lorakit.generate import TokenLogprobs
from lorakit.serve.choices import Choice, Piece
from lorakit.serve.served import Served
from lorakit.session.tokenizers import SavedTokenizer


class TokenTexts:
    """The text of each token on its own, also at the beginning of a text, where some tokenizers drop a space."""

    def __init__(self, tokenizer: SavedTokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def __getitem__(self, token: int) -> str:
        if token not in self._known:
            once, twice = self._decoded([token]), self._decoded([token, token])
            self._known[token] = twice.removeprefix(once) if twice.startswith(once) else once
        return self._known[token]

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


@dataclass
class Usage:
    """Number of tokens of a request; each prompt counts once."""

    prompt: int
    completion: int = 0

    def as_dict(self) -> JsonObject:
        """Return OpenAI's form."""
        counts = {"prompt_tokens": self.prompt, "completion_tokens": self.completion}
        return {**counts, "total_tokens": self.prompt + self.completion}


@dataclass
class Reply:
    """The common fields of a whole reply and its parts, and how they are built.

    Attributes:
        served: What answers.
        fingerprint: The base, its dtype and the version of lorakit.
        seed: Seed of the first answer; answer i has this seed plus i.
        has_ids: Whether the reply has token ids.
        has_usage: Whether a reply in parts has the usage, in one more part.
    """

    served: Served
    fingerprint: str
    seed: int
    has_ids: bool = False
    has_usage: bool = False
    id: str = ""
    created: int = field(default_factory=lambda: int(time.time()))
    whole_kind = part_kind = prefix = ""

    def __post_init__(self) -> None:
        self.id = f"{self.prefix}-{secrets.token_hex(16)}"
        self.texts = TokenTexts(self.served.tokenizer)
        self._ends: dict[int, int] = {}  # answer -> where its next token begins in the text

    def _document(self, kind: str, choices: list[JsonObject], **more: object) -> JsonObject:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.served.id,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
            "lorakit": {"seed": self.seed},
            **more,
        }

    def whole(self, choices: Iterable[tuple[Choice, Piece]], usage: Usage) -> JsonObject:
        """Return a whole reply from each answer and the sum of its pieces."""
        found = [self._whole_choice(choice, piece) for choice, piece in choices]
        return self._document(self.whole_kind, found, usage=usage.as_dict())

    def parts(self, choice: Choice, piece: Piece) -> Iterator[JsonObject]:
        """Yield the parts of a reply for a piece of an answer."""
        for found in self._parts(choice, piece):
            yield self._part_document(found)

    def _part_document(self, found: JsonObject, **more: object) -> JsonObject:
        return self._document(self.part_kind, [found], **({"usage": None} if self.has_usage else {}), **more)

    def opening(self, choices: Sequence[Choice]) -> Iterator[JsonObject]:
        """Yield the first parts of a reply."""
        yield from ()

    def usage_part(self, usage: Usage) -> JsonObject:
        """Return the last part, with the usage and without an answer."""
        return self._document(self.part_kind, [], usage=usage.as_dict())

    def _whole_choice(self, choice: Choice, piece: Piece) -> JsonObject:
        raise NotImplementedError

    def _parts(self, choice: Choice, piece: Piece) -> Iterator[JsonObject]:
        raise NotImplementedError

    def _ids(self, piece: Piece) -> JsonObject:
        return {"token_ids": [new.token for new in piece.tokens]} if self.has_ids else {}


class CompletionReply(Reply):
    """A reply of `/v1/completions`, whose parts look like the whole."""

    whole_kind = part_kind = "text_completion"
    prefix = "cmpl"

    def _whole_choice(self, choice: Choice, piece: Piece) -> JsonObject:
        ids = {"prompt_token_ids": [*choice.prompt.ids]} if self.has_ids else {}
        return {**self._part(choice, piece), **ids, "finish_reason": choice.finish_reason}

    def _parts(self, choice: Choice, piece: Piece) -> Iterator[JsonObject]:
        ids = {"prompt_token_ids": [*choice.prompt.ids]} if self.has_ids and piece.is_first else {}
        yield {**self._part(choice, piece), **ids, "finish_reason": choice.finish_reason}

    def _part(self, choice: Choice, piece: Piece) -> JsonObject:
        return {
            "index": choice.index,
            "text": piece.text,
            "logprobs": self._logprobs(choice, piece),
            **self._ids(piece),
        }

    def _logprobs(self, choice: Choice, piece: Piece) -> JsonObject | None:
        """Return OpenAI's lists; the first token of a prompt has no log-probability."""
        found = [new.logprobs for new in piece.tokens if new.logprobs is not None]
        if not found and piece.prompt is None:
            return None
        values: list[TokenLogprobs | None] = [*found]
        tokens = [one.token for one in found]
        if piece.prompt is not None:
            values, tokens = [None, *piece.prompt, *values], [*choice.prompt.ids, *tokens]
        texts = [self.texts[token] for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [None if one is None else one.logprob for one in values],
            "top_logprobs": [None if one is None else self._top(one) for one in values],
            "text_offset": self._offsets(choice, piece, texts),
        }

    def _offsets(self, choice: Choice, piece: Piece, texts: Sequence[str]) -> list[int]:
        """Return where the tokens begin in the reply's text; a token that the prompt's text lacks begins at 0."""
        start = self._ends.get(choice.index, 0)
        if piece.prompt is not None:
            start = len(choice.prompt.echo or "") - sum(map(len, texts[: len(choice.prompt.ids)]))
        ends = [*itertools.accumulate(map(len, texts), initial=start)]
        self._ends[choice.index] = ends[-1]
        return [max(end, 0) for end in ends[:-1]]

    def _top(self, one: TokenLogprobs) -> dict[str, float]:
        """Return text -> log-probability, also of the token itself; of tokens with the same text, the most likely."""
        found: dict[str, float] = {}
        for token, value in (*one.top, (one.token, one.logprob)):
            found.setdefault(self.texts[token], value)
        return found


class ChatReply(Reply):
    """A reply of `/v1/chat/completions`."""

    whole_kind, part_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, choices: Sequence[Choice]) -> Iterator[JsonObject]:
        """Yield a part with the role for each answer."""
        more = {"prompt_token_ids": [*choices[0].prompt.ids]} if self.has_ids else {}
        for choice in choices:
            delta = {"role": "assistant", "content": ""}
            found = {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}
            yield self._part_document(found, **more)
            more = {}

    def whole(self, choices: Iterable[tuple[Choice, Piece]], usage: Usage) -> JsonObject:
        """See `Reply`."""
        given = [*choices]
        more = {"prompt_token_ids": [*given[0][0].prompt.ids]} if self.has_ids else {}
        return {**super().whole(given, usage), **more}

    def _whole_choice(self, choice: Choice, piece: Piece) -> JsonObject:
        calls = {"tool_calls": [*piece.calls]} if piece.calls else {}
        content = piece.text or None if piece.calls else piece.text
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": content, "refusal": None, **calls},
            "logprobs": self._logprobs(piece),
            "finish_reason": choice.finish_reason,
            **self._ids(piece),
        }

    def _parts(self, choice: Choice, piece: Piece) -> Iterator[JsonObject]:
        delta: JsonObject = {"content": piece.text} if piece.text else {}
        if piece.calls:
            delta["tool_calls"] = [{"index": at, **call} for at, call in enumerate(piece.calls)]
        has_values = any(new.logprobs for new in piece.tokens)
        if delta or has_values or (self.has_ids and piece.tokens):
            yield {
                "index": choice.index,
                "delta": delta or {"content": ""},
                "logprobs": self._logprobs(piece),
                "finish_reason": None,
                **self._ids(piece),
            }
        if choice.finish_reason is not None:
            yield {"index": choice.index, "delta": {}, "logprobs": None, "finish_reason": choice.finish_reason}

    def _logprobs(self, piece: Piece) -> JsonObject | None:
        found = [new.logprobs for new in piece.tokens if new.logprobs is not None]
        if not found:
            return None
        return {
            "content": [
                {
                    **self._token(one.token, one.logprob),
                    "top_logprobs": [self._token(token, value) for token, value in one.top],
                }
                for one in found
            ],
            "refusal": None,
        }

    def _token(self, token: int, value: float) -> JsonObject:
        """Return a token's text and bytes, or null for bytes that are only a part of a character."""
        text = self.texts[token]
        found = None if "\ufffd" in text else [*text.encode()]
        return {"token": text, "logprob": value, "bytes": found}
