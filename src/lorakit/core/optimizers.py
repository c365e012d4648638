"""Learning rates for an adapter's tensors (LoRA+ and per-pattern rates), and the LoRA-FA optimizer.

At each site, LoRA-FA freezes the factor that is not initialized to zero (usually A, but B for embeddings and MiCA) and
corrects the gradient of the other factor. `freeze_factors` freezes one factor of each pair and returns the pairs;
`LoraFA` is the optimizer.

A tensor's role (`Role`) is determined by the layer that holds the tensor, not by the tensor's name. This module does
not depend on schedules or files.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from lorakit.core.kinds.parameter import joined_B, split_B
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.linalg import damped_inverse
from lorakit.core.model.activation import trainable_parameters
from lorakit.core.model.index import layers
from lorakit.core.quantization import at_least_fp32
from lorakit.core.variants import Role, variant_named
from lorakit.errors import ConfigError
from lorakit.targets.patterns import first_match
from lorakit.targets.resolving import unfitting_keys

RIDGE = 1e-8
"""Added to the diagonal of A·Aᵀ before inversion, as in PEFT, so that a singular matrix becomes invertible."""


@dataclass(frozen=True)
class Pair:
    """The trained factor and the frozen factor of one site.

    Attributes:
        trained: B (out, r), or A (r, in) if B is frozen; a convolution's factor also has kernel axes.
        scale: The scale of B·A.
        experts: Number of experts in B (out, r·experts), with the expert index varying fastest; 0 for a single matrix.
    """

    trained: nn.Parameter
    frozen: Tensor
    scale: float
    trained_is_A: bool = False
    experts: int = 0

    @property
    def blocks(self) -> int:
        """The number of A·Aᵀ matrices: one per expert, or one per group of a convolution."""
        if self.trained_is_A:
            return 1
        return self.experts or len(self.frozen) // self.trained.shape[1]


def freeze_factors(model: nn.Module, name: str | None = None) -> list[Pair]:
    """Freeze the factor of each site that is not initialized to zero, for one adapter or all.

    Return one pair for each site whose other factor is trained, in model order.

    Raises:
        AdapterError: The model does not have the adapter.
        ConfigError: A site trains only the factor that would be frozen, so nothing would be trained there.
    """
    trained = {id(parameter) for _, parameter in trainable_parameters(model, name)}
    pairs: list[Pair] = []
    for path, layer, adapter, A, B in own_factors(model, name):
        trains_a = layer.kind.zero_side == "A" or layer.trains[adapter] == {"A"}
        learns, stays = (A, B) if trains_a else (B, A)
        if id(learns) in trained:
            pairs.append(Pair(learns, stays, layer.scaling[adapter], trains_a, layer.spec.experts))
        elif id(stays) in trained:
            text = f"{path}: LoRA-FA freezes the only factor that this adapter trains; use AdamW instead."
            raise ConfigError(text, what=adapter, where=path)
        stays.requires_grad_(False)
    return pairs


def own_factors(
    model: nn.Module, name: str | None = None
) -> Iterator[tuple[str, LoraLayer, str, nn.Parameter, nn.Parameter]]:
    """Yield the path and layer of each site with one of its adapters, or only the named one, and its A and B.

    A layer that uses the factors of the layer that it is tied to is left out.
    """
    seen: set[int] = set()
    for path, layer in layers(model):
        for adapter in layer.r if name is None else layer.r.keys() & {name}:
            own = layer.parameters_of(adapter)[:2]
            if own and id(own[0]) not in seen:
                seen.add(id(own[0]))
                A, B = own
                yield path, layer, adapter, A, B


def corrected_gradient(gradient: Tensor, pair: Pair, inverse: Tensor) -> Tensor:
    """Return the gradient of a trained factor, corrected to approximate full fine-tuning.   [docs/math.md (18)]

    The corrected gradient of B is g_B·(A·Aᵀ)⁻¹/s²; that of A is (Bᵀ·B)⁻¹·g_A/s². The gradient is (out, r) or (r, in),
    possibly with kernel axes. `inverse` (blocks, r / blocks, r / blocks), from `inverse_gram`, multiplies B's gradient
    on the right, or A's gradient on the left.

    Source:
        Zhang et al. 2023, arXiv:2308.03303. The corrected gradient is the X that minimizes ‖s·X·A − G‖; Wang et al.
        2024, arXiv:2407.18242, section 3, derive the solution for both factors.
    """
    g = gradient.to(inverse.dtype)
    if pair.trained_is_A:
        corrected = inverse[0] @ g.reshape(len(inverse[0]), -1)
    elif pair.experts:
        corrected = joined_B(split_B(g, pair.experts) @ inverse)
    else:
        corrected = g.reshape(len(inverse), -1, inverse.shape[-1]) @ inverse
    return (corrected / pair.scale**2).reshape(gradient.shape).to(gradient.dtype)


def inverse_gram(pair: Pair) -> Tensor:
    """Return (A·Aᵀ + δ·I)⁻¹ for a pair with a frozen A, or (Bᵀ·B + δ·I)⁻¹ for a pair with a frozen B.

    The shape is (blocks, r / blocks, r / blocks), in fp32 or wider.
    """
    rows = at_least_fp32(pair.frozen.detach())
    rows = rows.T if pair.trained_is_A else rows
    rows = rows.reshape(pair.blocks, len(rows) // pair.blocks, -1)
    return damped_inverse(rows, RIDGE)


class LoraFA(torch.optim.Optimizer):
    """AdamW with a corrected gradient for each pair's trained factor; all other tensors get a plain AdamW step.

    The order of operations matches PEFT's: ε is added to √v before bias correction, and weight decay is applied after
    the step. Tensors without a gradient do not change. The r × r inverse of a pair is cached until the pair's frozen
    factor changes.
    """

    def __init__(
        self,
        params: ParamsT,
        pairs: Iterable[Pair] = (),
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        """Set up the optimizer.

        Args:
            params: Tensors or parameter groups, as for any torch optimizer.
            pairs: The pairs that `freeze_factors` returned.
            lr: Learning rate.
            betas: Decay rates of the running means of the gradient and of its square.
            eps: Added to the square root of the second running mean.
            weight_decay: Weight decay coefficient; each step multiplies the tensors by 1 − lr · weight_decay.

        Raises:
            ConfigError: A value is out of range.
        """
        for name, value, fits, rule in (
            ("lr", lr, lr >= 0, "at least 0"),
            ("betas[0]", betas[0], 0 <= betas[0] < 1, "at least 0 and below 1"),
            ("betas[1]", betas[1], 0 <= betas[1] < 1, "at least 0 and below 1"),
            ("eps", eps, eps >= 0, "at least 0"),
        ):
            if not fits:
                raise ConfigError.of(name, value, rule)
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": True}
        )
        self.pairs = {id(pair.trained): pair for pair in pairs}
        self._inverses: dict[int, tuple[tuple[int, int], Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Perform one optimization step; return the result of the closure, which recomputes the loss, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, pair = parameter.grad, self.pairs.get(id(parameter))
                if gradient is not None and pair is not None:
                    gradient = corrected_gradient(gradient, pair, self._inverse(pair))
                if gradient is not None:
                    self._update(parameter, gradient, group)
        return loss

    def _inverse(self, pair: Pair) -> Tensor:
        state = (pair.frozen._version, pair.frozen.data_ptr())
        kept = self._inverses.get(id(pair.trained))
        if kept is None or kept[0] != state:
            kept = self._inverses[id(pair.trained)] = (state, inverse_gram(pair))
        return kept[1]

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        beta1, beta2 = group["betas"]
        state["step"] += 1
        state["exp_avg"].mul_(beta1).add_(gradient, alpha=1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size, steps = group["lr"], int(state["step"])
        if group["correct_bias"]:
            size *= math.sqrt(1 - beta2**steps) / (1 - beta1**steps)
        parameter.addcdiv_(state["exp_avg"], state["exp_avg_sq"].sqrt().add_(group["eps"]), value=-size)
        if group["weight_decay"] > 0:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])


@dataclass(frozen=True)
class TrainedPart:
    """One trainable parameter of an adapter.

    Attributes:
        site: Path of the site, or of the module that holds the parameter.
        experts: Number of experts in A (r·experts, in) or B (out, r·experts), whose index varies slowest in A and
            fastest in B; 1 for other parameters.
    """

    name: str
    parameter: nn.Parameter
    role: Role
    site: str
    experts: int = 1

    @property
    def is_matrix(self) -> bool:
        """Return whether it is the A or B of one weight matrix: 2-D, not of an embedding or several experts."""
        return self.role in ("A", "B") and self.parameter.ndim == 2 and self.experts == 1

    def by_expert(self, values: Tensor) -> Tensor:
        """Return values of the parameter's shape as (experts, …)."""
        return values.reshape(self.experts, -1) if self.role == "A" else values.reshape(-1, self.experts).T


