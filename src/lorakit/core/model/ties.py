"""`ensure_weight_tying`: what an adapter does to one of two modules that share a weight, it does to both.

A copy of a tied module shares the copy of its partner; factors beside a tied head are those of the embedding, turned
over, and those beside a second embedding are the very same. It knows the map of a model and its adapted modules; rows
of tables have ties of their own (`row_choice`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.factor import FactorWeight
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.model.index import AdapterIndex, identity
from lorakit.core.model.vocabulary import input_embedding, shared_weights, sharers, table_at
from lorakit.core.variants import variants_of
from lorakit.errors import ConfigError
from lorakit.targets import Match, Note, Resolution

TIED = "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"
"""Beginning of the note about what happens to a partner that is left alone; programs match it in PEFT's warnings."""

LEFT_ALONE, NOTHING_TIED = "left_alone", "nothing_tied"
"""Kinds of notes about ties."""


@dataclass(frozen=True)
class Ties:
    """What of an adapter is tied.

    Attributes:
        found: The sites and the copied modules, with the partners that are tied to them.
        leaders: Path of a partner -> path of the module that leads it.
    """

    found: Resolution
    leaders: Mapping[str, str]


class TiedWeight(FactorWeight):
    """Carries A or B of a head that is tied to an embedding: the embedding's own B or A, turned over.

    Attributes:
        weight: (r, in) or (out, r), always as the embedding's layer has it now.
    """

    def __init__(self, leader: LoraLayer, name: str, part: str) -> None:
        nn.Module.__init__(self)
        self.leader = (leader,)  # in a tuple, so that it is no submodule of ours
        self.name, self.part = name, part
        self.register_parameter("bias", None)
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The factor, (r, in) or (out, r), with a graph to the embedding's."""
        factor = self.leader[0].factor(self.name)
        return (factor.B if self.part == "A" else factor.A).T


def with_ties(index: AdapterIndex, config: LoraConfig, found: Resolution) -> Ties:
    """Return what a config names, and with `ensure_weight_tying` what is tied to that.

    Args:
        index: The model's index.
        config: The config.
        found: What the config names.

    Returns:
        The same with partners. Without the word, a note says what is left alone.

    Raises:
        ConfigError: What is tied cannot be trained as one.
    """
    named = {*found.saved, *(() if _is_all_linear(config) else (match.path for match in found.matches))}
    groups = tied_groups(index, named)
    if not config.ensure_weight_tying:
        return Ties(dataclasses.replace(found, notes=(*found.notes, *_left_alone(groups, named))), {})
    leaders: dict[str, str] = {}
    saved, matches = list(found.saved), list(found.matches)
    for leader, partners in groups.items():
        leaders |= dict.fromkeys(partners, leader)
        if any(path in found.saved for path in (leader, *partners)):
            saved += [path for path in (leader, *partners) if path not in saved]
            matches = [match for match in matches if match.path not in (leader, *partners)]
        else:
            matches = _tied_matches(index, config, matches, leader, partners)
    notes = list(found.notes)
    if not leaders and not (config.trainable_token_indices and _is_tied(index)):
        what = "no tied modules are added in either `modules_to_save` or `target_modules`"
        what = what if _is_tied(index) else "no tied modules were found in the model"
        notes.append(Note(NOTHING_TIED, f"You have requested `ensure_weight_tying`, but {what}."))
    order = {path: number for number, path in enumerate(index.modules)}
    saved.sort(key=order.__getitem__)
    resolution = dataclasses.replace(found, saved=tuple(saved), matches=tuple(matches), notes=tuple(notes))
    return Ties(resolution, leaders)


def tied_groups(index: AdapterIndex, paths: Collection[str]) -> dict[str, list[str]]:
    """The embeddings whose weight other modules share, where some path is among them -> those others.

    None where the model's config says that its embeddings are not tied, whatever they share.
    """
    groups: dict[str, list[str]] = {}
    for whole in shared_weights(index) if index.is_tied else ():
        if any(path in whole for path in paths):
            leader = next((p for p in whole if isinstance(table_at(index, p), nn.Embedding)), None)
            if leader is not None:  # others share a weight too, such as layers that are stacked anew
                groups[leader] = [p for p in whole if p != leader]
    return groups


def tie_copies(copies: Mapping[str, nn.Module], leaders: Mapping[str, str]) -> None:
    """Let copies of tied modules share one weight.

    Args:
        copies: Path -> an adapter's copy, not yet in place.
        leaders: Path of a partner -> that of its leader.
    """
    for path, leader in leaders.items():
        if path in copies and leader in copies:
            copies[path]._parameters["weight"] = copies[leader]._parameters["weight"]


