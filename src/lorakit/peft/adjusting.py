"""Blocks that change how adapters act for a while, and the signatures that a wrapper shows."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from functools import update_wrapper
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from lorakit.config import PeftConfig
from lorakit.core.layering.layer import LoraLayer
from lorakit.errors import AdapterError, ConfigError, ConfigTypeError, LorakitError


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """A block in which every adapter acts so many times as strongly.

    Args:
        model: A model with adapters in it.
        multiplier: The factor on every scale.

    Yields:
        Nothing.

    Raises:
        ConfigTypeError: The multiplier is no number.
        AdapterError: The model has no adapters.
    """
    if not isinstance(multiplier, (float, int)):
        raise ConfigTypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    before = [(module, dict(module.scaling)) for module in model.modules() if isinstance(module, LoraLayer)]
    if not before:
        raise AdapterError("scaling is only supported for models with `LoraLayer`s")
    try:
        for layer, scales in before:
            layer.scaling = {name: scale * multiplier for name, scale in scales.items()}
        yield
    finally:
        for layer, scales in before:
            layer.scaling = scales


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """PEFT's block around layers whose inputs hooks cast; nothing has to be done here, where no input is cast.

    Args:
        model: Any model.
        active: Accepted.

    Yields:
        Nothing.
    """
    yield


class DoraCaching(contextlib.AbstractContextManager["DoraCaching"]):
    """PEFT's switch for keeping DoRA's norms between forwards; accepted, since there is no dense product to keep here.

    Attributes:
        enabled: What was asked.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __call__(self, enabled: bool = True) -> None:
        """Set it for good, as PEFT."""
        self.enabled = enabled

    def __exit__(self, *_: object) -> None:
        return None


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or hub id holds an adapter.

    Args:
        model_name_or_path: A folder, or a hub id.
    """
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (LorakitError, OSError):
        return False
    return True


def update_forward_signature(model: Any) -> None:
    """Let a wrapper's `forward` show the signature of the model inside, where its own says nothing.

    Args:
        model: A wrapper, changed in place.
    """
    _show(model, "forward", ({"args", "kwargs"},))


def update_generate_signature(model: Any) -> None:
    """Let a wrapper's `generate` show the signature of the model inside, where its own says nothing.

    Args:
        model: A wrapper, changed in place.
    """
    if hasattr(model, "generate"):
        _show(model, "generate", ({"args", "kwargs"}, {"kwargs"}))


def update_signature(model: Any, method: str = "all") -> None:
    """`update_forward_signature`, `update_generate_signature`, or both.

    Args:
        model: A wrapper, changed in place.
        method: "forward", "generate" or "all".

    Raises:
        ConfigError: It is another word.
    """
    if method not in ("forward", "generate", "all"):
        raise ConfigError(f"method {method} is not supported please choose one of ['forward', 'generate', 'all']")
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _show(model: Any, method: str, silent: tuple[set[str], ...]) -> None:
    own = {name for name in inspect.signature(getattr(model, method)).parameters if name != "adapter_names"}
    inner = getattr(type(model.get_base_model()), method, None)
    if own not in silent or inner is None:
        return
    plain = getattr(type(model), method)
    twin = FunctionType(plain.__code__, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__)
    twin.__kwdefaults__ = plain.__kwdefaults__
    update_wrapper(twin, inner, assigned=("__doc__", "__name__", "__annotations__"))
    setattr(model, method, MethodType(twin, model))
