"""Residual bases: adapters whose init subtracts from the base weight, and their conversion to plain LoRA.

Such an adapter is trained on W − s·B₀·A₀, where B₀ and A₀ are its initial factors. On the original W it is exactly
plain LoRA of twice the rank. One adapter per site can have a residual base; the layer keeps the
original for `disable`, other adapters, `detach` and merges. Loading restores the residual without running an init,
unless the caller allows "recompute_init" for a file of another program, which has no initial factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.config import scale as lora_scale
from lorakit.core.factor import factor_dtype
from lorakit.core.files.adapter_folder import AdapterFiles
from lorakit.core.files.tensor_file import file_error, read_tensors
from lorakit.core.files.tensor_names import by_site
from lorakit.core.inits import Init, InitContext, init_named
from lorakit.core.kinds import Kind, WeightSpec
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.index import AdapterIndex, TargetWeight
from lorakit.core.quantization import weight_format_of
from lorakit.core.quantization.weight_format import NOT_WRITTEN
from lorakit.core.variants import moving_variant, variant_at
from lorakit.durable import JsonObject
from lorakit.errors import OVERRIDE, AdapterError, AdapterFileError, ConfigError
from lorakit.targets import Match

INIT_FIELDS = (
    "init_lora_weights",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "corda_config",
    "lora_ga_config",
)
"""Fields of a config that differ in its form as plain LoRA."""


def residual(kind: Kind, slot: WeightSpec, W: Tensor, factors: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """W − s·B·A, canonical (out, in) or in the kind's own shape.   [docs/math.md (60)]

    Args:
        kind: The kind of the site.
        slot: The geometry of its weight.
        W: Canonical, fp32 or wider.
        factors: A (r, in) and B (out, r).
        scale: s.
    """
    A, B = (factor.detach().to(device=W.device, dtype=W.dtype) for factor in factors)
    return W - kind.delta(slot, A, B) * scale


def as_plain(slot: WeightSpec, A: Tensor, B: Tensor, initial: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """[A; A₀] and [B | −B₀], whose product is B·A − B₀·A₀.   [docs/math.md (62)]

    Args:
        slot: The geometry of the weight.
        A: (r, in).
        B: (out, r).
        initial: A₀ and B₀, like A and B.

    Returns:
        (2r, in) and (out, 2r); kernels and experts in the layout of their kind.
    """
    A0, B0 = (factor.to(like) for factor, like in zip(initial, (A, B), strict=True))
    E = max(slot.experts, 1)
    wide_A = torch.cat([A.reshape(E, -1, *A.shape[1:]), A0.reshape(E, -1, *A.shape[1:])], dim=1)
    if not slot.experts:
        return wide_A.flatten(0, 1), torch.cat([B, -B0], dim=1)
    wide_B = torch.cat([B.reshape(len(B), -1, E), -B0.reshape(len(B), -1, E)], dim=1)
    return wide_A.flatten(0, 1), wide_B.flatten(1)


def apart(slot: WeightSpec, A: Tensor, B: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Undo `as_plain`.

    Args:
        slot: The geometry of the weight.
        A: (2r, in).
        B: (out, 2r).

    Returns:
        A (r, in) and B (out, r); A₀ and B₀.
    """
    E = max(slot.experts, 1)
    A, A0 = (part.flatten(0, 1) for part in A.reshape(E, -1, *A.shape[1:]).chunk(2, dim=1))
    if slot.experts:
        B, B0 = (part.flatten(1) for part in B.reshape(len(B), -1, E).chunk(2, dim=1))
    else:
        B, B0 = B.chunk(2, dim=1)
    return (A.contiguous(), B.contiguous()), (A0.contiguous(), -B0.contiguous())


def plain_config(config: LoraConfig) -> LoraConfig:
    """Return the config of such an adapter as plain LoRA: twice the rank at the same scale.

    Args:
        config: Its config when it was attached; only read.
    """
    more = math.sqrt(2) if config.use_rslora else 2
    return config.with_fields(
        init_lora_weights=True,
        r=2 * config.r,
        lora_alpha=more * config.lora_alpha,
        rank_pattern={key: 2 * rank for key, rank in config.rank_pattern.items()},
        alpha_pattern={key: more * alpha for key, alpha in config.alpha_pattern.items()},
        loftq_config={},
        corda_config=None,
        lora_ga_config=None,
        eva_config=None,
    )


