"""`add_weighted_adapter`, intruders and conversion, held against the installed peft where it is right."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit.peft as ours
from lorakit import core
from lorakit.errors import AdapterError, ConfigError
from lorakit.peft import weighted

from .architectures import model_named
from .closeness import assert_close
from .rows import ROWS_COMPARED, Row, copy_adapters, quiet_peft, randomise, theirs

ROWS = [
    Row("linear", "sequential", {"target_modules": ["up", "head"]}),
    Row("conv1d", "gpt2-words", {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"]}),
    Row("llama", "llama-words", {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}),
    Row("embedding", "sequential", {"target_modules": ["embed", "up"]}),
]
EQUAL = ("svd", "linear", "cat", "ties", "ties_svd", "magnitude_prune", "magnitude_prune_svd")
DRAWN = ("dare_linear", "dare_ties", "dare_linear_svd", "dare_ties_svd")


def deltas(model: Any, name: str) -> dict[str, Tensor]:
    """Site -> update, (out, in) or as the library's base stores it, by the library's own factors."""
    found = {}
    for path, module in model.named_modules():
        for down, up in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if hasattr(module, "lora_A") and name in getattr(module, down, {}):
                A, B = (getattr(module, word)[name] for word in (down, up))
                A, B = (getattr(t, "weight", t).detach().double() for t in (A, B))
                found[path] = B @ A * module.scaling[name]
    return found


@pytest.mark.parametrize("row", ROWS, ids=str)
@pytest.mark.parametrize("way", EQUAL)
def test_the_same_as_peft_where_it_is_right(row: Row, way: str) -> None:
    pair = row.pair("a", "b")
    for model, add in zip(pair, (type(pair[0].base_model).add_weighted_adapter, None), strict=True):
        options = {"combination_type": way, "density": 0.6}
        with quiet_peft():
            if add is not None:
                model.add_weighted_adapter(["a", "b"], [0.7, 1.4], "new", **options)
            else:
                weighted.add_weighted_adapter(model.get_base_model(), ["a", "b"], [0.7, 1.4], "new", **options)
    expected, found = (deltas(model, "new") for model in pair)
    assert found.keys() == expected.keys()
    for path, delta in found.items():
        torch.testing.assert_close(delta, expected[path], rtol=1e-4, atol=1e-5)
    assert pair[1].peft_config["new"].r == pair[0].peft_config["new"].r


@pytest.mark.parametrize("way", DRAWN)
def test_what_is_drawn_has_peft_s_mean(way: str) -> None:
    """At density 1 nothing is drawn; below it the two draw different numbers with one mean."""
    row = ROWS[0]
    pair = row.pair("a", "b")
    with quiet_peft():
        pair[0].add_weighted_adapter(["a", "b"], [0.7, 1.4], "new", combination_type=way, density=1.0)
    weighted.add_weighted_adapter(pair[1], ["a", "b"], [0.7, 1.4], "new", combination_type=way, density=1.0)
    for path, delta in deltas(pair[1], "new").items():
        torch.testing.assert_close(delta, deltas(pair[0], "new")[path], rtol=1e-4, atol=1e-5)
    weighted.add_weighted_adapter(pair[1], ["a", "b"], [0.7, 1.4], "thin", combination_type=way, density=0.5)
    assert any(not torch.allclose(d, deltas(pair[1], "new")[p]) for p, d in deltas(pair[1], "thin").items())


def test_clamping_as_peft_up_to_the_signs_of_its_vectors() -> None:
    """peft's quantile is of signed numbers, so it depends on arbitrary signs; ours is of ± all of them."""
    pair = ROWS[0].pair("a", "b")
    with quiet_peft():
        pair[0].add_weighted_adapter(["a", "b"], [1.0, 1.0], "new", svd_clamp=0.95)
    weighted.add_weighted_adapter(pair[1], ["a", "b"], [1.0, 1.0], "new", svd_clamp=0.95)
    for path, delta in deltas(pair[1], "new").items():
        expected = deltas(pair[0], "new")[path]
        assert float((delta - expected).norm() / expected.norm()) < 0.1


