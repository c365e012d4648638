"""Load models and tokenizers with transformers, read layer shapes, quantize models, and benchmark the machine."""

from __future__ import annotations

from lorakit.hub.calibration import (
    Calibration,
    DtypeChoice,
    Units,
    calibrate,
    choose_dtype,
    chosen_by_units,
    expected_dtype,
    pick_device,
    units_of,
)
from lorakit.hub.converting import as_kept
from lorakit.hub.model_config import (
    EMBEDDING_LIST,
    TASKS,
    WITH_NEW_HEADS,
    Family,
    ModelFacts,
    agree_on_padding,
    config_of,
    copy_embedding_files,
    embedding_folder,
    write_embedding_files,
)
from lorakit.hub.model_files import with_earlier_rope
from lorakit.hub.models import (
    AddedTokens,
    LoadedModel,
    LoadOptions,
    adapter_tokenizer,
    add_tokens,
    load_for_task,
    load_model,
    load_tokenizer,
    save_model,
    stored_as_files,
    tokenizer_files,
)
from lorakit.hub.packaged import PACKAGED, packaged_directory
from lorakit.hub.quantizing import dequantize_files, quantization_metadata, require_quantizer
from lorakit.hub.shapes import shape_for_task, shape_of, shape_of_module, skeleton
from lorakit.hub.sources import ModelSource, base_named, check_upload, is_hub_id, push_folder, require, resolve
from lorakit.hub.tokenizer_hashes import chat_template_hash, tokenizer_hash, tokenizer_settings

__all__ = [
    "EMBEDDING_LIST",
    "PACKAGED",
    "TASKS",
    "WITH_NEW_HEADS",
    "AddedTokens",
    "Calibration",
    "DtypeChoice",
    "Family",
    "LoadOptions",
    "LoadedModel",
    "ModelFacts",
    "ModelSource",
    "Units",
    "adapter_tokenizer",
    "add_tokens",
    "agree_on_padding",
    "as_kept",
    "base_named",
    "calibrate",
    "chat_template_hash",
    "check_upload",
    "choose_dtype",
    "chosen_by_units",
    "config_of",
    "copy_embedding_files",
    "dequantize_files",
    "embedding_folder",
    "expected_dtype",
    "is_hub_id",
    "load_for_task",
    "load_model",
    "load_tokenizer",
    "packaged_directory",
    "pick_device",
    "push_folder",
    "quantization_metadata",
    "require",
    "require_quantizer",
    "resolve",
    "save_model",
    "shape_for_task",
    "shape_of",
    "shape_of_module",
    "skeleton",
    "stored_as_files",
    "tokenizer_files",
    "tokenizer_hash",
    "tokenizer_settings",
    "units_of",
    "with_earlier_rope",
    "write_embedding_files",
]
