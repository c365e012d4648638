"""Handle adapters with a residual base (the base weight minus the initial update), and convert them to plain LoRA.

Such an adapter is trained on W − s·B₀·A₀, where B₀ and A₀ are its initial factors. On the original W, the adapter is
exactly equivalent to plain LoRA with twice the rank. Only one adapter per site can have a residual base; the layer
keeps the original weight for `disable`, other adapters, `detach` and merges. Loading restores the residual base without
running an init, unless the caller allows "recompute_init" for a file that another program wrote without the initial
factors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.config import scale as lora_scale
from lorakit.core.factor import factor_dtype
from lorakit.core.files.adapter_folder import AdapterFiles
from lorakit.core.files.tensors import by_site, read_tensors
from lorakit.core.inits import Init, InitContext, fresh_bias, known_init
from lorakit.core.kinds import Kind, WeightSpec
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.checks import check_can_move
from lorakit.core.model.index import AdapterIndex, TargetWeight
from lorakit.core.quantization import Stored, weight_format_of
from lorakit.core.variants import moving_variant, variant_at
from lorakit.durable import JsonObject
from lorakit.errors import OVERRIDE, AdapterError, AdapterFileError
from lorakit.targets.resolving import Match
from lorakit.tensor_headers import file_error

INIT_FIELDS = (
    "init_lora_weights",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "corda_config",
    "lora_ga_config",
)
"""Config fields that change when an adapter is converted to plain LoRA."""


def residual(kind: Kind, spec: WeightSpec, W: Tensor, factors: tuple[Tensor, Tensor], scale: float) -> Tensor:
    """Return W − s·B·A in the site kind's canonical form, usually (out, in).   [docs/math.md (60)]

    W is the base weight in that form, in fp32 or wider, and the factors are A (r, in) and B (out, r).
    """
    A, B = (factor.detach().to(device=W.device, dtype=W.dtype) for factor in factors)
    return W - kind.delta(spec, A, B) * scale


def as_plain(spec: WeightSpec, A: Tensor, B: Tensor, initial: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return [A; A₀] (2r, in) and [B | −B₀] (out, 2r), whose product is B·A − B₀·A₀.   [docs/math.md (62)]

    A is (r, in), and B (out, r). Convolution kernels and experts keep the layout of their kind.
    """
    A0, B0 = (factor.to(like) for factor, like in zip(initial, (A, B), strict=True))
    E = max(spec.experts, 1)
    wide_A = torch.cat([A.unflatten(0, (E, -1)), A0.unflatten(0, (E, -1))], dim=1)
    wide_B = torch.cat([B.unflatten(1, (-1, E)), -B0.unflatten(1, (-1, E))], dim=1)
    return wide_A.flatten(0, 1), wide_B.flatten(1, 2)


