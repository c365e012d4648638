"""The laws over quantized bases, each in every weight format; law 2 within the error that is reported."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.errors import MergeError, TargetError
from lorakit.plan.quantized import Storage

from .quantized import DENSE, EVALUATED, WRITTEN, packed_bits, specimen, storages, stored_linear
from .snapshots import same_bits
from .tolerances import assert_close
from .zoo import randomise, run, with_adapters

FP32 = torch.float32
EVERY = pytest.mark.parametrize("storage", storages())
VARIANTS = pytest.mark.parametrize("dora", [False, True], ids=["plain", "dora"])


def near(computed: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert (computed - expected).norm() <= relative * expected.norm()


@EVERY
@VARIANTS
def test_law_1_a_fresh_adapter_is_the_base(storage: Storage, dora: bool) -> None:
    kind = specimen(storage)
    model = kind.model()
    before = run(model, kind.given())
    report = core.attach(model, kind.config(use_dora=dora))
    assert [match.kind for match in report.matches] == ["Linear", "Linear"]
    assert_close(run(model, kind.given()), before, FP32)


@EVERY
def test_factors_have_the_features_of_the_plain_layer_and_fp32(storage: Storage) -> None:
    kind = specimen(storage)
    model = kind.model(torch.float32)
    core.attach(model, kind.config(target_modules="all-linear"))
    shapes = [(site.path, site.out_features, site.in_features) for site in core.sites(model)]
    assert shapes == [("up", 128, 64), ("square", 128, 128), ("out", 7, 128)]
    assert {p.dtype for _, p in core.trainable_parameters(model)} == {FP32}


@EVERY
@VARIANTS
def test_law_2_merged_into_a_plain_module_is_unmerged(storage: Storage, dora: bool) -> None:
    kind = specimen(storage)
    model = with_adapters(kind, "a", "b", use_dora=dora)
    given = kind.given()
    with core.use(model, "a"):
        expected = run(model, given)
    with core.use(model, "a", "b"):
        both = run(model, given)
    report = core.merge(model, "a", dense=True)
    assert report.error < 1e-6 and report.kept_bytes > 0
    assert type(model.up.owner) is nn.Linear
    tolerance = EVALUATED.get(storage.name, 1e-5)
    near(run(model, given), expected, tolerance)
    core.merge(model, "b", dense=True)
    near(run(model, given), both, tolerance)


@EVERY
@VARIANTS
def test_law_2_merged_into_the_quantized_weight_within_the_error_that_is_reported(storage: Storage, dora: bool) -> None:
    kind = specimen(storage)
    model = with_adapters(kind, "a", use_dora=dora)
    wanted = {}
    for site in core.sites(model):
        W = site.layer.read()
        wanted[site.path] = (W + site.layer.addition("a", W)).detach()
    report = core.merge(model, "a")
    assert {site.path for site in report.sites} == set(wanted)
    plain = DENSE.model()
    for site in report.sites:
        layer = model.get_submodule(site.path)
        written = layer.base.read(layer.owner, layer.base.stored(layer.owner, "weight"))
        error = (written - wanted[site.path]).norm() / wanted[site.path].norm()
        assert abs(site.error - float(error)) < 1e-6 and 0 < site.error < WRITTEN[storage.name]
        plain.get_submodule(site.path).weight.data = written
    near(run(model, kind.given()), run(plain, kind.given()), EVALUATED.get(storage.name, 1e-5))


@EVERY
@pytest.mark.parametrize("dense", [False, True], ids=["quantized", "dense"])
def test_law_3_unmerge_restores_bits(storage: Storage, dense: bool) -> None:
    kind = specimen(storage)
    model = with_adapters(kind, "a", "b")
    before, output = packed_bits(model), run(model, kind.given())
    modules = [type(model.up.owner), type(model.square.owner)]
    for order in (("a", "b"), ("b", "a")):
        core.merge(model, "a", dense=dense)
        core.merge(model, "b", dense=dense)
        for name in order:
            core.unmerge(model, name)
    assert packed_bits(model) == before
    assert [type(model.up.owner), type(model.square.owner)] == modules
    core.activate(model, "a")
    assert same_bits(run(model, kind.given()), output)


@EVERY
def test_disable_and_other_rows_see_the_base_through_a_merge(storage: Storage) -> None:
    kind = specimen(storage)
    model = with_adapters(kind, "a", "b")
    given = kind.given()
    base = run(kind.model(), given)
    alone = {None: base}
    for name in ("a", "b"):
        with core.use(model, name):
            alone[name] = run(model, given)
    for dense in (False, True):
        core.merge(model, "a", dense=dense)
        with core.disable(model):
            assert same_bits(run(model, given), base)
        with core.route(model, ["a", "b", None, "a"]):
            mixed = run(model, given)
        for row, name in enumerate(["a", "b", None, "a"]):
            assert_close(mixed[row : row + 1], alone[name][row : row + 1], FP32)
        core.unmerge(model)


@EVERY
@VARIANTS
def test_law_4_saved_is_loaded_on_the_quantized_base_and_on_the_plain_one(
    storage: Storage, dora: bool, tmp_path: Path
) -> None:
    kind = specimen(storage)
    model = with_adapters(kind, "a", use_dora=dora)
    expected = run(model, kind.given())
    core.save_adapter(model, tmp_path, "a")
    again = kind.model()
    assert core.load_adapter(again, tmp_path, "x").base == "same"
    assert same_bits(run(again, kind.given()), expected)
    plain = DENSE.model()
    assert core.load_adapter(plain, tmp_path, "x").base == "same at other precision"
    back = with_adapters(DENSE, "b", use_dora=dora)
    core.save_adapter(back, tmp_path / "plain", "b")
    assert core.load_adapter(again, tmp_path / "plain", "y").base == "same at other precision"


@EVERY
@VARIANTS
def test_law_5_a_mixed_batch_is_one_by_one(storage: Storage, dora: bool) -> None:
    kind = specimen(storage)
    model = with_adapters(kind, "a", "b", use_dora=dora)
    given = kind.given()
    with core.route(model, ["a", None, "b", "a"]):
        mixed = run(model, given)
    for row, name in enumerate(["a", None, "b", "a"]):
        with core.use(model, name) if name else core.disable(model):
            assert_close(mixed[row : row + 1], run(model, given)[row : row + 1], FP32)


@EVERY
def test_law_6_adapters_do_not_touch_each_other(storage: Storage) -> None:
    kind = specimen(storage)
    model = with_adapters(kind, "a", "b")
    core.activate(model, "b")
    output = run(model, kind.given())
    core.merge(model, "a", dense=True)
    core.unmerge(model)
    core.detach(model, "a")
    core.activate(model, "b")
    assert same_bits(run(model, kind.given()), output)


@EVERY
@VARIANTS
def test_law_11_no_forward_and_no_mode_changes_the_base(storage: Storage, dora: bool) -> None:
    kind = specimen(storage)
    model = kind.model()
    before = packed_bits(model)
    core.attach(model, kind.config(use_dora=dora))
    for training in (False, True, False, True):
        model.train(training)
        run(model, kind.given())
        model(kind.given()).sum().backward()
    trained = core.trainable_parameters(model)
    assert all(parameter.grad is not None for _, parameter in trained)
    assert packed_bits(model) == before
    core.detach(model)
    assert packed_bits(model) == before


@EVERY
def test_gradients_are_the_same_before_and_after_an_evaluation(storage: Storage) -> None:
    kind = specimen(storage)
    model = with_adapters(kind, "a")

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(kind.given()).square().sum().backward()
        return [parameter.grad.clone() for _, parameter in core.trainable_parameters(model)]

    first = gradients()
    model.eval()
    run(model, kind.given())
    assert all(same_bits(one, other) for one, other in zip(first, gradients(), strict=True))
    assert all(gradient.norm() > 0 for gradient in first)


@EVERY
def test_law_12_a_refused_call_changes_nothing(storage: Storage) -> None:
    kind = specimen(storage)
    model = with_adapters(kind, "a")
    before, output = packed_bits(model), run(model, kind.given())
    with torch.no_grad():
        model.square.lora_B["a"].weight[0, 0] = torch.nan
    for dense in (False, True):
        with pytest.raises(MergeError, match="Nothing was changed"):
            core.merge(model, "a", dense=dense)
    with torch.no_grad():
        model.square.lora_B["a"].weight[0, 0] = 0
    with pytest.raises(TargetError):
        core.attach(model, kind.config(target_modules=["nowhere"]), "b")
    assert packed_bits(model) == before and list(core.adapters(model)) == ["a"]
    with core.disable(model):
        assert same_bits(run(model, kind.given()), run(kind.model(), kind.given()))
    assert output.shape == run(model, kind.given()).shape


@EVERY
def test_a_plain_state_dict_and_a_plain_model_come_out(storage: Storage) -> None:
    kind = specimen(storage)
    model = with_adapters(kind, "a")
    expected = run(model, kind.given())
    plain = DENSE.model()
    plain.load_state_dict(core.merged_state_dict(model, "a"), strict=True)
    near(run(plain, kind.given()), expected, EVALUATED.get(storage.name, 1e-5))
    core.merge_and_unload(model, "a", dense=True)
    assert [type(model.up), type(model.square)] == [nn.Linear, nn.Linear]
    near(run(model, kind.given()), expected, EVALUATED.get(storage.name, 1e-5))


@EVERY
def test_what_is_copied_whole_is_plain_and_trained(storage: Storage, tmp_path: Path) -> None:
    kind = specimen(storage)
    model = kind.model()
    before = run(model, kind.given())
    core.attach(model, LoraConfig(r=2, target_modules=["up"], modules_to_save=["square"]))
    near(run(model, kind.given()), before, EVALUATED.get(storage.name, 1e-5))
    copied = dict(core.trainable_parameters(model))["square.modules_to_save.default.weight"]
    assert copied.shape == (128, 128) and copied.is_floating_point()
    randomise(model, "default", seed=1)
    expected = run(model, kind.given())
    core.save_adapter(model, tmp_path)
    again = kind.model()
    core.load_adapter(again, tmp_path)
    assert same_bits(run(again, kind.given()), expected)
    with core.disable(again):
        assert same_bits(run(again, kind.given()), before)


@EVERY
def test_it_survives_deepcopy_and_pickle(storage: Storage) -> None:
    kind = specimen(storage)
    model = with_adapters(kind, "a")
    expected = run(model, kind.given())
    assert same_bits(run(copy.deepcopy(model), kind.given()), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: Any = torch.load(file, weights_only=False)
    assert same_bits(run(loaded, kind.given()), expected)


@EVERY
@pytest.mark.parametrize("dense", [False, True], ids=["quantized", "dense"])
def test_a_bias_of_the_adapter_goes_in_and_out(storage: Storage, dense: bool) -> None:
    kind = specimen(storage)
    model = with_adapters(kind, "a", target_modules=["up"], lora_bias=True)
    expected = run(model, kind.given())
    report = core.merge(model, "a", dense=dense)
    near(run(model, kind.given()), expected, 1e-5 + 3 * report.error + EVALUATED.get(storage.name, 0))
    with core.disable(model):
        assert same_bits(run(model, kind.given()), run(kind.model(), kind.given()))
    core.unmerge(model)
    assert same_bits(run(model, kind.given()), expected)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bias_of_the_base_is_back_after_a_dense_merge(storage: Storage, dtype: torch.dtype) -> None:
    """Its dtype and its bits, in whatever order adapters that have a bias are attached and removed."""
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"up": stored_linear(nn.Linear(64, 128).to(dtype), storage)})
    x, before = torch.randn(2, 64, dtype=dtype), model["up"].bias.detach().clone()
    for seed, name in enumerate(("a", "b")):
        fields: dict[str, Any] = {"target_modules": ["up"], "lora_bias": True, "init_lora_weights": False}
        core.attach(model, LoraConfig(r=4, **fields), name, seed=seed)
    expected = model["up"](x)
    for going in (("a", "b"), ("b", "a")):
        for name in ("a", "b"):
            core.merge(model, name, dense=True)
        merged = model["up"].owner
        assert type(merged) is nn.Linear and merged.bias.dtype == merged.weight.dtype == dtype
        assert not same_bits(merged.bias, before)
        assert model["up"](x).dtype == dtype
        for name in going:
            core.unmerge(model, name)
        assert model["up"].owner.bias.dtype == dtype
        assert same_bits(model["up"].owner.bias.detach(), before)
        assert same_bits(model["up"](x), expected)
    core.detach(model)
    assert same_bits(model["up"].bias.detach(), before)


@EVERY
@pytest.mark.parametrize("reentrant", [False, True], ids=["anew", "reentrant"])
def test_recomputed_gradients_are_those_of_the_plain_backward(storage: Storage, reentrant: bool) -> None:
    from torch.utils.checkpoint import checkpoint

    kind = specimen(storage)
    model = with_adapters(kind, "a").train()
    given = kind.given().requires_grad_(True)

    def gradients(out: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        out.square().sum().backward()
        return [parameter.grad.clone() for _, parameter in core.trainable_parameters(model)]

    plain = gradients(model(given))
    again = gradients(checkpoint(model, given, use_reentrant=reentrant))
    assert all(same_bits(one, other) for one, other in zip(plain, again, strict=True))
