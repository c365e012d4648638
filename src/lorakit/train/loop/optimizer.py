"""The optimizers of `lorakit train`: a registry, parameter groups, clipping, saved state, and the scale of the loss.

The smallest number of fp16 above zero is 6e-8, and its largest is 65,504. Gradients pass through fp16 activations on
every device, so small ones would be rounded to zero. The loss of a base in fp16 is therefore multiplied by a scale
before the backward pass, and the gradients of the factors, which are fp32, are divided by it. A step whose gradients
overflow is skipped, and the scale is halved; after 2,000 steps without overflow, it is doubled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lorakit import core
from lorakit.core.optimizers import LoraFA, Rates, freeze_factors, rates_by_name, trained_parts
from lorakit.errors import ConfigError, NonFiniteError, RunError
from lorakit.plan.optimizer_state import BLOCK_8BIT
from lorakit.train.loop.flat_adamw import FlatAdamW, is_packable
from lorakit.train.loop.optional_optimizers import Muon, adamw8bit, check_adamw8bit, check_muon
from lorakit.train.settings.settings import TrainSettings

Named = Sequence[tuple[str, nn.Parameter]]
"""Trainable tensors, each with its name in the model."""

HALF = "float16"
"""The dtype of a base whose loss is scaled."""

ADVICE = (
    " float16 has no numbers above 65,504, so activations or weights of this model may have overflowed. Use --dtype "
    "bfloat16 or --dtype float32, or try a lower --learning-rate."
)
"""Advice for a loss or an output that is not finite on an fp16 base."""

LEAST_SCALE = 1.0
"""The smallest loss scale at which a gradient may overflow; a smaller one would make gradients smaller."""

_FUSED_DEVICES = ("cpu", "cuda", "mps")
_EPSILON = 1e-6  # the value that torch's `clip_grads_with_norm_` uses


@dataclass(frozen=True)
class OptimizerKind:
    """One choice of `--optimizer`.

    Attributes:
        build: Function of the model, the adapter and the settings that returns the trainable tensors and the optimizer.
        check: Function that raises a `LorakitError` if the optimizer is not available on a device, or None.
    """

    build: Callable[[nn.Module, str, TrainSettings], tuple[Named, torch.optim.Optimizer]]
    check: Callable[[torch.device], None] | None = None


def check_optimizer(name: str, device: torch.device) -> None:
    """Check that an optimizer (a key of `OPTIMIZERS`) is available on a device; no model is needed.

    Raises:
        MissingExtra: The optimizer needs a package that is not installed.
        UsageError: The optimizer is not available on the device, or with the installed torch.
    """
    check = OPTIMIZERS[name].check
    if check is not None:
        check(device)


def build_optimizer(model: nn.Module, adapter: str, settings: TrainSettings) -> tuple[Named, torch.optim.Optimizer]:
    """Build the optimizer for a run; for LoRA-FA, first freeze the factors that are not initialized to zero.

    Returns:
        (name, tensor) pairs for the trainable tensors (any shape), and the optimizer for these tensors.

    Raises:
        RunError: The model has no trainable tensors.
        ConfigError: LoRA-FA would freeze the only trainable factor of an adapted module, or Muon would train no matrix.
    """
    return OPTIMIZERS[settings.optimizer].build(model, adapter, settings)


def _rates(model: nn.Module, adapter: str, settings: TrainSettings) -> dict[str, float]:
    """Return the peak learning rate of each trainable tensor, keyed by name."""
    ratio = settings.loraplus_lr_ratio or 1.0
    peaks = Rates(settings.learning_rate, ratio, settings.loraplus_lr_embedding, settings.learning_rate_pattern)
    return rates_by_name(trained_parts(model, adapter), peaks)


def _groups(named: Named, settings: TrainSettings, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    return parameter_groups(named, settings.learning_rate, settings.weight_decay, rates)


def _build_adamw(model: nn.Module, adapter: str, settings: TrainSettings) -> tuple[Named, torch.optim.Optimizer]:
    named, rates = core.trainable_parameters(model, adapter), _rates(model, adapter, settings)
    return named, build_adamw(named, settings.learning_rate, settings.weight_decay, rates)


def _build_adamw8bit(model: nn.Module, adapter: str, settings: TrainSettings) -> tuple[Named, torch.optim.Optimizer]:
    named, rates = core.trainable_parameters(model, adapter), _rates(model, adapter, settings)
    return named, adamw8bit(_groups(named, settings, rates), settings.learning_rate)


def _build_lorafa(model: nn.Module, adapter: str, settings: TrainSettings) -> tuple[Named, torch.optim.Optimizer]:
    pairs = freeze_factors(model, adapter)
    named, rates = core.trainable_parameters(model, adapter), _rates(model, adapter, settings)
    return named, LoraFA(_groups(named, settings, rates), pairs, lr=settings.learning_rate)


def _build_muon(model: nn.Module, adapter: str, settings: TrainSettings) -> tuple[Named, torch.optim.Optimizer]:
    named, rates = core.trainable_parameters(model, adapter), _rates(model, adapter, settings)
    chosen = {part.name for part in trained_parts(model, adapter) if part.is_matrix}
    matrices, others = [p for p in named if p[0] in chosen], [p for p in named if p[0] not in chosen]
    if not matrices:
        raise ConfigError(
            "optimizer muon needs an A or B that is a single matrix, but this adapter has none; use --optimizer adamw.",
            what="muon",
            field="optimizer",
            allowed=OPTIMIZERS,
        )
    rate, decay = settings.learning_rate, settings.weight_decay
    rest = build_adamw(others, rate, decay, rates) if others else None
    return named, Muon(_groups(matrices, settings, rates), rest, lr=rate)


OPTIMIZERS: dict[str, OptimizerKind] = {
    "adamw": OptimizerKind(_build_adamw),
    "adamw8bit": OptimizerKind(_build_adamw8bit, check_adamw8bit),
    "lorafa": OptimizerKind(_build_lorafa),
    "muon": OptimizerKind(_build_muon, check_muon),
}
"""Value of the setting `optimizer` -> how it is built."""


def build_adamw(
    named: Named, learning_rate: float, weight_decay: float, rates: Mapping[str, float] | None = None
) -> torch.optim.Optimizer:
    """Build AdamW, fused if the device supports it; weight decay applies only to matrices.   [docs/math.md (16)]

    Tensors that can share a buffer are packed (see `FlatAdamW`); their values do not change. Build the optimizer
    only after the model has been moved, cast and loaded.

    Args:
        named: (name, tensor) pairs for the trainable tensors (any shape).
        learning_rate: The initial learning rate; the loop sets the rate before each step.
        weight_decay: Decay coefficient; each step multiplies every matrix by `1 - learning_rate * weight_decay`.
        rates: Peak learning rates by name, for tensors whose peak rate differs from `learning_rate`.

    Raises:
        RunError: The model has no trainable tensors.

    Source:
        Loshchilov and Hutter 2019, arXiv:1711.05101; betas 0.9 and 0.999, eps 1e-8.
    """
    groups = parameter_groups(named, learning_rate, weight_decay, rates or {})
    if is_packable([parameter for _, parameter in named]):
        return FlatAdamW(groups, lr=learning_rate)
    fused = all(p.device.type in _FUSED_DEVICES and p.is_floating_point() for _, p in named)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def parameter_groups(
    named: Named, learning_rate: float, weight_decay: float, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Group tensors by learning rate and weight decay; a group's `share` is its peak rate divided by the run's.

    For the arguments, see `build_adamw`.

    Raises:
        RunError: The model has no trainable tensors.
    """
    if not named:
        raise RunError("The model has no trainable tensors.", field="target_modules")
    gathered: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named:
        key = (rates.get(name, learning_rate) / learning_rate, weight_decay if parameter.ndim > 1 else 0.0)
        gathered.setdefault(key, []).append(parameter)
    return [
        {"params": members, "lr": share * learning_rate, "share": share, "weight_decay": decay}
        for (share, decay), members in gathered.items()
    ]


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of each group to the run's current rate times the group's `share`."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["share"]


