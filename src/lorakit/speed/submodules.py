"""Check that fused `forward` methods know the activations, attributes, config fields and arguments of modules."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.speed.patching import Options, children_of, is_watched

ACTIVATIONS: dict[str, str] = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELU": "gelu",
    "GELUActivation": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "QuickGELUActivation": "quick_gelu",
    "ReLU": "relu",
}
"""Dict from class name to name in `lorakit.ops.activation`. A probe confirms each activation before it is used."""


def activation_of(function: Callable[..., Any] | None) -> str | None:
    """Return the name of an activation, a module or a function of tensors (…), or None if it is unknown."""
    if isinstance(function, nn.GELU):
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    if isinstance(function, nn.Module):
        return None if is_watched(function) else ACTIVATIONS.get(type(function).__name__)
    functions: dict[Callable[..., Any] | None, str]
    functions = {functional.silu: "silu", functional.gelu: "gelu", functional.relu: "relu"}
    return functions.get(function)


def is_activation_watched(function: Callable[..., Any] | None) -> bool:
    """Return whether an activation is a module with hooks."""
    return isinstance(function, nn.Module) and is_watched(function)


def unknown_activation(function: Callable[..., Any] | None) -> str | None:
    """Return a short reason why an activation is not supported, or None if it is supported."""
    return f"unknown activation {type(function).__name__}" if activation_of(function) is None else None


def unknown_implementation(attention: nn.Module, supported: str = "sdpa") -> str | None:
    """Return why the attention implementation in a module's config is not supported, or None if it is supported."""
    implementation = getattr(getattr(attention, "config", None), "_attn_implementation", None)
    return None if implementation == supported else f"attention implementation {implementation!r} is not supported"


def unknown_attributes(
    module: nn.Module, names: Collection[str], children: Collection[str], parameters: Collection[str] = ()
) -> str | None:
    """Return a phrase that lists the unknown attributes, children and parameters of a module, or None. An unknown
    setting may have an effect that no probe shows.
    """
    attributes = {name for name in vars(module) if not name.startswith("_")} - {"training", *names, *children}
    tensors = {name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    unknown = sorted(attributes | (children_of(module).keys() - children) | (tensors - set(parameters)))
    return f"unknown attributes {', '.join(unknown)}" if unknown else None


FIELDS = frozenset({"sliding_window", "num_attention_heads", "num_key_value_heads", "_attn_implementation"})
"""Known config fields. Each is read by a fused `forward`, or a probe shows its effect."""


def unknown_fields(module: nn.Module, read: Collection[str]) -> str | None:
    """Return a phrase that lists the unknown config fields that a module's source reads, or None if there are none. A
    field that is None or False counts as off; the replacement's contract detects changes to its value.
    """
    config = vars(module).get("config")
    if config is None:
        return None
    fields = vars(config)
    values = {name: fields.get(name) for name in read if name not in FIELDS}
    unknown = sorted(name for name, value in values.items() if value is not None and value is not False)
    return f"its source reads unknown config fields {', '.join(unknown)}" if unknown else None


def knows_all(attention: nn.Module, options: Options, read: Collection[str]) -> bool:
    """Return whether a call requests only the output of an attention module, and `read` has its other arguments."""
    wants_weights = options.get("output_attentions")
    if wants_weights is None:
        wants_weights = getattr(getattr(attention, "config", None), "output_attentions", False)
    passed = (name for name, value in options.items() if name not in OPTIONAL or not (value is None or value is False))
    return not wants_weights and all(name in read for name in passed)


OPTIONAL = frozenset(
    {"cache", "past_key_values", "layer_past", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
    | {"encoder_hidden_states", "encoder_attention_mask", "key_value_states", "mask", "head_mask", "cache_position"}
)
"""Arguments that have no effect if they are None or False. Any other argument has no effect only if it is omitted."""


def is_supported(x: Tensor) -> bool:
    """Return whether fused `forward` methods support x (…, d): floating-point, nonempty and not traced. Under autocast,
    they compute in its dtype and do not support float64, which autocast does not cast.
    """
    if torch.compiler.is_compiling() or not x.is_floating_point() or not x.numel():
        return False
    return x.dtype != torch.float64 or not torch.is_autocast_enabled(x.device.type)
