"""Select which adapters are active or trainable, and where in the input an aLoRA adapter becomes active.

`set_trained` is the only function that switches `requires_grad` for a whole adapter; parameters that an init freezes
(such as B in MiCA) stay frozen.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.layers.bias import BiasPatch
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import AdapterIndex, find_state, state_of
from lorakit.core.routing.positions import prompt_offsets
from lorakit.core.routing.route import BASE, AdapterBank, Offsets, Route
from lorakit.core.routing.state import AdapterState, CheckpointContexts, Override
from lorakit.core.variants import Variant, last_invocation, variants_of
from lorakit.errors import AdapterError, RouteError


def activate(model: nn.Module, *names: str) -> None:
    """Set the default adapters, or none, which are active in every thread that does not override them.

    Raises:
        RouteError: An adapter is not on the model.
        AdapterError: A module with one of the adapters was replaced by hand, or comes from another model.
    """
    state = state_of(model)
    state.check(names)
    if not state.in_place():
        AdapterIndex.of(model).check_complete(names)
    for module in state.members():
        if module.own_route is not None or module.aside:
            module.own_route, module.aside = None, ()
    state.replace_default(names)


def use(model: nn.Module, *names: str, keep: bool | AdapterBank = False) -> Override:
    """Return a context manager that activates adapters, on every row, for the current thread or task.

    With `keep` and a single adapter, its factors are cached in the base's dtype, as in `route`.

    Raises:
        RouteError: An adapter is not on the model, or no names are given.
    """
    state = state_of(model)
    if not names:
        raise RouteError("`use` needs at least one adapter. To run the base alone, use `disable`.", field="names")
    state.check(names)
    return state.override(Route(tuple(dict.fromkeys(names))).keeping(keep))


def route(
    model: nn.Module, rows: Sequence[str | None], *, copies: int = 1, keep: bool | AdapterBank = False
) -> Override:
    """Return a context manager that assigns an adapter to each batch row.

    Args:
        model: An adapted model.
        rows: One adapter name per batch row, or None to run the row on the base alone.
        copies: Also accept batches that repeat each row this many times in succession: in beam search, for example,
            the decoder receives each prompt several times but the encoder only once.
        keep: Whether to speed up generation by caching the stacked factors of the rows' adapters for all forward passes
            in the context. Factors are stacked only when gradients are disabled. The cache takes as much memory as the
            adapters would in the base's dtype. If an adapter changes, its factors are stacked again, but changes made
            through `.data` cannot be detected. An `AdapterBank` is a cache that several contexts share.

    Raises:
        RouteError: An adapter is not on the model, `rows` is empty or a string, or `copies` is less than 1.
    """
    state = state_of(model)
    if isinstance(rows, str) or not rows:
        text = f"`route` needs a list with one adapter (or None) per row of the batch, not {rows!r}."
        raise RouteError(text, what=rows, field="rows")
    if copies < 1:
        text = f"`route` was called with copies={copies!r}; copies must be an integer >= 1."
        raise RouteError(text, what=copies, field="copies")
    state.check(rows)
    return state.override(Route(rows=tuple(rows), copies=copies).keeping(keep))


@contextlib.contextmanager
def one_pass(model: nn.Module) -> Iterator[None]:
    """Check the factors that `keep` caches once, at the start of a block with one forward pass, not at each site.

    A change of an adapter between two such blocks has the same effect as without them. A change within the block, for
    example by a hook, may have no effect before the next block.
    """
    state = find_state(model)
    kept = None if state is None else state.active().kept
    with contextlib.nullcontext() if kept is None else kept.checked():
        yield


def disable(model: nn.Module) -> Override:
    """Return a context manager that runs the base with its original weights and biases, even if adapters are merged."""
    return state_of(model).override(BASE)


def without_adapters(model: nn.Module) -> contextlib.AbstractContextManager[object]:
    """Return a context manager that runs the base as `disable` does; it does nothing if the model has no adapters."""
    return contextlib.nullcontext() if find_state(model) is None else disable(model)


def checkpoint_contexts(model: nn.Module) -> CheckpointContexts:
    """Return a `context_fn` for non-reentrant checkpointing that recomputes with the forward pass's adapters."""
    return CheckpointContexts(state_of(model))


