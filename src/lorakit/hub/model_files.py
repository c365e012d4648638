"""Write a model's weights and config to a directory, with the keys that readers other than transformers 5 know."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.durable import JsonObject, as_object, read_json, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CONFIG = "config.json"

_FULL = {"full_attention": "rope_scaling", "full_attention.rope_theta": "rope_theta"}
_GEMMA3 = {**_FULL, "sliding_attention.rope_theta": "rope_local_base_freq"}
_USUAL = {"": "rope_scaling", "rope_theta": "rope_theta", "partial_rotary_factor": "partial_rotary_factor"}

EARLIER_ROPE: Mapping[str, Mapping[str, str]] = {
    "gemma3_text": _GEMMA3,
    "gemma3n_text": _GEMMA3,
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "olmo3": _FULL,
}
"""`model_type` of a config with unusual keys -> path of a value in `rope_parameters` -> its earlier key."""


def with_earlier_rope(config: JsonObject) -> JsonObject:
    """Return the contents of a config.json with the rope parameters under their earlier keys too, at every level.

    transformers 5 writes only `rope_parameters`, but other readers, such as mlx-lm, know only the keys that it
    replaced. transformers reads the same parameters from both.
    """
    values = {name: with_earlier_rope(value) if isinstance(value, dict) else value for name, value in config.items()}
    rope = as_object(config.get("rope_parameters"))
    by_path: JsonObject = {"": rope, **rope}
    by_path |= {f"{kind}.{name}": value for kind, part in rope.items() for name, value in as_object(part).items()}
    keys = EARLIER_ROPE.get(str(config.get("model_type")), _USUAL)
    earlier = {key: by_path[path] for path, key in keys.items() if path in by_path}
    if as_object(earlier.get("rope_scaling")).get("rope_type", "default") == "default":
        earlier.pop("rope_scaling", None)
    return {**earlier, **values}


def write_weights(model: PreTrainedModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Write a model's weights (safetensors; only `weights` if given), generation config, and config with earlier keys.

    Raises:
        OSError: The directory cannot be written.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(str(folder), state_dict=weights)
    except SafetensorError as cause:  # raised by the Rust writer on a full disk
        raise OSError(None, f"the weights could not be written: {cause}") from cause
    readable = (folder / CONFIG).stat().st_mode
    for part in folder.glob("*.safetensors"):
        part.chmod(readable)  # safetensors makes the files private, regardless of the umask
    config = as_object(read_json(folder / CONFIG))
    if (readable_elsewhere := with_earlier_rope(config)) != config:
        write_json(folder / CONFIG, readable_elsewhere)
