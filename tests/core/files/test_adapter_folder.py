"""Adapters that are valid but implausible: one warning that names every finding, the same words in `inspect`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lorakit.config import CONFIG_FILE, LoraConfig
from lorakit.core import attach, inspect_adapter, load_adapter, merge, save_adapter
from lorakit.core.files.adapter_folder import SIDECAR_FILE, WEIGHTS_FILE
from lorakit.core.files.inspecting import LARGEST_USUAL_VALUE, largest_value
from lorakit.errors import AdapterFileError, MergeError

from ...laws.snapshots import snapshot
from ...laws.zoo import BERT, LLAMA, randomise, with_adapters

Edit = Callable[[Path], None]
STEM = "base_model.model.model.layers.0.self_attn.q_proj."


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound adapter as PEFT writes it, without `lorakit.json`."""
    save_adapter(with_adapters(LLAMA, "x", "y"), tmp_path / "adapter", "y")
    (tmp_path / "adapter" / SIDECAR_FILE).unlink()
    return tmp_path / "adapter"


def config(**fields: Any) -> Edit:
    def do(folder: Path) -> None:
        values = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps({**values, **fields}))

    return do


def tensors(change: Callable[[str, Tensor], Tensor]) -> Edit:
    def do(folder: Path) -> None:
        held = load_file(folder / WEIGHTS_FILE)
        changed = {name: change(name, tensor.clone()).contiguous() for name, tensor in held.items()}
        save_file(changed, folder / WEIGHTS_FILE, {"format": "pt"})

    return do


def zero_b(where: str = "") -> Edit:
    return tensors(lambda name, t: t * 0 if "lora_B" in name and where in name else t)


def one_value(name: str, value: float) -> Edit:
    def change(key: str, tensor: Tensor) -> Tensor:
        if key == name:
            tensor.view(-1)[0] = value
        return tensor

    return tensors(change)


IMPLAUSIBLE: dict[str, tuple[Edit, str, list[str]]] = {
    "zero": (zero_b(), "zero_update", ["zero", "all sites", "layers.0"]),
    "scale": (config(lora_alpha=4000), "large_scale", ["scale", "sites: 6", "1000"]),
    "negative scale": (config(lora_alpha=-4000), "large_scale", ["scale", "-1000"]),
    "negative": (config(lora_alpha=-8), "alpha_not_positive", ["lora_alpha", "negative", "-8"]),
    "nothing": (config(lora_alpha=0), "alpha_not_positive", ["lora_alpha", "zero", "(0)"]),
    "values": (
        one_value(STEM + "lora_A.weight", 1e30),
        "large_values",
        ["tensors: 1", STEM + "lora_A.weight", "1e+30"],
    ),
    "pattern": (config(alpha_pattern={"down_proj": 8000 * 0.1}), "steep_alpha_pattern", ["alpha_pattern", "down_proj"]),
    "init": (config(init_lora_weights="fancy"), "unknown_init", ["init_lora_weights", "'fancy'", "ignored"]),
}


def said(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(warning.message) for warning in caught]


def implausible(call: Callable[[], Any]) -> list[str]:
    return [text for text in said(call) if "implausible" in text]


def allowed(folder: Path, **words: Any) -> list[str]:
    return implausible(lambda: load_adapter(LLAMA.model(), folder, "new", allow=["odd_scale"], **words))


def test_a_sound_adapter_is_plausible(folder: Path) -> None:
    assert allowed(folder) == []
    assert inspect_adapter(folder).judged == ()


@pytest.mark.parametrize("which", IMPLAUSIBLE)
def test_one_warning_names_what_is_implausible_and_inspecting_says_the_same(which: str, folder: Path) -> None:
    edit, kind, words = IMPLAUSIBLE[which]
    edit(folder)
    (message,) = allowed(folder)
    assert str(folder) in message
    assert all(word in message for word in words), message
    summary = inspect_adapter(folder)
    assert kind in {finding.kind for finding in summary.judged}
    for finding in summary.judged:
        assert str(finding) in message
        assert str(finding) in summary.findings


