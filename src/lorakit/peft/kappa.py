"""Targets by condition number: the modules whose weights are best conditioned, as PEFT's helper picks them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from lorakit.core.bases.conditions import EXPERT_WEIGHTS, of_expert_weights, of_linear_weights


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
