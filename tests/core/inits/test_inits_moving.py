"""Adapters with a residual base together with plain ones: outputs, merges, kept weights, and restoring the base."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core import (
    activate,
    attach,
    compress,
    detach,
    disable,
    fingerprint,
    load_adapter,
    merge,
    merge_and_unload,
    merged_state_dict,
    route,
    save_adapter,
    save_as_trained,
    sites,
    trainable_parameters,
    unmerge,
    use,
)
from lorakit.core.files.adapter_folder import INITIAL_FILE, read_adapter
from lorakit.errors import AdapterFileError, ConfigError

from ...laws.snapshots import BaseBits, same_bits, snapshot
from ...laws.tolerances import assert_close, assert_differs
from ...laws.zoo import CONV1DS, CONV2, EMBEDDING, LINEARS, MHA, Specimen, attach_fresh, randomise, run

MOVING = ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq")
FP32 = torch.float32


def both(
    init: str = "pissa",
    specimen: Specimen = LINEARS,
    dtype: torch.dtype = FP32,
    plain_first: bool = False,
    **fields: Any,
) -> nn.Module:
    """A model with an adapter "moved" that has a residual base and a plain one, "plain", both trained."""
    model = specimen.model(dtype)
    order = ["plain", "moved"] if plain_first else ["moved", "plain"]
    for name in order:
        more = {"init_lora_weights": init} if name == "moved" else {}
        with torch.no_grad():
            attach_fresh(model, specimen, name, dtype, **more, **fields)
        randomise(model, name, seed=order.index(name) + 7, size=0.3)
    activate(model, "moved")
    return model


def answers(model: nn.Module, given: Any) -> dict[tuple[str, ...], Tensor]:
    found = {}
    for names in ((), ("moved",), ("plain",), ("moved", "plain"), ("plain", "moved")):
        with use(model, *names) if names else disable(model):
            found[names] = run(model, given)
    return found


def dense(model: nn.Module, name: str, W: Tensor, own: Tensor) -> Tensor:
    """Return a Linear's weight with one adapter, by the formula, in float64."""
    layer = model.up
    factor = layer.factor(name)
    product = factor.B.double() @ factor.A.double() * factor.scale
    return (own if name == "moved" else W).double() + product


@pytest.mark.parametrize("init", MOVING)
@pytest.mark.parametrize("plain_first", [False, True])
def test_each_adapter_sees_its_own_base(init: str, plain_first: bool) -> None:
    model, given = both(init, plain_first=plain_first), LINEARS.given()
    W = LINEARS.model().up.weight.detach()
    own = model.up.owner.weight.detach()
    assert model.up.moved_by == ("moved",) and not torch.equal(own, W)
    x, bias = given.double(), model.up.owner.bias.double()
    with torch.no_grad():
        for names in (["moved"], ["plain"], ["moved", "plain"], []):
            total = sum((dense(model, n, W, own) - W for n in names), W.double())
            with use(model, *names) if names else disable(model):
                assert_close(model.up(given), x @ total.T + bias, FP32)