def adapters(model: nn.Module) -> dict[str, LoraConfig]:
    """Return a dict from adapter name to config, in the order of attachment; empty if the model has no adapters."""
    state = find_state(model)
    return {} if state is None else {name: dataclasses.replace(config) for name, config in state.configs.items()}


def trainable_parameters(model: nn.Module, name: str | None = None) -> list[tuple[str, nn.Parameter]]:
    """Return the trainable parameters (…) of one or all adapters, each once, with their names in the model."""
    state = state_of(model)
    names = list(state.configs) if name is None else [name]
    state.check(names, AdapterError)
    owned = {id(p) for parameters in parameters_by_adapter(model, names).values() for p in parameters}
    return [(path, p) for path, p in model.named_parameters() if p.requires_grad and id(p) in owned]


def parameters_by_adapter(model: nn.Module, names: Collection[str]) -> dict[str, list[nn.Parameter]]:
    """Return all parameters (…) of each adapter: A, B, magnitudes, saved modules, trainable token rows and biases.

    Each parameter is listed once, in the order in which the modules were adapted.
    """
    state = state_of(model)
    by_adapter: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for component in (*state.members(), *_bias_patches(model, state)):
        for name in by_adapter.keys() & set(component.available_adapters()):
            by_adapter[name] += component.parameters_of(name)  # tied embeddings share parameters
    return {name: list({id(p): p for p in parameters}.values()) for name, parameters in by_adapter.items()}


def _bias_patches(model: nn.Module, state: AdapterState) -> list[BiasPatch]:
    """Return the hooks through which adapters train biases; the model is walked only if any biases are trained."""
    return list(AdapterIndex.of(model).bias_patches()) if state.biased else []


def set_trained(model: nn.Module, wanted: Mapping[str, bool], others: bool | None = None) -> None:
    """Make adapters trainable, or freeze them, and likewise all `others` unless None; skip unknown names."""
    state = find_state(model)
    if state is None:
        return
    flags = {name: flag for name in state.configs if (flag := wanted.get(name, others)) is not None}
    for component in (*state.members(), *_bias_patches(model, state)):
        for name in flags.keys() & set(component.available_adapters()):
            component.set_trained(name, flags[name])


def penalties(model: nn.Module, field: str | None = None) -> Tensor | None:
    """Return the penalty that the variants of active adapters add to a training loss, a differentiable scalar, or None.

    Each variant's terms are summed over its sites, or averaged if `Penalty.is_mean` is set. A custom training loop
    should add the result to the loss once per optimizer step, as `lorakit train` does. If no variant has a penalty
    (plain LoRA has none), no layers are visited. `field` is the config field of the only variant to count.

    Raises:
        AdapterError: Parts of the model were adapted separately.
    """

    def counts(variant: Variant) -> bool:
        return variant.penalty is not None and field in (None, variant.field)

    state = find_state(model)
    configs = [] if state is None else state.configs.values()
    if state is None or not any(counts(v) for config in configs for v in variants_of(config)):
        return None
    terms_by_variant: dict[Variant, list[Tensor]] = {}
    for layer in state.members():
        if isinstance(layer, LoraLayer):
            acting = (state.active() if layer.own_route is None else layer.own_route).mentions
            for factor in (layer.factor(name) for name in layer.r if name in acting):
                if factor.variant.penalty is not None and counts(factor.variant):
                    term = factor.variant.penalty.term(factor, layer.training)
                    terms_by_variant.setdefault(factor.variant, []).append(term)
    totals = []
    for variant, terms in terms_by_variant.items():
        stacked = torch.stack([term.to(terms[0].device) for term in terms])
        totals.append(stacked.mean() if variant.penalty is not None and variant.penalty.is_mean else stacked.sum())
    return torch.stack([total.to(totals[0].device) for total in totals]).sum() if totals else None