def beginning(config: LoraConfig) -> JsonObject:
    """Return the fields of a config that `plain_config` changes, as JSON values."""
    values = config.as_json()
    return {name: values[name] for name in INIT_FIELDS}


def init_context_for(
    index: AdapterIndex,
    config: LoraConfig,
    match: Match,
    place: TargetWeight,
    generators: Callable[[torch.device], torch.Generator | None] = lambda _: None,
    statistics: Mapping[str, Tensor] | None = None,
) -> InitContext:
    """Return the input of an init at a site.

    Args:
        index: The model's index.
        config: The adapter's config.
        match: The target match that names the site.
        place: The site.
        generators: Source of randomness by device.
        statistics: Statistics of the data at this site, name -> tensor (…), or None.
    """
    module, parameter = index.holder(place), place.slot.parameter
    variant, setting = variant_at(config, place.path)
    A_shape, B_shape = variant.shapes_of(place.kind, place.slot, match.rank, setting)
    device = weight_format_of(module, parameter).device(module, parameter)
    return InitContext(
        kind=place.kind,
        spec=place.slot,
        r=match.rank,
        scale=lora_scale(match.rank, match.alpha, config.use_rslora),
        A_shape=A_shape,
        B_shape=B_shape,
        device=device,
        dtype=factor_dtype(module, parameter),
        path=place.path,
        read=lambda: index.weight(place),
        config=config,
        generator=generators(device),
        statistics=statistics,
    )


def check_can_move(
    index: AdapterIndex, place: TargetWeight, init: Init | None = None, mover: str = "this init"
) -> None:
    """Check that a base weight can be replaced by a residual: not changed, merged into, shared or quantized already.

    Args:
        index: The model's index.
        place: The site.
        init: The init; None for an adapter from a file, and for a variant.
        mover: What messages call the cause.

    Raises:
        ConfigError: It cannot; the message says why, and what to do.
    """
    layer, module, parameter = index.layer(place), index.holder(place), place.slot.parameter
    weight_format = weight_format_of(module, parameter)
    if weight_format.device(module, parameter).type == "meta":
        raise ConfigError(
            f"{place.path}: {mover} changes the base weight, which has no values on the meta device. Load the base "
            "first, or leave the base alone (another init or variant).",
            where=place.path,
        )
    if layer is not None and (layer.moved_by or layer.merged_adapters):
        other = (*layer.moved_by, *layer.merged_adapters)[0]
        raise ConfigError(
            f"{place.path}: {mover} moves the base weight, which adapter {other!r} has moved or is merged into. Detach "
            "or unmerge it first, or leave the base alone (another init or variant).",
            what=other,
            where=place.path,
        )
    sharing = index.shared.get(id(module._parameters.get(parameter)), [])
    if sharing or len(index.parents.get(id(index.modules[place.outer]), ())) > 1:
        other = next((path for path in sharing if path != place.outer), "another module")
        raise ConfigError(
            f"{place.path} shares its weight with {other}, and {mover} would move it for both. Leave the module out, "
            "or leave the base alone (another init or variant).",
            what=other,
            where=place.path,
        )
    if not weight_format.written:
        raise ConfigError(NOT_WRITTEN.format(parameter=place.path, type=type(module).__name__))
    if init is not None and weight_format.quantized and not init.requantizes:
        raise ConfigError(
            f"{place.path}: init_lora_weights is {init.name!r}, which needs the weight in float32, float16 or "
            "bfloat16, and this one is quantised: what is left would be rounded a second time. Attach to the base as "
            "it was before it was quantised, or use True.",
            where=place.path,
        )


def moved_base(index: AdapterIndex, place: TargetWeight, factors: tuple[Tensor, Tensor], scale: float) -> Any:
    """Return the stored form of W − s·B·A at a site, with W the current base weight.

    Args:
        index: The model's index.
        place: The site.
        factors: A (r, in) and B (out, r).
        scale: s.
    """
    W = index.weight(place)
    return written(index, place, residual(place.kind, place.slot, W, factors, scale))


