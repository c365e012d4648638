"""Law 9, without packing: the loss and gradient of a step do not depend on how its rows are split.

Rows have very different lengths and fractions of tokens with loss, so a mean of means would be far off.
"""

from __future__ import annotations

import copy
import itertools
from array import array
from typing import Any

import pytest
import torch

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.data import Loader
from lorakit.data.encoding import IGNORED, Sequence
from lorakit.train.loop.loop import evaluate
from lorakit.train.loop.optimizer import build_adamw
from lorakit.train.loop.step import StepOptions, StepResult, train_step

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 4e-2}
"""Largest difference of a gradient, relative to its largest value. bf16: the base's activations round."""

SPLITS = {"one by one": [1] * 8, "in pairs": [2] * 4, "uneven": [1, 5, 2], "halves": [4, 4]}


def _rows() -> list[Sequence]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length, untrained in [(30, 1), (3, 1), (17, 15), (9, 1), (40, 38), (2, 1), (25, 12), (11, 4)]:
        ids = torch.randint(1, 500, (length,), generator=generator).tolist()
        rows.append(Sequence(array("i", ids), array("i", [IGNORED] * untrained + ids[untrained:])))
    return rows


def _step(model: Any, sizes: list[int], dtype: torch.dtype) -> tuple[StepResult, dict[str, torch.Tensor]]:
    model = model.to(dtype)
    core.attach(model, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False), seed=1)
    named = core.trainable_parameters(model)
    rows, edges = _rows(), itertools.accumulate([0, *sizes])
    parts = [rows[a:b] for a, b in itertools.pairwise(edges)]
    batches = [next(Loader(part, len(part), 0, shuffle=False)) for part in parts]
    options = StepOptions(torch.device("cpu"), max_grad_norm=0.0)
    result = train_step(model, named, build_adamw(named, 1e-3, 0.0), batches, 0.0, options)
    return result, {name: parameter.grad.double() for name, parameter in named if parameter.grad is not None}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("base", ["tiny_llama", "tiny_gpt2"])
def test_a_split_step_is_the_whole_step(
    request: pytest.FixtureRequest, base: str, split: str, dtype: torch.dtype
) -> None:
    model = request.getfixturevalue(base)
    whole, gradients = _step(copy.deepcopy(model), [8], dtype)
    parted, parts = _step(copy.deepcopy(model), SPLITS[split], dtype)
    assert (parted.tokens, parted.trained_tokens) == (whole.tokens, whole.trained_tokens)
    tolerance = TOLERANCE[dtype]
    assert parted.loss == pytest.approx(whole.loss, rel=tolerance)
    assert parted.grad_norm == pytest.approx(whole.grad_norm, rel=tolerance)
    assert parts.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert float((parts[name] - gradient).abs().max()) <= tolerance * float(gradient.abs().max()), name


def test_a_mean_of_means_would_fail_here(tiny_llama: Any) -> None:
    """The rows reveal the usual error: the mean of the batches' means is far from the mean of the step."""
    rows = _rows()
    batches = [next(Loader([row], 1, 0, shuffle=False)) for row in rows]
    means = [evaluate(tiny_llama, [batch], "cpu") for batch in batches]
    whole = evaluate(tiny_llama, batches, "cpu")
    assert whole is not None
    assert abs(sum(m.loss for m in means if m) / len(means) - whole.loss) > 20 * TOLERANCE[torch.float32] * whole.loss


def test_padding_changes_nothing(tiny_llama: Any) -> None:
    rows = _rows()
    apart = evaluate(tiny_llama, [next(Loader([row], 1, 0, shuffle=False)) for row in rows], "cpu")
    together = evaluate(tiny_llama, [next(Loader(rows, 8, 0, shuffle=False, pad_id=7))], "cpu")
    assert apart is not None
    assert together is not None
    assert together.tokens == apart.tokens
    assert together.loss == pytest.approx(apart.loss, rel=TOLERANCE[torch.float32])
