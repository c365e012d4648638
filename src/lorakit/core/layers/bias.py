"""Trained biases (`bias="all"` or `"lora_only"`): base biases that an adapter trains in place.

If a route does not include that adapter, a hook on the module applies the original biases instead.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lorakit.core.clones import clone_with
from lorakit.core.layers.adapter_component import AdapterComponent, MergeOptions, StagedMerge
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.routing.recompute import Forwards
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import AdapterState, resolve
from lorakit.errors import MixedRowsError

R = TypeVar("R")


class BiasPatch(AdapterComponent):
    """A forward hook for a module whose biases an adapter trains in place; other routes get the original biases.

    If the adapter is not active, a shallow clone of the module repeats the forward pass with the `originals`. The
    output is bitwise identical to the base output, and other threads are not affected. The hook runs before all other
    hooks of the module, so those hooks see the corrected output.
    """

    part_of_module = True  # clones that drop other hooks keep this one

    def __init__(self, module: nn.Module, adapter: str, originals: dict[str, Tensor], state: AdapterState) -> None:
        self.module, self.adapter, self.originals, self.state = module, adapter, originals, state
        self.forwards = Forwards()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: R) -> R | Tensor:
        """Return the output, recomputed with the original biases for the rows that do not use the adapter."""
        route, again = resolve(self.state, None, self.forwards)
        result = self._under(route, module, args, kwargs, output)
        self.forwards.note(result, route, again)
        return result

    def _under(
        self, route: Route, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: R
    ) -> R | Tensor:
        if route.common_to_all(frozenset({self.adapter})):
            return output
        old: R = self._before(module).forward(*args, **kwargs)  # the other hooks run on the module itself
        if route.rows is None or self.adapter not in route.mentions:
            return old
        if not (isinstance(output, Tensor) and isinstance(old, Tensor)):
            kind = type(output).__name__
            text = f"The rows use different adapters, but a module with biases of {self.adapter!r} returns a {kind}."
            raise MixedRowsError(text, what=kind, field="bias")
        rows = route.rows_of(output.shape[0])
        if rows is None:
            place = "the output of a module with a trained bias"
            raise route.mismatch(place, tuple(output.shape), self.adapter, "bias")
        ours = torch.tensor([row == self.adapter for row in rows], device=output.device)
        return torch.where(ours.view(-1, *[1] * (output.ndim - 1)), output, old)

    def old(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the original biases by name, on the device and in the dtype of the base module, or a clone of it."""
        now = {name: getattr(module, name) for name in self.originals}  # FSDP can move parameters out of _parameters
        return {name: old.to(now[name].device, now[name].dtype) for name, old in self.originals.items()}

    def _before(self, module: nn.Module) -> nn.Module:
        """Return a clone of a module with the biases that it had before this adapter trained them."""
        clone = clone_with(module, self.old(module))
        if isinstance(module, nn.MultiheadAttention):
            inside = out_projection(module)
            for patch in BiasPatch.on(inside):
                if patch.adapter == self.adapter:
                    clone._modules["out_proj"] = clone_with(inside, patch.old(inside))
        return clone

    def available_adapters(self) -> list[str]:
        """Return a list with the adapter that trains the biases."""
        return [self.adapter]

    def parameters_of(self, adapter: str) -> list[nn.Parameter]:
        """Return the biases if the given adapter trains them, else an empty list."""
        return [self.module.get_parameter(name) for name in self.originals] if adapter == self.adapter else []

    def saved_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Return the biases, keyed by name, if the given adapter trains them, else an empty dict."""
        return dict(zip(self.originals, self.parameters_of(adapter), strict=False))

    def remove(self, adapter: str) -> nn.Module:
        """Restore the original biases bit for bit if the given adapter trains them; return the module."""
        if adapter == self.adapter:
            self.unload()
            for name, old in self.originals.items():
                parameter = self.module.get_parameter(name)
                with torch.no_grad():
                    parameter.copy_(old)
                parameter.requires_grad_(False)
        return self.module

    def stage_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> StagedMerge | None:
        """Return None: the biases are trained in place, so there is nothing to merge."""
        return None

    def stage_unmerge(self, adapters: Sequence[str]) -> StagedMerge | None:
        """Return None: a merge does not change the biases."""
        return None

    def merged_tensors(self, adapters: Sequence[str], options: MergeOptions) -> dict[str, Tensor]:
        """Return the biases, keyed by name, if one of the given adapters trains them, else an empty dict."""
        return {name: bias.detach() for adapter in adapters for name, bias in self.saved_tensors(adapter).items()}

    def unload(self) -> nn.Module:
        """Keep the trained biases, remove the hook, and return the module."""
        hooks = self.module._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is self]:
            del hooks[key], self.module._forward_hooks_with_kwargs[key]
        return self.module

    @staticmethod
    def on(module: nn.Module) -> list[BiasPatch]:
        """Return the `BiasPatch` hooks that are registered on a module."""
        return [hook for hook in module._forward_hooks.values() if isinstance(hook, BiasPatch)]

    @staticmethod
    def install(
        adapter: str, originals: dict[str, Tensor], module: nn.Module, state: AdapterState, trained: bool
    ) -> None:
        """Give a module's biases to an adapter; a hook applies the original ones to rows that do not use it."""
        state.biased = True
        patch = BiasPatch(module, adapter, originals, state)
        module.register_forward_hook(patch, with_kwargs=True, prepend=True)
        for parameter in patch.parameters_of(adapter):
            parameter.requires_grad_(trained)

    @staticmethod
    def uninstall(module: nn.Module, adapters: Collection[str]) -> None:
        """Restore a module's original biases bit for bit if one of the given adapters trains them."""
        for patch in BiasPatch.on(module):
            if patch.adapter in adapters:
                patch.remove(patch.adapter)


def out_projection(attention: nn.MultiheadAttention) -> nn.Module:
    """Return the base module of an attention's output projection, whose weight and bias it reads without calling it."""
    inside = attention.get_submodule("out_proj")
    return inside.owner if isinstance(inside, LoraLayer) else inside