def gradient_norm(parameters: Sequence[nn.Parameter]) -> torch.Tensor:
    """Return the global 2-norm of the gradients of tensors (any shape) as a scalar tensor; 0 without gradients."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())


def clipped_step(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], norm: torch.Tensor, max_norm: float
) -> None:
    """Clip the gradients to a maximum global 2-norm, 0 for none, and take an optimizer step.

    `.grad` of the parameters (any shape) may be scaled in place; `norm` is the scalar of `gradient_norm`. `FlatAdamW`
    scales within its step.

    Raises:
        RunError: The dtype, device or shape of a tensor changed after the optimizer was built; nothing was updated.
    """
    if isinstance(optimizer, FlatAdamW):
        factor = torch.clamp(max_norm / (norm + _EPSILON), max=1.0).item() if max_norm > 0 else 1.0
        optimizer.step(factor=factor)
        return
    if max_norm > 0:
        torch.nn.utils.clip_grads_with_norm_(list(parameters), max_norm, norm)
    optimizer.step()


LIKE_TENSOR = ("exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2")
"""State entries with the shape of the trainable tensor: AdamW's moments (also 8-bit), and Muon's momentum."""

OTHER_STATE = ("step", "absmax1", "absmax2", "qmap1", "qmap2")
"""Other state entries: the number of updates, and the scales and tables of values of 8-bit moments."""


def state_tensors(optimizer: torch.optim.Optimizer, named: Named) -> dict[str, torch.Tensor]:
    """Return the optimizer's state as named CPU tensors that can be saved to a file, in the dtypes of the optimizer.

    Keys are such as "exp_avg/<name>", whose first parts are in `LIKE_TENSOR` or `OTHER_STATE`. Trainable tensors that
    never received a gradient have no entries.
    """
    tensors = {}
    for name, parameter in named:
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, int):  # bitsandbytes counts steps with an int
                tensors[f"{key}/{name}"] = torch.tensor(value)
            else:  # a file cannot contain one tensor twice, as all tensors of bitsandbytes share the tables of values
                tensors[f"{key}/{name}"] = value.detach().to("cpu", copy=key.startswith("qmap")).contiguous()
    return tensors


def received_gradients(model: nn.Module, adapter: str, optimizer: torch.optim.Optimizer) -> dict[tuple[str, int], bool]:
    """Return whether each expert of each site received a gradient other than zero in any step, from the moments.

    The keys are the site and the number of the expert, which is 0 at sites without experts.
    """
    received: dict[tuple[str, int], bool] = {}
    for part in trained_parts(model, adapter):
        moments = _moments(optimizer.state.get(part.parameter, {})) or [torch.zeros(part.experts)]
        moved = torch.stack([part.by_expert(moment != 0).any(1) for moment in moments]).any(0)
        for expert, one in enumerate(moved.tolist()):
            received[part.site, expert] = received.get((part.site, expert), False) or one
    return received


def _moments(state: Mapping[str, Any]) -> list[torch.Tensor]:
    """Return the moments of a tensor, of its shape; of 8-bit moments the scales, because they store zeros inexactly."""
    if "absmax1" not in state:
        return [state[name] for name in LIKE_TENSOR if name in state]
    codes, scales = state["state1"], state["absmax1"].repeat_interleave(BLOCK_8BIT)
    return [scales[: codes.numel()].view_as(codes)]


def load_state_tensors(optimizer: torch.optim.Optimizer, named: Named, tensors: Mapping[str, torch.Tensor]) -> None:
    """Restore the state of a newly built optimizer for the same tensors from the result of `state_tensors`.

    Raises:
        RunError: A name or shape in `tensors` does not match `named`; nothing was restored.
    """
    shapes = {name: parameter.shape for name, parameter in named}
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        wanted = shapes.get(name)
        is_known = kind in OTHER_STATE or (kind in LIKE_TENSOR and value.shape == wanted)
        if wanted is None or not is_known:
            text = f"The optimizer state {key} of shape {tuple(value.shape)} does not match this model's adapter."
            raise RunError(text, what=key)
    for name, parameter in named:
        kinds = [kind for kind in (*OTHER_STATE, *LIKE_TENSOR) if f"{kind}/{name}" in tensors]
        if kinds:
            device = parameter.device
            optimizer.state[parameter] = {kind: _restored(tensors[f"{kind}/{name}"], device) for kind in kinds}


def _restored(value: torch.Tensor, device: torch.device) -> torch.Tensor | int:
    """Return a saved value as the optimizer held it: an int if it is an integer count, else a copy on the device."""
    return int(value) if value.dtype == torch.int64 else value.to(device).clone()


def loss_scaler(
    device: torch.device, dtype: str, state: Mapping[str, float] | None = None
) -> torch.amp.GradScaler | None:
    """Return the scaler of a run's loss, with its state in a checkpoint, or None if the base is not in fp16."""
    if dtype != HALF:
        return None
    scaler = torch.amp.GradScaler(device.type)
    if state:
        scaler.load_state_dict(dict(state))
    return scaler


