"""Treat modules that share a base weight as a single module when adapting them (`ensure_weight_tying`).

Saved copies of tied modules share one parameter. A tied head uses the embedding's factors in transposed form, and a
second tied embedding uses them unchanged. Trainable token rows are tied in `vocabulary`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.factor import FactorWeight
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.layers.modules_to_save import ModulesToSave
from lorakit.core.model.index import AdapterIndex, embedding_of, identity
from lorakit.core.variants import variants_of
from lorakit.errors import ConfigError
from lorakit.targets.resolving import ALL_LINEAR, Match, Note, Resolution

TIED = "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter"
"""Start of the note about tied modules that are adapted separately; programs search PEFT's warnings for this text."""

LEFT_ALONE, NOTHING_TIED = "left_alone", "nothing_tied"
"""Kinds of notes about weight tying."""


class TiedWeight(FactorWeight):
    """The A or B of a head that is tied to an embedding: the transposed B or A of the embedding.

    `weight`, A (r, in) or B (out, r), is computed from the embedding's current factors on every access.
    """

    def __init__(self, leader: LoraLayer, name: str, part: str) -> None:
        nn.Module.__init__(self)
        self.leader = (leader,)  # kept in a tuple so that it is not registered as a submodule
        self.name, self.part = name, part
        self.register_parameter("bias", None)
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The head's A (r, in) or B (out, r); gradients flow to the embedding's B or A."""
        factor = self.leader[0].factor(self.name)
        return (factor.B if self.part == "A" else factor.A).T


def with_ties(index: AdapterIndex, config: LoraConfig, resolution: Resolution) -> tuple[Resolution, dict[str, str]]:
    """Return the modules that a config names and, if `ensure_weight_tying` is set, the modules tied to them.

    Returns:
        The modules, and a mapping from the path of each tied module to that of its embedding. Without
        `ensure_weight_tying`, the mapping is empty, and the result's notes list the ties that the adapter breaks.

    Raises:
        ConfigError: The tied modules cannot be adapted as one module.
    """
    # "all-linear" selects layers by type and excludes embeddings, so it treats a tied head as a linear layer
    is_all_linear = isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR
    named = {*resolution.saved, *(() if is_all_linear else (match.path for match in resolution.matches))}
    groups = tied_groups(index, named)
    if not config.ensure_weight_tying:
        return dataclasses.replace(resolution, notes=(*resolution.notes, *_left_alone(groups, named))), {}
    leaders: dict[str, str] = {}
    saved, matches = list(resolution.saved), list(resolution.matches)
    for leader, partners in groups.items():
        leaders |= dict.fromkeys(partners, leader)
        if any(path in resolution.saved for path in (leader, *partners)):
            saved += [path for path in (leader, *partners) if path not in saved]
            matches = [match for match in matches if match.path not in (leader, *partners)]
        else:
            matches = _tied_matches(index, config, matches, leader, partners)
    notes = list(resolution.notes)
    embedding = input_embedding(index) if index.is_tied else None
    is_tied = embedding is not None and bool(sharers(index, embedding))
    if not leaders and not (config.trainable_token_indices and is_tied):
        reason = "no tied modules are added in either `modules_to_save` or `target_modules`"
        reason = reason if is_tied else "no tied modules were found in the model"
        notes.append(Note(NOTHING_TIED, f"You have requested `ensure_weight_tying`, but {reason}."))
    order = {path: number for number, path in enumerate(index.modules)}
    saved.sort(key=order.__getitem__)
    return dataclasses.replace(resolution, saved=tuple(saved), matches=tuple(matches), notes=tuple(notes)), leaders


def tied_groups(index: AdapterIndex, paths: Collection[str]) -> dict[str, list[str]]:
    """Return the path of each embedding -> the modules tied to it, for groups with at least one of the given paths.

    The dict is empty if the model's config says that the embeddings are not tied.
    """
    groups: dict[str, list[str]] = {}
    for whole in shared_weights(index) if index.is_tied else ():
        if any(path in whole for path in paths):
            leader = next((p for p in whole if isinstance(table_at(index, p), nn.Embedding)), None)
            if leader is not None:  # None if no embedding shares the weight
                groups[leader] = [p for p in whole if p != leader]
    return groups


def tie_copies(copies: Mapping[str, nn.Module], embeddings: Mapping[str, str]) -> None:
    """Make an adapter's saved copies of tied modules share one weight, given the path of each one's embedding."""
    for path, embedding in embeddings.items():
        if path in copies and embedding in copies:
            copies[path]._parameters["weight"] = copies[embedding]._parameters["weight"]


def tie_factors(index: AdapterIndex, name: str, embeddings: Mapping[str, str]) -> None:
    """Replace the factors of tied modules with those of their embeddings; all layers must already be in the model."""
    for path, embedding in embeddings.items():
        layer, leading = index.modules[path], index.modules[embedding]
        if not (isinstance(layer, LoraLayer) and isinstance(leading, LoraLayer) and name in layer.r.keys() & leading.r):
            continue
        if layer.kind.names == leading.kind.names:
            for attribute in layer.kind.names:
                getattr(layer, attribute)[name] = getattr(leading, attribute)[name]
        else:
            layer.lora_A[name] = TiedWeight(leading, name, "A").train(layer.training)
            layer.lora_B[name] = TiedWeight(leading, name, "B").train(layer.training)


def _tied_matches(
    index: AdapterIndex, config: LoraConfig, matches: Sequence[Match], leader: str, partners: Sequence[str]
) -> list[Match]:
    """Extend the matches so that every module in a tied group matches, with the same rank and alpha throughout."""
    own = next((variant for variant in variants_of(config) if variant.parts.extras), None)
    if own is not None:
        text = (
            f"ensure_weight_tying ties the factors of {leader} and {partners[0]}, but {own.field} gives each module a "
            f"separate tensor ({own.parts.extras[0].held_as}). Turn off one of the two options, or adapt only one of "
            "the modules, without ensure_weight_tying."
        )
        raise ConfigError(text, where=leader, field=own.field)
    kinds = {candidate.path: candidate.kind for candidate in index.candidates}
    members = (leader, *partners)
    here = [match for match in matches if match.path in members]
    model = next((match for match in here if match.path == leader), here[0])
    odd = [path for path in partners if not isinstance(index.base(path), (nn.Linear, nn.Embedding))]
    if not isinstance(index.base(leader), nn.Embedding) or odd:
        text = f"ensure_weight_tying: {(odd or [leader])[0]} is not an nn.Embedding or nn.Linear; do not target it."
        raise ConfigError(text, where=(odd or [leader])[0], field="ensure_weight_tying")
    others = [match for match in matches if match.path not in members]
    return others + [dataclasses.replace(model, path=path, kind=kinds[path] or "") for path in members]


def _left_alone(groups: Mapping[str, Sequence[str]], named: Collection[str]) -> list[Note]:
    notes = []
    for leader, partners in groups.items():
        whole = (leader, *partners)
        mine, others = [p for p in whole if p in named], [p for p in whole if p not in named]
        result = f"{others[0]} keeps the base weight" if others else f"{' and '.join(mine)} are trained separately"
        text = (
            f"{TIED}, but `ensure_weight_tying` is not set to True: {result}, so the modules are no longer tied once "
            "the adapter is merged."
        )
        notes.append(Note(LEFT_ALONE, text))
    return notes


def sharers(index: AdapterIndex, path: str) -> list[str]:
    """Return the paths of all other base modules that share a given module's weight parameter."""
    whole = next((group for group in shared_weights(index) if path in group), [])
    return [other for other in whole if other != path]


