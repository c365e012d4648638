"""Ranks by gradients and by inputs: the budget holds, the criterion decides, every reader gets them from the patterns."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from lorakit import core
from lorakit.config import LoraConfig, scale
from lorakit.core.operations import data_init
from lorakit.core.operations.data_init import (
    allocate,
    by_explained_variance,
    by_sensitivity,
    sensitivity,
    with_ranks,
)
from lorakit.errors import ConfigError, DataError
from lorakit.targets.patterns import first_match
from lorakit.targets.resolving import Match


def language_loss(model: Any, batch: Any) -> Any:
    return F.cross_entropy(model(input_ids=batch).logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def batches() -> list[torch.Tensor]:
    return [torch.randint(0, 500, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("by", ["gradients", "inputs"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_adapter_trains_no_more_and_keeps_every_scale(tiny_llama: Any, by: Any, rslora: bool) -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", use_rslora=rslora, alpha_pattern={"up_proj": 24}
    )
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    found = allocate(tiny_llama, config, batches(), language_loss, by=by)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_llama.state_dict().items())
    assert not tiny_llama.training
    assert all(p.grad is None for p in tiny_llama.parameters())
    report = core.attach(tiny_llama, found.config)
    assert {m.path: m.rank for m in report.matches} == found.ranks
    assert report.trainable_parameters == found.parameters <= found.budget
    assert found.parameters > 0.9 * found.budget
    assert len(set(found.ranks.values())) > 1
    for match in report.matches:
        alpha = 24 if match.path.endswith("up_proj") else 8
        assert scale(match.rank, match.alpha, rslora) == pytest.approx(scale(4, alpha, rslora))
    assert set(found.evidence) == set(found.ranks)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_config_of_its_own_is_read_by_peft_and_by_the_loader(tiny_llama: Any, tmp_path: Any) -> None:
    twin = copy.deepcopy(tiny_llama)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    found = allocate(tiny_llama, config, batches(), language_loss)
    core.attach(tiny_llama, found.config)
    core.save_adapter(tiny_llama, tmp_path)
    other = peft.PeftModel.from_pretrained(copy.deepcopy(twin), tmp_path)
    theirs = {
        n.removeprefix("base_model.model."): m.r["default"] for n, m in other.named_modules() if hasattr(m, "lora_A")
    }
    assert theirs == found.ranks
    core.load_adapter(twin, tmp_path, trainable=True)
    assert {site.path: site.layer.r["default"] for site in core.sites(twin)} == found.ranks


def test_sites_that_a_criterion_cannot_judge_keep_their_rank(tiny_llama: Any) -> None:
    config = LoraConfig(r=4, target_modules=["embed_tokens", "q_proj", "down_proj"])
    found = allocate(tiny_llama, config, batches(), language_loss, by="inputs")
    assert found.ranks["model.embed_tokens"] == 4
    assert "model.embed_tokens" not in found.evidence
    assert "model.embed_tokens" in allocate(tiny_llama, config, batches(), language_loss).evidence


def test_passes_change_nothing(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LoraConfig(r=4, target_modules="all-linear")
    whole = [allocate(tiny_llama, config, batches(), language_loss, by=by).ranks for by in ("gradients", "inputs")]
    monkeypatch.setattr(data_init, "MAX_BYTES", 10_000)
    runs = Counter[str]()

    def counted(model: Any, batch: Any) -> Any:
        runs["forward"] += 1
        return language_loss(model, batch)

    parted = [allocate(tiny_llama, config, batches(), counted, by=by).ranks for by in ("gradients", "inputs")]
    assert parted == whole
    assert runs["forward"] > 12


def test_what_cannot_be_allocated(tiny_llama: Any) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match="by is 'luck'; it must be one of inputs, gradients"):
        allocate(tiny_llama, config, batches(), language_loss, by="luck")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="No gradient reached any site"):
        allocate(tiny_llama, config, batches(), lambda m, b: 0 * language_loss(m, b))


def test_sensitivity_is_that_of_the_canonical_weight(tiny_gpt2: Any) -> None:
    module, G = tiny_gpt2.transformer.h[0].attn.c_attn, torch.randn(96, 32)
    assert sensitivity(module, G) == pytest.approx(float((module.weight.detach().T * G).abs().mean()))
    linear = nn.Linear(3, 2)
    assert sensitivity(linear, torch.ones(2, 3)) == pytest.approx(float(linear.weight.detach().abs().mean()))


SITES = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.tuples(st.floats(0, 10), st.integers(2, 400), st.integers(1, 40), st.integers(1, 200)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(SITES)
def test_by_sensitivity_holds_the_budget_and_the_bounds(sites: Any) -> None:
    values, costs, ranks, limits = ({p: site[i] for p, site in sites.items()} for i in range(4))
    if not any(values.values()):
        return
    found = by_sensitivity(values, costs, ranks, limits)
    assert sum(found[p] * costs[p] for p in found) <= sum(ranks[p] * costs[p] for p in found)
    for path, rank in found.items():
        least = -(-ranks[path] // 2)
        assert least <= rank <= max(least, 4 * ranks[path])
        for other in found:
            alike = (costs[path], ranks[path], limits[path]) == (costs[other], ranks[other], limits[other])
            if alike and values[path] >= values[other]:
                assert rank >= found[other]


def test_by_sensitivity_is_in_proportion_between_the_bounds() -> None:
    paths = [f"s{i}" for i in range(4)]
    values = dict(zip(paths, (1.0, 2.0, 3.0, 4.0), strict=True))
    found = by_sensitivity(values, dict.fromkeys(paths, 100), dict.fromkeys(paths, 40), dict.fromkeys(paths, 1000))
    assert [found[p] for p in paths] == [20, 31, 47, 62]  # the first at its bound, the others as 2 : 3 : 4


def test_by_explained_variance_is_evas_redistribution() -> None:
    """Compare with the rule written out: pool, sort, count."""
    generator = torch.Generator().manual_seed(1)
    ratios = {p: torch.rand(8, generator=generator).sort(descending=True).values.tolist() for p in "abcd"}
    pooled = sorted(((value, p) for p, values in ratios.items() for value in values), reverse=True)
    expected = Counter(p for _, p in pooled[:13])
    found = by_explained_variance(ratios, dict.fromkeys(ratios, 1), 13, least=0)
    assert found == {p: expected[p] for p in ratios}
    kept = by_explained_variance({"a": [0.9, 0.8], "b": [0.1, 0.05]}, {"a": 10, "b": 30}, 55)
    assert kept == {"a": 2, "b": 1}
    assert by_explained_variance({"a": [], "b": [0.5, 0.4]}, {"a": 1, "b": 1}, 3) == {"a": 1, "b": 2}


def test_patterns_name_one_site_each() -> None:
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["proj"], rank_pattern={"proj": 6}, alpha_pattern={"proj": 12}
    )
    paths = ["proj", "a.proj", "b.a.proj", "c.1.proj", "cx1.proj"]
    matches = [Match(path=p, kind="Linear", rank=6, alpha=12, entry="proj") for p in paths]
    ranks = dict(zip(paths, (3, 4, 6, 9, 12), strict=True))
    found = with_ranks(config, matches, ranks)
    assert found.rank_pattern == {"^proj": 3, "b.a.proj": 6, r"^c\.1\.proj": 9, "cx1.proj": 12}
    assert {p: first_match(found.rank_pattern, p, found.r) for p in paths} == ranks
    for path in paths:
        assert first_match(found.alpha_pattern, path, found.lora_alpha) / ranks[path] == pytest.approx(2)
    assert config.rank_pattern == {"proj": 6}
