"""Norms, activations and linear operands of a model's modules, recognized by structure.

None means unknown; nothing is guessed.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lorakit.core.clones import is_watched
from lorakit.ops.norm import Norm
from lorakit.speed.contract import names_read
from lorakit.speed.patching import original_class

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
"""Activation class -> its name in `lorakit.ops.activation`; a probe confirms each before it is used."""

RMS = ("RMSNorm", "T5LayerNorm")
"""Suffixes of the class names of norms without a mean."""

EPSILONS = ("variance_epsilon", "eps")


def activation_of(function: Any) -> str | None:
    """Return the name of an activation, or None.

    Args:
        function: A module or a function of tensors (…).
    """
    if isinstance(function, nn.GELU):
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    if isinstance(function, nn.Module):
        return None if is_watched(function) else ACTIVATIONS.get(type(function).__name__)
    return {functional.silu: "silu", functional.gelu: "gelu", functional.relu: "relu"}.get(function)


def norm_of(module: nn.Module | None) -> Norm | None:
    """Return the operands of a norm over the last axis, or None if it is unknown or not frozen."""
    if module is None or is_watched(module):
        return None
    weight = module._parameters.get("weight")
    bias = module._parameters.get("bias")
    if (
        type(weight) is not nn.Parameter
        or weight.ndim != 1
        or any(p.requires_grad for p in (weight, bias) if p is not None)
    ):
        return None
    if isinstance(module, nn.LayerNorm):
        return Norm("layer", weight, bias, module.eps)
    eps = next((value for name in EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    if eps is None or bias is not None or not type(module).__name__.endswith(RMS):
        return None
    return Norm("rms", weight, None, eps, 1.0 if type(module).__name__.startswith("Gemma") else 0.0)


def dropout_p(dropout: nn.Module | None) -> float | None:
    """Return the current probability of a dropout, 0 if there is none, None if it is not a plain one."""
    if dropout is None or (isinstance(dropout, nn.Identity) and not is_watched(dropout)):
        return 0.0
    if not isinstance(dropout, nn.Dropout) or is_watched(dropout) or dropout.p >= 1:
        return None
    return dropout.p if dropout.training else 0.0


def wants_weights(attention: nn.Module, call: Mapping[str, Any]) -> bool:
    """Return whether a call, or the model's config, requests attention weights.

    Args:
        attention: A module, with a transformers config if it has one.
        call: The call's arguments by name.
    """
    asked = call.get("output_attentions")
    return bool(getattr(getattr(attention, "config", None), "output_attentions", False) if asked is None else asked)


def unknown_attributes(module: nn.Module, names: Collection[str], children: Collection[str]) -> str | None:
    """Return what a module has besides the known attributes and children, as a phrase, or None.

    An unknown setting may change something that no probe shows.

    Args:
        module: The module.
        names: Known attributes.
        children: Known children.
    """
    own = {name for name in vars(module) if not name.startswith("_")} - {"training", *names, *children}
    inside = {name for name, child in module._modules.items() if child is not None} - set(children)
    held = {name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    unknown = sorted(own | inside | held)
    return f"unknown attributes {', '.join(unknown)}" if unknown else None


def unknown_config_fields(module: nn.Module, known: Collection[str]) -> str | None:
    """Return the unknown config fields that a module's forward reads, as a phrase, or None.

    A field that is None or False is considered off; a replacement's contract covers its value.

    Args:
        module: A module with a config.
        known: Fields that the fused forward reads, too.
    """
    fields = vars(module.config)
    read = names_read(original_class(module)) & fields.keys() - vars(module).keys() - set(known)
    unknown = sorted(name for name in read if fields[name] is not None and fields[name] is not False)
    return f"its forward reads unknown config fields {', '.join(unknown)}" if unknown else None


def knows_all(call: Mapping[str, Any], read: Collection[str]) -> bool:
    """Return whether all arguments of a call are known, or unknown but not set.

    Args:
        call: The call's arguments by name.
        read: Names of arguments that the fused forward reads, or that have no effect.
    """
    return all(name in read or (name in OPTIONAL and (value is None or value is False)) for name, value in call.items())


OPTIONAL = frozenset(
    {"cache", "past_key_values", "layer_past", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
    | {"encoder_hidden_states", "encoder_attention_mask", "key_value_states", "mask", "head_mask", "cache_position"}
)
"""Arguments without effect if None or False; all others have no effect only if omitted."""


def by_name(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Return the arguments after the first by their names in the module's own forward."""
    if not args:
        return {}
    names = list(inspect.signature(type(module).forward).parameters)[2:]  # without self and the hidden states
    return dict(zip(names, args, strict=False))


def is_supported(x: Tensor) -> bool:
    """Return whether fused forwards support a call with x (…, d): floating-point, at least one row, no tracing.

    Under autocast they compute in its dtype; float64, which autocast does not cast, is left alone here too.
    """
    if torch.compiler.is_compiling() or not x.is_floating_point() or not x.numel():
        return False
    return x.dtype != torch.float64 or not torch.is_autocast_enabled(x.device.type)
