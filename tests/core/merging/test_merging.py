"""Report of a merge, the device of its arithmetic, and `merged_state_dict`; invariants 2, 3 and 12 test the rest."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lorakit.core import (
    attach,
    disable,
    merge,
    merge_and_unload,
    merged_state_dict,
    sites,
    trainable_parameters,
    unmerge,
    use,
)
from lorakit.core.layers.adapter_component import KeepBase, MergeOptions
from lorakit.core.model.index import AdapterIndex
from lorakit.errors import MergeError

from ...laws.snapshots import bits, same_bits, snapshot
from ...laws.tolerances import assert_close
from ...laws.zoo import BERT, CONV1DS, EVERY_KIND, GPT2, LINEARS, TIED, randomise, run, with_adapters


class CountedTensors(TorchDispatchMode):
    """Within the block: storages that operations made, held weakly."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[torch.Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.made.append(weakref.ref(result))
        return result

    def alive(self, base: torch.Tensor) -> int:
        """Return how many tensors of this shape are held, apart from what shares memory with this one."""
        alive = [tensor for made in self.made if (tensor := made()) is not None and tensor.shape == base.shape]
        return len({tensor.data_ptr() for tensor in alive} - {base.data_ptr()})


def with_delta(size: float, dtype: torch.dtype) -> torch.nn.Module:
    model = LINEARS.model(dtype)
    attach(model, LINEARS.config())
    randomise(model, "default", 1, size)
    return model


def test_a_merge_computes_in_fp32_and_rounds_once() -> None:
    for specimen in (LINEARS, CONV1DS):
        model = with_adapters(specimen, "a", "b", dtype=torch.bfloat16)
        layer = model.up
        W = layer.read()
        exact = W + sum(layer.scaling[n] * layer.lora_B[n].weight @ layer.lora_A[n].weight for n in "ab")
        expected = exact.detach().to(torch.bfloat16)
        merge(model, "a")
        merge(model, "b")
        stored = layer.base_layer.weight
        assert torch.equal(stored, expected if specimen is LINEARS else expected.T)


def test_a_small_delta_in_bf16_mostly_vanishes_and_the_report_says_so() -> None:
    small = merge(with_delta(0.003, torch.bfloat16))
    large = merge(with_delta(0.5, torch.bfloat16))
    exact = merge(with_delta(0.003, torch.float32))
    assert small.retained < 0.3
    assert large.retained > 0.95
    assert exact.retained > 0.99
    changed = [site.changed for site in small.sites]
    assert max(changed) < 0.3 and all(site.changed > 0.95 for site in large.sites)
    assert [site.path for site in small.sites] == ["up", "square"]


def test_the_report_of_what_changed_counts_elements() -> None:
    model = with_delta(0.003, torch.bfloat16)
    before = model.up.base_layer.weight.clone()
    report = merge(model)
    assert report.sites[0].changed == pytest.approx((model.up.base_layer.weight != before).float().mean().item())


def test_a_fresh_adapter_has_nothing_to_merge() -> None:
    model = LINEARS.model()
    attach(model, LINEARS.config())
    before = bits(model.up.base_layer.weight)
    report = merge(model)
    assert report.retained == 1 and bits(model.up.base_layer.weight) == before


def test_merge_of_the_default_route() -> None:
    model = with_adapters(LINEARS, "a", "b")
    assert merge(model).names == ("a",)
    assert model.up.merged_adapters == ["a"]
    unmerge(model)
    assert model.up.merged_adapters == []


def test_kept_bits_lie_where_they_were_asked_for() -> None:
    model = with_adapters(LINEARS, "a")
    weight = model.up.base_layer.weight
    for keep_base in (True, "cpu"):
        report = merge(model, "a", keep_base=keep_base)
        assert report.kept_bytes == 4 * (12 * 20 + 20 * 20)
        unmerge(model)
    assert model.up.base_layer.weight is weight, (
        "the parameter object stays, so an optimizer's or a tie's hold on it does"
    )


def test_an_adapter_is_trained_on_while_it_is_merged() -> None:
    """A route that needs the merged adapter uses its current parameters."""
    model = with_adapters(LINEARS, "a", "b")
    merge(model, "a")
    randomise(model, "b", 77)
    twin = with_adapters(LINEARS, "a", "b")
    randomise(twin, "b", 77)
    with use(model, "b"), use(twin, "b"):
        assert_close(run(model, LINEARS.given()), run(twin, LINEARS.given()), torch.float32)


def test_without_kept_bits_only_the_merged_route_is_left() -> None:
    model = with_adapters(LINEARS, "a", "b")
    with use(model, "a", "b"):
        both = run(model, LINEARS.given())
    expected = run(model, LINEARS.given())
    merge(model, "a", keep_base=False)
    assert_close(run(model, LINEARS.given()), expected, torch.float32)
    with use(model, "a", "b"):
        assert_close(run(model, LINEARS.given()), both, torch.float32)
    for block in (lambda: use(model, "b"), lambda: disable(model)):
        with (
            block(),
            pytest.raises(MergeError, match=r"merge of a into the base did not keep the base's values.*keep_base=True"),
        ):
            run(model, LINEARS.given())
    with pytest.raises(MergeError, match=r"merge of a into the base at .* did not keep the base's values"):
        merge(model, "b")


