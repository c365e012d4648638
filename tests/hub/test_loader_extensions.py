"""Models whose files are quantized: kept packed by `hub.load_model`, and compared with dense copies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import core, hub
from lorakit.config import LoraConfig
from lorakit.core.model.base_view import quantized_weights
from lorakit.core.quantization.fp8 import Fp8Linear
from lorakit.core.quantization.packed import PackedLinear
from lorakit.errors import ConfigError, ModelError

from .. import packed_models, small_models

IDS = torch.tensor([[5, 17, 20, 3, 9, 44]])


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits.float()
    return found


@pytest.fixture
def dense(wide_model_directory: Path) -> Any:
    return hub.load_model(wide_model_directory, "float32")


@pytest.fixture
def fp8_directory(wide_model_directory: Path, dense: Any) -> Path:
    """A Llama in the layout of DeepSeek's files; `dense` gets the dequantized weights."""
    return packed_models.write_fp8(wide_model_directory, dense)


def trained(model: Any) -> list[Tensor]:
    """Attach an adapter, and return its gradients and that of the embeddings' output after one backward pass."""
    names = list(packed_models.LAYERS)
    core.attach(model, LoraConfig(r=2, target_modules=names, init_lora_weights=False), seed=3)
    embeddings = model.get_input_embeddings()(IDS).detach().requires_grad_()
    loss = model.train()(inputs_embeds=embeddings, labels=IDS).loss
    loss.backward()
    return [loss.detach(), embeddings.grad, *(p.grad for _, p in core.trainable_parameters(model))]


def test_fp8_files_are_kept_packed_and_compute_what_the_dense_model_computes(fp8_directory: Path, dense: Any) -> None:
    model = hub.load_model(fp8_directory, "float32")
    assert len(list(quantized_weights(model))) == 14 and type(model.model.layers[0].mlp.up_proj) is Fp8Linear
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    ours, wanted = trained(model), trained(dense)
    assert len(ours) == 2 + 28
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_transformers_dequantizes_fp8_files(fp8_directory: Path, dense: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    model: Any = AutoModelForCausalLM.from_pretrained(
        fp8_directory, dtype=torch.float32, quantization_config=FineGrainedFP8Config(dequantize=True)
    )
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    for one, other in zip(trained(model), trained(dense), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    core.save_adapter(model, tmp_path / "adapter")
    packed = hub.load_model(fp8_directory, "float32")
    core.load_adapter(packed, tmp_path / "adapter")
    torch.testing.assert_close(logits(packed), logits(model.eval()), rtol=1e-4, atol=1e-4)


def test_saved_fp8_models_are_loaded_again(fp8_directory: Path, tmp_path: Path) -> None:
    model = hub.load_model(fp8_directory, "float32")
    hub.save_model(model, _made(tmp_path / "saved"))
    again = hub.load_model(tmp_path / "saved", "float32")
    assert torch.equal(logits(again), logits(model)) and len(list(quantized_weights(again))) == 14
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert written["quant_method"] == "fp8" and written["weight_block_size"] == list(packed_models.BLOCK)


def test_a_dense_copy_is_saved_as_a_plain_model(fp8_directory: Path, dense: Any, tmp_path: Path) -> None:
    model = hub.load_model(fp8_directory, "float32")
    assert hub.dequantize_files(model) == 14
    hub.save_model(model, _made(tmp_path / "dense"))
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    again = hub.load_model(tmp_path / "dense", "float32")
    assert not list(quantized_weights(again))
    torch.testing.assert_close(logits(again), logits(dense), rtol=1e-5, atol=1e-5)


EVERY = pytest.mark.parametrize("layout", ["gptq", "awq", *packed_models.COMPRESSED])


@EVERY
def test_files_are_kept_packed_and_compute_what_the_dense_model_computes(
    layout: str, wide_model_directory: Path, dense: Any, tmp_path: Path
) -> None:
    packed_models.write_packed(wide_model_directory, dense, layout)
    model = hub.load_model(wide_model_directory, "float32")
    found = list(quantized_weights(model))
    assert len(found) == 14 and all(isinstance(weight.module, PackedLinear) for weight in found)
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-4)
    ours, wanted = trained(model), trained(dense)
    assert len(ours) == 2 + 28
    for one, other in zip(ours, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    core.save_adapter(model, tmp_path / "adapter")
    again = hub.load_model(wide_model_directory, "float32")
    core.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model.eval()))


@pytest.mark.parametrize("layout", ["gptq", "awq", "int8-channel"])
def test_saved_models_are_loaded_again(layout: str, wide_model_directory: Path, dense: Any, tmp_path: Path) -> None:
    packed_models.write_packed(wide_model_directory, dense, layout)
    model = hub.load_model(wide_model_directory, "float32")
    hub.save_model(model, _made(tmp_path / "saved"))
    written = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert written == packed_models.quantization(layout)
    again = hub.load_model(tmp_path / "saved", "float32")
    assert torch.equal(logits(again), logits(model)) and len(list(quantized_weights(again))) == 14
    assert hub.dequantize_files(again) == 14
    hub.save_model(again, _made(tmp_path / "dense"))
    plain = hub.load_model(tmp_path / "dense", "float32")
    assert not list(quantized_weights(plain))
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("layout", "values", "field"),
    [
        ("gptq", {"bits": 5}, "bits"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format"),
        ("awq", {"version": "gemv"}, "version"),
        ("awq", {"bits": 8}, "bits"),
        ("int8-channel", {"format": "pack-quantized"}, "format"),
        ("int8-channel", {"config_groups": {}}, "config_groups"),
    ],
)
def test_layouts_that_are_not_read_are_rejected(
    layout: str, values: dict[str, Any], field: str, wide_model_directory: Path, dense: Any
) -> None:
    tensors = {"nothing": torch.zeros(1)}
    packed_models.write(wide_model_directory, tensors, {**packed_models.quantization(layout), **values})
    with pytest.raises(ModelError) as caught:
        hub.load_model(wide_model_directory)
    assert caught.value.field == field and caught.value.allowed


