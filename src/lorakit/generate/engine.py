"""Token generation: one forward pass processes the prompts, and each further pass adds one token to every row.

The passes use the model's key-value cache. Prompts of different lengths are left-padded and masked to form one batch.
Each row of the batch gets the same result as it would alone, and can have its own adapter. The engine works only with
token ids and does not use a tokenizer. Beam search and most logits processors of transformers' `generate` are not
supported.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.core import disable, invoked, one_pass, route, use, waits_for_tokens
from lorakit.core.model.index import find_state, layers
from lorakit.errors import ConfigError, ModelError, NonFiniteError, UsageError
from lorakit.generate.prefixes import CACHE_NAMES, Cache, Prefix, check_prefix, read_prefix, shared_tokens
from lorakit.generate.sampling import Sampler, Sampling

Ending = Literal["eos", "length", "context"]
"""The reason a row ended: it produced a token in `eos_ids`, reached `max_new_tokens`, or filled the model's context."""


@dataclass(frozen=True)
class NewToken:
    """A token generated for one row.

    Attributes:
        row: Index of the prompt that the token continues.
        token: The token id.
        ended: Why the row ends with this token, or None if the row continues.
    """

    row: int
    token: int
    ended: Ending | None


def generate(
    model: nn.Module,
    input_ids: Sequence[int] | Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    eos_ids: Collection[int] = (),
) -> Iterator[int]:
    """Continue one prompt with the currently active adapters, yielding each token as it is generated.

    Args:
        model: A causal language model in eval mode.
        input_ids: The prompt, of shape (length,) or (1, length).
        max_new_tokens: Maximum number of new tokens.
        temperature: 0 for greedy decoding; see `Sampling`.
        top_p: See `Sampling`.
        seed: See `Sampling`.
        eos_ids: Ids of the tokens that end generation; the ending token is still yielded.

    Returns:
        An iterator over the new token ids.

    Raises:
        UsageError: The prompt is empty, contains ids outside the vocabulary, or leaves no room for new tokens.
        ConfigError: A value is out of range.
        ModelError: The model is in training mode or has no key-value cache.
        NonFiniteError: The model's logits are NaN or infinite.
    """
    if isinstance(input_ids, Tensor):
        rows = input_ids.shape[0] if input_ids.ndim == 2 else 1
        if rows != 1 or input_ids.ndim not in (1, 2):
            raise UsageError(
                f"generate continues one prompt, of shape (length,) or (1, length); got {tuple(input_ids.shape)}. Use "
                "generate_batch for several prompts.",
                field="input_ids",
            )
        input_ids = input_ids.flatten().tolist()
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    stream = generate_batch(model, [input_ids], max_new_tokens=max_new_tokens, sampling=sampling, eos_ids=eos_ids)
    return (new.token for new in stream)


def generate_batch(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | Sequence[Sampling] = Sampling(),  # noqa: B008 - frozen, so it can be shared
    eos_ids: Collection[int] = (),
    adapters: Sequence[str | None] | None = None,
    prefix: Prefix | None = None,
) -> Iterator[NewToken]:
    """Continue several prompts together, each optionally with its own adapter, yielding tokens as they are generated.

    The arguments are checked, and the adapter routing is determined, at the time of the call. The model runs only when
    a token is requested.

    Args:
        model: A causal language model in eval mode.
        prompts: Token ids of each row; the rows may differ in length.
        max_new_tokens: Maximum number of new tokens per row.
        sampling: One `Sampling` for all rows, or one per row.
        eos_ids: Ids of the tokens that end a row; the ending token is still yielded, as the row's last token.
        adapters: For each row, the name of its adapter, or None for the base model; if omitted, every row uses the
            active adapters. If the rows use different adapters, the stacked factors of these adapters are kept across
            steps (see `keep` in `lorakit.core.route`).
        prefix: Common prefix of all prompts, already processed by the base (see `read_prefix`). Every row must use the
            base, or an aLoRA adapter that is invoked after the prefix. If omitted, a prefix that all rows can share is
            detected automatically and processed once.

    Returns:
        An iterator over the new tokens, ordered by step, then by row.

    Raises:
        UsageError: A prompt is empty, contains ids outside the vocabulary, leaves no room for new tokens, or cannot use
            `prefix`; or `sampling` or `adapters` does not have one entry per row.
        ConfigError: `max_new_tokens` is below 1.
        RouteError: An adapter was not found.
        ModelError: The model is in training mode or has no key-value cache.
        NonFiniteError: The model's logits are NaN or infinite.
    """
    if max_new_tokens < 1:
        raise ConfigError.of("max_new_tokens", max_new_tokens, "at least 1")
    if model.training:
        text = "The model is in training mode, so dropout would affect the output; call model.eval() first."
        raise ModelError(text, what=type(model).__name__)
    rows = [[int(token) for token in prompt] for prompt in prompts]
    limit = context_tokens(model)
    weight = embedding_weight(model)
    vocabulary = None if weight is None else weight.shape[0]
    _check_prompts(rows, vocabulary, limit)
    samplings = [sampling] * len(rows) if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != len(rows):
        message = (
            f"The number of prompts is {len(rows)}, but the number of sampling settings is {len(samplings)}; pass "
            "one per prompt, or a single `Sampling` for all prompts."
        )
        raise UsageError(message, field="sampling")
    for one in samplings:
        one.check_vocabulary(vocabulary)
    scope, names = _scope(model, adapters, len(rows)), _names(model, adapters, len(rows))
    if prefix is not None:
        check_prefix(model, prefix, rows, names)
    shared = shared_tokens(model, rows, names) if prefix is None else len(prefix.tokens)
    forward = _Forward(model, rows, limit, scope, prefix, shared)
    samplers = [Sampler(one, ids, eos_ids) for one, ids in zip(samplings, rows, strict=True)]
    return _steps(forward, _Rows(rows, samplers, frozenset(eos_ids), max_new_tokens, limit))


