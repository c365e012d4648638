"""Merge, save and load for every combination of variant and quantized weight format.

The kinds of sites that no package quantizes, and the variants that have no update of the weight, are rejected by name.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.config.nested import BdLoraConfig, MontecloraConfig, VeloraConfig
from lorakit.core.kinds import KINDS
from lorakit.core.quantization import WEIGHT_FORMATS, weight_format_of
from lorakit.core.variants import VARIANTS
from lorakit.errors import ConfigError, LorakitError, MergeError
from lorakit.plan.quantized import STORAGES, Storage

from .quantized import DENSE, EVALUATED, WRITTEN, packed_bits, specimen, storages, stored_linear
from .snapshots import same_bits
from .zoo import randomise, run, with_adapters

EVERY = pytest.mark.parametrize("storage", storages())
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "rank_pattern": {"square": 2}, "alpha_pattern": {"up": 3}},
    "dora": {"use_dora": True},
    "dora-rslora": {"use_dora": True, "use_rslora": True},
    "bias-of-b": {"lora_bias": True, "target_modules": ["up"]},
    "biases": {"bias": "all"},
    "copied": {"target_modules": ["up"], "modules_to_save": ["square"]},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "bdlora": {"use_bdlora": BdLoraConfig(["up"], ["square"], nblocks=2)},
    "qalora": {"use_qalora": True, "qalora_group_size": 4},
    "velora": {"velora_config": VeloraConfig(num_groups=5)},
    "monteclora": {"monteclora_config": MontecloraConfig(num_samples=3)},
    "lora-xs": {"use_lora_xs": True},
}
"""Every variant that has an update of the weight, and options that can be combined with one."""

NOT_DENSE = {"biases": "dense=True replaces the module at up, but adapter '.' trains its bias in place"}
"""Case -> message, for what cannot be merged into a plain module; the quantized module stays."""

NOT_ON = {"biases": {"hqq": "is stored as HQQ, so its bias is not a parameter"}}
"""Case -> package -> message, for what the weight format of a package does not support."""

NOT_MERGED = {"alora", "kasa", "arrow-router"}
"""Variants that depend on the input, and that reject these bases: tests/core/variants/test_alora_quantized.py, test_kasa.py."""

NEVER_QUANTIZED = {
    "Embedding": "no supported package quantizes embedding tables",
    "Conv1d": "no supported package quantizes convolutions",
    "Conv2d": "no supported package quantizes convolutions",
    "Conv3d": "no supported package quantizes convolutions",
    "Parameter": "acts on the weight, and is rejected on a quantized one",
    "MultiheadAttention": "torch's attention reads its weights itself and cannot run with quantized ones",
    "InnerLinear": "inside torch's attention: the same",
}
"""Kinds without a quantized weight format, and why; Linear has all of them, Conv1D is a Linear for bitsandbytes."""

NO_STORAGE_OF_ITS_OWN = {"dense", "transposed", "computed", "computed, transposed"}


def test_nothing_is_left_out_unsaid() -> None:
    names = {variant.name for variant in VARIANTS}
    merged = {max((variant for variant in names if variant in name), key=len, default="plain") for name in FIELDS}
    assert merged | NOT_MERGED == names
    assert {kind.name for kind in KINDS} == {"Linear", "Conv1D", *NEVER_QUANTIZED}
    rows = {"bitsandbytes 4-bit", "bitsandbytes 8-bit", "torchao", "HQQ"}
    packed = {"fp8 with block scales", "fp8 experts", "GPTQ", "AWQ", "compressed-tensors"}  # tests/core/quantization
    assert {base.name for base in WEIGHT_FORMATS if base.quantized} == rows | packed | {"int8 matmul (W8A8)"}
    assert {storage.package for storage in STORAGES} == {"bitsandbytes", "torchao", "hqq"}


def near(found: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert (found - expected).norm() <= relative * expected.norm()


@EVERY
@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize("dense", [False, True], ids=["quantized", "dense"])
def test_merged_saved_and_loaded(name: str, dense: bool, storage: Storage, tmp_path: Path) -> None:
    kind = specimen(storage)
    if storage.package in NOT_ON.get(name, {}):
        with pytest.raises(ConfigError, match=NOT_ON[name][storage.package]):
            core.attach(kind.model(), kind.config(**FIELDS[name]))
        return
    model, given = with_adapters(kind, "a", **FIELDS[name]), kind.given()
    core.attach(model, kind.config(target_modules=["up"]), "b")
    randomise(model, "b", 71)
    before, base = packed_bits(model), run(kind.model(), given)
    alone = {}
    for adapter in ("a", "b"):
        with core.use(model, adapter):
            alone[adapter] = run(model, given)
    core.save_adapter(model, tmp_path / "first", "a")
    wanted = {}
    for site in (site for site in core.sites(model) if "a" in site.layer.r):
        W = site.layer.read()
        wanted[site.path] = (W + site.layer.addition("a", W)).detach()
    if dense and name in NOT_DENSE:
        with pytest.raises(MergeError, match=NOT_DENSE[name]):
            core.merge(model, "a", dense=True)
        assert packed_bits(model) == before
        return
    core.merge(model, "a", dense=dense)
    if dense:
        near(run(model, given), alone["a"], 1e-5 + EVALUATED.get(storage.name, 0))
    for path, weight in wanted.items():
        owner = model.get_submodule(path).owner
        row = weight_format_of(owner)
        near(row.read(owner, row.stored(owner, "weight")), weight, 1e-6 if dense else WRITTEN[storage.name])
    with core.use(model, "b"):
        near(run(model, given), alone["b"], 1e-5 + EVALUATED.get(storage.name, 0))
    with core.disable(model):
        assert same_bits(run(model, given), base)
    core.save_adapter(model, tmp_path / "merged", "a")  # also while it is in the weight
    assert (tmp_path / "merged" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "first" / "adapter_model.safetensors"
    ).read_bytes()
    core.unmerge(model)
    assert packed_bits(model) == before
    with core.use(model, "a"):
        assert same_bits(run(model, given), alone["a"])
    again, plain = kind.model(), DENSE.model()
    assert core.load_adapter(again, tmp_path / "merged", "x").base == "same"
    assert same_bits(run(again, given), alone["a"])
    if name not in NOT_DENSE:
        core.merge(again, dense=True)
        near(run(again, given), alone["a"], 1e-5 + EVALUATED.get(storage.name, 0))
    core.load_adapter(plain, tmp_path / "merged", "x")  # the plain base differs by the quantization error
    core.merge_and_unload(plain)
    whole = core.merged_state_dict(model, "a")
    assert set(whole) == set(plain.state_dict())
    plain.load_state_dict(whole, strict=True)
    near(run(plain, given), alone["a"], 1e-5 + EVALUATED.get(storage.name, 0))


@pytest.mark.parametrize("storage", [one for one in storages() if one.values[0].package == "bitsandbytes"])
@pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])
def test_a_conv1d_that_bitsandbytes_stores_is_a_linear_and_comes_back(
    storage: Storage, dora: bool, tmp_path: Path
) -> None:
    from transformers.pytorch_utils import Conv1D

    def model() -> nn.Module:
        torch.manual_seed(0)
        stored: Any = stored_linear(nn.Linear(64, 128), storage)
        stored.source_cls = Conv1D  # as transformers marks the layers that it quantized
        return nn.Sequential(OrderedDict(up=stored)).eval()

    adapted, given = model(), torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    core.attach(adapted, LoraConfig(r=4, target_modules=["up"], use_dora=dora))
    randomise(adapted, "default", 9)
    expected = run(adapted, given)
    core.save_adapter(adapted, tmp_path)
    again = model()
    assert core.load_adapter(again, tmp_path).base == "same"
    assert same_bits(run(again, given), expected)
    core.merge_and_unload(again, dense=True)
    assert type(again.up) is Conv1D and again.up.weight.shape == (64, 128)
    near(run(again, given), expected, 1e-5 + EVALUATED.get(storage.name, 0))


@EVERY
def test_sites_that_act_on_their_weight_are_refused_by_name_and_nothing_changes(
    storage: Storage, tmp_path: Path
) -> None:
    kind = specimen(storage)
    model = kind.model()
    before, given = packed_bits(model), kind.given()
    output = run(model, given)
    renamed = storage.package in ("hqq", "torch")  # the packed parameter has another name
    text = (
        "target_parameters entry 'up.weight' matches no parameter"
        if renamed
        else r"up is stored as .* adapted through its weight"
    )
    config = LoraConfig(r=2, target_modules=[], target_parameters=["up.weight"])
    with pytest.raises(LorakitError, match=text):
        core.attach(model, config)
    plain = DENSE.model()
    core.attach(plain, config)
    core.save_adapter(plain, tmp_path)
    with pytest.raises(LorakitError):
        core.load_adapter(model, tmp_path)
    inside = nn.Sequential(OrderedDict(mha=nn.MultiheadAttention(64, 2)))
    inside.mha.out_proj = stored_linear(inside.mha.out_proj, storage)
    with pytest.raises(LorakitError, match=r"mha.* is stored as .*adapted through its weight"):
        core.attach(inside, LoraConfig(r=2, target_modules=["mha"]))
    assert packed_bits(model) == before and same_bits(run(model, given), output)
