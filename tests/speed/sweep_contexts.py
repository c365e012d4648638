"""Contexts of autograd for the sweep over architectures, each on new models: nothing is known from an earlier call."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .sweep import RUNS, Results, Runs, Subject, Sweep, objective


def adapters(subject: Subject) -> dict[str, Tensor]:
    """Return the trained parameters by name."""
    return {name: one for name, one in subject.model.named_parameters() if one.requires_grad}


def differentiated_twice(subject: Subject) -> Results:
    """Return the gradients of a training step, and those of their squared norm."""
    trained, given = adapters(subject), subject.call(subject.ids())
    subject.model.train()
    _, total = objective(subject, subject.model(**given), given)
    first = torch.autograd.grad(total, [*trained.values()], create_graph=True, allow_unused=True)
    norm = torch.stack([one.double().square().sum() for one in first if one is not None]).sum()
    second = torch.autograd.grad(norm, [*trained.values()], allow_unused=True)
    named = {"first": zip(trained, first, strict=True), "second": zip(trained, second, strict=True)}
    return {f"gradient, {at}, of {n}": g.detach() for at, made in named.items() for n, g in made if g is not None}


def functional(subject: Subject, values: dict[str, Tensor], ids: Tensor) -> Tensor:
    """Return a scalar that depends on a call with the given values of the trained parameters and ids (rows, tokens)."""
    given = subject.call(ids)
    output = torch.func.functional_call(subject.model, values, (), given)
    return objective(subject, output, given)[1]


def with_grad(subject: Subject) -> Results:
    """Return gradients from `torch.func.grad`."""
    made = torch.func.grad(partial(functional, subject))(detached(subject), subject.ids())
    return {f"gradient of {name}": one for name, one in made.items()}


def by_row(subject: Subject) -> Results:
    """Return the gradients of each row from `vmap` of `grad`."""
    run = torch.func.vmap(torch.func.grad(partial(functional, subject)), in_dims=(None, 0))
    return {f"gradient of {name}": one for name, one in run(detached(subject), subject.ids()[:, None]).items()}


def without_gradients(subject: Subject) -> Results:
    """Return outputs of `vmap` without gradients."""
    with torch.no_grad():
        return {"total": torch.func.vmap(partial(functional, subject, {}))(subject.ids()[:, None])}


def with_tangents(subject: Subject) -> Results:
    """Return the derivative in a direction from `torch.func.jvp`, and from dual tensors without gradients."""
    values = detached(subject)
    run = partial(functional, subject, ids=subject.ids())
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = {name: torch.autograd.forward_ad.make_dual(one, one) for name, one in values.items()}
        tangent = torch.autograd.forward_ad.unpack_dual(run(dual)).tangent
    return {"derivative": torch.func.jvp(run, (values,), (values,))[1], "tangent": tangent}


def detached(subject: Subject) -> dict[str, Tensor]:
    """Return copies of the trained parameters by name."""
    return {name: one.detach().clone() for name, one in adapters(subject).items()}


CONTEXTS: Runs = {
    **{f"{name} of new models": RUNS[name] for name in ("reentrant checkpointing", "checkpointing")},
    "double backward": differentiated_twice,
    "torch.func.grad": with_grad,
    "torch.func.vmap of grad": by_row,
    "torch.func.vmap": without_gradients,
    "torch.func.jvp": with_tangents,
}


def check_contexts(sweep: Sweep) -> None:
    """Compare each context on new models, with PyTorch's attention that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        for name, run in CONTEXTS.items():
            sweep.compare({name: run})
