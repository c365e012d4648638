"""Nested configs of `LoraConfig`: settings for inits and variants, with PEFT's names, defaults and checks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from lorakit.config.types import Dataclass, Value, check_types
from lorakit.errors import ConfigError, ConfigTypeError

Part = TypeVar("Part", bound=Dataclass)

VELORA_STARTS = ("batch_average_once", "batch_average", "random")


def restored(field: str, value: Part | Value, part: type[Part]) -> Part | None:
    """Return a nested config as an instance of its class; unknown keys in a dict are dropped.

    A ConfigTypeError for a value that is neither None, an instance nor a dict of the fields, and the errors of the
    class.
    """
    if value is None or isinstance(value, part):
        return value
    if isinstance(value, Mapping):
        known = {f.name for f in dataclasses.fields(part) if f.init}
        try:
            return part(**{key: entry for key, entry in value.items() if key in known})
        except ConfigError as cause:
            name = field if cause.field is None else f"{field}.{cause.field}"
            raise type(cause)(f"{field}: {cause}", **{**cause.fields, "field": name}) from None
    text = f"{field} is {value!r}; it must be a `{part.__name__}`, a dict, or None."
    raise ConfigTypeError(text, what=value, field=field)


def _at_least(name: str, value: float, least: float, requirement: str, *, strict: bool = False) -> None:
    if value < least or (strict and value == least):
        raise ConfigError(f"`{name}` {requirement}, got {value!r}.", what=value, field=name)


@dataclass
class _Typed:
    """Base class for configs that check the types of their fields against the annotations."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass
class LoraRuntimeConfig(_Typed):
    """Process-local settings, never written to a file.

    Attributes:
        ephemeral_gpu_offload: Whether to compute the initial extra tensors of a variant, such as DoRA's magnitudes, on
            the GPU where the weights are in main memory; no effect without a GPU.
    """

    ephemeral_gpu_offload: bool = False


@dataclass
class LoftQConfig(_Typed):
    """Settings for the "loftq" init (Li et al. 2023, arXiv:2310.08659).

    Attributes:
        loftq_bits: Number of bits per weight in the quantized base.
        loftq_iter: Number of times to alternate between quantizing the base and fitting A and B.
    """

    loftq_bits: int = 4
    loftq_iter: int = 1


@dataclass
class EvaConfig(_Typed):
    """Settings for the "eva" init (Paischer et al. 2024, arXiv:2410.07170).

    Attributes:
        rho: Maximum rank of a site, as a multiple of r; if rho is 1, all ranks stay the same.
        tau: Cosine similarity at which a site's components are considered converged.
        use_label_mask: Whether to skip positions whose label is masked.
        label_mask_value: Label that marks a position as masked.
        whiten: Whether to divide components by the square roots of their singular values.
        adjust_scaling_factors: Whether to adjust alpha when a rank changes, so that the scale stays the same.

    Raises:
        ConfigError: rho is below 1, or tau is outside [0, 1].
    """

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("rho", self.rho, 1.0, "must be >= 1.0")
        if not 0.0 <= self.tau <= 1.0:
            raise ConfigError(f"`tau` must be between 0.0 and 1.0, got {self.tau!r}.", what=self.tau, field="tau")


@dataclass
class CordaConfig(_Typed):
    """Settings for the "corda" init (Yang et al. 2024, arXiv:2406.05223).

    Attributes:
        cache_file: Path of a file that caches decompositions.
        covariance_file: Path of a file that caches covariances.
        corda_method: "ipm" (adapt to the data) or "kpm" (preserve the knowledge in the data).
        verbose: Whether to log progress.
        use_float16_for_covariance: Whether to store covariances in half precision.
        prune_temporary_fields: Whether to drop collected statistics after use.
    """

    cache_file: str | None = None
    covariance_file: str | None = None
    corda_method: str = "ipm"
    verbose: bool = False
    use_float16_for_covariance: bool = False
    prune_temporary_fields: bool = True


@dataclass
class LoraGAConfig(_Typed):
    """Settings for the "lora_ga" init (Wang et al. 2024, arXiv:2407.05000).

    Attributes:
        direction: Which singular vectors of the gradient initialize A and B: "ArBr", "A2rBr", "ArB2r" or "random".
        scale: How A and B are scaled: "stable", "weight_svd", "gd_scale" or "unit".
        stable_gamma: The constant gamma in the "stable" scaling.
    """

    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16


@dataclass
class VeloraConfig(_Typed):
    """Settings for VeLoRA (Miles et al. 2024, arXiv:2405.17991), which compresses the input that A's gradient needs.

    Attributes:
        num_groups: Number of groups per activation vector.
        scale: Factor that multiplies the activations reconstructed in the backward pass, and with them A's gradient.
        init_type: The projection onto which groups are compressed: "batch_average" (the mean of the groups, computed in
            each training forward pass), "batch_average_once" (only in the first one) or "random".

    Raises:
        ConfigError: `num_groups` or `scale` is not positive, or `init_type` is unknown.
    """

    num_groups: int = 64
    scale: float = 1.0
    init_type: str = "batch_average"

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("num_groups", self.num_groups, 0, "should be positive", strict=True)
        _at_least("scale", self.scale, 0, "should be positive", strict=True)
        kind, (once, each, random) = self.init_type, VELORA_STARTS
        if kind not in VELORA_STARTS:
            text = f"Unsupported `init_type` {kind!r}. Supported values are {once!r}, {each!r}, and {random!r}."
            raise ConfigError(text, what=kind, field="init_type", allowed=VELORA_STARTS)


