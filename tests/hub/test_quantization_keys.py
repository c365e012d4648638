"""Keys of quantization configs: each key of the packages that write them is accepted for a reason, or rejected."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.utils import quantization_config as theirs

from lorakit import hub
from lorakit.errors import ModelError
from lorakit.hub.quantization_keys import FORMATS, GROUP, WEIGHTS, check_keys

from .. import packed_models, small_models

CLASSES = {
    "gptq": theirs.GPTQConfig,
    "awq": theirs.AwqConfig,
    "compressed-tensors": theirs.CompressedTensorsConfig,
    "fp8": theirs.FineGrainedFP8Config,
    "mxfp4": theirs.Mxfp4Config,
}

BY_TRANSFORMERS = {"bitsandbytes": theirs.BitsAndBytesConfig, "torchao": theirs.TorchAoConfig}
"""Methods whose files transformers loads itself."""

COMPRESSED = {
    "QuantizationConfig": (
        *("config_groups", "quant_method", "kv_cache_scheme", "format", "quantization_status"),
        *("global_compression_ratio", "ignore", "moe_sparsity_config"),
    ),
    "QuantizationScheme": ("targets", "weights", "input_activations", "output_activations", "format"),
    "QuantizationArgs": (
        *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
        *("scale_dtype", "zp_dtype", "observer", "observer_kwargs"),
    ),
}
"""Fields of the classes of compressed-tensors 0.20.1."""

WRITTEN = ("version", "quant_method", "sparsity_config", "transform_config")
"""Keys that `ModelCompressor.update_config` of compressed-tensors 0.20.1 writes besides those of `QuantizationConfig`."""

OURS = {"QuantizationConfig": FORMATS["compressed-tensors"], "QuantizationScheme": GROUP, "QuantizationArgs": WEIGHTS}

AUTO_GPTQ = (
    *("bits", "group_size", "damp_percent", "desc_act", "static_groups", "sym", "true_sequential", "quant_method"),
    *("checkpoint_format", "model_name_or_path", "model_file_base_name", "is_marlin_format"),
)
AUTO_AWQ = ("quant_method", "zero_point", "q_group_size", "w_bit", "version", "modules_to_not_convert")


@pytest.mark.parametrize("method", CLASSES)
def test_every_key_of_transformers_is_accepted_for_a_reason(method: str) -> None:
    base = theirs.GPTQConfig if method == "awq" else CLASSES[method]
    names = {
        name
        for kind in (base, CLASSES[method])
        for name, one in inspect.signature(kind.__init__).parameters.items()
        if name != "self" and one.kind is not inspect.Parameter.VAR_KEYWORD
    }
    assert len(names) >= 2 and names <= FORMATS[method].keys()
    assert all(key.why for key in FORMATS[method].values())


@pytest.mark.parametrize("name", COMPRESSED)
def test_every_key_of_compressed_tensors_is_accepted_for_a_reason(name: str) -> None:
    assert set(COMPRESSED[name]) <= OURS[name].keys()


@pytest.mark.parametrize("name", COMPRESSED)
def test_the_installed_compressed_tensors_has_no_other_keys(name: str) -> None:
    package = pytest.importorskip("compressed_tensors.quantization")
    assert set(getattr(package, name).model_fields) <= OURS[name].keys()


def test_every_key_of_the_tools_that_write_files_is_accepted_for_a_reason() -> None:
    assert set(WRITTEN) <= FORMATS["compressed-tensors"].keys()
    assert set(AUTO_GPTQ) <= FORMATS["gptq"].keys() and set(AUTO_AWQ) <= FORMATS["awq"].keys()


ROTATION = {"u": {"type": "hadamard", "apply": [{"targets": ["Linear"], "location": "input"}]}}
REJECTED: list[tuple[str, dict[str, Any], str]] = [
    ("int8-channel", {"transform_config": {"config_groups": ROTATION}}, "transform_config"),
    ("int8-channel", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
    ("int8-channel", {"moe_sparsity_config": {"method": "prune"}}, "moe_sparsity_config"),
    ("int8-channel", {"config_groups": {"W8A8": ["Linear"]}}, "W8A8"),
    ("gptq", {"rotation": "hadamard"}, "rotation"),
    ("gptq", {"adapter": {"name": "lora", "path": "x"}}, "adapter"),
    ("gptq", {"dynamic": {"+:.*q_proj.*": {"bits": 8}}}, "dynamic"),
    ("gptq", {"pack_dtype": "int16"}, "pack_dtype"),
    ("gptq", {"is_marlin_format": True}, "is_marlin_format"),
    ("awq", {"backend": "llm-awq"}, "backend"),
    ("awq", {"smooth": True}, "smooth"),
]


@pytest.mark.parametrize(("layout", "values", "field"), REJECTED, ids=[f"{a}-{c}" for a, _, c in REJECTED])
def test_keys_that_change_results_are_rejected(
    layout: str, values: dict[str, Any], field: str, wide_model_directory: Path
) -> None:
    dense = hub.load_model(wide_model_directory, "float32")
    packed_models.write_packed(wide_model_directory, dense, layout)
    path = wide_model_directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= values
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        hub.load_model(wide_model_directory)
    assert caught.value.field == field and caught.value.allowed


@pytest.mark.parametrize(
    ("change", "field"),
    [({"strategy": "tensor_group"}, "strategy"), ({"dynamic": True}, "dynamic"), ({"permutation": [1]}, "permutation")],
)
def test_settings_of_weights_that_change_results_are_rejected(change: dict[str, Any], field: str) -> None:
    values = packed_models.quantization("int8-channel")
    values["config_groups"]["group_0"]["weights"] |= change
    with pytest.raises(ModelError) as caught:
        check_keys(values)
    assert caught.value.field == field and caught.value.where == f"config_groups.group_0.weights.{field}"


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt"),
        ({"quant_method": "fp8", "hadamard": True}, "hadamard"),
        ({"quant_method": "mxfp4", "group_size": 16}, "group_size"),
    ],
)
def test_keys_of_other_methods_are_rejected(values: dict[str, Any], field: str) -> None:
    with pytest.raises(ModelError) as caught:
        check_keys(values)
    assert caught.value.field == field


@pytest.mark.parametrize(
    "values",
    [
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
        {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
        {"quant_method": "gptq", "bits": 4, "meta": {"quantizer": ["gptqmodel:5.0"]}, "pack_dtype": "int32"},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"-:.*gate.*": {}}, "unset": None},
        {**packed_models.quantization("fp8-block"), "sparsity_config": {}, "transform_config": {}, "version": "0.20.1"},
    ],
)
def test_configs_of_published_models_are_accepted(values: dict[str, Any]) -> None:
    check_keys(values)


@pytest.fixture(scope="module")
def quantized_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of one model, as each quantizer of transformers saves it."""
    pytest.importorskip("bitsandbytes"), pytest.importorskip("torchao")
    torch.manual_seed(0)
    dense = tmp_path_factory.mktemp("dense")
    small_models.llama(hidden_size=64, intermediate_size=128).save_pretrained(dense)
    folders = {}
    for name in ("nf4", "int8", "int8-torchao"):
        folders[name] = tmp_path_factory.mktemp(name)
        hub.load_model(dense, "float32", quantization=name).save_pretrained(folders[name])
    return folders


