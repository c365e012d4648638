"""Batches whose rows use different adapters: PEFT's checks and messages, and the offsets for activated LoRA (aLoRA)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.layers.named_layers import LAYERS
from lorakit.core.model.index import find_state
from lorakit.errors import ConfigError, MixedRowsError, RouteError, RowCountError, warn_caller
from lorakit.peft import model_adapters

Offsets = Sequence[int | None]
"""Number of tokens from each row's invocation to the end of the row; None if the row does not invoke its adapter."""

BASE_NAME = "__base__"
"""Entry in `adapter_names` for a row that uses the base model alone."""

LENGTH = "Length of `adapter_names` should be the same as the number of inputs, but got {rows}."
ONE_WEIGHT = "lora.{layer} does not support mixed adapter batches yet."
COPIES = "Mixed batching is only supported for the following modules: Linear, Embedding, Conv1d, Conv2d, Conv3d."


class MixedBatchError(RouteError, TypeError):
    """A module cannot run a batch with several adapters. Subclasses TypeError, because that is what PEFT raises."""


@contextlib.contextmanager
def _with_peft_messages(names: Sequence[str] | None) -> Iterator[None]:
    """Return a context manager that prepends PEFT's message to errors about mixed batches."""
    try:
        yield
    except RowCountError as refused:
        if names is None:
            raise
        raise RowCountError(f"{LENGTH.format(rows=len(names))} {refused}", **refused.fields) from refused
    except MixedRowsError as refused:
        beginning = _beginning(refused)
        if names is None or not beginning:
            raise
        raise MixedBatchError(f"{beginning} {refused}", **refused.fields) from refused


def _beginning(refused: MixedRowsError) -> str:
    """Return PEFT's message about a module that cannot run a mixed batch, or "" if PEFT has none."""
    if refused.field == "modules_to_save":
        return COPIES
    if refused.field is not None:
        return ""
    kind = str(refused.what)
    return ONE_WEIGHT.format(layer=LAYERS[kind].__name__ if kind in LAYERS else kind)


_ONLY_EMBEDDINGS = (
    "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward pass."
)
_NO_TOKENS = "Cannot calculate aLoRA offsets during generate as input_ids are not available. Disabling aLoRA."


