"""What recipes ask of a model's modules: norms, activations and linear operands, told by structure.

An answer of None means "not what a recipe knows", never a guess.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from lorakit.core.clones import is_watched
from lorakit.ops.norm import Norm
from lorakit.speed.contract import names_read
from lorakit.speed.patching import plain_class

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
"""Class of an activation module -> its name in `lorakit.ops.activation`; a probe confirms each before it is used."""

RMS = ("RMSNorm", "T5LayerNorm")
"""How the names of norms without a mean end."""

EPSILONS = ("variance_epsilon", "eps")


def activation_of(function: Any) -> str | None:
    """The name of an activation, or None.

    Args:
        function: A module or a function of tensors (…).
    """
    if isinstance(function, nn.GELU):
        return "gelu_tanh" if function.approximate == "tanh" else "gelu"
    if isinstance(function, nn.Module):
        return None if is_watched(function) else ACTIVATIONS.get(type(function).__name__)
    return {functional.silu: "silu", functional.gelu: "gelu", functional.relu: "relu"}.get(function)


def norm_of(module: nn.Module | None) -> Norm | None:
    """The operands of a norm over the last axis, or None where a module is none that is known or is not frozen."""
    if module is None or is_watched(module):
        return None
    weight: Any = module._parameters.get("weight")
    bias: Any = module._parameters.get("bias")
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


def share_of(dropout: nn.Module | None) -> float | None:
    """The share of its input that a dropout drops now, 0 where there is none; None where it is no plain one."""
    if dropout is None or (isinstance(dropout, nn.Identity) and not is_watched(dropout)):
        return 0.0
    if not isinstance(dropout, nn.Dropout) or is_watched(dropout) or dropout.p >= 1:
        return None
    return dropout.p if dropout.training else 0.0


def asks_for_weights(attention: nn.Module, call: Mapping[str, Any]) -> bool:
    """Whether a call, or the model's config, asks an attention for its weights too.

    Args:
        attention: A module, with a transformers config where it has one.
        call: The call's arguments by name.
    """
    asked = call.get("output_attentions")
    return bool(getattr(getattr(attention, "config", None), "output_attentions", False) if asked is None else asked)


def unknown_words(module: nn.Module, words: Collection[str], children: Collection[str]) -> str | None:
    """What a module has besides what a recipe knows, as a phrase, or None: a setting may change what no probe shows.

    Args:
        module: The module.
        words: Attributes that are known.
        children: Children that are known.
    """
    own = {name for name in vars(module) if not name.startswith("_")} - {"training", *words, *children}
    inside = {name for name, child in module._modules.items() if child is not None} - set(children)
    held = {name for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}
    unknown = sorted(own | inside | held)
    return f"it has {', '.join(unknown)}, which the recipe does not know" if unknown else None


def unknown_fields(module: nn.Module, known: Collection[str]) -> str | None:
    """Return what a module's forward reads of its config besides what a recipe knows, as a phrase, or None.

    A field that is None or False is taken as switched off; a stand-in's contract has its value.

    Args:
        module: A module with a config.
        known: Fields that the recipe reads, too.
    """
    fields = vars(module.config)
    read = names_read(plain_class(module)) & fields.keys() - vars(module).keys() - set(known)
    unknown = sorted(name for name in read if fields[name] is not None and fields[name] is not False)
    return f"its forward reads {', '.join(unknown)} of its config, which the recipe does not know" if unknown else None


def says_nothing_else(call: Mapping[str, Any], read: Collection[str]) -> bool:
    """Return whether all arguments of a call are known to a recipe, or known and not given.

    Args:
        call: The call's arguments by name.
        read: Names of those that the recipe reads, or that change nothing.
    """
    return all(name in read or (name in OPTIONAL and (value is None or value is False)) for name, value in call.items())


OPTIONAL = frozenset(
    {"cache", "past_key_values", "layer_past", "use_cache", "output_attentions", "output_hidden_states", "return_dict"}
    | {"encoder_hidden_states", "encoder_attention_mask", "key_value_states", "mask", "head_mask", "cache_position"}
)
"""Arguments that change nothing where they are None or False; the others do so where they are left out."""


def by_name(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments behind the first by the names that the module's own forward gives them."""
    if not args:
        return {}
    names = list(inspect.signature(type(module).forward).parameters)[2:]  # without self and the hidden states
    return dict(zip(names, args, strict=False))


def is_usual(x: torch.Tensor) -> bool:
    """Whether a call with x (…, d) is one that fast forwards are for: floats, at least one row, no tracing.

    Under autocast they compute as it has it; double precision, which it leaves alone, is left alone here too.
    """
    if torch.compiler.is_compiling() or not x.is_floating_point() or not x.numel():
        return False
    return x.dtype != torch.float64 or not torch.is_autocast_enabled(x.device.type)
