"""A combined adapter has the combined effect: against dense sums in float64, for kinds, ranks, scales and variants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lorakit.core import (
    attach,
    average,
    combine,
    load_adapter,
    rescale,
    save_adapter,
    subtract,
    use,
)
from lorakit.core.model.index import layers
from lorakit.core.operations.combination_types import COMBINATION_TYPES, CombinationType
from lorakit.errors import (
    AdapterError,
    ConfigError,
)

from ...laws.snapshots import same_bits, snapshot
from ...laws.zoo import (
    BERT,
    CONV1DS,
    EMBEDDING,
    EVERY_KIND,
    GPT2,
    LINEARS,
    LLAMA,
    Specimen,
    randomise,
    run,
)
from .updates import deltas, made, nearest, same, total

KINDS = (LINEARS, CONV1DS, EMBEDDING, EVERY_KIND, GPT2)


@pytest.mark.parametrize("specimen", KINDS, ids=str)
def test_cat_is_exact_under_every_scale(specimen: Specimen) -> None:
    model = made(specimen, "a", "b", "d")
    weights = {"a": 0.7, "b": -1.3, "d": 2.0}
    report = combine(model, list(weights), list(weights.values()), "sum", way="cat")
    same(deltas(model, "sum"), total(model, weights))
    assert report.deviation < 1e-12
    assert all(layer.scaling["sum"] == 1.0 for _, layer in layers(model))
    with use(model, "a"):
        first = run(model, specimen.given(torch.float64))
    with use(model, "sum"):
        assert not torch.allclose(run(model, specimen.given(torch.float64)), first)


@pytest.mark.parametrize("specimen", KINDS, ids=str)
def test_svd_is_the_nearest_of_its_rank(specimen: Specimen) -> None:
    model = made(specimen, "a", "c", "b")
    weights = {"a": 1.0, "c": -0.5, "b": 1.0}
    report = combine(model, list(weights), list(weights.values()), "near", way=CombinationType("svd", rank=3))
    exact = total(model, weights)
    same(deltas(model, "near"), {path: nearest(delta, 3) for path, delta in exact.items()}, 1e-8)
    for site in report.sites:
        apart = torch.linalg.norm(deltas(model, "near")[site.path] - exact[site.path])
        assert site.deviation == pytest.approx(float(apart / torch.linalg.norm(exact[site.path])), rel=1e-6)
        assert site.r == 3


def test_svd_takes_the_largest_rank_of_a_site_where_none_is_asked() -> None:
    model = made(LINEARS, "a", "d")
    report = combine(model, ["a", "d"], [1.0, 1.0], "near")
    assert {site.path: site.r for site in report.sites} == {"up": 4, "square": 5}
    assert (report.config.r, report.config.rank_pattern, report.config.alpha_pattern) == (
        *(4, {"square": 5}, {"square": 5}),
    ) or (report.config.r, report.config.rank_pattern) == (5, {"up": 4})


def test_svd_of_one_adapter_is_that_adapter() -> None:
    model = made(LINEARS, "c")
    combine(model, ["c"], [-2.0], "one")
    same(deltas(model, "one"), total(model, {"c": -2.0}))


def test_a_rank_above_the_site_is_filled_with_zeros() -> None:
    model = made(LINEARS, "a", "b")
    report = combine(model, ["a", "b"], [1.0, 1.0], "wide", way=CombinationType("svd", rank=30))
    assert report.config.r == 30 and not report.config.rank_pattern
    same(deltas(model, "wide"), total(model, {"a": 1.0, "b": 1.0}))


def test_linear_adds_a_and_b_by_themselves() -> None:
    model = made(LINEARS, "a", "c")
    combine(model, ["a", "c"], [0.7, -1.3], "rough", way="linear")
    layer = model.up
    w, v = 0.7 * layer.scaling["a"], 1.3 * layer.scaling["c"]
    A = w**0.5 * layer.lora_A["a"].weight - v**0.5 * layer.lora_A["c"].weight
    B = w**0.5 * layer.lora_B["a"].weight + v**0.5 * layer.lora_B["c"].weight
    torch.testing.assert_close(deltas(model, "rough")["up"], (B @ A).detach())


def trimmed(delta: Tensor, density: float) -> Tensor:
    kept = delta.abs().flatten().topk(int(density * delta.numel())).indices
    mask = torch.zeros(delta.numel(), dtype=torch.bool).index_fill(0, kept, True).view_as(delta)
    return delta * mask


@pytest.mark.parametrize("specimen", [LINEARS, EVERY_KIND], ids=str)
def test_ties_and_pruning_on_the_whole_update(specimen: Specimen) -> None:
    model = made(specimen, "a", "b")
    combine(model, ["a", "b"], [1.0, 0.5], "ties", way=CombinationType("ties_svd", rank=20, density=0.4))
    combine(model, ["a", "b"], [1.0, 0.5], "large", way=CombinationType("magnitude_prune_svd", rank=20, density=0.4))
    for path in deltas(model, "a"):
        parts = torch.stack([trimmed(deltas(model, name)[path], 0.4) for name in "ab"])
        sign = torch.where(parts.sum(0) >= 0, 1.0, -1.0)
        agree = parts.sign() == sign
        by = torch.tensor([1.0, 0.5], dtype=torch.float64).view(2, 1, 1)
        ties = (parts * by * agree).sum(0) / agree.sum(0).clamp(min=1)
        torch.testing.assert_close(deltas(model, "ties")[path], nearest(ties, 20), rtol=1e-5, atol=1e-5)
        large = nearest((parts * by).sum(0), 20)
        torch.testing.assert_close(deltas(model, "large")[path], large, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", COMBINATION_TYPES)
def test_an_adapter_of_weight_zero_is_not_there(name: str) -> None:
    density = {} if name in ("svd", "linear", "cat") else {"density": 0.5}
    way = CombinationType(name, **density, seed=5) if "dare" in name else CombinationType(name, **density)
    model = made(LINEARS, "a", "c")
    combine(model, ["a", "c"], [0.8, 0.0], "both", way=way)
    combine(model, ["a"], [0.8], "alone", way=way)
    same(deltas(model, "both"), deltas(model, "alone"))
    combine(model, ["a", "c"], [0.0, 0.0], "none", way=way)
    assert all(not delta.any() for delta in deltas(model, "none").values())


@pytest.mark.parametrize("name", [name for name in COMBINATION_TYPES if name.startswith("dare")])
def test_what_is_drawn_follows_the_seed(name: str) -> None:
    model = made(LINEARS, "a", "c")
    for new, seed in (("x", 1), ("y", 1), ("z", 2)):
        combine(model, ["a", "c"], [1.0, 1.0], new, way=CombinationType(name, density=0.5, seed=seed))
    same(deltas(model, "x"), deltas(model, "y"))
    assert not torch.allclose(deltas(model, "x")["up"], deltas(model, "z")["up"])
    combine(model, ["a", "c"], [1.0, 1.0], "whole", way=CombinationType(name, density=1))
    plain = {"dare_linear": "linear", "dare_linear_svd": "svd"}
    if name in plain:
        combine(model, ["a", "c"], [1.0, 1.0], "plain", way=plain[name])
        same(deltas(model, "whole"), deltas(model, "plain"), 1e-4)


def test_sites_of_each_adapter_are_kept() -> None:
    model = LINEARS.model(torch.float64)
    attach(model, LINEARS.config(target_modules=["up"]), "a")
    attach(model, LINEARS.config(target_modules=["square", "out"], r=2), "b")
    for number, name in enumerate("ab"):
        randomise(model, name, number)
    report = combine(model, ["a", "b"], [0.5, -1.0], "sum")
    same(deltas(model, "sum"), total(model, {"a": 0.5, "b": -1.0}))
    assert report.config.target_modules == {"up", "square", "out"}
    assert sorted(site.r for site in report.sites) == [2, 2, 4]


def test_targets_that_no_common_words_name_become_paths(tmp_path: Path) -> None:
    model = LLAMA.model()
    attach(model, LLAMA.config(target_modules=r".*layers\.0\.self_attn\.q_proj"), "a")
    attach(model, LLAMA.config(target_modules=["q_proj"], layers_to_transform=[1], r=2), "b")
    report = combine(model, ["a", "b"], [1.0, 1.0], "sum", way="cat")
    assert report.config.target_modules == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    assert report.config.layers_to_transform is None
    save_adapter(model, tmp_path, "sum")
    load_adapter(LLAMA.model(), tmp_path, trainable=True)


def test_sums_means_and_differences() -> None:
    model = made(LINEARS, "a", "b")
    average(model, ["a", "b"], way="cat")
    same(deltas(model, "average"), total(model, {"a": 0.5, "b": 0.5}))
    subtract(model, "a", "b")
    same(deltas(model, "difference"), total(model, {"a": 1.0, "b": -1.0}))
    rescale(model, "b", 3.0)
    same(deltas(model, "rescaled"), total(model, {"b": 3.0}))
    subtract(model, "a", "a", "nothing")
    assert max(float(delta.abs().max()) for delta in deltas(model, "nothing").values()) < 1e-12


@settings(max_examples=15, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    alpha=st.floats(0.1, 40),
    rslora=st.booleans(),
    weights=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    embedding=st.booleans(),
)
def test_cat_and_svd_for_any_shape(
    shape: tuple[int, int],
    ranks: list[int],
    alpha: float,
    rslora: bool,
    weights: list[float],
    embedding: bool,
) -> None:
    model = nn.Sequential(nn.Embedding(*shape) if embedding else nn.Linear(*shape)).double()
    from lorakit.config import LoraConfig

    names = ["x", "y", "z"][: len(ranks)]
    for name, r in zip(names, ranks, strict=True):
        attach(model, LoraConfig(r=r, lora_alpha=alpha, use_rslora=rslora, target_modules=["0"]), name)
        randomise(model, name, r)
    by = dict(zip(names, weights, strict=False))
    combine(model, names, list(by.values()), "cat", way="cat")
    same(deltas(model, "cat"), total(model, by), 1e-9)
    rank = max(ranks)
    combine(model, names, list(by.values()), "svd", way=CombinationType("svd", rank=rank))
    same(deltas(model, "svd"), {path: nearest(delta, rank) for path, delta in total(model, by).items()}, 1e-7)


# --- saved modules, biases and other parts


def test_a_copied_module_of_one_adapter_is_taken_over_with_its_numbers() -> None:
    model = BERT.model()
    attach(model, BERT.config(modules_to_save=["classifier"]), "a")
    attach(model, BERT.config(), "b")
    for number, name in enumerate("ab"):
        randomise(model, name, number)
    combine(model, ["a", "b"], [1.0, 1.0], "sum", way="cat")
    held = model.classifier.modules_to_save
    assert same_bits(held["sum"].weight, held["a"].weight) and held["sum"].weight is not held["a"].weight
    with use(model, "a", "b"):
        both = run(model, BERT.given())
    with use(model, "sum"):
        torch.testing.assert_close(run(model, BERT.given()), both, rtol=1e-4, atol=1e-5)


REFUSED: dict[str, tuple[Callable[[nn.Module], Any], type[Exception], str]] = {
    "unknown": (lambda m: combine(m, ["a", "typo"], [1, 1], "x"), AdapterError, "Adapter 'typo' not found"),
    "taken": (lambda m: combine(m, ["a", "b"], [1, 1], "b"), AdapterError, "already has an adapter 'b'"),
    "name": (lambda m: combine(m, ["a"], [1], "x.y"), AdapterError, "cannot be an adapter's name"),
    "count": (
        lambda m: combine(m, ["a", "b"], [1], "x"),
        AdapterError,
        "one weight per adapter .adapters: 2, weights: 1",
    ),
    "none": (lambda m: combine(m, [], [], "x"), AdapterError, "No adapters were given"),
    "nan": (lambda m: combine(m, ["a"], [float("nan")], "x"), AdapterError, "A weight is nan"),
    "way": (lambda m: combine(m, ["a"], [1], "x", way="lin"), ConfigError, "combination_type is 'lin'"),
    "ranks": (
        lambda m: combine(m, ["a", "b"], [1, 1], "x", way="linear"),
        ConfigError,
        r"ranks 2 and 4: all adapters must have the same r value at a site for 'linear'\. Use 'cat'",
    ),
    "copies": (
        lambda m: combine(m, ["a", "one", "two"], [1, 1, 1], "x"),
        AdapterError,
        r"Cannot add weighted adapters if they target the same module with modules_to_save, but found 1 such "
        r"instance\(s\)\. First: base_model\.model\.out\.",
    ),
    "biases": (lambda m: combine(m, ["a", "bias"], [1, 1], "x"), ConfigError, r"bias trains biases of the base"),
    "overflow": (lambda m: combine(m, ["a"], [1e300], "x"), AdapterError, "NaN or infinite values"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_call_changes_nothing(case: str) -> None:
    model = made(LINEARS, "a", "b", dtype=torch.float32)
    attach(model, LINEARS.config(modules_to_save=["out"]), "one")
    attach(model, LINEARS.config(modules_to_save=["out"]), "two")
    attach(model, LINEARS.config(bias="lora_only"), "bias")
    before = snapshot(model)
    call, error, said = REFUSED[case]
    with pytest.raises(error, match=said):
        call(model)
    assert snapshot(model) == before


def test_the_new_adapter_is_frozen_and_waits() -> None:
    model = made(LINEARS, "a", "b")
    combine(model, ["a", "b"], [1.0, 1.0], "sum")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".sum." in n)
    assert model.up.active_adapters == ["a"]
