"""What several adapters must share to become one, and what the one takes over from them.

Knows configs, names and fingerprints; the numbers are combined elsewhere.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from lorakit.config import HEADS_BY_TASK, LoraConfig
from lorakit.core.files.tensor_names import PREFIX, ROWS
from lorakit.core.kinds import PARAMETER
from lorakit.core.model.fingerprint import DIFFERENT, UNVERIFIABLE
from lorakit.core.operations.tensor_sources import AdapterWeights
from lorakit.core.variants import asked_for, is_kept, variants_of, without
from lorakit.errors import OVERRIDE, AdapterError, BaseMismatchError, ConfigError, warn_caller


def check_one_base(adapters: Sequence[AdapterWeights], allow: Collection[str] = ()) -> None:
    """Reject adapters from files that have no common base, task or site, as far as the files tell.

    Args:
        adapters: The adapters.
        allow: Checks to override: "base_mismatch" for base and task, "key_mismatch" for sites.

    Raises:
        BaseMismatchError: Two of them were made on different bases or for different tasks.
        AdapterError: One has no site in common with any other, and fingerprints do not prove that all have one base.
    """
    pairs = list(itertools.combinations(adapters, 2))
    if "base_mismatch" not in allow:
        apart = [sentence for one, other in pairs for sentence in (*_other_base(one, other), *_other_task(one, other))]
        if apart:
            raise BaseMismatchError(
                " ".join(apart[:SHOWN]), advice=f"If they fit nevertheless, {OVERRIDE}.", override="base_mismatch"
            )
        unknown = next((pair for pair in pairs if not _is_known_to_share(*pair)), None)
        if unknown is not None:
            warn_caller(
                f"{unknown[0].label} and {unknown[1].label}: the files do not tell whether both were made on one base."
            )
    alone = next((adapter for adapter in adapters if not _shares_a_site(adapter, adapters)), None)
    if alone is not None and "key_mismatch" not in allow and not all(_is_proven_to_share(*pair) for pair in pairs):
        raise AdapterError(
            f"{alone.label} has no site in common with any other adapter, such as {next(iter(alone.factors))}.",
            advice=f"If they fit nevertheless, {OVERRIDE}.",
            what=alone.label,
            where=next(iter(alone.factors)),
            override="key_mismatch",
        )


SHOWN = 4
"""The number of differences that an error names."""


def _other_base(one: AdapterWeights, other: AdapterWeights) -> list[str]:
    """Return in words how the bases of two adapters differ; none if they do not, or if that is not known."""
    if _is_proven_to_share(one, other):
        return []
    found = one.compare_base(other)
    reason = found.reason if found is not None and found.verdict == DIFFERENT else ""
    names = _base_name(one), _base_name(other)
    if not reason and all(names) and len({name.rstrip("/").rpartition("/")[2].lower() for name in names}) > 1:
        reason = f"{names[0]!r} and {names[1]!r} (base_model_name_or_path)"
    return [f"{one.label} and {other.label} were made on different bases: {reason}."] if reason else []


def _other_task(one: AdapterWeights, other: AdapterWeights) -> list[str]:
    """Return in words how the tasks of two adapters differ; none if they do not, or if that is not known."""
    tasks = one.config.task_type, other.config.task_type
    if not all(tasks) or tasks[0] == tasks[1]:
        return []
    words = " and ".join(str(getattr(task, "value", task)) for task in tasks)
    return [f"{one.label} and {other.label} were made for different tasks: {words} (task_type)."]


def _is_known_to_share(one: AdapterWeights, other: AdapterWeights) -> bool:
    """Return whether the files of two adapters tell which bases they have."""
    found = one.compare_base(other)
    return (found is not None and found.verdict != UNVERIFIABLE) or bool(_base_name(one) and _base_name(other))


def _is_proven_to_share(one: AdapterWeights, other: AdapterWeights) -> bool:
    """Return whether the fingerprints of two adapters agree."""
    found = one.compare_base(other)
    return found is not None and found.verdict not in (DIFFERENT, UNVERIFIABLE)


def _base_name(adapter: AdapterWeights) -> str:
    return str(adapter.config.base_model_name_or_path or adapter.facts.get("base_name") or "")


def _shares_a_site(adapter: AdapterWeights, adapters: Sequence[AdapterWeights]) -> bool:
    return any(not adapter.factors.keys().isdisjoint(other.factors) for other in adapters if other is not adapter)


def check_joinable(adapters: Sequence[AdapterWeights]) -> None:
    """Refuse adapters that have parts of which no combination is defined.

    Raises:
        AdapterError: There is none, two copy one module, or they need different models.
        ConfigError: One trains biases of the base.
    """
    if not adapters:
        raise AdapterError("No adapter was named.")
    for adapter in adapters:
        check_plain_parts(adapter)
    for field, what in _must_agree().items():
        if len({str(getattr(adapter.config, field)) for adapter in adapters}) > 1:
            raise AdapterError(f"The adapters {what} ({field}), so one cannot stand for them.")
    _check_bare(adapters)
    _check_copies(adapters)


def _must_agree() -> dict[str, str]:
    """Return the fields in which adapters must agree to become one, and what it means if they do not."""
    of_variants = {variant.field: variant.must_agree for variant in asked_for() if variant.must_agree}
    return {**of_variants, "layer_replication": "were made on differently replicated layers"}


def _check_bare(adapters: Sequence[AdapterWeights]) -> None:
    """Refuse, beside bare parameters, what would give the result a part that no bare parameter can have."""
    bare = next((adapter.label for adapter in adapters if adapter.config.target_parameters), None)
    odd = [
        (adapter.label, f"is {variant.title}")
        for adapter in adapters
        for variant in variants_of(adapter.config)
        if not variant.fits(PARAMETER) and is_kept(variant)
    ]
    odd += [(adapter.label, "has a bias on B (lora_bias)") for adapter in adapters if adapter.config.lora_bias]
    for other, what in odd:
        if bare is not None:
            raise AdapterError(
                f"{other} {what}, and {bare} sits on bare parameters (target_parameters), which cannot have that: no "
                "one adapter can do what the two do. Keep both active, or merge them into a model."
            )


def _check_copies(adapters: Sequence[AdapterWeights]) -> None:
    """Refuse two copies of one module, and sites inside a copied one; the copy of one adapter is taken as it is."""
    holders: dict[str, set[int]] = {}
    for number, adapter in enumerate(adapters):
        for name in adapter.others.keys() - {name for name in adapter.others if name.endswith(ROWS)}:
            holders.setdefault(name.rpartition(".")[0], set()).add(number)
    twice = sorted(path for path, numbers in holders.items() if len(numbers) > 1)
    if twice:
        raise AdapterError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{len(twice)} such instance(s). First: {twice[0]}."
        )
    copied = tuple(holder.removeprefix(PREFIX) + "." for holder in holders)
    inside = [path for adapter in adapters for path in adapter.factors if f"{path}.".startswith(copied)]
    if inside:
        raise AdapterError(f"One adapter sits at {inside[0]}, which another has copied whole (modules_to_save).")


def check_plain_parts(adapter: AdapterWeights) -> None:
    """Refuse an adapter that trains biases of the base.

    Raises:
        ConfigError: It does.
    """
    if adapter.config.bias != "none":
        raise ConfigError(
            f"{adapter.label} trains biases of the base (bias={adapter.config.bias!r}), which no other adapter can "
            "take over. Merge it into a model instead."
        )


def joined_config(configs: Sequence[LoraConfig]) -> LoraConfig:
    """The first adapter's config with what any of them needs: a variant, a bias on B, copied modules.

    Args:
        configs: At least one; ranks, scales and targets are not looked at.
    """
    copied: list[str] = []
    for config in configs:
        copied += [*(config.modules_to_save or []), *(HEADS_BY_TASK.get(config.task_type, ()))]
    task = next((config.task_type for config in configs if config.task_type), None)
    heads = HEADS_BY_TASK.get(task, ())
    parameters = {entry for config in configs for entry in config.target_parameters or ()}
    return dataclasses.replace(
        configs[0],
        task_type=task,
        **_joined_variants(configs),
        lora_bias=any(config.lora_bias for config in configs),
        target_parameters=sorted(parameters) or None,
        modules_to_save=[word for word in dict.fromkeys(copied) if word not in heads] or None,
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        trainable_token_indices=next((c.trainable_token_indices for c in configs if c.trainable_token_indices), None),
    )


def _joined_variants(configs: Sequence[LoraConfig]) -> dict[str, Any]:
    """Return the fields of variants: as the first that asks has it where the result is of the variant, else default."""
    plain = without(configs[0], *asked_for())
    fields = {}
    for variant in asked_for():
        asking = [config for config in configs if variant in variants_of(config)]
        fields[variant.field] = getattr(asking[0] if asking and is_kept(variant) else plain, variant.field)
    return fields


def shared_facts(adapters: Sequence[AdapterWeights]) -> dict[str, Any]:
    """What is true of the result because it is true of all: the base's name and the tokenizer."""
    said = ("base_name", "tokenizer_sha256", "chat_template_sha256")
    first: Mapping[str, Any] = adapters[0].facts
    return {key: first[key] for key in said if key in first and all(a.facts.get(key) == first[key] for a in adapters)}
