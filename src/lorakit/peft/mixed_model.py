"""`PeftMixedModel`: PEFT's wrapper for several active adapters at once; all of them are LoRA here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NoReturn

from torch import nn

from lorakit.config import LoraConfig
from lorakit.errors import AdapterError, ConfigError, ConfigTypeError, NotYetSupported
from lorakit.peft.model import PeftModel


class PeftMixedModel(PeftModel):
    """A wrapper whose active adapters may be several; it is not saved, as PEFT's is not."""

    def __init__(self, model: nn.Module, peft_config: LoraConfig, adapter_name: str = "default") -> None:
        if not isinstance(peft_config, LoraConfig):
            raise ConfigError(
                f"The provided `peft_type` '{getattr(peft_config, 'peft_type', None)}' is not compatible with the "
                "`PeftMixedModel`: it holds LORA adapters."
            )
        super().__init__(model, peft_config, adapter_name)

    @classmethod
    def for_task(cls, task: Any) -> type[PeftModel]:
        """Always this class."""
        return cls

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones; they alone are trained.

        Args:
            adapter_name: One name or several.
            inference_mode: Activate them frozen.

        Raises:
            AdapterError: There is no such adapter.
        """
        self._check_there(adapter_name)
        self.base_model.set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        """Take adapters off.

        Args:
            adapter_name: One name or several.

        Raises:
            AdapterError: There is no such adapter.
        """
        self._check_there(adapter_name)
        for name in [adapter_name] if isinstance(adapter_name, str) else adapter_name:
            self.base_model.delete_adapter(name)

    def _check_there(self, adapter_name: str | Sequence[str]) -> None:
        names = {adapter_name} if isinstance(adapter_name, str) else set(adapter_name)
        if names - set(self.peft_config):
            raise AdapterError(
                f"Adapter(s) {sorted(names - set(self.peft_config))} not found, available adapters: "
                f"{sorted(self.peft_config)}"
            )

    @classmethod
    def from_pretrained(cls, model: nn.Module, model_id: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Load a saved adapter onto a model; see `PeftModel.from_pretrained`."""
        wrapper = PeftModel.from_pretrained(model, model_id, *args, **kwargs)
        mixed = cls.__new__(cls)
        mixed.__dict__ = dict(wrapper.__dict__)
        return mixed

    def get_layer_status(self) -> NoReturn:
        """PEFT does not have it here.

        Raises:
            ConfigTypeError: Always.
        """
        raise ConfigTypeError(f"get_layer_status is not supported for {type(self).__name__}.")

    def get_model_status(self) -> NoReturn:
        """PEFT does not have it here.

        Raises:
            ConfigTypeError: Always.
        """
        raise ConfigTypeError(f"get_model_status is not supported for {type(self).__name__}.")

    def save_pretrained(self, *_: Any, **__: Any) -> NoReturn:
        """PEFT does not have it here; `PeftModel` saves.

        Raises:
            NotYetSupported: Always.
        """
        raise NotYetSupported(f"Saving is not supported for {type(self).__name__} (yet); save from a PeftModel.")

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> NoReturn:
        """PEFT does not have it here.

        Raises:
            NotYetSupported: Always.
        """
        raise NotYetSupported(f"Model card creation is not supported for {type(self).__name__} (yet).")