def scaled_pair(**fields: Any) -> tuple[Any, Any]:
    made = []
    for library in (theirs, ours):
        row = Row("linear", "sequential", {"target_modules": ["up", "head"], **fields})
        with quiet_peft():
            model = row.wrapped(library)
            model.add_adapter("b", row.config(library, r=2))
        made.append(model)
    randomise(made[0])
    copy_adapters(*made)
    return made[0], made[1]


@pytest.mark.parametrize("way", ["cat", "svd"])
def test_rslora_is_combined_at_its_true_strength(way: str) -> None:
    """peft keeps use_rslora, so its result is √r too strong."""
    peft_model, model = scaled_pair(use_rslora=True)
    for each in (peft_model, model):
        names = ["default", "b"]
        if each is peft_model:
            with quiet_peft():
                each.add_weighted_adapter(
                    names, [1.0, 1.0], "new", combination_type=way, svd_rank=6 if way == "svd" else None
                )
        else:
            weighted.add_weighted_adapter(each, names, [1.0, 1.0], "new", way, svd_rank=6 if way == "svd" else None)
    for path, delta in deltas(model, "new").items():
        exact = deltas(model, "default")[path] + deltas(model, "b")[path]
        torch.testing.assert_close(delta, exact, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(deltas(peft_model, "new")[path], 6**0.5 * exact, rtol=1e-4, atol=1e-5)


def test_ranks_by_pattern_can_be_loaded_again_by_both(tmp_path: Path) -> None:
    """peft writes a config whose rank is not that of the tensors."""
    _, model = scaled_pair(rank_pattern={"head": 3}, alpha_pattern={"up": 11})
    weighted.add_weighted_adapter(model, ["default", "b"], [1.0, -0.5], "new", "cat")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    for library in (theirs, ours):
        with quiet_peft():
            again = library.PeftModel.from_pretrained(
                Row("x", "sequential").wrapped(ours, target_modules=["up"]).unload(), tmp_path / "new"
            )
        found = deltas(again, "default")
        for path, delta in deltas(model, "new").items():
            torch.testing.assert_close(found[path], delta, rtol=1e-5, atol=1e-6)


def test_dora_is_the_sum_of_what_each_does() -> None:
    """peft leaves the new adapter's magnitudes at the base's norms."""
    row = Row("dora", "sequential", {"target_modules": ["up"], "use_dora": True})
    _, model = row.pair("a", "b")
    inner = model.get_base_model()
    weighted.add_weighted_adapter(model, ["a", "b"], [0.5, 1.5], "new", "cat")
    merged = {name: core.merged_state_dict(inner, name)["up.weight"] for name in ("a", "b", "new")}
    base = inner.up.base_layer.weight.detach()
    assert_close({"w": merged["new"]}, {"w": base + 0.5 * (merged["a"] - base) + 1.5 * (merged["b"] - base)})


def test_a_copied_module_comes_with_what_was_trained() -> None:
    """peft gives the new adapter an untrained copy."""
    _, model = Row("saved", "sequential", {"target_modules": ["up"], "modules_to_save": ["head"]}).pair("a")
    model.add_adapter("b", ours.LoraConfig(r=4, target_modules=["up"]))
    weighted.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "new")
    held = model.get_base_model().head.modules_to_save
    assert torch.equal(held["new"].weight, held["a"].weight)
    with pytest.raises(
        ValueError,
        match="Cannot add weighted adapters if they target the same module with modules_to_save, but found 1",
    ):
        weighted.add_weighted_adapter(model, ["a", "new"], [1.0, 1.0], "x")


def test_one_adapter_is_taken_as_it_is_whatever_the_way() -> None:
    _, model = ROWS[0].pair("a", "b")
    for way in core.COMBINATION_TYPES:
        weighted.add_weighted_adapter(model, ["a"], [-2.0], f"new-{way}", way)
        for path, delta in deltas(model, f"new-{way}").items():
            torch.testing.assert_close(delta, -2 * deltas(model, "a")[path], rtol=1e-5, atol=1e-6)
    weighted.add_weighted_adapter(model, ["a"], [1.0], "cut", "svd", svd_rank=1)
    assert model.peft_config["cut"].r == 1


