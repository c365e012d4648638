from __future__ import annotations

import dataclasses

from lorakit.architectures.shapes import ModelShape
from lorakit.config import LoraConfig
from lorakit.plan import Job, catalogue, count, estimate, memory
from lorakit.plan.memory import Memory
from lorakit.plan.packed import int8_base

MB = 1_000_000


def _shape(name: str) -> ModelShape:
    shape = catalogue.published(name)
    assert shape is not None
    return shape


def _lora(name: str, job: Job, **fields: object) -> Memory:
    config = LoraConfig(**{"r": 16, "target_modules": "all-linear", **fields})
    return memory.of_lora(_shape(name), count(_shape(name), config), config.lora_dropout, job)


def test_smollm2_by_cause() -> None:
    needs = _lora("SmolLM2-135M", Job(4, 256))
    trained = 4_884_480
    assert needs.bytes_of("weights") == 2 * 134_515_008
    assert needs.bytes_of("adapter") == needs.bytes_of("gradients") == 4 * trained
    assert needs.bytes_of("optimizer") == 8 * trained
    assert needs.bytes_of("logits") == 12 * 1024 * 49_152
    assert 690 * MB < needs.bytes_of("activations") < 710 * MB
    assert needs.peak_bytes == sum(line.at_peak_bytes for line in needs.lines)
    assert needs.peak_moment == "the backward pass begins at the loss"


def test_every_line_has_a_formula_and_an_equation() -> None:
    lines = _lora("gpt2", Job(4, 256, dtype="float32")).lines
    assert [line.equation for line in lines] == [20, 21, 23, 22, 24, 25, 99, 26, 98]
    assert all(line.formula for line in lines)
    assert next(line for line in lines if line.cause == "weights").formula == "4 × 124,439,808"


def test_checkpointing_keeps_the_inputs_of_the_blocks() -> None:
    plain, again = _lora("gpt2", Job(dtype="float32")), _lora("gpt2", Job(dtype="float32", recompute="layers"))
    assert again.above_weights_bytes < plain.above_weights_bytes / 2
    kept = next(line for line in again.lines if line.cause == "activations").at_peak_bytes
    assert kept == 12 * 4 * 1024 * 768 + 4 * 1024 * 770


def test_without_a_head_the_peak_is_where_the_backward_enters_the_last_block() -> None:
    needs = _lora("bert-base", Job(4, 128, dtype="float32"))
    assert needs.bytes_of("logits") == 0
    assert needs.peak_moment == "the backward pass enters the last block"


def test_checkpointing_without_a_head_peaks_where_gradients_are_whole() -> None:
    needs = _lora("bert-base", Job(4, 128, dtype="float32", recompute="layers"))
    assert needs.peak_moment.endswith("block is recomputed")


def test_gradients_of_earlier_batches_are_held_under_accumulation() -> None:
    one, two = _lora("gpt2", Job()), _lora("gpt2", Job(accumulation=2))
    assert two.peak_bytes - one.peak_bytes == one.bytes_of("gradients")


def test_full_fine_tuning_takes_sixteen_bytes_a_number() -> None:
    for dtype in ("float32", "bfloat16"):
        needs = memory.of_full(_shape("gpt2"), Job(dtype=dtype))
        states = sum(needs.bytes_of(cause) for cause in ("weights", "gradients", "optimizer"))
        assert states == 16 * 124_439_808


def test_an_unknown_architecture_is_said_to_be_an_estimate() -> None:
    shape = dataclasses.replace(_shape("SmolLM2-135M"), architecture="StrangeForCausalLM")
    needs = memory.of_lora(shape, count(shape, LoraConfig(target_modules="all-linear")), 0.0, Job())
    assert "activations of StrangeForCausalLM are not known" in needs.notes[0]
    assert "the estimate assumes" in needs.notes[0]


def test_above_the_weights() -> None:
    needs = _lora("gpt2", Job())
    held = needs.bytes_of("adapter") + needs.bytes_of("process")
    assert needs.above_weights_bytes == needs.step_bytes - 2 * 124_439_808 - held


def test_a_process_holds_more_than_tensors() -> None:
    job = Job(4, 256, process_bytes=700 * MB)
    needs, on_gpu = _lora("gpt2", job), _lora("gpt2", dataclasses.replace(job, process_bytes=None))
    assert needs.bytes_of("process") == 700 * MB + memory.LOADER_BYTES
    assert needs.peak_bytes == on_gpu.peak_bytes + needs.bytes_of("process")
    assert on_gpu.bytes_of("process") == on_gpu.bytes_of("temporary") == 0


