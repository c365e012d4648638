"""The eleven combination types, under PEFT's names, with their options and their arithmetic.

A type has up to three steps: prune each tensor, elect signs, and add the tensors up. Types with "svd" apply them to the
update B·A and decompose the result, others to A and B separately. Of trainable tokens, which replace base rows, the
differences from the base rows are combined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.model.base_view import base_tensors
from lorakit.core.model.index import AdapterIndex
from lorakit.core.operations.tensor_sources import AdapterWeights
from lorakit.errors import AdapterError, ConfigError
from lorakit.targets.patterns import names_path
from lorakit.tensor_headers import PREFIX, ROWS

COMBINATION_TYPES = (
    "svd",
    "linear",
    "cat",
    "ties",
    "ties_svd",
    "dare_ties",
    "dare_linear",
    "dare_ties_svd",
    "dare_linear_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
)
MAJORITIES = ("total", "frequency")


@dataclass(frozen=True)
class CombinationType:
    """A combination type and its options; a ConfigError if an option is invalid, or not one of this type.

    Attributes:
        name: One of COMBINATION_TYPES. "cat" is exact, but the ranks add up; "svd" gives the nearest update of the
            chosen rank; "linear" adds A and B separately, which is inexact; the other types prune first.
        rank: For types with "svd": rank of the result; None uses the largest of the adapters' ranks at each site.
        density: Fraction of the values that pruning keeps, in (0, 1]; each expert is pruned separately.
        majority_sign: For types with "ties": whether to elect the sign of the sum ("total") or the sign that most
            values have ("frequency").
        clamp: For types with "svd": quantile to which the values of A and B are clamped, in (0.5, 1].
        driver: For types with "svd" on CUDA: the `driver` argument of `torch.linalg.svd`.
        seed: For types with "dare": seed of the random pruning; None uses torch's default generator.
    """

    name: str = "svd"
    rank: int | None = None
    density: float | None = None
    majority_sign: str = "total"
    clamp: float | None = None
    driver: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.name not in COMBINATION_TYPES:
            raise ConfigError.of("combination_type", self.name, allowed=COMBINATION_TYPES)
        if self.majority_sign not in MAJORITIES:
            raise ConfigError.of("majority_sign", self.majority_sign, allowed=MAJORITIES)
        if self.prunes and (self.density is None or not 0 < self.density <= 1):
            raise ConfigError.of("density", self.density, f"the fraction of values that {self.name!r} keeps, in (0, 1]")
        if not self.prunes and self.density is not None:
            raise ConfigError.of("density", self.density, f"left out, because {self.name!r} does not prune")
        for field in ("rank", "clamp", "driver"):
            value = getattr(self, field)
            if value is not None and not self.decomposes:
                raise ConfigError.of(field, value, f"left out, because {self.name!r} does not use an SVD")
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ConfigError.of("rank", self.rank, "an integer >= 1")
        if self.clamp is not None and not 0.5 < self.clamp <= 1:
            raise ConfigError.of("clamp", self.clamp, "a quantile in (0.5, 1]")

    @property
    def decomposes(self) -> bool:
        """True if the result is a truncated singular value decomposition."""
        return self.name.endswith("svd")

    @property
    def prunes(self) -> bool:
        """True if some values are set to zero before the tensors are added up."""
        return self.name not in ("svd", "linear", "cat")

    @property
    def draws(self) -> bool:
        """True if pruning is random; kept values are then scaled up to preserve the mean."""
        return self.name.startswith("dare")

    @property
    def elects(self) -> bool:
        """True if the result is the mean of only those values that have the elected sign."""
        return "ties" in self.name


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Return a tensor (any shape) in which only the fraction `density` of the values, the largest, is not zero."""
    largest = tensor.abs().flatten().topk(int(density * tensor.numel()), sorted=False).indices
    kept = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device).index_fill(0, largest, True)
    return tensor * kept.view(tensor.shape)


