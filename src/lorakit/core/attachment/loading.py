"""Load an adapter strictly: everything is read and checked off the model, all mismatches are told at once.

Which sites an adapter has follows from its tensors' names, so no pattern of a file is ever run. Only when
nothing is wrong, or what is wrong was allowed by name, does the model change, in one step.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig, scale
from lorakit.core.attachment.build import (
    NewAdapter,
    NewFactor,
    as_parameters,
    check_bias_of_b,
    check_storage,
    commit,
    moved_for,
    new_extras,
    new_rows,
)
from lorakit.core.attachment.fitting import (
    MISSING,
    SHAPE,
    UNEXPECTED,
    Fit,
    Problem,
    copied_tensors,
    filled_biases,
    fit,
    out_of_range,
)
from lorakit.core.attachment.residual_base import InitRecord, init_record_of
from lorakit.core.factor import factor_dtype, make_dropout
from lorakit.core.files.adapter_folder import KINDS_KEY, AdapterFiles, alpha_at, read_adapter
from lorakit.core.files.inspecting import Site, implausible, judge, largest_values, nonfinite, not_finite
from lorakit.core.inits import trains_of
from lorakit.core.kinds import Kind
from lorakit.core.layers.modules_to_save import Extras
from lorakit.core.model.checks import check_allowances, check_called, check_company, check_new_name, check_scales
from lorakit.core.model.fingerprint import DIFFERENT, check_not_merged_in, compare
from lorakit.core.model.index import AdapterIndex, trainable_block
from lorakit.core.model.replication import stacked_for
from lorakit.core.model.target_weights import check_overlap, dropout_at, named_places
from lorakit.core.model.vocabulary import appended_rows, base_mismatch_advice, without_brought_rows
from lorakit.core.quantization import weight_format_of
from lorakit.core.variants import Factor, Start, variant_for
from lorakit.errors import (
    OVERRIDE,
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    ShapeMismatchError,
    TargetError,
    warn_caller,
)
from lorakit.targets import Match

SHOWN = 6
"""So many mismatches are named in an error."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_adapter` did.

    Attributes:
        name: The adapter.
        config: Its config, as read.
        sites: How many sites it has.
        base: Verdict on the base: same, same at other precision, unverifiable, different.
        warnings: Sentences a person should read.
    """

    name: str
    config: LoraConfig
    sites: int
    base: str
    warnings: tuple[str, ...]


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str = "default",
    *,
    trainable: bool = False,
    allow: Collection[str] = (),
    kinds: Iterable[Kind] = (),
) -> LoadReport:
    """Put a saved adapter on a model. The first adapter becomes active; later ones wait for `activate` or `use`.

    Args:
        model: The base, or a model that has adapters already. It is changed in place.
        folder: A folder that PEFT or lorakit wrote.
        name: The adapter's name here.
        trainable: Go on training it; otherwise it is frozen. One whose init moved the base, written as plain LoRA,
            moves it again then and has its own rank.
        allow: Refusals to lift: "base_mismatch", "key_mismatch", "nonfinite", "odd_scale", "recompute_init".
        kinds: Kinds of site of the user's own that the adapter was made with.

    Returns:
        What was loaded.

    Raises:
        AdapterFileError: Files are missing or damaged, or tensors do not fit; all mismatches are named.
        BaseMismatchError: The adapter was made on another base, or was merged into this one for good.
        AdapterError: The name is taken or cannot be used.
        ConfigError: A scale is odd, or a word in `allow` is unknown.
        NotYetSupported: The adapter needs what is not built yet.
    """
    check_allowances(allow)
    index = AdapterIndex.of(model, kinds)
    check_new_name(index.state, name)
    with trainable_block(index):
        files = read_adapter(folder)
        check_not_merged_in(model, files.folder, files.file.sha256, allow)
        with appended_rows(index, files.config, files.sidecar.base) as grown:
            index = index.again() if grown else index
            verdict, said = check_base(index, files, allow)
            said = [*files.warnings, *(f"{files.folder}: {sentence}" for sentence in grown), *said]
            files = dataclasses.replace(files, warnings=tuple(said))
            sites, more = _place(index, files, name, trainable, allow)
    return LoadReport(name, files.config, sites, verdict, more)


def check_base(model: nn.Module | AdapterIndex, files: AdapterFiles, allow: Collection[str]) -> tuple[str, list[str]]:
    """Compare a model's base with the one that an adapter was made on.

    Args:
        model: The base, or a model that has adapters already, or its index; only read.
        files: What was read.
        allow: Checks to override: "base_mismatch".

    Returns:
        The verdict, and what to warn of.

    Raises:
        BaseMismatchError: It is another base.
    """
    known, present = without_brought_rows(AdapterIndex.of(model), files.config, files.sidecar.base)
    verdict, reason, warning = compare(known, present)
    if verdict == DIFFERENT and "base_mismatch" not in allow:
        raise BaseMismatchError(
            f"{files.folder}: made on another base: {reason}.",
            advice=base_mismatch_advice(known, present),
            where=files.folder,
            override="base_mismatch",
        )
    said = [f"{files.folder}: loaded on another base as allowed: {reason}."] if verdict == DIFFERENT else []
    return verdict, [*said, f"{files.folder}: {warning}"] if warning else said


def place_adapter(
    model: nn.Module,
    files: AdapterFiles,
    name: str,
    trainable: bool,
    allow: Collection[str],
    kinds: Iterable[Kind] = (),
) -> tuple[int, tuple[str, ...]]:
    """Put an adapter that was read onto a model; everything is checked before the first change.

    Args:
        model: The base, or a model that has adapters already.
        files: What was read, with the warnings to report.
        name: The adapter's name here.
        trainable: Continue to train it.
        allow: Checks to override: "key_mismatch", "nonfinite", "odd_scale", "recompute_init".
        kinds: As `load_adapter`.

    Returns:
        How many sites it has, and every warning that was reported.

    Raises:
        AdapterFileError: Tensors do not fit; all mismatches are named.
        AdapterError: The name is taken or cannot be used.
        ConfigError: A scale is odd, or biases would be trained twice.
    """
    return _place(AdapterIndex.of(model, kinds), files, name, trainable, allow)


def _place(
    index: AdapterIndex, files: AdapterFiles, name: str, trainable: bool, allow: Collection[str]
) -> tuple[int, tuple[str, ...]]:
    check_new_name(index.state, name)
    config, tensors = files.config, files.file.tensors
    check_company(index.state, config)
    with trainable_block(index), stacked_for(index, config) as index:
        _check_kinds(files, index)
        fitted = _fitted(files, index)
        check_called(index.model, fitted.outer_paths())
        largest = largest_values(tensors)
        said = [*files.warnings, *_judge(files, fitted, largest, allow)]
        past = init_record_of(files.folder, config, files.sidecar.began if files.is_ours else {}, trainable, allow)
        factors = _restored_factors(files, fitted, index, past, trainable)
        check_scales([(factor.place.path, factor.factor.scale) for factor in factors], allow)
        given = {chosen.path: tensors[key] for chosen, key in fitted.rows}
        rows = new_rows(index, [chosen for chosen, _ in fitted.rows], given, trainable)
        extras = new_extras(index, config, factors, fitted.saved, fitted.leaders, rows)
        beyond = out_of_range(tensors, largest, fitted, index, factors, extras)
        said += _implausible(files, factors, fitted, largest, trainable or files.made)
        said += _checked_range(files.folder, beyond, allow)
        biases = _filled_copies(extras, fitted, index, tensors)
        for sentence in said:  # where warnings are errors, this refuses, so it comes before any change
            warn_caller(sentence)
        new_config = past.config.with_fields(inference_mode=not trainable)
        commit(index, NewAdapter(name, new_config, factors, extras, biases, trainable))
    return len(factors), tuple(said)


def _check_kinds(files: AdapterFiles, index: AdapterIndex) -> None:
    """Refuse an adapter that was made with a user's own kinds of site which are not given here."""
    asked = files.sidecar.facts.get(KINDS_KEY)
    lacking = sorted({str(name) for name in asked if str(name) not in index.kinds} if isinstance(asked, list) else ())
    if lacking:
        raise AdapterFileError(
            f"{files.folder}: made with kinds of site of its user's own: {', '.join(lacking)}. Give them again: "
            "load_adapter(..., kinds=[...]).",
            what=lacking[0],
            where=files.folder,
        )


