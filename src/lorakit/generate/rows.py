"""The rows of an engine: what they continue, how far they are, and when they end."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

from lorakit.errors import LorakitError
from lorakit.generate.grammar import Constraint
from lorakit.generate.sampling import Sampler, Sampling, TokenLogprobs
from lorakit.ops.cache import BLOCK, Stored

CHUNK = 128
"""Number of prompt tokens in a forward pass, a multiple of `BLOCK`: larger chunks read a prompt in less time, but other
rows wait longer for their next token."""

Ending = Literal["eos", "stop", "length", "context"]
"""The reason a row ended: it produced a token in `eos_ids`, `until` returned True or its `constraint` is finished, it
reached `max_new_tokens`, or it filled the model's context."""


@dataclass(frozen=True)
class NewToken:
    """A token generated for one row.

    Attributes:
        row: Index of the prompt that the token continues, or the number that `Engine.submit` returned.
        token: The token id.
        ended: Why the row ends with this token, or None if the row continues.
        logprobs: Log-probabilities at its position, if the continuation asks for them.
    """

    row: int
    token: int
    ended: Ending | None
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True)
class PromptRead:
    """The log-probabilities of a row's prompt tokens, before its first new token; the first prompt token has none."""

    row: int
    logprobs: tuple[TokenLogprobs, ...]


@dataclass(frozen=True)
class Failure:
    """The end of a row that cannot continue; it does not concern other rows."""

    row: int
    error: LorakitError


Event = NewToken | PromptRead | Failure
"""What a step of the engine returns."""


@dataclass(frozen=True)
class Continuation:
    """A prompt to continue.

    Attributes:
        prompt: Token ids.
        max_new_tokens: Maximum number of new tokens.
        sampling: How tokens are chosen.
        adapter: Name of the adapter, or None for the base.
        eos_ids: Ids of the tokens that end the row; the ending token is the row's last token.
        until: Function that gets each new token and returns whether the row ends with it.
        owner: Owners take turns when prompts are read, and so do the adapters of an owner.
        logprobs: Number of most likely tokens whose log-probabilities each new token has, or None for no
            log-probabilities.
        prompt_logprobs: The same for the tokens of the prompt (`PromptRead`).
        constraint: What the new tokens must follow, or None; each row needs its own.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()  # noqa: RUF009 - frozen, so it can be shared
    adapter: str | None = None
    eos_ids: Collection[int] = frozenset()
    until: Callable[[int], bool] | None = None
    owner: str = ""
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(eq=False)
class Row:
    """A row, from its submission to its end.

    Attributes:
        room: Maximum number of new tokens, which the model's context may limit.
        starts: Context manager for aLoRA adapters, with the positions of the prompt from which they are active, or None
            if the model had no such adapters when the row was submitted.
        begin: First position that the adapter computes; before it, an aLoRA adapter leaves the prompt to the base.
        stored: The tokens that the model has processed.
        digest: Hash of the chunks of the prompt that were read.
        cache: The model's own cache, if it cannot be stored in blocks.
        of_prompt: Log-probabilities of the prompt tokens that were read.
        made: Number of new tokens.
        last: The last new token.
    """

    number: int
    given: Continuation
    room: int
    sampler: Sampler
    starts: Any = None  # an `Override` of core
    begin: int = 0
    stored: Stored = field(default_factory=Stored)
    digest: bytes = b""
    cache: Any = None
    of_prompt: list[TokenLogprobs] = field(default_factory=list)
    made: int = 0
    last: int = -1

    @property
    def blocks(self) -> int:
        """Number of blocks that the row needs if it does not end early."""
        return -(-(len(self.given.prompt) + self.room) // BLOCK)

    @property
    def chunk(self) -> tuple[int, ...]:
        """The tokens of the prompt that are read next."""
        return self.given.prompt[self.stored.length : self.stored.length + CHUNK]

    @property
    def chunk_key(self) -> ChunkKey:
        """What the keys and values of the next chunk depend on."""
        digest = sha256(self.digest + array("q", self.chunk).tobytes()).digest()
        is_adapted = self.stored.length + CHUNK > self.begin
        return (self.given.adapter, self.begin, digest) if is_adapted else (None, 0, digest)

    @property
    def turns(self) -> tuple[str, tuple[str, str | None]]:
        """The owner, and the owner with the adapter: rows take turns by both."""
        return self.given.owner, (self.given.owner, self.given.adapter)

    def ending(self) -> Ending | None:
        """Return why the row ends with its last token, or None."""
        if self.last in self.given.eos_ids:
            return "eos"
        if self.given.until is not None and self.given.until(self.last):
            return "stop"
        if self.given.constraint is not None and self.given.constraint.is_finished:
            return "stop"
        if self.made < self.room:
            return None
        return "length" if self.made >= self.given.max_new_tokens else "context"


ChunkKey = tuple[str | None, int, bytes]
"""The adapter that computes a chunk, where it begins, and the hash of all tokens up to the end of the chunk."""
