"""Compare a plain and an accelerated model of one architecture: the same calls, and the same changes of settings.

A check is a function of a `Sweep`. Calls that the plain model rejects are counted. Float64 decides about differences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import lorakit
from lorakit.speed.acceleration import pack_rows

from .architectures import CLASSIFIER, Architecture, build, small_settings

TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-5}
"""Largest relative error. transformers computes norms, rotary positions and softmax in float32 in a float64 model."""

SMALL_GRADIENT = 1e-3
"""Gradients are compared relative to their size, or to this fraction of the size of all gradients if that is larger."""

EXCLUDED = (r".*(router|o_a_proj)", r".*(router|conv1d|out_proj|x_proj|dt_proj)")
"""Modules without adapters, tried in turn: linear modules with other outputs, and weights that Mamba's kernels read."""

SHOWN = 3
"""Maximum number of differences that a check reports."""

TOKENS, BEFORE = 24, 9
"""Tokens per row, and tokens of a short row. The sizes in `architectures` put thresholds between or below them."""

Settings = dict[str, Any]
Results = dict[str, Tensor]
Runs = dict[str, Callable[["Subject"], Results]]
Call = Callable[["Subject"], dict[str, Any]]


@dataclass
class Subject:
    """A model, and how it is called.

    Attributes:
        model: Model with an adapter in every linear module where possible.
        prefixed: Whether the model has an encoder and a decoder.
        reads: Names of the arguments of its `forward`.
        only_loss: Whether gradients are those of the loss, instead of those of the loss and the logits.
        acceleration: Result of `accelerate`, or None if the model is plain.
    """

    model: Any
    prefixed: bool
    reads: frozenset[str]
    only_loss: bool = False
    acceleration: Any = None

    @property
    def classifies(self) -> bool:
        return CLASSIFIER in type(self.model).__name__

    def ids(self, tokens: int = TOKENS, rows: int = 2) -> Tensor:
        """Return random ids (rows, tokens); those of a classifier with an encoder end with the end token."""
        ids = torch.randint(3, 57, (rows, tokens), generator=torch.Generator().manual_seed(tokens))
        if self.prefixed and self.classifies:
            ids[:, -1] = self.model.config.eos_token_id
        return ids

    def call(self, ids: Tensor, mask: Tensor | None = None, *, labels: bool = True, **given: Any) -> dict[str, Any]:
        """Return the arguments of a call with ids (rows, tokens), a mask (rows, tokens) and labels."""
        made = {"input_ids": ids, **given}
        if mask is not None:
            made["attention_mask"] = mask
        if labels and "labels" in self.reads:
            made["labels"] = self.labels(ids, mask)
        if self.prefixed and not self.classifies and "decoder_input_ids" not in made:
            made["decoder_input_ids"] = ids
            if mask is not None:
                made["decoder_attention_mask"] = mask
        if hasattr(self.model.config, "use_cache"):
            made.setdefault("use_cache", False)
        return made

    def labels(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return labels: classes (rows,), or ids (rows, tokens) of the later half of the tokens."""
        if self.classifies:
            return torch.arange(len(ids)) % 2
        kept = torch.zeros_like(ids, dtype=torch.bool)
        kept[:, ids.shape[1] // 2 :] = True
        return ids.masked_fill(~(kept if mask is None else kept & mask.bool()), -100)


@dataclass
class Sweep:
    """One architecture, what was compared and what failed.

    Attributes:
        architecture: Its config type and class.
        settings: Config values of the small model.
        logits: Whether the loss is computed from logits.
        compared: Number of comparisons.
        rejected: Number of calls that the plain model rejects.
        failures: Description of each difference and error.
    """

    architecture: Architecture
    settings: Settings
    logits: bool = True
    compared: int = 0
    rejected: int = 0
    failures: list[str] = field(default_factory=list)

    def plain(self, settings: Settings | None = None, dtype: torch.dtype = torch.float32) -> Subject:
        """Return a plain model."""
        made = subject(self.architecture, self.settings if settings is None else settings, dtype)
        made.only_loss = not self.logits
        return made

    def fast(self, settings: Settings | None = None, dtype: torch.dtype = torch.float32) -> Subject:
        """Return an accelerated model with the weights of the plain one."""
        made = self.plain(settings, dtype)
        made.acceleration = lorakit.accelerate(made.model, logits=self.logits)
        return made

    def results(self, one: Subject, runs: Runs) -> dict[str, Results]:
        """Return the results of a plain model; the calls that it rejects are counted."""
        made = {name: attempt(partial(run, one)) for name, run in runs.items()}
        found = {name: result for name, result in made.items() if not isinstance(result, Exception)}
        self.rejected += len(made) - len(found)
        return found

    def compare(
        self, runs: Runs, prefix: str = "", settings: Settings | None = None, wanted: dict[str, Results] | None = None
    ) -> None:
        """Compare the results of a plain and an accelerated model; float64 decides, on new models.

        `wanted` has the results of the plain model, if they are known.
        """
        wanted = self.results(self.plain(settings), runs) if wanted is None else wanted
        fast = attempt(partial(self.fast, settings))
        if isinstance(fast, Exception):
            self.failures.append(f"{prefix}accelerate raised {described(fast)}")
            return
        self.compared += len(wanted)
        for name in [name for name, one in wanted.items() if wrong(runs[name], fast, one)]:
            exact = self.results(self.plain(settings, torch.float64), {name: runs[name]})
            fast64 = self.fast(settings, torch.float64)
            self.failures += [f"{prefix}{name}: {one}" for one in wrong(runs[name], fast64, exact.get(name))]


def wrong(run: Callable[[Subject], Results], fast: Subject, wanted: Results | None) -> list[str]:
    """Return what differs from the results of the plain model; nothing if it has none."""
    made = attempt(lambda: run(fast))
    if wanted is None:
        return []
    if isinstance(made, Exception):
        return [f"raised {described(made)}"]
    return differences(made, wanted, TOLERANCES[fast.model.dtype])


def subject(architecture: Architecture, settings: Settings, dtype: torch.dtype = torch.float32) -> Subject:
    """Return a plain model with adapters whose parameters all differ, also those that are initialized to a constant."""
    model = build(*architecture, settings)
    for excluded in EXCLUDED:
        with contextlib.suppress(lorakit.LorakitError):
            torch.manual_seed(1)
            config = lorakit.LoraConfig(r=2, target_modules="all-linear", exclude_modules=excluded)
            lorakit.attach(model, config)
            break
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                scale = 0.1 if parameter.ndim < 2 else 0.5 / max(parameter.shape[-1], 1) ** 0.5
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return Subject(model.to(dtype), bool(model.config.is_encoder_decoder), arguments(model))


def arguments(model: nn.Module) -> frozenset[str]:
    """Return the names of the arguments of a model's `forward`."""
    code = type(model).forward
    while hasattr(code, "__wrapped__"):
        code = code.__wrapped__
    return frozenset(code.__code__.co_varnames[: code.__code__.co_argcount + code.__code__.co_kwonlyargcount])


def attempt(run: Callable[[], Any]) -> Any:
    """Return the result of a function, or the exception that it raised."""
    try:
        return run()
    except Exception as failed:  # noqa: BLE001 - the caller reports it
        return failed


def described(failed: Exception) -> str:
    """Return the type of an exception and the beginning of its message."""
    return f"{type(failed).__name__}: {str(failed)[:200]}"


def answer(subject: Subject, given: dict[str, Any]) -> Results:
    """Return a call's loss, the outputs of its tokens, and the gradients of the adapters."""
    model = subject.model
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = None
    made, total = objective(subject, model(**given), given)
    if total.requires_grad:
        total.backward()
    gradients = {f"gradient of {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return {name: one.detach() for name, one in made.items()} | gradients


def objective(subject: Subject, output: Any, given: dict[str, Any]) -> tuple[Results, Tensor]:
    """Return the loss and the outputs of the tokens in a call's output, and a scalar that depends on all of them."""
    found = {name: one for name, one in output.items() if isinstance(one, Tensor) and one.is_floating_point()}
    mask = given.get("decoder_attention_mask", given.get("attention_mask"))
    made = {name: kept(one, mask) for name, one in found.items() if name in ("loss", "logits")}
    made = made or {name: kept(one, mask) for name, one in list(found.items())[:1]}
    total = torch.zeros((), dtype=torch.float64)
    for name, one in made.items():
        if subject.only_loss and "loss" in made and name != "loss":
            continue
        weights = torch.linspace(-1, 1, one.numel(), dtype=torch.float64).view(one.shape)
        total = total + ((one.double() * weights).sum() if one.ndim else one.double())
    return made, total


def kept(output: Tensor, mask: Any) -> Tensor:
    """Return the outputs (n, d) of the tokens in a mask (rows, tokens), or all outputs if it does not fit."""
    fits = isinstance(mask, Tensor) and mask.ndim == 2 and output.ndim > 2 and output.shape[:2] == mask.shape
    return output[mask.bool()] if fits else output


def differences(made: Results, wanted: Results, tolerance: float) -> list[str]:
    """Return descriptions of the results that differ by more than a tolerance."""
    gradients = [one.double().square().sum() for name, one in wanted.items() if name.startswith("gradient")]
    floor = SMALL_GRADIENT * float(sum(gradients)) ** 0.5
    found = []
    for name in sorted(wanted.keys() | made.keys()):
        if name not in wanted or name not in made:
            if name != "logits":  # a loss without logits
                found.append(f"{name}: {'only' if name in made else 'not'} in the accelerated model")
        elif made[name].shape != wanted[name].shape:
            found.append(f"{name}: shape {tuple(made[name].shape)}, not {tuple(wanted[name].shape)}")
        else:
            error = relative(made[name], wanted[name], floor if name.startswith("gradient") else 0.0)
            if not error <= tolerance:
                found.append(f"{name}: {error:.1e}")
    return found if len(found) <= SHOWN else [*found[-2:], f"{found[0]}, and {len(found) - 3} others"]


def relative(made: Tensor, wanted: Tensor, floor: float) -> float:
    """Return the norm of the difference relative to the norm; infinite values and NaN must be at the same positions."""
    made, wanted = made.double(), wanted.double()
    finite = wanted.isfinite()
    if not torch.equal(made[~finite].nan_to_num(), wanted[~finite].nan_to_num()) or not made[finite].isfinite().all():
        return float("inf")
    size = max(float(wanted[finite].norm()), floor, 1e-12)
    return float((made[finite] - wanted[finite]).norm()) / size


def padding(left: int, ids: Tensor) -> Tensor:
    """Return a mask (rows, tokens) with padding in the first row, on the left if `left` is 1, else on the right."""
    mask = torch.ones_like(ids)
    mask[0, : ids.shape[1] // 3] = 0
    return mask if left else mask.flip(1)


def four_axes(dtype: torch.dtype | None, beginning: int, subject: Subject) -> dict[str, Any]:
    """Return a call with a mask (rows, 1, tokens, tokens): causal, with `beginning` tokens that see one another."""
    ids = subject.ids()
    seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    seen[:beginning, :beginning] = True
    mask = seen.expand(len(ids), 1, -1, -1).clone()
    mask[0, :, :, -3:] &= torch.eye(ids.shape[1], dtype=torch.bool)[:, -3:]
    if dtype is not None:
        dtype = subject.model.dtype
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
    return subject.call(ids) | {"attention_mask": mask}


def embedded(subject: Subject) -> dict[str, Any]:
    """Return a call with the embeddings of ids (rows, tokens, d) instead of the ids."""
    made = subject.call(subject.ids(), padding(0, subject.ids()))
    with torch.no_grad():
        return made | {"inputs_embeds": subject.model.get_input_embeddings()(made.pop("input_ids")).clone()}


def packed(subject: Subject) -> dict[str, Any]:
    """Return a call with two sequences in one row, with positions and boundaries."""
    ids = subject.ids()
    given, labels = pack_rows(ids, padding(0, ids), ids)
    made = subject.call(given.pop("input_ids"), **given)
    return made | ({"labels": labels} if "labels" in made else {})


def restarting(subject: Subject) -> dict[str, Any]:
    """Return a call whose positions start again in the middle of a row, as packing without boundaries gives."""
    positions = torch.arange(TOKENS)
    return subject.call(subject.ids(), position_ids=torch.cat([positions[:10], positions[: TOKENS - 10]]).expand(2, -1))


CALLS: dict[str, Call] = {
    "no mask": lambda one: one.call(one.ids()),
    "one token": lambda one: one.call(one.ids(1)),
    "a short row": lambda one: one.call(one.ids(BEFORE)),
    "a long row": lambda one: one.call(one.ids(40, 1)),
    "beyond the positions": lambda one: one.call(one.ids(140, 1)),
    "no mask again": lambda one: one.call(one.ids()),
    "mask of ones": lambda one: one.call(one.ids(), torch.ones_like(one.ids())),
    "right padding": lambda one: one.call(one.ids(), padding(0, one.ids())),
    "left padding": lambda one: one.call(one.ids(), padding(1, one.ids())),
    "boolean mask": lambda one: one.call(one.ids(), padding(0, one.ids()).bool()),
    "without labels": lambda one: one.call(one.ids(), padding(0, one.ids()), labels=False),
    "packed": packed,
    "restarting positions": restarting,
    "shifted positions": lambda one: one.call(one.ids(), position_ids=(torch.arange(TOKENS) + 5).expand(2, -1)),
    "inputs_embeds": embedded,
    "boolean 4-D mask": lambda one: four_axes(None, 0, one),
    "4-D mask": lambda one: four_axes(torch.float32, 0, one),
    "4-D mask with a prefix": lambda one: four_axes(torch.float32, 6, one),
    "cache": lambda one: one.call(one.ids(), use_cache=True),
    "token types": lambda one: one.call(one.ids(), token_type_ids=one.ids() % 2),
    "hidden states": lambda one: one.call(one.ids(), output_hidden_states=True),
    "attentions": lambda one: one.call(one.ids(), output_attentions=True),
    "num_items_in_batch": lambda one: one.call(one.ids(), num_items_in_batch=torch.tensor(7)),
    "logits_to_keep": lambda one: one.call(one.ids(), labels=False, logits_to_keep=3),
    "is_causal=False": lambda one: one.call(one.ids(), is_causal=False),
    "is_causal=True": lambda one: one.call(one.ids(), is_causal=True),
}
"""Dict from name of a check to the arguments of its call."""


def cached(subject: Subject) -> Results:
    """Return the logits of a call with a cache, and of calls that continue from it with several tokens and with one."""
    ids, given, past = subject.ids(), {}, None
    with torch.no_grad():
        for start, end in ((0, 13), (13, 22), (22, 23), (23, 24)):
            call = subject.call(ids[:, start:end], labels=False, use_cache=True)
            output = subject.model(**call, past_key_values=past)
            past = output.past_key_values
            given[f"tokens {start} to {end}"] = output.logits
    return given


def generated(subject: Subject) -> Results:
    """Return the logits of greedy decoding after padding on the left."""
    ids = subject.ids(12)
    mask = None if subject.prefixed else padding(1, ids)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "use_cache": True}
    with torch.no_grad():
        output = subject.model.generate(
            ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
        )
    return {f"token {at}": one for at, one in enumerate(output.logits)}


def checkpointed(reentrant: bool, subject: Subject) -> Results:
    """Return the results of a training step with gradient checkpointing."""
    model = subject.model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    try:
        return answer(subject, subject.call(subject.ids(), padding(0, subject.ids())))
    finally:
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
        model.eval()


def trained(call: Call, subject: Subject) -> Results:
    """Return the results of a call in training mode."""
    subject.model.train()
    try:
        return answer(subject, call(subject))
    finally:
        subject.model.eval()


RUNS: Runs = {
    **{name: lambda one, call=call: answer(one, call(one)) for name, call in CALLS.items()},
    "cached tokens": cached,
    "generation": generated,
    **{
        f"training, {name}": lambda one, name=name: trained(CALLS[name], one)
        for name in ("no mask", "right padding", "left padding", "packed", "cache", "hidden states", "one token")
    },
    "reentrant checkpointing": lambda one: checkpointed(True, one),
    "checkpointing": lambda one: checkpointed(False, one),
}
"""Dict from name of a check to what it compares."""


def check_calls(sweep: Sweep) -> None:
    """Compare all calls, one after the other on the same two models."""
    sweep.compare(RUNS)


def swept(architecture: Architecture, checks: Iterable[Callable[[Sweep], None]], logits: bool = True) -> Sweep:
    """Return the result of checks on an architecture; raises NotBuilt."""
    made = Sweep(architecture, small_settings(*architecture), logits)
    for check in checks:
        check(made)
    return made
