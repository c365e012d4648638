"""Load an adapter strictly: read and check all of it before changing the model, and report all mismatches in one error.

An adapter's sites are derived from the names of its tensors, so regular expressions in files are never run. The model
changes in one step, after every check has passed or has been overridden. `read_for_training` derives a config from the
same names, so that an adapter's parameters can be counted before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.attachment import build
from lorakit.core.attachment.fitting import SHAPE, Fit, Problem, copied_tensors, fit, out_of_range
from lorakit.core.attachment.old_experts import with_fused_experts
from lorakit.core.attachment.residual_base import InitRecord, init_context_for, init_record_of
from lorakit.core.factor import BOTH
from lorakit.core.files.adapter_folder import (
    KINDS_KEY,
    AdapterFiles,
    alpha_at,
    parameters_meant,
    rank_and_alpha,
    read_adapter,
)
from lorakit.core.files.inspecting import Site, check_finite, implausible, judge, largest_values
from lorakit.core.files.tensors import by_site
from lorakit.core.inits import known_init
from lorakit.core.kinds import Kind
from lorakit.core.model import checks
from lorakit.core.model.fingerprint import DIFFERENT, check_not_merged_in, compare
from lorakit.core.model.index import INSIDE, AdapterIndex, trainable_block
from lorakit.core.model.replication import stacked_for
from lorakit.core.model.target_weights import check_overlap, named_targets
from lorakit.core.model.vocabulary import appended_rows, base_mismatch_advice, without_brought_rows
from lorakit.durable import JsonObject
from lorakit.errors import (
    OVERRIDE,
    AdapterFileError,
    BaseMismatchError,
    ConfigError,
    ShapeMismatchError,
    TargetError,
    warn_caller,
)
from lorakit.hub_cache import NO_OPTIONS, HubOptions, adapter_from_hub, is_on_hub
from lorakit.tables import format_some
from lorakit.targets.patterns import exact_key
from lorakit.targets.resolving import Match

SHOWN = 6
"""Maximum number of mismatches listed in an error message."""


@dataclass(frozen=True)
class LoadReport:
    """Result of `load_adapter`.

    Attributes:
        config: The adapter's config, as read from the file.
        sites: Number of sites that received factors.
        base: Verdict on the base, as in `BaseVerdict.verdict`: same, same at a different precision, unverifiable, or
            different.
        warnings: Messages for the user.
        tensors: Names of the tensors in the adapter's files, after experts of transformers 4 have been fused.
    """

    name: str
    config: LoraConfig
    sites: int
    base: str
    warnings: tuple[str, ...]
    tensors: frozenset[str]


class Placement(NamedTuple):
    """Result of `place_adapter`; the fields are those of `LoadReport`."""

    sites: int
    warnings: tuple[str, ...]
    tensors: frozenset[str]


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str] | AdapterFiles,
    name: str = "default",
    *,
    trainable: bool = False,
    allow: Collection[str] = (),
    kinds: Iterable[Kind] = (),
    hub: HubOptions = NO_OPTIONS,
) -> LoadReport:
    """Load a saved adapter into a model. The first adapter becomes active; activate others with `activate` or `use`.

    Args:
        model: The base, or a model that already has adapters; changed in place.
        folder: A directory written by PEFT or lorakit; a Hub id, "owner/name" or "owner/name@revision"; or the result
            of `read_adapter`, so that the files are not read again.
        name: Name to give the adapter on this model.
        trainable: Whether training will continue; if false, the adapter is frozen. If true, and the adapter was
            converted to plain LoRA when it was saved, its residual base and original rank are restored.
        allow: Names of checks to override: "base_mismatch", "key_mismatch", "nonfinite", "odd_scale",
            "recompute_init".
        kinds: The custom site kinds that the adapter uses.
        hub: Arguments of the download of an adapter on the Hub.

    Raises:
        AdapterFileError: Files are missing or damaged, or tensors do not match the model; all mismatches are reported.
        BaseMismatchError: The adapter was made for a different base, or was permanently merged into this one.
        AdapterError: The name is taken or cannot be used.
        ConfigError: A scale is implausible, or a name in `allow` is unknown.
        ModelError: The adapter is on the Hub and cannot be downloaded.
        NotYetSupported: The adapter needs a feature that is not implemented.
    """
    checks.check_allowances(allow)
    index = AdapterIndex.of(model, kinds)
    checks.check_new_name(index.state, name)
    with trainable_block(index):
        files = folder if isinstance(folder, AdapterFiles) else read_adapter(_directory(folder, hub))
        check_not_merged_in(model, files.folder, files.file.sha256, allow)
        with appended_rows(index, files.config, files.sidecar.base) as grown:
            index = index.again() if grown else index
            verdict, messages = check_base(index, files, allow)
            messages = [*files.warnings, *(f"{files.folder}: {message}" for message in grown), *messages]
            files = dataclasses.replace(files, warnings=tuple(messages))
            placed = place_adapter(index, files, name, trainable, allow)
    return LoadReport(name, files.config, placed.sites, verdict, placed.warnings, placed.tensors)


def _directory(name: str | os.PathLike[str], hub: HubOptions) -> Path:
    if is_on_hub(name):
        return adapter_from_hub(str(name), hub)
    return Path(name) / (hub.subfolder or "")


def check_base(model: nn.Module | AdapterIndex, files: AdapterFiles, allow: Collection[str]) -> tuple[str, list[str]]:
    """Compare a model's base with the one that an adapter was made for; return the verdict, and any warnings.

    A BaseMismatchError is raised for a different base, unless `allow` has "base_mismatch".
    """
    index = AdapterIndex.of(model)
    if index.state is None or index.state.base is None:  # a base that is known from before can be compared
        checks.check_not_distributed(index.everything.items())
    known, present = without_brought_rows(index, files.config, files.sidecar.base)
    verdict, reason, warning = compare(known, present)
    if verdict == DIFFERENT and "base_mismatch" not in allow:
        raise BaseMismatchError(
            f"{files.folder}: the adapter was made for a different base: {reason}.",
            advice=base_mismatch_advice(known, present),
            where=files.folder,
            override="base_mismatch",
        )
    messages = [f"{files.folder}: loaded on another base as allowed: {reason}."] if verdict == DIFFERENT else []
    return verdict, [*messages, f"{files.folder}: {warning}"] if warning else messages


def place_adapter(
    model: nn.Module | AdapterIndex,
    files: AdapterFiles,
    name: str,
    trainable: bool,
    allow: Collection[str],
    kinds: Iterable[Kind] = (),
) -> Placement:
    """Attach an adapter to a model, given the adapter's files; everything is checked before the model is changed.

    Experts of transformers 4 have separate tensors, which are fused first. The arguments and errors are those of
    `load_adapter`; the base is not compared.

    Raises:
        AdapterFileError: Tensors do not match the model; all mismatches are reported.
    """
    index = AdapterIndex.of(model, kinds)
    checks.check_new_name(index.state, name)
    files = with_fused_experts(files, index)
    config, tensors = files.config, files.file.tensors
    checks.check_company(index.state, config)
    checks.check_acts(index.model, config)
    with trainable_block(index), stacked_for(index, config) as index:
        _check_kinds(files, index)
        fitted = _fitted(files, index)
        checks.check_called(index.model, fitted.outer_paths())
        largest = largest_values(tensors)
        messages = [*files.warnings, *_judge(files, fitted, largest, allow)]
        record = init_record_of(files, trainable, allow)
        factors = _restored_factors(files, fitted, index, record)
        scales = [Site(new.target.path, new.match.alpha, new.factor.scale) for new in factors]
        checks.check_scales([(new.target.path, new.factor.scale) for new in factors], allow)
        trained_rows = {chosen.path: tensors[key] for chosen, key in fitted.rows}
        rows = build.new_rows(index, [chosen for chosen, _ in fitted.rows], trained_rows)
        auxiliary = build.new_extras(index, config, factors, fitted.saved, fitted.tied, rows)
        trained = {(id(module), leaf) for module, originals in auxiliary.biases for leaf in originals}
        fitted.biases = [bias for bias in fitted.biases if (id(bias[0]), bias[1]) in trained]  # skip dropped ones
        beyond = out_of_range(tensors, largest, fitted, index, factors, auxiliary)
        messages += implausible(files.folder, judge(config, scales, largest), trainable or files.made)
        messages += _checked_range(files.folder, beyond, allow)
        with torch.no_grad():
            for own, key in copied_tensors(auxiliary, tensors):
                own.copy_(tensors[key])
        for message in messages:  # a warning may be turned into an error, so warn before changing the model
            warn_caller(message)
        new_config = record.config.with_fields(inference_mode=not trainable)
        biases = _new_biases(fitted, tensors)
        build.commit(index, build.NewAdapter(name, new_config, factors, auxiliary, biases, trainable))
    return Placement(len(factors), tuple(messages), frozenset(tensors))


def _check_kinds(files: AdapterFiles, index: AdapterIndex) -> None:
    """Check that the caller passed all custom site kinds that an adapter uses."""
    recorded = files.sidecar.facts.get(KINDS_KEY)
    lacking = sorted(
        {str(name) for name in recorded if str(name) not in index.kinds} if isinstance(recorded, list) else ()
    )
    if lacking:
        text = (
            f"{files.folder}: the adapter needs custom kinds of site: {', '.join(lacking)}. Pass them as kinds=[...]."
        )
        raise AdapterFileError(text, what=lacking[0], where=files.folder, field="kinds")


def _fitted(files: AdapterFiles, index: AdapterIndex) -> Fit:
    try:
        bare = named_targets(index, files.config)
        fitted = fit(files.file.tensors, files.config, index, bare)
        check_overlap(index, [target for target, _ in fitted.sites.values()])
    except (TargetError, ConfigError) as cause:
        raise AdapterFileError(f"{files.folder}: {cause}", **{**cause.fields, "where": files.folder}) from None
    return fitted


def _judge(files: AdapterFiles, fitted: Fit, largest: Mapping[str, float], allow: Collection[str]) -> list[str]:
    """Raise one error that lists all mismatches, or return messages about the mismatches if they are allowed."""
    messages = []
    if fitted.problems:
        shown = format_some(_some_of_each(fitted.problems), SHOWN, "; ")
        has_shapes = any(problem.kind == SHAPE for problem in fitted.problems)  # `allow` does not apply to wrong shapes
        fits_in_part = bool(fitted.sites) and not has_shapes
        if not fits_in_part or "key_mismatch" not in allow:
            error = ShapeMismatchError if has_shapes else AdapterFileError
            raise error(
                f"{files.folder}: the adapter does not match this model: {shown}.",
                what=fitted.problems[0].name,
                where=files.folder,
                override="key_mismatch" if fits_in_part else None,
            )
        messages.append(f"{files.folder}: loaded in part as allowed: {shown}.")
    check_finite(files.folder, largest, allow)
    return messages


def _checked_range(folder: Path, beyond: Sequence[str], allow: Collection[str]) -> list[str]:
    """Raise an error for values that overflow in the base's dtype, or return a message if they are allowed."""
    if not beyond:
        return []
    message = f"{folder}: values would become infinite in this base's dtype: {format_some(beyond, SHOWN, '; ')}."
    if "nonfinite" not in allow:
        raise AdapterFileError(
            message,
            advice=f"Use an earlier checkpoint or a base in a wider dtype, or {OVERRIDE}.",
            where=folder,
            override="nonfinite",
        )
    return [message]


