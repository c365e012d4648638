"""Memory of the process that runs a job, apart from the tensors of a training step.

Loading the weights, checking the accelerated model and writing files need memory for a short time. malloc keeps it for
later use, so only the largest of these amounts and of the step's tensors counts.
"""

from __future__ import annotations

from lorakit.architectures.shapes import ModelShape
from lorakit.plan.int8_costs import int8_base
from lorakit.plan.job import DTYPE_BYTES, MASTER_BYTES, Job
from lorakit.plan.packed import packed_files
from lorakit.plan.params import Count

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

LOADING, CHECKING, WRITING = (
    "the weights are loaded",
    "the accelerated model is checked",
    "a checkpoint is written",
)
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
    found = {MEASURING: job.reserved_bytes}
    found[LOADING] = size + _replaced_bytes(shape, job) if is_converted else 0
    if shape.converted_bytes:
        found[LOADING] += shape.converted_bytes + GGUF_TOKEN_BYTES * shape.vocab
    if counted is not None:
        moments = 2 * MASTER_BYTES * counted.trainable
        found[WRITING] = TEXT_BYTES + max(ENCODED_COPIES * MASTER_BYTES * counted.saved_parameters, 2 * moments)
        if job.accelerated:
            found[CHECKING] = PROBE_COPIES * 8 * PROBED_TOKENS * (0 if shape.head is None else shape.vocab)
    return found


def _replaced_bytes(shape: ModelShape, job: Job) -> int:
    """Return by how much a base in the job's dtype is larger than the base that is kept for int8 matmuls."""
    if job.base_matmul != "int8":
        return 0
    base = int8_base(shape, job.dtype_bytes)
    return job.dtype_bytes * base.elements - base.size_bytes
