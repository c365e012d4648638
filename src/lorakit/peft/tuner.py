"""`LoraModel`: what a `PeftModel` calls its `base_model`, with the operations on the adapters of the model inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lorakit import core
from lorakit.config import LoraConfig
from lorakit.core.activation import parameters_by_adapter
from lorakit.core.checks import ALLOWANCES
from lorakit.core.merging import tied_sites
from lorakit.core.sitemap import find_state
from lorakit.errors import AdapterError, warn_caller


class LoraModel(nn.Module):
    """Holds the user's model and acts on its adapters.

    Attributes:
        model: The user's own model, adapted in place.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The user's model's own forward."""
        return self.model(*args, **kwargs)

    @property
    def peft_config(self) -> dict[str, LoraConfig]:
        """Adapter -> config; the live table."""
        state = find_state(self.model)
        return {} if state is None else state.configs

    @property
    def active_adapters(self) -> list[str]:
        """The adapters of the route in force."""
        state = find_state(self.model)
        return [] if state is None else list(state.active().names)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name, or a list where several are active."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def targeted_module_names(self) -> list[str]:
        """Paths of the adapted modules."""
        return [site.path for site in core.sites(self.model)]

    def inject(self, name: str, config: LoraConfig) -> None:
        """Attach a fresh adapter; entries that match nothing are warned about by name.

        Args:
            name: Its name.
            config: Its config; it is copied.

        Raises:
            AdapterError: The name is taken or cannot be used.
            TargetError: Nothing matches.
            ConfigError: The config does not fit.
        """
        report = core.attach(self.model, config, name, allow=ALLOWANCES)  # PEFT goes on; here each comes with a warning
        for sentence in report.missing:
            warn_caller(sentence)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones; they alone are trained.

        Args:
            adapter_name: One name or several.
            inference_mode: Activate them frozen.

        Raises:
            RouteError: There is no such adapter.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        core.activate(self.model, *names)
        for name, parameters in parameters_by_adapter(self.model, self.peft_config).items():
            trained = name in names and not inference_mode
            for parameter in parameters:
                parameter.requires_grad_(trained and parameter.is_floating_point())

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off; with an active one gone, the first that is left becomes active.

        Args:
            adapter_name: Its name.

        Raises:
            AdapterError: There is no such adapter.
        """
        if adapter_name not in self.peft_config:
            raise AdapterError(f"Adapter {adapter_name} does not exist")
        core.detach(self.model, adapter_name)
        left = list(self.peft_config)
        if left and not self.active_adapters:
            warn_caller(f"Adapter {adapter_name} was active; {left[0]} is now.")
            self.set_adapter(left[0])

    def enable_adapter_layers(self) -> None:
        """Undo `disable_adapter_layers`."""
        core.activate(self.model, *self.__dict__.pop("_disabled", self.active_adapters))

    def disable_adapter_layers(self) -> None:
        """Run the base alone until `enable_adapter_layers`; for a block, `disable_adapter` is safer."""
        self.__dict__.setdefault("_disabled", self.active_adapters)
        core.activate(self.model)

    def merge_adapter(self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters into the base weights; the originals are kept, so `unmerge_adapter` restores their bits.

        Args:
            adapter_names: Which; None means the active ones.
            safe_merge: Accepted and always true: a merge that is not finite is refused.

        Raises:
            MergeError: An adapter cannot be merged, or is merged already.
            AdapterError: There is no such adapter.
        """
        core.merge(self.model, *(adapter_names or ()), untie=self._warn_of_ties(adapter_names))

    def unmerge_adapter(self) -> None:
        """Take every merged adapter out again, to the very bit."""
        core.unmerge(self.model)

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> nn.Module:
        """Merge for good and give the plain model back.

        Args:
            progressbar: Accepted; nothing is drawn.
            safe_merge: Accepted and always true.
            adapter_names: Which; None means the active ones.

        Returns:
            The user's model, without any trace of adapters.

        Raises:
            MergeError: An adapter cannot be merged.
            AdapterError: There is no such adapter.
        """
        if self._warn_of_ties(adapter_names):
            config = getattr(self.model, "config", None)
            if config is not None:
                config.tie_word_embeddings = False
            core.merge_and_unload(self.model, *(adapter_names or ()), untie=True)
        else:
            core.merge_and_unload(self.model, *(adapter_names or ()))
        return self.model

    def unload(self) -> nn.Module:
        """Take all adapters off and give the plain base back."""
        core.detach(self.model)
        return self.model

    def _warn_of_ties(self, adapter_names: Iterable[str] | None) -> bool:
        """Whether a merge must untie weights; it is said when it must."""
        tied = tied_sites(self.model, tuple(adapter_names or self.active_adapters))
        if tied:
            path, other = tied[0]
            warn_caller(
                f"{path} shares its weight with {other}; merging gives it a weight of its own, so the model is no "
                "longer tied (tie_word_embeddings is False from now on)."
            )
        return bool(tied)
