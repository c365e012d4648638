"""Arrow: a router that sends each token to the other adapters of its site whose main input direction fits best.

The router's own A and B are not used. All other adapters of a site are its experts, except for further routers and
the adapters of general knowledge (`gks_0`, `gks_1`, …), whose mean is subtracted from the experts if `use_gks`
is set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from lorakit.config import LoraConfig
from lorakit.core.kinds.kind import only_dense
from lorakit.core.quantization import at_least_fp32
from lorakit.core.variants.variant import At, Factor, Parts, Setting, Variant
from lorakit.errors import AdapterError, ConfigError

GENERAL_PREFIX = "gks_"
"""Start of the names of adapters of general knowledge, as in PEFT; a number follows."""
ITERATIONS = 15
TINY = 1e-8
PROTOTYPES = "prototypes"
"""Key in `Factor.memory` of the experts' prototypes, (E, in)."""

Pair = tuple[Tensor, Tensor]
"""A (r, in) and B (out, r)."""


def prototype(A: Tensor, B: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Approximate the strongest right singular vector of B·A, (in,), by power iteration.   [docs/math.md (105)]

    A is (r, in), B is (out, r), and the generator, for the first vector, is on A's device.

    Source:
        Ostapenko et al. 2024, arXiv:2405.11157; the number of iterations is PEFT's.
    """
    A, B = A.float(), B.float()
    inner = B.T @ B
    v = torch.randn(A.shape[1], device=A.device, generator=generator)
    v = v / (v.norm() + TINY)
    for _ in range(ITERATIONS):
        v = A.T @ (inner @ (A @ v))
        v = v / (v.norm() + TINY)
    return v


def coefficients(x: Tensor, prototypes: Tensor, top_k: int, temperature: float) -> Tensor:
    """Return the weight of each expert for each token, (…, E): 0 except for the k best.   [docs/math.md (106)]

    The tokens x (…, in) have the dtype of the prototypes (E, in); `temperature` is that of the softmax.

    Source:
        Ostapenko et al. 2024, arXiv:2405.11157.
    """
    fit = F.linear(x, prototypes).abs()
    best, index = fit.topk(top_k, -1)
    return torch.zeros_like(fit).scatter(-1, index, torch.softmax(best / temperature, -1))


def is_general(name: str) -> bool:
    """Return whether an adapter's name is that of an adapter of general knowledge, such as `gks_0`."""
    return name.startswith(GENERAL_PREFIX) and name.removeprefix(GENERAL_PREFIX).isdigit()


def without_general(experts: Sequence[Pair], general: Sequence[Pair]) -> list[Pair]:
    """Subtract the mean A and the mean B of the general adapters from each expert's A and B.   [docs/math.md (107)]

    Source:
        Bagherifard et al. 2025, arXiv:2505.10939; PEFT takes the means of A and B separately.
    """
    with torch.no_grad():
        A, B = (torch.stack([pair[side] for pair in general]).mean(0) for side in (0, 1))
    return [(one - A, other - B) for one, other in experts]


def _product(name: str, factor: Factor) -> Pair:
    """Return A (r, in) and B (out, r) of an expert, whose update must be s·B·A."""
    if not factor.variant.is_mergeable or not factor.variant.is_low_rank or factor.bias is not None:
        kind = "a bias of B" if factor.bias is not None else factor.variant.title
        raise AdapterError(f"Arrow cannot route to adapter {name!r}: its update is not s·B·A ({kind}).", what=name)
    return factor.multiplied()


def _experts(at: At) -> tuple[list[Factor], list[Pair]]:
    """Return the experts' factors, and A (r, in) and B (out, r) of each, after the subtraction."""
    setting, others = at.factor.setting, at.siblings()
    general = {name: factor for name, factor in others.items() if is_general(name)}
    experts = {
        name: factor
        for name, factor in others.items()
        if name not in general and factor.variant is not at.factor.variant
    }
    if len(experts) < int(setting["top_k"]):
        text = (
            f"Arrow's top_k is {setting['top_k']}, but {setting['path']} has {len(experts)} adapter(s) to route to: "
            f"{', '.join(experts) or 'none'}. Load the missing adapters, or lower top_k."
        )
        raise AdapterError(text, what=setting["top_k"], where=str(setting["path"]), field="arrow_config.top_k")
    products = [_product(name, factor) for name, factor in experts.items()]
    if setting["use_gks"]:
        products = without_general(products, _general(general, products, str(setting["path"])))
    return list(experts.values()), products


def _general(general: Mapping[str, Factor], experts: Sequence[Pair], path: str) -> list[Pair]:
    pairs = [_product(name, factor) for name, factor in general.items()]
    shapes = {(A.shape, B.shape) for A, B in (*experts, *pairs)}
    if not pairs or len(shapes) > 1:
        why = f"there are no adapters named {GENERAL_PREFIX}0, …" if not pairs else "the adapters' shapes differ"
        raise AdapterError(f"{path}: general knowledge cannot be subtracted: {why}.", where=path, field="use_gks")
    return pairs


def _prototypes(at: At, products: Sequence[Pair]) -> Tensor:
    """Return one prototype per expert, (E, in); they are computed when the site's adapters have changed."""
    memory, device, seed = at.factor.memory, products[0][0].device, at.factor.setting.get("seed")
    known = memory.get(PROTOTYPES)
    if known is None:
        with torch.no_grad():
            prototypes = []
            for A, B in products:
                generator = None if seed is None else torch.Generator(device).manual_seed(int(seed))
                prototypes.append(prototype(A, B, generator).to(A.dtype))
            known = torch.stack(prototypes)
    memory[PROTOTYPES] = known = known.to(device)
    return known


def _output(at: At) -> Tensor:
    """Return Σ_e c_e·s_e·B_e·(A_e x), (…, out), with the coefficients c of each token.   [docs/math.md (106)]"""
    factors, products = _experts(at)
    x, setting = at.x if at.x is not None else at.z, at.factor.setting
    wide = at_least_fp32(products[0][0]).dtype
    routed = coefficients(
        x.to(wide), _prototypes(at, products).to(wide), int(setting["top_k"]), float(setting["temperature"])
    )
    each = zip(routed.unbind(-1), factors, products, strict=True)
    weights = [
        (c * factor.scale)[..., None].expand(*c.shape, len(A)) for c, factor, (A, _) in each
    ]  # (…, r) per expert
    h = F.linear(x, torch.cat([A for A, _ in products]).to(x.dtype))
    h = h * torch.cat(weights, -1).to(h.dtype)
    return F.linear(h, torch.cat([B for _, B in products], 1).to(x.dtype))


def _setting(config: LoraConfig, path: str) -> Setting | None:
    arrow = config.arrow_config
    if arrow is None:
        return None
    if config.lora_dropout:
        text = f"{path}: lora_dropout is {config.lora_dropout}, but Arrow's router has no input to drop; set it to 0."
        raise ConfigError(text, what=config.lora_dropout, where=path, field="lora_dropout")
    setting: dict[str, str | int | float | bool] = {
        "top_k": arrow.top_k,
        "temperature": arrow.router_temperature,
        "use_gks": arrow.use_gks,
        "path": path,
    }
    return setting if arrow.rng_seed is None else {**setting, "seed": arrow.rng_seed}


ARROW = Variant(
    name="arrow-router",
    title="Arrow",
    field="arrow_config",
    setting=_setting,
    fits=only_dense,
    output=_output,
    parts=Parts(uses_factors=False),
    update="its update depends on the input, because it routes each token to other adapters",
    combine="have different settings of Arrow",
)
