"""The functions of bench_int8_parity.py: paired differences, schemes of sites, and the rows of the tasks."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from lorakit.ops import int8, int8_weight

from .loading import load


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    load("benchmarks/runner.py")
    load("benchmarks/int8_schemes.py")
    made: ModuleType = load("benchmarks/bench_int8_parity.py")
    return made


@pytest.fixture(scope="module")
def schemes(bench: ModuleType) -> Any:
    return load("benchmarks/int8_schemes.py")


def sites_of(schemes: Any, absmax: torch.Tensor) -> dict[str, Any]:
    """Return q, k and down sites of random bf16 weights, calibrated on the given maxima."""
    torch.manual_seed(0)
    sites = {}
    for path, width in (("0.q_proj", 96), ("0.k_proj", 32), ("0.down_proj", 64)):
        linear = nn.Linear(128, width, bias=False, dtype=torch.bfloat16).requires_grad_(False)
        sites[path] = schemes.Site.like(linear)
        for rotated in (False, True):
            sites[path].absmax[rotated] = absmax.clone()
    sites["0.down_proj"].absmax[False][5] = 1000
    return sites


@pytest.fixture
def inputs() -> torch.Tensor:
    torch.manual_seed(1)
    return (torch.randn(32, 128) * torch.exp(torch.randn(128))).bfloat16()


def test_the_difference_is_paired_by_row(bench: ModuleType) -> None:
    base = {"losses": [10.0, 40.0, 30.0], "counts": [5, 10, 15]}
    other = {"losses": [10.5, 41.0, 31.5], "counts": [5, 10, 15]}
    assert bench.difference(other, base) == {"difference": 0.1, "standard_error": 0.0, "interval": [0.1, 0.1]}


def test_the_standard_error_of_rows_of_equal_length_is_that_of_a_mean(bench: ModuleType) -> None:
    apart = [0.5, -1.0, 2.0, 0.25]
    base = {"losses": [7.0] * 4, "counts": [4] * 4}
    other = {"losses": [7.0 + d for d in apart], "counts": [4] * 4}
    per_row = torch.tensor(apart) / 4
    found = bench.difference(other, base)
    assert found["difference"] == pytest.approx(float(per_row.mean()), abs=1e-5)
    assert found["standard_error"] == pytest.approx(float(per_row.std() / 2), abs=1e-5)


def test_a_rotation_is_its_own_inverse(schemes: Any) -> None:
    x = torch.randn(3, 192)
    torch.testing.assert_close(schemes.rotate(schemes.rotate(x)), x)
    torch.testing.assert_close(schemes.rotate(x).norm(), x.norm())


@pytest.mark.parametrize("backward", ["forward only", "16 outputs"])
def test_a_scheme_changes_only_the_backward_pass(schemes: Any, inputs: torch.Tensor, backward: str) -> None:
    sites = sites_of(schemes, inputs.float().abs().amax(0))
    site, results = sites["0.q_proj"], []
    exact = torch.randn(32, 96).bfloat16()
    for name in (schemes.DEFAULT, f"smooth+split, {backward}"):
        schemes.use(sites, schemes.SCHEMES[name])
        x = inputs.clone().requires_grad_()
        y = site(x)
        y.backward(exact)
        results.append((y.detach(), x.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=0)
    wanted = exact.float() @ site.weight.float()
    errors = [(gradient.float() - wanted).norm() for _, gradient in results]
    assert errors[1] < errors[0]


def test_the_default_scheme_is_that_of_the_operations(schemes: Any, inputs: torch.Tensor) -> None:
    absmax = inputs.float().abs().amax(0)
    sites = sites_of(schemes, absmax)
    schemes.use(sites, schemes.SCHEMES[schemes.DEFAULT])
    q, k = sites["0.q_proj"], sites["0.k_proj"]
    gain, kept = int8_weight.input_scales(absmax, [q.weight, k.weight])
    assert torch.equal(q(inputs), int8.int8_linear(inputs, int8_weight.quantize_weight(q.weight, gain, kept)))
    assert q.quantized.gain is k.quantized.gain
    assert q.quantized.kept is k.quantized.kept


@pytest.mark.parametrize("name", ["naive", "smooth", "split", "hadamard", "hadamard+split"])
def test_each_scheme_approximates_the_matmul(schemes: Any, inputs: torch.Tensor, name: str) -> None:
    sites = sites_of(schemes, inputs.float().abs().amax(0))
    schemes.use(sites, schemes.SCHEMES[name])
    exact = inputs.float() @ sites["0.q_proj"].weight.float().t()
    error = (sites["0.q_proj"](inputs).float() - exact).norm() / exact.norm()
    assert 0 < error < 0.05


def test_the_sites_with_the_largest_outliers_stay_in_bf16(schemes: Any, inputs: torch.Tensor) -> None:
    sites = sites_of(schemes, inputs.float().abs().amax(0))
    schemes.use(sites, schemes.Scheme(worst=1))
    assert next(iter(schemes.outliers(sites))) == "0.down_proj"
    assert [path for path, site in sites.items() if site.scheme is None] == ["0.down_proj"]
    exact = nn.functional.linear(inputs, sites["0.down_proj"].weight)
    assert torch.equal(sites["0.down_proj"](inputs), exact)
    schemes.use(sites, None)
    assert all(site.quantized is None for site in sites.values())


@pytest.mark.parametrize("answer", [0.285, 0.85])
def test_instructions_of_both_kinds_are_cut_at_the_same_places(bench: ModuleType, answer: float) -> None:
    text = "".join(chr(97 + i % 26) for i in range(3500))
    rows = list(bench.instructions(text, answer))
    assert "".join(row.prompt + row.completion for row in rows) == text[:3000]
    assert all(len(row.completion) == round(1000 * answer) for row in rows)


@pytest.mark.parametrize("name", ["text", "instructions"])
def test_evaluation_rows_are_not_trained_on(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(bench, "encoded", lambda records: list(range(500)))
    monkeypatch.setattr(bench.data, "python_reference", list)
    for evaluated in (8, 200):
        task = bench.rows_of(name, evaluated)
        assert len(task.evaluated) == min(evaluated, bench.HELD_OUT[name])
        assert not set(task.trained) & set(task.evaluated)
        assert set(task.calibrated) < set(task.trained)
        assert len(task.trained) + bench.HELD_OUT[name] == 500


def test_the_tables_of_the_page_are_those_of_the_results() -> None:
    generated, script = load("scripts/generated_table.py"), load("scripts/int8_parity_tables.py")
    page = script.PAGE.read_text(encoding="utf-8")
    assert generated.with_table(page, script.BEGIN, script.tables(script.read_rows())) == page


def test_a_table_prefers_rows_with_more_tokens_and_names_missing_cells() -> None:
    load("scripts/generated_table.py")
    script = load("scripts/int8_parity_tables.py")
    part = {"difference": 0.002, "standard_error": 0.001, "interval": [0.0, 0.004], "loss_bf16": 2.5}
    row = {"what": "after training", "task": "text", "scheme": "s", "seed": 0, "steps": 60, "tokens": 9}
    row |= {"before": part, "after": part, "on_bf16": part, "merged": part}
    fewer = {**row, "tokens": 5, "after": {**part, "loss_bf16": 9.0}}
    text = script.tables([row, fewer])
    assert "| text | s | 0 | 2.5000 | +0.0020 ± 0.0010 (+0.0000 to +0.0040) |" in text
    assert "9.0000" not in text
    assert f"| {script.NONE} |" in text