@dataclass(frozen=True)
class Rates:
    """Learning rates of one adapter.

    Attributes:
        learning_rate: Rate for A, and for all parameters to which no other field applies.
        b_ratio: LoRA+'s λ: B's rate divided by A's. It also applies to vectors, since they scale the output as B does.
        embedding: Rate for both factors of an embedding; None means `learning_rate`.
        patterns: Pattern -> rate that replaces `learning_rate` and `embedding` at matching sites; `b_ratio` still
            applies. Patterns are matched as in `rank_pattern`, and the first match wins.
    """

    learning_rate: float
    b_ratio: float = 1.0
    embedding: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)


def roles(model: nn.Module) -> dict[int, tuple[Role, str]]:
    """Return a dict from tensor id to role and site path, for every factor and extra tensor in a model."""
    by_id: dict[int, tuple[Role, str]] = {}
    for path, layer in layers(model):
        site = path.replace(".base_layer", "")  # layers can be nested
        factors: tuple[Role, Role] = ("embedding", "embedding") if layer.kind.zero_side == "A" else ("A", "B")
        for adapter in layer.r:
            own = layer.parameters_of(adapter)  # empty if the layer uses the factors of a tied layer
            by_id.update((id(vector), ("vector", site)) for vector in own[2:])
            by_id.update((id(factor), (role, site)) for factor, role in zip(own, factors, strict=False))
            matrices = [extra for extra in variant_named(layer.variant[adapter]).parts.extras if extra.role != "vector"]
            if own and matrices:
                tensors = layer.factor(adapter).own
                by_id.update((id(tensors[extra.held_as]), (extra.role, site)) for extra in matrices)
    return by_id