def shared_weights(index: AdapterIndex) -> list[list[str]]:
    """Return groups of paths, in model order, of base modules that share a weight parameter.

    Replicated layers (`layer_replication`) are left out: they share all parameters and are adapted separately.
    """
    groups: dict[int, dict[str, str]] = {}
    for path in index.modules:
        weight = table_at(index, path)._parameters.get("weight")
        if weight is not None:
            groups.setdefault(id(weight), {}).setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", path), path)
    return [list(paths.values()) for paths in groups.values() if len(paths) > 1]


def input_embedding(index: AdapterIndex) -> str | None:
    """Return the path of the model's input embedding in the plain base, or None if the model does not expose one."""
    module = embedding_of(index.model)
    paths = (path for path, here in index.modules.items() if module in (here, table_at(index, path)))
    return None if module is None else next(paths, None)


def table_at(index: AdapterIndex, path: str) -> nn.Module:
    """Return the base module at a path, without adapters."""
    module = index.modules[path]
    return module.original_module if isinstance(module, ModulesToSave) else index.base(path)


def leaders_of(index: AdapterIndex, names: Sequence[str]) -> dict[LoraLayer, LoraLayer]:
    """Map each layer that shares its weight and factors with an earlier layer to that earlier layer.

    Two layers match only if each of these adapters has factors in both layers or in neither.
    """
    owners: dict[int, LoraLayer] = {}  # id of a factor -> the first layer that uses it
    leaders = {}
    for _, layer in index.layers_of(names):
        leader = layer.leader_of(names)
        if not layer.kind.on_disk:  # embedding factors are bare parameters, which tied layers share
            factors = getattr(layer, layer.kind.names[0])
            first = {owners.setdefault(id(factors[name]), layer) for name in names if name in layer.r}
            leader = first.pop() if len(first) == 1 else None
        if leader is not None and leader is not layer and layer.is_one_with(leader, names):
            leaders[layer] = leader
    return leaders


def untied_copies(index: AdapterIndex, names: Collection[str]) -> list[tuple[str, str]]:
    """Return the saved modules whose copies would no longer share a weight with other modules after a merge.

    Each path comes with the weight's name in another module.
    """
    untied = []
    copies = dict(index.every(ModulesToSave))
    by_original = {id(saved.original_module): saved for saved in copies.values()}
    for path, saved in copies.items():
        for name in [name for name in names if name in saved.modules_to_save]:
            copy = saved.modules_to_save[name]._parameters.get("weight")
            for other, module in index.holders.get(identity(saved.original_module._parameters.get("weight")), ()):
                twin = by_original.get(id(module))
                copied = twin.modules_to_save[name] if twin is not None and name in twin.modules_to_save else None
                if module is not saved.original_module and (copied is None or copied._parameters["weight"] is not copy):
                    untied.append((path, other))
    return untied
