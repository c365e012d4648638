"""Intended differences between lorakit's files and behavior and peft's, each with its reason.

A comparison fails if it finds a difference without an entry, and so does an entry that no comparison needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.core.inits import init_named

from .rows import Row


@dataclass(frozen=True)
class Difference:
    """One accepted difference.

    Attributes:
        reason: Why it is accepted.
        holds: Row, peft's value and ours -> whether this is the difference that is meant.
    """

    reason: str
    holds: Callable[[Row, Any, Any], bool]


ABSENT = "<absent>"

FILES_OF_PEFT_ALONE: Mapping[str, str] = {}
FILES_OF_OURS_ALONE: Mapping[str, Difference] = {
    "lorakit.json": Difference(
        "fingerprint of the base, SHA-256 of both files, rank and alpha of each site; peft does not read it",
        lambda row, *_: True,
    ),
    "lorakit_initial.safetensors": Difference(
        "initial factors of an adapter whose init changed the base, to load it without its data; peft does not read it",
        lambda row, *_: init_named(row.fields.get("init_lora_weights", True)).changes_base,
    ),
}

METADATA: Mapping[str, str] = {
    "lorakit": "tells a file that lorakit wrote from one that another program rewrote, so that damage is an error and a "
    "re-save is not",
}

CONFIG: Mapping[str, Difference] = {
    "target_parameters": Difference(
        "peft rewrites configs of models whose experts were fused since, and leaves an empty list if there was none",
        lambda row, theirs, ours: row.model == "mixtral-words" and theirs == [] and ours is None,
    ),
    "peft_version": Difference(
        "the API level that lorakit follows, which transformers requires, not the installed version",
        lambda row, theirs, ours: ours == "0.22.0",
    ),
    "target_modules": Difference(
        "'all-linear' is written as the shortest names that name the same modules; peft writes every path until they "
        "are twenty or more",
        lambda row, theirs, ours: (
            row.fields.get("target_modules") == "all-linear"
            and {path.rpartition(".")[2] for path in theirs} >= set(ours)
        ),
    ),
}

CONFIG_OF_CONVERTED: Mapping[str, Difference] = {
    field: Difference(
        "plain LoRA has no settings of an init; peft leaves them there, and warns of them when they are read",
        lambda row, theirs, ours: theirs is not None and ours is None,
    )
    for field in ("corda_config", "lora_ga_config")
}
"""Further differences if an adapter whose init changed the base is saved as plain LoRA."""

TENSORS_OF_PEFT_ALONE: Mapping[str, Difference] = {
    ".base_layer.weight": Difference(
        "peft copies the base's whole embedding or head matrix where one is targeted and its name is known to it; nothing "
        "trained it, and loading does not need it",
        lambda row, name, _: any(word in name for word in ("embed_tokens", "lm_head")),
    ),
    ".original_module.bias": Difference(
        "with bias='all', peft also saves the untrained bias of the original of a module in modules_to_save",
        lambda row, name, _: row.fields.get("bias") == "all",
    ),
    ".modules_to_save.bias": Difference(
        "with bias='all', peft saves the bias of a module in modules_to_save a second time under its name in memory",
        lambda row, name, _: row.fields.get("bias") == "all",
    ),
}

WHERE_PEFT_IS_WRONG: Mapping[str, str] = {
    "saved_modules_are_matched_at_a_dot": "modules_to_save is compared with str.endswith there, so 'out' names lora_dropout",
    "unknown_adapters_are_refused": "merging or activating a name that does not exist silently does nothing in peft",
    "unmerging_restores_bits": "unmerging subtracts the update in peft, so bf16 weights drift",
    "disable_while_merged_is_for_a_block": "a disabled forward unmerges permanently in peft",
    "a_failed_mixed_batch_leaves_nothing": "peft's hooks stay on the layers if a forward raises",
    "a_failed_call_leaves_the_model": "a get_peft_model that raises leaves wrapped layers in peft",
    "mismatched_files_are_named": "unexpected tensors are silently ignored by peft",
    "the_config_is_only_read": "get_peft_model and save_pretrained change the caller's config in peft",
    "a_merge_unties_with_a_word": "merging into a tied embedding also changes the head in peft",
    "several_dora_adapters_add": "the second DoRA adapter there scales the first one's result, so their order counts",
    "layers_hold_for_full_paths": "layers_to_transform is ignored there where a target is a full path",
    "layers_at_the_top_count": "layers_to_transform finds no layers there when their list is at the top of the model",
    "dropout_below_zero_is_refused": "a negative lora_dropout is accepted there and drops nothing",
    "merged_and_dora_rows_mix": "peft rejects mixed batches with DoRA, and while an adapter is merged",
    "a_converted_dora_keeps_its_magnitude": "converted from PiSSA to plain LoRA, a DoRA adapter loses what its magnitudes learned",
    "without_kasa_the_base_is_whole": "KaSA's truncation stays there when the adapter is disabled, unloaded or unused",
    "kasa_ranks_do_not_add_up": "a second KaSA adapter of another rank truncates the base of the first one there",
    "merging_rounds_once": "safe_merge rounds the delta to the weight's dtype before it is added there",
}
"""Behavior that is compared with our own formula instead; each has a test of this name in test_where_peft_is_wrong.py."""