def trained_parts(model: nn.Module, name: str | None = None) -> list[TrainedPart]:
    """Return the trainable parameters of one adapter, or of all, with their roles, in model order."""
    known = roles(model)
    stacked = [(layer.spec.experts, pair) for _, layer, _, *pair in own_factors(model) if layer.spec.experts > 1]
    experts = {id(factor): count for count, pair in stacked for factor in pair}
    parts = []
    for path, parameter in trainable_parameters(model, name):
        plain: Role = "vector" if parameter.ndim == 1 else "whole"
        role, site = known.get(id(parameter), (plain, _owner(path)))
        parts.append(TrainedPart(path, parameter, role, site, experts.get(id(parameter), 1)))
    return parts


def rates_by_name(parts: Sequence[TrainedPart], rates: Rates) -> dict[str, float]:
    """Return the learning rate of each parameter by its name: η_B = λ·η_A at every site.   [docs/math.md (17)]

    Raises:
        ConfigError: A pattern is invalid or matches no site; the message suggests similar names.

    Source:
        Hayou, Ghosh and Yu 2024, arXiv:2402.12354, section 4: B's rate has to exceed A's by a factor that grows
        with the width.
    """
    sites = list(dict.fromkeys(part.site for part in parts))
    wrong = unfitting_keys("learning_rate_pattern", rates.patterns, sites)
    if wrong:
        raise ConfigError(" ".join(map(str, wrong)), what=wrong[0].entry, field="learning_rate_pattern")
    return {part.name: _rate(part, rates) for part in parts}


def _rate(part: TrainedPart, rates: Rates) -> float:
    own: float | None = first_match(rates.patterns, part.site, None)
    if part.role == "embedding":
        return own if own is not None else rates.embedding if rates.embedding is not None else rates.learning_rate
    of_a = rates.learning_rate if own is None else own
    return of_a * rates.b_ratio if part.role in ("B", "vector") else of_a


def _owner(name: str) -> str:
    """Return the base-model path of the module that holds a parameter; the parameter must not be a factor."""
    path = name.rpartition(".")[0]
    return path.partition(".modules_to_save.")[0].partition(".token_adapter.")[0].replace(".base_layer", "")
