"""LoRA+ learning rates, parameter groups and LoRA-FA.

LoRA-FA: one factor of each site is frozen, and the other's gradient is corrected for what the frozen one looks like.

Frozen is the factor that does not begin at zero: A; on an embedding, and under MiCA, B. `freeze_factors` freezes it and
says which pairs there are; `LoraFA` is the optimizer that steps on the corrected gradient. Knows no schedules or files.

Learning rates of an adapter's tensors: LoRA+ and rates by pattern, worked out by what each tensor is.

What a tensor is (A, B, of an embedding, a vector, a copied module) is asked of the layer that holds it, not guessed
from its name. Knows nothing about optimizers, schedules or decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lorakit.core.model.activation import trainable_parameters
from lorakit.core.model.index import layers
from lorakit.core.quantization import at_least_fp32
from lorakit.errors import ConfigError
from lorakit.targets import first_match, unfitting_keys

RIDGE = 1e-8
"""Added to the diagonal of A·Aᵀ before it is inverted, as PEFT does, so that a singular one has an inverse."""


@dataclass(frozen=True)
class Pair:
    """A trained factor and the frozen one beside it.

    Attributes:
        trained: B (out, r), or A (r, in) of an embedding; further axes are those of a kernel.
        frozen: The other one.
        scale: Factor before B·A.
        trained_is_A: Whether `trained` is A.
        experts: So many B lie side by side, (out, r·experts) with the expert as fastest index; 0 where it is one.
    """

    trained: nn.Parameter
    frozen: Tensor
    scale: float
    trained_is_A: bool = False
    experts: int = 0

    @property
    def blocks(self) -> int:
        """So many A·Aᵀ there are: one for each expert, or each group of a convolution."""
        if self.trained_is_A:
            return 1
        return self.experts or len(self.frozen) // self.trained.shape[1]


def freeze_factors(model: nn.Module, name: str | None = None) -> list[Pair]:
    """Freeze the factor of each site that does not begin at zero.

    Args:
        model: An adapted model; `requires_grad` of the frozen factors is switched off.
        name: One adapter, or None for all.

    Returns:
        The pairs whose other factor is trained, in the model's order.

    Raises:
        AdapterError: There is no such adapter.
        ConfigError: Only the factor that is to be frozen is trained at a site, so nothing would learn.
    """
    trained = {id(parameter) for _, parameter in trainable_parameters(model, name)}
    pairs: list[Pair] = []
    seen: set[int] = set()
    for path, layer in layers(model):
        for adapter in layer.r if name is None else layer.r.keys() & {name}:
            trains_a = layer.kind.zero_side == "A" or layer.trains[adapter] == {"A"}
            own = layer.parameters_of(adapter)[:2]
            if not own or id(own[0]) in seen:
                continue  # its factors are those of another, to which it is tied
            seen.add(id(own[0]))
            A, B = own
            learns, stays = (A, B) if trains_a else (B, A)
            if id(learns) in trained:
                pairs.append(Pair(learns, stays, layer.scaling[adapter], trains_a, layer.slot.experts))
            elif id(stays) in trained:
                raise ConfigError(
                    f"{path}: LoRA-FA freezes the only factor that this adapter trains; use AdamW.", where=path
                )
            stays.requires_grad_(False)
    return pairs


def corrected_gradient(gradient: Tensor, pair: Pair, inverse: Tensor) -> Tensor:
    """The step of B that moves the weight most like full fine-tuning would: g_B·(A·Aᵀ)⁻¹/s².   [docs/math.md (18)]

    Args:
        gradient: Of the pair's trained factor, in its shape: (out, r), (r, in), or with the axes of a kernel.
        pair: Says how the factors lie, and s.
        inverse: From `inverse_gram`, (blocks, r / blocks, r / blocks); it stands on the left of A's gradient.

    Returns:
        As `gradient`, in its dtype.

    Source:
        Zhang et al. 2023, arXiv:2308.03303; the correction is the least-squares solution of ‖s·X·A − G‖ for X, which
        Wang et al. 2024, arXiv:2407.18242, section 3, derive for both factors.
    """
    g = gradient.to(inverse.dtype)
    if pair.trained_is_A:
        corrected = inverse[0] @ g.reshape(len(inverse[0]), -1)
    elif pair.experts:
        by_expert = g.reshape(len(g), -1, pair.experts).permute(2, 0, 1) @ inverse  # (experts, out, r)
        corrected = by_expert.permute(1, 2, 0)
    else:
        corrected = g.reshape(len(inverse), -1, inverse.shape[-1]) @ inverse
    return (corrected / pair.scale**2).reshape(gradient.shape).to(gradient.dtype)


def inverse_gram(pair: Pair) -> Tensor:
    """(A·Aᵀ + δ·I)⁻¹ of a pair's frozen A, or (Bᵀ·B + δ·I)⁻¹ of its frozen B.

    Args:
        pair: The pair.

    Returns:
        (blocks, r / blocks, r / blocks), fp32 or wider.
    """
    rows = at_least_fp32(pair.frozen.detach())
    rows = rows.T if pair.trained_is_A else rows
    rows = rows.reshape(pair.blocks, len(rows) // pair.blocks, -1)
    ridge = RIDGE * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    return torch.linalg.pinv(rows @ rows.mT + ridge)


class LoraFA(torch.optim.Optimizer):
    """AdamW, in which the gradient of each pair's trained factor is corrected first; other tensors take a plain step.

    The order of operations is PEFT's: ε is added to √v before the corrections for the start from zero, and the decay
    acts on the tensor after its step. Tensors without a gradient are left alone. The inverse of a pair, r × r, is kept
    until its frozen factor changes.
    """

    def __init__(
        self,
        params: Iterable[Any],
        pairs: Iterable[Pair] = (),
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        """Set up the optimizer.

        Args:
            params: Tensors or groups, as any optimizer of torch takes them.
            pairs: From `freeze_factors`.
            lr: Learning rate.
            betas: Decay of the running means of the gradient and of its square.
            eps: Added to the root of the latter.
            weight_decay: Share of a tensor, times the rate, that is taken away each step.

        Raises:
            ConfigError: A number is out of range.
        """
        _check(lr, betas, eps)
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": True}
        )
        self.pairs = {id(pair.trained): pair for pair in pairs}
        self._inverses: dict[int, tuple[tuple[int, int], Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: Computes the loss anew, or None.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group, parameter in self._with_gradient():
            self._update(parameter, self._gradient(parameter), group)
        return loss

    def _with_gradient(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        for group in self.param_groups:
            yield from ((group, p) for p in group["params"] if p.grad is not None)

    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        """The parameter's gradient, corrected where it is a pair's trained factor; its own shape (…)."""
        gradient: Tensor = parameter.grad  # type: ignore[assignment]
        pair = self.pairs.get(id(parameter))
        return gradient if pair is None else corrected_gradient(gradient, pair, self._inverse(pair))

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


def _check(lr: float, betas: tuple[float, float], eps: float) -> None:
    for name, value, ok in (
        ("lr", lr, lr >= 0),
        ("betas[0]", betas[0], 0 <= betas[0] < 1),
        ("betas[1]", betas[1], 0 <= betas[1] < 1),
        ("eps", eps, eps >= 0),
    ):
        if not ok:
            raise ConfigError(
                f"Invalid {name} of LoRA-FA's optimizer: {value!r}; it must be at least 0, betas below 1."
            )


Role = Literal["A", "B", "embedding", "vector", "whole"]
"""A or B of a site; either factor of an embedding; a magnitude or bias (one axis); a matrix of a copied module."""


@dataclass(frozen=True)
class TrainedPart:
    """One trained tensor of an adapter.

    Attributes:
        name: Its name in the model.
        parameter: The tensor.
        role: What it is.
        site: Path of the module that it belongs to.
    """

    name: str
    parameter: nn.Parameter
    role: Role
    site: str


@dataclass(frozen=True)
class Rates:
    """Learning rates of one adapter.

    Attributes:
        learning_rate: Of A, and of all that nothing below speaks of.
        b_ratio: Rate of B over that of A: LoRA+'s λ. It also holds for vectors, which act on the output as B does.
        embedding: Of both factors of an embedding, or None for as any other site's.
        patterns: Pattern -> the rate that replaces `learning_rate` at the sites it fits, as `rank_pattern` is read;
            the first that fits wins, and `b_ratio` multiplies it for B. It wins over `embedding`.
    """

    learning_rate: float
    b_ratio: float = 1.0
    embedding: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)


def roles(model: nn.Module) -> dict[int, tuple[Role, str]]:
    """What each factor and magnitude in a model is: id of the tensor -> role and path of its site.

    Args:
        model: Any model; one without adapters has none.
    """
    found: dict[int, tuple[Role, str]] = {}
    for path, layer in layers(model):
        site = path.replace(".base_layer", "")  # layers can stand one inside the other
        factors: tuple[Role, Role] = ("embedding", "embedding") if layer.kind.zero_side == "A" else ("A", "B")
        for adapter in layer.r:
            own = layer.parameters_of(adapter)
            if not own:
                continue  # its factors are those of another, to which it is tied
            A, B, *vectors = own
            found.update(zip((id(A), id(B)), ((role, site) for role in factors), strict=True))
            found.update((id(vector), ("vector", site)) for vector in vectors if vector is not A and vector is not B)
    return found


def trained_parts(model: nn.Module, name: str | None = None) -> list[TrainedPart]:
    """The trained tensors of an adapter with what each is, in the model's order.

    Args:
        model: An adapted model.
        name: One adapter, or None for all.

    Raises:
        AdapterError: There is no such adapter.
    """
    known = roles(model)
    parts = []
    for path, parameter in trainable_parameters(model, name):
        plain: Role = "vector" if parameter.ndim == 1 else "whole"
        role, site = known.get(id(parameter), (plain, _owner(path)))
        parts.append(TrainedPart(path, parameter, role, site))
    return parts


def rates_by_name(parts: Sequence[TrainedPart], rates: Rates) -> dict[str, float]:
    """The learning rate of each tensor: η_B = λ·η_A at every site.   [docs/math.md (17)]

    Args:
        parts: The trained tensors.
        rates: What holds where.

    Returns:
        Name of the tensor -> its rate.

    Raises:
        ConfigError: A pattern is no regular expression or fits no trained tensor; the nearest names are given.

    Source:
        Hayou, Ghosh and Yu 2024, arXiv:2402.12354, section 4: B's rate has to be larger than A's by an order that
        grows with the width.
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
    """Path of the module that a tensor outside the factors belongs to, as the base has it."""
    path = name.rpartition(".")[0]
    return path.partition(".modules_to_save.")[0].partition(".token_adapter.")[0].replace(".base_layer", "")