def tie_factors(index: AdapterIndex, name: str, leaders: Mapping[str, str]) -> None:
    """Let the factors beside tied modules be those of the embeddings that lead them; all layers are in place.

    Args:
        index: The model's map.
        name: The adapter.
        leaders: Path of a partner -> that of its leader.
    """
    for path, leader in leaders.items():
        layer, leading = index.modules[path], index.modules[leader]
        if not (isinstance(layer, LoraLayer) and isinstance(leading, LoraLayer) and name in layer.r.keys() & leading.r):
            continue
        if layer.kind.names == leading.kind.names:
            for attribute in layer.kind.names:
                getattr(layer, attribute)[name] = getattr(leading, attribute)[name]
        else:
            layer.lora_A[name] = TiedWeight(leading, name, "A").train(layer.training)
            layer.lora_B[name] = TiedWeight(leading, name, "B").train(layer.training)


def leaders_of(index: AdapterIndex, names: Collection[str]) -> dict[LoraLayer, LoraLayer]:
    """Return the layers that are led in every one of some adapters -> the layers that lead them; one weight.

    Args:
        index: The model's index.
        names: Adapters. If only one of two layers has one of them, the two are not one.
    """
    owners: dict[int, LoraLayer] = {}  # id of a factor -> the first layer that has it
    found = {}
    for _, layer in index.layers_of(names):
        leading = [_leading(layer, name, owners) for name in names if name in layer.r]
        leader = leading[0]
        if leader is not None and all(other is leader for other in leading) and layer.is_one_with(leader, names):
            found[layer] = leader
    return found


def _leading(layer: LoraLayer, name: str, owners: dict[int, LoraLayer]) -> LoraLayer | None:
    """The layer whose factor of an adapter a layer has too, or None where it is its own."""
    if not layer.kind.on_disk:  # in no carrier, so the parameter itself is shared
        first = owners.setdefault(id(getattr(layer, layer.kind.names[0])[name]), layer)
        return None if first is layer else first
    down = layer.lora_A[name]
    return down.leader[0] if isinstance(down, TiedWeight) else None


def untied_copies(index: AdapterIndex, names: Collection[str]) -> list[tuple[str, str]]:
    """Return saved modules that would part from a module that shares their weight, if they replaced the original.

    Args:
        index: The model's index.
        names: Adapters.

    Returns:
        Path of the copied module, and the name of the other.
    """
    found = []
    copies = dict(index.every(ModulesToSave))
    holders = {id(holder.original_module): holder for holder in copies.values()}
    for path, holder in copies.items():
        for name in [name for name in names if name in holder.modules_to_save]:
            parameter = holder.original_module._parameters.get("weight")
            for other, module in index.holders.get(identity(parameter), ()):
                twin = holders.get(id(module))
                copied = twin.modules_to_save[name] if twin is not None and name in twin.modules_to_save else None
                mine = holder.modules_to_save[name]._parameters["weight"]
                if module is not holder.original_module and (
                    copied is None or copied._parameters["weight"] is not mine
                ):
                    found.append((path, other))
    return found


def _tied_matches(
    index: AdapterIndex, config: LoraConfig, matches: Sequence[Match], leader: str, partners: Sequence[str]
) -> list[Match]:
    """The matches with one for every member of a group, all of the leader's rank and alpha."""
    own = next((variant for variant in variants_of(config) if variant.tensors), None)
    if own is not None:
        raise ConfigError(
            f"ensure_weight_tying ties the factors of {leader} and {partners[0]}, and {own.field} gives each a tensor "
            f"of its own ({own.tensors[0].held_as}). Leave one of the two off, or adapt only one module without "
            "ensure_weight_tying.",
            where=leader,
            field=own.field,
        )
    kinds = {candidate.path: candidate.kind for candidate in index.candidates}
    members = (leader, *partners)
    here = [match for match in matches if match.path in members]
    model = next((match for match in here if match.path == leader), here[0])
    odd = [path for path in partners if not isinstance(index.base(path), (nn.Linear, nn.Embedding))]
    if not isinstance(index.base(leader), nn.Embedding) or odd:
        raise ConfigError(
            f"ensure_weight_tying: {(odd or [leader])[0]} shares its weight with {leader}, and factors are tied only "
            "among nn.Embedding and nn.Linear modules. Set ensure_weight_tying=False, or do not target it."
        )
    others = [match for match in matches if match.path not in members]
    return others + [dataclasses.replace(model, path=path, kind=kinds[path] or "") for path in members]


def _left_alone(groups: Mapping[str, Sequence[str]], named: Collection[str]) -> list[Note]:
    notes = []
    for leader, partners in groups.items():
        whole = (leader, *partners)
        mine, others = [p for p in whole if p in named], [p for p in whole if p not in named]
        what = f"{others[0]} keeps the base's weight" if others else f"{' and '.join(mine)} are trained apart"
        text = (
            f"{TIED}, but `ensure_weight_tying` is not set to True: {what}, so the two are no longer one once the "
            "adapter is merged."
        )
        notes.append(Note(LEFT_ALONE, text))
    return notes


def _is_tied(index: AdapterIndex) -> bool:
    path = input_embedding(index) if index.is_tied else None
    return path is not None and bool(sharers(index, path))


def _is_all_linear(config: LoraConfig) -> bool:
    """The word names layers by their kind, and no table; a head among them is a linear layer as any other."""
    return isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"
