"""A saved adapter whose init moved the base: what its file says of that, and the base moved again, without an init.

Loading runs no init, unless a caller allows "recompute_init" for a file of another program, which holds the factors
alone and not what they began as. Knows one file and one map of a model; nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.config import scale as lora_scale
from lorakit.core.files.keys import parse
from lorakit.core.files.tensorfile import read_tensors
from lorakit.core.inits import Init, init_named
from lorakit.core.layering.sitemap import Place, SiteMap
from lorakit.core.making.fresh import blank_for
from lorakit.core.making.moving import check_can_move, moved_base, written
from lorakit.core.making.residual import AGAIN, apart
from lorakit.errors import AdapterFileError, ConfigError
from lorakit.targets import Match

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

    def moved(self, site_map: SiteMap, place: Place, path: str, factors: tuple[Tensor, Tensor], match: Match) -> Moved:
        """What to put at a site.

        Args:
            site_map: The model's map.
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
        check_can_move(site_map, place)
        if self.init is not None:
            with torch.no_grad():
                filled = self.init.fill(blank_for(site_map, self.config, match, place))
            if filled.W is not None:
                return Moved(A, B, written(site_map, place, filled.W), None)
            return Moved(A, B, moved_base(site_map, place, (filled.A, filled.B), scale), (filled.A, filled.B))
        if self.halves:
            (A, B), initial = apart(place.slot, A, B)
        else:
            first = (self.first or {}).get(path)
            if first is None or first[0].shape != A.shape or first[1].shape != B.shape:
                raise AdapterFileError(f"The first factors of {path} are missing or of another shape.")
            initial = (first[0].to(A), first[1].to(B))
        return Moved(A, B, moved_base(site_map, place, initial, scale), initial)


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
            "hand is the changed one, set init_lora_weights to true in its config."
        )
    if RECOMPUTE not in allow:
        raise AdapterFileError(
            f"{named}, and loading runs no init. Have the adapter saved as plain LoRA (in PEFT: save_pretrained with "
            f"path_initial_model_for_weight_conversion; here: save_adapter), or allow {RECOMPUTE!r} to change this "
            "base in the same way. If the base at hand is the changed one, set init_lora_weights to true in its config."
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
        raise AdapterFileError(f"{folder}: lorakit.json does not say how the adapter began ({cause}).") from None


def vars_of(config: LoraConfig) -> dict[str, Any]:
    """The fields of a config that its class takes."""
    return {name: value for name, value in vars(config).items() if name in LoraConfig.__dataclass_fields__}


def _first_factors(path: Path, sha256: str) -> dict[str, tuple[Tensor, Tensor]]:
    file = read_tensors(path)
    if file.sha256 != sha256:
        raise AdapterFileError(f"{path}: damaged, or of another adapter: its SHA-256 is not the one in lorakit.json.")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in file.tensors.items():
        key = parse(name)
        if key is not None:
            parts.setdefault(key.path, {})[key.part] = tensor
    return {path: (found["A"], found["B"]) for path, found in parts.items() if {"A", "B"} <= set(found)}