def context_tokens(model: nn.Module) -> int | None:
    """Return the context length (prompt plus new tokens), or None if the model's config sets no limit."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    limit = getattr(text() if text is not None else config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def _steps(forward: _Forward, rows: _Rows) -> Iterator[NewToken]:
    tokens: list[int] | None = None
    while rows.open:
        logits = forward.prefill() if tokens is None else forward.step(tokens)
        tokens = rows.pick(logits)
        yield from rows.advance(tokens)


class _Rows:
    """State of the rows: which rows are open (still generating), how each row is sampled, and when it must end."""

    def __init__(
        self,
        prompts: list[list[int]],
        samplers: list[Sampler],
        eos_ids: frozenset[int],
        max_new_tokens: int,
        context: int | None,
    ) -> None:
        self._samplers, self._eos_ids, self._made = samplers, eos_ids, 0
        room = [max_new_tokens if context is None else min(max_new_tokens, context - len(ids)) for ids in prompts]
        self._room, self._asked = room, max_new_tokens
        self.open = list(range(len(prompts)))

    def pick(self, logits: Tensor) -> list[int]:
        """Pick one token per row from (rows, vocabulary) logits; the token picked for a finished row is arbitrary."""
        picked, finite = logits.argmax(-1).tolist(), logits.amax(-1).isfinite().tolist()
        for row in self.open:
            if not finite[row]:
                raise NonFiniteError(
                    f"The logits for row {row} are NaN or infinite at new token {self._made + 1}: the weights of the "
                    "base or the adapter are damaged or too large for this dtype. Try float32, and check the adapter "
                    "with `lorakit inspect`.",
                    where=f"row {row}",
                )
            if not self._samplers[row].is_greedy:
                picked[row] = self._samplers[row].pick(logits[row])
        return picked

    def advance(self, tokens: list[int]) -> list[NewToken]:
        self._made += 1
        new = [NewToken(row, tokens[row], self._ending(row, tokens[row])) for row in self.open]
        self.open = [item.row for item in new if item.ended is None]
        return new

    def _ending(self, row: int, token: int) -> Ending | None:
        if token in self._eos_ids:
            return "eos"
        if self._made < self._room[row]:
            return None
        return "length" if self._made >= self._asked else "context"


class _Forward:
    """Forward passes over one batch, with the model's cache: first the prompts, then one token per row at each step."""

    def __init__(
        self,
        model: nn.Module,
        prompts: list[list[int]],
        context: int | None,
        scope: contextlib.AbstractContextManager[None],
        prefix: Prefix | None,
        read: int,
    ) -> None:
        self._model, self._scope, self._last = model, scope, (context or sys.maxsize) - 1
        takes = inspect.signature(model.forward).parameters
        cache_name = next((name for name in CACHE_NAMES if name in takes), None)
        if cache_name is None:
            text = f"{type(model).__name__} does not accept a key-value cache, which generation requires."
            raise ModelError(text, what=type(model).__name__)
        self._cache_name = cache_name
        self._last_alone = "logits_to_keep" in takes
        self._positioned = "position_ids" in takes
        weight = embedding_weight(model)
        device = next(model.parameters()).device if weight is None else weight.device
        longest = max(len(ids) for ids in prompts)
        # masked positions are never attended to, so any valid id works as padding
        mask = [[1] * read + [0] * (longest - len(ids)) + [1] * (len(ids) - read) for ids in prompts]
        padded = [ids[:read] + [0] * (longest - len(ids)) + ids[read:] for ids in prompts]
        self._ids, self._mask = torch.tensor(padded, device=device), torch.tensor(mask, device=device)
        self._cache: Cache | None = None
        self._prefix, self._read = prefix, read
        self._starts = invoked(model, self._ids, self._mask) if waits_for_tokens(model) else contextlib.nullcontext()

    def prefill(self) -> Tensor:
        """Process the prompts and return the (rows, vocabulary) logits for the first new token."""
        if self._read:
            prefix = self._prefix or read_prefix(self._model, self._ids[0, : self._read].tolist())
            self._cache = prefix.of_rows(self._ids.shape[0])
        return self._run(self._ids[:, self._read :], (self._mask.cumsum(-1) - 1).clamp_min(0)[:, self._read :])

    def step(self, tokens: list[int]) -> Tensor:
        """Process one more token per row and return the (rows, vocabulary) logits for the token after it."""
        ids = torch.tensor(tokens, device=self._mask.device)[:, None]
        self._mask = torch.cat([self._mask, torch.ones_like(ids)], dim=1)
        # finished rows keep running with the others, so their positions must stay within the context
        return self._run(ids, (self._mask.sum(-1, keepdim=True) - 1).clamp_max(self._last))

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": self._mask, "use_cache": True}
        if self._last_alone:
            # If `logits_to_keep` is a tensor, the model selects positions by indexing, and the result is contiguous. If
            # it is an int (the number of positions to keep), the model takes a slice. A slice is not contiguous, so the
            # bf16 matmul takes about 300 times as long on a CPU. aLoRA requires the int.
            one = 1 in ids.shape or not isinstance(self._starts, contextlib.nullcontext)
            inputs["logits_to_keep"] = 1 if one else torch.tensor([-1], device=ids.device)
        if self._positioned:
            inputs["position_ids"] = positions
        if self._cache is not None:
            inputs[self._cache_name] = self._cache
        # All context managers exit before a token is yielded, because an open one would affect the caller's code.
        # no_grad is used instead of inference_mode, because any buffers that the model creates during this call must
        # remain usable for training.
        with torch.no_grad(), self._scope, self._starts, one_pass(self._model):
            output = self._model(**inputs)
        self._cache = getattr(output, self._cache_name, None)
        if self._cache is None:
            text = f"{type(self._model).__name__} returned no key-value cache, which generation requires."
            raise ModelError(text, what=type(self._model).__name__)
        logits: Tensor = output.logits[:, -1]
        return logits.float()


