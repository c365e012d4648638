"""What every adapted module answers about which adapters act in it: PEFT's words over the state and the own route.

Other programs switch adapters module by module; this is where they can. It knows nothing of factors or weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lorakit.core.routing.route import BASE, Route
from lorakit.core.routing.state import AdapterState
from lorakit.errors import warn_caller


class AdapterModule(nn.Module):
    """A module in which adapters act, as programs of the field ask it.

    Attributes:
        state: What the model's adapted modules share.
        own_route: This module's exception to the model's default, or None.
        aside: The exception that was in force before this module's adapters were disabled; a tuple, empty where they
            are not.
    """

    state: AdapterState
    own_route: Route | None
    aside: tuple[Route | None, ...] = ()

    def __setstate__(self, known: dict[str, Any]) -> None:
        super().__setstate__(known)
        self.state.join(self)  # a copy belongs to the copied state

    def available_adapters(self) -> list[str]:
        """Adapters that have something here."""
        return []

    def parameters_of(self, name: str) -> list[nn.Parameter]:
        """The parameters of an adapter here, (…); none where it has nothing."""
        return []

    def remove(self, name: str) -> None:
        """Drop what an adapter has here; one that has nothing is no matter."""

    def drop_exception(self, name: str) -> None:
        """End this module's exception to the model's default, where it names an adapter that leaves."""
        if self.own_route is not None and name in self.own_route.mentions:
            self.own_route = None
        if self.aside and self.aside[0] is not None and name in self.aside[0].mentions:
            self.aside = (None,)

    def set_trained(self, name: str, trained: bool) -> None:
        """Train what an adapter has here, or freeze it.

        Args:
            name: The adapter; one that has nothing here is no matter.
            trained: Its parameters require gradients.
        """
        for parameter in self.parameters_of(name):
            if parameter.requires_grad is not trained:
                parameter.requires_grad_(trained and parameter.is_floating_point())

    @property
    def active_adapters(self) -> list[str]:
        """The adapters that act here, also while they are disabled."""
        if self.aside:
            chosen = self.aside[0] or self.state.chosen
        else:
            now = self.state.active() if self.own_route is None else self.own_route
            chosen = now if now.mentions or self.own_route is not None else self.state.chosen
        return list(chosen.names)

    @property
    def active_adapter(self) -> str | list[str]:
        """The adapter that acts here, or a list where there is not exactly one."""
        names = self.active_adapters
        return names[0] if len(names) == 1 else names

    @property
    def disable_adapters(self) -> bool:
        """Whether adapters are switched off here: by `enable_adapters`, for the model, or by a block around it."""
        if self.aside or self.state.aside is not None:
            return True
        return not self.state.active().mentions and bool(self.state.chosen.names)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch this module's adapters off, or on again; what is trained stays so.

        Args:
            enabled: On.
        """
        if not enabled and not self.aside:
            self.aside, self.own_route = (self.own_route,), BASE
        elif enabled and self.aside:
            self.own_route, self.aside = self.aside[0], ()

    def set_adapter(self, adapter_names: str | Sequence[str], inference_mode: bool = False) -> None:
        """Make an exception to the model's default in this module alone; `activate` on the model ends it.

        Args:
            adapter_names: One adapter or several; none means the base alone. They alone are trained here.
            inference_mode: They are not trained either.

        Raises:
            RouteError: There is no such adapter on the model.
        """
        names = (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)
        self.state.check(names)
        self.own_route, self.aside = Route(names), ()
        for name in self.available_adapters():
            self.set_trained(name, name in names and not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Train adapters here, or freeze them, whatever acts.

        Args:
            adapter_names: One adapter or several.
            requires_grad: Train them.
        """
        for name in (adapter_names,) if isinstance(adapter_names, str) else adapter_names:
            self.set_trained(name, requires_grad)

    def delete_adapter(self, adapter_name: str, new_active_adapters: Sequence[str] | None = None) -> None:
        """Drop what an adapter has here; where it alone acted, the first that is left does.

        Args:
            adapter_name: The adapter; one that has nothing here is no matter.
            new_active_adapters: PEFT's; what acts follows from what is left.
        """
        active = self.active_adapters
        self.remove(adapter_name)
        if adapter_name not in active:
            return
        rest = [name for name in active if name != adapter_name]
        left = sorted(self.available_adapters())
        if not rest and left:
            warn_caller(f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {left[0]}.")
        self.set_adapter(rest or left[:1])

    def _get_available_adapters(self) -> set[str]:
        """PEFT's name for `available_adapters`."""
        return set(self.available_adapters())
