"""Find where adapters triggered by invocation tokens become active (`Variant.positions`), once per forward pass.

While a model has such an adapter, two hooks store these positions (`Offsets`) in a context variable before each forward
pass and remove them afterwards, even if the forward pass fails. The hooks also attach each adapter's start positions
to the key-value cache, so that generation steps, which see only one token each, know where each adapter started.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.clones import HOOKS
from lorakit.core.routing.route import Offsets, of_rows
from lorakit.core.routing.state import AdapterState, Override
from lorakit.core.variants import invocations_of, last_invocation
from lorakit.errors import RouteError

CACHES = ("cache", "past_key_values", "cache_params")
"""Names of the cache in the arguments and outputs of transformers models."""

MEMORY = "lorakit_starts"
"""Name of the cache attribute that maps an adapter to its first active position in each row, (rows,); -1 for none."""


Output = Tensor | Sequence[Any] | Mapping[str, Any] | None
"""The output of a model's forward pass, or None if it failed."""

NOT_IN_A_GRAPH = (
    "The start position of an adapter triggered by invocation tokens must be found outside of a compiled graph. "
    "Compile with fullgraph=False (the adapted layers then run uncompiled), or make another adapter the default."
)


class InvocationHooks:
    """Two hooks on a model: one finds the offsets before a forward pass; the other records start positions afterwards.

    The state of a forward pass is kept in a context variable, not in the hooks, so threads do not affect each other.
    """

    def __init__(self, state: AdapterState) -> None:
        self.state = state

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Put the offsets of this forward pass into the context variable."""
        if not torch.compiler.is_compiling():
            self._open(module, args, kwargs)
        elif not self.state.fits_a_graph(self.state.default):
            torch._dynamo.graph_break(msg=NOT_IN_A_GRAPH)
            torch._dynamo.disable(self._open)(module, args, kwargs)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Output) -> None:
        """Remove the offsets and store start positions in the cache; `output` is None if the forward pass failed."""
        if not torch.compiler.is_compiling():
            self._close(kwargs, output)
        elif not self.state.fits_a_graph(self.state.default):
            torch._dynamo.disable(self._close)(kwargs, output)

    def _open(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        _HookScope.drop(self)  # an interrupt may have kept the second hook from closing the scope
        offsets = self._offsets(module, args, kwargs)
        if offsets is not None:
            _HookScope(self, offsets).__enter__()

    def _close(self, kwargs: dict[str, Any], output: Output) -> None:
        offsets = _HookScope.drop(self)
        if offsets is None or output is None:
            return
        values = list(output.values()) if isinstance(output, Mapping) else output
        values = values if isinstance(values, (list, tuple)) else [values]
        if not torch.is_inference_mode_enabled():
            self.state.invocations.note([v for v in values if isinstance(v, Tensor)], offsets)
        cache = _cache(output if isinstance(output, Mapping) else kwargs)
        if cache is not None and offsets.seen is not None:
            first = torch.where(offsets.back > 0, offsets.seen - offsets.back, -1)
            begins = dict(zip(offsets.adapters, first, strict=True))
            setattr(cache, MEMORY, {**getattr(cache, MEMORY, {}), **begins})

    def _offsets(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Offsets | None:
        fixed = self.state.offsets()
        ids, inputs = kwargs.get("input_ids", args[0] if args else None), kwargs.get("inputs_embeds")
        given = ids if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point() else None
        inputs = inputs if given is None else given
        if not isinstance(inputs, Tensor) or inputs.ndim < 2:
            return None  # offsets set by `invoked` still apply; without them, any site that needs them fails
        cache = _cache(kwargs)
        rows, length = inputs.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        whole = isinstance(kwargs.get("logits_to_keep"), Tensor)
        if fixed is not None:
            return fixed.later(length, past + length, rows, whole)
        memory = getattr(cache, MEMORY, {})
        if given is None and not memory:
            return None
        visible = _visible(kwargs.get("attention_mask"), rows, length)
        if module.training:
            _check_not_packed(kwargs.get("position_ids"), visible)
        names = self.state.awaited()
        found = []
        for name in names:
            nowhere = inputs.new_zeros(rows, dtype=torch.int64)
            back = nowhere if given is None else _positions(self.state, name, given, visible)
            if name in memory:
                begin = of_rows(memory[name], rows)
                holds = (begin >= 0) & (
                    begin + len(_tokens(self.state, name)) <= past
                )  # the cache may have been cropped
                back = torch.where((back == 0) & holds, past + length - begin, back)
            found.append(back)
        return Offsets(names, torch.stack(found), length, past + length, whole) if names else None


def prompt_offsets(
    state: AdapterState, input_ids: Tensor, visible: Tensor | None = None, names: Iterable[str] | None = None
) -> Offsets:
    """Return the active positions at the end of each prompt for some or all adapters triggered by invocation tokens.

    `input_ids` are the prompts, (rows, length), and `visible` is the mask of the tokens that are not padding, or None.

    Raises:
        ConfigError: An adapter's config does not specify its invocation tokens.
    """
    waiting = tuple(sorted(state.waiting if names is None else state.waiting & set(names)))
    rows, length = input_ids.shape
    offsets = [_positions(state, name, input_ids, visible) for name in waiting]
    back = torch.stack(offsets) if offsets else input_ids.new_zeros((0, rows), dtype=torch.int64)
    return Offsets(waiting, back, length, length)


def _positions(state: AdapterState, name: str, ids: Tensor, visible: Tensor | None) -> Tensor:
    return last_invocation(ids, _tokens(state, name), visible)


def _tokens(state: AdapterState, name: str) -> Sequence[int]:
    """Return the invocation tokens of an adapter in `AdapterState.waiting`."""
    return next(tokens for _, tokens in invocations_of(state.configs[name]))


class _HookScope(Override):
    """An override that the first hook opens; the second hook finds it through the context variable and closes it."""

    def __init__(self, hooks: InvocationHooks, offsets: Offsets) -> None:
        super().__init__(hooks.state, None, offsets)
        self.hooks = hooks

    @staticmethod
    def drop(hooks: InvocationHooks) -> Offsets | None:
        """Close the hooks' scope in the current context and backward pass, if any, and return its offsets."""
        for block in hooks.state.blocks():
            if isinstance(block, _HookScope) and block.hooks is hooks:
                block.__exit__()
                return block.offsets
        return None