def scaler_state(scaler: torch.amp.GradScaler | None) -> dict[str, float]:
    """Return the state of a scaler from `loss_scaler` as plain JSON values; empty without one."""
    return {} if scaler is None else scaler.state_dict()


def check_trained_in_fp32(dtype: str, count: int, field: str = "dtype") -> None:
    """Check that no parameter of a run is trained in fp16, in which the moments of AdamW would be rounded to zero.

    `count` is the number of parameters that are trained in the dtype of the base: saved modules and biases.

    Raises:
        ConfigError: The dtype is float16 and `count` is above 0; `field` is the setting to report.
    """
    if dtype == HALF and count:
        raise ConfigError(
            f"dtype is 'float16', but {count:,} parameters of saved modules, heads or biases would be trained in it, "
            "and their updates would be rounded to zero. Use --dtype bfloat16 or --dtype float32, or train only A and "
            "B (without modules_to_save and bias).",
            what=HALF,
            field=field,
            allowed=("auto", "bfloat16", "float32"),
        )


def check_named_in_fp32(named: Named, dtype: str) -> None:
    """Check that no trainable tensor (any shape) is in fp16.

    Raises:
        ConfigError: The dtype is float16, and a tensor has this dtype.
    """
    check_trained_in_fp32(dtype, sum(p.numel() for _, p in named if p.dtype == torch.float16))


def check_scale(scaler: torch.amp.GradScaler, value: float) -> None:
    """Check that a lower loss scale can prevent the overflow of a gradient, whose norm `value` is not finite.

    Raises:
        NonFiniteError: The scale, before its update, is already `LEAST_SCALE` or less.
    """
    if scaler.get_scale() <= LEAST_SCALE:
        raise NonFiniteError(
            f"the gradient norm became {value} with the loss scale {scaler.get_scale():g}; the step was not taken.",
            what="gradient norm",
        )
