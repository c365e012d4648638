"""The eleven ways to combine adapters, as PEFT names them: what each does with numbers, and what it needs.

A way is made of steps: prune each tensor, elect a sign, add up. Without "svd" the steps act on A and on B by
themselves; with it they act on the whole update B·A, which is then taken apart again. Knows tensors only.

Rows of tokens that several adapters train, combined as the rest of an adapter is: by what each changes in the base.

A trained row stands in place of the base's, so its effect is the difference between the two. It knows the base's rows
only through a function that it is given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.files.tensor_names import PREFIX, ROWS
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.trainable_tokens import TrainableTokens
from lorakit.core.model.index import AdapterIndex
from lorakit.core.operations.tensor_sources import AdapterWeights
from lorakit.errors import AdapterError, ConfigError, nearest
from lorakit.targets import names_path

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
    """How to combine.

    Attributes:
        name: One of COMBINATION_TYPES. "cat" is exact and sums the ranks; "svd" is the nearest update of its rank;
            "linear" adds A and B separately, which is inexact; the others prune first.
        rank: Rank of the result, for ways with "svd"; None takes the largest of the adapters at each site.
        density: Share of the numbers that pruning keeps, in (0, 1]; of experts, of each expert's own.
        majority_sign: In "ties": the sign that counts is that of the sum ("total"), or of most ("frequency").
        clamp: For ways with "svd": cut numbers of A and B beyond this quantile, in (0.5, 1].
        driver: For ways with "svd" on CUDA: the method of `torch.linalg.svd`.
        seed: For "dare": seed of what is dropped; None draws from torch's own generator.

    Raises:
        ConfigError: A field holds what is not allowed, or what this way does not use.
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
            close = nearest(str(self.name), list(COMBINATION_TYPES), 1)
            meant = f" Did you mean {close[0]!r}?" if close else ""
            text = (
                f"There is no way {self.name!r} to combine adapters; there are {', '.join(COMBINATION_TYPES)}.{meant}"
            )
            raise ConfigError(text, what=self.name, field="combination_type", allowed=COMBINATION_TYPES)
        if self.majority_sign not in MAJORITIES:
            raise ConfigError(
                f"majority_sign is {self.majority_sign!r}; it must be 'total' or 'frequency'.",
                what=self.majority_sign,
                field="majority_sign",
                allowed=MAJORITIES,
            )
        if self.prunes and (self.density is None or not 0 < self.density <= 1):
            raise ConfigError(
                f"density is {self.density!r}; {self.name!r} needs the share to keep, in (0, 1].",
                what=self.density,
                field="density",
            )
        if not self.prunes and self.density is not None:
            raise ConfigError(
                f"density is {self.density!r}, and {self.name!r} does not prune. Leave it out.",
                what=self.density,
                field="density",
            )
        for field in ("rank", "clamp", "driver"):
            if getattr(self, field) is not None and not self.decomposes:
                raise ConfigError(
                    f"{field} is {getattr(self, field)!r}, and the rank of {self.name!r} follows from the adapters. "
                    "Leave it out, or take a way with svd.",
                    what=getattr(self, field),
                    field=field,
                )
        if self.rank is not None and (isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1):
            raise ConfigError(
                f"rank is {self.rank!r}; it must be a whole number of at least 1.", what=self.rank, field="rank"
            )
        if self.clamp is not None and not 0.5 < self.clamp <= 1:
            raise ConfigError(f"clamp is {self.clamp!r}; it is a quantile in (0.5, 1].", what=self.clamp, field="clamp")

    @property
    def decomposes(self) -> bool:
        """The result is a truncated singular value decomposition."""
        return self.name.endswith("svd")

    @property
    def prunes(self) -> bool:
        """Numbers are set to zero first."""
        return self.name not in ("svd", "linear", "cat")

    @property
    def draws(self) -> bool:
        """What is pruned is drawn at random, and the rest grows so that the mean stays."""
        return self.name.startswith("dare")

    @property
    def elects(self) -> bool:
        """Only numbers that agree with the sign of the majority count, and their mean is taken."""
        return "ties" in self.name

    def generator(self) -> torch.Generator | None:
        """A source of randomness from the seed, on the CPU; None without a seed."""
        return None if self.seed is None else torch.Generator().manual_seed(self.seed)


def added_up(
    tensors: Sequence[Tensor], weights: Sequence[float], way: CombinationType, generator: torch.Generator | None = None
) -> Tensor:
    """Prune, elect and add up tensors of one shape.   [docs/math.md (55), (56)]

    A negative weight negates its tensor before the election: what is subtracted votes against.

    Args:
        tensors: One per adapter, all of one shape, which may be any shape.
        weights: One per adapter.
        way: What to do.
        generator: For pruning at random.

    Returns:
        One tensor of that shape.

    Source:
        Ilharco et al. 2022, arXiv:2212.04089 (task arithmetic); Yadav et al. 2023, arXiv:2306.01708 (TIES);
        Yu et al. 2023, arXiv:2311.03099 (DARE).
    """
    signed = [t if w >= 0 else -t for t, w in zip(tensors, weights, strict=True)]
    if way.prunes and way.density is not None:
        signed = [_pruned(t, way.density, way.draws, generator) for t in signed]
    stack = torch.stack(signed)
    sizes = torch.tensor([abs(w) for w in weights], dtype=stack.dtype, device=stack.device)
    sizes = sizes.view(-1, *[1] * (stack.ndim - 1))
    if not way.elects:
        return (stack * sizes).sum(0)
    votes = stack if way.majority_sign == "total" else stack.sign()
    elected = torch.where(votes.sum(0) >= 0, 1.0, -1.0).to(stack.dtype)
    agreeing = stack.sign() == elected
    return (stack * sizes * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)


