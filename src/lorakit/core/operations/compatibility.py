"""Check by configs and fingerprints that adapters can be combined, and determine the result's config and metadata."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Collection, Sequence

from lorakit.config import HEADS_BY_TASK, LoraConfig
from lorakit.core.kinds import PARAMETER
from lorakit.core.model.fingerprint import DIFFERENT, UNVERIFIABLE, BaseVerdict
from lorakit.core.operations.tensor_sources import AdapterWeights
from lorakit.core.variants import asked_for, is_kept, variants_of, without
from lorakit.durable import JsonObject
from lorakit.errors import OVERRIDE, AdapterError, BaseMismatchError, ConfigError, warn_caller
from lorakit.tensor_headers import PREFIX, ROWS

SHOWN = 4
"""Maximum number of differences that an error message lists."""


def check_one_base(adapters: Sequence[AdapterWeights], allow: Collection[str] = ()) -> None:
    """Check that adapters have the same base model and task, and that each shares a site with at least one other.

    A BaseMismatchError for the first, which `allow` can override by "base_mismatch"; for sites, "key_mismatch", an
    AdapterError unless the fingerprints prove a common base.
    """
    pairs = [(one, other, one.compare_base(other)) for one, other in itertools.combinations(adapters, 2)]
    if "base_mismatch" not in allow:
        differences = [message for pair in pairs for message in _differences(*pair)]
        if differences:
            text = " ".join(differences[:SHOWN])
            raise BaseMismatchError(text, advice=f"To combine them anyway, {OVERRIDE}.", override="base_mismatch")
        for one, other, base in pairs:
            if base.verdict == UNVERIFIABLE and not (_base_name(one) and _base_name(other)):
                warn_caller(f"{one.label} and {other.label}: the files do not show whether both have the same base.")
                break
    alone = next((adapter for adapter in adapters if not _shares_a_site(adapter, adapters)), None)
    unproven = any(base.verdict in (DIFFERENT, UNVERIFIABLE) for *_, base in pairs)
    if alone is not None and unproven and "key_mismatch" not in allow:
        site = next(iter(alone.factors))
        raise AdapterError(
            f"{alone.label} has no sites in common with any other adapter; it adapts {site}, for example.",
            advice=f"To combine them anyway, {OVERRIDE}.",
            what=alone.label,
            where=site,
            override="key_mismatch",
        )


def _differences(one: AdapterWeights, other: AdapterWeights, base: BaseVerdict) -> list[str]:
    """Return one message for each known difference between two adapters' base models or tasks."""
    differences, names = [], (_base_name(one), _base_name(other))
    if base.verdict == DIFFERENT:
        differences.append(f"{one.label} and {other.label} were trained on different bases: {base.reason}.")
    elif base.verdict == UNVERIFIABLE and all(names) and len({_short(name) for name in names}) > 1:
        differences.append(
            f"{one.label} and {other.label} were trained on different bases: {names[0]!r} and {names[1]!r} "
            "(base_model_name_or_path)."
        )
    tasks = [getattr(task, "value", task) for task in (one.config.task_type, other.config.task_type)]
    if all(tasks) and tasks[0] != tasks[1]:
        differences.append(
            f"{one.label} and {other.label} were trained for different tasks: {tasks[0]} and {tasks[1]} (task_type)."
        )
    return differences


def _base_name(adapter: AdapterWeights) -> str:
    return str(adapter.config.base_model_name_or_path or adapter.facts.get("base_name") or "")


def _shares_a_site(adapter: AdapterWeights, adapters: Sequence[AdapterWeights]) -> bool:
    return any(not adapter.factors.keys().isdisjoint(other.factors) for other in adapters if other is not adapter)


def _short(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].lower()