class MoveCost(NamedTuple):
    """Cost of a residual base at one site.

    Attributes:
        kept_bytes: Memory of the original weight and the initial factors, in bytes.
        lost: Relative error from rounding a quantized weight a second time; 0 for a plain one.
    """

    kept_bytes: int
    lost: float


UNMOVED = MoveCost(0, 0.0)
"""The cost at a site without a residual base."""


def cost_of(
    index: AdapterIndex, place: TargetWeight, moved: Any, initial: tuple[Tensor, Tensor] | None, scale: float
) -> MoveCost:
    """Return the cost of replacing a base weight.

    Args:
        index: The model's index.
        place: The site.
        moved: The new stored weight.
        initial: A (r, in) and B (out, r) if that is W − s·B·A, or None.
        scale: s.
    """
    base = weight_format_of(index.holder(place), place.slot.parameter)
    kept_bytes = sum(t.numel() * t.element_size() for t in (*base.tensors(moved), *(initial or ())))
    if not base.quantized or initial is None:
        return MoveCost(kept_bytes, 0.0)
    wanted = residual(place.kind, place.slot, index.weight(place), initial, scale)
    lost = torch.linalg.vector_norm(base.read(index.holder(place), moved) - wanted)
    return MoveCost(
        kept_bytes, float(lost / torch.linalg.vector_norm(wanted).clamp_min(torch.finfo(wanted.dtype).tiny))
    )


def written(index: AdapterIndex, place: TargetWeight, W: Tensor) -> Any:
    """Return the stored form of a canonical weight (out, in) at a site."""
    module, parameter = index.holder(place), place.slot.parameter
    base = weight_format_of(module, parameter, place.slot.as_stored)
    with torch.no_grad():
        return base.write(module, base.stored(module, parameter), W)


def give_base_back(layer: LoraLayer, adapter: str) -> None:
    """Restore the original weight of a layer with a residual base; merged adapters stay merged.

    Args:
        layer: A layer whose base was moved.
        adapter: An adapter for which it was; while others are left, the base stays moved.
    """
    layer.moved_by = tuple(name for name in layer.moved_by if name != adapter)
    if layer.moved_by:
        return
    layer.moved = layer.initial = None
    layer.place(layer.stored_with(layer.merged_adapters))
    if not layer.merged_adapters:
        layer.kept = None


Factors = tuple[Tensor, Tensor, int]


def check_plain(model: nn.Module | AdapterIndex, name: str) -> None:
    """Reject an adapter on a model that cannot be converted to plain LoRA on the original base.

    Args:
        model: The adapted model; only read.
        name: The adapter.

    Raises:
        AdapterError: Its init changed the base by more than a low-rank matrix.
    """
    index = AdapterIndex.of(model)
    config = index.known_state().configs[name]
    for path, layer in index.layers(name):
        if name in layer.moved_by and layer.initial is None:
            raise AdapterError(
                f"{path}: {mover_of(config)} changed the base by more than a product of low rank, so adapter {name!r} "
                "is not plain LoRA on the original. Merge it, or save the merged model with merged_state_dict.",
                what=name,
                where=path,
            )


def mover_of(config: LoraConfig) -> str:
    """Return what changes the base weight of an adapter's layers: its variant, or its init."""
    variant = moving_variant(config)
    return str(config.init_lora_weights) if variant is None else variant.title


