from __future__ import annotations

import pytest

from lorakit.config import LoraConfig
from lorakit.plan import Job, Speed, catalogue, estimate, render, summary
from lorakit.plan.text import bytes_text, seconds_text, table


def _text(speed: Speed | None = None) -> str:
    shape = catalogue.published("gpt2")
    assert shape is not None
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["c_attn", "c_proj"])
    return render(estimate(shape, config, Job(dtype="fp32", steps=100), speed, ranks=[4, 8, 16, 32]))


def test_what_the_text_says() -> None:
    text = _text(Speed(tokens_per_second=512))
    assert "trainable: 811,008 of 124,439,808 (0.65 %) of the base" in text
    for row in (
        "attn.c_proj  Conv1D    768 × 768     12  8      2  12,288    147,456",
        "c_attn              2,304 × 768     12   12,288   24,576     49,152     98,304",
        "adapter, fp32                             3.2 MB  4 × 811,008",
        "adapter with Adam's two moments           9.7 MB  3 × 4 × 811,008",
        "100 steps                     3 min",
    ):
        assert row in text
    for cause in ("weights", "adapter", "optimizer", "gradients", "activations", "logits", "peak"):
        assert f"\n{cause} " in text


def test_lines_are_aligned_and_end_without_spaces() -> None:
    lines = _text().splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert max(map(len, lines)) <= 100
    start = next(i for i, line in enumerate(lines) if line.startswith("site "))
    assert len({len(line) for line in lines[start : start + 6]}) == 1


def test_the_summary_is_short() -> None:
    shape = catalogue.published("SmolLM2-135M")
    assert shape is not None
    lines = summary(estimate(shape, LoraConfig(target_modules="all-linear"), Job(), Speed(tokens_per_second=256)))
    assert len(lines) == 4
    assert lines[3] == "planned speed: 256 tokens/s, 4.0 s a step"


@pytest.mark.parametrize(
    ("count", "text"),
    [(999, "999 B"), (3_244_032, "3.2 MB"), (497_759_232, "498 MB"), (1_493_277_696, "1.49 GB"), (2.5e12, "2.50 TB")],
)
def test_bytes(count: float, text: str) -> None:
    assert bytes_text(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.41, "0.4 s"), (42, "42 s"), (600, "10 min"), (9000, "2.5 hours"), (1e6, "11.6 days")]
)
def test_seconds(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


def test_a_table() -> None:
    assert table(["name", "n"], [["a", "1,000"], ["bcd", "2"]]) == (
        "name      n\n----  -----\na     1,000\nbcd       2"
    )
