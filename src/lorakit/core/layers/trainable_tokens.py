"""Trainable token embeddings, including those in a head that is tied to an embedding.

A trained row replaces the base row W[i]; it is not added to that row. To avoid copying the weight, a forward pass
usually corrects the base output at the positions that use a trained row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit.core.clones import clone_with
from lorakit.core.layers.adapter_component import MergeOptions, ReplacingModule, StagedMerge, TunerLayer, base_not_kept
from lorakit.core.layers.stored_weight import give_back
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import AdapterState
from lorakit.errors import MergeError, RouteError

Replacement = tuple[Tensor, Tensor]
"""The indices of the replaced rows, (n,), and their new values, (n, d)."""


OF_THE_MODULE = frozenset(
    {"active_adapters", "disable_adapters", "enable_adapters", "set_adapter", "set_requires_grad", "delete_adapter"}
)
"""Attributes of a `TokenAdapter` that are those of the `TrainableTokens` around it, for programs written for PEFT."""


@dataclass(frozen=True)
class ChosenRows:
    """The token embeddings that an adapter trains in one embedding or head.

    Attributes:
        path: The module's path in the plain base model.
        tied: Paths of modules tied to this module; they share its weight and therefore the trainable token embeddings.
    """

    path: str
    indices: tuple[int, ...]
    tied: tuple[str, ...]


class TokenAdapter(nn.Module, TunerLayer):
    """An embedding or head with each adapter's trainable token embeddings; the attributes have PEFT's names.

    Attributes:
        trainable_tokens_delta: Adapter -> its rows, (n, d).
        token_indices: Adapter -> the indices of its rows in the weight.
        kept: Merged adapter -> the original base rows, (n, d), or None if they were not kept.
    """

    def __init__(self, base_layer: nn.Module, leader: TokenAdapter | None = None) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.trainable_tokens_delta: nn.ParameterDict = (
            nn.ParameterDict() if leader is None else leader.trainable_tokens_delta
        )
        self.token_indices: dict[str, list[int]] = {} if leader is None else leader.token_indices
        self.within: tuple[TrainableTokens, ...] = ()  # a tuple, so that the module is not registered as a submodule
        self.kept: dict[str, Tensor | None] = {} if leader is None else leader.kept
        self.tied_weight: tuple[nn.Parameter, ...] = ()  # the parameter shared before a merge; not registered

    @property
    def merged_adapters(self) -> list[str]:
        """The adapters whose rows are currently merged into the weight."""
        return list(self.kept)

    @property
    def merged(self) -> bool:
        """True if an adapter's rows are merged into the weight."""
        return bool(self.kept)

    @property
    def weight_here(self) -> nn.Parameter:
        """The module's current weight parameter, (V, d)."""
        return self.base_layer.get_parameter("weight")

    @property
    def trainable_tokens_original(self) -> Mapping[str, Tensor]:
        """Adapter -> the base rows that the adapter's rows replace, (n, d); a deleted adapter has no entry."""
        return _OriginalRows(self)

    @property
    def in_features(self) -> int:
        """The width of a head's input, d, or the number of rows of an embedding's weight, V."""
        return self.weight_here.shape[0 if isinstance(self.base_layer, nn.Embedding) else 1]

    @property
    def out_features(self) -> int:
        """The width of an embedding's output, d, or the number of rows of a head's weight, V."""
        return self.weight_here.shape[1 if isinstance(self.base_layer, nn.Embedding) else 0]

    @property
    def active_adapter(self) -> list[str]:
        """Alias of `active_adapters`, for compatibility with PEFT."""
        return self.within[0].active_adapters

    def __getattr__(self, name: str) -> Any:
        return getattr(self.within[0], name) if name in OF_THE_MODULE else super().__getattr__(name)

    def get_base_layer(self) -> nn.Module:
        """Return the base module."""
        return self.base_layer

    def _all_available_adapter_names(self) -> list[str]:
        """Return the sorted names of the adapters that have rows here, for compatibility with PEFT."""
        return sorted(self.token_indices)

    def rows(self, name: str) -> Replacement:
        """Return the indices of an adapter's rows, (n,), and their values, (n, d)."""
        rows = self.trainable_tokens_delta[name]
        return torch.tensor(self.token_indices[name], device=rows.device), rows

    def original(self, strict: bool = True) -> Tensor:
        """Return the base weight, (V, d), without merged rows; the base parameter itself if nothing is merged.

        If the rows were not kept, they stay in the weight, or, if `strict`, a MergeError is raised.
        """
        table: Tensor = self.base_layer.weight  # type: ignore[assignment]
        for name in [name for name, rows in self.kept.items() if strict or rows is not None]:
            index, rows = self.given_back(name)
            table = table.detach().index_copy(0, index.to(table.device), rows.to(table))
        return table

    def with_rows(self, names: Sequence[str]) -> Tensor:
        """Return the weight, (V, d), with the rows of the given adapters substituted; gradients flow to these rows."""
        table = self.original()
        for name in names:
            if name in self.token_indices:
                index, rows = self.rows(name)
                table = table.index_copy(0, index.to(table.device), rows.to(table))
        return table

    def replacements(self, names: Sequence[str]) -> list[Replacement]:
        """Return the active adapters' rows that are not in the weight; raise a RouteError if two train a row."""
        here = [name for name in names if name in self.token_indices]
        shared = self.shared_row(here)
        if shared is not None:
            one, other, index = shared
            text = f"{one} and {other} are active together, and both train row {index} of this weight; activate one."
            raise RouteError(text, what=other, field="trainable_token_indices")
        return [self.rows(name) for name in here if name not in self.kept or self.is_stale(names)]

    def shared_row(self, names: Sequence[str]) -> tuple[str, str, int] | None:
        """Return two adapters that train the same row, and the row's index; None if there are no such adapters."""
        taken: dict[int, str] = {}
        for name in names:
            for index in self.token_indices[name]:
                if index in taken:
                    return taken[index], name, index
            taken |= dict.fromkeys(self.token_indices[name], name)
        return None

    def is_stale(self, names: Sequence[str]) -> bool:
        """Return whether the weight holds rows of a merged adapter that is not among the active `names`."""
        return any(name not in names for name in self.kept)

    def given_back(self, name: str) -> Replacement:
        """Return the indices (n,) of a merged adapter's rows, and the original base rows, (n, d), if they were kept."""
        kept = self.kept[name]
        if kept is None:
            raise base_not_kept([name])
        return torch.tensor(self.token_indices[name], device=kept.device), kept


