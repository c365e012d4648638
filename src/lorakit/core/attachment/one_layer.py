"""Give one adapted layer new factors; the other layers of its model do not change."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.attachment.build import conflict, fresh_factor
from lorakit.core.attachment.residual_base import give_base_back
from lorakit.core.inits import InitContext, init_for
from lorakit.core.layers.lora_layer import LoraLayer
from lorakit.core.model.checks import check_new_name
from lorakit.core.model.index import AdapterIndex, TargetWeight
from lorakit.core.variants import Start, variant_for
from lorakit.errors import ConfigError
from lorakit.targets import Match

LAYER = "layer"


def put_fresh_factor(layer: LoraLayer, name: str, config: LoraConfig, rank: int, alpha: float, path: str = "") -> None:
    """Give a layer new factors for an adapter; existing factors of the adapter are replaced.

    If the model has no adapter of this name, its config is added to those of the model. The rank and alpha patterns of
    the config are ignored; `path` is for messages and for settings that depend on it.

    Raises:
        AdapterError: `name` cannot be the name of an adapter.
        ConfigError: The rank is below 1, or the init or the variant is not supported in this layer or needs the model.
        MergeError: The adapter is merged into this layer.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError.of("r", rank, "a positive integer value")
    if name not in layer.state.configs:
        check_new_name(layer.state, name)
    layer.check_not_merged(path, [name])
    _check_alone(layer, config, path)
    index = AdapterIndex.of(nn.ModuleDict({LAYER: layer}))  # an index needs a model around the layer
    target = TargetWeight(path or LAYER, LAYER, layer.kind, layer.spec)
    match = Match(LAYER, layer.kind_name, rank, alpha, "")
    new = fresh_factor(index, config, match, target, lambda _: None, None)
    if name in layer.moved_by:
        give_base_back(layer, name)
    override, aside = layer.own_route, layer.aside
    layer.remove(name)
    layer.state.configs.setdefault(name, config.with_fields())
    layer.put(name, new.factor, rank, alpha, new.trains)
    layer.own_route, layer.aside = override, aside


def _check_alone(layer: LoraLayer, config: LoraConfig, path: str) -> None:
    """Check that a config's init and variant need no more than one layer."""
    init, (variant, _) = init_for(config.init_lora_weights, layer.kind, path), variant_for(config, layer.kind, path)
    is_variant = bool(variant.move or variant.invocation)
    if not (init.changes_base or init.needs or is_variant):
        return
    what = variant.title if is_variant else f"init_lora_weights={init.name!r}"
    raise ConfigError(
        f"{what} changes base weights, needs data or concerns the whole model, so one layer alone cannot be given such "
        "factors. Attach the adapter to the model, or use another init or variant.",
        what=what,
        where=path or None,
        field=variant.field if is_variant else "init_lora_weights",
    )


def reset_factor(layer: LoraLayer, name: str, init_lora_weights: bool | str) -> None:
    """Initialize an adapter's A and B, and the bias of B, again; the tensors keep their shapes and dtypes.

    A variant's extra tensors change only if the variant, not the init, defines how A and B start. The init is True,
    "gaussian", or False, which leaves the factors unchanged, as in PEFT.

    Raises:
        ConfigError: The init is unknown, or needs data or the base weight.
        MergeError: The adapter is merged into this layer.
    """
    if init_lora_weights is False or name not in layer.r:
        return
    init = init_for(init_lora_weights, layer.kind, layer.kind_name)
    factor, config = layer.factor(name), layer.state.configs[name]
    if not init.takes_any_shape or conflict(init, factor.variant):
        raise ConfigError.of("init_lora_weights", init_lora_weights, "True, False or 'gaussian' for a single layer")
    layer.check_not_merged(layer.kind_name, [name])
    context = InitContext(
        kind=layer.kind,
        spec=layer.spec,
        r=layer.r[name],
        scale=factor.scale,
        A_shape=tuple(factor.A.shape),
        B_shape=tuple(factor.B.shape),
        device=factor.A.device,
        dtype=factor.A.dtype,
        path=layer.kind_name,
        read=layer.read,
        config=config,
    )
    with torch.no_grad():
        result, parts = init.fill(context), factor.variant.parts
        start = Start(
            layer.kind, layer.spec, result.A, result.B, factor.scale, layer.read, layer.kind_name, factor.setting
        )
        A, B = parts.factors(start)
        factor.A.copy_(A)
        factor.B.copy_(B)
        if parts.start is not None:
            for held, tensor in parts.extra_tensors(dataclasses.replace(start, A=A, B=B)).items():
                factor.own[held].copy_(tensor)
        if factor.bias is not None:
            factor.bias.zero_()
