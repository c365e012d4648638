"""Generation for a fixed set of prompts: clients of the engine that yield tokens as they are generated."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence

from torch import Tensor, nn

from lorakit.core import AdapterBank
from lorakit.core.model.index import find_state, layers
from lorakit.errors import UsageError
from lorakit.generate.engine import Engine
from lorakit.generate.passes import Scope
from lorakit.generate.rows import Continuation, Failure, NewToken
from lorakit.generate.sampling import Sampling


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
        ModelError: The model is in training mode, has no key-value cache or is an encoder-decoder.
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
) -> Iterator[NewToken]:
    """Continue several prompts together, each optionally with its own adapter, yielding tokens as they are generated.

    The arguments are checked, and the adapter routing is determined, at the time of the call. The model runs only when
    a token is requested. Prompts that begin with the same tokens and are read with the same adapter read them once.

    Args:
        model: A causal language model in eval mode.
        prompts: Token ids of each row; the rows may differ in length.
        max_new_tokens: Maximum number of new tokens per row.
        sampling: One `Sampling` for all rows, or one per row.
        eos_ids: Ids of the tokens that end a row; the ending token is still yielded, as the row's last token.
        adapters: For each row, the name of its adapter, or None for the base model; if omitted, every row uses the
            active adapters.

    Returns:
        An iterator over the new tokens, ordered by step, then by row.

    Raises:
        UsageError: A prompt is empty, contains ids outside the vocabulary, or leaves no room for new tokens; or
            `sampling` or `adapters` does not have one entry per row.
        ConfigError: `max_new_tokens` is below 1.
        RouteError: An adapter was not found.
        ModelError: The model is in training mode, has no key-value cache or is an encoder-decoder.
        NonFiniteError: The model's logits are NaN or infinite.
    """
    if not prompts:
        raise UsageError("no prompt to continue; pass at least one.", field="prompts")
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != len(prompts):
        message = (
            f"The number of prompts is {len(prompts)}, but the number of sampling settings is {len(samplings)}; pass "
            "one per prompt, or a single `Sampling` for all prompts."
        )
        raise UsageError(message, field="sampling")
    scope, names = _active(model, len(prompts)) if adapters is None else (None, list(adapters))
    if len(names) != len(prompts):
        message = (
            f"The number of prompts is {len(prompts)}, but the number of adapters is {len(names)}; pass one adapter, "
            "or None, per prompt."
        )
        raise UsageError(message, field="adapters")
    rows = [
        Continuation(tuple(int(token) for token in prompt), max_new_tokens, one, name, frozenset(eos_ids))
        for prompt, one, name in zip(prompts, samplings, names, strict=True)
    ]
    longest = max(len(row.prompt) for row in rows)
    bank = AdapterBank(together=[*dict.fromkeys(filter(None, names))], by_row=True)
    engine = Engine(model, rows=len(rows), prefix_tokens=longest, bank=bank, scope=scope)
    for number, row in enumerate(rows, 1):
        engine.submit(row, f"prompt {number} of {len(rows)}" if len(rows) > 1 else "the prompt")
    return _tokens(engine)


def _tokens(engine: Engine) -> Iterator[NewToken]:
    while not engine.is_idle:
        for new in engine.step(chunks=None):
            if isinstance(new, Failure):
                raise new.error
            if isinstance(new, NewToken):
                yield new


def _active(model: nn.Module, rows: int) -> tuple[Scope | None, list[str | None]]:
    """Return a context manager with the currently active adapters, or None and the adapter of each row.

    They stay active even if tokens are requested outside the caller's context. A model-wide override cannot reproduce
    per-layer overrides, so a model with per-layer overrides is left as is.
    """
    state = find_state(model)
    if state is None or any(layer.own_route is not None for _, layer in layers(model)):
        return contextlib.nullcontext(), [None] * rows
    active = state.active()
    by_row = active.rows_of(rows)
    if active.rows is None or by_row is None:
        return state.override(active.keeping(True)), [None] * rows
    return None, [*by_row]