def install(model: nn.Module, state: AdapterState) -> None:
    """Register the hooks on a model, unless it already has them."""
    if not _hooks_of(model):
        hooks = InvocationHooks(state)
        model.register_forward_pre_hook(hooks.before, with_kwargs=True)
        model.register_forward_hook(hooks.after, with_kwargs=True, always_call=True)


def uninstall(model: nn.Module) -> None:
    """Remove the hooks from a model and from all its modules."""
    for module in model.modules():
        for key in _hooks_of(module):
            for table in HOOKS:
                getattr(module, table).pop(key, None)


def _hooks_of(module: nn.Module) -> list[int]:
    hooks = (*module._forward_pre_hooks.items(), *module._forward_hooks.items())
    return [key for key, hook in hooks if isinstance(getattr(hook, "__self__", None), InvocationHooks)]


def _cache(values: Mapping[str, Any]) -> Any:
    """Return the key-value cache of transformers in the arguments or the output of a forward pass, or None."""
    candidates = (values.get(name) for name in CACHES)
    return next((cache for cache in candidates if hasattr(cache, "get_seq_length")), None)


def _visible(mask: Tensor | Mapping[str, Tensor] | None, rows: int, length: int) -> Tensor | None:
    """Return a mask of the input's non-padding tokens, (rows, length); `mask` may also cover cached tokens."""
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != rows or mask.shape[1] < length:
        return None
    return mask[:, -length:] != 0


def _check_not_packed(positions: Tensor | None, visible: Tensor | None) -> None:
    """Reject packed rows, which contain several texts: only the invocation in the last text would be found."""
    if not isinstance(positions, Tensor) or positions.ndim != 2:
        return
    back = positions[:, 1:] <= positions[:, :-1]
    if visible is not None and visible.shape[0] == positions.shape[0]:
        back = back & visible[:, 1:] & visible[:, :-1]
    if bool(back.any()):
        text = "Some rows of this batch contain several texts, but aLoRA acts on the last only; train without packing."
        raise RouteError(text, field="position_ids")