@pytest.mark.parametrize(
    ("layout", "part"), [("gptq", "qzeros"), ("gptq", "scales"), ("awq", "scales"), ("fp8-channel", "weight_scale")]
)
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_damaged_packed_tensors_are_rejected(
    layout: str, part: str, damage: str, wide_model_directory: Path, dense: Any
) -> None:
    from safetensors.torch import load_file, save_file

    folder = packed_models.write_packed(wide_model_directory, dense, layout)
    tensors = load_file(folder / "model.safetensors")
    path = "model.layers.1.mlp.up_proj"
    tensor = tensors.pop(f"{path}.{part}")
    if damage == "changed":
        changed = tensor[:, :-1] if part == "qzeros" else tensor.index_fill(0, torch.tensor([0]), float("nan"))
        tensors[f"{path}.{part}"] = changed.contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        hub.load_model(folder, "float32")
    assert caught.value.where == path and caught.value.field == part


def test_files_without_packed_weights_are_rejected(wide_model_directory: Path, dense: Any) -> None:
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
    packed_models.write(wide_model_directory, tensors, packed_models.quantization("gptq"))
    with pytest.raises(ModelError) as caught:
        hub.load_model(wide_model_directory)
    assert caught.value.field == "quantization_config"


@pytest.mark.parametrize("layout", ["fp8", "gptq", "awq", *packed_models.COMPRESSED])
def test_packed_weights_without_a_quantization_config_are_rejected(
    layout: str, wide_model_directory: Path, dense: Any
) -> None:
    if layout == "fp8":
        packed_models.write_fp8(wide_model_directory, dense)
    else:
        packed_models.write_packed(wide_model_directory, dense, layout)
    path = wide_model_directory / "config.json"
    values = json.loads(path.read_text())
    del values["quantization_config"]
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError) as caught:
        hub.load_model(wide_model_directory)
    assert caught.value.field == "quantization_config"


@pytest.mark.parametrize("damage", ["missing", "nan", "inf"])
def test_damaged_fp8_scales_are_rejected(fp8_directory: Path, damage: str) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(fp8_directory / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_scale_inv"
    if damage == "missing":
        del tensors[name]
    else:
        tensors[name][0, 0] = float(damage)
    save_file(tensors, fp8_directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError) as caught:
        hub.load_model(fp8_directory, "float32")
    assert "weight_scale_inv" in str(caught.value)


def test_an_unknown_quantization_is_rejected(wide_model_directory: Path, dense: Any) -> None:
    tensors = {name: tensor for name, tensor in dense.state_dict().items() if name != "lm_head.weight"}
    packed_models.write(wide_model_directory, tensors, {"quant_method": "made-up"})
    with pytest.raises(ModelError) as caught:
        hub.load_model(wide_model_directory)
    assert caught.value.what == "made-up" and caught.value.field == "quant_method"
    assert "gptq" in caught.value.allowed


def test_packed_files_are_not_quantized_again(fp8_directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"already quantized \(fp8\)"):
        hub.load_model(fp8_directory, quantization="nf4")


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_an_accelerated_model_keeps_the_forward_of_packed_layers(fp8_directory: Path, dense: Any) -> None:
    from lorakit.speed import accelerate

    model = hub.load_model(fp8_directory, "float32")
    results = []
    for one in (model, dense):
        names = list(packed_models.LAYERS)
        core.attach(one, LoraConfig(r=2, target_modules=names, init_lora_weights=False), seed=3)
        accelerate(one)
        loss = one.train()(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        results.append([loss.detach(), *(p.grad for _, p in core.trainable_parameters(one))])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_model_with_fp8_experts_is_dequantized(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    folder = tmp_path / "mixtral"
    small_models.mixtral().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    packed, plain = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if "experts." in name or "_proj." in name:
            linear = nn.Linear(*tensor.shape[::-1], bias=False)
            linear.weight.data = tensor
            made = packed_models.fp8_linear(linear, (16, 16)).packed()
            packed |= {name: made.parts[0].data, f"{name}_scale_inv": made.parts[1].data}
            plain[name] = made.decoded().contiguous()
    save_file(plain, folder / "model.safetensors", {"format": "pt"})
    dense = hub.load_model(folder, "float32")
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    packed_models.write(folder, packed, quantization)
    model: Any = hub.load_model(folder, "float32")
    assert not list(quantized_weights(model)) and getattr(model.config, "quantization_config", None) is None
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-5, atol=1e-5)
    words: dict[str, Any] = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    core.attach(model, LoraConfig(r=2, init_lora_weights=False, **words), seed=3)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for _, p in core.trainable_parameters(model))


def test_adapters_on_fp8_experts_are_rejected() -> None:
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    model = small_models.mixtral()
    replace_with_fp8_linear(model, [], FineGrainedFP8Config(weight_block_size=(16, 16)))
    assert type(model.model.layers[0].mlp.experts).__name__ == "FP8Experts"
    with pytest.raises(ConfigError) as caught:
        core.attach(model, LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"]))
    assert caught.value.what == "fp8 experts"
