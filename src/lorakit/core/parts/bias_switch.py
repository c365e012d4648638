"""The switch of a bias that an adapter trains in place: other routes see the base's, by a hook on its module."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.layering.cloning import clone_with
from lorakit.core.layering.layer import LoraLayer
from lorakit.core.routes.forwards import Forwards
from lorakit.core.routes.route import Route
from lorakit.core.routes.routing import AdapterState, resolve
from lorakit.errors import RouteError


class BiasSwitch:
    """A forward hook on a module whose bias an adapter trains in place: other routes get the old bias.

    Where the adapter is not active, the module runs once more as a shallow clone with the bias it had before,
    so the result has the base's very bits, and nothing is swapped under another thread. It comes before the module's
    other hooks, which so see what it makes.
    """

    part_of_module = True  # clones that drop other people's hooks keep it

    def __init__(self, adapter: str, originals: dict[str, Tensor], state: AdapterState) -> None:
        self.adapter = adapter
        self.originals = originals
        self.state = state
        self.forwards = Forwards()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """The hook: the output as it is, or made anew with the old bias, for the rows that want it."""
        route, again = resolve(self.state, None, self.forwards)
        result = self._under(route, module, args, kwargs, output)
        if not torch.compiler.is_compiling():
            self.forwards.note(result, route, again)
        return result

    def _under(
        self, route: Route, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        if route.common_to_all(frozenset({self.adapter})):
            return output
        old = self._before(module).forward(*args, **kwargs)  # hooks before it ran already, and those behind it will
        if route.rows is None or self.adapter not in route.mentions:
            return old
        if not isinstance(output, Tensor):
            raise RouteError(
                f"The rows of this batch have different adapters, and a {type(module).__name__} whose biases "
                f"{self.adapter!r} trains returns a {type(output).__name__}, whose rows cannot be put together. Run "
                "the rows of each adapter on their own with `use`."
            )
        rows = route.rows_of(output.shape[0])
        if rows is None:
            raise RouteError(
                f"The route names {len(route.rows)} rows, and a module with a trained bias returned "
                f"{tuple(output.shape)}. Give one adapter per row of the batch."
            )
        ours = torch.tensor([row == self.adapter for row in rows], device=output.device)
        return torch.where(ours.view(-1, *[1] * (output.ndim - 1)), output, old)

    def old(self, module: nn.Module) -> dict[str, Tensor]:
        """The old biases (…) of a module by name, on the device and in the dtype that it has now."""
        now = {name: getattr(module, name) for name in self.originals}  # not from _parameters: FSDP, in a forward
        return {name: old.to(now[name].device, now[name].dtype) for name, old in self.originals.items()}

    def _before(self, module: nn.Module) -> nn.Module:
        """A clone of a module as it was before this adapter."""
        clone = clone_with(module, self.old(module))
        if isinstance(module, nn.MultiheadAttention):
            inside = out_projection(module)
            for switch in BiasSwitch.on(inside):
                if switch.adapter == self.adapter:
                    clone._modules["out_proj"] = clone_with(inside, switch.old(inside))
        return clone

    @staticmethod
    def on(module: nn.Module) -> list[BiasSwitch]:
        """The switches that hang on a module."""
        return [hook for hook in module._forward_hooks.values() if isinstance(hook, BiasSwitch)]

    @classmethod
    def install(cls, adapter: str, originals: dict[str, Tensor], module: nn.Module, state: AdapterState) -> None:
        """Hang a switch with a module's old biases on it, and make the biases trainable."""
        state.biased = True
        module.register_forward_hook(cls(adapter, originals, state), with_kwargs=True, prepend=True)
        for name in originals:
            module._parameters[name].requires_grad_(True)  # type: ignore[union-attr]

    @staticmethod
    def forget(module: nn.Module) -> None:
        """Take every switch off a module and leave its biases as they were trained."""
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, BiasSwitch):
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)

    @staticmethod
    def uninstall(module: nn.Module, adapters: Collection[str]) -> None:
        """Take the switches of some adapters off a module and give it its old biases back, bit for bit."""
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, BiasSwitch) and hook.adapter in adapters:
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                for name, old in hook.originals.items():
                    parameter: nn.Parameter = module._parameters[name]  # type: ignore[assignment]
                    with torch.no_grad():
                        parameter.copy_(old)
                    parameter.requires_grad_(False)


def out_projection(attention: nn.MultiheadAttention) -> nn.Module:
    """The base's projection at the end of an attention, which reads its weight and bias and never calls it."""
    inside: nn.Module = attention._modules["out_proj"]  # type: ignore[assignment]
    return inside.owner if isinstance(inside, LoraLayer) else inside
