"""Inits compared with the installed peft: the same s·B·A, residual base and factors except signs, files both ways.

peft's own faults are not repeated: olora on Conv1D, LoRA-GA's size on Conv1D, LoftQ without its scale, and kinds on which
it silently uses its default; those are compared with the formula in tests/docs/test_formulas_of_inits.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit.peft as ours
from lorakit.peft.tuners.lora.corda import preprocess_corda
from lorakit.peft.tuners.lora.eva import get_eva_state_dict, initialize_lora_eva_weights
from lorakit.peft.tuners.lora.loraga import preprocess_loraga

from .rows import quiet_peft, theirs

IN, WIDE, OUT = 12, 20, 16


class Small(nn.Module):
    """Two dense layers and a Conv1D."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.up = nn.Linear(IN, WIDE)
        self.conv = Conv1D(WIDE, WIDE)
        self.down = nn.Linear(WIDE, OUT)
        nn.init.normal_(self.conv.weight, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.conv(torch.tanh(self.up(x)))))


def small(dtype: torch.dtype = torch.float32) -> Small:
    torch.manual_seed(0)
    return Small().to(dtype).eval()


def rows(seed: int = 1) -> Tensor:
    return torch.randn(40, IN, generator=torch.Generator().manual_seed(seed))


def train_step(model: nn.Module) -> None:
    for seed in range(3):
        model.zero_grad()
        total = sum(model(rows(s).requires_grad_()).sin().square().mean() for s in range(seed + 1))
        total.backward()


def made(library: Any, init: str, targets: list[str], dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    """Return an adapted model of either library, after the first step of an init that has two."""
    model = small(dtype)
    config = library.LoraConfig(r=4, lora_alpha=6, target_modules=targets, init_lora_weights=init, **fields)
    ahead = library is theirs
    if init == "corda":
        if ahead:
            from peft.tuners.lora.corda import preprocess_corda as preprocess
        else:
            preprocess = preprocess_corda
        preprocess(model, config, run_model=lambda: [model(rows(seed)) for seed in (1, 2, 3)])
    if init == "lora_ga":
        if ahead:
            from peft.tuners.lora.loraga import preprocess_loraga as preprocess_ga
        else:
            preprocess_ga = preprocess_loraga
        preprocess_ga(model, config, lambda: train_step(model))
    with quiet_peft():
        return library.get_peft_model(model, config)


def factors(model: Any, site: str) -> tuple[Tensor, Tensor, Tensor, float]:
    layer = getattr(model.base_model.model, site)
    A, B = (holder["default"].weight.detach().float() for holder in (layer.lora_A, layer.lora_B))
    return A, B, layer.base_layer.weight.detach().float(), layer.scaling["default"]


CORDA = {"corda_config": ours.CordaConfig(corda_method="ipm")}, {"corda_config": ours.CordaConfig(corda_method="kpm")}
CASES: list[tuple[str, list[str], dict[str, Any]]] = [
    ("pissa", ["up", "conv", "down"], {}),
    ("olora", ["up", "down"], {}),
    ("mica", ["up", "conv", "down"], {}),
    ("corda", ["up", "conv", "down"], CORDA[0]),
    ("corda", ["up", "down"], CORDA[1]),
    *(("lora_ga", ["up", "down"], {"lora_ga_config": {"direction": d, "scale": "stable"}}) for d in ("ArB2r", "A2rBr")),
    *(("lora_ga", ["up", "down"], {"lora_ga_config": {"direction": "ArBr", "scale": s}}) for s in ("unit", "gd_scale")),
    ("lora_ga", ["up", "down"], {"lora_ga_config": {"direction": "ArB2r", "scale": "weight_svd"}}),
]


def for_theirs(fields: dict[str, Any]) -> dict[str, Any]:
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig

    found = dict(fields)
    if "corda_config" in found:
        found["corda_config"] = CordaConfig(corda_method=found["corda_config"].corda_method)
    if "lora_ga_config" in found:
        found["lora_ga_config"] = LoraGAConfig(**found["lora_ga_config"])
    return found


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("init", "targets", "fields"), CASES, ids=lambda value: str(value)[:40])
def test_same_factors_and_same_base(init: str, targets: list[str], fields: dict[str, Any], rslora: bool) -> None:
    expected = made(theirs, init, targets, use_rslora=rslora, **for_theirs(fields))
    found = made(ours, init, targets, use_rslora=rslora, **fields)
    for site in targets:
        A, B, left, scale = factors(expected, site)
        our_A, our_B, our_left, our_scale = factors(found, site)
        assert our_scale == scale
        torch.testing.assert_close(our_A.abs(), A.abs(), atol=2e-4, rtol=1e-3)  # but for signs of singular vectors
        torch.testing.assert_close(our_B.abs(), B.abs(), atol=2e-4, rtol=1e-3)
        if init != "lora_ga":  # there the signs of A and B are not tied to each other
            torch.testing.assert_close(our_B @ our_A, B @ A, atol=2e-4, rtol=1e-3)
            torch.testing.assert_close(our_left, left, atol=2e-4, rtol=1e-3)
    x = rows(9)
    with torch.no_grad():
        torch.testing.assert_close(found(x), expected(x), atol=1e-5, rtol=1e-5)
    trained = {n for n, p in expected.named_parameters() if p.requires_grad}
    assert {n for n, p in found.named_parameters() if p.requires_grad} == trained


