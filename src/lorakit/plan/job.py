"""What is asked of a plan beside model and adapter: the training job, and the speed of a machine.

Knows nothing about models, and measures nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.errors import ConfigError, nearest
from lorakit.plan.quantized import storage_named

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
"""Bytes of one number by dtype."""

DTYPE_WORDS = {"fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"}
"""Short words for the dtypes."""

OPTIMIZERS = ("adamw", "lorafa")
"""AdamW over all trained numbers; LoRA-FA: the factor that does not begin at zero is frozen, AdamW over the rest."""

RECOMPUTED = ("none", "feed-forward", "layers")
"""What the backward may compute again instead of keeping it, in the order of its price: what is elementwise alone; of
each feed-forward that runs as one function, what its first products gave; of each layer, all but its input."""

UTILISATION = 0.4
"""Share of a bare matrix product's speed that a training step of a plain transformers model reaches on a CPU.

Measured over one step of SmolLM2-135M's geometry: 0.45 where bf16 products are slow (AVX-512), 0.27 where they are
fast (AMX), since norms, softmax, activations and the allocator take their time beside the products.
"""


@dataclass(frozen=True)
class Job:
    """One training job.

    Attributes:
        batch_rows: Rows of a batch.
        length_tokens: Tokens of a row.
        accumulation: Batches of an optimizer step.
        steps: Optimizer steps, or None where that is not known.
        dtype: In which the base is held and computed with.
        optimizer: "adamw" or "lorafa": two fp32 moments for each trained number; lorafa trains one factor of two.
        recompute: What the backward computes again, a word of `RECOMPUTED`.
        quantization: A name of `plan.quantised.STORAGES`, or None for a base in `dtype`.
        double_quantization: Quantise the scales too, where that storage can.
        accelerated: Run the layers by the functions of `lorakit.speed.accelerate` and the loss without logits, as
            `lorakit train` does by default; else as transformers has them.
        mean_tokens: Mean tokens of a row without padding, or None where that is not known. Accelerated rows lie end to
            end, so padded tokens take no time; else they count as any other.

    Raises:
        ConfigError: A number is below 1, mean_tokens is above length_tokens, or dtype, optimizer, recompute or
            quantization is not known.
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
    accelerated: bool = False
    mean_tokens: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", dtype_name(self.dtype))
        for name in ("batch_rows", "length_tokens", "accumulation", "steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(
                    f"{name} is {value!r}; it must be a whole number of at least 1.", what=value, field=name
                )
        if self.mean_tokens is not None and not 0 < self.mean_tokens <= self.length_tokens:
            raise ConfigError(
                f"mean_tokens is {self.mean_tokens!r}; it must be above 0 and at most length_tokens, "
                f"{self.length_tokens}.",
                what=self.mean_tokens,
                field="mean_tokens",
            )
        if self.quantization is not None:
            storage_named(self.quantization)
        if self.optimizer not in OPTIMIZERS:
            raise ConfigError(
                f"optimizer is {self.optimizer!r}; it must be {' or '.join(OPTIMIZERS)}.",
                what=self.optimizer,
                field="optimizer",
                allowed=OPTIMIZERS,
            )
        if self.recompute not in RECOMPUTED:
            raise ConfigError(
                f"recompute is {self.recompute!r}; it must be one of {', '.join(RECOMPUTED)}.",
                what=self.recompute,
                field="recompute",
                allowed=RECOMPUTED,
            )

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether only the input of each layer is kept and the rest computed again in the backward."""
        return self.recompute == "layers"

    @property
    def batch_tokens(self) -> int:
        """Tokens of one batch: what is in memory at once."""
        return self.batch_rows * self.length_tokens

    @property
    def step_tokens(self) -> int:
        """Tokens that one optimizer step computes, padding among them where it is computed.   [docs/math.md (36)]"""
        each = self.mean_tokens if self.accelerated and self.mean_tokens is not None else self.length_tokens
        return round(self.batch_rows * each) * self.accumulation

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one number of the base."""
        return DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Speed:
    """How fast a machine is; one of the two rates is enough, and a given rate of tokens wins.

    Attributes:
        flops_per_second: Of a bare matrix product in the job's dtype, one multiply-add counted as two.
        tokens_per_second: Of training steps, as a run prints it.
        source: Where the rate comes from, in a few words.
        utilisation: Share of `flops_per_second` that a step of transformers' own forwards reaches.
        threads: Of the CPU that `flops_per_second` is of, or None for another device or where that is not known. With
            them an accelerated step is reckoned by `plan.timing`.

    Raises:
        ConfigError: There is no rate, or one of these is not above 0.
    """

    flops_per_second: float | None = None
    tokens_per_second: float | None = None
    source: str = "given"
    utilisation: float = UTILISATION
    threads: int | None = None

    def __post_init__(self) -> None:
        rates = [rate for rate in (self.flops_per_second, self.tokens_per_second) if rate is not None]
        if not rates or any(not rate > 0 for rate in (*rates, self.utilisation, self.threads or 1)):
            raise ConfigError(
                f"a speed must be above 0; {self.flops_per_second} FLOP/s and "
                f"{self.tokens_per_second} tokens/s were given."
            )

    def tokens_at(self, flops_per_token: float) -> float:
        """Tokens per second of training that costs so many FLOPs per token.   [docs/math.md (34)]

        Args:
            flops_per_token: Forward, backward and recomputation.
        """
        if self.tokens_per_second is not None:
            return self.tokens_per_second
        return (self.flops_per_second or 0.0) * self.utilisation / flops_per_token


def recomputed(recompute: str, gradient_checkpointing: bool, memory_budget: str | None, accelerated: bool) -> str:
    """What the backward computes again, from the settings that say it.

    Args:
        recompute: A word of `RECOMPUTED`.
        gradient_checkpointing: The same as "layers".
        memory_budget: What a step may take; it chooses by itself.
        accelerated: Whether the layers run by the functions of `lorakit.speed.accelerate`.

    Returns:
        A word of `RECOMPUTED`.

    Raises:
        ConfigError: Two of them exclude each other.
    """
    if gradient_checkpointing and recompute == "feed-forward":
        raise ConfigError(
            "gradient_checkpointing and recompute feed-forward exclude each other: the first is recompute layers. "
            "Leave one out."
        )
    way = "layers" if gradient_checkpointing else recompute
    if memory_budget is not None and way != "none":
        raise ConfigError(
            f"memory_budget and recompute {way} exclude each other: the budget chooses what is computed again. Leave "
            "one out."
        )
    if way == "feed-forward" and not accelerated:
        raise ConfigError(
            "recompute feed-forward needs accelerated forwards: a model's own can compute again whole layers alone. "
            "Take recompute layers, or leave --no-accelerate out."
        )
    return way


def dtype_name(word: str) -> str:
    """The full name of a dtype.

    Args:
        word: Such as "bf16" or "bfloat16".

    Returns:
        Such as "bfloat16".

    Raises:
        ConfigError: There is no such dtype here.
    """
    name = DTYPE_WORDS.get(word, word)
    if name not in DTYPE_BYTES:
        hint = nearest(word, [*DTYPE_BYTES, *DTYPE_WORDS], 1)
        raise ConfigError(
            f"dtype is {word!r}; it must be one of {', '.join(DTYPE_BYTES)}"
            + (f". Did you mean {hint[0]}?" if hint else ".")
        )
    return name
