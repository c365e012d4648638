"""Calibration rows are measured several at a time, with the values of single rows, and alone if need be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lorakit import core
from lorakit.data import Batch
from lorakit.errors import NonFiniteError, NotYetSupported
from lorakit.tasks import loss_sum
from lorakit.tasks.causal_lm import row_losses
from lorakit.train import run
from lorakit.train.settings.settings import TrainSettings
from lorakit.train.setup import run_int8
from lorakit.train.setup.run_int8 import CalibrationRows, by_length, together

PROCESSOR = run_int8.unsupported(torch.device("cpu"))
needs_units = pytest.mark.skipif(bool(PROCESSOR), reason=PROCESSOR)
LENGTHS = (9, 4, 12, 5)


def llama() -> Any:
    """Return a small frozen model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads)).requires_grad_(False).eval()


def row(length: int) -> Batch:
    """Return a batch of one row."""
    ids = torch.randint(0, 96, (1, length), generator=torch.Generator().manual_seed(length))
    return Batch(ids, torch.ones_like(ids), ids.clone(), 0.0, length, length)


def mean_loss(calls: list[tuple[int, ...]], model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean loss of a row, and remember the shape of its ids."""
    calls.append(tuple(batch.input_ids.shape))
    return loss_sum(model, batch, "cpu") / batch.trained_tokens


def losses_of_rows(calls: list[tuple[int, ...]], model: nn.Module, batch: Batch) -> Tensor:
    """Return the summed loss of each row, and remember the shape of the ids."""
    calls.append(tuple(batch.input_ids.shape))
    return row_losses(model, batch, "cpu")


def rows_with(calls: list[tuple[int, ...]], most: int, by_row: Callable[..., Tensor] | None) -> CalibrationRows:
    found = [row(length) for length in LENGTHS]
    return CalibrationRows(found, 0, most, partial(mean_loss, calls), by_row and partial(by_row, calls))


def test_rows_are_grouped_by_length_within_the_limit() -> None:
    rows = [row(length) for length in (9, 4, 12, 5, 30)]
    assert by_length(rows, 24) == [[1, 3], [0, 2], [4]]
    assert by_length(rows, 1) == [[1], [3], [0], [2], [4]]
    assert by_length(rows, 1000) == [[1, 3, 0, 2, 4]]


def test_a_batch_of_several_rows_is_padded_on_the_right() -> None:
    found = together([row(4), row(2)], 7)
    assert found.input_ids.tolist() == [row(4).input_ids[0].tolist(), [*row(2).input_ids[0].tolist(), 7, 7]]
    assert found.attention_mask.tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert found.labels[1].tolist() == [*row(2).labels[0].tolist(), -100, -100]
    assert found.tokens == 6 == found.trained_tokens


def test_the_values_are_those_of_single_rows_in_their_order() -> None:
    together_calls, alone_calls = list[tuple[int, ...]](), list[tuple[int, ...]]()
    one, other = llama(), llama()
    base, before, after = rows_with(together_calls, 24, losses_of_rows).measured(one, False)
    wanted, wanted_before, wanted_after = rows_with(alone_calls, 24, None).measured(other, False)
    assert together_calls == [(2, 5), (2, 12)] * 2
    assert alone_calls == [(1, length) for length in LENGTHS] * 2
    assert before == pytest.approx(wanted_before, rel=1e-5) and before != after
    assert after == pytest.approx(wanted_after, abs=0.01)
    assert base.tokens == wanted.tokens == sum(LENGTHS) and base.paths == wanted.paths
    found, scales = core.int8_scales(one), core.int8_scales(other)
    assert found.keys() == scales.keys()
    assert all(torch.allclose(found[name].float(), scales[name].float(), rtol=1e-3) for name in scales)


def impossible(calls: list[tuple[int, ...]], model: nn.Module, batch: Batch) -> Tensor:
    losses_of_rows(calls, model, batch)
    raise NotYetSupported("one row at a time")


def test_a_model_that_does_not_support_batches_is_measured_row_by_row_with_the_same_bits() -> None:
    calls = list[tuple[int, ...]]()
    one, other = llama(), llama()
    _, before, after = rows_with(calls, 24, impossible).measured(one, False)
    assert calls == [(2, 5), *[(1, length) for length in LENGTHS] * 2]
    _, wanted_before, wanted_after = rows_with([], 24, None).measured(other, False)
    assert (before, after) == (wanted_before, wanted_after)
    found, scales = core.int8_scales(one), core.int8_scales(other)
    assert all(torch.equal(found[name], scales[name]) for name in scales)


def test_a_batch_that_can_be_measured_only_before_quantization() -> None:
    calls = list[tuple[int, ...]]()

    def only_before(seen: list[tuple[int, ...]], model: nn.Module, batch: Batch) -> Tensor:
        if type(model.get_submodule("model.layers.0.mlp.up_proj")) is not nn.Linear:
            raise NotYetSupported("one row at a time")
        return losses_of_rows(seen, model, batch)

    _, before, after = rows_with(calls, 24, only_before).measured(llama(), False)
    assert calls == [(2, 5), (2, 12), *[(1, length) for length in LENGTHS]]
    assert after == pytest.approx(before, abs=0.05)


def test_other_errors_are_raised() -> None:
    model = llama()
    model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError):
        rows_with([], 24, losses_of_rows).measured(model, False)


@needs_units
def test_a_run_measures_several_rows_at_a_time(
    steady_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[tuple[CalibrationRows, Sequence[Sequence[int]]]]()
    losses = CalibrationRows.losses

    def counted(rows: CalibrationRows, groups: Sequence[Sequence[int]], model: nn.Module) -> list[float]:
        calls.append((rows, groups))
        return losses(rows, groups, model)

    monkeypatch.setattr(CalibrationRows, "losses", counted)
    settings = {**steady_run, "base_matmul": "int8", "int8_loss_bound": 10.0, "max_steps": 1}
    run(TrainSettings(**settings, per_device_train_batch_size=3))
    ((rows, groups),) = calls
    assert rows.batch_tokens == 3 * steady_run["max_length"]
    sizes = [[rows.rows[number].input_ids.numel() for number in group] for group in groups]
    assert all(len(group) * max(group) <= rows.batch_tokens for group in sizes) and max(map(len, sizes)) > 1
    assert sorted(number for group in groups for number in group) == list(range(len(rows.rows)))
