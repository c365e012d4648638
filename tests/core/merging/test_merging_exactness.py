"""`explain_inexact_merge`: exact merges stay within rounding; for others it names the site and dtype, or the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core import attach, explain_inexact_merge, merge, merge_and_unload
from lorakit.errors import AdapterError
from lorakit.plan.quantized import Storage

from ...laws.quantized import specimen, storages
from ...laws.snapshots import snapshot
from ...laws.tolerances import assert_close, assert_differs
from ...laws.zoo import EVERY_KIND, LINEARS, TIED, WAITING_LINEARS, Case, cases, randomise, run, with_adapters


@pytest.mark.parametrize("case", cases(mergeable=True))
def test_what_is_called_exact_is_and_nothing_is_changed_by_asking(case: Case) -> None:
    model, given = case.adapted("a"), case.specimen.given(case.dtype)
    before, base = snapshot(model), run(case.specimen.model(case.dtype), given)
    reason = explain_inexact_merge(model, "a")
    assert snapshot(model) == before
    if case.dtype not in (torch.float32, torch.float64):
        assert reason is not None and str(case.dtype).removeprefix("torch.") in reason
        return
    assert reason is None
    expected = run(model, given)
    assert_differs(expected, base, case.dtype)
    merge_and_unload(model, "a")
    assert_close(run(model, given), expected, case.dtype)


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["plain", "dora", "rslora"])
def test_a_llama_in_fp32(tiny_llama: Any, fields: dict[str, Any]) -> None:
    """Logits within the law's bound, 2e-5 of their largest; the adapter changes them by far more."""
    ids = torch.tensor([[5, 17, 200, 3, 44, 45]])
    with torch.no_grad():
        base = tiny_llama(ids).logits
        attach(tiny_llama, LoraConfig(r=4, lora_alpha=16, target_modules="all-linear", **fields), "a")
        randomise(tiny_llama, "a", 1)
        expected = tiny_llama(ids).logits
        assert_differs(expected, base, torch.float32)
        assert explain_inexact_merge(tiny_llama) is None
        merge(tiny_llama, "a", keep_base=False)
        assert_close(tiny_llama(ids).logits, expected, torch.float32)


def test_one_site_in_bf16_is_named() -> None:
    model = with_adapters(LINEARS, "a")
    model.square.base_layer.to(torch.bfloat16)
    reason = str(explain_inexact_merge(model, "a"))
    assert reason.startswith("square is bfloat16") and "rounded" in reason and "In float32, a merge is exact." in reason


def test_sites_without_a_factor_of_the_adapter_are_no_matter() -> None:
    model = with_adapters(LINEARS, "a", target_modules=["up"])
    attach(model, LINEARS.config(target_modules=["square"]), "b")
    model.square.base_layer.to(torch.bfloat16)
    assert explain_inexact_merge(model, "a") is None
    assert "square is bfloat16" in str(explain_inexact_merge(model, "a", "b"))


def test_what_cannot_be_merged_says_why() -> None:
    waiting = with_adapters(WAITING_LINEARS, "a", alora_invocation_tokens=[3, 4], task_type="CAUSAL_LM")
    assert "is aLoRA, which cannot be merged: its update depends on" in str(explain_inexact_merge(waiting, "a"))
    tied = with_adapters(TIED, "a", target_modules=["embed_tokens"])
    assert "shares its weight with lm_head.weight; a merge would change both" in str(explain_inexact_merge(tied, "a"))
    merged = with_adapters(EVERY_KIND, "a")
    merge(merged, "a")
    assert explain_inexact_merge(merged, "a") == "Adapter 'a' is already merged. Unmerge it first."
    with pytest.raises(AdapterError, match="'nobody'"):
        explain_inexact_merge(merged, "nobody")


def test_a_convolution_of_several_groups() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3, groups=2))
    attach(model, LoraConfig(r=2, target_modules=["0"]), "a")
    reason = str(explain_inexact_merge(model, "a"))
    assert reason.startswith("0 is a convolution with 2 groups") and "cannot hold the delta" in reason


@pytest.mark.parametrize("storage", storages())
def test_a_quantized_base(storage: Storage) -> None:
    model = with_adapters(specimen(storage), "a")
    reason = str(explain_inexact_merge(model, "a"))
    assert reason.startswith(f"up is stored as {model.up.base.name},") and "lose most of the delta" in reason
