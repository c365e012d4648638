"""Select the adapters that act on a model or are trained, and the position where an aLoRA adapter starts.

`set_trained` is the only function that switches `requires_grad` of a whole adapter; parameters that an init freezes
(MiCA's B) stay frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.layers.adapter_component import AdapterComponent, AdapterModule
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import AdapterIndex, check_known, find_state, state_of
from lorakit.core.routing.positions import prompt_offsets
from lorakit.core.routing.route import BASE, Offsets, Route
from lorakit.core.routing.state import AdapterState, CheckpointContexts, Override
from lorakit.core.variants import last_invocation, variants_of
from lorakit.errors import RouteError


def activate(model: nn.Module, *names: str) -> None:
    """Set the default adapters, for all threads without an override.

    Args:
        model: An adapted model.
        names: Adapters; none selects the base alone.

    Raises:
        RouteError: There is no such adapter.
    """
    state = state_of(model)
    state.check(names)
    for module in state.members():
        if module.own_route is not None or module.aside:
            module.own_route, module.aside = None, ()
    state.replace_default(names)


def use(model: nn.Module, *names: str, keep: bool = False) -> Override:
    """Activate adapters within a context, for this thread or task.

    Args:
        model: An adapted model.
        names: One or more adapters; together they apply to every row.
        keep: As in `route`: a single adapter's factors are kept in the base's dtype for all forwards of the context.

    Raises:
        RouteError: There is no such adapter, or none was named.
    """
    state = state_of(model)
    if not names:
        raise RouteError("`use` was given no adapter. Name at least one; `disable` gives the base alone.")
    state.check(names)
    wanted = Route(tuple(dict.fromkeys(names)))
    return state.override(wanted.keeping() if keep else wanted)


def route(model: nn.Module, rows: Sequence[str | None], *, copies: int = 1, keep: bool = False) -> Override:
    """Assign an adapter to each batch row within a context.

    Args:
        model: An adapted model.
        rows: One name per row of the batch, None for the base alone.
        copies: A batch may also contain each row this many times in succession, as beam search repeats prompts for a
            decoder whose encoder receives each once.
        keep: Without gradients, the factors of the rows' adapters are stacked. Keep the stacks for all forwards of the
            context, as in generation; they need the memory of these adapters in the base's dtype. Adapters that change
            in the meantime are stacked again, except for a write through `.data`, which cannot be detected.

    Raises:
        RouteError: There is no such adapter, no rows, or copies is below 1.
    """
    state = state_of(model)
    if isinstance(rows, str) or not rows:
        raise RouteError(f"`route` was given {rows!r}. Give a list with one adapter (or None) per row of the batch.")
    if copies < 1:
        raise RouteError(f"`route` was given copies={copies!r}; it must be a whole number of at least 1.")
    state.check(rows)
    wanted = Route(rows=tuple(rows), copies=copies)
    return state.override(wanted.keeping() if keep else wanted)


def disable(model: nn.Module) -> Override:
    """Run the base model without adapters within a context: nothing added, nothing merged, the original biases.

    Args:
        model: An adapted model.

    Raises:
        AdapterError: The model has no adapters.
    """
    return state_of(model).override(BASE)


def checkpoint_contexts(model: nn.Module) -> CheckpointContexts:
    """Return a `context_fn` for non-reentrant gradient checkpointing: recomputations use the route of their forward.

    Args:
        model: An adapted model.

    Raises:
        AdapterError: The model has no adapters.
    """
    return CheckpointContexts(state_of(model))


def adapters(model: nn.Module) -> dict[str, LoraConfig]:
    """Return adapter configs by name, in the order of attaching; empty if there are none.

    Args:
        model: Any model.
    """
    state = find_state(model)
    return {} if state is None else {name: dataclasses.replace(config) for name, config in state.configs.items()}


def trainable_parameters(model: nn.Module, name: str | None = None) -> list[tuple[str, nn.Parameter]]:
    """Return names and parameters that adapters train.

    Args:
        model: An adapted model.
        name: One adapter, or None for all.

    Returns:
        Pairs of a parameter's name in the model and the parameter, with `requires_grad` set; each (…) once.

    Raises:
        AdapterError: There is no such adapter.
    """
    state = state_of(model)
    names = list(state.configs) if name is None else [name]
    check_known(state, names)
    owned = {id(p) for parameters in parameters_by_adapter(model, names).values() for p in parameters}
    return [(path, p) for path, p in model.named_parameters() if p.requires_grad and id(p) in owned]


def parameters_by_adapter(model: nn.Module, names: Collection[str]) -> dict[str, list[nn.Parameter]]:
    """Return every parameter of adapters: A, B, magnitudes, saved modules, trained tokens and biases.

    Args:
        model: An adapted model.
        names: Adapters.

    Returns:
        Adapter -> its parameters, (…), each once, in the order in which their modules were adapted.
    """
    state = state_of(model)
    found: dict[str, list[nn.Parameter]] = {name: [] for name in names}
    for component in _components(model, state):
        for name in found.keys() & set(component.available_adapters()):
            found[name] += component.parameters_of(name)  # tied tables have the same ones
    return {name: list({id(p): p for p in parameters}.values()) for name, parameters in found.items()}


def _components(model: nn.Module, state: AdapterState) -> Iterator[AdapterComponent]:
    """Yield everything that carries adapters; the model is only walked if an adapter trains biases."""
    yield from state.members()
    if state.biased:
        for patches in AdapterIndex.of(model).patches.values():
            yield from patches


def set_trained(model: nn.Module, wanted: Mapping[str, bool], others: bool | None = None) -> None:
    """Train adapters, or freeze them.

    Args:
        model: An adapted model; only `requires_grad` is changed.
        wanted: Adapter -> whether its parameters require gradients; unknown names are ignored.
        others: The same for all adapters that are not named; None leaves them unchanged.
    """
    state = find_state(model)
    if state is None:
        return
    for component in _components(model, state):
        for name in component.available_adapters():
            flag = wanted.get(name, others)
            if flag is None:
                continue
            if isinstance(component, AdapterModule):
                component.set_trained(name, flag)
            else:
                for parameter in component.parameters_of(name):
                    parameter.requires_grad_(flag)


def penalties(model: nn.Module) -> Tensor | None:
    """Sum the penalties that the variants of active adapters add to a training loss.

    A custom training loop adds it to the loss once per optimizer step, as `lorakit train` does. For LoRA and every
    variant without a penalty it is None, without a look at the layers.

    Args:
        model: A model with or without adapters.

    Returns:
        A scalar with a graph to the adapters' parameters, or None.

    Raises:
        AdapterError: Parts of the model were adapted separately.
    """
    state = find_state(model)
    configs = [] if state is None else state.configs.values()
    if state is None or not any(variant.penalty for config in configs for variant in variants_of(config)):
        return None
    found: list[Tensor] = []
    for layer in state.members():
        if isinstance(layer, LoraLayer):
            acting = (state.active() if layer.own_route is None else layer.own_route).mentions
            factors = [layer.factor(name) for name in layer.r if name in acting]
            found += [factor.variant.penalty(factor) for factor in factors if factor.variant.penalty is not None]
    return torch.stack([one.to(found[0].device) for one in found]).sum() if found else None


def invocation_offsets(
    input_ids: Tensor, tokens: Sequence[int], attention_mask: Tensor | None = None
) -> list[int | None]:
    """Return where an adapter starts in each row: at the last occurrence of its invocation tokens.

    Args:
        input_ids: (rows, length) or (length,).
        tokens: Its invocation tokens.
        attention_mask: (rows, length), 0 for padding; occurrences in padding are ignored.

    Returns:
        For each row the number of positions from there to the end of the row, or None if the tokens do not occur.
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
    """Start aLoRA adapters where these prompts say within a context, whatever tokens its forwards receive.

    For forwards that receive embeddings instead of tokens, or only a part of a text; later positions are counted on.

    Args:
        model: An adapted model.
        input_ids: The prompts, (rows, length).
        attention_mask: (rows, length), 0 for padding.
        offsets: Used instead of searching: for each row, the number of positions before the end of its prompt where
            the adapter starts, or None if the row does not invoke it; the same for every adapter. Without `input_ids`
            they count from the end of each forward's input.

    Raises:
        AdapterError: The model has no adapters.
        RouteError: Neither prompts nor offsets are given, or they have different rows.
    """
    state = state_of(model)
    length = None if input_ids is None else input_ids.shape[-1]
    if offsets is not None:
        backs = torch.tensor([offset or 0 for offset in offsets], dtype=torch.int64)
        if input_ids is not None and input_ids.shape[0] != len(offsets):
            raise RouteError(f"There are {input_ids.shape[0]} prompts and {len(offsets)} offsets; give one per prompt.")
        waiting = tuple(sorted(state.waiting))
        back = backs.expand(len(waiting), -1)
        return state.override(None, Offsets(waiting, back, length, length))
    if input_ids is None:
        raise RouteError("`invoked` was given neither input_ids nor offsets; give it the prompts, (rows, length).")
    return state.override(None, prompt_offsets(state, input_ids, attention_mask))


def prompt_offset(model: nn.Module, input_ids: Tensor, adapter: str) -> int:
    """Return how many of the last tokens of a prompt an adapter acts on: all, unless it waits for its tokens.

    Args:
        model: A model with or without adapters.
        input_ids: The prompt, (length,).
        adapter: The adapter.

    Raises:
        ConfigError: A config has no invocation tokens.
    """
    state = find_state(model)
    if state is None or adapter not in state.waiting:
        return input_ids.shape[0]
    return int(prompt_offsets(state, input_ids[None], names=(adapter,)).back)


def waits_for_tokens(model: nn.Module) -> bool:
    """Return whether an adapter on a model does not act on all tokens of a prompt (`invoked`).

    Args:
        model: A model with or without adapters.
    """
    state = find_state(model)
    return state is not None and bool(state.waiting)
