"""`LoraModel`: the tuner of LoRA adapters; what `PeftModel.base_model` is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from lorakit.architectures.default_targets import DEFAULT_TARGETS
from lorakit.peft.tuner import BaseTuner
from lorakit.peft.weighted import add_weighted_adapter

TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING = dict(DEFAULT_TARGETS)
"""What is adapted where a config names nothing, under PEFT's name; programs put architectures of their own in it."""


class LoraModel(BaseTuner):
    """Holds the user's model and acts on its LoRA adapters."""

    target_module_mapping: ClassVar[Mapping[str, Any]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        **options: Any,
    ) -> None:
        """Combine adapters into a new one, which is frozen and not active; see `weighted.add_weighted_adapter`.

        Args:
            adapters: Their names.
            weights: One number each; negative ones subtract.
            adapter_name: The new adapter's name.
            combination_type: One of `lorakit.core.WAYS`.
            options: What the way takes: svd_rank, svd_clamp, density, ...

        Raises:
            AdapterError: There is no such adapter, or the adapters cannot be combined.
            ConfigError: The way does not exist or lacks something, or the ranks do not fit it.
        """
        add_weighted_adapter(self.model, adapters, weights, adapter_name, combination_type, **options)
