"""Checks that run before a call changes a model: adapter names, overrides in `allow`, scales, sites, compatibility."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from torch import nn

from lorakit.config import LoraConfig
from lorakit.core.inits import Init
from lorakit.core.kinds.kind import takes_values
from lorakit.core.layers.adapter_component import AdapterModule
from lorakit.core.model.fingerprint import vocabulary_of
from lorakit.core.model.index import AdapterIndex, TargetWeight
from lorakit.core.quantization import weight_format_of
from lorakit.core.quantization.weight_format import NOT_WRITTEN
from lorakit.core.routing.state import AdapterState
from lorakit.core.shards import is_dtensor
from lorakit.core.variants import Variant, check_invocation, variants_of
from lorakit.errors import OVERRIDE, AdapterError, ConfigError, NotYetSupported, TargetError

ALLOWANCES = ("partial_targets", "base_mismatch", "key_mismatch", "nonfinite", "odd_scale", "recompute_init")
"""Names of the checks that a caller can override."""

LARGEST_USUAL_SCALE = 1000.0

WITH_MAMBA = frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
"""Model types in transformers whose Mamba mixers pass weights to a fused kernel instead of calling the modules."""

READ_PAST = frozenset({"conv1d", "out_proj"})
"""Names of the modules that Mamba mixers do not call."""


def check_new_name(state: AdapterState | None, name: str) -> None:
    """Raise an AdapterError if an adapter name is in use, or if torch's module containers do not accept it."""
    if state is not None and name in state.configs:
        text = f"This model already has an adapter {name!r}. Detach it first, or choose another name."
        raise AdapterError(text, what=name)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_\-]{0,99}", name):
        text = f"{name!r} cannot be an adapter's name: use up to 100 letters, digits, underscores, hyphens; no dots."
        raise AdapterError(text, what=name)
    if hasattr(nn.ModuleDict(), name) or hasattr(nn.ParameterDict(), name):  # including the attributes of nn.Module
        text = f"{name!r} cannot be an adapter's name: torch's module containers have an attribute of that name."
        raise AdapterError(text, what=name)


