"""Grouped convolutions: their weight cannot hold a delta, but that of an ungrouped convolution can."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core import attach, disable, merge, merge_and_unload, unmerge, use
from lorakit.errors import MergeError

CASES = {
    "1d": (lambda: nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9)),
    "2d": (lambda: nn.Conv2d(4, 8, 3, stride=2, dilation=2, padding=2, groups=4, bias=False), (2, 4, 9, 9)),
    "3d": (lambda: nn.Conv3d(4, 6, 3, padding=1, padding_mode="circular", groups=2), (2, 4, 5, 5, 5)),
}


def adapted(case: str, dora: bool) -> tuple[nn.Module, torch.Tensor]:
    make, shape = CASES[case]
    torch.manual_seed(0)
    model = nn.Sequential(make()).eval()
    for seed, name in enumerate("ab"):
        attach(model, LoraConfig(r=4, target_modules=["0"], use_dora=dora), name, seed=seed)
        model[0].lora_B[name].weight.data.normal_(generator=torch.Generator().manual_seed(10 + seed))
    return model, torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_merged_dense_it_answers_as_before_and_comes_back(case: str, dora: bool) -> None:
    model, x = adapted(case, dora)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with disable(model):
        base = model(x)
    answers = {}
    for names in (("a",), ("b",), ("a", "b")):
        with use(model, *names):
            answers[names] = model(x)
    with pytest.raises(MergeError, match=r"cannot store an update.*dense=True"):
        merge(model, "a")
    merge(model, "a", dense=True)
    for names, expected in answers.items():
        with use(model, *names):
            torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    with disable(model):
        assert torch.equal(model(x), base)
    merge(model, "b", dense=True)
    with use(model, "a", "b"):
        torch.testing.assert_close(model(x), answers["a", "b"], rtol=1e-4, atol=1e-4)
    unmerge(model, "a")
    with use(model, "b"):
        torch.testing.assert_close(model(x), answers[("b",)], rtol=1e-4, atol=1e-4)
    unmerge(model)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_for_good() -> None:
    model, x = adapted("1d", False)
    expected = model(x)
    merge_and_unload(model, "a", dense=True)
    assert type(model[0]) is nn.Conv1d
    assert model[0].groups == 1
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
