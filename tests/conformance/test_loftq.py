"""`replace_lora_weights_loftq` compared with the installed peft, on a 4-bit base, with the original weights on disk.

peft sends the weights to a GPU whatever the model is on; a mode of torch's brings them to the CPU here.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.quantized_layers import quantized_linear
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lorakit.peft as ours
from lorakit import hub
from lorakit.core import load_adapter, merge, save_adapter
from lorakit.errors import AdapterError, ConfigError, ConfigTypeError, ModelError
from lorakit.plan.quantized import Quantization

from .rows import quiet_peft, theirs

pytest.importorskip("bitsandbytes")

TARGETS = ["q_proj", "down_proj"]


class OnCpu(TorchFunctionMode):
    """Keep tensors that peft sends to a GPU on the CPU."""

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.to and kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def base(folder: Path, storage: str = "nf4") -> Any:
    with quiet_peft():
        return hub.load_model(folder, "float32", quantization=storage)


def adapted(library: Any, folder: Path, storage: str = "nf4", **fields: Any) -> Any:
    config = {"r": 4, "lora_alpha": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **fields}
    with quiet_peft():
        return library.get_peft_model(base(folder, storage), library.LoraConfig(**config))


def products(model: Any) -> dict[str, Tensor]:
    """Path -> s·B·A of every site."""
    inner = model.get_base_model()
    sites = {path: module for path, module in inner.named_modules() if hasattr(module, "lora_A")}
    return {
        path: (m.lora_B["default"].weight @ m.lora_A["default"].weight).detach() * m.scaling["default"]
        for path, m in sites.items()
    }


def distances(model: Any, folder: Path) -> dict[str, float]:
    """Path -> how far each site is from the weight on disk, over that weight."""
    whole, inner = load_file(folder / "model.safetensors"), model.get_base_model()
    found = {}
    for path, product in products(model).items():
        W = whole[f"{path}.weight"]
        found[path] = float((inner.get_submodule(path).read() + product - W).norm() / W.norm())
    return found


def factors(model: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora_" in name}


def test_the_same_products_as_peft(wide_model_directory: Path) -> None:
    them = adapted(theirs, wide_model_directory)
    with quiet_peft(), OnCpu():
        theirs.replace_lora_weights_loftq(them, str(wide_model_directory))
    us = adapted(ours, wide_model_directory)
    ours.replace_lora_weights_loftq(us, wide_model_directory)
    expected, found = products(them), products(us)
    assert set(expected) == set(found) and len(found) == 4
    for path, product in expected.items():
        torch.testing.assert_close(found[path], product, atol=1e-5, rtol=1e-3)
    ids = torch.tensor([[5, 17, 200, 3, 9, 44]])
    with torch.no_grad():
        torch.testing.assert_close(us(input_ids=ids).logits, them(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fields", [{"lora_alpha": 32}, {"use_rslora": True}, {"use_dora": True}], ids=str)
def test_whatever_the_scale_and_the_variant_it_is_the_best_of_its_rank(
    fields: dict[str, Any], wide_model_directory: Path
) -> None:
    model = adapted(ours, wide_model_directory, **fields)
    before = distances(model, wide_model_directory)
    ours.replace_lora_weights_loftq(model, wide_model_directory)
    whole = load_file(wide_model_directory / "model.safetensors")
    for path, distance in distances(model, wide_model_directory).items():
        layer, W = model.get_base_model().get_submodule(path), whole[f"{path}.weight"]
        best = torch.linalg.svdvals(W - layer.read())[4:].norm() / W.norm()
        assert distance == pytest.approx(float(best), rel=1e-4) and distance < before[path]
        seen = layer.read() + layer.addition("default", layer.read()).detach()  # what the forward computes with
        assert float((seen - W).norm() / W.norm()) == pytest.approx(float(best), rel=1e-4)


def test_where_the_weights_are(wide_model_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = adapted(ours, wide_model_directory)
    ours.replace_lora_weights_loftq(expected)  # where the model came from
    whole = load_file(wide_model_directory / "model.safetensors")
    sharded, mixed = tmp_path / "sharded", tmp_path / "mixed"
    names = sorted(whole)
    for index, part in enumerate((names[::2], names[1::2])):
        sharded.mkdir(exist_ok=True)
        save_file({name: whole[name] for name in part}, sharded / f"model-{index}.safetensors")
    mixed.mkdir()
    shutil.copy(wide_model_directory / "model.safetensors", mixed)
    save_file({name: torch.zeros_like(tensor) for name, tensor in whole.items()}, mixed / "other.safetensors")
    bare = tmp_path / "bare.safetensors"  # as many files have it, without the model's first word
    save_file({name.removeprefix("model."): tensor for name, tensor in whole.items()}, bare)
    for path in (sharded, sharded / "model.safetensors", mixed, mixed / "model.safetensors", bare, str(bare)):
        model = adapted(ours, wide_model_directory)
        ours.replace_lora_weights_loftq(model, path)
        for name, tensor in factors(expected).items():
            torch.testing.assert_close(factors(model)[name], tensor, msg=str(path))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    snapshot = tmp_path / "models--somebody--wide" / "snapshots" / "abc"
    shutil.copytree(wide_model_directory, snapshot)
    (tmp_path / "models--somebody--wide" / "refs").mkdir()
    (tmp_path / "models--somebody--wide" / "refs" / "main").write_text("abc")
    model = adapted(ours, wide_model_directory)
    model.get_base_model().config._name_or_path = "somebody/wide"
    ours.replace_lora_weights_loftq(model)
    for name, tensor in factors(expected).items():
        torch.testing.assert_close(factors(model)[name], tensor)


def test_a_callback_decides_site_by_site_as_in_peft(wide_model_directory: Path) -> None:
    calls: dict[str, list[str]] = {"peft": [], "lorakit": []}

    def keeping(who: str, wrapper: Any) -> Any:
        def callback(given: nn.Module, path: str) -> bool:
            assert given is wrapper
            calls[who].append(path)
            return "layers.1" in path

        return callback

    them, us = adapted(theirs, wide_model_directory), adapted(ours, wide_model_directory)
    before = factors(us)
    with quiet_peft(), OnCpu():
        theirs.replace_lora_weights_loftq(them, str(wide_model_directory), callback=keeping("peft", them))
    ours.replace_lora_weights_loftq(us, wide_model_directory, callback=keeping("lorakit", us))
    assert calls["lorakit"] == calls["peft"] and len(calls["peft"]) == 4
    expected, found = products(them), products(us)
    for path, product in found.items():
        torch.testing.assert_close(product, expected[path], atol=1e-5, rtol=1e-3)
        assert bool(product.any()) == ("layers.1" in path)
    for name, tensor in factors(us).items():
        assert torch.equal(tensor, before[name]) == ("layers.0" in name)


def test_a_callback_that_raises_leaves_every_site_as_it_was(wide_model_directory: Path) -> None:
    model, seen = adapted(ours, wide_model_directory, use_dora=True), []
    before = factors(model)

    def callback(_: nn.Module, path: str) -> bool:
        seen.append(path)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return True

    with pytest.raises(KeyboardInterrupt):
        ours.replace_lora_weights_loftq(model, wide_model_directory, callback=callback)
    assert all(torch.equal(tensor, before[name]) for name, tensor in factors(model).items())


def test_weights_of_conv1d_lie_transposed_on_disk(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(64, 64, bias=False))
    square = plain[0].weight.detach().clone()
    save_file({"0.weight": square.T.contiguous()}, tmp_path / "model.safetensors")
    stored: Any = quantized_linear(plain[0], Quantization("nf4"))
    stored.source_cls = Conv1D  # as transformers marks a quantized layer
    model = ours.get_peft_model(nn.Sequential(stored), ours.LoraConfig(r=4, lora_alpha=4, target_modules=["0"]))
    ours.replace_lora_weights_loftq(model, tmp_path)
    layer = model.get_base_model()[0]
    best = torch.linalg.svdvals(square - layer.read())[4:].norm()
    now = layer.read() + layer.addition("default", layer.read()).detach()
    assert float((now - square).norm()) == pytest.approx(float(best), rel=1e-4)


def test_what_is_refused_changes_nothing(wide_model_directory: Path, tmp_path: Path) -> None:
    model = adapted(ours, wide_model_directory)
    before = factors(model)

    def refused(error: type[Exception], text: str, *args: Any, given: Any = None, **words: Any) -> None:
        with pytest.raises(error, match=text):
            ours.replace_lora_weights_loftq(model if given is None else given, *args, **words)
        assert all(torch.equal(tensor, before[name]) for name, tensor in factors(model).items())

    refused(ConfigTypeError, "does not appear to be a valid PeftModel", given=nn.Linear(2, 2))
    refused(AdapterError, "No bnb LoRA module found on the model: no 4-bit module with adapter 'x'", adapter_name="x")
    refused(ModelError, "no safetensors files found", tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x80\x02 a pickle")
    refused(ModelError, "cannot be read as safetensors", tmp_path)
    whole = load_file(wide_model_directory / "model.safetensors")
    last = "model.layers.1.mlp.down_proj.weight"
    save_file({n: t for n, t in whole.items() if n != last}, tmp_path / "model.safetensors")
    refused(ConfigError, rf"{last} not found, so the model was not loaded from", tmp_path)
    save_file({**whole, last: whole[last][:, :64].contiguous()}, tmp_path / "model.safetensors")
    refused(ConfigError, r"down_proj.weight has shape \(64, 64\), .* \(64, 128\)", tmp_path)
    model.get_base_model().config._name_or_path = "nobody/nothing"
    refused(ConfigError, "must be present on disk, but it could not be found: .nobody/nothing")
    model.get_base_model().config._name_or_path = ""
    refused(ConfigError, "could not be found: .*Pass model_path")
    merge(model.get_base_model(), "default")
    refused(AdapterError, "is merged at .*unmerge it before replacing its LoRA weights", wide_model_directory)
    odd = adapted(ours, wide_model_directory, r=70)
    with pytest.raises(ConfigError, match="r is 70, but the maximum at this site is 64"):
        ours.replace_lora_weights_loftq(odd, wide_model_directory)
    plain = adapted(ours, wide_model_directory, "int8")
    with pytest.raises(AdapterError, match="No bnb LoRA module found"):
        ours.replace_lora_weights_loftq(plain, wide_model_directory)


def test_it_is_trained_saved_and_read_by_both(wide_model_directory: Path, tmp_path: Path) -> None:
    us = adapted(ours, wide_model_directory)
    ours.replace_lora_weights_loftq(us, wide_model_directory)
    ids = torch.tensor([[5, 17, 200, 3, 9, 44]])
    us(input_ids=ids, labels=ids).loss.backward()
    assert all(bool(p.grad.any()) for p in us.parameters() if p.requires_grad)
    us.save_pretrained(tmp_path)
    with quiet_peft():
        them = theirs.PeftModel.from_pretrained(base(wide_model_directory), tmp_path)
    with torch.no_grad():
        expected = us.eval()(input_ids=ids).logits
        torch.testing.assert_close(them(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-4)
        again = base(wide_model_directory)
        assert load_adapter(again, tmp_path).base == "same"
        torch.testing.assert_close(again(input_ids=ids).logits, expected)
    save_adapter(again, tmp_path / "core")