def apart(spec: WeightSpec, A: Tensor, B: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Separate A (2r, in) and B (out, 2r) of `as_plain` into the trained (r, in) and (out, r), and the initial pair."""
    E = max(spec.experts, 1)
    A, A0 = (part.flatten(0, 1).contiguous() for part in A.unflatten(0, (E, -1)).chunk(2, dim=1))
    B, B0 = (part.flatten(1, 2).contiguous() for part in B.unflatten(1, (-1, E)).chunk(2, dim=1))
    return (A, B), (A0, -B0)


def plain_config(config: LoraConfig) -> LoraConfig:
    """Return the plain LoRA config for an adapter with a residual base, with twice the rank and the same scale."""
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


def init_context_for(
    index: AdapterIndex,
    config: LoraConfig,
    match: Match,
    target: TargetWeight,
    generators: Callable[[torch.device], torch.Generator | None] = lambda _: None,
    statistics: Mapping[str, Tensor] | None = None,
) -> InitContext:
    """Return what an init needs at a site.

    `generators` maps a device to a random generator, or to None for torch's default generator; `statistics` has the
    site's data statistics by name, of any shape.
    """
    module, parameter = index.holder(target), target.spec.parameter
    variant, setting = variant_at(config, target.path)
    A_shape, B_shape = variant.shapes_of(target.kind, target.spec, match.rank, setting, target.path)
    device = weight_format_of(module, parameter).device(module, parameter)
    return InitContext(
        kind=target.kind,
        spec=target.spec,
        r=match.rank,
        scale=lora_scale(match.rank, match.alpha, config.use_rslora),
        A_shape=A_shape,
        B_shape=B_shape,
        device=device,
        dtype=factor_dtype(module, parameter),
        path=target.path,
        read=lambda: index.weight(target),
        config=config,
        generator=generators(device),
        statistics=statistics,
    )


def residual_of(index: AdapterIndex, target: TargetWeight, factors: tuple[Tensor, Tensor], scale: float) -> Stored:
    """Return W − s·B·A, in stored form, for the current weight W of a site, A (r, in), B (out, r) and the scale s."""
    return in_stored_form(index, target, residual(target.kind, target.spec, index.weight(target), factors, scale))


def in_stored_form(index: AdapterIndex, target: TargetWeight, W: Tensor) -> Stored:
    """Return a canonical weight (out, in) in the storage format of a site's module."""
    module, parameter = index.holder(target), target.spec.parameter
    base = weight_format_of(module, parameter, target.spec.as_stored)
    with torch.no_grad():
        written: Stored = base.write(module, base.stored(module, parameter), W)
    return written


def give_base_back(layer: LoraLayer, adapter: str) -> None:
    """Restore the original weight of a layer unless adapters other than this one need its residual base.

    Merged adapters stay merged.
    """
    layer.moved_by = tuple(name for name in layer.moved_by if name != adapter)
    if layer.moved_by:
        return
    layer.moved = layer.initial = None
    layer.put_stored(layer.stored_with(layer.merged_adapters))
    if not layer.merged_adapters:
        layer.kept = None


Factors = tuple[Tensor, Tensor, int]


def check_plain(layers: Iterable[tuple[str, LoraLayer]], name: str, config: LoraConfig) -> None:
    """Raise an AdapterError if an adapter is not plain LoRA on the original base, given its layers and their paths.

    Its init or variant then changed a weight by more than a low-rank product, or the changed weight was requantized.
    """
    for path, layer in layers:
        if name in layer.moved_by and (layer.initial is None or layer.base.quantized):
            rounded = "a quantized weight, which had to be requantized"
            what = "the base by more than a low-rank product" if layer.initial is None else rounded
            text = (
                f"{path}: {mover_of(config)} changed {what}, so adapter {name!r} is not plain LoRA on the original "
                "base. Use `save_as_trained`, merge the adapter, or save the result of merged_state_dict."
            )
            raise AdapterError(text, what=name, where=path)


def mover_of(config: LoraConfig) -> str:
    """Return the name of the variant or initialization method with which an adapter changes base weights."""
    variant = moving_variant(config)
    return str(config.init_lora_weights) if variant is None else variant.title


def on_the_original(files: AdapterFiles, factors: Mapping[str, Factors]) -> dict[str, tuple[Tensor, Tensor]] | None:
    """Convert the factors of an adapter on disk to plain LoRA with twice the rank on the original base.

    Args:
        files: The adapter's files.
        factors: Path on disk -> A (r, in), B (out, r) and the number of experts (0 for a single matrix).

    Returns:
        Path on disk -> A (2r, in) and B (out, 2r), or None if the factors are already plain LoRA.

    Raises:
        AdapterFileError: A variant changed the base; or the initialization did, and either the files do not say how
            or the base was quantized.
    """
    variant = moving_variant(files.config)
    if variant is not None:
        text = f"{files.folder}: {variant.title} changed the base by more than a low-rank product; merge the adapter."
        raise AdapterFileError(text, what=variant.title, where=files.folder, field=variant.field)
    past = init_record_of(files, False, (RECOMPUTE,))
    if not past.moves:
        return None
    if past.first is None:
        why = ", and the directory does not say how"
        raise _base_changed(files, why, advice="Load the adapter with allow=['recompute_init'], and save it.")
    if files.sidecar.base is not None and files.sidecar.base.bounds:
        advice = "The changed weights had to be requantized, so merge the adapter instead of using it as plain LoRA."
        raise _base_changed(files, " while the base was quantized", advice=advice)
    plain = {}
    for path, (A, B, experts) in factors.items():
        first = past.first_at(path, A, B)
        plain[path] = as_plain(WeightSpec("weight", B.shape[0], A.shape[1], experts=experts), A, B, first)
    return plain


RECOMPUTE = "recompute_init"
"""The entry in `allow` that permits rerunning a deterministic initialization."""


@dataclass(frozen=True)
class SiteStart:
    """The tensors from which a site's factors are built, taken from an initialization method or a file.

    Attributes:
        A: (r, in), like B (out, r) and the bias (out,) of B, if there is one.
        own: `OwnTensor.held_as` -> extra tensor (…) that the variant uses; other entries are ignored. If None, the
            extra tensors are initialized.
        stored: The residual base in the base module's storage format, or None if the base is unchanged.
        initial: A and B before training if the residual base is W − s·B·A, otherwise None.
    """

    A: Tensor
    B: Tensor
    bias: Tensor | None = None
    own: Mapping[str, Tensor] | None = None
    stored: Stored | None = None
    initial: tuple[Tensor, Tensor] | None = None


def initialized(index: AdapterIndex, target: TargetWeight, init: Init, context: InitContext) -> SiteStart:
    """Run an init at a site that supports it, else raise a ConfigError, without changing the model."""
    with torch.no_grad():
        result = init.fill(context)
    bias = fresh_bias(context, not init.is_identity) if context.config.lora_bias else None
    start = SiteStart(result.A, result.B, bias)
    if result.W is not None:
        return dataclasses.replace(start, stored=in_stored_form(index, target, result.W))
    if not init.changes_base:
        return start
    initial = (result.A, result.B)
    return dataclasses.replace(start, stored=residual_of(index, target, initial, context.scale), initial=initial)


@dataclass(frozen=True)
class InitRecord:
    """The initial state of an adapter that was read from files, as it was before training.

    Attributes:
        config: The config in the file or, if the adapter is converted back from plain LoRA, its original config.
        sites: Path of a site -> rank and alpha, if they differ from those in the file.
        is_doubled: Whether the factors in the file are plain LoRA with twice the rank and contain the initial factors.
        first: Path of a site -> A and B before training, read from a separate file; or None.
        init: The initialization method to rerun, or None.
    """

    folder: Path
    config: LoraConfig
    sites: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    is_doubled: bool = False
    first: Mapping[str, tuple[Tensor, Tensor]] | None = None
    init: Init | None = None

    @property
    def moves(self) -> bool:
        """True if the adapter needs a residual base."""
        return self.is_doubled or self.first is not None or self.init is not None

    def start(
        self, index: AdapterIndex, target: TargetWeight, context: InitContext, tensors: Mapping[str, Tensor]
    ) -> SiteStart:
        """Return the tensors from which to build a site's factors, given the tensors in the file.

        These are A (r, in) and B (out, r), or (2r, in) and (out, 2r) if saved as plain LoRA; also "bias" (out,) and the
        variant's extra tensors (…), if there are any. The context has the site's rank and scale during training.

        Raises:
            ConfigError: A residual weight cannot replace the base weight (see `check_can_move`).
            AdapterFileError: The site's initial factors are missing.
        """
        A, B = tensors["A"], tensors["B"]
        plain = SiteStart(A, B, tensors.get("bias"), tensors)
        if not self.moves:
            return plain
        check_can_move(index, target)
        if self.init is not None:
            again = initialized(index, target, self.init, context)
            return dataclasses.replace(plain, stored=again.stored, initial=again.initial)
        if self.is_doubled:
            (A, B), initial = apart(target.spec, A, B)
        else:
            first = self.first_at(target.path, A, B)
            initial = (first[0].to(A), first[1].to(B))
        stored = residual_of(index, target, initial, context.scale)
        return dataclasses.replace(plain, A=A, B=B, stored=stored, initial=initial)

    def first_at(self, path: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """Return a site's initial A (r, in) and B (out, r) from their file, which must have them."""
        initial = (self.first or {}).get(path)
        if initial is None or (initial[0].shape, initial[1].shape) != (A.shape, B.shape):
            raise file_error(self.folder, f"the initial factors of {path} are missing, or their shapes differ.")
        return initial


def init_record_of(files: AdapterFiles, trainable: bool, allow: Collection[str]) -> InitRecord:
    """Return the initial state of an adapter that was read from files, if `lorakit.json` describes these files.

    If training will continue, an adapter converted to plain LoRA is converted back. "recompute_init" in `allow` permits
    rerunning a deterministic initialization.

    Raises:
        AdapterFileError: A file is damaged, or lacks the residual base, and recomputing it is not allowed.
    """
    folder, config = files.folder, files.config
    began = files.sidecar.began if files.is_ours else {}
    if began.get("file"):
        return InitRecord(folder, config, first=_first_factors(folder / str(began["file"]), str(began.get("sha256"))))
    init = known_init(config)
    if init is None or not init.changes_base:
        if began and trainable:
            return InitRecord(folder, _initial_config(folder, config, began), began["sites"], is_doubled=True)
        return InitRecord(folder, config)
    if init.needs:
        raise _base_changed(files, " using data, and the file does not contain the changed base")
    if RECOMPUTE not in allow:
        raise _base_changed(files, ", and loading does not run inits", RECOMPUTE)
    return InitRecord(folder, config, init=init)


def _base_changed(files: AdapterFiles, why: str, override: str | None = None, advice: str = "") -> AdapterFileError:
    """Return the error for factors that apply to a base that an init changed, which is not known."""
    init = files.config.init_lora_weights
    or_allow = "" if override is None else f", or {OVERRIDE} to change this base in the same way"
    return AdapterFileError(
        f"{files.folder}: init_lora_weights is {init!r}: the factors apply to a base that this init changed{why}.",
        advice=advice
        or "Save the adapter as plain LoRA (in PEFT: save_pretrained with path_initial_model_for_weight_conversion; in "
        f"lorakit: save_adapter){or_allow}. If your base already contains the change, set init_lora_weights to true in "
        "the adapter's config.",
        what=init,
        where=files.folder,
        field="init_lora_weights",
        override=override,
    )


def _initial_config(folder: Path, config: LoraConfig, began: JsonObject) -> LoraConfig:
    try:
        return dataclasses.replace(config, **{name: began[name] for name in INIT_FIELDS})
    except (KeyError, ValueError, TypeError) as cause:
        raise file_error(folder, f"lorakit.json does not contain the adapter's initial config ({cause}).") from None


def _first_factors(path: Path, sha256: str) -> dict[str, tuple[Tensor, Tensor]]:
    file = read_tensors(path)
    if file.sha256 != sha256:
        raise file_error(path, "damaged, or from another adapter: its SHA-256 does not match lorakit.json.")
    sites = by_site(file.tensors).items()
    return {path: (parts["A"], parts["B"]) for path, parts in sites if {"A", "B"} <= set(parts)}
