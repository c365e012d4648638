"""The engine: rows join and leave between steps.

A prompt is read alone, in chunks that begin at multiples of a fixed size; after that, each step adds one token to every
row, in one forward pass. So a row's tokens do not depend on when other rows come and go, and if a machine's matmuls
give a row the same bits whatever the other rows are, neither do its bits. Each row can have its own adapter.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core import AdapterBank, invoked, prompt_offset, route, waits_for_tokens
from lorakit.errors import ConfigError, LorakitError, ModelError, NonFiniteError, RunError, UsageError
from lorakit.generate.passes import Passes, Scope, embedding_weight
from lorakit.generate.rows import CHUNK, ChunkKey, Continuation, Event, Failure, NewToken, PromptRead, Row
from lorakit.generate.sampling import Sampler, Sampling, logprobs
from lorakit.ops.cache import BLOCK, Blocks


class Engine:
    """Continue prompts that come and go.

    One thread at a time uses an engine and the model. The adapters of its rows stay as they are until the rows end.

    Args:
        model: A causal language model in eval mode.
        rows: Maximum number of rows that are read or continued at the same time; others wait.
        tokens: Maximum number of tokens whose keys and values are stored for these rows, or None: a row begins when
            there is memory for all its tokens.
        prefix_tokens: Number of tokens of earlier prompts whose keys and values are kept, for prompts that begin alike.
        bank: The factors of the adapters; by default, changes of an adapter between two steps are noticed.
        scope: Context manager that activates adapters for all rows, or None for the adapters that the rows name.

    Attributes:
        submitted: Number of rows that were submitted.

    Raises:
        ModelError: The model is in training mode, has no key-value cache or is an encoder-decoder.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        rows: int = 32,
        tokens: int | None = None,
        prefix_tokens: int = 0,
        bank: AdapterBank | None = None,
        scope: Scope | None = None,
    ) -> None:
        if model.training:
            text = "The model is in training mode, so dropout would affect the output; call model.eval() first."
            raise ModelError(text, what=type(model).__name__)
        self._model, self._most_rows = model, rows
        self._most_blocks = None if tokens is None else tokens // BLOCK
        self._most_chunks = 0 if scope is not None else prefix_tokens // CHUNK
        self._context = context_tokens(model)
        self._passes = Passes(model, AdapterBank(by_row=True) if bank is None else bank, scope)
        self._prefixes = _Prefixes(self._passes.pool, self._most_chunks)
        self._waiting, self._reading, self._open = (list[Row]() for _ in range(3))
        self._turns: dict[Any, int] = {}  # owner, or owner and adapter -> number of its last turn
        self._taken = 0  # number of turns
        self.submitted = 0

    def submit(self, given: Continuation, which: str = "the prompt") -> int:
        """Add a row, which waits for its turn, and return its number; `which` names the prompt in messages.

        Raises:
            UsageError: The prompt is empty, contains ids outside the vocabulary, leaves no room for new tokens, or
                needs more memory than the engine has.
            ConfigError: `max_new_tokens` is below 1, or the sampling has token ids outside the vocabulary.
            RouteError: The adapter is not on the model.
        """
        row = self._checked(given, which)
        if waits_for_tokens(self._model):
            ids = torch.tensor([given.prompt], device=self._passes.device)
            row.starts = invoked(self._model, ids)
            if given.adapter is not None:
                row.begin = len(given.prompt) - prompt_offset(self._model, ids[0], given.adapter)
        self._waiting.append(row)
        for key in row.turns:  # before the last one, but not before those that wait longer: they would wait forever
            self._turns.setdefault(key, self._taken - 1)
        self.submitted += 1
        return row.number

    def _checked(self, given: Continuation, which: str) -> Row:
        if given.max_new_tokens < 1:
            raise ConfigError.of("max_new_tokens", given.max_new_tokens, "at least 1")
        weight = embedding_weight(self._model)
        vocabulary = None if weight is None else weight.shape[0]
        _check_prompt(given.prompt, which, vocabulary, self._context)
        given.sampling.check_vocabulary(vocabulary)
        if given.adapter is not None:
            route(self._model, [given.adapter])
        left = given.max_new_tokens if self._context is None else self._context - len(given.prompt)
        sampler = Sampler(given.sampling, given.prompt, given.eos_ids, given.constraint)
        row = Row(self.submitted, given, min(given.max_new_tokens, left), sampler)
        if self._most_blocks is not None and row.blocks > self._most_blocks:
            text = (
                f"{which} and its new tokens need memory for {row.blocks * BLOCK:,} tokens, but there is memory for "
                f"{self._most_blocks * BLOCK:,}. Ask for fewer new tokens."
            )
            raise UsageError(text, what=row.blocks * BLOCK, field="max_new_tokens", where=which)
        return row

    def cancel(self, number: int) -> None:
        """End a row, if it has not ended, and free its memory."""
        for rows in (self._waiting, self._reading, self._open):
            for row in [row for row in rows if row.number == number]:
                rows.remove(row)
                if self._passes.pool is not None:
                    self._passes.pool.give_back(row.stored.blocks)

    def forget(self, adapter: str) -> None:
        """Free what was computed with an adapter that has no rows, before it is removed or replaced."""
        self._passes.forget(adapter)
        self._prefixes.forget(adapter)

    def reset(self) -> None:
        """Drop all rows and all stored values, after a step that failed."""
        for rows in (self._waiting, self._reading, self._open):
            rows.clear()
        self._passes.reset()
        self._prefixes = _Prefixes(self._passes.pool, self._most_chunks)

    @property
    def is_idle(self) -> bool:
        """Return whether there are no rows."""
        return not (self._waiting or self._reading or self._open)

    @property
    def counts(self) -> dict[str, int]:
        """Number of rows that are waiting, being read, and open; tokens for which memory is in use, and its bytes."""
        rows = {"waiting": len(self._waiting), "reading": len(self._reading), "open": len(self._open)}
        pool = self._passes.pool
        tokens = 0 if pool is None else pool.in_use * BLOCK
        return {**rows, "tokens": tokens, "bytes": 0 if pool is None else tokens * pool.bytes_per_token}

    def step(self, chunks: int | None = 1) -> list[Event]:
        """Read chunks of prompts, then add a token to each row that was open before.

        Args:
            chunks: Maximum number of chunks; None reads all prompts for which there is memory.

        Returns:
            The new tokens; a row whose prompt was read to its end has its first token.
        """
        with self._passes.bank.checked():
            return self._step(chunks)

    def _step(self, chunks: int | None) -> list[Event]:
        before, new = list(self._open), list[Event]()
        while chunks is None or chunks > 0:
            row = self._next()
            if row is None:
                break
            new += self._read(row)
            chunks = None if chunks is None else chunks - 1
        for rows in self._passes.together(before):
            new += self._advance(rows, self._passes.proceed(rows))
        return new

    def _next(self) -> Row | None:
        """Return the row that is read next: of the owner, then of the adapter, whose turn is longest ago."""
        row = min([*self._waiting, *self._reading], key=self._turn, default=None)
        if row in self._waiting and self._fits(row):
            self._waiting.remove(row)
            self._reading.append(row)
        elif row in self._waiting:
            row = min(self._reading, key=self._turn, default=None)
        if row is not None:
            self._taken += 1
            here = {key for each in (*self._waiting, *self._reading) for key in each.turns}
            self._turns = {key: at for key, at in self._turns.items() if key in here} | dict.fromkeys(
                row.turns, self._taken
            )
        return row

    def _turn(self, row: Row) -> tuple[int, ...]:
        return *(self._turns[key] for key in row.turns), row.number

    def _fits(self, row: Row) -> bool:
        here = [*self._reading, *self._open]
        if len(here) >= self._most_rows:
            return False
        return self._most_blocks is None or sum(each.blocks for each in (row, *here)) <= self._most_blocks

    def _read(self, row: Row) -> list[Event]:
        """Read the next chunk of a prompt; return the first new token if it was the last chunk."""
        prompt, top = row.given.prompt, row.given.prompt_logprobs
        if top is None:
            self._prefixes.share(row)
        is_whole, key, begin = len(row.chunk) == CHUNK, row.chunk_key, row.stored.length
        logits = self._passes.read(row)
        if is_whole and self._passes.pool is not None:
            self._prefixes.keep(row, key)
        if top is not None:
            if not logits.amax(-1).isfinite().all():  # the last token's logits can be finite nevertheless
                self.cancel(row.number)
                return [Failure(row.number, _not_finite(row))]
            following = zip(logits, prompt[begin + 1 : row.stored.length + 1], strict=False)  # the last one has none
            row.of_prompt += [logprobs(after, token, top) for after, token in following]
        if row.stored.length < len(prompt):
            return []
        self._reading.remove(row)
        self._open.append(row)
        read = [] if top is None else [PromptRead(row.number, tuple(row.of_prompt))]
        return [*read, *self._advance([row], logits[-1:])]

    def _advance(self, rows: Sequence[Row], logits: Tensor) -> list[Event]:
        """Choose the next token of each row from logits (rows, vocabulary)."""
        picked, finite = logits.argmax(-1).tolist(), logits.amax(-1).isfinite().tolist()
        new = list[Event]()
        for i, row in enumerate(rows):
            row.made += 1
            event = self._choose(row, logits[i], picked[i]) if finite[i] else Failure(row.number, _not_finite(row))
            new.append(event)
            if isinstance(event, Failure) or event.ended is not None:
                self.cancel(row.number)
        return new

    @staticmethod
    def _choose(row: Row, logits: Tensor, likeliest: int) -> NewToken | Failure:
        """Choose the next token of a row from logits (vocabulary,)."""
        try:
            row.last, top = likeliest if row.sampler.is_greedy else row.sampler.pick(logits), row.given.logprobs
            values = None if top is None else logprobs(logits, row.last, top)
            return NewToken(row.number, row.last, row.ending(), values)
        except LorakitError as error:  # such as that of a constraint that became too complex
            return Failure(row.number, error)
        except Exception as cause:  # noqa: BLE001 - `until` and the constraint are the row's, not the other rows'
            text = f"Row {row.number} ended, because choosing its token failed with {type(cause).__name__}: {cause}."
            failed = RunError(f"{text} Check its `until` and constraint.", where=f"row {row.number}")
            failed.__cause__ = cause
            return Failure(row.number, failed)