def test_a_name_that_exists_is_said() -> None:
    _, model = ROWS[0].pair("a", "b")
    before = deltas(model, "b")
    with pytest.warns(UserWarning, match="'b' already exists"):
        weighted.add_weighted_adapter(model, ["a"], [2.0], "b")
    assert all(torch.equal(delta, before[path]) for path, delta in deltas(model, "b").items())


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda m: weighted.add_weighted_adapter(m, ["a", "x"], [1, 1], "n"), AdapterError, "Adapter x does not exist"),
        (
            lambda m: weighted.add_weighted_adapter(m, ["a"], [1], "n", "mean"),
            ConfigError,
            "Invalid combination_type: mean",
        ),
        (
            lambda m: weighted.add_weighted_adapter(m, ["a", "b"], [1], "n"),
            AdapterError,
            "one weight per adapter .adapters: 2, weights: 1",
        ),
        (lambda m: weighted.add_weighted_adapter(m, ["a", "b"], [1, 1], "n", "ties"), ConfigError, "density is None"),
    ],
)
def test_refusals_are_value_errors(call: Callable[[Any], Any], error: type[Exception], said: str) -> None:
    _, model = ROWS[0].pair("a", "b")
    with pytest.raises(error, match=said) as raised:
        call(model)
    assert isinstance(raised.value, ValueError)
    assert list(model.peft_config) == ["a", "b"]


@pytest.mark.filterwarnings("error")
def test_a_density_above_one_prunes_nothing() -> None:
    _, model = ROWS[0].pair("a", "b")
    with pytest.warns(UserWarning, match="no pruning will be performed"):
        weighted.add_weighted_adapter(model, ["a", "b"], [1.0, 1.0], "n", "magnitude_prune", density=2.0)


# --- intruders and conversion