def _fitted(files: AdapterFiles, index: AdapterIndex) -> Fit:
    try:
        bare = named_places(index, files.config)
        fitted = fit(files.file.tensors, files.config, index, bare)
        check_overlap(index, [place for place, _ in fitted.sites.values()])
    except (TargetError, ConfigError) as cause:
        raise AdapterFileError(f"{files.folder}: {cause}", **{**cause.fields, "where": files.folder}) from None
    return fitted


def _judge(files: AdapterFiles, fitted: Fit, largest: Mapping[str, float], allow: Collection[str]) -> list[str]:
    """Refuse what does not fit, all at once; what was allowed comes back as sentences."""
    said = []
    if fitted.problems:
        shown = "; ".join(_some_of_each(fitted.problems))
        more = f"; and {len(fitted.problems) - SHOWN} more" if len(fitted.problems) > SHOWN else ""
        fits_in_part = bool(fitted.sites) and not fitted.shape_problems
        if not fits_in_part or "key_mismatch" not in allow:
            error = ShapeMismatchError if fitted.shape_problems else AdapterFileError
            raise error(
                f"{files.folder}: the adapter does not fit this model: {shown}{more}.",
                what=fitted.problems[0].name,
                where=files.folder,
                override="key_mismatch" if fits_in_part else None,
            )
        said.append(f"{files.folder}: loaded in part as allowed: {shown}{more}.")
    bad = nonfinite(largest)
    if bad is not None and "nonfinite" not in allow:
        raise not_finite(files.folder, bad)
    return said