@pytest.mark.parametrize("specimen", [LINEARS, CONV1DS, EMBEDDING, CONV2, MHA], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_in_any_order_changes_no_answer(specimen: Specimen, dtype: torch.dtype) -> None:
    for steps in (["moved"], ["plain"], ["moved", "plain"], ["plain", "moved"]):
        model, given = both(specimen=specimen, dtype=dtype), specimen.given(dtype)
        before, standing = answers(model, given), BaseBits(model).before
        for first, second in itertools.combinations(before, 2):
            if set(first) != set(second):
                assert_differs(before[first], before[second], dtype)
        for name in steps:
            merge(model, name)
            for names, expected in before.items():
                with use(model, *names) if names else disable(model):
                    assert_close(run(model, given), expected, dtype)
        for name in steps:  # the first merged leaves first
            unmerge(model, name)
        assert BaseBits(model).before == standing
        after = answers(model, given)
        assert all(same_bits(after[names], expected) for names, expected in before.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["pissa", "lora_ga"])
def test_rows(init: str, dtype: torch.dtype) -> None:
    model, given = both(init, dtype=dtype), LINEARS.given(dtype)
    alone = answers(model, given)
    for merged in ((), ("moved",), ("plain",)):
        if merged:
            merge(model, *merged)
        for rows in itertools.product(["moved", "plain", None], repeat=2):
            with route(model, [*rows, "plain", None]):
                mixed = run(model, given)
            for row, name in enumerate([*rows, "plain", None]):
                assert_close(mixed[row], alone[(name,) if name else ()][row], dtype)
        if merged:
            unmerge(model)


@pytest.mark.parametrize("keep_base", [True, "cpu", False])
def test_a_merge_of_one_is_the_moved_weight_plus_its_product_rounded_once(keep_base: Any) -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        model = both(dtype=dtype)
        own, W = model.up.owner.weight.detach().clone(), LINEARS.model(dtype).up.weight.detach()
        factor = model.up.factor("moved")
        product = factor.B.detach() @ factor.A.detach() * factor.scale
        merge(model, "moved", keep_base=keep_base)
        assert same_bits(model.up.owner.weight, (own.float() + product).to(dtype))
        with disable(model):
            assert same_bits(model.up(LINEARS.given(dtype)), LINEARS.model(dtype).up(LINEARS.given(dtype)))
        unmerge(model, "moved")
        assert same_bits(model.up.owner.weight, own)
        detach(model)
        assert same_bits(model.up.weight, W)


@pytest.mark.parametrize("steps", list(itertools.permutations(["moved", "plain"])))
@pytest.mark.parametrize("merged", [(), ("moved",), ("plain",), ("moved", "plain")])
def test_detach_gives_the_bits_back_in_any_order(steps: tuple[str, ...], merged: tuple[str, ...]) -> None:
    base = BaseBits(LINEARS.model(torch.bfloat16)).before
    model, given = both(dtype=torch.bfloat16), LINEARS.given(torch.bfloat16)
    expected = answers(model, given)
    if merged:
        merge(model, *merged)
    detach(model, steps[0])
    with use(model, steps[1]):
        assert_close(run(model, given), expected[(steps[1],)], torch.bfloat16)
    with disable(model):
        assert same_bits(run(model, given), expected[()])
    detach(model, steps[1])
    assert BaseBits(model).before == base


@pytest.mark.parametrize("merged", [(), ("plain",)])
def test_what_leaves_for_good_takes_no_moved_base_along(merged: tuple[str, ...]) -> None:
    model, given = both(), LINEARS.given()
    expected = answers(model, given)
    plain = LINEARS.model(seed=99)
    for names in (("moved",), ("plain",), ("moved", "plain")):
        plain.load_state_dict(merged_state_dict(model, *names), strict=True)
        assert_close(run(plain, given), expected[names], FP32)
    if merged:
        merge(model, *merged)
        activate(model, "plain")
        twin = copy.deepcopy(model)
        unmerge(twin)
        merge_and_unload(twin, "plain")
        assert_close(run(twin, given), expected[("plain",)], FP32)
    else:
        merge_and_unload(model, "plain")
        assert_close(run(model, given), expected[("plain",)], FP32)
        assert sites(model) == []


def test_copies_pickles_and_dtypes_carry_everything() -> None:
    model, given = both(), LINEARS.given()
    merge(model, "plain")
    expected = answers(model, given)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = answers(twin, given)
        assert all(same_bits(found[names], expected[names]) for names in expected)
        detach(twin)
        assert BaseBits(twin).before == BaseBits(LINEARS.model()).before
    half = model.to(torch.bfloat16)
    for names, before in expected.items():
        with use(half, *names) if names else disable(half):
            assert_close(run(half, given.bfloat16()), before, torch.bfloat16)


@pytest.mark.filterwarnings("ignore:Using Rank-Stabilized LoRA")
@pytest.mark.parametrize("specimen", [LINEARS, CONV1DS, EMBEDDING, CONV2, MHA], ids=str)
@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga"])
@pytest.mark.parametrize("patterns", [False, True])
def test_saved_as_plain_lora_and_trained_on(specimen: Specimen, init: str, patterns: bool, tmp_path: Path) -> None:
    first, last = specimen.targets[0], specimen.targets[-1]
    fields = {"use_rslora": True, "rank_pattern": {first: 2}, "alpha_pattern": {last: 3}} if patterns else {}
    if init == "lora_ga" and specimen is MHA:
        pytest.skip("lora_ga does not support attention")
    model, given = both(init, specimen=specimen, **fields), specimen.given()
    expected = run(model, given)
    save_adapter(model, tmp_path, "moved")
    files, layer = read_adapter(tmp_path), sites(model)[0].layer
    assert files.config.init_lora_weights is True and not (tmp_path / INITIAL_FILE).exists()
    assert files.sidecar.sites[sites(model)[0].path]["r"] == 2 * layer.r["moved"]
    plain, on = specimen.model(), specimen.model()
    load_adapter(plain, tmp_path)
    assert_close(run(plain, given), expected, FP32)
    assert BaseBits(plain).before.keys() and all(not site.layer.moved_by for site in sites(plain))
    load_adapter(on, tmp_path, "moved", trainable=True)  # unchanged, bit for bit
    assert same_bits(run(on, given), expected)
    for one, other in zip(sites(model), sites(on), strict=True):
        A, B = (one.layer.factor("moved").A, one.layer.factor("moved").B)
        assert same_bits(A, other.layer.factor("moved").A) and same_bits(B, other.layer.factor("moved").B)
        assert same_bits(one.layer.owner._parameters[one.layer.spec.parameter], other.layer.moved)
        assert (
            one.layer.r["moved"] == other.layer.r["moved"]
            and one.layer.scaling["moved"] == other.layer.scaling["moved"]
        )
    save_adapter(on, tmp_path / "again", "moved")
    assert (tmp_path / "again" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "adapter_model.safetensors"
    ).read_bytes()
    assert len(trainable_parameters(on, "moved")) == len(trainable_parameters(model, "moved"))
    detach(on)
    assert BaseBits(on).before == BaseBits(specimen.model()).before


def test_saved_as_plain_lora_with_dora(tmp_path: Path) -> None:
    model, given = both(use_dora=True), LINEARS.given()
    expected = run(model, given)
    save_adapter(model, tmp_path, "moved")
    for trainable in (False, True):
        loaded = LINEARS.model()
        load_adapter(loaded, tmp_path, trainable=trainable)
        assert_close(run(loaded, given), expected, FP32)


def test_saved_as_trained(tmp_path: Path) -> None:
    model, given = both("corda"), LINEARS.given()
    saved = save_as_trained(model, tmp_path, "moved")
    assert INITIAL_FILE in saved.files and read_adapter(tmp_path).config.init_lora_weights == "corda"
    loaded = LINEARS.model()
    load_adapter(loaded, tmp_path)
    assert same_bits(run(loaded, given), run(model, given))
    (tmp_path / INITIAL_FILE).write_bytes(b"x" * 200)
    with pytest.raises(AdapterFileError, match="not a safetensors file"):
        load_adapter(LINEARS.model(), tmp_path)
    save_adapter(model, tmp_path, "moved")
    assert not (tmp_path / INITIAL_FILE).exists()


@pytest.mark.parametrize("init", ["pissa", "olora", "loftq"])
def test_a_file_without_its_beginning_runs_an_init_by_name_alone(init: str, tmp_path: Path) -> None:
    model, given = both(init), LINEARS.given()
    save_as_trained(model, tmp_path, "moved")
    for name in ("lorakit.json", INITIAL_FILE):  # as PEFT writes it
        (tmp_path / name).unlink(missing_ok=True)
    plain = LINEARS.model()
    before = snapshot(plain)
    with pytest.raises(
        AdapterFileError, match=rf"'{init}': the factors apply to a base that this init changed.*'recompute_init'"
    ):
        load_adapter(plain, tmp_path)
    assert snapshot(plain) == before
    load_adapter(plain, tmp_path, allow=["recompute_init"])
    assert_close(run(plain, given), run(model, given), FP32)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
def test_a_file_whose_beginning_was_made_from_data_is_refused(init: str, tmp_path: Path) -> None:
    save_as_trained(both(init), tmp_path, "moved")
    for name in ("lorakit.json", INITIAL_FILE):
        (tmp_path / name).unlink()
    with pytest.raises(
        AdapterFileError, match=r"using data, and the file does not contain the changed base.*save_adapter"
    ):
        load_adapter(LINEARS.model(), tmp_path, allow=["recompute_init"])


def test_an_adapter_whose_words_were_edited_is_loaded_plain(tmp_path: Path) -> None:
    save_adapter(both(), tmp_path, "moved")
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"lora_dropout": 0.0', '"lora_dropout": 0.1'))
    model = LINEARS.model()
    with pytest.warns(UserWarning, match="was edited after"):
        load_adapter(model, tmp_path, trainable=True)
    assert not model.up.moved_by and model.up.r["default"] == 8


def test_operations_on_adapters_take_it_for_what_it_is() -> None:
    model, given = both(), LINEARS.given()
    expected = run(model, given)
    compress(model, "moved", "small", rank=8)
    with use(model, "small"):
        assert_close(run(model, given), expected, FP32)


def test_one_adapter_of_a_site_moves_it() -> None:
    model = both()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"up: .* changes the base weight, but adapter 'moved' has already changed"):
        attach(model, LINEARS.config(init_lora_weights="olora"), "third")
    assert snapshot(model) == before
    assert fingerprint(model) == fingerprint(LINEARS.model())


