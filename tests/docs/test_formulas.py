"""One test per formula of docs/math.md, (1) to (16): the formula is written out here and compared with the code."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lorakit import core
from lorakit.config import LoraConfig, scale
from lorakit.core.files.inspecting import delta_norm
from lorakit.core.kinds.kind import dense_delta
from lorakit.core.variants.arrow import prototype, without_general
from lorakit.core.variants.bdlora import block_diagonal
from lorakit.core.variants.dora import row_norms
from lorakit.core.variants.kasa import truncated
from lorakit.core.variants.lora_xs import directions
from lorakit.core.variants.monteclora import CONCENTRATION, WEIGHTS
from lorakit.data import Batch
from lorakit.plan import catalogue, count
from lorakit.plan.params import factor_parameters
from lorakit.train.loop.loop import evaluate
from lorakit.train.loop.optimizer import build_adamw
from lorakit.train.loop.step import loss_sum

OUT, IN, R, ALPHA = 6, 5, 3, 12.0


def adapted(**fields: Any) -> tuple[nn.Sequential, core.LoraLayer]:
    """A model of one dense layer in float64 with an adapter on it; B is filled, so that it acts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).double().eval()
    config = LoraConfig(**{"r": R, "lora_alpha": ALPHA, "target_modules": ["0"], **fields})
    core.attach(model, config, seed=1)
    layer: Any = model[0]
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    return model, layer