class _Prefixes:
    """The chunks that prompts began with, so that prompts that begin alike read them once.

    Args:
        pool: The memory, or None if nothing can be shared.
        most: Number of chunks that are kept; the least recently used ones are dropped.
    """

    def __init__(self, pool: Blocks | None, most: int) -> None:
        self._pool, self._most = pool, most
        self._chunks: OrderedDict[ChunkKey, list[int]] = OrderedDict()

    def share(self, row: Row) -> None:
        """Give a row the blocks of its next chunks, as far as they are kept; at least one token is left to be read."""
        while self._pool and self._chunks and row.stored.length + CHUNK < len(row.given.prompt):
            key = row.chunk_key
            blocks = self._chunks.get(key)
            if blocks is None:
                return
            self._chunks.move_to_end(key)
            self._pool.share(blocks)
            row.stored.blocks += blocks
            row.stored.length, row.digest = row.stored.length + CHUNK, key[-1]

    def keep(self, row: Row, key: ChunkKey) -> None:
        """Keep the chunk with this key, a whole one, which a row has just read."""
        row.digest = key[-1]
        if self._pool and self._most and key not in self._chunks:
            self._chunks[key] = row.stored.blocks[-(CHUNK // BLOCK) :]
            self._pool.share(self._chunks[key])
        if len(self._chunks) > self._most:
            self._drop(next(iter(self._chunks)))

    def forget(self, adapter: str) -> None:
        """Drop the chunks that an adapter computed."""
        for key in [key for key in self._chunks if key[0] == adapter]:
            self._drop(key)

    def _drop(self, key: ChunkKey) -> None:
        blocks = self._chunks.pop(key)
        if self._pool is not None:
            self._pool.give_back(blocks)


def rows_are_independent(model: nn.Module, adapters: Sequence[str] = (), rows: int = 32) -> bool:
    """Return whether a row's logits have the same bits alone and with others, for these adapters and the base.

    It depends on the processor, the dtype, the shapes and the versions of libraries, so it is tried.
    """
    passes, names = Passes(model, AdapterBank(together=adapters, by_row=True), None), (*adapters, None)
    weight = embedding_weight(model)
    ids = [token % (38 if weight is None else weight.shape[0]) for token in range(1, 38)]
    group = [
        Row(i, Continuation((*ids[: 1 + 5 * i % 37],), 2, adapter=names[i % len(names)]), 1, Sampler(Sampling()))
        for i in range(rows)
    ]
    for row in group:
        if waits_for_tokens(model):
            row.starts = invoked(model, torch.tensor([row.given.prompt], device=passes.device))
        row.last = int(passes.read(row)[-1].argmax())
    if passes.pool is None:
        return True  # each row runs alone

    def logits(some: Sequence[Row]) -> Tensor:
        after = torch.cat([passes.proceed(part) for part in passes.together(some)])
        for row in some:
            row.stored.length -= 1
        return after

    together = logits(group)
    alone = [slice(i, i + 1) for i in range(min(3, rows))]
    parts = [*alone, *(slice(0, count) for count in (2, 3, 4, 8, 16) if count < rows)]
    return all(torch.equal(logits(group[part]), together[part]) for part in parts)


def context_tokens(model: nn.Module) -> int | None:
    """Return the context length (prompt plus new tokens), or None if the model's config sets no limit."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    limit = getattr(text() if text is not None else config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _not_finite(row: Row) -> NonFiniteError:
    return NonFiniteError(
        f"The logits for row {row.number} are NaN or infinite at new token {row.made}: the weights of the base or the "
        "adapter are damaged or too large for this dtype. Try float32, and check the adapter with `lorakit inspect`.",
        where=f"row {row.number}",
    )


def _check_prompt(ids: Sequence[int], which: str, vocabulary: int | None, limit: int | None) -> None:
    if not ids:
        raise UsageError(f"{which} is empty: it needs at least one token.", field="prompts", where=which)
    odd = [token for token in ids if token < 0 or (vocabulary is not None and token >= vocabulary)]
    if odd:
        size = f"0 to {vocabulary - 1:,}" if vocabulary is not None else "0 and up"
        message = f"{which} contains the token id {odd[0]}, but the valid ids are {size}. Check the tokenizer."
        raise UsageError(message, what=odd[0], field="prompts", where=which)
    if limit is not None and len(ids) >= limit:
        text = (
            f"{which} has {len(ids):,} tokens, but the model supports at most {limit:,}, including new tokens. "
            "Shorten the prompt."
        )
        raise UsageError(text, field="prompts", where=which)
