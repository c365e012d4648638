"""QA-LoRA: A reads the mean of each group of inputs, so all inputs of a group share one column of A, stored once.

An update that is constant within groups can be absorbed by the zero points of a weight that is quantized in such
groups, which is the purpose of the method.
"""

from __future__ import annotations

from torch import Tensor

from lorakit.config import LoraConfig
from lorakit.core.kinds.kind import Kind, Shape, WeightSpec, only_dense
from lorakit.core.variants.variant import Factor, Parts, Setting, Variant
from lorakit.errors import ConfigError


def repeated(A: Tensor, group: int) -> Tensor:
    """Return A (r, in): its stored columns (r, in / g), each repeated g times, times in / g².   [docs/math.md (102)]

    Each mean over a group has the factor 1 / g, and PEFT multiplies the means by their number, in / g.

    Source:
        Xu et al. 2023, arXiv:2309.14717, section 3; the factor in / g is PEFT's.
    """
    return A.repeat_interleave(group, 1) * (A.shape[1] / group)


def _setting(config: LoraConfig, path: str) -> Setting | None:
    return {"group": config.qalora_group_size, "path": path} if config.use_qalora else None


def _shapes(kind: Kind, spec: WeightSpec, r: int, setting: Setting) -> tuple[Shape, Shape]:
    """Return the shapes of A (r, in / g) and B (out, r)."""
    group, path = int(setting["group"]), str(setting["path"])
    if spec.in_features % group:
        text = f"{path}: in_features is {spec.in_features}, which is not divisible by qalora_group_size ({group})."
        raise ConfigError(text, what=group, where=path, field="qalora_group_size")
    return (r, spec.in_features // group), (spec.out_features, r)


def _factors(factor: Factor, training: bool) -> tuple[Tensor, Tensor]:
    return repeated(factor.A, int(factor.setting["group"])), factor.B


QALORA = Variant(
    name="qalora",
    title="QA-LoRA",
    field="use_qalora",
    setting=_setting,
    fits=only_dense,
    parts=Parts(shapes=_shapes),
    factors=_factors,
    unclear="it reads means of groups if the base is quantized by GPTQ, else (in PEFT) each input. In the first case, "
    "load the adapter on its base, and save it; in the second, set use_qalora to false in adapter_config.json.",
)