def test_orthogonal_begins_alike() -> None:
    expected, found = made(theirs, "orthogonal", ["up", "down"]), made(ours, "orthogonal", ["up", "down"])
    for site in ("up", "down"):
        (A, B, _, _), (our_A, our_B, _, _) = factors(expected, site), factors(found, site)
        assert float(our_A.norm()) == pytest.approx(float(A.norm()), rel=0.6)
        assert float(our_B.norm()) == pytest.approx(float(B.norm()), rel=0.6)
        assert float((our_B @ our_A).abs().max()) < 1e-6 and float((B @ A).abs().max()) < 1e-6


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("whiten", [False, True])
def test_eva_finds_the_same_directions(rho: float, whiten: bool) -> None:
    from peft import EvaConfig
    from peft import get_eva_state_dict as their_state_dict
    from peft import initialize_lora_eva_weights as their_initialize

    mix = torch.randn(IN, IN, generator=torch.Generator().manual_seed(5)) * torch.logspace(0, -2, IN)
    batches = [rows(seed) @ mix for seed in range(3)]
    settings = {"rho": rho, "whiten": whiten, "tau": 0.9999}
    how = {"forward_fn": lambda model, x: model(x), "prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    fields = {"r": 2, "lora_alpha": 4, "target_modules": ["up", "conv", "down"], "init_lora_weights": "eva"}
    with quiet_peft():
        expected = theirs.get_peft_model(small(), theirs.LoraConfig(**fields, eva_config=EvaConfig(**settings)))
        directions = their_state_dict(expected, batches, show_progress_bar=False, **how)
        their_initialize(expected, eva_state_dict=copy.copy(directions))
    found = ours.get_peft_model(small(), ours.LoraConfig(**fields, eva_config=ours.EvaConfig(**settings)))
    our_directions = get_eva_state_dict(found, batches, **how)
    assert {n: t.shape for n, t in our_directions.items()} == {n: t.shape for n, t in directions.items()}
    for name, A in directions.items():
        cosines = torch.nn.functional.cosine_similarity(our_directions[name], A.float()).abs()
        assert float(cosines.min()) > 0.97, name  # peft's sketch stops near them
        if not whiten:  # peft divides by what grows with each round that it takes over the data
            torch.testing.assert_close(our_directions[name].norm(dim=1), A.norm(dim=1).float(), atol=0, rtol=0.05)
    initialize_lora_eva_weights(found, batches, **how)
    assert found.peft_config["default"].rank_pattern == expected.peft_config["default"].rank_pattern
    assert found.peft_config["default"].alpha_pattern == expected.peft_config["default"].alpha_pattern
    for site in ("up", "conv", "down"):
        theirs_at, ours_at = (getattr(model.base_model.model, site) for model in (expected, found))
        assert ours_at.r == theirs_at.r and ours_at.scaling == theirs_at.scaling
        assert not ours_at.lora_B["default"].weight.any()
    assert {n for n, p in found.named_parameters() if p.requires_grad} == {
        n for n, p in expected.named_parameters() if p.requires_grad
    }


def moved(model: Any) -> Any:
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                parameter.add_((0.1 * noise).to(parameter.dtype))
    return model


@pytest.mark.filterwarnings("ignore:Adapter 'default' applies to a base")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_files_both_ways(init: str, rslora: bool, tmp_path: Path) -> None:
    x = rows(9)
    for writer, reader in ((theirs, ours), (ours, theirs)):
        folder = tmp_path / writer.__name__
        model = made(writer, init, ["up", "down"], use_rslora=rslora)
        kept = model.peft_config["default"].init_lora_weights
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(folder / "began")
        model.peft_config["default"].init_lora_weights = kept
        moved(model)
        with torch.no_grad():
            expected = model(x)
        with quiet_peft():
            model.save_pretrained(folder / "trained")
            model.save_pretrained(folder / "plain", path_initial_model_for_weight_conversion=str(folder / "began"))
        for name in ("trained", "plain"):
            with quiet_peft():
                loaded = reader.PeftModel.from_pretrained(small(), folder / name)
            assert loaded.peft_config["default"].r == (4 if name == "trained" else 8)
            with torch.no_grad():
                torch.testing.assert_close(loaded(x), expected, atol=1e-4, rtol=1e-4)


def test_the_core_writes_what_peft_reads_onto_the_original_base(tmp_path: Path) -> None:
    from lorakit import core

    for init, more in (("corda", CORDA[0]), ("lora_ga", {"lora_ga_config": ours.LoraGAConfig()})):
        model = moved(made(ours, init, ["up", "conv", "down"], **more))
        core.save_adapter(model.get_base_model(), tmp_path / init)
        with quiet_peft():
            loaded = theirs.PeftModel.from_pretrained(small(), tmp_path / init)
        with torch.no_grad():
            torch.testing.assert_close(loaded(rows(9)), model(rows(9)), atol=1e-4, rtol=1e-4)


def test_the_grid_of_loftq_is_bitsandbytes_own() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    from lorakit.core.inits.from_weight import normal_float, on_normal_float

    torch.testing.assert_close(normal_float(), functional.get_4bit_type("nf4", device="cpu"), atol=5e-7, rtol=0)
    W = torch.randn(48, 64, generator=torch.Generator().manual_seed(3))
    packed, state = functional.quantize_4bit(W, quant_type="nf4", blocksize=64)
    torch.testing.assert_close(on_normal_float(W), functional.dequantize_4bit(packed, state), atol=2e-6, rtol=0)