def keep_random(
    tensor: Tensor, density: float, *, rescale: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """Return a tensor (any shape) in which each value is kept with the probability `density`, and others are zero.

    `rescale` divides the kept values by the density, which preserves the mean. The generator is one of the CPU.
    """
    chances = torch.full(tensor.shape, density, dtype=tensor.dtype)
    kept = tensor * torch.bernoulli(chances, generator=generator).to(tensor.device)
    return kept / density if rescale else kept


def weighted(stack: Tensor, weights: Tensor) -> Tensor:
    """Return stacked tensors (n, …), each multiplied by one of the weights (n,)."""
    return stack * weights.view(-1, *[1] * (stack.ndim - 1))


def has_elected_sign(stack: Tensor, majority: str) -> Tensor:
    """Return which values of stacked tensors (n, …) have the sign that is elected at their position, as booleans (n,
    …).

    "total" elects the sign of the sum, "frequency" the sign that most values have; a tie elects +.
    """
    votes = (stack if majority == "total" else stack.sign()).sum(0)
    return stack.sign() == torch.where(votes >= 0, 1.0, -1.0).to(stack.dtype)


def mean_of_agreeing(stack: Tensor, agreeing: Tensor) -> Tensor:
    """Return the sum (…) of the agreeing values in (n, …), divided by their number or by 1, in fp32 or wider."""
    return (stack * agreeing).sum(0) / agreeing.sum(0).clamp(min=1.0)


def added_up(
    tensors: Sequence[Tensor], weights: Sequence[float], way: CombinationType, generator: torch.Generator | None = None
) -> Tensor:
    """Prune tensors of the same shape (any shape), elect signs, and add the tensors up.   [docs/math.md (55), (56)]

    A negative weight negates its tensor before the election, so a subtracted tensor votes for the opposite sign.

    Source:
        Ilharco et al. 2022, arXiv:2212.04089 (task arithmetic); Yadav et al. 2023, arXiv:2306.01708 (TIES);
        Yu et al. 2023, arXiv:2311.03099 (DARE).
    """
    signed = [t if w >= 0 else -t for t, w in zip(tensors, weights, strict=True)]
    if way.prunes and way.density is not None:
        signed = [_pruned(t, way.density, way.draws, generator) for t in signed]
    stack = torch.stack(signed)
    sized = weighted(stack, torch.tensor([abs(w) for w in weights], dtype=stack.dtype, device=stack.device))
    if not way.elects:
        return sized.sum(0)
    return mean_of_agreeing(sized, has_elected_sign(stack, way.majority_sign)).to(stack.dtype)


def clamped(A: Tensor, B: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """Clamp A (g, r, in) and B (g, out, r) to [−q, q], where q is a quantile of all their values and negated values."""
    sizes = torch.cat([A.abs().flatten(), B.abs().flatten()]).sort().values
    position = (2 * quantile - 1) * (sizes.numel() - 1)  # quantile q of ±x is quantile 2q − 1 of |x|
    below = int(position)
    above = min(below + 1, sizes.numel() - 1)
    limit = float(sizes[below] + (position - below) * (sizes[above] - sizes[below]))
    return A.clamp(-limit, limit), B.clamp(-limit, limit)


def _pruned(tensor: Tensor, density: float, draws: bool, generator: torch.Generator | None) -> Tensor:
    if density == 1:
        return tensor
    return keep_random(tensor, density, generator=generator) if draws else keep_largest(tensor, density)


def check_same_rows(adapters: Sequence[AdapterWeights]) -> None:
    """Raise an AdapterError if two adapters train different tokens."""
    rows = {
        a.label: a.config.as_json()["trainable_token_indices"] for a in adapters if a.config.trainable_token_indices
    }
    if any(one != next(iter(rows.values())) for one in rows.values()):
        text = f"{' and '.join(rows)} train different tokens (trainable_token_indices); keep both active instead."
        raise AdapterError(text, what=list(rows), field="trainable_token_indices")


def combined_rows(
    adapters: Sequence[AdapterWeights], weights: Sequence[float], base: AdapterIndex | None
) -> dict[str, Tensor]:
    """Combine the embedding rows (n, d) of adapters that train the same tokens, by name on disk.   [docs/math.md (59)]

    The base rows are read only if the weights of the adapters that train a module do not add up to 1; an AdapterError
    if they are needed, but there is no base.
    """
    combined: dict[str, Tensor] = {}
    for name in sorted({name for adapter in adapters for name in adapter.others if name.endswith(ROWS)}):
        pairs = [(a, weight) for a, weight in zip(adapters, weights, strict=True) if name in a.others]
        if len(pairs) < 2:
            continue
        first = pairs[0][0]
        rows = torch.stack([adapter.others[name].double() * weight for adapter, weight in pairs]).sum(0)
        rest = 1.0 - sum(weight for _, weight in pairs)
        if rest:
            path = name.removeprefix(PREFIX).removesuffix(ROWS)
            if base is None:
                raise AdapterError(
                    f"Trainable tokens at {path} are combined with weights that add up to {1 - rest:g}, so the result "
                    "depends on the base rows. Pass the base model too, or weights that add up to 1.",
                    where=path,
                )
            rows = rows + rest * _base_rows(base, path, _indices(first.config, path)).to(rows)
        combined[name] = rows.to(first.others[name].dtype)
    return combined


def _base_rows(base: AdapterIndex, path: str, indices: Sequence[int]) -> Tensor:
    """Return base embeddings (n, d) by an embedding module's path and token ids, without merged adapters."""
    module = base.modules.get(path)
    if module is None:
        text = f"An adapter trains token embeddings in {path}, but the model has no such module."
        raise AdapterError(text, where=path)
    if isinstance(module, TrainableTokens):
        table = module.token_adapter.original()  # raises an error if the rows that a merge replaced were not kept
    else:
        table = next(tensor for name, tensor, _ in base_tensors(base) if name == f"{path}.weight")
    return table.detach()[torch.tensor(indices, device=table.device)]


def _indices(config: LoraConfig, path: str) -> list[int]:
    """Return the ids of the tokens whose embeddings a config trains in the module at the given path."""
    indices = config.trainable_token_indices or []
    if isinstance(indices, Mapping):
        indices = next(of_table for name, of_table in indices.items() if names_path(name, path))
    return list(indices)
