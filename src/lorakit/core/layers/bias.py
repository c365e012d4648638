"""Trained biases (`bias="all"`, `"lora_only"`), and the biases that a merge brings.

The switch of a bias that an adapter trains in place: other routes see the base's, by a hook on its module.

The bias that an adapter brings with B (`lora_bias`), written into the base's by a merge and out again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lorakit.core.clones import clone_with
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.quantization import at_least_fp32
from lorakit.core.routing.recompute import Forwards
from lorakit.core.routing.route import Route
from lorakit.core.routing.state import AdapterState, resolve
from lorakit.errors import MergeError, MixedRowsError, RowCountError


class BiasPatch:
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
        """The old biases (…) of a module by name, on the device and in the dtype that it has now."""
        now = {name: getattr(module, name) for name in self.originals}  # not from _parameters: FSDP, in a forward
        return {name: old.to(now[name].device, now[name].dtype) for name, old in self.originals.items()}

    def _before(self, module: nn.Module) -> nn.Module:
        """A clone of a module as it was before this adapter."""
        clone = clone_with(module, self.old(module))
        if isinstance(module, nn.MultiheadAttention):
            inside = out_projection(module)
            for switch in BiasPatch.on(inside):
                if switch.adapter == self.adapter:
                    clone._modules["out_proj"] = clone_with(inside, switch.old(inside))
        return clone

    @staticmethod
    def on(module: nn.Module) -> list[BiasPatch]:
        """The switches that hang on a module."""
        return [hook for hook in module._forward_hooks.values() if isinstance(hook, BiasPatch)]

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
            if isinstance(hook, BiasPatch):
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)

    @staticmethod
    def uninstall(module: nn.Module, adapters: Collection[str]) -> None:
        """Take the switches of some adapters off a module and give it its old biases back, bit for bit."""
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, BiasPatch) and hook.adapter in adapters:
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


def brings_bias(layer: LoraLayer, names: Sequence[str]) -> bool:
    """Whether one of some adapters has a bias of its own at a site (`lora_bias`)."""
    return any(name in layer.r and layer.factor(name).bias is not None for name in names)


def bias_for(layer: LoraLayer, names: Sequence[str]) -> Tensor | None:
    """The base's bias, (out,), with those of adapters in it; None where nothing was or is written to it.

    Raises:
        MergeError: It would not be finite.
    """
    old = layer.original_bias()
    if old is None or not brings_bias(layer, names):
        if layer.kept_bias is not None:
            layer.kept_bias = old  # as the base is now, which may have been cast
        return layer.kept_bias
    with torch.no_grad():
        total = at_least_fp32(old).clone()
        for name in names:
            factor = layer.factor(name)
            if factor.bias is not None:
                total += factor.bias.to(total.dtype) * factor.scale
        if not bool(torch.isfinite(total).all()):
            raise MergeError(
                f"NaNs detected in the merged weights: the bias of B of {', '.join(names)} is NaN or infinite. Nothing "
                "was changed."
            )
        return total.to(old.dtype)


def check_place(path: str, layer: LoraLayer, names: Sequence[str]) -> None:
    """Refuse to write adapters' own biases where the base has none, or into one that another adapter trains in place.

    Raises:
        MergeError: The message names the site.
    """
    trainer = None if layer.old_bias is None else layer.old_bias[0]
    for name in names:
        if trainer is not None and name != trainer and brings_bias(layer, [name]):
            raise MergeError(
                f"Adapter {name!r} brings a bias of its own (lora_bias), and adapter {trainer!r} trains the base's at "
                f"{path}, so it cannot be merged. Detach {trainer!r} first.",
                what=name,
                where=path,
                field="lora_bias",
            )
    if layer.original_bias() is None and brings_bias(layer, names):
        raise MergeError(
            f"Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias: {path} has no "
            "place for the adapter's.",
            where=path,
            field="lora_bias",
        )


def check_replaceable(model_layers: Iterable[tuple[str, LoraLayer]], names: Sequence[str], in_place: bool) -> None:
    """Refuse to put a dense module where an adapter trains the bias of the one that stands there.

    Args:
        model_layers: Paths and layers of a model.
        names: The adapters that shall be merged with dense=True.
        in_place: Adapters stay on the model.

    Raises:
        MergeError: The message names the adapter and the site.
    """
    for path, layer in model_layers:
        replaces = layer.base.quantised or layer.slot.groups > 1
        if layer.old_bias is None or not replaces or not any(name in layer.r for name in names):
            continue
        trainer = layer.old_bias[0]
        if in_place or trainer not in names:
            raise MergeError(
                f"dense=True puts another module at {path}, whose bias adapter {trainer!r} trains in place. Detach "
                f"{trainer!r} first, or merge with dense=False.",
                what=trainer,
                where=path,
            )


def put_bias(layer: LoraLayer, bias: Tensor | None) -> None:
    """Put what `bias_for` made, (out,), in place; None leaves the bias alone."""
    if bias is None:
        return
    old = layer.original_bias()
    layer.kept_bias = None if bias is layer.kept_bias or old is None else old.detach()
    set_bias(layer.owner, bias)


def set_bias(module: nn.Module, bias: Tensor) -> None:
    """Make a tensor (out,) the bias of a module, whether that is a parameter of it or, as in HQQ, a mere attribute."""
    held = module._parameters.get("bias")
    if held is not None:
        held.data = bias
    else:
        module.__dict__["bias"] = bias