def _some_of_each(problems: Sequence[Problem]) -> list[str]:
    """Return the mismatch messages, alternating between kinds, so that the first few include every kind."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem.text)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds.values()))
    return [message for message in turns if message is not None]


def _restored_factors(
    files: AdapterFiles, fitted: Fit, index: AdapterIndex, record: InitRecord
) -> list[build.NewFactor]:
    config, init, factors = record.config, known_init(record.config), []
    trains = BOTH if init is None else init.trains
    for path, (target, names) in fitted.sites.items():
        checks.check_site(index, config, target)
        tensors = {part: files.file.tensors[name] for part, name in names.items()}
        before = record.sites.get(path)
        if before is None:
            rank, alpha = target.kind.rank(target.spec, tensors["A"].shape), alpha_at(files, path, target.pattern_path)
        else:
            rank, alpha = int(before["r"]), float(before["lora_alpha"])
        match = Match(target.outer, target.kind.name, rank, alpha, "")
        context = init_context_for(index, config, match, target)
        own = {part: t.to(device=context.device, dtype=context.dtype, copy=True) for part, t in tensors.items()}
        start = record.start(index, target, context, own)
        factors.append(build.new_factor(index, target, match, context, start, trains))
    return factors


def _new_biases(fitted: Fit, tensors: Mapping[str, Tensor]) -> list[tuple[nn.Parameter, Tensor]]:
    """Return each trained bias with its values (out,) from the file, moved to the bias's device and dtype."""
    biases = [(module.get_parameter(leaf), tensors[name]) for module, leaf, name in fitted.biases]
    return [(old, new.to(device=old.device, dtype=old.dtype, copy=True)) for old, new in biases]


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter on disk that can be trained further.

    Attributes:
        config: The adapter's config in training; its patterns may be regular expressions.
        literal: A config that selects the same sites with the same ranks, by their paths only.
        sites: Paths of the adapted modules, sorted; without those of `target_parameters`.
        facts: Metadata in `lorakit.json`.
        head_outputs: See `AdapterFiles.head_outputs`.
    """

    folder: Path
    config: LoraConfig
    literal: LoraConfig
    sites: tuple[str, ...]
    weights_sha256: str
    facts: JsonObject
    head_outputs: int | None = None


def read_for_training(folder: str | os.PathLike[str]) -> TrainedAdapter:
    """Read and verify an adapter that will be trained further, from its directory or a run directory, without a model.

    Raises:
        AdapterFileError: A file is missing or damaged, or the init changed the base and the files do not say how.
        NotYetSupported: The adapter needs a feature that is not implemented.
    """
    files = read_adapter(folder)
    past = init_record_of(files, True, ())
    modules, scaled = _sites(files, past)
    literal = past.config.with_fields(
        target_modules=set(modules) or None,
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        rank_pattern={exact_key(path, scaled): r for path, (r, _) in scaled.items() if r != past.config.r},
        alpha_pattern={exact_key(path, scaled): a for path, (_, a) in scaled.items() if a != past.config.lora_alpha},
    )
    facts = files.sidecar.facts
    return TrainedAdapter(
        files.folder, past.config, literal, tuple(sorted(modules)), files.file.sha256, facts, files.head_outputs
    )


def _sites(files: AdapterFiles, past: InitRecord) -> tuple[list[str], dict[str, tuple[int, float]]]:
    """Return the paths of the adapted modules, and a dict from each module or parameter to its rank and alpha."""
    modules: list[str] = []
    scaled: dict[str, tuple[int, float]] = {}
    for path, parts in by_site(files.file.tensors).items():
        if "A" not in parts:
            continue
        rank, alpha = rank_and_alpha(files, path, int(parts["A"].shape[0]))
        before = past.sites.get(path)
        if before is not None:
            rank, alpha = int(before["r"]), float(before["lora_alpha"])
        meant = parameters_meant(files.config, path)
        if not meant:
            modules.append(path.replace(INSIDE, ""))
        scaled.update(dict.fromkeys(meant or modules[-1:], (rank, past.config.lora_alpha if alpha is None else alpha)))
    return modules, scaled
