"""PEFT's helpers for rescaling adapters, updating a wrapper's signatures, and selecting targets by condition number."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, update_wrapper
from types import FunctionType, MethodType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lorakit.config import PeftConfig
from lorakit.core.model.index import layers, walk
from lorakit.core.quantization import weight_format_of
from lorakit.errors import AdapterError, ConfigError, ConfigTypeError, LorakitError

if TYPE_CHECKING:
    from lorakit.peft.model import PeftModel


@contextlib.contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Multiply all adapters' scales within a context, and restore them.

    Raises:
        ConfigTypeError: `multiplier` is not a number.
        AdapterError: The model has no adapters.
    """
    if not isinstance(multiplier, (float, int)):
        raise ConfigTypeError(f"Argument multiplier should be of type float, got {type(multiplier)}", what=multiplier)
    before = [(layer, dict(layer.scaling)) for _, layer in layers(model)]
    if not before:
        raise AdapterError("scaling is only supported for models with `LoraLayer`s", field="model")
    try:
        for layer, scales in before:
            layer.scaling = {name: scale * multiplier for name, scale in scales.items()}
        yield
    finally:
        for layer, scales in before:
            layer.scaling = scales


@contextlib.contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Do not cast inputs to the dtype of A within a context, where a hook has `lora_A` called as a module."""
    before = [(layer, layer.cast_input_dtype_enabled) for _, layer in layers(model)] if active else []
    try:
        for layer, _ in before:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.cast_input_dtype_enabled = enabled


class DoraCaching(contextlib.AbstractContextManager["DoraCaching"]):
    """PEFT's switch for caching DoRA norms; it has no effect, since lorakit computes norms without forming B·A."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled

    def __call__(self, enabled: bool = True) -> None:
        """Set `enabled` permanently, as in PEFT."""
        self.enabled = enabled

    def __exit__(self, *_: object) -> None:
        return None


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Return whether a directory or a repository on the Hub contains an adapter."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except (LorakitError, OSError):
        return False
    return True


def update_forward_signature(model: PeftModel) -> None:
    """Give a wrapper's `forward` the inner model's signature if the wrapper's own signature is generic."""
    _show(model, "forward", ({"args", "kwargs"},))


def update_generate_signature(model: PeftModel) -> None:
    """Give a wrapper's `generate` the inner model's signature if the wrapper's own signature is generic."""
    if hasattr(model, "generate"):
        _show(model, "generate", ({"args", "kwargs"}, {"kwargs"}))


def update_signature(model: PeftModel, method: str = "all") -> None:
    """Call `update_forward_signature`, `update_generate_signature`, or both.

    Raises:
        ConfigError: `method` is not one of the allowed values.
    """
    if method not in ("forward", "generate", "all"):
        text = f"method {method} is not supported please choose one of ['forward', 'generate', 'all']"
        raise ConfigError(text, what=method, field="method", allowed=("forward", "generate", "all"))
    if method != "generate":
        update_forward_signature(model)
    if method != "forward":
        update_generate_signature(model)


def _show(model: PeftModel, method: str, silent: tuple[set[str], ...]) -> None:
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
"""Name suffixes of fused expert weights."""

SMALLEST = 1e-8
"""Value added to the smallest singular value, so that a singular weight has a finite condition number."""


def condition_number(weight: Tensor) -> float:
    """Return the ratio of the largest to the smallest singular value of a weight, (out, in)."""
    values = torch.linalg.svdvals(weight.detach().float())
    return float(values[0] / (values[-1] + SMALLEST))


class KappaTuneSelector:
    """Selector for the targets with the lowest condition numbers (largest to smallest singular value), computed once.
    The number of targets overrides their fraction, which overrides the largest condition number.
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

    @cached_property
    def _of_modules(self) -> dict[str, float]:
        """Condition number of each dense layer, keyed by path."""
        found = {}
        for path, module in walk(self.model):
            if isinstance(module, nn.Linear) and max(module.out_features, module.in_features) <= self._largest:
                base = weight_format_of(module)
                found[path] = condition_number(base.read(module, base.stored(module, "weight")))
        return found

    @cached_property
    def _of_parameters(self) -> dict[str, float]:
        """Mean condition number of each fused weight's experts, keyed by weight name."""
        return {
            name: sum(condition_number(expert) for expert in parameter) / len(parameter)
            for name, parameter in self.model.named_parameters()
            if parameter.ndim == 3 and name.endswith(self._suffixes) and max(parameter.shape[1:]) <= self._largest
        }

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return the paths of dense modules in ascending order of condition number."""
        return _lowest(self._of_modules, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Return the names of fused expert weights in ascending order of mean condition number."""
        return _lowest(self._of_parameters, top_p, num_modules, threshold)


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
    """Return the modules and parameters with the lowest condition numbers, by config field; no progress is shown."""
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p),
        "target_parameters": selector.get_best_target_parameters(top_p) or None,
    }
