"""Blocks that change how adapters act for a while, and the signatures that a wrapper shows.

Condition numbers of a base's weights: how far apart the largest and the smallest singular value lie.

Targets by condition number: the modules whose weights are best conditioned, as PEFT's helper picks them.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import update_wrapper
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import PeftConfig
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.quantization import base_of
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


EXPERT_WEIGHTS = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")
"""How the names of fused experts' weights end."""

SMALLEST = 1e-8
"""Added to the smallest singular value, so that a singular weight has a number."""


def of_linear_weights(model: nn.Module, largest: int) -> dict[str, float]:
    """Path -> condition number of every dense layer.

    Args:
        model: The model, only read.
        largest: Leave out weights with a larger side.
    """
    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and max(module.out_features, module.in_features) <= largest:
            base = base_of(module)
            found[path] = condition_number(base.read(module, base.stored(module, "weight")))
    return found


def of_expert_weights(model: nn.Module, endings: Sequence[str], largest: int) -> dict[str, float]:
    """Name -> mean condition number over the experts of every fused weight.

    Args:
        model: The model, only read.
        endings: How the names of fused weights end.
        largest: Leave out weights with a larger side.
    """
    return {
        name: sum(condition_number(expert) for expert in parameter) / len(parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and name.endswith(tuple(endings)) and max(parameter.shape[1:]) <= largest
    }


def condition_number(weight: Tensor) -> float:
    """Largest over smallest singular value of a weight, (out, in)."""
    values = torch.linalg.svdvals(weight.detach().float())
    return float(values[0] / (values[-1] + SMALLEST))


class KappaTuneSelector:
    """Condition numbers of a model's weights, worked out once, and the targets with the lowest.

    Attributes:
        model: The model, only read.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: Sequence[str] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self._largest = max_dim_size_to_analyze
        self._suffixes = tuple(moe_param_suffixes or EXPERT_WEIGHTS)
        self._modules: Mapping[str, float] | None = None
        self._parameters: Mapping[str, float] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Dense modules, the best conditioned first.

        Args:
            top_p: The share of them to take, at least one.
            num_modules: How many to take; before the share.
            threshold: Take all up to this condition number.
        """
        self._modules = of_linear_weights(self.model, self._largest) if self._modules is None else self._modules
        return _lowest(self._modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Fused weights of experts, the best conditioned first.

        Args:
            top_p: The share of them to take, at least one.
            num_modules: How many to take; before the share.
            threshold: Take all up to this condition number.
        """
        if self._parameters is None:
            self._parameters = of_expert_weights(self.model, self._suffixes, self._largest)
        return _lowest(self._parameters, top_p, num_modules, threshold)


def _lowest(numbers: Mapping[str, float], top_p: float | None, count: int | None, threshold: float | None) -> list[str]:
    ordered = sorted(numbers, key=lambda name: numbers[name])
    if count is not None:
        return ordered[:count]
    if top_p is not None:
        return ordered[: max(1, int(len(ordered) * top_p))]
    return [name for name in ordered if threshold is None or numbers[name] <= threshold]


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: Sequence[str] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """The best conditioned modules and fused parameters of a model, as the two fields of a config.

    Args:
        model: The model, only read.
        top_p: The share of each to take.
        max_dim_size_to_analyze: Leave out weights with a larger side.
        moe_param_suffixes: How the names of fused weights end.
        show_progress: Accepted; nothing is drawn.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p),
        "target_parameters": selector.get_best_target_parameters(top_p) or None,
    }