def _check_prompts(rows: list[list[int]], vocabulary: int | None, limit: int | None) -> None:
    if not rows:
        raise UsageError("no prompt to continue; pass at least one.", field="prompts")
    for number, ids in enumerate(rows):
        which = f"prompt {number + 1} of {len(rows)}" if len(rows) > 1 else "the prompt"
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


def _scope(
    model: nn.Module, adapters: Sequence[str | None] | None, rows: int
) -> contextlib.AbstractContextManager[None]:
    """Return a context manager, to be entered at each step, that activates the requested adapters."""
    state = find_state(model)
    if adapters is None:
        # The currently active adapters stay active even if tokens are requested outside the caller's context.
        # A model-wide override cannot reproduce per-layer overrides, so a model with per-layer overrides is left as is.
        if state is None or any(layer.own_route is not None for _, layer in layers(model)):
            return contextlib.nullcontext()
        return state.override(state.active().keeping())
    if len(adapters) != rows:
        message = (
            f"The number of prompts is {rows}, but the number of adapters is {len(adapters)}; pass one adapter, or "
            "None, per prompt."
        )
        raise UsageError(message, field="adapters")
    if state is None and not any(adapters):
        return contextlib.nullcontext()
    first = adapters[0]
    if any(name != first for name in adapters):
        return route(model, list(adapters), keep=True)
    return disable(model) if first is None else use(model, first, keep=True)


def _names(model: nn.Module, adapters: Sequence[str | None] | None, rows: int) -> list[tuple[str, ...]]:
    """Return the names of the adapters that are active for each row."""
    if adapters is None:
        state = find_state(model)
        active = None if state is None else state.active()
        if active is None or active.rows is None:
            return [() if active is None else active.names] * rows
        adapters = active.rows_of(rows) or ()
    return [() if name is None else (name,) for name in adapters]


def embedding_weight(model: nn.Module) -> Tensor | None:
    """Return the weight of a model's input embedding, (vocabulary, width), or None if it has none."""
    getter = getattr(model, "get_input_embeddings", None)
    weight = getattr(getter(), "weight", None) if getter is not None else None
    return weight if isinstance(weight, Tensor) else None