@pytest.mark.parametrize("row", [ROWS[0], ROWS[2]], ids=str)
@pytest.mark.parametrize("threshold", [0.6, 999.0])
def test_intruders_as_peft_on_dense_layers(row: Row, threshold: float) -> None:
    pair = row.pair()
    said: list[str] = []
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    for reduce, model in zip((reduce_intruder_dimension, weighted.reduce_intruder_dimension), pair, strict=True):
        with quiet_peft():
            reduce(model, top_k=4, threshold_epsilon=threshold, mitigation_lambda=0.4, logging_sink=said.append)
        assert model.active_adapters == ["intruder_reduced"]
        assert set(model.peft_config) == {"default", "intruder_reduced"}
    for path, delta in deltas(pair[1], "intruder_reduced").items():
        torch.testing.assert_close(delta, deltas(pair[0], "intruder_reduced")[path], rtol=1e-3, atol=1e-4)
    counts = [line.rpartition(":")[2] for line in said if "Intruders" in line]
    assert sorted(counts[: len(counts) // 2]) == sorted(counts[len(counts) // 2 :])


def test_intruders_of_an_embedding() -> None:
    """peft raises: it writes A and B with their shapes swapped."""
    _, model = Row("embedding", "sequential", {"target_modules": ["embed"]}).pair()
    weighted.reduce_intruder_dimension(model, threshold_epsilon=999, logging_sink=None)
    shapes = [tuple(model.get_base_model().embed.lora_embedding_A[n].shape) for n in model.peft_config]
    assert shapes[0] == shapes[1]
    assert not torch.allclose(*(deltas(model, n)["base_model.model.embed"] for n in model.peft_config))


@pytest.mark.parametrize("wide", [True, False])
def test_intruders_keep_the_dtype_of_the_old_adapter(wide: bool) -> None:
    """peft uses the base's dtype, so an fp32 adapter on a bf16 base is rounded; a bf16 one stays bf16 in both."""
    config = ours.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    base = torch.nn.Sequential(torch.nn.Linear(8, 8)).to(torch.bfloat16)
    model = ours.get_peft_model(base, config, autocast_adapter_dtype=wide)
    weighted.reduce_intruder_dimension(model, threshold_epsilon=999, logging_sink=None)
    for name in ("default", "intruder_reduced"):
        factor = model.base_model.model[0].factor(name)
        assert {factor.A.dtype, factor.B.dtype} == {torch.float32 if wide else torch.bfloat16}


@pytest.mark.parametrize("rank", [2, 0.9])
def test_conversion_as_peft(rank: Any, tmp_path: Path) -> None:
    pair = ROWS[2].pair()
    with quiet_peft():
        expected_config, expected = theirs.convert_to_lora(pair[0], rank)
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        config, tensors = weighted.convert_to_lora(pair[1], rank)
    assert tensors.keys() == expected.keys()
    for name in tensors:
        assert tensors[name].shape == expected[name].shape
        if "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            torch.testing.assert_close(
                tensors[other] @ tensors[name], expected[other] @ expected[name], rtol=1e-3, atol=1e-4
            )
    assert config.target_modules == expected_config.target_modules or rank == 2
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        weighted.save_as_lora(tmp_path, pair[1], rank)
        weighted.save_as_lora(tmp_path, pair[1], rank)
    with quiet_peft():
        plain = Row("x", "llama-words").wrapped(theirs, target_modules=["q_proj"]).unload()
        again = theirs.PeftModel.from_pretrained(plain, tmp_path)
    for path, delta in deltas(again, "default").items():
        name = f"{path}.lora_A.weight"
        product = tensors[name.replace("lora_A", "lora_B")].double() @ tensors[name].double()
        torch.testing.assert_close(delta, product, rtol=1e-4, atol=1e-5)


def test_dora_is_converted_to_plain_lora() -> None:
    _, model = Row("dora", "sequential", {"target_modules": ["up"], "use_dora": True}).pair()
    config, tensors = weighted.convert_to_lora(model, 1.0)
    inner = model.get_base_model()
    change = core.merged_state_dict(inner)["up.weight"] - inner.up.base_layer.weight.detach()
    A, B = (tensors[f"base_model.model.up.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(B @ A, change, rtol=1e-4, atol=1e-5)
    assert not config.use_dora


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (0, "Passing a rank of 0 doesn't make sense"),
        (1.5, "If rank is a float, it is interpreted as a threshold"),
        (999, "is larger than the weight shape"),
    ],
)
def test_ranks_that_cannot_be(rank: Any, said: str) -> None:
    _, model = ROWS[0].pair()
    with pytest.raises(ValueError, match=said):
        weighted.convert_to_lora(model, rank)


def test_a_model_without_adapters_has_nothing_to_convert() -> None:
    with pytest.raises(TypeError, match="Could not detect any layer that supports LoRA conversion"):
        weighted.convert_to_lora(nn.Sequential(nn.Linear(2, 2)), 1)


def test_signatures_are_pefts() -> None:
    from peft.tuners.lora import LoraModel
    from peft.tuners.lora.intruders import reduce_intruder_dimension

    def names(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)

    assert names(weighted.add_weighted_adapter)[1:] == names(LoraModel.add_weighted_adapter)[1:]
    for ours_, theirs_ in (
        (weighted.reduce_intruder_dimension, reduce_intruder_dimension),
        (weighted.convert_to_lora, theirs.convert_to_lora),
        (weighted.save_as_lora, theirs.save_as_lora),
    ):
        assert names(ours_) == names(theirs_)


@pytest.mark.parametrize("way", ["cat", "svd", "ties"])
def test_experts_are_combined_and_read_by_peft(way: str, tmp_path: Path) -> None:
    """peft cannot combine adapters on bare parameters; a combination made here has the same output in peft."""
    row = next(row for row in ROWS_COMPARED if row.name == "experts-mixtral-and-modules")
    both = row.pair("a", "b")
    with quiet_peft(), pytest.raises(ValueError, match=r"does not support targeting nn\.Parameter"):
        both[0].add_weighted_adapter(["a", "b"], [0.7, 1.4], "new", combination_type=way, density=0.6)
    model = both[1]
    model.base_model.add_weighted_adapter(["a", "b"], [0.7, 1.4], "new", combination_type=way, density=0.6)
    model.set_adapter("new")
    model.save_pretrained(tmp_path, selected_adapters=["new"])
    with quiet_peft():
        again = theirs.PeftModel.from_pretrained(model_named(row.model), tmp_path / "new")
    with torch.no_grad():
        found, expected = ({"logits": each.eval()(**row.inputs).logits} for each in (again, model))
    assert_close(found, expected, 1e-4)
