"""Loose adapters whose init moved the base: as plain LoRA of twice the rank on the original, or refused.

An operation that took such factors for those of a plain adapter would be wrong in silence: they act on another weight.

A saved adapter whose init moved the base: what its file says of that, and the base moved again, without an init.

Loading runs no init, unless a caller allows "recompute_init" for a file of another program, which holds the factors
alone and not what they began as. Knows one file and one map of a model; nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.config import scale as lora_scale
from lorakit.core.attachment.build import blank_for
from lorakit.core.attachment.residual_base import AGAIN, apart, as_plain, check_can_move, moved_base, written
from lorakit.core.files.adapter_folder import AdapterFiles
from lorakit.core.files.tensor_file import read_tensors
from lorakit.core.files.tensor_names import parse
from lorakit.core.inits import Init, init_named
from lorakit.core.kinds import Slot
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import AdapterIndex, Place
from lorakit.core.variants import variant_named
from lorakit.errors import OVERRIDE, AdapterError, AdapterFileError, ConfigError
from lorakit.targets import Match

Factors = tuple[Tensor, Tensor, int]


def check_plain(model: nn.Module | AdapterIndex, name: str) -> None:
    """Refuse an adapter on a model that no plain LoRA on the original base is.

    Args:
        model: The adapted model; only read.
        name: The adapter.

    Raises:
        AdapterError: Its init changed the base by more than a product of low rank.
    """
    index = AdapterIndex.of(model)
    config = index.known_state().configs[name]
    for path, layer in index.layers(name):
        if layer.moved_by == name and layer.initial is None:
            raise AdapterError(
                f"{path}: {_mover(config, layer, name)} changed the base by more than a product of "
                f"low rank, so adapter {name!r} is no plain LoRA on the original: its factors alone do not say what it "
                "does. Merge it, or write what it makes of the model with merged_state_dict.",
                where=path,
            )


def _mover(config: LoraConfig, layer: LoraLayer, name: str) -> str:
    """Return what moved the base of an adapter's site: its variant, or its init."""
    variant = variant_named(layer.variant[name])
    return str(config.init_lora_weights) if variant.move is None else variant.title


def on_the_original(files: AdapterFiles, factors: Mapping[str, Factors]) -> dict[str, tuple[Tensor, Tensor]] | None:
    """The factors of an adapter from disk as plain LoRA of twice the rank on the original base.

    Args:
        files: What was read.
        factors: Path on disk -> A (r, in), B (out, r) and the number of experts side by side in them, 0 where there are
            none, as it lies there.

    Returns:
        Path on disk -> A (2r, in) and B (out, 2r), or None where it is plain LoRA as it lies there.

    Raises:
        AdapterFileError: The factors act on a base that an init changed, and the folder does not say how, or that base
            was quantised.
    """
    past = past_of(files.folder, files.config, files.sidecar.began if files.is_ours else {}, False, (RECOMPUTE,))
    if not past.moves:
        return None
    said = f"{files.folder}: init_lora_weights is {files.config.init_lora_weights!r}: the factors act on a base that it"
    if past.first is None:
        raise AdapterFileError(
            f"{said} changed, and the folder does not say how. Load it with allow=['recompute_init'] and save it with "
            "save_adapter, or, in PEFT, with path_initial_model_for_weight_conversion. If the base at hand is the "
            "changed one, set init_lora_weights to true in its config."
        )
    if files.sidecar.base is not None and files.sidecar.base.bounds:
        raise AdapterFileError(
            f"{said} changed while it was quantised, so it was rounded a second time, and this is no plain LoRA on the "
            "original. Merge it instead."
        )
    plain = {}
    for path, (A, B, experts) in factors.items():
        first = past.first.get(path)
        if first is None or (first[0].shape, first[1].shape) != (A.shape, B.shape):
            raise AdapterFileError(
                f"{files.folder}: the first factors of {path} are missing or of another shape.", where=files.folder
            )
        plain[path] = as_plain(Slot("weight", B.shape[0], A.shape[1], experts=experts), A, B, first)
    return plain


RECOMPUTE = "recompute_init"
"""The word in `allow` that lets a deterministic init run again."""


