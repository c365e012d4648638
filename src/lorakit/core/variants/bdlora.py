"""BD-LoRA: A or B is block-diagonal, so that each device can multiply by its blocks without inter-device communication.

Only the blocks are stored and saved, stacked along the first axis.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.config import LoraConfig
from lorakit.core.kinds.kind import Kind, Shape, WeightSpec, only_linear
from lorakit.core.variants.variant import Factor, Parts, Setting, Variant
from lorakit.errors import ConfigError


def block_diagonal(blocks: Tensor, number: int) -> Tensor:
    """Return a matrix (m, n·number) with blocks (m, n) on its diagonal and zeros elsewhere.   [docs/math.md (97)]

    Source:
        Wang et al. 2025, arXiv:2510.23346, section 3.
    """
    return torch.block_diag(*blocks.chunk(number))


class BlockDiagonalLinear(nn.Module):
    """A linear layer without a bias whose block-diagonal weight is stored as (out, in / blocks), like PEFT's."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        nblocks: int,
        init_zero: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("in_features", in_features), ("out_features", out_features)):
            if size % nblocks:
                text = f"{name} is {size}, which is not divisible by {nblocks}, the number of blocks."
                raise ConfigError(text, what=size, where=name, field="nblocks")
        self.in_features, self.out_features, self.nblocks = in_features, out_features, nblocks
        self.weight = nn.Parameter(torch.zeros(out_features, in_features // nblocks, dtype=dtype, device=device))
        if not init_zero:
            nn.init.kaiming_uniform_(self.weight)

    @classmethod
    def of(cls, weight: nn.Parameter, nblocks: int) -> BlockDiagonalLinear:
        """Return a module that holds existing blocks, stacked as (out, in / blocks)."""
        linear = cls.__new__(cls)
        nn.Module.__init__(linear)
        linear.out_features, linear.in_features = weight.shape[0], weight.shape[1] * nblocks
        linear.nblocks, linear.weight = nblocks, weight
        return linear

    @property
    def bias(self) -> None:
        """None, as a block-diagonal factor has no bias."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (…, out) for an input x (…, in)."""
        blocks = self.weight.view(self.nblocks, -1, self.weight.shape[1])
        return torch.einsum("...ni,noi->...no", x.unflatten(-1, (self.nblocks, -1)), blocks).flatten(-2)

    def weight_as_blockdiagonal_matrix(self) -> Tensor:
        """Return the weight as a matrix (out, in) with zeros outside the blocks."""
        return block_diagonal(self.weight, self.nblocks)


def _setting(config: LoraConfig, path: str) -> Setting | None:
    blocks = config.use_bdlora
    side = "" if blocks is None else blocks.side_of(path)
    if blocks is None or not side:
        return None
    if side == "B" and config.lora_bias:
        text = f"lora_bias at {path}: a block-diagonal B cannot have a bias; turn lora_bias off."
        raise ConfigError(text, where=path, field="lora_bias")
    return {"side": side, "blocks": blocks.nblocks, "path": path}


def _shapes(kind: Kind, spec: WeightSpec, r: int, setting: Setting) -> tuple[Shape, Shape]:
    """Return the shapes of A and B. Either A holds stacked blocks, (r, in / blocks), or B does, (out, r / blocks)."""
    number, in_A = int(setting["blocks"]), setting["side"] == "A"
    sizes = {"r": r, **({"in_features": spec.in_features} if in_A else {"out_features": spec.out_features})}
    odd = next((name for name, size in sizes.items() if size % number), None)
    if odd is not None:
        text = (
            f"{setting['path']}: {odd} is {sizes[odd]}, which is not divisible by {number}, the number of blocks of "
            f"{setting['side']}. Choose another use_bdlora.nblocks or r, or leave the module out."
        )
        raise ConfigError(text, what=sizes[odd], where=str(setting["path"]), field="use_bdlora")
    A, B = kind.shapes(spec, r)
    return ((A[0], A[1] // number), B) if in_A else (A, (B[0], B[1] // number))


def _factors(factor: Factor, training: bool) -> tuple[Tensor, Tensor]:
    number = int(factor.setting["blocks"])
    if factor.setting["side"] == "A":
        return block_diagonal(factor.A, number), factor.B
    return factor.A, block_diagonal(factor.B, number)


def _holder(part: str, weight: nn.Parameter, setting: Setting) -> nn.Module | None:
    return BlockDiagonalLinear.of(weight, int(setting["blocks"])) if part == setting["side"] else None


BDLORA = Variant(
    name="bdlora",
    title="BD-LoRA",
    field="use_bdlora",
    setting=_setting,
    fits=only_linear,
    parts=Parts(shapes=_shapes, holder=_holder),
    factors=_factors,
)
