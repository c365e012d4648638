"""Inputs to a plan other than the model and the adapter: the training job and the machine's speed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, get_args

from lorakit.choices import BASE_MATMULS, DTYPE_NAMES, OPTIMIZERS, Recompute
from lorakit.errors import ConfigError
from lorakit.plan.quantized import storage_named

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
"""Bytes per element by dtype."""

MASTER_BYTES = 4
"""Bytes per trainable parameter: adapters are stored in fp32, both in memory and on disk."""

PROCESS_BYTES = 560_000_000
"""Resident size of a process before weights are loaded, on Linux with torch 2.13 for CPU: Python and torch take 225 MB,
lorakit's modules and their imports 60 MB, and transformers with a tokenizer and the model's class 275 MB.
"""

MALLOC_SHARES = {"equal": 0.1, "varying": 0.8}
"""Lengths of the rows -> `Job.malloc_share` of the command line's malloc (`benchmarks/bench_memory.py`). Kernels that
oneDNN compiles for a new number of tokens stay in memory between the tensors of a step, so larger ones no longer fit.
"""

RECOMPUTED: tuple[str, ...] = get_args(Recompute)
"""What the backward pass can recompute, cheapest first: only elementwise results ("none"); also the outputs of the
first matmuls in each fused feed-forward block ("feed-forward"); or everything except each layer's input ("layers").
"""

ASSUMED_LENGTH = 512
"""Value of `max_length` for documents, which have no length of their own, and for plans without data."""

UTILIZATION = 0.4
"""Fraction of the measured matmul speed that a training step of an unmodified transformers model reaches on a CPU.

