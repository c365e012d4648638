"""Files after a save: PEFT's two and ours, the same bytes for the same adapter, without names of this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from lorakit.config import CONFIG_FILE, LoraConfig
from lorakit.core import attach, fingerprint, inspect_adapter, load_adapter, merge, save_adapter
from lorakit.core.files.adapter_folder import REPLACES, SIDECAR_FILE, WEIGHTS_FILE
from lorakit.durable import is_sealed, sha256_file
from lorakit.errors import AdapterError, ConfigError

from ...laws.snapshots import files, same_bits
from ...laws.zoo import BERT, EMBEDDING, EVERY_KIND, GPT2, LLAMA, TIED, randomise, run, with_adapters


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {
        name.removeprefix("base_model.model."): tuple(t.shape) for name, t in load_file(folder / WEIGHTS_FILE).items()
    }


def test_names_and_shapes_of_a_gpt2(tmp_path: Path) -> None:
    save_adapter(with_adapters(GPT2, "my-name"), tmp_path, "my-name")
    found = shapes(tmp_path)
    assert len(found) == 2 * 2 * 3
    assert found["transformer.h.0.attn.c_attn.lora_A.weight"] == (4, 16)
    assert found["transformer.h.0.attn.c_attn.lora_B.weight"] == (48, 4)
    assert found["transformer.h.1.mlp.c_proj.lora_A.weight"] == (4, 64)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["fan_in_fan_out"] is True
    assert (config["peft_type"], config["inference_mode"], config["r"]) == ("LORA", True, 4)
    assert config["target_modules"] == ["c_attn", "c_proj"]
    assert "my-name" not in (tmp_path / CONFIG_FILE).read_text()


def test_names_and_shapes_of_the_rest(tmp_path: Path) -> None:
    save_adapter(with_adapters(EMBEDDING, "a"), tmp_path / "1", "a")
    assert shapes(tmp_path / "1") == {"embed.lora_embedding_A": (4, 50), "embed.lora_embedding_B": (12, 4)}
    assert json.loads((tmp_path / "1" / CONFIG_FILE).read_text())["fan_in_fan_out"] is False
    save_adapter(with_adapters(LLAMA, "a", use_dora=True, target_modules=["v_proj"]), tmp_path / "2", "a")
    assert shapes(tmp_path / "2")["model.layers.0.self_attn.v_proj.lora_magnitude_vector"] == (8,)
    save_adapter(with_adapters(BERT, "a", task_type="SEQ_CLS", bias="lora_only"), tmp_path / "3", "a")
    found = shapes(tmp_path / "3")
    assert found["classifier.weight"] == (3, 16) and found["classifier.bias"] == (3,)
    assert found["bert.encoder.layer.0.attention.self.query.base_layer.bias"] == (16,)
    assert json.loads((tmp_path / "3" / CONFIG_FILE).read_text())["modules_to_save"] == ["classifier", "score"]


def test_the_files_and_what_they_say_of_each_other(tmp_path: Path) -> None:
    model = with_adapters(EVERY_KIND, "a")
    saved = save_adapter(model, tmp_path, "a", facts={"steps": 3}, base_model_name_or_path="org/model")
    assert sorted(files(tmp_path)) == sorted(saved.files) == sorted([CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE])
    about = json.loads((tmp_path / SIDECAR_FILE).read_text())
    assert about["format_version"] == 2 and is_sealed(about) and about["steps"] == 3
    assert about["weights"]["sha256"] == saved.weights_sha256 == sha256_file(tmp_path / WEIGHTS_FILE)
    assert about["config"]["sha256"] == sha256_file(tmp_path / CONFIG_FILE)
    assert about["weights"]["bytes"] == saved.weights_bytes == (tmp_path / WEIGHTS_FILE).stat().st_size
    assert about["sites"]["conv"] == {"r": 4, "lora_alpha": 8.0}
    assert "previous_sha256" not in about["weights"] and REPLACES not in about
    assert json.loads((tmp_path / CONFIG_FILE).read_text())["base_model_name_or_path"] == "org/model"
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt", "lorakit": "2"}


def test_nothing_of_the_machine_goes_into_the_files(tmp_path: Path) -> None:
    save_adapter(with_adapters(EVERY_KIND, "a"), tmp_path / "one", "a")
    text = b"".join(files(tmp_path / "one").values())
    assert str(tmp_path).encode() not in text and str(Path.home()).encode() + b"/" not in text
    assert json.loads((tmp_path / "one" / CONFIG_FILE).read_text())["base_model_name_or_path"] is None


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("1", "2", "1"):
        save_adapter(with_adapters(EVERY_KIND, "a"), tmp_path / name, "a")
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_a_save_over_another_adapter_replaces_it(tmp_path: Path) -> None:
    model = with_adapters(EVERY_KIND, "a", "b")
    save_adapter(model, tmp_path, "a")
    (tmp_path / "README.md").write_text("mine")
    save_adapter(model, tmp_path, "b")
    save_adapter(model, tmp_path / "apart", "b")
    assert {n: d for n, d in files(tmp_path).items() if "/" not in n and n != "README.md"} == files(tmp_path / "apart")
    assert (tmp_path / "README.md").read_text() == "mine"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_adapter_of_a_low_precision_base_is_saved_in_fp32(dtype: torch.dtype, tmp_path: Path) -> None:
    save_adapter(with_adapters(LLAMA, "a", dtype=dtype), tmp_path, "a")
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS_FILE).values()} == {torch.float32}


def test_all_linear_is_written_in_words_that_every_reader_knows(tmp_path: Path) -> None:
    model = LLAMA.model()
    attach(model, LLAMA.config(target_modules="all-linear"))
    save_adapter(model, tmp_path)
    words = json.loads((tmp_path / CONFIG_FILE).read_text())["target_modules"]
    assert words == sorted(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    model = with_adapters(EVERY_KIND, "a")
    with pytest.raises(AdapterError, match=r"Adapter 'b' not found on this model; available: a\."):
        save_adapter(model, tmp_path, "b")
    with pytest.raises(ConfigError, match="allow contains 'all'"):
        save_adapter(model, tmp_path, "a", allow=["all"])
    assert files(tmp_path) == {}


def test_inspecting_a_sound_adapter(tmp_path: Path) -> None:
    model = with_adapters(EVERY_KIND, "a", use_rslora=True, rank_pattern={"conv": 2})
    save_adapter(model, tmp_path, "a", facts={"steps": 3})
    summary = inspect_adapter(tmp_path)
    assert summary.findings == ()
    assert summary.base == fingerprint(model) and summary.facts["steps"] == 3
    assert [(s.path, s.r, s.in_features, s.out_features) for s in summary.sites] == [
        ("conv", 2, 12, 12), ("embed", 4, 50, 12), ("linear", 4, 12, 7),
    ]  # fmt: skip
    assert summary.sites[0].scale == pytest.approx(8 / 2**0.5)
    layer = model.linear
    delta = layer.scaling["a"] * layer.lora_B["a"].weight @ layer.lora_A["a"].weight
    assert summary.sites[2].norm == pytest.approx(delta.norm().item(), rel=1e-5)
    assert summary.parameters == sum(t.numel() for t in load_file(tmp_path / WEIGHTS_FILE).values())


def test_inspecting_finds_what_is_wrong(tmp_path: Path) -> None:
    model = EVERY_KIND.model()
    attach(model, EVERY_KIND.config(), "a")
    save_adapter(model, tmp_path, "a")
    assert any("B·A is zero at all sites" in finding for finding in inspect_adapter(tmp_path).findings)
    randomise(model, "a", 1)
    with torch.no_grad():
        model.linear.lora_B["a"].weight.zero_()
        model.conv.lora_B["a"].weight[0, 0] = float("nan")
    save_adapter(model, tmp_path, "a", allow=["nonfinite"])
    findings = inspect_adapter(tmp_path).findings
    assert any("zero at 1 of 3 sites, first linear" in finding for finding in findings)
    assert any("NaN" in finding and "conv.lora_B" in finding for finding in findings)


def test_a_fingerprint_is_of_the_base_whatever_sits_on_it() -> None:
    for specimen in (BERT, GPT2, TIED):
        plain = fingerprint(specimen.model())
        model = with_adapters(specimen, "a", "b")
        assert fingerprint(model) == plain
        merge(model, "b")
        assert fingerprint(model) == plain
        assert plain.vocabulary == 50 and plain.architecture == type(model).__name__
        assert fingerprint(specimen.model(seed=1)) != plain
    classifier = with_adapters(BERT, "a", modules_to_save=["classifier"], bias="all")
    assert fingerprint(classifier) == fingerprint(BERT.model())


@pytest.mark.parametrize("fields", [{}, {"bias": "all", "modules_to_save": ["classifier"]}], ids=str)
def test_a_loaded_adapter_is_frozen_unless_it_is_to_be_trained(fields: dict[str, Any], tmp_path: Path) -> None:
    save_adapter(with_adapters(BERT, "a", **fields), tmp_path, "a")
    frozen, trained = BERT.model(), BERT.model()
    load_adapter(frozen, tmp_path)
    load_adapter(trained, tmp_path, trainable=True)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    names = [name for name, parameter in trained.named_parameters() if parameter.requires_grad]
    fresh = BERT.model()
    attach(fresh, BERT.config(**fields))
    assert names == [name for name, parameter in fresh.named_parameters() if parameter.requires_grad]
    assert same_bits(run(frozen, BERT.given()), run(trained, BERT.given()))


def test_saved_module_of_a_pattern_that_names_no_linear_layer(tmp_path: Path) -> None:
    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3), "head": nn.Linear(4, 2)})

    adapted = model()
    attach(adapted, LoraConfig(target_modules="conv", modules_to_save=["head"], init_lora_weights=False))
    adapted["head"].modules_to_save["default"].weight.data.fill_(2.0)
    save_adapter(adapted, tmp_path)
    loaded = model()
    assert load_adapter(loaded, tmp_path).sites == 1
    assert float(loaded["head"].weight.min()) == 2.0