def test_several_findings_are_one_warning(folder: Path) -> None:
    for which in ("zero", "values", "pattern", "init"):
        IMPLAUSIBLE[which][0](folder)
    (message,) = allowed(folder)
    found = inspect_adapter(folder).judged
    assert [finding.kind for finding in found] == [
        "zero_update", "large_values", "steep_alpha_pattern", "unknown_init",
    ]  # fmt: skip
    assert all(str(finding) in message for finding in found)


def test_sites_that_are_zero_beside_others_are_listed_by_inspecting_alone(folder: Path) -> None:
    """Experts that no token reached, and what was extracted from a model that changed in part, have such sites."""
    zero_b("down_proj")(folder)
    assert allowed(folder) == []
    (finding,) = inspect_adapter(folder).judged
    assert finding.kind == "partly_zero" and len(finding.where) == 2
    assert "zero at 2 of 6 sites, first model.layers.0.mlp.down_proj" in str(finding)


def test_a_finding_names_the_first_sites_and_counts_the_others(folder: Path) -> None:
    config(lora_alpha=8000)(folder)
    (finding,) = inspect_adapter(folder).judged
    assert len(finding.where) == 6
    assert finding.value == 2000
    assert sum(path in str(finding) for path in finding.where) == 3
    assert "and 3 more" in str(finding)


def test_a_new_adapter_that_is_loaded_to_be_trained_may_do_nothing(folder: Path) -> None:
    zero_b()(folder)
    assert allowed(folder, trainable=True) == []
    config(init_lora_weights="fancy")(folder)
    (message,) = allowed(folder, trainable=True)
    assert "'fancy'" in message and "zero" not in message


def test_a_pattern_that_follows_the_rank_is_plausible(tmp_path: Path) -> None:
    """Rank and alpha a hundred times those of the config leave the scale as it is."""
    model = LLAMA.model()
    pattern = {"down_proj": 128}
    attach(model, LLAMA.config(r=1, lora_alpha=1, rank_pattern=pattern, alpha_pattern=pattern), "a")
    randomise(model, "a", 1)
    save_adapter(model, tmp_path, "a")
    assert inspect_adapter(tmp_path).judged == ()


def test_a_bias_of_b_is_an_effect(tmp_path: Path) -> None:
    model = LLAMA.model()
    attach(model, LLAMA.config(lora_bias=True), "a")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.ones_like(parameter) if name.endswith("bias") else parameter * 0)
    save_adapter(model, tmp_path, "a")
    assert inspect_adapter(tmp_path).judged == ()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_an_error(value: float, folder: Path) -> None:
    one_value(STEM + "lora_B.weight", value)(folder)
    model = with_adapters(LLAMA, "a")
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AdapterFileError, match="lora_B"):
            load_adapter(model, folder, "new")
    assert snapshot(model) == before
    assert [finding.kind for finding in inspect_adapter(folder).judged] == ["nonfinite"]


def in_half(model: nn.Module) -> nn.Module:
    return model.to(torch.float16)


@pytest.mark.parametrize("name", ["lora_A.weight", "lora_B.weight"])
def test_values_beyond_the_dtype_of_the_base_are_an_error(name: str, folder: Path) -> None:
    one_value(STEM + name, 1e5)(folder)
    model = in_half(LLAMA.model())
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AdapterFileError, match=name) as caught:
            load_adapter(model, folder, "new")
        assert "float16" in str(caught.value) and "100000" in str(caught.value).replace("1e+05", "100000")
        assert snapshot(model) == before
        load_adapter(LLAMA.model(), folder, "new")  # fp32 holds it
        load_adapter(model, folder, "new", allow=["nonfinite"])


def test_a_product_beyond_the_dtype_of_the_base_is_an_error(folder: Path) -> None:
    """Each factor fits fp16; scale·B·A does not."""

    def change(name: str, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, 300.0) if name.startswith(STEM) else tensor

    tensors(change)(folder)
    model = in_half(LLAMA.model())
    before = snapshot(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AdapterFileError, match=r"layers\.0\.self_attn\.q_proj.*float16"):
            load_adapter(model, folder, "new")
        assert snapshot(model) == before
        load_adapter(LLAMA.model().to(torch.bfloat16), folder, "new")