def check_joinable(adapters: Sequence[AdapterWeights]) -> None:
    """Raise an AdapterError for adapters without a combination, or a ConfigError if one trains base biases."""
    if not adapters:
        raise AdapterError("No adapters were given; pass at least one.", field="adapters")
    for adapter in adapters:
        check_no_base_biases(adapter)
    must_agree = {variant.field: variant.combine for variant in asked_for() if isinstance(variant.combine, str)}
    for field, reason in {**must_agree, "layer_replication": "were trained on differently replicated layers"}.items():
        if len({str(getattr(adapter.config, field)) for adapter in adapters}) > 1:
            raise AdapterError(f"The adapters {reason} ({field}), so they cannot be combined.", field=field)
    _check_bare_parameters(adapters)
    _check_saved_modules(adapters)


def _check_bare_parameters(adapters: Sequence[AdapterWeights]) -> None:
    """If any adapter adapts bare parameters, check that no adapter uses features that they do not support."""
    bare = next((adapter.label for adapter in adapters if adapter.config.target_parameters), None)
    if bare is None:
        return
    for adapter in adapters:
        config = adapter.config
        needs = [f"uses {v.title}" for v in variants_of(config) if not v.fits(PARAMETER) and is_kept(v)]
        needs += ["has a bias on B (lora_bias)"] if config.lora_bias else []
        if needs:
            text = (
                f"{adapter.label} {needs[0]}, but {bare} adapts bare parameters (target_parameters), which do not "
                "support this. The two adapters cannot be combined; keep both active, or merge both into a model."
            )
            raise AdapterError(text, what=adapter.label, field="target_parameters")


def _check_saved_modules(adapters: Sequence[AdapterWeights]) -> None:
    """Check that no two adapters save the same module, and that none adapts sites inside a saved module."""
    saved = Counter(
        path
        for adapter in adapters
        for path in {name.rpartition(".")[0] for name in adapter.others if not name.endswith(ROWS)}
    )
    twice = sorted(path for path, count in saved.items() if count > 1)
    if twice:
        text = (
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(twice)} such instance(s). First: {twice[0]}."
        )
        raise AdapterError(text, where=twice[0], field="modules_to_save")
    prefixes = tuple(path.removeprefix(PREFIX) + "." for path in saved)
    for adapter in adapters:
        for path in adapter.factors:
            if f"{path}.".startswith(prefixes):
                text = f"{adapter.label} adapts {path}, a part of a module that another one saves (modules_to_save)."
                raise AdapterError(text, what=adapter.label, where=path, field="modules_to_save")


def check_no_base_biases(adapter: AdapterWeights) -> None:
    """Raise a ConfigError if an adapter trains biases of the base."""
    if adapter.config.bias != "none":
        text = f"{adapter.label} trains biases of the base (bias={adapter.config.bias!r}); merge it into a model."
        raise ConfigError(text, what=adapter.config.bias, field="bias")


def joined_config(configs: Sequence[LoraConfig]) -> LoraConfig:
    """Return a copy of the first config, extended with the variants, `lora_bias` and saved modules of the others."""
    task = next((config.task_type for config in configs if config.task_type), None)
    saved = [
        name
        for config in configs
        for name in (*(config.modules_to_save or []), *HEADS_BY_TASK.get(config.task_type, ()))
    ]
    heads = HEADS_BY_TASK.get(task, ())
    parameters = {entry for config in configs for entry in config.target_parameters or ()}
    kept = {variant: config for config in reversed(configs) for variant in variants_of(config) if is_kept(variant)}
    return dataclasses.replace(
        without(configs[0], *asked_for()),
        task_type=task,
        lora_bias=any(config.lora_bias for config in configs),
        target_parameters=sorted(parameters) or None,
        modules_to_save=[name for name in dict.fromkeys(saved) if name not in heads] or None,
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        trainable_token_indices=next((c.trainable_token_indices for c in configs if c.trainable_token_indices), None),
        **{variant.field: getattr(config, variant.field) for variant, config in kept.items()},
    )


def shared_facts(adapters: Sequence[AdapterWeights]) -> JsonObject:
    """Return the metadata that all adapters share, for the result to inherit: base model name and tokenizer hashes."""
    first, *rest = (adapter.facts for adapter in adapters)
    names = ("base_name", "tokenizer_sha256", "chat_template_sha256")
    return {name: first[name] for name in names if name in first and all(f.get(name) == first[name] for f in rest)}
