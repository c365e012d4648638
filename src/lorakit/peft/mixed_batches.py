"""Batches whose rows have different adapters, in PEFT's words: what it refuses, and how programs hear of it.

Activated LoRA in PEFT's words: `alora_offsets` and what computes them, over `lorakit.core.routing.positions`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.layers.named_layers import LAYERS
from lorakit.errors import MixedRowsError, RouteError, RowCountError, warn_caller
from lorakit.peft import model_adapters

NOTHING: Mapping[str, Any] = {}

BASE_NAME = "__base__"
"""In `adapter_names`: a row that runs on the base alone."""

LENGTH = "Length of `adapter_names` should be the same as the number of inputs, but got {rows}."
ONE_WEIGHT = "lora.{layer} does not support mixed adapter batches yet."
COPIES = "Mixed batching is only supported for the following modules: Linear, Embedding, Conv1d, Conv2d, Conv3d."


class MixedBatchError(RouteError, TypeError):
    """A module on the model cannot take a batch of several adapters; PEFT raises a TypeError."""


@contextlib.contextmanager
def in_peft_words(
    names: Sequence[str] | None, args: Sequence[Any] = (), kwargs: Mapping[str, Any] = NOTHING
) -> Iterator[None]:
    """A block around a forward, or a generation, whose refusals of a mixed batch begin as PEFT's do.

    Args:
        names: One adapter per row, or None.
        args: What the forward takes; nothing of a generation, which makes rows of its own.
        kwargs: Its options; the first tensor among them all, (rows, …), is the batch.

    Yields:
        Nothing.

    Raises:
        RowCountError: The rows do not fit the batch.
        MixedBatchError: A module cannot take such a batch.
    """
    batch = next((given for given in (*args, *kwargs.values()) if isinstance(given, Tensor) and given.ndim), None)
    if names is not None and set(names) == {BASE_NAME} and batch is not None and len(batch) != len(names):
        raise RowCountError(
            f"{LENGTH.format(rows=len(names))} The batch has {len(batch)} rows."
        )  # no layer counts these
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
    """Return PEFT's sentence about a module that cannot take such a batch, or "" if it has none."""
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
    """For each row how many positions before its end the adapter of that row begins, or None where it does not.

    Args:
        peft_config: Adapter -> config.
        active_adapter: The adapter of rows that name none.
        input_ids: (rows, length), or None, which gives an empty list.
        adapter_names: One adapter per row, "__base__" for the base alone.
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
    """Whether an active adapter, or one that rows name, waits for its invocation tokens.

    Args:
        model: A `PeftModel`.
        adapter_names: One adapter per row, or None.
    """
    configs = model_adapters.configs_of(model)
    active = model.active_adapters
    names = {*([active] if isinstance(active, str) else active), *(adapter_names or ())}  # type: ignore[misc]
    return any(getattr(configs.get(name), "alora_invocation_tokens", None) for name in names)


def get_alora_offsets_for_forward(
    model: nn.Module, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The options of a forward with `alora_offsets` among them, where an aLoRA adapter takes part.

    Args:
        model: A `PeftModel`.
        input_ids: (rows, length), or None.
        inputs_embeds: (rows, length, width), or None.
        kwargs: The options.
    """
    names = kwargs.get("adapter_names")
    if not is_alora_relevant_in_batch(model, names) or kwargs.get("alora_offsets") is not None:
        return kwargs
    if input_ids is None and inputs_embeds is not None:
        warn_caller(_ONLY_EMBEDDINGS)
    kwargs["alora_offsets"] = None if input_ids is None else _offsets(model, input_ids, names)
    return kwargs


def get_alora_offsets_for_generate(model: nn.Module, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The options of `generate` with `alora_offsets` among them, where an aLoRA adapter takes part.

    Args:
        model: A `PeftModel`.
        args: What `generate` takes: first the prompts, (rows, length) or (length,).
        kwargs: The options.
    """
    names = kwargs.get("adapter_names")
    if not is_alora_relevant_in_batch(model, names) or kwargs.get("alora_offsets") is not None:
        return kwargs
    ids = _prompts(args, kwargs)
    if ids is None:
        warn_caller(_NO_TOKENS)
    kwargs["alora_offsets"] = None if ids is None else _offsets(model, ids, names)
    return kwargs


@contextlib.contextmanager
def options_of_forward(
    model: Any, names: Sequence[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
    """A block in which a forward has its rows' adapters, and aLoRA begins where `alora_offsets`, taken out, says.

    Without it the model looks at its input_ids by itself; embeddings alone are warned about, and run on the base.

    Args:
        model: A `PeftModel`.
        names: One adapter per row, or None.
        args: What the forward takes.
        kwargs: Its options.
    """
    with model.base_model.rows(names), _starts_of_forward(model, names, args, kwargs):
        yield


def _starts_of_forward(
    model: Any, names: Sequence[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> contextlib.AbstractContextManager[None]:
    offsets, embedded = kwargs.pop("alora_offsets", None), kwargs.get("inputs_embeds")
    if not is_alora_relevant_in_batch(model, names):
        return contextlib.nullcontext()
    if offsets is None and isinstance(embedded, Tensor) and _prompts(args, kwargs) is None:
        warn_caller(_ONLY_EMBEDDINGS)
        offsets = [None] * embedded.shape[0]
    return contextlib.nullcontext() if offsets is None else core.invoked(model.get_base_model(), offsets=offsets)


@contextlib.contextmanager
def options_of_generation(
    model: Any, names: Sequence[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[None]:
    """The same for a generation: its prompts say where the adapters begin, with a cache and without.

    Args:
        model: A `PeftModel`.
        names: One adapter per row, or None.
        args: What `generate` takes.
        kwargs: Its options.
    """
    rows = model.base_model.rows(names, model_adapters.rows_per_prompt(kwargs, model.get_base_model()))
    with rows, _starts_of_generation(model, names, args, kwargs):
        yield


def _starts_of_generation(
    model: Any, names: Sequence[str] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> contextlib.AbstractContextManager[None]:
    offsets = kwargs.pop("alora_offsets", None)
    if not is_alora_relevant_in_batch(model, names):
        return contextlib.nullcontext()
    ids, embedded = _prompts(args, kwargs), kwargs.get("inputs_embeds")
    if ids is None and offsets is None and isinstance(embedded, Tensor):
        warn_caller(_NO_TOKENS)
        offsets = [None] * embedded.shape[0]
    if ids is None and offsets is None:
        return contextlib.nullcontext()
    return core.invoked(model.get_base_model(), ids, kwargs.get("attention_mask"), offsets=offsets)


def _offsets(model: nn.Module, ids: Tensor, names: Sequence[str] | None) -> list[int | None]:
    active: Any = model.active_adapter
    return calculate_alora_offsets(model_adapters.configs_of(model), active, ids, names)


def _prompts(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    given = [kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]]
    ids = next((ids for ids in given if isinstance(ids, Tensor) and not torch.is_floating_point(ids)), None)
    return ids[None] if ids is not None and ids.ndim == 1 else ids