def test_a_shared_weight_is_not_moved() -> None:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(9, 8), nn.Linear(8, 9, bias=False)
    model.head.weight = model.embed.weight
    for target in ("embed", "head"):
        with pytest.raises(ConfigError, match=f"{target} shares its weight with .*would change it for both"):
            attach(model, LoraConfig(r=2, target_modules=[target], init_lora_weights="pissa"))


def test_a_rank_that_is_too_large_a_scale_of_zero_and_numbers_that_are_none() -> None:
    def refused(text: str, model: nn.Module | None = None, **fields: Any) -> None:
        model = nn.Sequential(nn.Linear(6, 5)) if model is None else model
        before = snapshot(model)
        with pytest.raises(ConfigError, match=text):
            attach(model, LoraConfig(**{"r": 4, "target_modules": ["0"], **fields}), allow=["odd_scale"])
        assert snapshot(model) == before

    for init in ("pissa", "olora", "loftq"):
        more = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
        refused("r is 6, but the maximum at this site is 5", r=6, init_lora_weights=init, **more)
    refused("MiCA requires `r` <= min", r=6, init_lora_weights="mica")
    refused("requires the LoRA rank to be even, got 3", r=3, init_lora_weights="orthogonal")
    refused("the scale is 0", init_lora_weights="pissa", lora_alpha=0)
    refused("Only nf4 and int8", init_lora_weights="loftq", loftq_config={"loftq_bits": 2})
    refused("loftq_iter is 0", init_lora_weights="loftq", loftq_config={"loftq_bits": 4, "loftq_iter": 0})
    sick = nn.Sequential(nn.Linear(6, 5))
    sick[0].weight.data[0, 0] = float("nan")
    refused("contains NaN or infinite values", sick, init_lora_weights="pissa")
    refused("convolution with 2 groups", nn.Sequential(nn.Conv1d(4, 6, 1, groups=2)), r=2, init_lora_weights="olora")


def test_experts_side_by_side_each_have_their_own_directions() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight_of_all = nn.Parameter(torch.randn(3, 6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ei,eoi->eo", x, self.weight_of_all)

    torch.manual_seed(0)
    model = nn.Sequential(Experts()).eval()
    W, x = model[0].weight_of_all.detach().clone(), torch.randn(3, 5)
    before = run(model, x)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=[], target_parameters=["0.weight_of_all"])
    for init in ("pissa", "olora", "mica", "orthogonal"):
        attach(model, config.with_fields(init_lora_weights=init))
        assert_close(run(model, x), before, FP32)
        if init == "pissa":
            for expert in range(3):
                U, S, Vh = torch.linalg.svd(W[expert])
                torch.testing.assert_close(
                    model[0].owner.weight_of_all[expert],
                    W[expert] - U[:, :2] @ S[:2].diag() @ Vh[:2],
                    atol=1e-5,
                    rtol=0,
                )
        detach(model)
        assert torch.equal(model[0].weight_of_all, W)
