from __future__ import annotations

import dataclasses

import pytest

from lorakit.config import LoraConfig
from lorakit.plan import Job, Speed, catalogue, estimate, render, summary


def _text(speed: Speed | None = None, *, verbose: bool = True) -> str:
    shape = catalogue.published("gpt2")
    assert shape is not None
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj"])
    return render(estimate(shape, config, Job(dtype="fp32", steps=100), speed, ranks=[4, 8, 16, 32]), verbose=verbose)


def test_what_the_text_says() -> None:
    text = _text(Speed(tokens_per_second=512))
    assert "trainable    811,008 of 124,439,808 (0.65%)" in text
    assert "time         3 min 20 s for 100 steps, without evaluations" in text
    for row in (
        "attn.c_proj  Conv1D    768 × 768     12  8      2  12,288    147,456",
        "c_attn             2,304 × 768     12   12,288   24,576     49,152     98,304",
        "adapter, fp32                             3.2 MB  4 × 811,008",
        "adapter with Adam's two moments           9.7 MB  3 × 4 × 811,008",
        "\none step ",
    ):
        assert row in text
    for cause in ("weights", "adapter", "optimizer", "gradients", "activations", "logits", "peak"):
        assert f"\n{cause} " in text


def test_lines_are_aligned_and_end_without_spaces() -> None:
    lines = _text().splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert max(map(len, lines)) <= 80
    start = next(i for i, line in enumerate(lines) if line.startswith("site "))
    assert len({len(line) for line in lines[start : start + 6]}) == 1


def test_the_summary_is_short() -> None:
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    lines = summary(estimate(shape, LoraConfig(target_modules="all-linear"), Job(), Speed(tokens_per_second=256)))
    assert len(lines) == 3
    assert lines[2] == "estimated time: 4.0 s per step (256 tokens/s)"


def test_the_time_includes_the_evaluations() -> None:
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    config, speed = LoraConfig(target_modules="all-linear"), Speed(tokens_per_second=256)
    job = Job(steps=10, evaluations=3, evaluated_tokens=5120)
    plan = estimate(shape, config, job, speed)
    forward = plan.lora.flops.forward / (plan.lora.flops.forward + plan.lora.flops.backward)
    assert plan.lora.run_seconds == pytest.approx(10 * 4 + 3 * (5120 / 256) * forward)
    assert summary(plan)[2].endswith(" for 10 steps and 3 evaluations (256 tokens/s, 4.0 s per step)")
    without = estimate(shape, config, dataclasses.replace(job, evaluations=0), speed)
    assert summary(without)[2] == "estimated time: 40 s for 10 steps (256 tokens/s, 4.0 s per step)"


def test_without_details_the_text_is_short_and_begins_with_the_answer() -> None:
    lines = _text(verbose=False).splitlines()
    assert len(lines) < 40
    assert [line.split("  ")[0] for line in lines[3:8]] == ["trainable", "peak memory", "adapter", "checkpoint", "time"]
    assert not any("bytes =" in line or line.startswith("note:") for line in lines)


def test_a_model_without_a_head_has_no_tied_head() -> None:
    config = LoraConfig(target_modules="all-linear")
    shapes = {name: catalogue.published(name) for name in ("bert-base", "gpt2")}
    found = {
        name: shape is not None and "tied head" in render(estimate(shape, config)) for name, shape in shapes.items()
    }
    assert found == {"bert-base": False, "gpt2": True}