def calculate_alora_offsets(
    peft_config: Mapping[str, LoraConfig],
    active_adapter: str | Sequence[str],
    input_ids: Tensor | None,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """Return the tokens from each row's last invocation sequence to its end, or None for a row without one.

    Token ids are (rows, length); None yields an empty list. `active_adapter` is for rows without an entry in
    `adapter_names`, where "__base__" selects the base model alone.
    """
    if input_ids is None:
        return []
    default = active_adapter if isinstance(active_adapter, str) else next(iter(active_adapter), BASE_NAME)
    names = list(adapter_names or ())
    names += [default] * (input_ids.shape[0] - len(names))
    found: list[int | None] = []
    for name, row in zip(names, input_ids, strict=False):
        if name != BASE_NAME and name not in peft_config:
            warn_caller(f"Adapter '{name}' not found in peft_config. Using base model for row {len(found)}.")
        tokens = getattr(peft_config.get(name), "alora_invocation_tokens", None)
        found.append(core.invocation_offsets(row, tokens)[0] if tokens else None)
    return found


def is_alora_relevant_in_batch(model: nn.Module, adapter_names: Sequence[str] | None = None) -> bool:
    """Return whether any active adapter or any adapter in `adapter_names` has invocation tokens."""
    configs = model_adapters.configs_of(model)
    names = {*model_adapters.active_adapters(model), *(adapter_names or ())}
    return any(getattr(configs.get(name), "alora_invocation_tokens", None) for name in names)


def get_alora_offsets_for_forward(
    model: nn.Module, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """Return the arguments of a forward pass of `input_ids`, (rows, length), with `alora_offsets` if aLoRA is used."""
    return _with_offsets(model, input_ids, kwargs, _ONLY_EMBEDDINGS if inputs_embeds is not None else "")


def get_alora_offsets_for_generate(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the keyword arguments of `generate`, with `alora_offsets` added if an aLoRA adapter is used."""
    return _with_offsets(model, _prompts(args, kwargs), kwargs, _NO_TOKENS)


def _with_offsets(model: nn.Module, ids: Tensor | None, options: dict[str, Any], warning: str) -> dict[str, Any]:
    names = options.get("adapter_names")
    if not is_alora_relevant_in_batch(model, names) or options.get("alora_offsets") is not None:
        return options
    if ids is None and warning:
        warn_caller(warning)
    configs = model_adapters.configs_of(model)
    offsets = (
        None if ids is None else calculate_alora_offsets(configs, model_adapters.active_adapters(model), ids, names)
    )
    return {**options, "alora_offsets": offsets}


def rows(
    tuner: nn.Module, adapter_names: Sequence[str] | None, copies: int = 0
) -> contextlib.AbstractContextManager[None]:
    """Assign an adapter to each row within a context; "__base__" uses the base model alone; None does nothing.

    `copies` is the largest number of consecutive copies of a row in `generate`, such as beams, or 0 for a forward pass.

    Raises:
        ConfigError: An adapter does not exist, or the model is in training mode, in which PEFT also rejects them.
    """
    if adapter_names is None:
        return contextlib.nullcontext()
    if tuner.training:
        raise ConfigError("Cannot pass `adapter_names` when the model is in training mode.", field="adapter_names")
    model = model_adapters.user_model(tuner)
    configs = model_adapters.configs_of(model)
    unknown = sorted(set(adapter_names) - set(configs) - {BASE_NAME})
    if unknown:
        text = f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}"
        raise ConfigError(text, what=unknown[0], field="adapter_names", allowed=configs)
    state = find_state(model)
    if state is not None and state.chosen.names and not state.active().mentions:
        return contextlib.nullcontext()  # as in PEFT, disabled adapters override `adapter_names`
    rows = [None if name == BASE_NAME else name for name in adapter_names]
    return core.route(model, rows, copies=copies or 1, keep=copies > 0)


@contextlib.contextmanager
def options_of_call(
    model: nn.Module,
    names: Sequence[str] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    generates: bool = False,
) -> Iterator[None]:
    """Assign adapters to the rows of a forward pass or `generate` within a context, and apply `alora_offsets`.

    Missing offsets are located in the `input_ids` of a forward pass or in the prompts of `generate`, with or without a
    KV cache. If only embeddings are given, aLoRA adapters stay inactive, and a warning is issued.

    Raises:
        RowCountError: The number of names differs from the rows of the first tensor, (rows, …), of a forward pass.
    """
    user = model_adapters.user_model(model)
    copies = _rows_per_prompt(kwargs, user) if generates else 0
    given = () if generates else (*args, *kwargs.values())
    batch = next((tensor for tensor in given if isinstance(tensor, Tensor) and tensor.ndim), None)
    if names is not None and set(names) == {BASE_NAME} and batch is not None and len(batch) != len(names):
        # if all rows use the base alone, no layer checks the batch size
        text = f"{LENGTH.format(rows=len(names))} The batch has {len(batch)} rows."
        raise RowCountError(text, what=len(names), field="adapter_names")
    with (
        _with_peft_messages(names),
        rows(model.get_submodule("base_model"), names, copies),
        contextlib.ExitStack() as stack,
    ):
        offsets, embedded = kwargs.pop("alora_offsets", None), kwargs.get("inputs_embeds")
        if is_alora_relevant_in_batch(model, names):
            ids = _prompts(args, kwargs)
            if offsets is None and ids is None and isinstance(embedded, Tensor):
                warn_caller(_NO_TOKENS if generates else _ONLY_EMBEDDINGS)
                offsets = [None] * embedded.shape[0]
            prompts, mask = (ids, kwargs.get("attention_mask")) if generates else (None, None)
            if prompts is not None or offsets is not None:
                stack.enter_context(core.invoked(user, prompts, mask, offsets=offsets))
        yield


def _rows_per_prompt(options: Mapping[str, Any], model: nn.Module) -> int:
    """Return the number of rows per prompt in `generate`: the larger of `num_beams` and `num_return_sequences`."""
    config = options.get("generation_config") or getattr(model, "generation_config", None)
    found = [options.get(word) or getattr(config, word, None) or 1 for word in ("num_beams", "num_return_sequences")]
    return max(int(number) for number in found)


def _prompts(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    given = [kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]]
    ids = next((ids for ids in given if isinstance(ids, Tensor) and not torch.is_floating_point(ids)), None)
    return ids[None] if ids is not None and ids.ndim == 1 else ids