def on_the_original(files: AdapterFiles, factors: Mapping[str, Factors]) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Return the factors of an adapter from disk as plain LoRA of twice the rank on the original base.

    Args:
        files: The adapter's files.
        factors: Path on disk -> A (r, in), B (out, r) and the number of experts that they hold, 0 if none.

    Returns:
        Path on disk -> A (2r, in) and B (out, 2r), or None if the factors are plain LoRA already.

    Raises:
        AdapterFileError: A variant changed the base of the factors, or an init did and the files do not say how, or
            that base was quantized.
    """
    variant = moving_variant(files.config)
    if variant is not None:
        raise AdapterFileError(
            f"{files.folder}: {variant.title} changed the base by more than a product of low rank, so this is no plain "
            "LoRA on the original. Load it onto its model, and merge it.",
            what=variant.title,
            where=files.folder,
            field=variant.field,
        )
    past = init_record_of(files.folder, files.config, files.sidecar.began if files.is_ours else {}, False, (RECOMPUTE,))
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
            raise file_error(files.folder, f"the first factors of {path} are missing or of another shape.")
        plain[path] = as_plain(WeightSpec("weight", B.shape[0], A.shape[1], experts=experts), A, B, first)
    return plain


RECOMPUTE = "recompute_init"
"""The entry of `allow` that lets a deterministic init run again."""


@dataclass(frozen=True)
class Moved:
    """The factors and the residual base of one site.

    Attributes:
        A: Trained factor, (r, in).
        B: Trained factor, (out, r).
        stored: The residual, in the format in which the base's module stores it.
        initial: A and B before training, or None if the residual does not follow from them.
    """

    A: Tensor
    B: Tensor
    stored: Any
    initial: tuple[Tensor, Tensor] | None


@dataclass(frozen=True)
class InitRecord:
    """The initial state of an adapter from a file.

    Attributes:
        config: The config to use: the file's, or the one before conversion to plain LoRA.
        sites: Path -> rank and alpha, if they differ from the file's.
        halves: The factors in the file are plain LoRA and contain the initial ones.
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
        """Return whether the adapter needs a residual base."""
        return self.halves or self.first is not None or self.init is not None

    def moved(
        self, index: AdapterIndex, place: TargetWeight, path: str, factors: tuple[Tensor, Tensor], match: Match
    ) -> Moved:
        """Return the factors and the residual base of a site.

        Args:
            index: The model's index.
            place: The site.
            path: Its path on disk.
            factors: Those of the file: A (r, in) and B (out, r), or (2r, in) and (out, 2r) in the form of plain LoRA.
            match: The site's path, and its rank and alpha in training.

        Raises:
            ConfigError: The base is changed or merged into already.
            AdapterFileError: Its first factors are missing.
        """
        A, B = factors
        scale = lora_scale(match.rank, match.alpha, self.config.use_rslora)
        check_can_move(index, place)
        if self.init is not None:
            with torch.no_grad():
                filled = self.init.fill(init_context_for(index, self.config, match, place))
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


def init_record_of(
    folder: Path, config: LoraConfig, began: Mapping[str, Any], trainable: bool, allow: Collection[str]
) -> InitRecord:
    """Return the initial state of an adapter from a file.

    Args:
        folder: Its directory.
        config: Its config in the file.
        began: Its initial state in a trusted `lorakit.json`; empty otherwise.
        trainable: Its training will continue; plain LoRA is then converted back.
        allow: "recompute_init" lets a deterministic init run again.

    Raises:
        AdapterFileError: The residual base is not in the files and may not be recomputed, or a file is damaged.
    """
    if began.get("file"):
        return InitRecord(config, {}, first=_first_factors(folder / str(began["file"]), str(began.get("sha256"))))
    init = _init_of(config)
    if began and init is None:
        return (
            InitRecord(_initial_config(folder, config, began), began["sites"], halves=True)
            if trainable
            else InitRecord(config, {})
        )
    if init is None:
        return InitRecord(config, {})
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
    return InitRecord(config, {}, init=init)


def _init_of(config: LoraConfig) -> Init | None:
    """Return the init of a config if it changes the base, or None."""
    try:
        init = init_named(config.init_lora_weights)
    except ConfigError:  # an init of another program, whose factors are used unchanged
        return None
    return init if init.changes_base else None


def _initial_config(folder: Path, config: LoraConfig, began: Mapping[str, Any]) -> LoraConfig:
    known = {name: value for name, value in vars(config).items() if name in LoraConfig.__dataclass_fields__}
    try:
        return LoraConfig(**{**known, **{name: began[name] for name in INIT_FIELDS}})
    except (KeyError, ValueError, TypeError) as cause:
        raise file_error(folder, f"lorakit.json does not say how the adapter began ({cause}).") from None


def _first_factors(path: Path, sha256: str) -> dict[str, tuple[Tensor, Tensor]]:
    file = read_tensors(path)
    if file.sha256 != sha256:
        raise file_error(path, "damaged, or of another adapter: its SHA-256 is not the one in lorakit.json.")
    sites = by_site(file.tensors).items()
    return {path: (found["A"], found["B"]) for path, found in sites if {"A", "B"} <= set(found)}