def _implausible(
    files: AdapterFiles, factors: Sequence[NewFactor], fitted: Fit, largest: Mapping[str, float], may_be_zero: bool
) -> tuple[str, ...]:
    """Return what is valid but implausible, as one message or none."""
    sites = [Site(path, new.lora_alpha, new.factor.scale) for path, new in zip(fitted.sites, factors, strict=True)]
    return implausible(files.folder, judge(files.config, sites, largest), may_be_zero)


def _checked_range(folder: Path, beyond: Sequence[str], allow: Collection[str]) -> list[str]:
    """Reject values that the base's dtype cannot hold; what was allowed comes back as a message."""
    if not beyond:
        return []
    more = f"; and {len(beyond) - SHOWN} more" if len(beyond) > SHOWN else ""
    sentence = f"{folder}: values would be infinite in this base: {'; '.join(beyond[:SHOWN])}{more}."
    if "nonfinite" not in allow:
        raise AdapterFileError(
            sentence,
            advice=f"Take an earlier checkpoint or a base of a wider dtype, or {OVERRIDE}.",
            where=folder,
            override="nonfinite",
        )
    return [sentence]


def _some_of_each(problems: Sequence[Problem]) -> list[str]:
    """Return the first few mismatches, some of each sort: what is missing means little without what came instead."""
    sorts: dict[str, list[str]] = {}
    for problem in problems:
        sort = problem.kind if problem.kind in {MISSING, UNEXPECTED} else SHAPE
        sorts.setdefault(sort, []).append(str(problem))
    turns = itertools.chain.from_iterable(itertools.zip_longest(*sorts.values()))
    return [sentence for sentence in turns if sentence is not None][:SHOWN]


def _restored_factors(
    files: AdapterFiles, fitted: Fit, index: AdapterIndex, past: InitRecord, trainable: bool
) -> list[NewFactor]:
    config, factors = files.config, []
    trains = trains_of(config)
    for path, (place, tensors) in fitted.sites.items():
        check_bias_of_b(config, place)
        check_storage(index, place)
        kind, slot = place.kind, place.slot
        module, parameter = index.holder(place), slot.parameter
        device, dtype = weight_format_of(module, parameter).device(module, parameter), factor_dtype(module, parameter)
        own: dict[str, Any] = {part: t.to(device=device, dtype=dtype, copy=True) for part, t in tensors.items()}
        before = past.sites.get(path, {})
        r = int(before.get("r", kind.rank(slot, own["A"].shape)))
        alpha = float(before["lora_alpha"]) if before else alpha_at(files, path, place.pattern_path)
        factor_scale = scale(r, alpha, config.use_rslora)
        stored = initial = None
        if past.moves:
            match = Match(place.outer, kind.name, r, alpha, "")
            moved = past.moved(index, place, path, (own["A"], own["B"]), match)
            own["A"], own["B"], stored, initial = moved.A, moved.B, moved.stored, moved.initial
        variant, setting = variant_for(config, kind, path)
        if variant.move is not None:
            start = Start(kind, slot, own["A"], own["B"], factor_scale, partial(index.weight, place), path, setting)
            stored = moved_for(variant, index, place, start)
        dropout = make_dropout(dropout_at(config, place, module))
        beside = {tensor.held_as: own[tensor.held_as] for tensor in variant.tensors}
        factor = Factor(own["A"], own["B"], factor_scale, dropout, variant, beside, own.get("bias"), setting)
        factors.append(NewFactor(place, as_parameters(factor, trainable, trains), r, alpha, stored, trains, initial))
    return factors


def _filled_copies(
    extras: Extras, fitted: Fit, index: AdapterIndex, tensors: Mapping[str, Tensor]
) -> list[tuple[nn.Parameter, Tensor]]:
    """Put the file's numbers into the copies, which are not in the model yet; each bias with what it will hold."""
    with torch.no_grad():
        for own, name in copied_tensors(extras, fitted, index):
            own.copy_(tensors[name])
    found: list[tuple[nn.Parameter, Tensor]] = []
    for module, leaf, old, name in filled_biases(extras, fitted):
        parameter: nn.Parameter = module._parameters[leaf]  # type: ignore[assignment]
        found.append((parameter, tensors[name].to(device=old.device, dtype=old.dtype, copy=True)))
    return found