def invocation_offsets(
    input_ids: Tensor, tokens: Sequence[int], attention_mask: Tensor | None = None
) -> list[int | None]:
    """Return where an aLoRA adapter becomes active in each row: at the last occurrence of its invocation tokens.

    Args:
        input_ids: Token ids with shape (rows, length) or (length,).
        tokens: The adapter's invocation tokens.
        attention_mask: Shape (rows, length), with 0 for padding; invocation tokens in padding are ignored.

    Returns:
        For each row, the number of positions from the start of that occurrence to the end of the row, or None.
    """
    ids = input_ids if input_ids.ndim == 2 else input_ids[None]
    return [int(back) or None for back in last_invocation(ids, tokens, attention_mask)]


def invoked(
    model: nn.Module,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    *,
    offsets: Sequence[int | None] | None = None,
) -> Override:
    """Return a context manager that activates aLoRA adapters where the given prompts invoke them.

    The start positions come from the prompts, regardless of the model input. Use this for forward passes that receive
    embeddings instead of tokens, or only part of a text. Later forward passes continue from the same start positions.

    Args:
        model: An adapted model.
        input_ids: The prompts' token ids, with shape (rows, length).
        attention_mask: Shape (rows, length), with 0 for padding.
        offsets: For each row, the number of final prompt positions at which every aLoRA adapter is active, or None if
            the row invokes no adapters. If offsets are given, the prompts are not searched for invocation tokens.
            Without `input_ids`, offsets are counted from the end of each forward pass's input.

    Raises:
        AdapterError: The model has no adapters.
        RouteError: Neither prompts nor offsets are given, or the number of offsets differs from the number of prompts.
    """
    state = state_of(model)
    length = None if input_ids is None else input_ids.shape[-1]
    if offsets is not None:
        backs = torch.tensor([offset or 0 for offset in offsets], dtype=torch.int64)
        if input_ids is not None and input_ids.shape[0] != len(offsets):
            text = (
                f"The number of prompts ({input_ids.shape[0]}) differs from the number of offsets ({len(offsets)}). "
                "Pass one offset per prompt."
            )
            raise RouteError(text, what=len(offsets), field="offsets")
        waiting = tuple(sorted(state.waiting))
        back = backs.expand(len(waiting), -1)
        return state.override(None, Offsets(waiting, back, length, length))
    if input_ids is None:
        text = "`invoked` got neither input_ids nor offsets; pass the prompts as input_ids (rows, length)."
        raise RouteError(text, field="input_ids")
    return state.override(None, prompt_offsets(state, input_ids, attention_mask))


def continued(model: nn.Module, prompts: Sequence[Override | None]) -> Override:
    """Return a context manager for a forward pass over one more token of each row, after `invoked` read its prompt.

    None is for a row whose prompt was read before the model had an aLoRA adapter.
    """
    state = state_of(model)
    waiting = tuple(sorted(state.waiting))
    offsets = [None if prompt is None else prompt.offsets for prompt in prompts]
    backs = [
        [int(one is not None and name in one.adapters and bool(one.of(name))) for one in offsets] for name in waiting
    ]
    return state.override(None, Offsets(waiting, torch.tensor(backs, dtype=torch.int64), 1))


def prompt_offset(model: nn.Module, input_ids: Tensor, adapter: str) -> int:
    """Return for how many tokens, counted from the end of a prompt (length,), an adapter is active.

    An aLoRA adapter is active from its invocation tokens onward, and any other adapter for the whole prompt, as is one
    with saved modules, token rows or biases.
    """
    state = find_state(model)
    config = None if state is None else state.configs.get(adapter)
    saves = config is not None and (config.modules_to_save or config.trainable_token_indices or config.bias != "none")
    if state is None or adapter not in state.waiting or saves:
        return input_ids.shape[0]
    return int(prompt_offsets(state, input_ids[None], names=(adapter,)).back)


def waits_for_tokens(model: nn.Module) -> bool:
    """Return whether a model has aLoRA adapters, which are inactive before their invocation tokens (see `invoked`)."""
    state = find_state(model)
    return state is not None and bool(state.waiting)