def clamped(A: Tensor, B: Tensor, quantile: float) -> tuple[Tensor, Tensor]:
    """A (g, r, in) and B (g, out, r) with every number beyond a quantile of ± all of them cut to it."""
    sizes = torch.cat([A.abs().flatten(), B.abs().flatten()]).sort().values
    place = (2 * quantile - 1) * (sizes.numel() - 1)  # of ±x at q: of |x| at 2q − 1
    below = int(place)
    above = min(below + 1, sizes.numel() - 1)
    limit = float(sizes[below] + (place - below) * (sizes[above] - sizes[below]))
    return A.clamp(-limit, limit), B.clamp(-limit, limit)


def _pruned(tensor: Tensor, density: float, draws: bool, generator: torch.Generator | None) -> Tensor:
    if density == 1:
        return tensor
    if draws:
        kept = torch.rand(tensor.shape, generator=generator).to(tensor.device) < density
        return tensor * kept / density
    largest = tensor.abs().flatten().topk(int(density * tensor.numel()), sorted=False).indices
    kept = torch.zeros(tensor.numel(), dtype=torch.bool, device=tensor.device)
    kept[largest] = True
    return tensor * kept.view(tensor.shape)


RowReading = Callable[[str, Sequence[int]], Tensor]
"""Path of a table and numbers of rows -> the base's rows there, (n, d), as they were before any merge."""


def check_same_rows(adapters: Sequence[AdapterWeights]) -> None:
    """Refuse adapters that train different rows.

    Raises:
        AdapterError: They do.
    """
    asked = {a.label: _asked(a.config) for a in adapters if a.config.trainable_token_indices}
    if any(one != next(iter(asked.values())) for one in asked.values()):
        raise AdapterError(
            f"{' and '.join(asked)} train different rows of tokens (trainable_token_indices), which are not combined. "
            "Train the same rows, or keep both active."
        )


def row_reader(model: nn.Module) -> RowReading:
    """How to read rows of a model's tables, with or without adapters.

    Args:
        model: Only read.
    """
    site_map = AdapterIndex.of(model)

    def at(path: str, indices: Sequence[int]) -> Tensor:
        standing = site_map.modules.get(path)
        if standing is None:
            raise AdapterError(f"The model has no {path}, of which an adapter trains rows.")
        table: Any = site_map.base(path)._parameters["weight"]
        if isinstance(standing, TrainableTokens):
            table = standing.token_adapter.original()
        elif isinstance(standing, LoraLayer):
            table = standing.original()
        rows: Tensor = table.detach()[torch.tensor(list(indices), device=table.device)]
        return rows

    return at


def combined_rows(
    adapters: Sequence[AdapterWeights], weights: Sequence[float], reading: RowReading | None
) -> dict[str, Tensor]:
    """The rows of adapters that train the same ones.   [docs/math.md (59)]

    Args:
        adapters: Those that `check_same_rows` has passed, among others.
        weights: One number each.
        reading: The base's rows; not asked where the weights of an adapter's rows add up to 1.

    Returns:
        Name on disk -> what stands in the rows, (n, d); without those that one adapter alone has.

    Raises:
        AdapterError: The base's rows are needed, and there is no base.
    """
    found: dict[str, Tensor] = {}
    for name in sorted({name for adapter in adapters for name in adapter.others if name.endswith(ROWS)}):
        pairs = [(a, weight) for a, weight in zip(adapters, weights, strict=True) if name in a.others]
        if len(pairs) < 2:
            continue
        first = pairs[0][0]
        rows = torch.stack([adapter.others[name].double() * weight for adapter, weight in pairs]).sum(0)
        rest = 1.0 - sum(weight for _, weight in pairs)
        if rest:
            path = name.removeprefix(PREFIX).removesuffix(ROWS)
            if reading is None:
                raise AdapterError(
                    f"Rows of tokens at {path} are combined with weights that add up to {1 - rest:g}, so what they "
                    "change in the base counts. Give the base model too, or weights that add up to 1."
                )
            rows = rows + rest * reading(path, _indices(first.config, path)).to(rows)
        found[name] = rows.to(first.others[name].dtype)
    return found


def _indices(config: LoraConfig, path: str) -> list[int]:
    asked = config.trainable_token_indices or []
    if isinstance(asked, Mapping):
        return list(next(indices for name, indices in asked.items() if names_path(name, path)))
    return list(asked)


def _asked(config: LoraConfig) -> object:
    asked = config.trainable_token_indices
    return {name: list(indices) for name, indices in asked.items()} if isinstance(asked, Mapping) else list(asked or [])