@dataclass(frozen=True)
class Moved:
    """One site of such an adapter.

    Attributes:
        A: (r, in), as it was trained.
        B: (out, r).
        stored: What the base's module shall store.
        initial: A and B before training, or None where they say nothing of the base.
    """

    A: Tensor
    B: Tensor
    stored: Any
    initial: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class Past:
    """How an adapter from a file began.

    Attributes:
        config: The config to go on with: the file's, or the one before it was written as plain LoRA.
        sites: Path -> rank and alpha, where they are other than the file's.
        halves: The factors on file are those of plain LoRA and come apart.
        first: Path -> A and B before training, from their own file.
        init: The init to run again, or None.
    """

    config: LoraConfig
    sites: Mapping[str, Mapping[str, Any]]
    halves: bool = False
    first: Mapping[str, tuple[Tensor, Tensor]] | None = None
    init: Init | None = None

    @property
    def moves(self) -> bool:
        """Whether the base is moved for it."""
        return self.halves or self.first is not None or self.init is not None

    def moved(
        self, index: AdapterIndex, place: Place, path: str, factors: tuple[Tensor, Tensor], match: Match
    ) -> Moved:
        """What to put at a site.

        Args:
            index: The model's map.
            place: The site.
            path: Its path on disk.
            factors: As on file: A (r, in), or (2r, in) in the form of plain LoRA, and B (out, r) or (out, 2r).
            match: The site's path, rank and alpha as it was trained.

        Raises:
            ConfigError: The base is moved or merged into already.
            AdapterFileError: Its first factors are missing.
        """
        A, B = factors
        scale = lora_scale(match.rank, match.alpha, self.config.use_rslora)
        check_can_move(index, place)
        if self.init is not None:
            with torch.no_grad():
                filled = self.init.fill(blank_for(index, self.config, match, place))
            if filled.W is not None:
                return Moved(A, B, written(index, place, filled.W), None)
            return Moved(A, B, moved_base(index, place, (filled.A, filled.B), scale), (filled.A, filled.B))
        if self.halves:
            (A, B), initial = apart(place.slot, A, B)
        else:
            first = (self.first or {}).get(path)
            if first is None or first[0].shape != A.shape or first[1].shape != B.shape:
                raise AdapterFileError(f"The first factors of {path} are missing or of another shape.")
            initial = (first[0].to(A), first[1].to(B))
        return Moved(A, B, moved_base(index, place, initial, scale), initial)


def past_of(
    folder: Path, config: LoraConfig, began: Mapping[str, Any], trainable: bool, allow: Collection[str]
) -> Past:
    """How an adapter began.

    Args:
        folder: Its folder.
        config: Its config on file.
        began: What a trusted `lorakit.json` says of it; empty otherwise.
        trainable: It is trained on; one in the form of plain LoRA then becomes what it was.
        allow: "recompute_init" lets a deterministic init run again.

    Raises:
        AdapterFileError: The file sits on a base that it does not hold and that may not be made again, or is damaged.
    """
    if began.get("file"):
        return Past(config, {}, first=_first_factors(folder / str(began["file"]), str(began.get("sha256"))))
    init = _init_of(config)
    if began and init is None:
        return Past(_as_it_was(folder, config, began), began["sites"], halves=True) if trainable else Past(config, {})
    if init is None:
        return Past(config, {})
    named = f"{folder}: init_lora_weights is {config.init_lora_weights!r}: the factors act on a base that it changed"
    if init.needs:
        raise AdapterFileError(
            f"{named} by looking at data, and the file does not hold it. Have the adapter saved as plain LoRA (in "
            "PEFT: save_pretrained with path_initial_model_for_weight_conversion; here: save_adapter). If the base at "
            "hand is the changed one, set init_lora_weights to true in its config.",
            what=config.init_lora_weights,
            where=folder,
            field="init_lora_weights",
        )
    if RECOMPUTE not in allow:
        raise AdapterFileError(
            f"{named}, and loading runs no init.",
            advice="Have the adapter saved as plain LoRA (in PEFT: save_pretrained with "
            f"path_initial_model_for_weight_conversion; here: save_adapter), or {OVERRIDE} to change this base in the "
            "same way. If the base at hand is the changed one, set init_lora_weights to true in its config.",
            what=config.init_lora_weights,
            where=folder,
            field="init_lora_weights",
            override=RECOMPUTE,
        )
    return Past(config, {}, init=init)


def _init_of(config: LoraConfig) -> Init | None:
    """The init of a config that changes the base, or None."""
    try:
        init = init_named(config.init_lora_weights)
    except ConfigError:  # one of another program, whose factors are read as they are
        return None
    return init if init.changes_base else None


def _as_it_was(folder: Path, config: LoraConfig, began: Mapping[str, Any]) -> LoraConfig:
    try:
        return LoraConfig(**{**vars_of(config), **{name: began[name] for name in AGAIN}})
    except (KeyError, ValueError, TypeError) as cause:
        raise AdapterFileError(
            f"{folder}: lorakit.json does not say how the adapter began ({cause}).", where=folder
        ) from None


def vars_of(config: LoraConfig) -> dict[str, Any]:
    """The fields of a config that its class takes."""
    return {name: value for name, value in vars(config).items() if name in LoraConfig.__dataclass_fields__}


def _first_factors(path: Path, sha256: str) -> dict[str, tuple[Tensor, Tensor]]:
    file = read_tensors(path)
    if file.sha256 != sha256:
        raise AdapterFileError(
            f"{path}: damaged, or of another adapter: its SHA-256 is not the one in lorakit.json.", where=path
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        key = parse(name)
        if key is not None:
            parts.setdefault(key.path, {})[key.part] = tensor
    return {path: (found["A"], found["B"]) for path, found in parts.items() if {"A", "B"} <= set(found)}
