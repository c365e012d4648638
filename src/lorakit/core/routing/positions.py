"""Activated LoRA's view of a forward: which tokens a model was called with, and so where its adapters begin.

While an adapter with `alora_invocation_tokens` sits on a model, two hooks on that model lay the starts of each forward
into the context and take them out again, also when the forward fails. A cache of keys and values keeps where the
adapters began in its rows, so that the steps of a generation, which see one token each, go on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.routing.route import Starts, last_invocation, of_rows
from lorakit.core.routing.state import AdapterState, Override
from lorakit.errors import ConfigError, RouteError

CACHES = ("cache", "past_key_values", "cache_params")
"""What models of the field call their cache, as an argument and in their output."""

MEMORY = "lorakit_starts"
"""Attribute of a cache: adapter -> first position at which it acts in each row, (rows,), -1 for none."""


NOT_IN_A_GRAPH = (
    "Where an aLoRA adapter begins is found in the tokens of each forward, outside of a compiled graph. Compile with "
    "fullgraph=False (the adapted layers then run uncompiled), or make another adapter the default."
)


class InvocationHooks:
    """The two hooks on a model: before a forward, where its adapters begin; after it, what its cache must remember.

    They hold no state of a forward: that is in the context, so threads do not meet.
    """

    def __init__(self, state: AdapterState) -> None:
        self.state = state

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Lay the starts of this forward into the context."""
        if torch.compiler.is_compiling():
            if not self.state.fits_a_graph(self.state.default):
                torch._dynamo.graph_break(msg=NOT_IN_A_GRAPH)
                torch._dynamo.disable(self._open)(module, args, kwargs)
        else:
            self._open(module, args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take them out; called after a failed forward too, with no output."""
        if torch.compiler.is_compiling():
            if not self.state.fits_a_graph(self.state.default):
                torch._dynamo.disable(self._close)(kwargs, output)
        else:
            self._close(kwargs, output)

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _HookScope.drop(self)  # an interrupt is the one way to end a forward without its second hook
        starts = self._starts(module, args, kwargs)
        if starts is not None:
            _HookScope(self, starts).__enter__()

    def _close(self, kwargs: dict[str, Any], output: Any) -> None:
        starts = _HookScope.drop(self)
        if starts is None or output is None:
            return
        values = list(output.values()) if isinstance(output, Mapping) else output
        values = values if isinstance(values, (list, tuple)) else [values]
        if not torch.is_inference_mode_enabled():
            self.state.invocations.note([v for v in values if isinstance(v, Tensor)], starts)
        cache = _cache(output if isinstance(output, Mapping) else kwargs)
        if cache is not None and starts.seen is not None:
            seen = starts.seen
            begins = {name: torch.where(back > 0, seen - back, -1) for name, back in starts.found.items()}
            setattr(cache, MEMORY, {**getattr(cache, MEMORY, {}), **begins})

    def _starts(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Starts | None:
        fixed = self.state.starts()
        ids, inputs = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        given = ids if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point() else None
        inputs = inputs if given is None else given
        if not isinstance(inputs, Tensor) or inputs.ndim < 2:
            return None  # what is fixed holds as it is; without it, the first site that needs it says so
        cache = _cache(kwargs)
        rows, length = inputs.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        whole = isinstance(kwargs.get("logits_to_keep"), Tensor)
        if fixed is not None:
            later = fixed
            return Starts(lambda name: later.later(name, past + length, rows), length, past + length, whole)
        memory = getattr(cache, MEMORY, {})
        if given is None and not memory:
            return None
        visible = _visible(kwargs.get("attention_mask"), rows, length)
        if module.training:
            _check_not_packed(kwargs.get("position_ids"), visible)

        def find(name: str) -> Tensor:
            tokens = tokens_of_call(self.state, name)
            none = inputs.new_zeros(rows, dtype=torch.int64)
            back = none if given is None else last_invocation(given, tokens, visible)
            if name not in memory:
                return back
            begin = of_rows(memory[name], rows)
            holds = (begin >= 0) & (begin + len(tokens) <= past)  # a cache may have been cut since
            return torch.where((back == 0) & holds, past + length - begin, back)

        return Starts(find, length, past + length, whole)


class _HookScope(Override):
    """What the first hook opens and the second closes: found again in the context, since hooks share no variable."""

    def __init__(self, hooks: InvocationHooks, starts: Starts) -> None:
        super().__init__(hooks.state, None, starts)
        self.hooks = hooks

    @staticmethod
    def drop(hooks: InvocationHooks) -> Starts | None:
        """Close what these hooks opened in this context and backward; what it said, or None."""
        for scope in hooks.state.scopes():
            if isinstance(scope.block, _HookScope) and scope.block.hooks is hooks:
                scope.block.__exit__()
                return scope.starts
        return None


def install(model: nn.Module, state: AdapterState) -> None:
    """Put the hooks on a model, where they are not there yet."""
    if not _hooks_of(model):
        hooks = InvocationHooks(state)
        model.register_forward_pre_hook(hooks.before, with_kwargs=True)
        model.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)


def uninstall(model: nn.Module) -> None:
    """Take the hooks off a model and all that is in it."""
    for module in model.modules():
        for key in _hooks_of(module):
            for table in _TABLES:
                getattr(module, table).pop(key, None)


_TABLES = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


def _hooks_of(module: nn.Module) -> list[int]:
    hooks: dict[int, Callable[..., Any]] = {**module._forward_pre_hooks, **module._forward_hooks}
    return [key for key, hook in hooks.items() if isinstance(getattr(hook, "__self__", None), InvocationHooks)]


def tokens_of_call(state: AdapterState, name: str) -> Sequence[int]:
    """Return the invocation tokens of an adapter.

    Raises:
        ConfigError: The config has none.
    """
    tokens = state.configs[name].alora_invocation_tokens
    if not tokens:
        raise ConfigError(f"alora_invocation_tokens of adapter {name!r} is {tokens!r}; it must be a list of token ids.")
    return tokens


def _cache(values: Mapping[str, Any]) -> Any:
    """The cache among a forward's arguments or in its output, or None."""
    found = (values.get(name) for name in CACHES)
    return next((cache for cache in found if hasattr(cache, "get_seq_length")), None)


def _visible(mask: Any, rows: int, length: int) -> Tensor | None:
    """Which of this forward's tokens are no padding, (rows, length), from a mask that may cover a cache too."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != rows or mask.shape[1] < length:
        return None
    return mask[:, -length:] != 0


def _check_not_packed(positions: Any, visible: Tensor | None) -> None:
    """Refuse rows in which several texts stand: the last invocation would be that of the last text alone."""
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        return
    back = positions[:, 1:] <= positions[:, :-1]
    if visible is not None and visible.shape[0] == positions.shape[0]:
        back = back & visible[:, 1:] & visible[:, :-1]
    if bool(back.any()):
        raise RouteError(
            "An aLoRA adapter begins at the last invocation of each row, and rows of this batch hold several texts "
            "(their position_ids start again). Train without packing."
        )
