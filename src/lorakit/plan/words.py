"""Explanations of an adapter's parameter count.

The count is a sum over sites; the messages say which target entry matched which modules, what each of them trains, and
how the sum is formed. This module computes nothing that `params` does not.
"""

from __future__ import annotations

from lorakit.config import LoraConfig
from lorakit.plan.params import Count, Group
from lorakit.targets import SEVERAL_MODULES

_MANY_GROUPS = 8


def reasons(counted: Count, config: LoraConfig) -> list[str]:
    """Return why each target matched what it did, and how the total is formed.

    Args:
        counted: The counts.
        config: The config that was counted.

    Returns:
        Messages, each self-contained.
    """
    by_entry: dict[str, list[Group]] = {}
    for group in counted.groups():
        by_entry.setdefault(group.entry, []).append(group)
    sentences = [_entry(entry, groups) for entry, groups in sorted(by_entry.items())]
    sentences.append(_sum(counted))
    sentences.append(_idle(config))
    sentences += config.notes_on_own_numbers(counted.own_numbers)
    if counted.frozen:
        sentences.append(f"LoRA-FA freezes one factor of each site: {counted.frozen:,} parameters, not included.")
    for path, count in counted.saved.items():
        sentences.append(f"{path} is a saved module with {count:,} parameters.")
    for path, count in counted.rows.items():
        sentences.append(f"{path} has trainable token rows with {count:,} parameters.")
    if config.bias != "none":
        sentences.append(f"bias={config.bias!r} trains {counted.biases:,} biases of the base.")
    # `_entry` already reports which modules a name matches, with counts
    sentences += [note.text for note in counted.notes if note.kind != SEVERAL_MODULES]
    sentences += [unmatched.text for unmatched in counted.missing]
    return sentences


def _entry(entry: str, groups: list[Group]) -> str:
    parts = [f"{g.label} ({g.in_features:,}→{g.out_features:,}, {_kinds(g)}), {g.each:,} each" for g in groups]
    if len(groups) == 1:
        return f"{entry!r} matches {parts[0]}."
    if entry.lower() == "all-linear":
        return f"{entry!r} matches every dense layer except the output head: {'; '.join(parts)}."
    attention = [g.label for g in groups if "attn" in g.label or "attention" in g.label]
    mlp = [g.label for g in groups if "mlp" in g.label]
    where = ", in the attention and in the MLP" if attention and mlp else ""
    return f"{entry!r} matches {len(groups)} different modules{where}: {' and '.join(parts)}."


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
        return f"In total {len(counted.sites):,} sites with {total:,} parameters."
    terms = []
    for count, members in by_sites.items():
        inner = " + ".join(f"{group.each:,}" for group in members)
        terms.append(f"{count} × ({inner})" if len(members) > 1 else f"{count} × {inner}")
    each = "out (for an embedding in)" if counted.frozen else "(in + out)"
    each += ", and each expert the same" if any(group.experts > 1 for group in groups) else ""
    if counted.own_numbers:
        each += " + out" if counted.magnitudes else ", plus or minus what its variant changes"
    return f"{' + '.join(terms)} = {total:,}; each site trains r × {each}."


def _idle(config: LoraConfig) -> str:
    parts = "Dropout has no parameters" if config.lora_dropout else "Dropout, if set, has no parameters"
    return parts + (', and bias "none" adds none.' if config.bias == "none" else ".")