def test_a_product_beyond_fp32_is_loaded_and_not_merged(folder: Path) -> None:
    """No value is lost: the factors fit, and a forward pass does not compute the product."""

    def change(name: str, tensor: Tensor) -> Tensor:
        return torch.full_like(tensor, 1e20) if name.startswith(STEM) else tensor

    tensors(change)(folder)
    model = LLAMA.model()
    with pytest.warns(UserWarning, match="1e\\+20"):
        load_adapter(model, folder, "new")
    layer = model.model.layers[0].self_attn.q_proj
    assert (layer.lora_A["new"].weight == 1e20).all() and (layer.lora_B["new"].weight == 1e20).all()
    before = snapshot(model)
    with pytest.raises(MergeError):
        merge(model, "new")
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"modules_to_save": ["classifier"]}, "classifier.weight"),
        ({"bias": "all"}, "layer.0.attention.self.query.base_layer.bias"),
    ],
    ids=["modules_to_save", "bias"],
)
@pytest.mark.parametrize("value", [1e5, float("nan")])
def test_copies_and_biases_beyond_the_dtype_of_the_base(
    fields: dict[str, Any], name: str, value: float, tmp_path: Path
) -> None:
    model = BERT.model()
    attach(model, BERT.config(**fields), "a")
    randomise(model, "a", 1)
    save_adapter(model, tmp_path, "a")
    (tmp_path / SIDECAR_FILE).unlink()
    key = next(key for key in load_file(tmp_path / WEIGHTS_FILE) if key.endswith(name))
    one_value(key, value)(tmp_path)
    base = in_half(BERT.model())
    before = snapshot(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AdapterFileError) as caught:
            load_adapter(base, tmp_path, "new")
    assert key in str(caught.value)
    assert snapshot(base) == before


def test_rows_of_tokens_beyond_the_dtype_of_the_base(tmp_path: Path) -> None:
    model = LLAMA.model()
    attach(model, LLAMA.config(trainable_token_indices=[3, 4]), "a")
    randomise(model, "a", 1)
    save_adapter(model, tmp_path, "a")
    (tmp_path / SIDECAR_FILE).unlink()
    key = next(key for key in load_file(tmp_path / WEIGHTS_FILE) if key.endswith("trainable_tokens_delta"))
    one_value(key, 1e5)(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AdapterFileError, match="trainable_tokens_delta"):
            load_adapter(in_half(LLAMA.model()), tmp_path, "new")


def test_the_largest_value() -> None:
    assert largest_value(torch.tensor([1.0, -3.0, 2.0])) == 3
    assert largest_value(torch.tensor([1.0, float("-inf")])) == float("inf")
    assert largest_value(torch.tensor([1.0, float("nan")])) != largest_value(torch.tensor([1.0, float("nan")]))
    assert largest_value(torch.zeros(0, 3)) == 0
    assert largest_value(torch.tensor([7])) == 0
    assert torch.finfo(torch.float16).max > LARGEST_USUAL_VALUE


def test_every_init_of_the_table_is_known() -> None:
    from lorakit.core.files.inspecting import judge
    from lorakit.core.inits import INITS

    config = LoraConfig(target_modules=["q"])
    for init in INITS:
        config.init_lora_weights = init.name
        assert judge(config, [], {}) == ()


def test_a_run_directory_stands_for_its_adapter(folder: Path, tmp_path: Path) -> None:
    from lorakit.peft import PeftModel

    run = tmp_path / "run"
    run.mkdir()
    folder.rename(run / "adapter")
    model = LLAMA.model()
    load_adapter(model, run)
    assert inspect_adapter(run).config == inspect_adapter(run / "adapter").config
    wrapped = PeftModel.from_pretrained(LLAMA.model(), run)
    ids = torch.arange(6).reshape(1, 6)
    assert torch.equal(wrapped(input_ids=ids).logits, model(input_ids=ids).logits)