def test_malloc_keeps_a_share_of_the_tensors_of_a_step() -> None:
    job = Job(4, 256, accelerated=True)
    without, with_gaps = _lora("SmolLM2-135M", job), _lora("SmolLM2-135M", dataclasses.replace(job, malloc_share=0.5))
    causes = ("activations", "logits", "gradients")
    largest = max(sum(without.sizes_at(name)[cause] for cause in causes) for name in without.moments_of_step)
    assert with_gaps.bytes_of("malloc") == with_gaps.step_bytes - without.step_bytes == round(0.5 * largest)
    assert {line.cause for line in without.lines} == {line.cause for line in with_gaps.lines} - {"malloc"}
    on_gpu = _lora("SmolLM2-135M", dataclasses.replace(job, malloc_share=0.5, process_bytes=None))
    assert on_gpu.bytes_of("malloc") == 0


def test_packed_rows_take_the_memory_of_the_largest_batch() -> None:
    job = Job(4, 256, accelerated=True)
    shape, config = _shape("SmolLM2-135M"), LoraConfig(r=8, target_modules="all-linear")
    packed = dataclasses.replace(job, packed_tokens=512)
    of = {kept: estimate(shape, config, kept).lora.memory for kept in (job, packed, Job(2, 256, accelerated=True))}
    assert of[packed].bytes_of("activations") == of[Job(2, 256, accelerated=True)].bytes_of("activations")
    padded = dataclasses.replace(packed, accelerated=False)  # rows are padded to the longest
    assert estimate(shape, config, padded).job.batch_tokens == job.batch_tokens


def test_memory_outside_of_steps() -> None:
    short = Job(1, 8, dtype="bfloat16", accelerated=True)
    needs = _lora("SmolLM2-135M", short)
    trained = 4_884_480
    assert needs.peak_moment == memory.WRITING
    assert needs.bytes_of("temporary") == memory.TEXT_BYTES + 4 * 4 * trained
    assert needs.step_bytes < needs.peak_bytes
    converted = _lora("SmolLM2-135M", dataclasses.replace(short, dtype="float32"))
    assert converted.peak_moment == memory.LOADING
    assert converted.bytes_of("temporary") == 2 * 134_515_008  # the files are in bfloat16
    at_peak = {line.cause: line.at_peak_bytes for line in converted.lines}
    assert at_peak["adapter"] == at_peak["optimizer"] == at_peak["activations"] == 0
    measured = _lora("SmolLM2-135M", dataclasses.replace(short, reserved_bytes=900 * MB))
    assert measured.peak_moment == memory.MEASURING
    assert measured.bytes_of("temporary") == 900 * MB


def test_an_int8_base_is_made_from_mapped_files_in_any_dtype() -> None:
    short = Job(1, 8, accelerated=True, base_matmul="int8")
    shape, counted = _shape("SmolLM2-135M"), count(_shape("SmolLM2-135M"), LoraConfig(r=4, target_modules="all-linear"))
    for dtype in ("bfloat16", "float32"):  # the files are in bfloat16
        job = dataclasses.replace(short, dtype=dtype)
        assert memory.temporary_bytes(shape, counted, job)[memory.LOADING] == 0
    packed = dataclasses.replace(shape, converted_bytes=90_000_000, dtype="float32")
    base = int8_base(shape, 2)
    job = dataclasses.replace(short, dtype="bfloat16")
    assert memory.temporary_bytes(packed, counted, job)[memory.LOADING] == (
        4 * shape.parameters + 2 * base.elements - base.size_bytes + 90_000_000 + memory.GGUF_TOKEN_BYTES * shape.vocab
    )


def test_a_gguf_file_is_read_in_fp32_with_its_vocabulary() -> None:
    shape = dataclasses.replace(_shape("SmolLM2-135M"), converted_bytes=90_000_000, dtype="float32")
    for dtype in ("bfloat16", "float32"):
        found = memory.temporary_bytes(shape, None, Job(dtype=dtype))
        assert found[memory.LOADING] == 4 * shape.parameters + 90_000_000 + memory.GGUF_TOKEN_BYTES * shape.vocab


def test_a_large_vocabulary_is_checked_in_fp64() -> None:
    shape = _shape("SmolLM2-135M")
    sites = tuple(dataclasses.replace(s, out_features=262_144) if s == shape.head else s for s in shape.sites)
    shape = dataclasses.replace(shape, vocab=262_144, sites=sites)
    counted = count(shape, LoraConfig(r=1, target_modules=["q_proj"]))
    needs = memory.of_lora(shape, counted, 0.0, Job(1, 8, accelerated=True))
    assert needs.peak_moment == memory.CHECKING
    assert needs.bytes_of("temporary") == 4 * 8 * memory.PROBED_TOKENS * 262_144
