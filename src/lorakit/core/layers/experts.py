"""Fused experts in transformers: A and B are applied to the tokens of each expert, so that no dense update is formed.

This replaces the `forward` of the experts, so it runs only for classes whose source is known to compute the same
(`lorakit.architectures.known_forwards`), and only while nothing that this source depends on has changed. Otherwise, the
experts run themselves, with dense weights. This file reads attributes of the module; it does not import transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lorakit.architectures.known_forwards import EXPERTS, PART, KnownForwards, known_forwards
from lorakit.core.clones import is_watched
from lorakit.core.variants import Factor
from lorakit.identity.contract import Contract, contract_of, facts_of
from lorakit.identity.identities import IMPLEMENTATIONS_OF_EXPERTS, MISSING, Fact, Identities
from lorakit.ops.grouped_linear import GroupedLinear, GroupedLowRank, grouped_linear

MARKS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
"""Attributes of an experts module that say how it computes; a decorator in transformers sets them.

Old releases lack some of them, which counts as False.
"""

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")

IMPLEMENTATIONS = ("eager", *IMPLEMENTATIONS_OF_EXPERTS)
"""Values of a config's `experts_implementation` that compute the same."""

PARALLEL = "_is_expert_parallel"


def role_of(module: nn.Module) -> str:
    """Return the role in the table of known source that fused experts need: EXPERTS and the marks that are true."""
    return " ".join((EXPERTS, *(mark for mark in MARKS if getattr(module, mark, False))))


def has_marks(module: nn.Module) -> bool:
    """Return whether a module of the base has the attributes and parameters of fused experts."""
    if not all(hasattr(module, name) for name in ("is_transposed", "has_bias", "_apply_gate")):
        return False
    weights = [module._parameters.get(name) for name in _names(module)]
    return all(weight is not None and weight.ndim == 3 and weight.is_floating_point() for weight in weights)


def why_not(module: nn.Module, identities: Identities, known: KnownForwards) -> str:
    """Return why `experts_forward` must not replace the `forward` of a module of the base, or ""."""
    kind = type(module).__name__
    if not has_marks(module):
        return f"{kind} does not have the attributes of fused experts"
    if getattr(module, PARALLEL, False):
        return f"the experts of {kind} are distributed"
    implementation = getattr(getattr(module, "config", None), "_experts_implementation", None)
    if implementation not in IMPLEMENTATIONS:
        return f"the experts implementation {implementation!r} is not known"
    activation = module._modules.get("act_fn")
    return _unknown(module, role_of(module), identities, known) or (
        "" if activation is None else _unknown(activation, PART, identities, known)
    )


def _unknown(module: nn.Module, role: str, identities: Identities, known: KnownForwards) -> str:
    """Return why the source of a module is not known, or "". torch's own modules are known."""
    source = identities.of(module)
    is_known = bool(source.digest) and (not source.functions or known.knows(source.digest, role))
    return "" if is_known else source.why or f"the source of {type(module).__name__} is not known"


def shows_tokens(module: nn.Module, parameter: str) -> bool:
    """Return whether factors of a parameter of a module can be applied to the tokens of each expert."""
    return parameter in PROJECTIONS and not why_not(module, Identities(), known_forwards())


class KnownExperts:
    """Decide whether `experts_forward` may replace the `forward` of one module. Copies and unpickled objects are empty.

    The source is identified in the first call. Later calls compare the contract.
    """

    def __init__(self) -> None:
        self._module: nn.Module | None = None
        self._contract: Contract | None = None
        self.why = ""

    def __reduce__(self) -> tuple[type[KnownExperts], tuple[()]]:
        return KnownExperts, ()

    def runs(self, module: nn.Module) -> bool:
        """Return whether the source of a module is known, nothing has changed since, and it has no hooks."""
        if torch.compiler.is_compiling():
            return self._contract is not None
        if self._module is not module:
            identities = Identities()
            self.why = why_not(module, identities, known_forwards())
            self._module, self._contract = module, None if self.why else _contract(module, identities)
        return self._contract is not None and not is_watched(module) and self._contract.holds()


def _contract(module: nn.Module, identities: Identities) -> Contract:
    """Collect what `experts_forward` relies on in a module."""
    facts: list[Fact] = [*facts_of(module, identities), (vars(module), PARALLEL, vars(module).get(PARALLEL, MISSING))]
    live = [*identities.of(module).live]
    activation = module._modules.get("act_fn")
    if activation is not None:
        facts += [(module._modules, "act_fn", activation), *facts_of(activation, identities)]
        live += identities.of(activation).live
    return contract_of(facts, live)


def _is_gated(module: nn.Module) -> bool:
    """Return whether the first projection of an experts module computes a gate too."""
    return "gate_up_proj" in module._parameters


def _names(module: nn.Module) -> tuple[str, str]:
    """Return the names of the weights of the first and second projection."""
    return ("gate_up_proj" if _is_gated(module) else "up_proj"), "down_proj"


def experts_forward(
    module: nn.Module,
    factors: Mapping[str, Sequence[Factor]],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Run a forward pass of fused experts with the active adapters' factors at each projection.   [docs/math.md (92)]

    Args:
        module: The experts module, with the weights to use.
        factors: Name of a parameter -> its factors, with A (experts, r, in) and B (experts, out, r).
        hidden_states: Input to the experts module, (tokens, d).
        top_k_index: Indices of each token's experts, (tokens, k).
        top_k_weights: Routing weights of these experts, (tokens, k).

    Returns:
        The output, (tokens, d). Extra cost: 2·r·(in + out) FLOPs per token, expert and projection; no dense weight.
    """
    activation: Callable[[Tensor], Tensor] = getattr(module, "_apply_gate" if _is_gated(module) else "act_fn")
    (first, up), (last, down) = projections(module).items()
    chosen, per_token, experts = top_k_index.flatten(), top_k_index.shape[1], len(up.W)
    counts = torch.bincount(chosen, minlength=experts).tolist()[:experts]  # a larger index stands for no expert
    order = chosen.argsort(stable=True)[: sum(counts)]  # the tokens of the first expert, then those of the second, …
    token = order // per_token
    h = _project(up, hidden_states[token], counts, factors.get(first, ()))
    y = _project(down, activation(h), counts, factors.get(last, ()))
    if getattr(module, "has_post_expert_norm", False):
        y = module.get_submodule("post_expert_norm")(y)
    y = y * top_k_weights.flatten()[order, None]
    return torch.zeros_like(hidden_states).index_add_(0, token, y.to(hidden_states.dtype))


def projections(module: nn.Module) -> dict[str, GroupedLinear]:
    """Return the frozen projections of fused experts by the name of their weight, the first one first."""
    biases = {name: getattr(module, f"{name}_bias") if module.has_bias else None for name in _names(module)}
    return {
        name: GroupedLinear(getattr(module, name), bias, bool(module.is_transposed)) for name, bias in biases.items()
    }


def _project(linear: GroupedLinear, x: Tensor, counts: Sequence[int], factors: Sequence[Factor]) -> Tensor:
    """Return the projection (rows, out) of the rows x (rows, in), which are sorted by expert, with the factors."""
    low = [GroupedLowRank(factor.A, factor.B, factor.scale) for factor in factors]
    dropped = [factor.dropout(x) for factor in factors]
    y = grouped_linear(x, counts, linear, [one for one, z in zip(low, dropped, strict=True) if z is x])
    for one, z in zip(low, dropped, strict=True):
        if z is not x:
            y = y + grouped_linear(z, counts, None, [one])
    return y
