"""MonteCLoRA: in training, A is the mean of several random samples, whose spread and weights are trained.

The samples are drawn in each training forward pass with torch's generator of A's device; merging and evaluation use A
itself. A penalty keeps the distribution of the samples near its prior.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lorakit.core.kinds.kind import Kind, Shape, WeightSpec, only_dense
from lorakit.core.quantization import at_least_fp32
from lorakit.core.variants.variant import Factor, OwnTensor, Parts, Penalty, Setting, Start, Variant, values_of

SAMPLER = "lora_monteclora_sampler"
"""PEFT's name for the module that holds the extra tensors of an adapter, on a layer and on disk."""
SPREAD = f"{SAMPLER}.std_prior"
CONCENTRATION = f"{SAMPLER}.expert_weights_prior"
VARIANCE = f"{SAMPLER}.gaussian_var_prior"
WEIGHTS = f"{SAMPLER}.expert_weights"
DRAWN = "dirichlet"
"""Key in `Factor.memory` of the normal values (n,) behind the last weights."""

MIN_VARIANCE = 1e-3
TINY = 1e-6


def variances(spread: Tensor, wishart: Tensor) -> Tensor:
    """Return the variance of each row of A, (r,): e^(2·spread) times a Wishart diagonal.   [docs/math.md (103)]

    Both arguments are (r,); `spread` are logarithms of the standard deviations.

    Source:
        Sengupta et al. 2024, arXiv:2411.04358.
    """
    return ((2 * spread).exp() * wishart).clamp(min=MIN_VARIANCE)


def sample_weights(concentration: Tensor, z: Tensor) -> Tensor:
    """Return the weights of the samples, (n,), approximately Dirichlet-distributed.   [docs/math.md (103)]

    The distribution is the Laplace approximation in the basis of the softmax, for logarithms of concentrations (n,) and
    normal values z (n,).
    """
    number, alpha = len(concentration), concentration.exp().clamp(min=TINY)
    mean = alpha.log() - alpha.log().mean()
    variance = (1 - 2 / number) / alpha + (1 / alpha).sum() / number**2
    return torch.softmax(mean + (variance.clamp(min=TINY) + TINY).sqrt() * z, 0)


def wishart_diagonal(r: int, device: torch.device) -> Tensor:
    """Draw the diagonal of a Wishart matrix with r degrees of freedom and the identity as scale, (r,) in fp32.

    With Bartlett's decomposition, entry i is a chi-squared value with r − i degrees of freedom plus i squared normals.
    """
    degrees = torch.arange(r, 0, -1, dtype=torch.float32, device=device)
    chi = torch.distributions.Chi2(degrees, validate_args=False).rsample()
    rows, columns = torch.tril_indices(r, r, offset=-1, device=device)
    lower = chi.sqrt().clamp(min=torch.finfo(chi.dtype).eps).diag_embed()
    lower[rows, columns] = torch.randn(len(rows), dtype=chi.dtype, device=device)
    return lower.square().sum(1)


def sampled(factor: Factor) -> Tensor:
    """Return A (r, in) plus the mean of n noise matrices, and store what `penalty` needs.   [docs/math.md (103)]

    The buffers and memory of the factor are overwritten.

    Source:
        Sengupta et al. 2024, arXiv:2411.04358.
    """
    A, setting, extras = factor.A, factor.setting, factor.own
    (r, width), number = A.shape, int(setting["num_samples"])
    normal = torch.randn(number, width, r, dtype=A.dtype, device=A.device)  # PEFT's layout, so that the numbers agree
    z = torch.randn(number, dtype=A.dtype, device=A.device)
    variance = variances(extras[SPREAD], wishart_diagonal(r, A.device).to(A.dtype))
    weights = sample_weights(extras[CONCENTRATION], z)
    with torch.no_grad():
        extras[VARIANCE].copy_(variance.diag())
        extras[WEIGHTS].copy_(weights)
    factor.memory[DRAWN] = z
    mean = (weights @ normal.flatten(1)).view(width, r).T
    return A + float(setting["sample_scaler"]) * variance.sqrt()[:, None] * mean


def penalty(factor: Factor, training: bool) -> Tensor:
    """Return the penalty of one site, a scalar in fp32 or wider; 0 outside training.   [docs/math.md (104)]

    The variances and weights are those of the last training forward pass; the gradients with respect to their
    parameters are computed without that pass's graph.

    Source:
        Sengupta et al. 2024, arXiv:2411.04358; the sign of the terms ln Γ(α) is PEFT's.
    """
    setting = factor.setting
    spread, concentration = (at_least_fp32(factor.own[name]) for name in (SPREAD, CONCENTRATION))
    if not training:
        return spread.new_zeros(())
    alpha, prior = concentration.exp(), torch.full_like(concentration, float(setting["dirichlet_prior"]))
    dirichlet = alpha.sum().lgamma() - prior.sum().lgamma() + (alpha.lgamma() - prior.lgamma()).sum()
    dirichlet = dirichlet + ((alpha - prior) * (alpha.digamma() - alpha.sum().digamma())).sum()
    wishart = len(spread) / 2 * ((2 * spread).exp() - 2 * spread - 1).sum()
    variance = at_least_fp32(factor.own[VARIANCE]).diagonal().clone()
    moved = variance * (2 * (spread - spread.detach())).exp()  # equal to `variance`, but with its gradient
    variance = torch.where(variance > MIN_VARIANCE, moved, variance)
    normal = len(concentration) / 2 * (variance - variance.log() - 1).sum()
    total = float(setting["kl_loss_weight"]) * (dirichlet + wishart + normal)
    if not setting["use_entropy"]:
        return total
    weights, z = at_least_fp32(factor.own[WEIGHTS]).clone(), factor.memory.get(DRAWN)
    if z is not None:
        weights = sample_weights(concentration, z.to(concentration))
    return total + weights.square().sum()


def _per_rank(kind: Kind, spec: WeightSpec, r: int, setting: Setting) -> Shape:
    return (r,)


def _per_sample(kind: Kind, spec: WeightSpec, r: int, setting: Setting) -> Shape:
    return (int(setting["num_samples"]),)


def _uniform(start: Start, size: int) -> Tensor:
    return torch.empty(size, dtype=start.A.dtype, device=start.A.device).uniform_(generator=start.generator)


def _down(kind: Kind, module: nn.Module, x: Tensor, factor: Factor, training: bool) -> Tensor:
    return kind.down(module, x, (sampled(factor) if training else factor.A).to(x.dtype))


def _number(start: Start) -> int:
    return int(start.setting["num_samples"])


MONTECLORA = Variant(
    name="monteclora",
    title="MonteCLoRA",
    field="monteclora_config",
    setting=values_of("monteclora_config"),
    fits=only_dense,
    parts=Parts(
        extras=(
            OwnTensor(SPREAD, "parameter", _per_rank, lambda start: _uniform(start, start.rank)),
            OwnTensor(CONCENTRATION, "parameter", _per_sample, lambda start: _uniform(start, _number(start))),
            OwnTensor(
                VARIANCE,
                "buffer",
                lambda kind, spec, r, setting: (r, r),
                lambda start: torch.eye(start.rank, dtype=start.A.dtype, device=start.A.device),
                trained=False,
            ),
            OwnTensor(
                WEIGHTS,
                "buffer",
                _per_sample,
                lambda start: start.A.new_full((_number(start),), 1 / _number(start)),
                trained=False,
            ),
        )
    ),
    down=_down,
    penalty=Penalty(penalty, is_mean=True),
)
