"""A mask that was changed in place is read again; its cache goes with it."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.ops.attention_pattern import Pattern
from lorakit.speed import accelerate, attention
from lorakit.speed.attention import lengths_of, under

from .test_acceleration import adapted

TOKENS = 8
IDS = torch.randint(2, 61, (2, TOKENS), generator=torch.Generator().manual_seed(3))


def causal(dtype: torch.dtype = torch.bool) -> Tensor:
    seen = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().expand(2, 1, TOKENS, TOKENS).clone()
    return seen if dtype == torch.bool else torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(dtype).min)


def hide(mask: Tensor, key: int) -> None:
    """Hide a token from all later tokens."""
    mask[:, :, key + 1 :, key] = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def step(model: Any, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    logits = model(input_ids=IDS, attention_mask=mask).logits
    logits.square().mean().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_changed_between_steps_acts(dtype: torch.dtype) -> None:
    model = adapted("llama")
    plain = copy.deepcopy(model)
    accelerate(model)
    mask, before = causal(dtype), None
    for change in (lambda: None, lambda: hide(mask, 2), lambda: hide(mask, 4)):
        change()
        ours, theirs = step(model, mask), step(plain, mask)
        assert before is None or not torch.allclose(theirs[0], before)
        before = theirs[0]
        torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
        for one, other in zip(ours[1], theirs[1], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_a_mask_changed_in_inference_mode_acts() -> None:
    model = adapted("llama").eval()
    plain = copy.deepcopy(model)
    accelerate(model)
    with torch.inference_mode():
        mask = causal()
        assert mask.is_inference()
        usual = plain(input_ids=IDS, attention_mask=mask).logits
        torch.testing.assert_close(model(input_ids=IDS, attention_mask=mask).logits, usual, rtol=1e-4, atol=1e-5)
        hide(mask, 2)
        theirs = plain(input_ids=IDS, attention_mask=mask).logits
        assert not torch.allclose(theirs, usual)
        torch.testing.assert_close(model(input_ids=IDS, attention_mask=mask).logits, theirs, rtol=1e-4, atol=1e-5)


def test_a_mask_is_read_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.speed import attention

    read: list[int] = []
    own = attention._read

    def counted(*args: Any) -> Any:
        read.append(1)
        return own(*args)

    monkeypatch.setattr(attention, "_read", counted)
    x, mask = torch.zeros(2, TOKENS, 4), causal()
    hide(mask, 2)
    pattern = Pattern(True, 1.0)
    for _ in range(3):
        assert under(mask, x, pattern) is not None
    with torch.inference_mode():
        other = causal()
        for _ in range(3):
            assert under(other, x, pattern) is not None
    assert len(read) == 2


def test_a_bias_changed_in_place_is_added_again() -> None:
    x, mask, bias = torch.zeros(2, TOKENS, 4), causal(), torch.zeros(1, 1, TOKENS, TOKENS)
    hide(mask, 2)
    pattern = Pattern(True, 1.0, bias=bias)
    first = under(mask, x, pattern)
    bias.add_(1.0)
    second = under(mask, x, pattern)
    assert first is not None and first.bias is not None and second is not None and second.bias is not None
    torch.testing.assert_close(second.bias, first.bias + 1)


def test_what_is_remembered_does_not_outlive_the_mask() -> None:
    x, mask = torch.zeros(2, TOKENS, 4), causal()
    hide(mask, 2)
    made = under(mask, x, Pattern(True, 1.0))
    assert made is not None and made.bias is not None
    gone, bias = weakref.ref(mask), weakref.ref(made.bias)
    del mask, made
    gc.collect()
    assert gone() is None
    assert bias() is None


@pytest.mark.parametrize("inference", [False, True])
def test_boundaries_changed_in_place_are_read_again(inference: bool) -> None:
    with torch.inference_mode(inference):
        boundaries = torch.tensor([0, 3, 8])
        assert lengths_of(boundaries) == (3, 5)
        boundaries[1] = 4
        assert lengths_of(boundaries) == (4, 4)


def packed(*lengths: int, window: int | None = None) -> Tensor:
    """Return a mask (1, 1, T, T) that keeps packed sequences apart."""
    which = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    seen = (which.unsqueeze(1) == which).tril()
    return (seen if window is None else seen & ~seen.new_ones(seen.shape).tril(-window))[None, None]


@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_are_told_from_the_mask(window: int | None) -> None:
    """Otherwise a packed row takes time and memory quadratic in its length, or sequences that the model joins part."""
    x = torch.zeros(1, TOKENS, 4)
    pattern = Pattern(window=window, segments=(5, 3))
    assert under(packed(5, 3, window=window), x, pattern) is pattern
    joined = packed(TOKENS, window=window)
    assert under(joined, x, pattern) is None
    assert under(joined, x, Pattern(window=window)) == Pattern(window=window)


def test_a_row_is_computed_in_segments_only_if_its_mask_keeps_them_apart() -> None:
    model = adapted("llama").eval()
    bound = attention.match(next(module for module in model.modules() if type(module).__name__ == "LlamaAttention"))
    assert not isinstance(bound, str)
    x = torch.zeros(1, TOKENS, model.config.hidden_size)
    boundaries = torch.tensor([0, 5, 8], dtype=torch.int32)
    for mask, wanted in ((packed(5, 3), (5, 3)), (packed(TOKENS), None), (None, None)):
        found = attention._pattern(bound, x, 0.0, {"attention_mask": mask, "cu_seq_lens_q": boundaries})
        assert found is not None and found.segments == wanted and found.bias is None


def test_boundaries_that_a_mask_does_not_show_change_nothing() -> None:
    model = adapted("llama").eval()
    ids, boundaries = IDS[:1], torch.tensor([0, 5, 8], dtype=torch.int32)
    call = {"input_ids": ids, "attention_mask": packed(TOKENS), "use_cache": False}
    call |= {"cu_seq_lens_q": boundaries, "cu_seq_lens_k": boundaries, "max_length_q": 5, "max_length_k": 5}
    plain = model(**call).logits
    accelerate(model)
    torch.testing.assert_close(model(**call).logits, plain, rtol=1e-4, atol=1e-5)
