"""The one door to transformers and the model hub: finding models, loading them, their shapes, this machine's speed.

Nothing heavy is imported before a function is called. Knows nothing of adapters or training.
"""

from __future__ import annotations

from lorakit.hub.calibration import Calibration, DtypeChoice, calibrate, choose_dtype
from lorakit.hub.models import load_model, save_model, stored_as_files
from lorakit.hub.packaged import PACKAGED, packaged_directory
from lorakit.hub.quantizing import quantiser_facts, require_quantiser
from lorakit.hub.shapes import shape_of, shape_of_module, skeleton
from lorakit.hub.sources import ModelSource, adapter_from_hub, require, resolve
from lorakit.hub.tokenizers import AddedTokens, add_tokens, chat_template_hash, load_tokenizer, tokenizer_hash

__all__ = [
    "PACKAGED",
    "AddedTokens",
    "Calibration",
    "DtypeChoice",
    "ModelSource",
    "adapter_from_hub",
    "add_tokens",
    "calibrate",
    "chat_template_hash",
    "choose_dtype",
    "load_model",
    "load_tokenizer",
    "packaged_directory",
    "quantiser_facts",
    "require",
    "require_quantiser",
    "resolve",
    "save_model",
    "shape_of",
    "shape_of_module",
    "skeleton",
    "stored_as_files",
    "tokenizer_hash",
]
