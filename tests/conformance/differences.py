"""Everything in which lorakit's files and behaviour differ from peft's on purpose, each with its reason.

A comparison that finds a difference that is not here fails, and so does an entry that no comparison needs.
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
        "fingerprint of the base, SHA-256 of both files, rank and alpha of each site; peft does not look at it",
        lambda row, *_: True,
    ),
    "lorakit_initial.safetensors": Difference(
        "what an adapter that moved the base began with, so that it loads without its data; peft does not look at it",
        lambda row, *_: init_named(row.fields.get("init_lora_weights", True)).changes_base,
    ),
}

METADATA: Mapping[str, str] = {
    "lorakit": "tells a file that lorakit wrote from one that another program rewrote, so that damage is an error and a "
    "re-save is not",
}

CONFIG: Mapping[str, Difference] = {
    "target_parameters": Difference(
        "peft rewrites configs of models whose experts were fused since, and leaves an empty list where there was none",
        lambda row, theirs, ours: row.model == "mixtral-words" and theirs == [] and ours is None,
    ),
    "peft_version": Difference(
        "the API level that is followed, which transformers asks for, not the version that happens to be installed",
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
"""More of them where an adapter that moved the base is written as plain LoRA."""

TENSORS_OF_PEFT_ALONE: Mapping[str, Difference] = {
    ".base_layer.weight": Difference(
        "peft copies the base's whole embedding or head matrix where one is targeted and its name is known to it; nothing "
        "trained it, and loading does not need it",
        lambda row, name, _: any(word in name for word in ("embed_tokens", "lm_head")),
    ),
    ".original_module.bias": Difference(
        "with bias='all', peft also saves the bias of the original beside a copied module; nothing trained it",
        lambda row, name, _: row.fields.get("bias") == "all",
    ),
    ".modules_to_save.bias": Difference(
        "with bias='all', peft saves the bias of a copied module a second time under the copy's name in memory",
        lambda row, name, _: row.fields.get("bias") == "all",
    ),
}

WHERE_PEFT_IS_WRONG: Mapping[str, str] = {
    "saved_modules_are_matched_at_a_dot": "modules_to_save is compared with str.endswith there, so 'out' names lora_dropout",
    "unknown_adapters_are_refused": "merging or activating a name that does not exist does nothing there, in silence",
    "unmerging_restores_bits": "unmerging subtracts there, and bf16 weights drift",
    "disable_while_merged_is_for_a_block": "a disabled forward unmerges for good there",
    "a_failed_mixed_batch_leaves_nothing": "its hooks stay on the layers when a forward raises",
    "a_failed_call_leaves_the_model": "a refused get_peft_model leaves wrapped layers there",
    "mismatched_files_are_named": "unexpected tensors are passed over in silence there",
    "the_config_is_only_read": "get_peft_model and save_pretrained write into the caller's config there",
    "a_merge_unties_with_a_word": "merging into a tied embedding changes the head as well there",
    "several_dora_adapters_add": "the second DoRA adapter there scales the first one's result, so their order counts",
    "layers_hold_for_full_paths": "layers_to_transform is ignored there where a target is a full path",
    "layers_at_the_top_count": "layers_to_transform finds no layers there when their list is at the top of the model",
    "gaussian_reaches_embeddings": "init_lora_weights='gaussian' is silently the default there on an embedding",
    "dropout_below_zero_is_refused": "a negative lora_dropout is accepted there and drops nothing",
    "merged_and_dora_rows_mix": "mixed batches are refused there with DoRA, and while something is merged",
    "a_converted_dora_keeps_its_magnitude": "converted from PiSSA to plain LoRA, a DoRA adapter loses what its magnitudes learned",
    "without_kasa_the_base_is_whole": "KaSA's truncation stays there when the adapter is disabled, unloaded or unused",
    "kasa_ranks_do_not_add_up": "a second KaSA adapter of another rank truncates the base of the first one there",
    "merging_rounds_once": "safe_merge rounds the delta to the weight's dtype before it is added there",
}
"""Behaviour that is compared with our own formula instead; each has a test of its name in test_where_peft_is_wrong.py."""