@dataclass
class MontecloraConfig(_Typed):
    """Settings for MonteCLoRA (Sengupta et al. 2024, arXiv:2411.04358), which samples A during training.

    Attributes:
        num_samples: Number of samples per forward pass.
        use_entropy: Whether to add an entropy term that keeps the samples' weights from collapsing onto one sample.
        dirichlet_prior: Concentration of the Dirichlet prior.
        sample_scaler: Scale of the sampling noise.
        kl_loss_weight: Weight of the KL divergence in the loss.
        buffer_size: Number of samples that PEFT draws at once; lorakit draws each sample when it is used.

    Raises:
        ConfigError: `num_samples`, `dirichlet_prior` or `buffer_size` is not positive.
    """

    num_samples: int = 8
    use_entropy: bool = False
    dirichlet_prior: float = 0.1
    sample_scaler: float = 1e-4
    kl_loss_weight: float = 1e-5
    buffer_size: int = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            _at_least(name, getattr(self, name), 0, "must be greater than 0", strict=True)


@dataclass
class BdLoraConfig(_Typed):
    """Settings for BD-LoRA, which makes A or B block-diagonal.

    Attributes:
        target_modules_bd_a: Substrings; A is block-diagonal at sites whose paths contain one of them, as in PEFT.
        target_modules_bd_b: Substrings; B is block-diagonal at sites whose paths contain one of them.
        nblocks: Number of blocks per factor.
        match_strict: Whether every site must match one of the lists; if False, sites that match neither use plain LoRA.

    Raises:
        ConfigError: A name is in both lists, or `nblocks` is below 1.
    """

    target_modules_bd_a: list[str] | None = None
    target_modules_bd_b: list[str] | None = None
    nblocks: int = 1
    match_strict: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        both = sorted(set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ()))
        if both:
            text = f"Found overlapping modules in target_modules_bd lists: {', '.join(both)}."
            raise ConfigError(text, what=both[0], field="target_modules_bd_a")
        _at_least("nblocks", self.nblocks, 1, "must be at least 1")

    def side_of(self, path: str) -> str:
        """Return which factor is block-diagonal at a site: "A", "B", or "" for neither; a ConfigError for both.

        Neither is a ConfigError too if `match_strict` is set.
        """
        lists = {"A": self.target_modules_bd_a, "B": self.target_modules_bd_b}
        sides = [side for side, names in lists.items() if any(name in path for name in names or ())]
        if len(sides) == 2 or (self.match_strict and not sides):
            many = "both A and B" if sides else "neither A nor B"
            text = f"use_bdlora: {path} matches {many} block-diagonal patterns. List it in one, or unset match_strict."
            raise ConfigError(text, what=path, where=path, field="use_bdlora")
        return "".join(sides)

    def numbers_saved(self, path: str, rank: int, out_features: int, in_features: int) -> int:
        """Return the number of elements of A and B at a site minus the number in plain LoRA; it is never positive."""
        side = self.side_of(path)
        whole, cut = {"A": (rank, in_features), "B": (out_features, rank)}.get(side, (0, 0))
        return whole * (cut // self.nblocks - cut)


@dataclass
class ArrowConfig(_Typed):
    """Settings for Arrow (Ostapenko et al. 2024, arXiv:2405.11157), a router over the other adapters of a model.

    Attributes:
        top_k: Number of adapters selected for each token.
        router_temperature: Temperature of the router's softmax.
        use_gks: Whether to subtract the mean of the general-knowledge adapters from the others before routing
            (arXiv:2505.10939).
        task_adapter_names: Names of the task adapters; set when the router is created.
        gks_adapter_names: Names of the general-knowledge adapters; set when the router is created.
        rng_seed: Random seed of the power iteration that finds the prototypes; None for torch's default generator.

    Raises:
        ConfigError: `top_k` or `router_temperature` is not positive.
    """

    top_k: int = 3
    router_temperature: float = 1.0
    use_gks: bool = False
    task_adapter_names: list[str] | None = field(default=None, init=False)
    gks_adapter_names: list[str] | None = field(default=None, init=False)
    rng_seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("top_k", self.top_k, 0, "cannot be negative or zero", strict=True)
        _at_least("router_temperature", self.router_temperature, 0, "must be greater than 0", strict=True)


@dataclass
class KasaConfig(_Typed):
    """Settings for KaSA (Wang et al. 2024, arXiv:2412.06071).

    Attributes:
        beta: Weight of the penalty on the singular values.
        gamma: Weight of the orthogonality penalty.

    Raises:
        ConfigError: `beta` or `gamma` is negative.
    """

    beta: float = 1e-4
    gamma: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("beta", self.beta, 0, "must be non-negative")
        _at_least("gamma", self.gamma, 0, "must be non-negative")