class _OriginalRows(Mapping[str, Tensor]):
    """The base rows, (n, d), that each adapter's rows replace, keyed by adapter; a view of a `TokenAdapter`."""

    def __init__(self, table: TokenAdapter) -> None:
        self._table = table

    def __getitem__(self, name: str) -> Tensor:
        indices, table = self._table.token_indices[name], self._table.original(strict=False).detach()
        return table[torch.tensor(indices, device=table.device)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._table.token_indices)

    def __len__(self) -> int:
        return len(self._table.token_indices)


class TrainableTokens(ReplacingModule):
    """An embedding, or a head tied to one, with trainable token embeddings (`trainable_token_indices`).

    `follows` is whether this module is tied to an embedding that holds the trainable rows of both modules.
    """

    _what, _field = "a module with trainable tokens", "trainable_token_indices"
    adapter_layer_names: tuple[str, ...] = ("token_adapter.trainable_tokens_delta",)
    other_param_names: tuple[str, ...] = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    def __init__(self, table: nn.Module, state: AdapterState, leader: TrainableTokens | None = None) -> None:
        super().__init__(table.training, state)
        self.token_adapter: TokenAdapter = TokenAdapter(table, None if leader is None else leader.token_adapter)
        self.token_adapter.within = (self,)
        self.follows = leader is not None

    def leads(self, other: TrainableTokens) -> bool:
        """Return whether another module is tied to this one and uses its trainable rows."""
        mine, others = self.token_adapter, other.token_adapter
        return other.follows and others.trainable_tokens_delta is mine.trainable_tokens_delta

    @property
    def original_module(self) -> nn.Module:
        """The base module."""
        return self.token_adapter.base_layer

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "token_adapter" or name.startswith("__"):
                raise
            adapter = self.token_adapter
            if name == "weight":
                active = self.state.active() if self.own_route is None else self.own_route
                here = [n for n in active.names if n in adapter.token_indices]
                return adapter.with_rows(here) if here or adapter.kept else adapter.base_layer.weight
            return getattr(adapter.base_layer, name)

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if name in {"weight", "bias"}:
            setattr(self.token_adapter.base_layer, name, value)
        else:
            super().__setattr__(name, value)

    def put(self, name: str, indices: Sequence[int], rows: nn.Parameter) -> None:
        """Add an adapter's rows (n, d), given their indices in the weight."""
        self.token_adapter.token_indices[name] = list(indices)
        self.token_adapter.trainable_tokens_delta[name] = rows

    def remove(self, adapter: str) -> nn.Module:
        """Remove an adapter's unmerged rows, if any; return this module, or the base module if no rows are left."""
        if adapter in self.token_adapter.token_indices:
            del self.token_adapter.token_indices[adapter], self.token_adapter.trainable_tokens_delta[adapter]
        self.drop_override(adapter)
        return self if self.token_adapter.token_indices else self.original_module

    def available_adapters(self) -> list[str]:
        """Return the adapters that have rows in this module."""
        return list(self.token_adapter.token_indices)

    def kept_bytes(self) -> int:
        """Return the size, in bytes, of the base rows kept by merges; rows of tied modules are counted once."""
        kept = () if self.follows else self.token_adapter.kept.values()
        return sum(rows.numel() * rows.element_size() for rows in kept if rows is not None)

    def parameters_of(self, adapter: str) -> list[nn.Parameter]:
        """Return a list with an adapter's rows, (n, d); empty if there are none or another module owns the rows."""
        return [self.token_adapter.trainable_tokens_delta[adapter]] if adapter in self and not self.follows else []

    def saved_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Return a dict with an adapter's rows, (n, d); empty if there are none or another module owns the rows."""
        return dict(zip(["token_adapter.trainable_tokens_delta"], self.parameters_of(adapter), strict=False))

    def check_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> None:
        """Raise a MergeError if rows are already merged, are trained by two of the adapters, or are not finite."""
        table = self.token_adapter
        new = [name for name in adapters if name in self and not self.follows]
        self.check_not_merged(path, new)
        shared = table.shared_row([*table.kept, *new]) if new else None
        if shared is not None:
            one, other, index = shared
            text = (
                f"Token indices of adapter {other} are already defined and would result in undefined merging "
                f"behavior: {one} also trains row {index} of {path}. Merge only one of these adapters."
            )
            raise MergeError(text, what=other, where=path, field="trainable_token_indices")
        for name in new:
            if not bool(torch.isfinite(table.trainable_tokens_delta[name]).all()):
                text = f"The rows of {name} at {path} contain NaN or infinite values. Nothing was changed."
                raise MergeError(text, what=name, where=path)

    def stage_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> StagedMerge | None:
        """Build a weight with the adapters' rows; return None if there are none or a tied module holds them."""
        here = [name for name in adapters if name in self]
        if not here or self.follows:
            return None
        table, held = self.token_adapter, self.token_adapter.weight_here
        weight, kept = held.detach().clone(), dict[str, Tensor | None]()  # other code may share `held`'s memory
        for name in here:
            index, rows = table.rows(name)
            index = index.to(weight.device)
            kept[name] = None if options.keep_base is False else weight[index]
            weight.index_copy_(0, index, rows.detach().to(weight))
        own = nn.Parameter(weight, held.requires_grad) if id(self) in options.apart else None
        return StagedMerge(None, partial(self._put_merged, weight, kept, own))

    def stage_unmerge(self, adapters: Sequence[str]) -> StagedMerge | None:
        """Prepare to restore the base rows; return None if none of the given adapters is merged here."""
        table = self.token_adapter
        old = {name: table.given_back(name) for name in table.kept if name in adapters and not self.follows}
        return StagedMerge(None, partial(self._put_unmerged, old)) if old else None

    def merged_tensors(self, adapters: Sequence[str], options: MergeOptions) -> dict[str, Tensor]:
        """Return the weight, (V, d), with the adapters' rows substituted, even if a tied module holds them."""
        here = any(name in self for name in adapters)
        return {"weight": self.token_adapter.with_rows(adapters).detach()} if here else {}

    def unload(self) -> nn.Module:
        """Return the base module; merged rows remain in its weight."""
        return self.original_module

    def follow(self, tied: TrainableTokens, apart: bool) -> None:
        """Update this module after a merge or unmerge in the tied module that holds its trainable rows.

        `apart` is whether the merge gave the tied module a separate parameter, which this module then uses too.
        """
        mine, its = self.token_adapter, tied.token_adapter
        if not mine.kept:
            self._give_back()
        elif apart:
            self._part(its.weight_here, keeps=bool(its.tied_weight))
        elif mine.weight_here is not its.weight_here:
            mine.weight_here.data = its.weight_here.data

    def _put_merged(self, weight: Tensor, kept: dict[str, Tensor | None], own: nn.Parameter | None) -> None:
        table = self.token_adapter
        if own is None:
            table.weight_here.data = weight
        else:  # other modules keep the old parameter
            self._part(own, keeps=any(rows is not None for rows in kept.values()))
        table.kept.update(kept)

    def _part(self, own: nn.Parameter, keeps: bool) -> None:
        """Give the module a separate weight parameter, (V, d); if `keeps`, unmerging restores the shared weight."""
        table = self.token_adapter
        if keeps and not table.tied_weight:
            table.tied_weight = (table.weight_here,)
        table.base_layer._parameters["weight"] = own

    def _put_unmerged(self, old: Mapping[str, Replacement]) -> None:
        table, weight = self.token_adapter, self.token_adapter.weight_here
        for name, (index, rows) in old.items():
            del table.kept[name]
            with torch.no_grad():  # the merge gave the weight new memory
                weight.index_copy_(0, index.to(weight.device), rows.to(weight))
        if not table.kept:
            self._give_back()

    def _give_back(self) -> None:
        """Restore the weight parameter that the module shared with other modules before a merge."""
        table = self.token_adapter
        for shared in table.tied_weight:
            give_back(table.base_layer, "weight", shared, table.weight_here.detach())
        table.tied_weight = ()

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]  # shared by tied modules
        """The adapters whose rows are currently merged into the weight."""
        return self.token_adapter.merged_adapters

    def run_alike(self, route: Route, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the output of the embedding or head with the active adapters' rows substituted.   [docs/math.md (91)]

        The first argument is indices (…) for an embedding, which returns (…, d), or hidden states (…, d) for a head,
        which returns (…, V). A RouteError is raised if two active adapters train the same row.
        """
        names, adapter, table = route.names, self.token_adapter, self.original_module
        if adapter.is_stale(names):  # a clone with the original weight yields the exact base output
            table = clone_with(table, {"weight": adapter.original()})
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        y: Tensor = table(*args, **kwargs)
        for index, rows in adapter.replacements(names):
            index, rows = index.to(x.device), rows.to(y.device)
            if isinstance(table, nn.Embedding):
                y = looked_up(table, x, y, index, rows)
            else:
                W: Tensor = table.weight  # type: ignore[assignment]
                y = read_out(W, x, y, index, rows)
        return y


def looked_up(table: nn.Embedding, x: Tensor, y: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Return the output of an embedding with some rows of its weight replaced, (…, d).

    Args:
        table: The embedding.
        x: Indices, (…).
        y: Output of the embedding, (…, d).
        index: Indices of the replaced rows, (n,); cost: a binary search among them for each element of `x`.
        rows: New values of these rows, (n, d).
    """
    numbers, order = index.sort()
    position = torch.searchsorted(numbers, x.contiguous()).clamp_max(len(numbers) - 1)
    hit = numbers[position] == x
    if table.max_norm is not None:  # a lookup in torch scales down rows with large norms, in place
        norms = rows.norm(p=table.norm_type, dim=1, keepdim=True)
        rows = torch.where(norms > table.max_norm, rows * (table.max_norm / (norms + 1e-7)), rows)
    padding = table.padding_idx
    if padding is not None:  # the padding row has no gradient
        rows = torch.where((index == padding)[:, None], rows.detach(), rows)
    new = F.embedding(order[position], rows.to(y.dtype))
    scale = getattr(table, "embed_scale", None)  # some embeddings scale the rows that they look up
    if scale is not None:
        new = new * torch.as_tensor(scale, dtype=new.dtype, device=new.device)
    return torch.where(hit[..., None], new, y)


def read_out(W: Tensor, x: Tensor, y: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Return the output of a head with some rows of its weight replaced, (…, V), in 2·n·d FLOPs for each position.

    Args:
        W: Weight of the head, (V, d).
        x: Hidden states, (…, d).
        y: Output of the head, (…, V).
        index: Indices of the replaced rows, (n,).
        rows: New values of these rows, (n, d).
    """
    change = (rows - W[index].to(rows)).to(y.dtype)  # exactly zero if the rows equal the base rows
    return y.index_add(-1, index, F.linear(x.to(y.dtype), change))
