"""PEFT's factory functions for LoRA+, LoRA-FA and preconditioned optimizers, based on `lorakit.core`."""

from __future__ import annotations

import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lorakit.core.model.index import layers, walk
from lorakit.core.optimizers import LoraFA, Pair, freeze_factors, roles
from lorakit.core.riemannian import DAMPING, Factors, precondition, preconditioned, trained_factors
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.peft.model import PeftModel

_EIGHT_BIT = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """Create an optimizer with a larger learning rate for B than for A (Hayou et al. 2024, arXiv:2402.12354).

    The parameter groups are, in this order: A and fully trained matrices; both factors of embeddings; B and vectors;
    and, without weight decay, biases and LayerNorm parameters. Empty groups are kept, so that the order is fixed.
    `kwargs` are `loraplus_weight_decay` (default 0.0), `loraplus_lr_embedding` (default 1e-6), and optimizer options.
    """
    decay = kwargs.pop("loraplus_weight_decay", 0.0)
    of_embedding = kwargs.pop("loraplus_lr_embedding", 1e-6)
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": decay, "lr": lr},
        {"params": [], "weight_decay": decay, "lr": of_embedding},
        {"params": [], "weight_decay": decay, "lr": lr * loraplus_lr_ratio},
        {"params": [], "weight_decay": 0.0, "lr": lr * loraplus_lr_ratio},
    ]
    known = roles(model)
    normed = {id(p) for _, module in walk(model) if isinstance(module, nn.LayerNorm) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        role = known.get(id(parameter), ("whole", ""))[0]
        if role == "embedding":
            group = 1
        elif role == "B" or parameter.ndim == 1:
            group = 3 if id(parameter) in normed or "bias" in name else 2
        else:
            group = 0
        groups[group]["params"].append(parameter)
    optimizer: Optimizer = optimizer_cls(groups, **{"lr": lr, **kwargs})
    if optimizer_cls.__name__ in _EIGHT_BIT:
        _keep_embeddings_wide(model, optimizer_cls)
    return optimizer


class LoraFAOptimizer(LoraFA):
    """AdamW with a corrected gradient for B; accepts PEFT's parameter groups (`params`, `names`, `scaling_factors`).

    Unlike PEFT's, it pairs A and B by adapter and site, so that several adapters, magnitudes and biases are updated
    correctly. Updates are computed in fp32. The state is keyed by tensor, so it can be saved and loaded.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        pairs: Sequence[Pair] | None = None,
    ) -> None:
        """Set up the optimizer for `pairs` of a factor and its frozen counterpart; None pairs them by name."""
        groups = [dict(group) if isinstance(group, dict) else group for group in params]
        for group in groups:
            if isinstance(group, dict):
                group.setdefault("correct_bias", correct_bias)
        named = [pair for group in groups if isinstance(group, dict) for pair in _pairs_by_name(group)]
        super().__init__(
            groups, named if pairs is None else pairs, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay
        )
        self.state = _StateByName(self.param_groups)
        self._warned = False

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform one optimization step."""
        if not self._warned and any("scaling_factors" not in g and "scaling_factor" in g for g in self.param_groups):
            self._warned = True
            text = "`scaling_factor` is deprecated; pass `scaling_factors` with one value per tensor in the group."
            warnings.warn(text, FutureWarning, stacklevel=2)
        return super().step(closure)


def create_lorafa_optimizer(
    model: PeftModel, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> LoraFAOptimizer:
    """Create an optimizer that freezes A and corrects the gradient of B (Zhang et al. 2023, arXiv:2308.03303).

    The factor that is not initialized to zero is frozen: A or, for an embedding, B. Each site's scale is used; `r`
    and `lora_alpha` are accepted for compatibility with code written for PEFT.

    Args:
        model: A model with adapters.
        r: Rank, used only for the deprecated `scaling_factor` entry of the parameter group.
        lora_alpha: Alpha, likewise used only for `scaling_factor`.
        lr: Learning rate.
        weight_decay: See `torch.optim.AdamW`.
        use_rslora: Deprecated; must be None or equal the value in the active adapters' configs.

    Raises:
        ConfigError: `use_rslora` differs from an active adapter's config.
    """
    configs = {name: model.peft_config[name] for name in model.active_adapters if name in model.peft_config}
    rank_stabilized = bool(configs) and all(config.use_rslora for config in configs.values())
    if use_rslora is not None:
        _check_rslora(use_rslora, {name: bool(config.use_rslora) for name, config in configs.items()})
        rank_stabilized = use_rslora
    scales = _scales(model)
    pairs = freeze_factors(model)
    named = list(model.named_parameters())
    group = {
        "params": [parameter for _, parameter in named],
        "lr": lr,
        "names": [name for name, _ in named],
        "scaling_factors": [scales.get(id(parameter)) for _, parameter in named],
        "scaling_factor": lora_alpha / (math.sqrt(r) if rank_stabilized else r),
        "betas": (0.9, 0.999),
        "weight_decay": weight_decay,
    }
    return LoraFAOptimizer([group], pairs=pairs)


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = DAMPING, **kwargs: Any
) -> Optimizer:
    """Create an optimizer that preconditions the gradients of A and B (Zhang and Pilanci 2024, arXiv:2402.02347).

    Args:
        model: A model with adapters, whose trainable parameters are optimized.
        optimizer_cls: Optimizer class, such as `torch.optim.AdamW`.
        lr: Learning rate.
        reg: Damping, which is added to the diagonals of Bᵀ·B and A·Aᵀ before they are inverted.
        kwargs: Further arguments of the optimizer class.

    Raises:
        ConfigTypeError: `optimizer_cls` is not an optimizer class.
        ConfigError: No A and B are trained, `reg` is not a number >= 0, or the optimizer needs a closure.
    """
    return preconditioned(optimizer_cls, model, lr=lr, damping=reg, **kwargs)


def lora_pairs(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return the pairs of A (r, in) and B (out, r) that `create_riemannian_optimizer` preconditions, in model order."""
    return [(pair.A, pair.B) for pair in trained_factors(model)]


class RiemannianPreconditioner:
    """The preconditioning of `create_riemannian_optimizer` without an optimizer.

    Attributes:
        lora_pairs: Pairs of A (r, in) and B (out, r).
        reg: Damping.
    """

    def __init__(self, lora_pairs: Sequence[tuple[nn.Parameter, nn.Parameter]], reg: float) -> None:
        self.lora_pairs = list(lora_pairs)
        self.reg = reg

    def step(self) -> None:
        """Precondition the gradients of all pairs in place; gradients that are None are left alone."""
        for A, B in self.lora_pairs:
            precondition(Factors(A, B), self.reg)


class _StateByName(defaultdict[Any, Any]):
    """Optimizer state keyed by tensor; PEFT's "<site>.lora" key also works and returns B's moments."""

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        super().__init__(dict)
        names = [item for group in groups for item in zip(group.get("names", ()), group["params"], strict=False)]
        self._by_name = {name[: name.find("lora")] + "lora": p for name, p in named_b(names)}

    def __missing__(self, key: Tensor | str) -> dict[str, Tensor]:
        if isinstance(key, str) and key in self._by_name:
            state = self[self._by_name[key]]
            return {"step": state["step"], "exp_avg_B": state["exp_avg"], "exp_avg_sq_B": state["exp_avg_sq"]}
        return super().__missing__(key)


def named_b(named: Iterable[tuple[str, nn.Parameter]]) -> list[tuple[str, nn.Parameter]]:
    """Return the pairs whose parameter is a B factor."""
    return [(name, p) for name, p in named if ".lora_B." in name and p.ndim > 1]


def _pairs_by_name(group: dict[str, Any]) -> list[Pair]:
    tensors = dict(zip(group.get("names", ()), group["params"], strict=False))
    scales = group.get("scaling_factors", [group.get("scaling_factor")] * len(tensors))
    by_name = dict(zip(tensors, scales, strict=False))
    return [
        Pair(B, tensors[name.replace(".lora_B.", ".lora_A.")], by_name[name])
        for name, B in named_b(tensors.items())
        if name.replace(".lora_B.", ".lora_A.") in tensors
    ]


def _scales(model: nn.Module) -> dict[int, float]:
    factors = [layer.factor(name) for _, layer in layers(model) for name in layer.r]
    return {id(tensor): one.scale for one in factors for tensor in (one.A, one.B, *one.own.values())}


def _check_rslora(given: bool, configured: dict[str, bool]) -> None:
    other = [name for name, value in configured.items() if value != given]
    if other:
        text = f"`use_rslora={given}` was passed to create_lorafa_optimizer, but it is {not given} in the config of"
        raise ConfigError(f"{text} {', '.join(map(repr, other))}. Omit the argument.", what=given, field="use_rslora")
    text = "`use_rslora` of create_lorafa_optimizer is deprecated; omit it. The value in the adapter's config is used."
    warnings.warn(text, FutureWarning, stacklevel=3)


def _keep_embeddings_wide(model: nn.Module, optimizer_cls: type[Optimizer]) -> None:
    """Configure bitsandbytes, which provides `optimizer_cls`, to keep optimizer moments for embeddings in fp32."""
    package = sys.modules[optimizer_cls.__module__.partition(".")[0]]
    known = package.optim.GlobalOptimManager.get_instance()
    for _, module in walk(model):
        if isinstance(module, nn.Embedding):
            known.register_module_override(module, "weight", {"optim_bits": 32})