def check_called(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise a TargetError if a fused kernel reads the weight of a module to be adapted, so that LoRA has no effect."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    bad = sorted({path for path in paths if path.rpartition(".")[2] in READ_PAST}) if kind in WITH_MAMBA else []
    if bad:
        text = (
            f"Module {bad[0]!r} is incompatible with Mamba-based models (model_type={kind!r}): their fused kernels "
            f"read the weights of {' and '.join(sorted(READ_PAST))} directly, so an adapter on this module would have "
            "no effect. Remove the module from target_modules, or add it to exclude_modules."
        )
        raise TargetError(text, what=bad[0], field="target_modules")


def check_not_distributed(modules: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise a NotYetSupported if a module, given with its path, holds one process's part of its weight."""
    for path, module in modules:
        tensors = (tensor for tensor in module._parameters.values() if tensor is not None)
        part = next((tensor for tensor in tensors if is_dtensor(tensor)), None)
        what = type(part).__name__ if part is not None else module.__dict__.get("_hf_tp_plan")
        if what is not None:
            text = (
                f"{path}: the weight is distributed over processes ({what}), and adapters on parts of weights are not "
                "supported. Load the model without `tp_plan` and `distributed_config`, and attach adapters before the "
                "model is sharded."
            )
            raise NotYetSupported(text, what=what, where=path, field="target_modules")


def check_allowances(allow: Collection[str]) -> None:
    """Raise a ConfigError, which lists the allowed names, if an entry in `allow` is not the name of a check."""
    unknown = sorted(set(allow) - set(ALLOWANCES))
    if unknown:
        text = f"allow contains {unknown[0]!r}; allowed entries: {', '.join(map(repr, ALLOWANCES))}."
        raise ConfigError(text, what=unknown[0], field="allow", allowed=ALLOWANCES)


def check_scales(scales: Sequence[tuple[str, float]], allow: Collection[str]) -> None:
    """Raise a ConfigError if a scale is not in the usual interval (0, 1000], unless "odd_scale" is allowed."""
    odd = [(path, value) for path, value in scales if not 0 < value <= LARGEST_USUAL_SCALE]
    if odd and "odd_scale" not in allow:
        path, value = odd[0]
        raise ConfigError(
            f"The scale at {path} is {value:g}; scales are normally above 0 and at most {LARGEST_USUAL_SCALE:g}.",
            advice=f"Check lora_alpha, r and the patterns, or {OVERRIDE}.",
            what=f"{value:g}",
            where=path,
            override="odd_scale",
        )


def check_acts(model: nn.Module, config: LoraConfig) -> None:
    """Raise a ConfigError if a token for which an adapter waits is not in the model's vocabulary."""
    if vocabulary := vocabulary_of(model):
        check_invocation(config, range(vocabulary), f"the model's vocabulary of {vocabulary:,}")


def check_company(state: AdapterState | None, config: LoraConfig) -> None:
    """Raise a ConfigError if two adapters would train the base's biases, or if a variant excludes others."""
    new = variants_of(config)
    for name, other in () if state is None else state.configs.items():
        if config.bias != "none" and other.bias != "none":
            text = f"bias is {config.bias!r}, but adapter {name!r} already trains the base's biases; set bias='none'."
            raise ConfigError(text, what=name, field="bias", allowed=("none",))
        present = variants_of(other)
        for variant in (*new, *present):
            why = "" if variant.move is None else variant.move.excludes_others
            if why and (variant in new) != (variant in present):
                text = (
                    f"{variant.title} cannot be combined with adapters that don't use {variant.title}, and this model "
                    f"already has adapter {name!r}: {why}. Detach {name!r} first, or load the base "
                    "a second time."
                )
                raise ConfigError(text, what=name, field=variant.field)


def conflict(init: Init, variant: Variant) -> tuple[str, str] | None:
    """Return what an init does and what a variant needs instead, as parts of a message; None if they fit together."""
    if variant.parts.start is not None and init.name is not True:
        return "fills A and B", "computes them from the base weight"
    if variant.parts.shapes is not None and not init.takes_any_shape:
        return "needs A and B in their standard shapes", "uses other shapes"
    if not init.changes_base:
        return None
    needs = ""
    if variant.move is not None:
        needs = "changes it too"
    elif not variant.is_mergeable:
        needs = "needs it unchanged wherever the adapter is inactive"
    elif any(tensor.depends_on_rank for tensor in variant.parts.extras):
        needs = "has tensors whose shape depends on the rank, which doubles when the adapter is saved"
    elif not variant.adds_product:
        needs = "does not add back what the init subtracts from it"
    return ("changes the base weight", needs) if needs else None


def check_together(init: Init, variant: Variant, target: TargetWeight) -> None:
    """Raise a ConfigError if an init and a variant make other assumptions about the weight or the shapes of A and B."""
    reasons = conflict(init, variant)
    if reasons is None:
        return
    what, needs = reasons
    text = f"{target.path}: init_lora_weights={init.name!r} {what}, and {variant.title} {needs}. Use another init."
    raise ConfigError(text, what=init.name, where=target.path, field="init_lora_weights")


def check_site(index: AdapterIndex, config: LoraConfig, target: TargetWeight) -> None:
    """Check that a site supports the settings of a config.

    Raises:
        TargetError: The module itself is compiled.
        ConfigError: `lora_bias` is set, but the site does not apply A and B to a floating-point input; or the site's
            weight is quantized and the update is added to it, so each forward pass would round the sum and block the
            gradient.
        ModelError: A part of a quantized weight is missing or not finite.
        NotYetSupported: The weight is distributed over processes.
    """
    if config.lora_bias and not takes_values(target.kind):
        text = f"{target.path}: lora_bias=True is not supported for {target.kind.name}; leave that module out."
        raise ConfigError(text, what=target.kind.name, where=target.path, field="lora_bias")
    check_not_compiled(index, target.outer)
    holder = index.holder(target)
    check_not_distributed([(target.path, holder)])
    base = weight_format_of(holder, target.spec.parameter)
    base.check(holder, target.path)
    if target.kind.acts_on != "weight":
        return
    if base.quantized:
        text = f"{target.path} is stored as {base.name}, but it is adapted through its weight; leave it out."
        raise ConfigError(text, what=base.name, where=target.path, field="target_modules")


def check_not_compiled(index: AdapterIndex, path: str) -> None:
    """Raise a TargetError if torch.compile wraps a module itself: its code would not call an adapted module instead."""
    if index.is_compiled(path) and not isinstance(index.modules[path], AdapterModule):
        text = f"{path} itself is compiled, so an adapter would have no effect; attach adapters before compiling it."
        raise TargetError(text, what=path, where=path, field="target_modules")


def check_can_move(
    index: AdapterIndex, target: TargetWeight, init: Init | None = None, variant: Variant | None = None
) -> None:
    """Check that a residual weight can replace a base weight: it is not shared or changed, and has no merged adapters.

    A residual weight comes from an init, a variant or an adapter read from files. A ConfigError is raised if it cannot
    replace the base weight, or if that is quantized and would have to be requantized.
    """
    layer, module, parameter = index.layer(target), index.holder(target), target.spec.parameter
    weight_format = weight_format_of(module, parameter)
    mover = "its init" if init is None else f"init_lora_weights={init.name!r}"
    mover = mover if variant is None else variant.title
    if weight_format.device(module, parameter).type == "meta":
        text = f"{target.path}: {mover} changes the base weight, which is on the meta device; load the base first."
        raise ConfigError(text, where=target.path)
    if layer is not None and (layer.moved_by or layer.merged_adapters):
        other = (*layer.moved_by, *layer.merged_adapters)[0]
        text = (
            f"{target.path}: {mover} changes the base weight, but adapter {other!r} has already changed it or is "
            "merged into it. Detach or unmerge that adapter first."
        )
        raise ConfigError(text, what=other, where=target.path)
    sharing = index.names_elsewhere(module._parameters.get(parameter), {id(module)})
    if sharing or len(index.parents.get(id(index.modules[target.outer]), ())) > 1:
        other = sharing[0] if sharing else "another module"
        text = f"{target.path} shares its weight with {other}, and {mover} would change it for both; leave it out."
        raise ConfigError(text, what=other, where=target.path)
    if not weight_format.written:
        raise ConfigError(NOT_WRITTEN.format(parameter=target.path, type=type(module).__name__), where=target.path)
    if weight_format.quantized and (variant is not None or (init is not None and not init.requantizes)):
        raise ConfigError(
            f"{target.path}: {mover} changes the base weight, but the weight is quantized and would have to be "
            "requantized. Attach the adapter before the base is quantized, leave the module out, or use another init "
            "or variant.",
            what=weight_format.name,
            where=target.path,
            field="init_lora_weights" if variant is None else variant.field,
        )
