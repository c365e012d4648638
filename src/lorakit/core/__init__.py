"""LoRA adapters for any PyTorch model: attach, use, merge, save and load them.

The functions modify the model in place instead of wrapping it, and return reports of what they did. This package
depends on torch and safetensors, but not on transformers or on lorakit's training and command-line code.
"""

from lorakit.core.attachment.attaching import AttachReport, attach, detach
from lorakit.core.attachment.loading import LoadReport, TrainedAdapter, load_adapter, read_for_training
from lorakit.core.attachment.saving import save_adapter, save_as_trained
from lorakit.core.files.adapter_folder import AdapterFiles, SavedAdapter, read_adapter
from lorakit.core.files.inspecting import AdapterSummary, check_adapter, inspect_adapter
from lorakit.core.inits import init_named
from lorakit.core.int8.calibrating import base_losses
from lorakit.core.int8.quantized_base import (
    Int8Base,
    int8_scales,
    quantize_base,
    quantize_with_scales,
    record_original_base,
)
from lorakit.core.kinds import Kind, WeightSpec, kind_named
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.linalg import RankLimit
from lorakit.core.merging import MergeReport, explain_inexact_merge, merge, merge_and_unload, merged_state_dict, unmerge
from lorakit.core.model.activation import (
    activate,
    adapters,
    checkpoint_contexts,
    continued,
    disable,
    invocation_offsets,
    invoked,
    one_pass,
    penalties,
    prompt_offset,
    route,
    set_trained,
    trainable_parameters,
    use,
    waits_for_tokens,
    without_adapters,
)
from lorakit.core.model.base_samples import APART, Sample, agreement
from lorakit.core.model.base_view import dequantize
from lorakit.core.model.fingerprint import (
    Fingerprint,
    fingerprint,
    sampled_positions,
    weight_file_hashes,
    weight_file_inputs,
)
from lorakit.core.model.target_weights import Site, sites
from lorakit.core.operations.combination_types import COMBINATION_TYPES, CombinationType
from lorakit.core.operations.combining import average, combine, combine_folders, rescale, subtract
from lorakit.core.operations.common_form import CommonAdapter, besides_lora, common_form
from lorakit.core.operations.comparing import Comparison, compare_adapters, compare_folders
from lorakit.core.operations.data_init import collect_for
from lorakit.core.operations.extracting import ExtractReport, extract, extract_to_folder
from lorakit.core.operations.reducing import SiteIntruders, compress, compress_folder, reduce_intruders
from lorakit.core.operations.tensor_sources import TensorSource, source_of_folder, source_of_model
from lorakit.core.operations.writing import OperationReport
from lorakit.core.quantization.int8_linear import Int8Linear
from lorakit.core.quantization.packed import PackedLinear, packed_linear
from lorakit.core.quantization.packed_layouts import AwqLinear, CompressedLinear, GptqLinear
from lorakit.core.routing.route import AdapterBank
from lorakit.core.statistics.moments import Statistics, load_statistics
from lorakit.core.variants import check_invocation, invocations_of, moving_variant, variants_of

__all__ = [
    "APART",
    "COMBINATION_TYPES",
    "AdapterBank",
    "AdapterFiles",
    "AdapterSummary",
    "AttachReport",
    "AwqLinear",
    "CombinationType",
    "CommonAdapter",
    "Comparison",
    "CompressedLinear",
    "ExtractReport",
    "Fingerprint",
    "GptqLinear",
    "Int8Base",
    "Int8Linear",
    "Kind",
    "LoadReport",
    "LoraLayer",
    "MergeReport",
    "OperationReport",
    "PackedLinear",
    "RankLimit",
    "Sample",
    "SavedAdapter",
    "Site",
    "SiteIntruders",
    "Statistics",
    "TensorSource",
    "TrainedAdapter",
    "WeightSpec",
    "activate",
    "adapters",
    "agreement",
    "attach",
    "average",
    "base_losses",
    "besides_lora",
    "check_adapter",
    "check_invocation",
    "checkpoint_contexts",
    "collect_for",
    "combine",
    "combine_folders",
    "common_form",
    "compare_adapters",
    "compare_folders",
    "compress",
    "compress_folder",
    "continued",
    "dequantize",
    "detach",
    "disable",
    "explain_inexact_merge",
    "extract",
    "extract_to_folder",
    "fingerprint",
    "init_named",
    "inspect_adapter",
    "int8_scales",
    "invocation_offsets",
    "invocations_of",
    "invoked",
    "kind_named",
    "load_adapter",
    "load_statistics",
    "merge",
    "merge_and_unload",
    "merged_state_dict",
    "moving_variant",
    "one_pass",
    "packed_linear",
    "penalties",
    "prompt_offset",
    "quantize_base",
    "quantize_with_scales",
    "read_adapter",
    "read_for_training",
    "record_original_base",
    "reduce_intruders",
    "rescale",
    "route",
    "sampled_positions",
    "save_adapter",
    "save_as_trained",
    "set_trained",
    "sites",
    "source_of_folder",
    "source_of_model",
    "subtract",
    "trainable_parameters",
    "unmerge",
    "use",
    "variants_of",
    "waits_for_tokens",
    "weight_file_hashes",
    "weight_file_inputs",
    "without_adapters",
]