def parts(layer: core.LoraLayer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W, bias, A and B of the layer."""
    factor = layer.factor("default")
    base: Any = layer.base_layer
    return base.weight.detach(), base.bias.detach(), factor.A.detach(), factor.B.detach()


def test_delta_is_b_times_a() -> None:
    A, B = torch.randn(R, IN), torch.randn(OUT, R)
    by_hand = torch.tensor([[sum(B[o, k] * A[k, i] for k in range(R)) for i in range(IN)] for o in range(OUT)])
    torch.testing.assert_close(dense_delta(A, B), by_hand)
    assert torch.linalg.matrix_rank(dense_delta(A, B)) <= R


def test_output_is_base_plus_scaled_low_rank() -> None:
    model, layer = adapted()
    W, bias, A, B = parts(layer)
    x = torch.randn(4, 7, IN, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ W.T + bias + ALPHA / R * ((x @ A.T) @ B.T))


def test_kasa_drops_the_smallest_singular_values() -> None:
    _, layer = adapted(kasa_config={})
    W = layer.read()
    U, S, Vh = torch.linalg.svd(W)
    kept = sum(S[i] * torch.outer(U[:, i], Vh[i]) for i in range(min(OUT, IN) - R))
    torch.testing.assert_close(layer.read("default"), kept)
    torch.testing.assert_close(truncated(W, R), kept)


def test_kasa_scales_the_rank_by_its_diagonal() -> None:
    model, layer = adapted(kasa_config={})
    factor, bias, x = layer.factor("default"), layer.original_bias(), torch.randn(4, IN, dtype=torch.float64)
    update = ALPHA / R * factor.B @ torch.diag(factor.own["lora_diag"]) @ factor.A
    torch.testing.assert_close(model(x), x @ (layer.read("default") + update).T + bias)


def test_lora_xs_trains_a_matrix_between_singular_directions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT)).double()
    core.attach(model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], use_lora_xs=True))
    layer: Any = model[0]
    W, bias, A, B = parts(layer)
    U, S, Vh = torch.linalg.svd(W)
    torch.testing.assert_close(B @ A, U[:, :R] @ torch.diag(S[:R]) @ Vh[:R])
    torch.testing.assert_close((A, B), directions(W, R))
    x, matrix = torch.randn(4, IN, dtype=torch.float64), torch.randn(R, R, dtype=torch.float64)
    with torch.no_grad():
        layer.factor("default").own["lora_R"].copy_(matrix)
    torch.testing.assert_close(model(x), x @ (W + ALPHA / R * B @ matrix @ A).T + bias)


def test_kasas_penalty() -> None:
    model, layer = adapted(kasa_config={"beta": 0.5, "gamma": 0.25})
    factor, eye = layer.factor("default"), torch.eye(R, dtype=torch.float64)
    by_hand = 0.5 * sum(d.item() ** 2 for d in factor.own["lora_diag"])
    by_hand += 0.25 * (factor.B.T @ factor.B - eye).square().sum().sqrt().item()
    by_hand += 0.25 * (factor.A @ factor.A.T - eye).square().sum().sqrt().item()
    found = core.penalties(model)
    assert found is not None and found.item() == pytest.approx(by_hand)


@pytest.mark.parametrize("side", ["a", "b"])
def test_bdlora_is_lora_with_blocks(side: str) -> None:
    n, r, asked = 3, 6, {f"target_modules_bd_{side}": ["0"], "nblocks": 3}
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 12)).double()
    core.attach(model, LoraConfig(r=r, lora_alpha=ALPHA, target_modules=["0"], use_bdlora=asked), seed=1)
    layer: Any = model[0]
    bound = 1 / math.sqrt(9 / n if side == "a" else 9)
    assert 0.8 * bound < float(layer.factor("default").A.detach().abs().max()) <= bound
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    W, bias, A, B = parts(layer)
    assert (A.shape, B.shape) == (((r, 9 // n), (12, r)) if side == "a" else ((r, 9), (12, r // n)))
    blocks = (A if side == "a" else B).chunk(n)
    whole = torch.zeros((r, 9) if side == "a" else (12, r), dtype=torch.float64)
    for i, block in enumerate(blocks):
        rows, columns = block.shape
        whole[i * rows : (i + 1) * rows, i * columns : (i + 1) * columns] = block
    torch.testing.assert_close(block_diagonal(torch.cat(blocks), n), whole)
    A, B = (whole, B) if side == "a" else (A, whole)
    x = torch.randn(4, 9, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ W.T + bias + ALPHA / r * ((x @ A.T) @ B.T))


def test_velora_compresses_the_input_of_a() -> None:
    model, layer = adapted(velora_config={"num_groups": 2, "scale": 0.5})
    model.train()
    x, G = torch.randn(4, IN, dtype=torch.float64), torch.randn(4, OUT, dtype=torch.float64)
    W, bias, A, B = parts(layer)
    h = model(x)
    torch.testing.assert_close(h, x @ (W + ALPHA / R * B @ A).T + bias)
    groups = [x[:, :3], torch.cat([x[:, 3:], torch.zeros(4, 1, dtype=torch.float64)], 1)]  # of 5 inputs, and a zero
    mean = sum(group.mean(0) for group in groups)
    v = mean / mean.norm()
    compressed = torch.cat([(group @ v)[:, None] * v for group in groups], 1)[:, :IN]
    expected = 0.5 * ALPHA / R * (G @ B).T @ compressed
    (found,) = torch.autograd.grad(h, layer.factor("default").A, G)
    torch.testing.assert_close(found, expected)


def test_qalora_reads_means_of_groups() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, OUT)).double()
    config = LoraConfig(r=R, lora_alpha=ALPHA, target_modules=["0"], use_qalora=True, qalora_group_size=2)
    core.attach(model, config, seed=1)
    layer: Any = model[0]
    assert float(layer.factor("default").A.detach().abs().max()) <= 1 / math.sqrt(3)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_()
    W, bias, A, B = parts(layer)
    x = torch.randn(4, 6, dtype=torch.float64)
    means = torch.stack([x[:, 2 * j : 2 * j + 2].mean(1) for j in range(3)], 1)
    torch.testing.assert_close(model(x), x @ W.T + bias + ALPHA / R * 3 * means @ A.T @ B.T)
    core.merge(model)
    update = layer.base_layer.weight - W
    torch.testing.assert_close(update[:, 0::2], update[:, 1::2])


def test_monteclora_samples_a() -> None:
    n, c = 4, 0.5
    model, layer = adapted(monteclora_config={"num_samples": n, "sample_scaler": c})
    factor, x = layer.factor("default"), torch.randn(4, IN, dtype=torch.float64)
    tau, alpha = factor.own["lora_monteclora_sampler.std_prior"], factor.own[CONCENTRATION].exp()
    W, bias, A, B = parts(layer)
    torch.testing.assert_close(model(x), x @ (W + ALPHA / R * B @ A).T + bias)
    torch.manual_seed(5)
    found = model.train()(x)
    torch.manual_seed(5)
    E, z = torch.randn(n, IN, R, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    chi, below = torch.distributions.Chi2(torch.tensor([3.0, 2.0, 1.0])).rsample(), torch.randn(3)
    Q = [chi[0], chi[1] + below[0] ** 2, chi[2] + below[1] ** 2 + below[2] ** 2]
    v = torch.stack([max((2 * t).exp() * q.double(), torch.tensor(1e-3)) for t, q in zip(tau, Q, strict=True)])
    mu, d = alpha.log() - alpha.log().mean(), (1 - 2 / n) / alpha + (1 / (n**2 * alpha)).sum()
    w = F.softmax(mu + d.sqrt() * z, 0)
    noise = torch.diag(v.sqrt()) @ sum(w[k] * E[k].T for k in range(n))
    torch.testing.assert_close(found, x @ (W + ALPHA / R * B @ (A + c * noise)).T + bias, rtol=1e-5, atol=1e-5)


def test_monteclora_s_penalty() -> None:
    n, p = 4, 0.3
    asked = {"num_samples": n, "kl_loss_weight": 0.5, "dirichlet_prior": p, "use_entropy": True}
    model, layer = adapted(monteclora_config=asked)
    factor = layer.factor("default")
    model.train()(torch.randn(4, IN, dtype=torch.float64))
    tau, alpha = factor.own["lora_monteclora_sampler.std_prior"], factor.own[CONCENTRATION].exp()
    v, w = factor.own["lora_monteclora_sampler.gaussian_var_prior"].diagonal(), factor.own[WEIGHTS]
    log_gamma, psi = torch.lgamma, torch.digamma
    D = log_gamma(alpha.sum()) - math.lgamma(n * p) + sum(log_gamma(a) - math.lgamma(p) for a in alpha)
    D = D + sum((a - p) * (psi(a) - psi(alpha.sum())) for a in alpha)
    by_hand = 0.5 * (D + R / 2 * sum((2 * t).exp() - 2 * t - 1 for t in tau) + n / 2 * sum(v - v.log() - 1))
    torch.testing.assert_close(core.penalties(model), by_hand + w.square().sum())


def test_arrow_s_prototype_is_a_power_iteration() -> None:
    A, B = torch.randn(R, IN), torch.randn(OUT, R)
    torch.manual_seed(4)
    found = prototype(A, B)
    torch.manual_seed(4)
    v = torch.randn(IN)
    for _ in range(15):
        v = (B @ A).T @ (B @ A) @ v
        v = v / v.norm()
    torch.testing.assert_close(found, v)


def test_arrow_routes_to_the_best_experts() -> None:
    model, _ = adapted()
    for name in ("b", "c"):
        core.attach(model, LoraConfig(r=R, lora_alpha=2, target_modules=["0"]), name)
        model[0].lora_B[name].weight.data.normal_()
    core.attach(model, LoraConfig(target_modules=["0"], arrow_config={"top_k": 2, "router_temperature": 0.5}), "router")
    core.activate(model, "router")
    layer: Any = model[0]
    x, names = torch.randn(4, IN, dtype=torch.float64), ("default", "b", "c")
    h = model(x)
    prototypes = layer.memory["router"]["prototypes"]
    for row, found in zip(x, h, strict=True):
        fit = [abs(float(p @ row)) for p in prototypes]
        chosen = sorted(range(3), key=lambda e: -fit[e])[:2]
        total = sum(math.exp(fit[e] / 0.5) for e in chosen)
        expected = layer.base_layer(row)
        for e in chosen:
            factor = layer.factor(names[e])
            expected = expected + math.exp(fit[e] / 0.5) / total * factor.scale * factor.B @ factor.A @ row
        torch.testing.assert_close(found, expected)


def test_general_knowledge_is_the_mean_of_a_and_of_b() -> None:
    A, B = torch.randn(3, R, IN), torch.randn(3, OUT, R)
    ((found_A, found_B),) = without_general([(A[0], B[0])], [(A[1], B[1]), (A[2], B[2])])
    torch.testing.assert_close(found_A, A[0] - (A[1] + A[2]) / 2)
    torch.testing.assert_close(found_B, B[0] - (B[1] + B[2]) / 2)


def test_scale_is_alpha_over_r() -> None:
    assert scale(8, 16) == 16 / 8
    assert adapted()[1].scaling["default"] == ALPHA / R


def test_rank_stabilised_scale_is_alpha_over_root_r() -> None:
    assert scale(16, 8, use_rslora=True) == 8 / math.sqrt(16)
    assert adapted(use_rslora=True)[1].scaling["default"] == ALPHA / math.sqrt(R)


@pytest.mark.parametrize(("init", "deviation"), [(True, 1 / math.sqrt(3 * 768)), ("gaussian", 1 / 8)])
def test_fresh_factors(init: bool | str, deviation: float) -> None:
    model = nn.Sequential(nn.Linear(768, 16))
    core.attach(model, LoraConfig(r=8, target_modules=["0"], init_lora_weights=init), seed=0)
    A, B = (tensor.detach() for _, tensor in core.trainable_parameters(model))
    assert torch.count_nonzero(B) == 0
    assert float(A.std()) == pytest.approx(deviation, rel=0.05)
    if init is True:
        assert float(A.abs().max()) <= 1 / math.sqrt(768)


def test_first_gradients() -> None:
    """With B = 0 only B has a gradient; with both zero, neither has, for ever."""
    model, layer = adapted()
    _, _, A, B = parts(layer)
    x, y = torch.randn(9, IN, dtype=torch.float64), torch.randn(9, OUT, dtype=torch.float64)
    F.mse_loss(model(x), y, reduction="sum").backward()
    G = 2 * (model(x).detach() - y)  # dL/dh, (rows, out)
    factor, s = layer.factor("default"), ALPHA / R
    torch.testing.assert_close(factor.B.grad, s * G.T @ (x @ A.T))
    torch.testing.assert_close(factor.A.grad, s * B.T @ G.T @ x)

    for zero_A, learns in ((False, "B"), (True, "")):
        model, layer = adapted()
        factor = layer.factor("default")
        with torch.no_grad():
            factor.B.zero_()
            factor.A.mul_(0.0 if zero_A else 1.0)
        F.mse_loss(model(x), y).backward()
        grown = {name for name, p in (("A", factor.A), ("B", factor.B)) if torch.count_nonzero(p.grad)}
        assert grown == set(learns), f"zero A: {zero_A}"


def test_dora_rescales_each_row() -> None:
    model, layer = adapted(use_dora=True)
    W, bias, A, B = parts(layer)
    magnitude = layer.factor("default").own["lora_magnitude_vector"]
    assert magnitude is not None
    with torch.no_grad():
        magnitude.mul_(torch.rand(OUT, dtype=torch.float64) + 0.5)
    adapted_weight = W + ALPHA / R * B @ A
    V = adapted_weight / torch.linalg.vector_norm(adapted_weight, dim=1, keepdim=True)
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.testing.assert_close(model(x), x @ (magnitude.detach()[:, None] * V).T + bias)


def test_row_norms_need_no_product() -> None:
    W, A, B = torch.randn(OUT, IN).double(), torch.randn(R, IN).double(), torch.randn(OUT, R).double()
    torch.testing.assert_close(row_norms(W, A, B, 1.7), torch.linalg.vector_norm(W + 1.7 * B @ A, dim=1))


def test_norm_of_the_delta_needs_no_product() -> None:
    A, B = torch.randn(R, IN), torch.randn(OUT, R)
    assert delta_norm(A, B) == pytest.approx(float(torch.linalg.matrix_norm(B @ A)), rel=1e-6)


def test_a_site_trains_r_times_in_plus_out() -> None:
    assert factor_parameters(8, 768, 2304) == 8 * 768 + 2304 * 8 == 24_576
    shape = catalogue.published("gpt2")
    assert shape is not None
    counted = count(shape, LoraConfig(r=8, target_modules=["c_attn", "c_proj"]))
    assert counted.trainable == 12 * (8 * (768 + 2304) + 8 * (768 + 768) + 8 * (3072 + 768)) == 811_008


def test_merged_weight_is_base_plus_updates() -> None:
    model, layer = adapted()
    W, _, A, B = parts(layer)
    x = torch.randn(4, IN, dtype=torch.float64)
    before = model(x)
    core.merge(model)
    torch.testing.assert_close(layer.base_layer.weight.detach(), W + ALPHA / R * B @ A)
    torch.testing.assert_close(model(x), before)
    core.unmerge(model)
    assert torch.equal(layer.base_layer.weight, W)


def test_surviving_share_of_a_rounded_merge() -> None:
    model, layer = adapted()
    model.to(torch.bfloat16)
    W, A = layer.base_layer.weight.detach().float(), parts(layer)[2].float()
    with torch.no_grad():
        layer.factor("default").B.mul_(1e-3)
    delta = (ALPHA / R) * layer.factor("default").B.detach().float() @ A
    report = core.merge(model)
    stored = (W + delta).to(torch.bfloat16).float()
    lost = torch.linalg.vector_norm(stored - (W + delta)) / torch.linalg.vector_norm(delta)
    assert report.sites[0].retained == pytest.approx(max(0.0, 1 - float(lost)), abs=1e-5)
    assert 0 <= report.retained < 0.9  # a delta far below the weights loses much of itself in bf16


def test_each_row_gets_its_own_adapter() -> None:
    model, layer = adapted()
    core.attach(model, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), name="other", seed=3)
    W, bias, A, B = parts(layer)
    other = layer.factor("other")
    x = torch.randn(3, IN, dtype=torch.float64)
    with core.route(model, ["default", None, "other"]):
        mixed = model(x)
    deltas = [ALPHA / R * B @ A, torch.zeros_like(W), other.scale * other.B.detach() @ other.A.detach()]
    torch.testing.assert_close(mixed, torch.stack([x[i] @ (W + deltas[i]).T + bias for i in range(3)]))
    with core.use(model, "default", "other"):
        torch.testing.assert_close(model(x), x @ (W + deltas[0] + deltas[2]).T + bias)


def batches(tokens: Tensor, labels: Tensor, sizes: list[int]) -> list[Batch]:
    """Rows in batches of the given sizes."""
    return [
        Batch(i, torch.ones_like(i), t, 0.0, i.numel(), int((t[:, 1:] != -100).sum()))
        for i, t in zip(tokens.split(sizes), labels.split(sizes), strict=True)
    ]


def test_loss_is_the_mean_over_trained_tokens(tiny_llama: Any) -> None:
    tokens = torch.randint(0, 500, (4, 12))
    labels = tokens.clone()
    labels[:, 0] = -100
    labels[0, 1:9] = -100  # rows of unequal weight: a mean of the batches' means would be another number
    whole = batches(tokens, labels, [4])
    logits = tiny_llama(tokens).logits[:, :-1].float()
    by_hand = F.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1), ignore_index=-100)
    for split in (whole, batches(tokens, labels, [1, 3]), batches(tokens, labels, [1, 1, 1, 1])):
        total = sum(loss_sum(tiny_llama, batch, "cpu") for batch in split)
        trained = sum(batch.trained_tokens for batch in split)
        torch.testing.assert_close(total / trained, by_hand)


def test_perplexity_is_the_exponential_of_the_loss(tiny_llama: Any) -> None:
    tokens = torch.randint(0, 500, (2, 8))
    found = evaluate(tiny_llama, batches(tokens, tokens, [2]), "cpu")
    assert found is not None
    assert found.perplexity == pytest.approx(math.exp(found.loss))


def test_adamw_step() -> None:
    """Two steps by hand: moments, their correction, decoupled decay."""
    p = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    theta, m, v = p.detach().clone(), torch.zeros(3, 2).double(), torch.zeros(3, 2).double()
    optimizer = build_adamw([("p", p)], learning_rate=0.1, weight_decay=0.01)
    for t in (1, 2):
        g = torch.randn(3, 2, dtype=torch.float64)
        p.grad = g.clone()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        theta = theta * (1 - 0.1 * 0.01) - 0.1 * step
        torch.testing.assert_close(p.detach(), theta)