def test_merged_state_dict_shares_what_has_no_adapter_and_copies_what_has() -> None:
    model = with_adapters(GPT2, "a")
    before = snapshot(model)
    tensors = merged_state_dict(model, "a")
    assert tensors["transformer.wte.weight"].data_ptr() == model.transformer.wte.weight.data_ptr()
    tensors["transformer.h.0.attn.c_attn.weight"].zero_()
    assert snapshot(model) == before
    plain = GPT2.model().state_dict()
    assert {n: (t.shape, t.dtype) for n, t in tensors.items()} == {n: (t.shape, t.dtype) for n, t in plain.items()}


def test_merged_state_dict_while_another_is_merged_is_of_the_base() -> None:
    model = with_adapters(EVERY_KIND, "a", "b")
    expected = {name: bits(tensor) for name, tensor in merged_state_dict(model, "a").items()}
    merge(model, "b")
    assert {name: bits(tensor) for name, tensor in merged_state_dict(model, "a").items()} == expected


def test_a_tied_weight_appears_under_both_names() -> None:
    model = with_adapters(TIED, "a", target_modules=["embed_tokens"])
    tensors = merged_state_dict(model, "a")
    assert not same_bits(tensors["model.embed_tokens.weight"], tensors["lm_head.weight"])
    assert same_bits(tensors["lm_head.weight"], TIED.model().lm_head.weight)


def test_merge_and_unload_leaves_nothing_behind() -> None:
    model = with_adapters(BERT, "a", modules_to_save=["classifier"], bias="all")
    plain = BERT.model()
    expected = run(model, BERT.given())
    merge_and_unload(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    assert {n: p.requires_grad for n, p in model.named_parameters()} == {
        n: p.requires_grad for n, p in plain.named_parameters()
    }
    assert not any(module._forward_hooks for module in model.modules())
    assert sites(model) == []
    assert_close(run(model, BERT.given()), expected, torch.float32)
    attach(model, BERT.config())
    assert len(trainable_parameters(model)) == 8


def test_dora_is_merged_with_its_magnitude() -> None:
    model = with_adapters(LINEARS, "a", use_dora=True, dtype=torch.float64)
    layer = model.up
    V = layer.base_layer.weight + 2 * layer.lora_B["a"].weight @ layer.lora_A["a"].weight
    expected = (layer.lora_magnitude_vector["a"].weight / V.norm(dim=1))[:, None] * V
    assert_close(merged_state_dict(model, "a")["up.weight"], expected.detach(), torch.float64)


@pytest.mark.parametrize("keep_base", [True, False, "cpu"])
def test_a_component_that_cannot_be_staged_leaves_all_others_unchanged(keep_base: KeepBase) -> None:
    model = with_adapters(BERT, "a", lora_bias=True)
    with torch.no_grad():
        sites(model)[-1].layer.lora_B["a"].bias.fill_(float("nan"))
    before = snapshot(model)
    with pytest.raises(MergeError, match="the bias of B in a is NaN"):
        merge(model, "a", keep_base=keep_base)
    assert snapshot(model) == before


def test_a_staged_merge_holds_no_tensors_that_were_only_measured() -> None:
    model = with_adapters(LINEARS, "a", dtype=torch.bfloat16)
    layer = model.up
    for keep_base, most in ((True, 1), (False, 0)):
        with CountedTensors() as made:
            staged = layer.stage_merge("up", ["a"], MergeOptions(keep_base=keep_base))
            gc.collect()
            assert made.alive(layer.base_layer.weight) <= most
        assert staged is not None and staged.report is not None


def test_each_call_makes_one_index(monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_adapters(BERT, "a", modules_to_save=["classifier"], bias="all")
    found: list[torch.nn.Module] = []
    of = AdapterIndex.of

    def counted(looked_at: torch.nn.Module | AdapterIndex) -> AdapterIndex:
        if isinstance(looked_at, torch.nn.Module):
            found.append(looked_at)
        return of(looked_at)

    monkeypatch.setattr(AdapterIndex, "of", counted)
    merge(model, "a")
    unmerge(model, "a")
    merge_and_unload(model, "a")
    assert found == [model, model, model]


def test_every_component_answers_the_protocol() -> None:
    model = with_adapters(
        TIED, "a", trainable_token_indices={"embed_tokens": [1, 2]}, modules_to_save=["norm"], target_modules=["q_proj"]
    )
    found = dict(AdapterIndex.of(model).with_biases())
    assert {type(one).__name__ for one in found.values()} >= {"Linear", "ModulesToSave", "TrainableTokens"}
    for one in found.values():
        assert one.available_adapters() == ["a"]
        assert one.saved_tensors("nobody") == {} == one.merged_tensors([], MergeOptions())
        assert one.stage_merge("", ["nobody"], MergeOptions()) is None and one.stage_unmerge(["a"]) is None
        assert one.remove("nobody") is one
    for one in found.values():
        plain = one.unload()
        assert one.remove("a") is plain
