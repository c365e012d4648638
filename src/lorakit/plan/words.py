"""Why an adapter has as many parameters as it has, in sentences.

The count is a sum over sites, so the sentences say which name chose which modules, what one of each trains, and how
the sum comes about. This module computes nothing that `params` does not.
"""

from __future__ import annotations

from lorakit.config import LoraConfig
from lorakit.plan.params import Count, Group
from lorakit.targets import SEVERAL_MODULES

_MANY_GROUPS = 8


def reasons(counted: Count, config: LoraConfig) -> list[str]:
    """Why each target matched what it did, and how the total comes about.

    Args:
        counted: The counts.
        config: The config that they are of.

    Returns:
        Sentences, each whole on its own.
    """
    by_entry: dict[str, list[Group]] = {}
    for group in counted.groups():
        by_entry.setdefault(group.entry, []).append(group)
    sentences = [_entry(entry, groups) for entry, groups in sorted(by_entry.items())]
    sentences.append(_sum(counted))
    sentences.append(_idle(config))
    if counted.magnitudes:
        sentences.append(config.own_numbers_in_words(counted.magnitudes))
    if counted.frozen:
        sentences.append(f"LoRA-FA leaves one factor of each site as it is: {counted.frozen:,} numbers beside these.")
    for path, numbers in counted.saved.items():
        sentences.append(f"{path} is copied and trained whole: {numbers:,}.")
    for path, numbers in counted.rows.items():
        sentences.append(f"Some rows of {path} are trained, in place of the base's: {numbers:,}.")
    if config.bias != "none":
        sentences.append(f"bias {config.bias!r} trains {counted.biases:,} numbers of the base's biases.")
    # `_entry` says which modules one name matches, with the numbers
    sentences += [note.text for note in counted.notes if note.kind != SEVERAL_MODULES]
    sentences += [unmatched.text for unmatched in counted.missing]
    return sentences


def _entry(entry: str, groups: list[Group]) -> str:
    parts = [f"{g.label} ({g.in_features:,}→{g.out_features:,}, {_kinds(g)}), {g.each:,} each" for g in groups]
    if len(groups) == 1:
        return f"{entry!r} names {parts[0]}."
    if entry.lower() == "all-linear":
        return f"{entry!r} takes every dense layer but the output head: {'; '.join(parts)}."
    attention = [g.label for g in groups if "attn" in g.label or "attention" in g.label]
    mlp = [g.label for g in groups if "mlp" in g.label]
    told = ", in the attention and in the MLP" if attention and mlp else ""
    return f"{entry!r} names {len(groups)} different modules{told}: {' and '.join(parts)}."


def _kinds(group: Group) -> str:
    if group.experts > 1:
        return f"{group.sites} × {group.experts} experts in one parameter"
    return f"{group.sites} × {group.kind}" if group.sites > 1 else f"one {group.kind}"


def _sum(counted: Count) -> str:
    groups = counted.groups()
    by_sites: dict[int, list[Group]] = {}
    for group in groups:
        by_sites.setdefault(group.sites, []).append(group)
    total = sum(group.trainable for group in groups)
    if len(groups) > _MANY_GROUPS:
        return f"In all {len(counted.sites):,} sites with {total:,} numbers."
    terms = []
    for count, members in by_sites.items():
        inner = " + ".join(f"{group.each:,}" for group in members)
        terms.append(f"{count} × ({inner})" if len(members) > 1 else f"{count} × {inner}")
    each = "out (of an embedding in)" if counted.frozen else "(in + out)"
    each += ", and each expert as much" if any(group.experts > 1 for group in groups) else ""
    return f"{' + '.join(terms)} = {total:,}; one site trains r × {each}" + (" + out." if counted.magnitudes else ".")


def _idle(config: LoraConfig) -> str:
    parts = "Dropout has no parameters" if config.lora_dropout else "Dropout, if set, has no parameters"
    return parts + (', and bias "none" adds none.' if config.bias == "none" else ".")
