"""Trained biases (`bias="all"`, `"lora_only"`): a bias of the base that an adapter trains in place.

Other routes get the old bias, by a hook on the module.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.clones import clone_with
from lorakit.core.layers.adapter_component import AdapterComponent, MergeOptions, StagedMerge
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.routing.recompute import Forwards
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import AdapterState, resolve
from lorakit.errors import MixedRowsError, RowCountError


class BiasHook:
    """A forward hook on a module whose bias an adapter trains in place: other routes get the old bias.

    If the adapter is not active, the module runs once more as a shallow clone with the bias it had before, so the
    result has the bits of the base, and nothing is swapped under another thread. The hook comes before the module's
    other hooks, so they see its output.
    """

    part_of_module = True  # clones that drop other people's hooks keep it

    def __init__(self, adapter: str, originals: dict[str, Tensor], state: AdapterState) -> None:
        self.adapter = adapter
        self.originals = originals
        self.state = state
        self.forwards = Forwards()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Return the output, computed again with the old bias for the rows that do not use the adapter."""
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
            raise MixedRowsError(
                f"The rows of this batch have different adapters, and a {type(module).__name__} whose biases "
                f"{self.adapter!r} trains returns a {type(output).__name__}, whose rows cannot be put together. Run "
                "the rows of each adapter on their own with `use`.",
                what=type(output).__name__,
                field="bias",
            )
        rows = route.rows_of(output.shape[0])
        if rows is None:
            raise RowCountError(
                f"The route names {len(route.rows)} rows, and a module with a trained bias returned "
                f"{tuple(output.shape)}. Give one adapter per row of the batch."
            )
        ours = torch.tensor([row == self.adapter for row in rows], device=output.device)
        return torch.where(ours.view(-1, *[1] * (output.ndim - 1)), output, old)

    def old(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the old biases (…) of a module by name, on the device and in the dtype that it has now."""
        now = {name: getattr(module, name) for name in self.originals}  # not from _parameters: FSDP, in a forward
        return {name: old.to(now[name].device, now[name].dtype) for name, old in self.originals.items()}

    def _before(self, module: nn.Module) -> nn.Module:
        """Return a clone of a module with the biases from before this adapter."""
        clone = clone_with(module, self.old(module))
        if isinstance(module, nn.MultiheadAttention):
            inside = out_projection(module)
            for hook in _hooks(inside).values():
                if hook.adapter == self.adapter:
                    clone._modules["out_proj"] = clone_with(inside, hook.old(inside))
        return clone


@dataclass(eq=False)
class BiasPatch(AdapterComponent):
    """The biases of one module that an adapter trains in place.

    Attributes:
        module: The base's module, whose parameters are the trained biases.
        hook: What gives other routes the old biases.
        key: Number of the hook on the module.
        state: What the model's adapted modules share.
    """

    module: nn.Module
    hook: BiasHook
    key: int
    state: AdapterState

    @property
    def adapter(self) -> str:
        """The adapter that trains the biases."""
        return self.hook.adapter

    @property
    def originals(self) -> dict[str, Tensor]:
        """Name of each bias -> what it was before, (…)."""
        return self.hook.originals

    def old(self) -> dict[str, Tensor]:
        """Return the old biases (…) by name, on the device and in the dtype that the module has now."""
        return self.hook.old(self.module)

    def available_adapters(self) -> list[str]:
        """Return the adapter that trains the biases, in a list."""
        return [self.adapter]

    def parameters_of(self, adapter: str) -> list[nn.Parameter]:
        """Return the biases, (…), if this adapter trains them."""
        if adapter != self.adapter:
            return []
        return [held for name in self.originals if (held := self.module._parameters[name]) is not None]

    def saved_tensors(self, adapter: str) -> dict[str, Tensor]:
        """Return the biases by name, (…), if this adapter trains them."""
        found = {name: self.module._parameters[name] for name in self.originals} if adapter == self.adapter else {}
        return {name: held for name, held in found.items() if held is not None}

    def remove(self, adapter: str) -> nn.Module:
        """Restore the old biases bit for bit, if this adapter trains them, and return the module."""
        if adapter == self.adapter:
            self._unhook()
            for name, old in self.originals.items():
                parameter: nn.Parameter = self.module._parameters[name]  # type: ignore[assignment]
                with torch.no_grad():
                    parameter.copy_(old)
                parameter.requires_grad_(False)
        return self.module

    def stage_merge(self, path: str, adapters: Sequence[str], options: MergeOptions) -> StagedMerge | None:
        """Return None: the biases are trained in the base's own parameters."""
        return None

    def stage_unmerge(self, adapters: Sequence[str]) -> StagedMerge | None:
        """Return None, as for `stage_merge`."""
        return None

    def merged_tensors(self, adapters: Sequence[str], options: MergeOptions) -> dict[str, Tensor]:
        """Return the biases by name, (…), if one of these adapters trains them."""
        return {name: held.detach() for adapter in adapters for name, held in self.saved_tensors(adapter).items()}

    def unload(self) -> nn.Module:
        """Leave the biases as they were trained, and return the module."""
        self._unhook()
        return self.module

    def _unhook(self) -> None:
        self.module._forward_hooks.pop(self.key, None)
        self.module._forward_hooks_with_kwargs.pop(self.key, None)

    @staticmethod
    def on(module: nn.Module) -> list[BiasPatch]:
        """Return the patches of a module's biases."""
        if not module._forward_hooks:
            return []
        return [BiasPatch(module, hook, key, hook.state) for key, hook in _hooks(module).items()]

    @staticmethod
    def install(adapter: str, originals: dict[str, Tensor], module: nn.Module, state: AdapterState) -> None:
        """Make biases of a module trainable, and give other routes the old ones, (…)."""
        state.biased = True
        hook = BiasHook(adapter, originals, state)
        module.register_forward_hook(hook, with_kwargs=True, prepend=True)
        for name in originals:
            module._parameters[name].requires_grad_(True)  # type: ignore[union-attr]

    @staticmethod
    def uninstall(module: nn.Module, adapters: Collection[str]) -> None:
        """Restore the old biases of a module that some adapters train, bit for bit."""
        for patch in BiasPatch.on(module):
            if patch.adapter in adapters:
                patch.remove(patch.adapter)


def _hooks(module: nn.Module) -> dict[int, BiasHook]:
    return {key: hook for key, hook in module._forward_hooks.items() if isinstance(hook, BiasHook)}


def out_projection(attention: nn.MultiheadAttention) -> nn.Module:
    """Return the base's output projection of an attention, which reads its weight and bias without calling it."""
    inside: nn.Module = attention._modules["out_proj"]  # type: ignore[assignment]
    return inside.owner if isinstance(inside, LoraLayer) else inside
