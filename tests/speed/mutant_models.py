"""Small models whose transformers code is edited, before or after they are accelerated.

An edit is installed in one of two ways. A fake release runs the edited file under the name of the real module, and the
model is built from its classes. A patch replaces one function or method of the real module, as libraries do that patch
transformers.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from lorakit import LoraConfig, core
from lorakit.speed import accelerate

from ..small_models import ENCODER, GROUPED, SMALL, VOCABULARY
from .mutants import Mutant, chosen, functions, mutants

TOLERANCE = 1e-4
"""Largest relative difference between two results that are equal: norms and losses round to fp32 in every dtype."""

MOVED = 10
"""Factor by which the effect of a mutant must exceed the tolerance."""

SHAKE = 1e-6
"""Relative change of all weights by which it is measured how much a mutant amplifies rounding errors."""

HELPERS = (
    "transformers.activations",
    "transformers.integrations.sdpa_attention",
    "transformers.loss.loss_utils",
    "transformers.masking_utils",
    "transformers.pytorch_utils",
)
"""Python modules whose functions are used by the modeling files. They are patched, but have no fake release."""

TABLES: tuple[dict[str, Any], ...] = (
    AttentionInterface._global_mapping,
    AttentionMaskInterface._global_mapping,
    LOSS_MAPPING,
)
"""Tables from which transformers takes functions by name."""


@dataclass(frozen=True)
class Family:
    """A small model.

    Attributes:
        folder: Name of the folder of transformers that contains its modeling file.
        model: Name of the model's class.
        words: Arguments of its config.
    """

    folder: str
    model: str
    words: Mapping[str, Any]

    @property
    def module(self) -> str:
        return f"transformers.models.{self.folder}.modeling_{self.folder}"

    def build(self, module: ModuleType | None = None) -> Any:
        """Return the model with one adapter, in training mode, built from the classes of a module or of the real one."""
        torch.manual_seed(0)
        kind = getattr(module or importlib.import_module(self.module), self.model)
        return prepared(kind(kind.config_class(**self.words)))


WINDOW = {"sliding_window": 4, "head_dim": 8}
QUERY = {"query_pre_attn_scalar": 16}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
OPT = {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
DISTILBERT = {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
EAGER = {"attn_implementation": "eager"}
GEMMA3 = GROUPED | WINDOW | QUERY | {"layer_types": ["sliding_attention", "full_attention"]}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", GROUPED),
    "llama-eager": Family("llama", "LlamaForCausalLM", GROUPED | EAGER),
    "mistral": Family("mistral", "MistralForCausalLM", GROUPED | {"sliding_window": 4}),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", GROUPED),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", GROUPED | {"head_dim": 16}),
    "gemma2": Family("gemma2", "Gemma2ForCausalLM", GROUPED | WINDOW | QUERY | EAGER),
    "gemma3": Family("gemma3", "Gemma3ForCausalLM", GEMMA3),
    "phi3": Family("phi3", "Phi3ForCausalLM", GROUPED | {"pad_token_id": 0}),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", GROUPED),
    "mixtral": Family("mixtral", "MixtralForCausalLM", GROUPED | {"num_local_experts": 2}),
    "gpt2": Family("gpt2", "GPT2LMHeadModel", GPT2 | NO_DROPOUT),
    "gpt_neox": Family("gpt_neox", "GPTNeoXForCausalLM", SMALL),
    "opt": Family("opt", "OPTForCausalLM", OPT | {"num_hidden_layers": 2, "num_attention_heads": 4}),
    "bert": Family("bert", "BertForMaskedLM", ENCODER),
    "roberta": Family("roberta", "RobertaForMaskedLM", ENCODER),
    "distilbert": Family(
        "distilbert", "DistilBertForMaskedLM", DISTILBERT | {"dropout": 0.0, "attention_dropout": 0.0}
    ),
    "t5": Family("t5", "T5ForConditionalGeneration", T5 | {"dropout_rate": 0.0, "decoder_start_token_id": 0}),
}


def prepared(model: Any) -> Any:
    """Attach an adapter to a model and make its weights large enough that each operation has an effect."""
    model.to(torch.float32)
    for one in (model.config, getattr(getattr(model, "decoder", None), "config", None)):
        if hasattr(one, "use_cache"):
            one.use_cache = False  # fused forwards do not support a forward that fills a cache
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator)
            is_norm = path.endswith("weight") and parameter.ndim == 1
            parameter.copy_(1 + 0.3 * drawn if is_norm else 0.3 * drawn)
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    core.attach(model, config, seed=1)
    return model.train()


# ---- results

IDS = torch.randint(2, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
PADDING = torch.ones_like(IDS).index_fill_(1, torch.tensor([10, 11]), 0)
ANSWERS = IDS.masked_fill(torch.arange(IDS.shape[1]) < 8, -100).masked_fill(PADDING == 0, -100)
CALLS: tuple[dict[str, Tensor], ...] = (
    {"input_ids": IDS, "labels": IDS},
    {"input_ids": IDS, "labels": ANSWERS, "attention_mask": PADDING},
)

Results = dict[str, Tensor]


def results(model: Any) -> Results:
    """Return the losses, logits and gradients of a step without padding and of one with padding."""
    found: Results = {}
    for target, call in enumerate(CALLS):
        model.zero_grad(set_to_none=True)
        output = model(**call)
        output.loss.backward()
        found[f"loss {target}"] = output.loss.detach().clone()
        if output.logits is not None:
            found[f"logits {target}"] = output.logits.detach().clone()
        for path, parameter in model.named_parameters():
            if parameter.grad is not None:
                found[f"{path} {target}"] = parameter.grad.clone()
    return found


def difference(ours: Results, theirs: Results) -> float:
    """Return the largest relative difference; a gradient that only one has counts as 0 in the other.

    Logits are compared only if both have them.
    """
    names = {name for name in ours.keys() | theirs.keys() if not name.startswith("logits")}
    names |= {name for name in ours.keys() & theirs.keys() if name.startswith("logits")}
    return max(_difference(ours.get(name), theirs.get(name)) for name in names)


def noise(model: Any, theirs: Results) -> float:
    """Return the relative difference of a plain model's results after a small relative change of its weights."""
    weights = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    generator = torch.Generator().manual_seed(7)
    kept = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1 + SHAKE * torch.randn(weight.shape, generator=generator))
        with torch.enable_grad():
            found = difference(results(model), theirs)
        for weight, own in zip(weights, kept, strict=True):
            weight.copy_(own)
    return found


