"""Estimate the memory use of a run by category, with formulas, and find when it peaks.

Sizes of tensors are exact to the byte wherever the formula is exact. The allocator may hold more memory: glibc, as
configured by lorakit's command line, keeps freed blocks, including gaps too small for later blocks (`ALLOCATOR_NOTE`).
Loading the weights, checking the accelerated model and writing files need memory for a short time; because malloc keeps
it, only the largest of these amounts and of the step's tensors counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from lorakit.architectures.shapes import ModelShape
from lorakit.errors import ConfigError
from lorakit.plan import accelerated, activations
from lorakit.plan.activations import Activations
from lorakit.plan.job import DTYPE_BYTES, MASTER_BYTES, Job
from lorakit.plan.optimizer_state import optimizer_state
from lorakit.plan.packed import W8A8, int8_base, packed_files, stored_base
from lorakit.plan.params import Count
from lorakit.plan.quantized import StoredBase

RUNTIME_BYTES = 50_000_000
"""Resident memory that the first training step adds on top of tensors, on Linux with torch 2.13 for CPU: pages of
library code that runs for the first time (15 to 19 MB), oneDNN's kernels and scratch space, and thread heaps.
"""

LOSS_COPIES = 3
"""Number of fp32 tensors of size tokens × vocabulary that exist at once when the backward pass begins: the
log-probabilities saved by cross entropy, their gradient, and the gradient of the input of log-softmax.
"""

OPTIMIZING = "the optimizer steps"
"""Moment of a step after its last backward pass."""

ALLOCATOR_NOTE = (
    "`lorakit train` lets malloc keep freed blocks. The part that later tensors do not fit into (malloc) depends on "
    "the lengths of the rows. Set LORAKIT_ALLOCATOR=stock and MALLOC_MMAP_THRESHOLD_=131072 in the environment to "
    "return each large block to the OS when it is freed, at some cost in speed."
)


@dataclass(frozen=True)
class Line:
    """Memory use of one category.

    Attributes:
        cause: "weights", "adapter", "optimizer", "gradients", "activations", "logits", "temporary", "runtime", "malloc"
            or "process".
        formula: How the size is computed, with the numbers filled in.
        equation: Number of the formula in docs/math.md.
        size_bytes: Largest size during a run.
        at_peak_bytes: Size when the total memory use peaks.
    """

    cause: str
    formula: str
    equation: int
    size_bytes: int
    at_peak_bytes: int


@dataclass(frozen=True)
class Memory:
    """Memory use of a run: of its process or, for a job on an accelerator, of the accelerator.

    Attributes:
        peak_bytes: Largest total over all categories at any moment of the run.
        peak_moment: Clause that says when memory use peaks, such as "the optimizer steps".
        step_bytes: Largest total at any moment of a training step.
        moments: Moment of the run -> the categories whose size differs from the largest one then, and their sizes.
    """

    lines: tuple[Line, ...]
    peak_bytes: int
    peak_moment: str
    notes: tuple[str, ...]
    step_bytes: int
    moments: Mapping[str, Mapping[str, int]]

    @property
    def moments_of_step(self) -> tuple[str, ...]:
        """Return the moments of a training step; the others are before the first step or between steps."""
        return tuple(name for name in self.moments if name not in OUTSIDE)

    def sizes_at(self, moment: str) -> dict[str, int]:
        """Return the size in bytes of each category at a moment, a key of `moments`."""
        return {line.cause: line.size_bytes for line in self.lines} | dict(self.moments[moment])

    def bytes_of(self, cause: str) -> int:
        """Return the largest memory use of a category (`Line.cause`) during a run, in bytes."""
        return sum(line.size_bytes for line in self.lines if line.cause == cause)

    @property
    def above_weights_bytes(self) -> int:
        """Return the peak of a step in bytes, excluding weights and what the process held before they were loaded."""
        return self.step_bytes - sum(self.bytes_of(cause) for cause in ("weights", "adapter", "process"))


def _line(cause: str, equation: int, formula: str, size: int) -> Line:
    return Line(cause, formula, equation, size, size)


def of_lora(shape: ModelShape, counted: Count, dropout: float, job: Job) -> Memory:
    """Return the memory use of a run with LoRA: a frozen base, and factors in fp32. [docs/math.md (20)-(29)]"""
    itemsize = job.dtype_bytes
    factors = counted.factors + counted.own_numbers + counted.factor_biases + counted.row_parameters
    trained = factors - counted.frozen  # Frozen factors have neither gradients nor moments.
    plain = counted.copied + counted.biases  # Saved modules and biases have the base's dtype.
    added = f" + {itemsize} × {plain:,}" if plain else ""
    base = base_of(shape, job)
    kept = activations.of_lora(shape, counted, dropout, job, base)
    copied = f" + {itemsize} × {counted.copied:,}" if counted.copied else ""
    lines = [
        _weights(shape, itemsize, base),
        _line("adapter", 21, f"4 × {factors:,}{copied}", MASTER_BYTES * factors + itemsize * counted.copied),
        _line("optimizer", 23, *optimizer_state(counted, job.optimizer, itemsize)),
        _line("gradients", 22, f"4 × {trained:,}{added}", MASTER_BYTES * trained + itemsize * plain),
        _activations(kept, job),
        _logits(shape, job, kept.of_blocks > 0 and accelerated.skips_logits(shape, counted)),
    ]
    outside = temporary_bytes(shape, counted, job)
    return _memory(lines, outside, kept, job, _notes(shape, kept, job))


def base_of(shape: ModelShape, job: Job) -> StoredBase | None:
    """Return the size of the base if it is not stored in the job's dtype, or None.

    Raises:
        ConfigError: No module of this model can be stored in this way, or the files are already quantized.
    """
    if job.base_matmul != "int8":
        return stored_base(shape, job.quantization, job.dtype_bytes, job.double_quantization)
    files = packed_files(shape)
    if files is not None and files.base is not None:
        text = f"{shape.name}: the files are already quantized ({files.method}); omit base_matmul int8."
        raise ConfigError(text, what="int8", where=shape.name, field="base_matmul")
    return int8_base(shape, job.dtype_bytes)


def _weights(shape: ModelShape, itemsize: int, base: StoredBase | None) -> Line:
    if base is None:
        return _line("weights", 20, f"{itemsize} × {shape.parameters:,}", itemsize * shape.parameters)
    formula = f"{itemsize} × {base.rest:,} + {base.size_bytes:,} ({base.storage.name} of {base.elements:,})"
    return _line("weights", 108 if base.storage is W8A8 else 28, formula, itemsize * base.rest + base.size_bytes)


def of_full(shape: ModelShape, job: Job) -> Memory:
    """Return the memory use of full fine-tuning: 16 bytes per parameter, plus activations.

    In fp32, a weight, its gradient and two moments take 4 bytes each. In bf16 or fp16, the weight and its gradient take
    2 bytes each, and the fp32 master copy and two moments of mixed-precision training take 4 bytes each.

    Source:
        Rajbhandari et al. 2020, arXiv:1910.02054, section 3.1.
    """
    itemsize, parameters = job.dtype_bytes, shape.parameters
    states = 2 if itemsize >= MASTER_BYTES else 3
    kept = activations.of_full(shape, job)
    lines = [
        _weights(shape, itemsize, None),
        _line("optimizer", 23, f"{states} × 4 × {parameters:,}", states * MASTER_BYTES * parameters),
        _line("gradients", 22, f"{itemsize} × {parameters:,}", itemsize * parameters),
        _activations(kept, job),
        _logits(shape, job, without=False),
    ]
    outside = temporary_bytes(shape, None, job)
    return _memory(lines, outside, kept, job, _notes(shape, kept, replace(job, accelerated=False)))


def logits_bytes(shape: ModelShape, job: Job) -> int:
    """Return the size in bytes of the vocabulary-sized tensors when the backward pass begins. [docs/math.md (25)]

    The size is 3 × 4 × tokens × vocabulary, as if every token contributed to the loss. The logits in the base's dtype
    have been freed by then. A model without a language modeling head has no such tensors.
    """
    return LOSS_COPIES * 4 * job.batch_tokens * shape.vocab if shape.head is not None else 0


def _logits(shape: ModelShape, job: Job, without: bool) -> Line:
    """Return the peak memory of the loss: vocabulary-sized tensors or, if the loss is chunked, one chunk of logits."""
    size, tokens = logits_bytes(shape, job), job.batch_tokens
    if without:
        rows = accelerated.chunk_rows(shape, job)
        formula = (
            f"{job.dtype_bytes} × ({rows:,} rows × {shape.vocab:,} + 2 × {tokens:,} tokens × {shape.hidden:,}) + "
            f"8 × {tokens:,}"
        )
        chunk = job.dtype_bytes * rows * shape.vocab
        return _line("logits", 35, formula, chunk + accelerated.loss_bytes(shape, job))
    formula = f"{LOSS_COPIES} × 4 × {tokens:,} tokens × {shape.vocab:,}" if size else "no head over the vocabulary"
    return _line("logits", 25, formula, size)


def _memory(lines: list[Line], outside: dict[str, int], kept: Activations, job: Job, notes: tuple[str, ...]) -> Memory:
    """Return the memory use, given the lines of a step and the temporary memory of moments outside of steps."""
    process = process_bytes(job)
    lines = [
        *lines,
        _line("temporary", 99, "the largest of loading, checking and writing", max(outside.values(), default=0)),
        _line("runtime", 26, "measured: library pages, kernels, threads", RUNTIME_BYTES),
        _line("process", 98, f"{process:,} (libraries, tokenizer, data)" if process else "not on this device", process),
    ]
    sizes = {line.cause: line.size_bytes for line in lines}
    steps = _moments_of_step(sizes["gradients"], sizes["logits"], kept, job)
    gaps = _malloc(max(sum(varying.values()) for varying in steps.values()), job)
    lines[-1:-1] = gaps
    sizes |= {line.cause: line.size_bytes for line in gaps}
    moments = steps | {name: _outside_of_steps(name, size, sizes["gradients"]) for name, size in outside.items()}
    totals = {name: sum((sizes | varying).values()) for name, varying in moments.items()}
    moment = max(totals, key=totals.__getitem__)
    lines = [replace(line, at_peak_bytes=moments[moment].get(line.cause, line.size_bytes)) for line in lines]
    return Memory(tuple(lines), totals[moment], moment, notes, max(totals[name] for name in steps), moments)


def _malloc(step: int, job: Job) -> list[Line]:
    """Return the memory that malloc keeps in gaps between the tensors of a step, if any. [docs/math.md (110)]"""
    if job.process_bytes is None or not job.malloc_share:
        return []
    size = round(job.malloc_share * step)
    return [_line("malloc", 110, f"{job.malloc_share:g} × {step:,} (tensors of a step)", size)]


def _outside_of_steps(moment: str, size: int, gradients: int) -> dict[str, int]:
    """Return the sizes that differ from the largest ones at a moment outside of steps, by category."""
    sizes = {"temporary": size, "activations": 0, "logits": 0, "gradients": 0, "malloc": 0}
    if moment == WRITING:
        return sizes | {"gradients": gradients}
    sizes |= {"optimizer": 0}  # the moments are created in the first step
    return sizes if moment == CHECKING else sizes | {"adapter": 0}


def _activations(kept: Activations, job: Job) -> Line:
    tokens, blocks = job.batch_tokens, max(kept.blocks_kept, 1)
    if job.gradient_checkpointing:
        formula = (
            f"{kept.blocks_kept} × {kept.boundary:,} (inputs of blocks) + {kept.largest_block:,} (one recomputed block)"
            f" + {kept.transient:,} (its gradients) + {kept.outside:,}"
        )
        size = kept.blocks_kept * kept.boundary + kept.largest_block + kept.transient + kept.outside
    else:
        formula = (
            f"{kept.blocks_kept} blocks × {tokens:,} tokens × {kept.blocks / blocks / tokens:,.0f} B + {kept.outside:,}"
        )
        size = kept.blocks + kept.outside
    return _line("activations", 29 if kept.fused else 24, formula, size)


def _moments_of_step(gradients: int, logits: int, kept: Activations, job: Job) -> dict[str, dict[str, int]]:
    """Return the size of each varying category, in bytes, at each moment of a step. [docs/math.md (27)]"""
    earlier = gradients if job.accumulation > 1 else 0  # accumulated by earlier batches of the step
    if job.gradient_checkpointing:
        inputs, block = kept.blocks_kept * kept.boundary, kept.largest_block + kept.transient
        moments = {
            "the backward pass begins at the loss": (inputs + kept.outside, logits, earlier),
            "the last block is recomputed": (inputs + block, 0, earlier),
            "the first block is recomputed": (kept.boundary + block, 0, gradients),
        }
    else:
        moments = {
            "the backward pass begins at the loss": (kept.blocks + kept.outside, logits, earlier),
            "the backward pass enters the last block": (kept.blocks + kept.transient, 0, earlier),
            "the backward pass leaves the first block": (kept.largest_block + kept.transient, 0, gradients),
        }
    moments[OPTIMIZING] = (0, 0, gradients)
    names = ("activations", "logits", "gradients")
    return {name: dict(zip(names, sizes, strict=True)) | {"temporary": 0} for name, sizes in moments.items()}


def _notes(shape: ModelShape, kept: Activations, job: Job) -> tuple[str, ...]:
    family = f"Activations: {kept.family}."
    if not kept.is_known:
        family = f"The activations of {shape.architecture} are not known; the estimate assumes a {kept.family}."
    return family, _how(shape, kept, job), ALLOCATOR_NOTE


def _how(shape: ModelShape, kept: Activations, job: Job) -> str:
    """Describe which forward passes the estimate assumes, and how those of the actual run may differ."""
    if not job.accelerated:
        return "Assumes transformers' own forward passes (train --no-accelerate): padding takes memory and time."
    if not kept.of_blocks:
        return (
            "The activations of accelerated forward passes are not known for this architecture; "
            "the estimate assumes the model's own forward passes, and a run may need less memory."
        )
    reason = "Assumes accelerated forward passes (disable with train --no-accelerate)"
    unfused = kept.of_blocks - kept.fused
    if unfused:
        reason += (
            f"; {unfused} of {kept.of_blocks} sublayers run unfused, because a LoRA variant, a saved module, a "
            "trained bias or a quantized weight has no accelerated version"
        )
    if activations.packs(shape):
        reason += (
            f". Rows are packed, so padding takes neither memory nor time; the estimate is for rows of "
            f"{job.length_tokens:,} tokens each"
        )
    return reason + "."


LOADER_BYTES = 28_000_000
"""Library pages (25 MB) and objects that transformers adds to the process while it loads weights."""

PROBED_TOKENS = 18
"""Tokens for which `lorakit.speed.accelerate` compares the logits with those of the original model."""

PROBE_COPIES = 4
"""fp64 tensors of size tokens × vocabulary that exist at once in the comparison: both logits and two products."""

GGUF_TOKEN_BYTES = 2_650
"""Objects of the gguf package's reader per token of a vocabulary: its text, its score and its type (Gemma 3's file)."""

ENCODED_COPIES = 4
"""Copies of an adapter while its file is built: the tensors, the encoded file, and two while its header is sorted."""

TEXT_BYTES = 22_000_000
"""Text form of the tokenizer, with a vocabulary of about 50,000 tokens, while its hash is computed."""

LOADING, CHECKING, WRITING = ("the weights are loaded", "the accelerated model is checked", "a checkpoint is written")
MEASURING = "the speed of the machine is measured"

OUTSIDE = (LOADING, CHECKING, WRITING, MEASURING)
"""Moments outside of training steps."""


def process_bytes(job: Job) -> int:
    """Return the size of the process without weights and tensors in bytes; 0 on an accelerator. [docs/math.md (98)]"""
    return 0 if job.process_bytes is None else job.process_bytes + LOADER_BYTES


def temporary_bytes(shape: ModelShape, counted: Count | None, job: Job) -> dict[str, int]:
    """Return the temporary memory that a process needs outside of training steps, by moment. [docs/math.md (99)]

    If the files have the job's dtype, the mapped files are the weights, and loading needs nothing else. If weights are
    converted, quantized or dequantized, the files stay mapped until all weights are loaded. A base that is multiplied
    in int8 is converted in files and quantized from mapped files, one weight after another. Only from a GGUF file, all
    of it exists in the job's dtype first, next to the mapped file and the objects of its vocabulary. On an accelerator,
    the result is empty.
    """
    if job.process_bytes is None:
        return {}
    files = packed_files(shape)
    is_dequantized = files is not None and files.base is None
    is_converted = shape.converted_bytes > 0 or (shape.dtype != job.dtype and job.base_matmul != "int8")
    is_converted = is_converted or job.quantization is not None or is_dequantized
    size = DTYPE_BYTES.get(shape.dtype, MASTER_BYTES) * shape.parameters if files is None else files.file_bytes
    sizes = {MEASURING: job.reserved_bytes}
    sizes[LOADING] = size + _replaced_bytes(shape, job) if is_converted else 0
    if shape.converted_bytes:
        sizes[LOADING] += shape.converted_bytes + GGUF_TOKEN_BYTES * shape.vocab
    if counted is not None:
        moments = 2 * MASTER_BYTES * counted.trainable
        sizes[WRITING] = TEXT_BYTES + max(ENCODED_COPIES * MASTER_BYTES * counted.saved_parameters, 2 * moments)
        if job.accelerated:
            sizes[CHECKING] = PROBE_COPIES * 8 * PROBED_TOKENS * (0 if shape.head is None else shape.vocab)
    return sizes


def _replaced_bytes(shape: ModelShape, job: Job) -> int:
    """Return by how much a base in the job's dtype is larger than the base that is kept for int8 matmuls."""
    if job.base_matmul != "int8":
        return 0
    base = int8_base(shape, job.dtype_bytes)
    return job.dtype_bytes * base.elements - base.size_bytes
