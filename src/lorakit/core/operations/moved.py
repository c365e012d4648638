"""Loose adapters whose init moved the base: as plain LoRA of twice the rank on the original, or refused.

An operation that took such factors for those of a plain adapter would be wrong in silence: they act on another weight.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lorakit.core.files.adapter_folder import AdapterFiles
from lorakit.core.files.restoring import RECOMPUTE, past_of
from lorakit.core.kinds import Slot
from lorakit.core.layering.sitemap import layers, state_of
from lorakit.core.making.residual import as_plain
from lorakit.errors import AdapterError, AdapterFileError

Factors = tuple[Tensor, Tensor, int]


def check_plain(model: nn.Module, name: str) -> None:
    """Refuse an adapter on a model that no plain LoRA on the original base is.

    Args:
        model: The adapted model; only read.
        name: The adapter.

    Raises:
        AdapterError: Its init changed the base by more than a product of low rank.
    """
    for path, layer in layers(model):
        if layer.moved_by == name and layer.initial is None:
            raise AdapterError(
                f"{path}: {state_of(model).configs[name].init_lora_weights} changed the base by more than a product of "
                f"low rank, so adapter {name!r} is no plain LoRA on the original: its factors alone do not say what it "
                "does. Merge it, or write what it makes of the model with merged_state_dict."
            )


def on_the_original(files: AdapterFiles, factors: Mapping[str, Factors]) -> dict[str, tuple[Tensor, Tensor]] | None:
    """The factors of an adapter from disk as plain LoRA of twice the rank on the original base.

    Args:
        files: What was read.
        factors: Path on disk -> A (r, in), B (out, r) and the number of experts side by side in them, 0 where there are
            none, as it lies there.

    Returns:
        Path on disk -> A (2r, in) and B (out, 2r), or None where it is plain LoRA as it lies there.

    Raises:
        AdapterFileError: The factors act on a base that an init changed, and the folder does not say how, or that base
            was quantised.
    """
    past = past_of(files.folder, files.config, files.sidecar.began if files.is_ours else {}, False, (RECOMPUTE,))
    if not past.moves:
        return None
    said = f"{files.folder}: init_lora_weights is {files.config.init_lora_weights!r}: the factors act on a base that it"
    if past.first is None:
        raise AdapterFileError(
            f"{said} changed, and the folder does not say how. Load it with allow=['recompute_init'] and save it with "
            "save_adapter, or, in PEFT, with path_initial_model_for_weight_conversion. If the base at hand is the "
            "changed one, set init_lora_weights to true in its config."
        )
    if files.sidecar.base is not None and files.sidecar.base.bounds:
        raise AdapterFileError(
            f"{said} changed while it was quantised, so it was rounded a second time, and this is no plain LoRA on the "
            "original. Merge it instead."
        )
    plain = {}
    for path, (A, B, experts) in factors.items():
        first = past.first.get(path)
        if first is None or (first[0].shape, first[1].shape) != (A.shape, B.shape):
            raise AdapterFileError(f"{files.folder}: the first factors of {path} are missing or of another shape.")
        plain[path] = as_plain(Slot("weight", B.shape[0], A.shape[1], experts=experts), A, B, first)
    return plain
