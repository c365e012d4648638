"""What several adapters must share to become one, and what the one takes over from them.

Knows configs, names and fingerprints; the numbers are combined elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lorakit.config import HEADS_BY_TASK, LoraConfig
from lorakit.core.files.fingerprinting import DIFFERENT
from lorakit.core.files.keys import PREFIX, ROWS
from lorakit.core.operations.loose import LooseAdapter
from lorakit.errors import AdapterError, BaseMismatchError, ConfigError


def check_one_base(adapters: Sequence[LooseAdapter]) -> None:
    """Refuse adapters of different bases, as far as they carry fingerprints.

    Raises:
        BaseMismatchError: Two of them do not go together.
    """
    known = [adapter for adapter in adapters if adapter.base is not None]
    for adapter in known[1:]:
        found = known[0].compare_base(adapter)
        if found is not None and found.verdict == DIFFERENT:
            raise BaseMismatchError(
                f"{known[0].label} and {adapter.label} were made on different bases: {found.reason}. If they fit "
                "nevertheless, allow 'base_mismatch'."
            )


def check_joinable(adapters: Sequence[LooseAdapter]) -> None:
    """Refuse adapters that have parts of which no combination is defined.

    Raises:
        AdapterError: There is none, two copy one module, or they need different models.
        ConfigError: One trains biases of the base.
    """
    if not adapters:
        raise AdapterError("No adapter was named.")
    for adapter in adapters:
        check_plain_parts(adapter)
    for field, what in MUST_AGREE.items():
        if len({str(getattr(adapter.config, field)) for adapter in adapters}) > 1:
            raise AdapterError(f"The adapters {what} ({field}), so one cannot stand for them.")
    _check_bare(adapters)
    _check_copies(adapters)


MUST_AGREE: Mapping[str, str] = {
    "alora_invocation_tokens": "act after different invocation tokens",
    "layer_replication": "were made on differently replicated layers",
}
"""Fields of the config in which adapters must agree to become one, and what it means if they do not."""


def _check_bare(adapters: Sequence[LooseAdapter]) -> None:
    """Refuse, beside bare parameters, what would give the result a part that no bare parameter can have."""
    bare = next((adapter.label for adapter in adapters if adapter.config.target_parameters), None)
    for field, what in (("use_dora", "is DoRA"), ("lora_bias", "has a bias on B (lora_bias)")):
        other = next((adapter.label for adapter in adapters if getattr(adapter.config, field)), None)
        if bare is not None and other is not None:
            raise AdapterError(
                f"{other} {what}, and {bare} sits on bare parameters (target_parameters), which cannot have that: no "
                "one adapter can do what the two do. Keep both active, or merge them into a model."
            )


def _check_copies(adapters: Sequence[LooseAdapter]) -> None:
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


def check_plain_parts(adapter: LooseAdapter) -> None:
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
    """The first adapter's config with what any of them needs: DoRA, a bias on B, copied modules.

    Args:
        configs: At least one; ranks, scales and targets are not looked at.
    """
    copied: list[str] = []
    for config in configs:
        copied += [*(config.modules_to_save or []), *(HEADS_BY_TASK.get(config.task_type, ()))]  # type: ignore[call-overload]
    task = next((config.task_type for config in configs if config.task_type), None)
    heads = HEADS_BY_TASK.get(task, ())  # type: ignore[call-overload]
    parameters = {entry for config in configs for entry in config.target_parameters or ()}
    return dataclasses.replace(
        configs[0],
        task_type=task,
        use_dora=any(config.use_dora for config in configs),
        lora_bias=any(config.lora_bias for config in configs),
        target_parameters=sorted(parameters) or None,
        modules_to_save=[word for word in dict.fromkeys(copied) if word not in heads] or None,
        fan_in_fan_out=any(config.fan_in_fan_out for config in configs),
        trainable_token_indices=next((c.trainable_token_indices for c in configs if c.trainable_token_indices), None),
    )


def shared_facts(adapters: Sequence[LooseAdapter]) -> dict[str, Any]:
    """What is true of the result because it is true of all: the base's name and the tokenizer."""
    said = ("base_name", "tokenizer_sha256", "chat_template_sha256")
    first: Mapping[str, Any] = adapters[0].facts
    return {key: first[key] for key in said if key in first and all(a.facts.get(key) == first[key] for a in adapters)}
