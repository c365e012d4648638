"""The costs of each variant: what it trains, freezes, draws and reads, so that plans need no torch.

`lorakit.core.variants` has the arithmetic; its entries and these have the same config fields, which a test compares.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from lorakit.config.lora import LoraConfig


def _none(config: LoraConfig, path: str, rank: int, out_features: int, in_features: int) -> int:
    return 0


@dataclass(frozen=True)
class VariantCosts:
    """Costs of a variant at a dense site or embedding, in comparison with plain LoRA.

    Attributes:
        field: Config field that selects the variant.
        trained: Function from config, path, rank, out_features and in_features to the number of values that the variant
            trains in addition to A and B; negative if its A and B are smaller than those of LoRA.
        smaller: Function from config and path to the factor, "A" or "B", that is smaller if `trained` is negative.
        drawn: Function of the same arguments to the number of values that a training forward pass draws for A and saves
            for the backward pass.
        frozen: Which of "A" and "B" are never trained.
        reads_weight: Whether the variant trains one value per output and reads the base weight in each forward pass.
        note: Note in plans, to be formatted with `total`, the absolute number of additional or saved values.
        peft_type: The `peft_type` on disk of a variant that PEFT lacks and would load as plain LoRA: PEFT rejects files
            of a type that it does not know. "" for LORA.
    """

    field: str
    trained: Callable[[LoraConfig, str, int, int, int], int] = _none
    smaller: Callable[[LoraConfig, str], str] = lambda config, path: ""
    drawn: Callable[[LoraConfig, str, int, int, int], int] = _none
    frozen: frozenset[str] = frozenset()
    reads_weight: bool = False
    note: str = ""
    peft_type: str = ""


def _blocks(config: LoraConfig, path: str, rank: int, out_features: int, in_features: int) -> int:
    return config.use_bdlora.numbers_saved(path, rank, out_features, in_features) if config.use_bdlora else 0


def _side(config: LoraConfig, path: str) -> str:
    return "" if config.use_bdlora is None else config.use_bdlora.side_of(path)


def _samples(config: LoraConfig) -> int:
    return 0 if config.monteclora_config is None else config.monteclora_config.num_samples


VARIANT_COSTS = (
    VariantCosts("use_bdlora", _blocks, _side, note="BD-LoRA's factors hold {total:,} fewer values than LoRA's."),
    VariantCosts(
        "use_qalora",
        lambda config, path, rank, out, width: rank * (width // config.qalora_group_size - width),
        lambda config, path: "A",
        note="QA-LoRA's A, which reads means of groups of inputs, holds {total:,} fewer values than LoRA's.",
    ),
    VariantCosts(
        "kasa_config",
        lambda config, path, rank, out, width: rank,
        note="KaSA adds r singular values per site: {total:,} in total.",
    ),
    VariantCosts(
        "monteclora_config",
        lambda config, path, rank, out, width: rank + _samples(config),
        drawn=lambda config, path, rank, out, width: (
            (_samples(config) + 1) * rank * width
        ),  # the samples and their mean
        note="MonteCLoRA adds r spreads and one weight per sample at each site: {total:,} in total.",
    ),
    VariantCosts(
        "use_dora",
        lambda config, path, rank, out, width: out,
        reads_weight=True,
        note="DoRA adds one magnitude per output of each site: {total:,} in total.",
    ),
    VariantCosts("alora_invocation_tokens"),
    VariantCosts("velora_config"),
    VariantCosts("arrow_config"),
    VariantCosts(
        "use_lora_xs",
        lambda config, path, rank, out, width: rank * rank,
        frozen=frozenset({"A", "B"}),
        note="LoRA-XS trains one r × r matrix at each site: {total:,} values in total.",
        peft_type="LORA_XS",
    ),
)


def check_method(config: LoraConfig, peft_type: str | None) -> None:
    """Raise a ConfigError if a config has the `peft_type` of another variant, as which its tensors would be read."""
    costs = next((costs for costs in VARIANT_COSTS if costs.peft_type and costs.peft_type == peft_type), None)
    if costs is not None and not getattr(config, costs.field):
        text = f"peft_type is {peft_type!r}, but {costs.field} is not set. Set it, or use an unmodified config."
        raise ConfigError(text, what=peft_type, field="peft_type")


def costs_of(config: LoraConfig) -> VariantCosts | None:
    """Return the costs of the variant that a config selects, or None for plain LoRA."""
    return next((costs for costs in VARIANT_COSTS if getattr(config, costs.field)), None)
