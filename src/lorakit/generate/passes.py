"""Forward passes for generation: over a chunk of one prompt, or over one more token of several rows."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.core import AdapterBank, continued, one_pass, route, use, waits_for_tokens, without_adapters
from lorakit.core.model.index import find_state
from lorakit.errors import ModelError, RowCountError
from lorakit.generate.rows import Row
from lorakit.ops.cache import CACHE_NAMES, Blocks, PassCache, UnstorableError

ALL_CACHE_NAMES = (*CACHE_NAMES, "cache_params")
"""The names of `CACHE_NAMES`, and that of the argument for a recurrent state."""

STORABLE = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Types of layers (`config.layer_types` in transformers) whose cache is the keys and values of all tokens."""

Scope = contextlib.AbstractContextManager[Any]


class Passes:
    """The forward passes of one model.

    Args:
        model: A causal language model.
        bank: The factors of the adapters.
        scope: Context manager that activates adapters for all rows, or None for the adapters that the rows name.

    Attributes:
        pool: The keys and values of the rows, or None if each row has a cache of the model's own type.
        device: Where the model runs.

    Raises:
        ModelError: The model has no key-value cache, or is an encoder-decoder.
    """

    def __init__(self, model: nn.Module, bank: AdapterBank, scope: Scope | None) -> None:
        self._model, self._given, self.bank = model, scope, bank
        takes = inspect.signature(model.forward).parameters
        cache_name = next((name for name in ALL_CACHE_NAMES if name in takes), None)
        if cache_name is None:
            text = f"{type(model).__name__} does not accept a key-value cache, which generation requires."
            raise ModelError(text, what=type(model).__name__)
        if "decoder_input_ids" in takes:
            text = (
                f"{type(model).__name__} is an encoder-decoder: its cache (argument {cache_name}) also has keys and "
                "values of an encoder, which are not computed here. Use its own generate(), or a decoder-only model."
            )
            raise ModelError(text, what=type(model).__name__, field=cache_name)
        self._cache_name = cache_name
        self._last_alone, self._positioned = "logits_to_keep" in takes, "position_ids" in takes
        weight = embedding_weight(model)
        self.device = next(model.parameters()).device if weight is None else weight.device
        kinds = _layer_types(model)
        is_stored = cache_name in CACHE_NAMES and kinds <= STORABLE
        self.pool = Blocks(self.device) if is_stored else None
        self._padding: Literal["before", "after"] | None = "after" if kinds == {"full_attention"} else "before"
        self._is_contiguous = not getattr(model, "_supports_attention_backend", False)  # older models reshape them
        self._unmixable: set[str | None] = set()  # adapters at sites whose inputs do not have the rows of the batch
        self._scope = functools.lru_cache(maxsize=64)(self._new_scope)

    def read(self, row: Row) -> Tensor:
        """Process the next chunk of a prompt, or the whole prompt.

        Returns:
            The logits after the last token, (1, vocabulary), or after each one, (tokens, vocabulary), if the row asks
            for log-probabilities of its prompt.
        """
        ids = torch.tensor([row.chunk if self.pool else row.given.prompt], device=self.device)
        name = row.given.adapter
        try:
            return self._over([row], ids, self._scope((name,), find_state(self._model)), row.starts)[0]
        except RowCountError:
            if name is None or name in self._unmixable:
                raise
            self._unmixable.add(name)
            self._scope.cache_clear()
        except UnstorableError:
            self.pool = None
        return self.read(row)

    def together(self, rows: Sequence[Row]) -> Iterator[list[Row]]:
        """Yield the rows, or groups of them, that one forward pass can process."""
        groups: dict[Any, list[Row]] = {}
        for row in rows:
            alone = row.given.adapter if row.given.adapter in self._unmixable else None
            length = None if self._positioned else row.stored.length  # the model counts the positions of all rows alike
            groups.setdefault(row.number if self.pool is None else (alone, length), []).append(row)
        yield from groups.values()

    def proceed(self, rows: Sequence[Row]) -> Tensor:
        """Process the last token of each row, and return the logits (rows, vocabulary) for the next ones."""
        tokens = torch.tensor([[row.last] for row in rows], device=self.device)
        starts = continued(self._model, [row.starts for row in rows]) if waits_for_tokens(self._model) else None
        scope = self._scope(tuple(row.given.adapter for row in rows), find_state(self._model))
        return self._over(rows, tokens, scope, starts)[:, -1]

    def reset(self) -> None:
        """Drop the factors of all adapters, and all keys and values."""
        self.bank.clear()
        self._scope.cache_clear()
        self.pool = None if self.pool is None else Blocks(self.device)

    def forget(self, adapter: str) -> None:
        """Free the factors of an adapter."""
        self.bank.release(adapter)
        self._unmixable.discard(adapter)
        self._scope.cache_clear()

    def _new_scope(self, names: tuple[str | None, ...], state: Hashable) -> Scope:
        """Return a context manager, to be entered at each pass, that activates the adapter of each row.

        It is for one state of the adapters: after the last one was removed, the next one begins another.
        """
        if self._given is not None:
            return self._given
        if not any(names):
            return without_adapters(self._model)
        if names[0] is not None and names[0] in self._unmixable:
            return use(self._model, names[0], keep=True)
        return route(self._model, names, keep=self.bank)

    def _over(self, rows: Sequence[Row], tokens: Tensor, scope: Scope, starts: Scope | None) -> Tensor:
        """Return the logits (rows, 1 or new, vocabulary) after the last of the new tokens (rows, new), or after each.

        Raises:
            UnstorableError: The model's keys and values cannot be stored in blocks.
            ModelError: The model returns no key-value cache.
        """
        new, keep = tokens.shape[1], 1 if rows[0].given.prompt_logprobs is None else 0
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": True}
        if self.pool is None:  # no mask: some recurrent models multiply their inputs by one of all tokens
            length = rows[0].stored.length
            cache, positions = rows[0].cache, torch.arange(length, length + new, device=self.device)[None]
        else:
            stored = [row.stored for row in rows]
            for one in stored:
                one.extend(self.pool, new)
            padding = self._padding if self._positioned and new == 1 else None
            cache = PassCache(self.pool, stored, new, padding, is_contiguous=self._is_contiguous)
            positions, inputs["attention_mask"] = cache.positions, cache.mask
        if self._last_alone:
            inputs["logits_to_keep"] = keep
        if self._positioned:
            inputs["position_ids"] = positions
        if cache is not None:
            inputs[self._cache_name] = cache
        # All context managers exit before a token is yielded, because an open one would affect the caller's code.
        # no_grad is used instead of inference_mode, because any buffers that the model creates during this call must
        # remain usable for training.
        try:
            with torch.no_grad(), scope, starts or contextlib.nullcontext(), one_pass(self._model):
                output = self._model(**inputs)
        except AttributeError as error:
            if isinstance(cache, PassCache) and error.obj is cache:  # the model uses more of transformers' interface
                raise UnstorableError from error
            raise
        after = getattr(output, self._cache_name, None)
        if after is None or (isinstance(cache, PassCache) and not cache.is_used):
            text = f"{type(self._model).__name__} returned no key-value cache, which generation requires."
            raise ModelError(text, what=type(self._model).__name__)
        for row in rows:
            row.cache = after if self.pool is None else None
            row.stored.length += new
        logits: Tensor = output.logits[:, -keep:]
        return logits.float()


def _layer_types(model: nn.Module) -> frozenset[str]:
    """Return the types of a model's layers, as transformers names them; "other" if they share or compress the cache."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    types = getattr(text, "layer_types", None)
    if types is None:
        is_sliding = getattr(text, "sliding_window", None) is not None
        types = ["sliding_attention" if is_sliding else "full_attention"]
    shares = getattr(text, "num_kv_shared_layers", None) or getattr(text, "kv_sharing_modes", None)
    if shares or getattr(config, "is_encoder_decoder", False) or getattr(text, "add_cross_attention", False):
        types = [*types, "other"]
    return frozenset(types)


def embedding_weight(model: nn.Module) -> Tensor | None:
    """Return the weight of a model's input embedding, (vocabulary, width), or None if it has none."""
    getter = getattr(model, "get_input_embeddings", None)
    weight = getattr(getter(), "weight", None) if getter is not None else None
    return weight if isinstance(weight, Tensor) else None