def _difference(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return 0.0 if not (other if one is None else one).any() else 1.0
    if one.shape != other.shape or not bool(one.isfinite().all()):
        return float("inf")
    return float((one - other).norm()) / max(float(other.norm()), 1e-9)


# ---- the mutants of a family


def source_of(module: str) -> tuple[str, str]:
    """Return the path and the text of the file of a Python module."""
    path = importlib.import_module(module).__file__ or ""
    return path, Path(path).read_text()


@functools.cache
def mutants_of(family: str) -> tuple[Mutant, ...]:
    """Return the mutants of a family's modeling file and of its helpers, on lines that the model runs."""
    found = []
    for module, run in lines_run(family).items():
        found += mutants(module, source_of(module)[1], run)
    return tuple(mutant for mutant in found if not mutant.function.endswith("._init_weights"))


def lines_run(family: str) -> dict[str, set[int]]:
    """Return a dict from Python module to the lines that building and running a plain model executes."""
    modules = (FAMILIES[family].module, *HELPERS)
    found: dict[str, set[int]] = {source_of(module)[0]: set() for module in modules}

    def lines(frame: FrameType, event: str, _: object) -> Any:
        found[frame.f_code.co_filename].add(frame.f_lineno)
        return lines

    before = sys.gettrace()
    sys.settrace(lambda frame, event, _: lines if frame.f_code.co_filename in found else None)
    try:
        results(FAMILIES[family].build())
    finally:
        sys.settrace(before)
    return {module: found[source_of(module)[0]] for module in modules}


# ---- installing a mutant


@contextmanager
def released(module: str, source: str, folder: Path) -> Iterator[ModuleType]:
    """Run a text under the name of a module of transformers, as a release with this text would.

    Args:
        module: Dotted name of the Python module.
        source: Text of its file.
        folder: Folder for the file.
    """
    real = importlib.import_module(module)
    path = folder.joinpath(*module.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(module, path)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    parent, _, name = module.rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module, made)
        patch.setattr(importlib.import_module(parent), name, made, raising=False)
        spec.loader.exec_module(made)
        yield made
    assert sys.modules[module] is real


@contextmanager
def patched(mutant: Mutant, folder: Path) -> Iterator[ModuleType]:
    """Replace one function or method by its mutant, wherever transformers refers to it."""
    module = importlib.import_module(mutant.module)
    path = folder / f"{mutant.module.rpartition('.')[2]}.py"
    path.write_text(mutant.apply(source_of(mutant.module)[1]))
    node = dict(functions(ast.parse(path.read_text())))[mutant.function]
    local: dict[str, Any] = {}
    exec(_compiled(node, path), vars(module), local)
    owner, _, name = mutant.function.rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        if owner:
            patch.setattr(vars(module)[owner], name, local[name])
        else:
            _replace(patch, vars(module)[name], local[name])
        yield module


def _compiled(node: ast.AST, path: Path) -> CodeType:
    return compile(ast.Module([node], []), str(path), "exec")  # type: ignore[list-item]


def _replace(patch: pytest.MonkeyPatch, old: Any, new: Any) -> None:
    """Replace a function in the globals of all modules of transformers and in the tables of functions."""
    modules = [vars(one) for name, one in list(sys.modules.items()) if name.startswith("transformers.")]
    for table in (*modules, *TABLES):
        for name in [name for name, value in list(table.items()) if value is old]:
            patch.setitem(table, name, new)


# ---- what a mutant does

WAYS = ("released before", "patched before", "patched after")
"""How a mutant is installed: as a fake release or as a patch, before or after the model is accelerated."""

Change = Callable[[Any], AbstractContextManager[Any]]
"""Function that changes a model, or the code that it runs, within a `with` block."""


@functools.cache
def usual(family: str) -> Results:
    """Return the results of the plain model without a mutant."""
    return results(FAMILIES[family].build())


def order(family: str, way: str, seed: int) -> list[Mutant]:
    """Return the mutants of a family in the order in which they are tried.

    A fake release edits only the modeling file; a patch does not edit `__init__`, which calls `super()`. Half of the
    mutants that are installed before acceleration are hidden from probes.
    """
    found, module = mutants_of(family), FAMILIES[family].module
    if way == WAYS[0]:
        fitting = [mutant for mutant in found if mutant.module == module]
    else:
        fitting = [mutant for mutant in found if not mutant.function.endswith("__init__")]
    found = chosen(fitting, f"{family} {way} {seed}")
    draw = random.Random(seed)
    return [mutant.hidden() if way != WAYS[2] and draw.random() < 0.5 else mutant for mutant in found]


def unseen(family: str, way: str, mutant: Mutant, folder: Path) -> str | None:
    """Return "" if the accelerated model follows a mutant, otherwise what it does instead.

    Returns None if the mutant does not count: with it, the plain model fails, or its results are not finite or not
    different.

    Args:
        family: Name of the family.
        way: How the mutant is installed, one of `WAYS`.
        mutant: The mutant.
        folder: Folder for the edited file.
    """
    usual(family)  # not with the mutant
    if way != WAYS[0]:
        check = after if way == WAYS[2] else before
        return check(family, FAMILIES[family].build(), lambda _: patched(mutant, folder))
    source = mutant.apply(source_of(mutant.module)[1])
    with ExitStack() as stack:
        try:
            model = FAMILIES[family].build(stack.enter_context(released(mutant.module, source, folder)))
        except Exception:  # noqa: BLE001 - a mutant may fail in any way
            return None
        return before(family, model, lambda _: nullcontext())


class Expected(NamedTuple):
    """Results of the plain model with a mutant, and the largest relative difference from them."""

    results: Results
    allowed: float


def before(family: str, model: Any, change: Change) -> str | None:
    """Change a model, then accelerate it; see `unseen` for the result."""
    with ExitStack() as stack:
        expected = _expected(family, model, change, stack)
        if expected is None:
            return None
        return "; ".join(filter(None, (_accelerated(model, expected, logits) for logits in (True, False))))


def after(family: str, model: Any, change: Change) -> str | None:
    """Accelerate a model, then change it and take the change back; see `unseen` for the result."""
    with ExitStack() as stack:
        expected = _expected(family, model, change, stack)
    own = Expected(usual(family), TOLERANCE)
    if expected is None or _wrong(model, own, "plain, changed back"):
        return None
    wrong = []
    for logits in (True, False):
        acceleration = accelerate(model, logits=logits)
        wrong.append(_wrong(model, own, f"logits={logits}, unchanged"))
        with change(model):
            wrong.append(_wrong(model, expected, f"logits={logits}"))
        wrong.append(_wrong(model, own, f"logits={logits}, changed back"))
        acceleration.undo()
    return "; ".join(filter(None, wrong))


def _expected(family: str, model: Any, change: Change, stack: ExitStack) -> Expected | None:
    """Return the results of a changed plain model, or None if the change does not count."""
    try:
        stack.enter_context(change(model))
        theirs = results(model)
        allowed = TOLERANCE + noise(model, theirs)
    except Exception:  # noqa: BLE001 - a mutant may fail in any way
        return None
    is_finite = all(bool(one.isfinite().all()) for one in theirs.values())
    has_moved = is_finite and difference(theirs, usual(family)) > MOVED * allowed
    return Expected(theirs, allowed) if has_moved else None


def _accelerated(model: Any, expected: Expected, logits: bool) -> str:
    try:
        acceleration = accelerate(model, logits=logits)
    except Exception as failed:  # noqa: BLE001 - reported
        return f"accelerate raised {type(failed).__name__}: {failed}"
    wrong = _wrong(model, expected, f"logits={logits}")
    acceleration.undo()
    return wrong


def _wrong(model: Any, expected: Expected, case: str) -> str:
    try:
        found = difference(results(model), expected.results)
    except Exception as failed:  # noqa: BLE001 - reported
        return f"{case}: {type(failed).__name__}: {failed}"
    return "" if found <= expected.allowed else f"{case}: differs by {found:.1e} (allowed {expected.allowed:.1e})"