def _changed(folder: Path, to: Path, changes: dict[str, Any]) -> Path:
    """Copy a model with another quantization config; the value `None` removes a key."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    values = config["quantization_config"] | changes
    config["quantization_config"] = {name: value for name, value in values.items() if value is not None}
    (to / "config.json").write_text(json.dumps(config))
    return to


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[5, 17, 20, 3, 9]])).logits
    return found


@pytest.mark.parametrize("name", ["nf4", "int8", "int8-torchao"])
def test_every_key_that_transformers_writes_is_accepted_for_a_reason(
    name: str, quantized_files: dict[str, Path]
) -> None:
    values = json.loads((quantized_files[name] / "config.json").read_text())["quantization_config"]
    known = FORMATS[values["quant_method"]]
    names = inspect.signature(BY_TRANSFORMERS[values["quant_method"]].__init__).parameters.keys() - {"self", "kwargs"}
    assert len(values) >= 5 and values.keys() | names <= known.keys() and all(key.why for key in known.values())


SAME: list[tuple[str, dict[str, Any]]] = [
    ("nf4", {"bnb_4bit_quant_type": "fp4"}),
    ("nf4", {"bnb_4bit_use_double_quant": False}),
    ("nf4", {"quant_method": None, "_load_in_4bit": None, "_load_in_8bit": True}),
    ("int8", {"quant_method": None, "_load_in_8bit": None, "_load_in_4bit": True}),
    ("int8-torchao", {"modules_to_not_convert": ["up_proj"], "quant_type_kwargs": {}}),
    ("int8-torchao", {"include_input_output_embeddings": True, "untie_embedding_weights": True}),
    ("int8-torchao", {"quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_version": 2, "_data": {}}}}),
]


@pytest.mark.parametrize(("name", "changes"), SAME, ids=[f"{a}-{next(iter(b))}" for a, b in SAME])
def test_keys_that_the_tensors_repeat_change_nothing(
    name: str, changes: dict[str, Any], quantized_files: dict[str, Path], tmp_path: Path
) -> None:
    plain = hub.load_model(quantized_files[name], "float32")
    changed = hub.load_model(_changed(quantized_files[name], tmp_path / "model", changes), "float32")
    assert torch.equal(_logits(changed), _logits(plain))


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_keys_that_transformers_reads_have_its_meaning(
    threshold: float, quantized_files: dict[str, Path], tmp_path: Path
) -> None:
    folder = _changed(quantized_files["int8"], tmp_path / "model", {"llm_int8_threshold": threshold})
    theirs_loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="float32", device_map="cpu").eval()
    assert torch.equal(_logits(hub.load_model(folder, "float32")), _logits(theirs_loaded))


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("int8", {"load_in_8bit": False}, "load_in_8bit"),
    ("int8", {"load_in_8bit": None, "load_in_4bit": None}, "load_in_8bit"),
    ("int8", {"load_in_8bit": False, "load_in_4bit": True}, "quantization_config"),
    ("nf4", {"load_in_8bit": True, "load_in_4bit": False}, "quantization_config"),
    ("int8", {"llm_int8_skip_modules": ["lm_head", "up_proj"]}, "quantization_config"),
    ("int8", {"llm_int8_skip_modules": ["up_proj"]}, "quantization_config"),
    ("int8", {"llm_int8_enable_fp32_cpu_offload": True}, "quantization_config"),
    ("int8", {"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight"),
    ("int8", {"hadamard": True}, "hadamard"),
    ("nf4", {"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type"),
    ("int8-torchao", {"hadamard": True}, "hadamard"),
    ("int8-torchao", {"quant_type": None}, "quant_type"),
    ("int8-torchao", {"quant_type": "int8_weight_only"}, "quant_type"),
    ("int8-torchao", {"quant_type": {"default": {"_type": "quantize_", "_data": {}}}}, "quant_type"),
    ("int8-torchao", {"quant_type_kwargs": {"group_size": 32}}, "quant_type_kwargs"),
]


@pytest.mark.parametrize(
    ("name", "changes", "field"), WRONG, ids=[f"{a}-{'-'.join(b)}-{i}" for i, (a, b, _) in enumerate(WRONG)]
)
def test_configs_that_do_not_describe_their_files_are_rejected(
    name: str, changes: dict[str, Any], field: str, quantized_files: dict[str, Path], tmp_path: Path
) -> None:
    folder = _changed(quantized_files[name], tmp_path / "model", changes)
    with pytest.raises(ModelError) as caught:
        hub.load_model(folder, "float32")
    assert caught.value.field == field


def test_every_key_of_hqq_is_rejected() -> None:
    pytest.importorskip("hqq")
    written = theirs.HqqConfig(axis=1).to_dict()
    assert written.keys() == FORMATS["hqq"].keys()
    for name, value in written.items():
        with pytest.raises(ModelError) as caught:
            check_keys({name: value, "quant_method": "hqq"})
        assert caught.value.field == name


def _written(directory: Path, tensors: dict[str, Any], dense: Any, values: dict[str, Any]) -> Path:
    rest = {n: t for n, t in dense.state_dict().items() if n != "lm_head.weight" and f"{n[:-7]}.scales" not in tensors}
    return packed_models.write(directory, rest | tensors, values)


@pytest.mark.parametrize("key", ["format", "checkpoint_format"])
def test_both_names_of_the_version_of_gptq_are_read(key: str, wide_model_directory: Path) -> None:
    torch.manual_seed(0)
    dense = hub.load_model(wide_model_directory, "float32")
    path = "model.layers.0.self_attn.q_proj"
    linear = dense.get_submodule(path)
    parts, linear.weight.data = packed_models.gptq_tensors(*linear.weight.shape, 4, 32, version=2)
    values = {"quant_method": "gptq", "bits": 4, "group_size": 32, key: "gptq_v2"}
    tensors = {f"{path}.{name}": part for name, part in parts.items()}
    model = hub.load_model(_written(wide_model_directory, tensors, dense, values), "float32")
    with torch.no_grad():
        ids = torch.tensor([[5, 17, 20, 3]])
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_groups_in_another_order_need_their_index(wide_model_directory: Path) -> None:
    dense = hub.load_model(wide_model_directory, "float32")
    path = "model.layers.0.self_attn.q_proj"
    parts, _ = packed_models.gptq_tensors(*dense.get_submodule(path).weight.shape, 4, 32, indexed=False)
    values = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}
    tensors = {f"{path}.{name}": part for name, part in parts.items()}
    with pytest.raises(ModelError) as caught:
        hub.load_model(_written(wide_model_directory, tensors, dense, values))
    assert caught.value.field == "g_idx"


def test_unsymmetric_weights_need_zero_points(wide_model_directory: Path) -> None:
    dense = hub.load_model(wide_model_directory, "float32")
    packed_models.write_packed(wide_model_directory, dense, "int8-channel")
    path = wide_model_directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["symmetric"] = False
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError) as caught:
        hub.load_model(wide_model_directory)
    assert caught.value.field == "weight_zero_point"


def test_dense_weights_with_a_config_of_bitsandbytes(tiny_model_directory: Path) -> None:
    pytest.importorskip("bitsandbytes")
    path = tiny_model_directory / "config.json"
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": config}))
    with pytest.raises(ModelError) as caught:
        hub.load_model(tiny_model_directory)
    assert caught.value.what == "bitsandbytes"