Measured for one step with the dimensions of SmolLM2-135M: 0.45 on a CPU with slow bf16 matmuls (AVX-512), and 0.27 on
a CPU with fast matmuls (AMX), where norms, softmax, activations and allocation take just as long as on the first CPU.
"""


@dataclass(frozen=True)
class Job:
    """A training job.

    Attributes:
        length_tokens: Number of tokens per row.
        accumulation: Number of batches per optimizer step.
        dtype: Dtype of the base and of the computation.
        optimizer: A key of `lorakit.plan.optimizer_state.OPTIMIZERS`, which says what it stores and freezes.
        recompute: What the backward pass recomputes, one of `RECOMPUTED`.
        quantization: A name in `plan.quantized.STORAGES`, or None for a base in `dtype`.
        double_quantization: Whether to quantize the scales too, if the storage format supports it.
        base_matmul: How the base's linear layers are multiplied, one of `BASE_MATMULS`.
        accelerated: Whether to use the fused forward passes of `lorakit.speed.accelerate` instead of transformers' own,
            and to compute the loss without storing all logits. `lorakit train` does both by default.
        mean_tokens: Mean number of tokens per row, excluding padding, or None if unknown. Accelerated rows are packed,
            so there is no padding to process; in other jobs, padding tokens count like any others.
        process_bytes: Resident size of the process before weights are loaded; None if the job runs on an accelerator,
            whose memory does not contain the process.
        reserved_bytes: Memory that the process has freed and malloc keeps for later use.
        packed_tokens: Number of tokens in the largest batch of packed rows; None for `batch_rows` × `length_tokens`.
        malloc_share: Memory that malloc keeps in gaps between tensors, as a fraction of the tensors of a step
            (`MALLOC_SHARES`).
        upcasts: Whether matmuls of fused layers upcast their operands to fp32, which is faster on some processors.
        evaluated_tokens: Number of tokens in each evaluation.

    Raises:
        ConfigError: A value is below 1, `mean_tokens` is above `length_tokens`, dtype, optimizer, recompute,
            quantization or base_matmul is unknown, or both of the last two are given.
    """

    batch_rows: int = 4
    length_tokens: int = 256
    accumulation: int = 1
    steps: int | None = None
    dtype: str = "bfloat16"
    optimizer: str = "adamw"
    recompute: str = "none"
    quantization: str | None = None
    double_quantization: bool = True
    base_matmul: str = "dtype"
    accelerated: bool = False
    mean_tokens: float | None = None
    process_bytes: int | None = PROCESS_BYTES
    reserved_bytes: int = 0
    packed_tokens: int | None = None
    malloc_share: float = 0.0
    upcasts: bool = False
    evaluations: int | None = None
    evaluated_tokens: int = 0

    @classmethod
    def of(cls, settings: Any, **fields: Any) -> Job:
        """Return the job of settings, by their names in `lorakit train`; `fields` replaces and adds fields.

        Raises:
            ConfigError: A value is not allowed, or two of them are incompatible.
        """
        of_settings = {
            "batch_rows": settings.per_device_train_batch_size,
            "accumulation": settings.gradient_accumulation_steps,
            "optimizer": settings.optimizer,
            "quantization": settings.quantization,
            "double_quantization": settings.double_quantization,
            "base_matmul": settings.base_matmul,
            "accelerated": settings.accelerate,
        }
        limits = settings.memory_budget, settings.accelerate, settings.fit
        recompute = recomputed(settings.recompute, settings.gradient_checkpointing, *limits)
        return cls(**{**of_settings, "recompute": recompute, **fields})

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for name in ("batch_rows", "length_tokens", "accumulation", "steps", "packed_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError.of(name, value, "an integer >= 1")
        if self.mean_tokens is not None and not 0 < self.mean_tokens <= self.length_tokens:
            raise ConfigError.of(
                "mean_tokens", self.mean_tokens, f"above 0, at most {self.length_tokens} (length_tokens)"
            )
        if self.quantization is not None:
            storage_named(self.quantization)
        choices = {"optimizer": OPTIMIZERS, "base_matmul": BASE_MATMULS, "recompute": RECOMPUTED}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConfigError.of(name, getattr(self, name), allowed=allowed)
        if self.base_matmul != "dtype" and self.quantization is not None:
            text = (
                f"base_matmul {self.base_matmul} cannot be combined with quantization {self.quantization}, because "
                "both store the base's weights; omit one of them."
            )
            raise ConfigError(text, what=self.quantization, field="base_matmul")

    @property
    def gradient_checkpointing(self) -> bool:
        """Return whether each layer saves only its input, so that the backward pass recomputes everything else."""
        return self.recompute == "layers"

    @property
    def batch_tokens(self) -> int:
        """Return the number of tokens in a batch; all of them are in memory at once."""
        return self.packed_tokens or self.batch_rows * self.length_tokens

    @property
    def step_tokens(self) -> int:
        """Return the number of tokens in an optimizer step, plus any padding to be processed. [docs/math.md (36)]"""
        each = self.mean_tokens if self.accelerated and self.mean_tokens is not None else self.length_tokens
        return round(self.batch_rows * each) * self.accumulation

    @property
    def matmul_bytes(self) -> int:
        """Return the number of bytes per element in the matmuls of fused layers."""
        return MASTER_BYTES if self.upcasts else self.dtype_bytes

    @property
    def dtype_bytes(self) -> int:
        """Return the number of bytes per element of the base."""
        return DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Speed:
    """Speed of a machine; one of the two rates is enough, and `tokens_per_second` takes precedence.

    Attributes:
        flops_per_second: Matmul FLOPs per second in the job's dtype; one multiply-add counts as two FLOPs.
        tokens_per_second: Training speed, as printed by a run.
        source: Where the rate comes from, such as "measured".
        utilisation: Fraction of `flops_per_second` that a step with transformers' own forward passes reaches.
        threads: Number of CPU threads used to measure `flops_per_second`, which `flops.token_seconds` needs; None if
            unknown, or if a GPU was measured.
        int8_flops_per_second: FLOPs per second of linear layers in int8; None if unknown.

    Raises:
        ConfigError: No rate is given, or a value is not positive.
    """

    flops_per_second: float | None = None
    tokens_per_second: float | None = None
    source: str = "given"
    utilisation: float = UTILIZATION
    threads: int | None = None
    int8_flops_per_second: float | None = None

    def __post_init__(self) -> None:
        rates = [rate for rate in (self.flops_per_second, self.tokens_per_second) if rate is not None]
        if not rates or any(not rate > 0 for rate in (*rates, self.utilisation, self.threads or 1)):
            text = f"speed must be above 0; got {self.flops_per_second} FLOP/s and {self.tokens_per_second} tokens/s."
            raise ConfigError(text, field="speed")

    def tokens_at(self, flops_per_token: float) -> float:
        """Return the training speed in tokens per second for a step of these FLOPs per token. [docs/math.md (34)]"""
        if self.tokens_per_second is not None:
            return self.tokens_per_second
        return (self.flops_per_second or 0.0) * self.utilisation / flops_per_token


def recomputed(
    recompute: str, gradient_checkpointing: bool, memory_budget: str | None, accelerated: bool, fit: str | None = None
) -> str:
    """Return which of `RECOMPUTED` the backward pass recomputes, given all settings that affect it.

    Gradient checkpointing equals `recompute="layers"`; with a limit, of a step (`memory_budget`) or of the run (`fit`),
    `budget` chooses later.

    Raises:
        ConfigError: Two settings are incompatible.
    """
    if gradient_checkpointing and recompute == "feed-forward":
        raise _exclude_each_other("gradient_checkpointing", "recompute=feed-forward", recompute, "recompute")
    chosen = "layers" if gradient_checkpointing else recompute
    limit = "fit" if fit is not None else "memory_budget" if memory_budget is not None else None
    if limit is not None and chosen != "none":
        raise _exclude_each_other(limit, f"recompute={chosen}", chosen, limit)
    if fit is not None and memory_budget is not None:
        raise _exclude_each_other("fit", "memory_budget", memory_budget, "fit")
    if chosen == "feed-forward" and not accelerated:
        text = (
            "recompute=feed-forward needs accelerated forward passes; a model's own forward pass can recompute only "
            "whole layers. Use recompute=layers, or remove --no-accelerate."
        )
        raise ConfigError(text, what=chosen, field="recompute", allowed=("none", "layers"))
    return chosen


def _exclude_each_other(one: str, other: str, what: str, field: str) -> ConfigError:
    text = f"{one} and {other} are mutually exclusive, because both say what is recomputed. Remove one."
    return ConfigError(text, what=what, field=field)


def dtype_name(word: str) -> str:
    """Return the full name of a dtype, "bfloat16" for "bf16"; a ConfigError if it is unknown."""
    name = DTYPE_NAMES.get(word, word)
    if name not in DTYPE_BYTES:
        raise ConfigError.of("dtype", word, allowed=(*DTYPE_BYTES, *DTYPE_NAMES))
    return name
