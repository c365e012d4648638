from __future__ import annotations

from lorakit.config import LoraConfig
from lorakit.plan import catalogue, count, estimating
from lorakit.tables import format_bytes


def test_the_reference_projects_files() -> None:
    shape = catalogue.published("gpt2")
    assert shape is not None
    sizes = estimating.sizes(shape, count(shape, LoraConfig(r=8, target_modules=["c_attn", "c_proj"])))
    assert [size.size_bytes for size in sizes] == [3_244_032, 9_732_096, 497_759_232, 1_493_277_696]
    assert [format_bytes(size.size_bytes) for size in sizes] == ["3.2 MB", "9.7 MB", "498 MB", "1.49 GB"]


def test_a_model_has_the_size_of_its_published_dtype() -> None:
    shape = catalogue.published("Llama-3.1-8B")
    assert shape is not None
    sizes = estimating.sizes(shape, count(shape, LoraConfig(target_modules="all-linear")))
    assert (sizes[2].what, sizes[2].size_bytes) == ("full model, bfloat16", 2 * 8_030_261_248)
