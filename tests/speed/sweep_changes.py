"""Changes of settings for the sweep over architectures: config fields before a model is built, and anything after."""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .architectures import SIZES
from .sweep import CALLS, RUNS, Results, Settings, Subject, Sweep, answer, attempt, described, differences, wrong

LEFT_OUT = re.compile(
    r".*_token_id|.*_token_index|initializ.*|init_.*|.*_init|.*_init_.*|.*_std|.*name.*|model_type|transformers_version"
    r"|architectures|dtype|torch_dtype|.*label.*|_.*|use_cache|return_dict|output_(?!router).*|tie_.*|auto_map|.*_version"
    r"|.*(vision|audio|image|video|speech|spatial).*|gradient_checkpointing|tokenizer.*|task_specific.*|quantiz.*"
)
"""Fields that do not change the arithmetic, or that belong to other inputs than text."""

ARITHMETIC_SIZES = ("num_key_value_heads", "head_dim", "sliding_window", "attention_window", "query_pre_attn_scalar")
"""Sizes that are changed too."""

CHOICES: dict[str, tuple[Any, ...]] = {
    "position_embedding_type": ("relative_key", "relative_key_query", "rotary", "rope", "nope", "alibi"),
    "feed_forward_proj": ("gated-gelu", "gated-silu", "relu"),
    "scoring_func": ("softmax", "sigmoid", "sqrtsoftplus"),
    "topk_method": ("greedy", "group_limited_greedy", "noaux_tc"),
    "layer_types": ("full_attention", "sliding_attention", "chunked_attention", "linear_attention"),
    "problem_type": ("regression", "multi_label_classification"),
    "classifier_pooling": ("cls", "mean"),
}
"""Values of fields that are neither numbers nor activations."""

ACTIVATIONS = ("relu", "gelu_pytorch_tanh", "silu", "tanh")
FACTORS = [1.0, 1.5, 2.0, 3.0]
LONG = {"rope_type": "longrope", "short_factor": FACTORS, "long_factor": FACTORS[::-1]}
ROPES: tuple[Settings, ...] = (
    {"rope_type": "linear", "factor": 3.0},
    {"rope_type": "dynamic", "factor": 3.0},
    {"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 16, "attention_factor": 1.3},
    LONG | {"factor": 3.0, "original_max_position_embeddings": 16},
    {"rope_type": "llama3", "factor": 3.0, "original_max_position_embeddings": 16}
    | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"partial_rotary_factor": 0.5},
    {"rope_theta": 50.0},
)
"""Rotary positions whose thresholds are shorter than the rows."""

DROPOUT = 0.2
COPIES, SPREAD = 384, 6.5
"""Rows of one comparison with dropout, and the largest difference of means in standard errors."""


SOME = {name: RUNS[name] for name in ("no mask", "right padding", "left padding", "training, right padding")}
"""Runs that are compared after every change."""


def check_fields(sweep: Sweep) -> None:
    """Compare models whose config has another value of one field, if that value changes the plain model's output."""
    before = sweep.results(sweep.plain(), SOME)
    for name, settings in changed_fields(sweep):
        plain = attempt(partial(sweep.plain, settings))
        after = {} if isinstance(plain, Exception) else sweep.results(plain, SOME)
        after = {run: one for run, one in after.items() if run not in before or differences(one, before[run], 0.0)}
        if after and _is_dropout(name):
            compare_dropout(sweep, name, settings)
        elif after:
            sweep.compare(SOME, f"{name}, ", settings, after)


def changed_fields(sweep: Sweep) -> Iterator[tuple[str, Settings]]:
    """Yield a name and the settings of each changed config."""
    kind = sweep.architecture.kind
    for path, value in _fields(CONFIG_MAPPING[kind](**sweep.settings).to_dict(), sweep.settings):
        for other in _others(path[-1], value):
            settings = copy.deepcopy(sweep.settings)
            at = settings
            for name in path[:-1]:
                at = at.setdefault(name, {})
            at[path[-1]] = other
            yield f"{'.'.join(path)}={other!r}", settings


def _fields(config: Settings, settings: Settings, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    sizes = {name for names in SIZES.values() for name in names} - set(ARITHMETIC_SIZES)
    for name, value in config.items():
        if LEFT_OUT.fullmatch(name) or name in sizes:
            continue
        if isinstance(value, dict) and "model_type" in value:
            yield from _fields(value, settings.get(name, {}), (*path, name))
        else:
            yield (*path, name), value


def _others(name: str, value: Any) -> list[Any]:
    """Return other values of a field."""
    if name in CHOICES:
        made = [[one] * len(value) for one in CHOICES[name]] if isinstance(value, list) else list(CHOICES[name])
    elif name in ("rope_parameters", "rope_scaling"):
        made = [dict(_rope(value, one)) for one in ROPES]
    elif isinstance(value, bool):
        made = [not value]
    elif isinstance(value, int):
        made = [value + 1, 1, 0]
    elif isinstance(value, float):
        made = [2 * value + 0.1] if "drop" in name else [2 * value + 0.1, 0.5 * value + 0.03]
    elif isinstance(value, str):
        made = list(ACTIVATIONS)
    elif value is None:
        made = [0.3, 8, True]
    else:
        made = []
    return [one for one in made if one != value or type(one) is not type(value)]


def _rope(value: Any, change: Settings) -> Settings:
    """Return rotary parameters with a change; those of one layer type each are changed together."""
    value = value if isinstance(value, dict) else {}
    nested = {name: {**one, **change} for name, one in value.items() if isinstance(one, dict)}
    return nested or {"rope_theta": 10000.0, **value, **change}


def check_implementations(sweep: Sweep) -> None:
    """Compare models that are built with each attention implementation."""
    for implementation in ("eager", "sdpa"):
        settings = sweep.settings | {"attn_implementation": implementation}
        if not isinstance(attempt(partial(sweep.plain, settings)), Exception):
            runs = SOME | {"attentions": RUNS["attentions"]}
            sweep.compare(runs, f"attn_implementation={implementation!r}, ", settings)


def check_changes_afterwards(sweep: Sweep) -> None:
    """Compare two models after the same change of a setting, if it changes the plain model's output."""
    plain, fast = sweep.plain(), sweep.fast()
    for name in ("no mask", "left padding"):
        before = attempt(partial(_quick, name, plain))
        if isinstance(before, Exception):
            continue
        for text, change in changes_afterwards(plain.model):
            after = attempt(partial(_with, change, partial(_quick, name), plain))
            if isinstance(after, Exception) or not differences(after, before, 0.0):
                continue
            run = partial(_with, change, RUNS[name])
            wanted = attempt(partial(run, plain))
            sweep.compared += 1
            if not isinstance(wanted, Exception) and wrong(run, fast, wanted):
                sweep.compare({name: run}, f"{text} afterwards, ")


def _quick(name: str, one: Subject) -> Results:
    with torch.no_grad():
        return answer(one, CALLS[name](one))


Change = Callable[[Any], contextlib.AbstractContextManager[None]]


def _with(change: Change, run: Callable[[Subject], Results], one: Subject) -> Results:
    with change(one.model):
        return run(one)


def changes_afterwards(model: Any) -> Iterator[tuple[str, Change]]:
    """Yield a name and a function that makes a change in a model, as a context manager that reverts it."""
    for implementation in ("eager", "sdpa"):
        yield f"set_attn_implementation({implementation!r})", partial(_implementation, implementation)
    for value in (True, False):
        yield f"config.is_causal={value}", partial(_field, (), "is_causal", value)
        yield f"is_causal={value} in modules", partial(_attribute, None, "is_causal", value)
    for path, value in _fields(_plain_fields(model.config), {}):
        for other in _others(path[-1], value)[:1]:
            yield f"config.{'.'.join(path)}={other!r}", partial(_field, path[:-1], path[-1], other)
    for kind, name in {(type(one), name): 0 for one in model.modules() for name in vars(one)}:
        value = next(vars(one)[name] for one in model.modules() if type(one) is kind and name in vars(one))
        if (
            name[0] != "_"
            and name not in ("training", "gradient_checkpointing")
            and isinstance(value, (bool, int, float))
        ):
            other = _others(name, value)[0]
            yield f"{kind.__name__}.{name}={other!r}", partial(_attribute, kind, name, other)
    yield "activations replaced", _activations


def _plain_fields(config: Any) -> Settings:
    return {name: value for name, value in config.to_dict().items() if name in vars(config)}


@contextlib.contextmanager
def _implementation(name: str, model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def _field(path: tuple[str, ...], name: str, value: Any, model: Any) -> Iterator[None]:
    config = model.config
    for one in path:
        config = getattr(config, one)
    with _replaced([(vars(config), name, value)]):
        yield


@contextlib.contextmanager
def _attribute(kind: type | None, name: str, value: Any, model: nn.Module) -> Iterator[None]:
    of_kind = [one for one in model.modules() if kind is None or isinstance(one, kind)]
    with _replaced([(vars(one), name, value) for one in of_kind if name in vars(one)]):
        yield


@contextlib.contextmanager
def _activations(model: nn.Module) -> Iterator[None]:
    """Replace every activation by another one."""
    places: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        for name, child in module._modules.items():
            if child is not None and ".activation" in type(child).__module__:
                places.append((module._modules, name, nn.Softsign()))
        for name, value in vars(module).items():
            if callable(value) and getattr(value, "__module__", "") in ("torch.nn.functional", "torch._C._nn"):
                places.append((vars(module), name, nn.functional.softsign))
    with _replaced(places):
        yield


@contextlib.contextmanager
def _replaced(places: list[tuple[dict[str, Any], str, Any]]) -> Iterator[None]:
    """Replace values in dictionaries, and put the old ones back."""
    missing = object()
    before = [(table, name, table.get(name, missing)) for table, name, _ in places]
    for table, name, value in places:
        table[name] = value
    try:
        yield
    finally:
        for table, name, value in before:
            if value is missing:
                table.pop(name)
            else:
                table[name] = value


def check_dropout(sweep: Sweep) -> None:
    """Compare models with dropout everywhere."""
    settings = copy.deepcopy(sweep.settings)
    if _dropping(settings):
        compare_dropout(sweep, "dropout", settings)


def compare_dropout(sweep: Sweep, name: str, settings: Settings) -> None:
    """Compare means and mean squares of outputs over dropout; equal results for one seed need no statistics."""
    run = {"training, right padding": RUNS["training, right padding"]}
    built = attempt(partial(sweep.plain, settings))
    if isinstance(built, Exception):  # the model does not support dropout
        return
    wanted = sweep.results(built, run)
    sweep.compared += len(wanted)
    if not any(wrong(run[one], sweep.fast(settings), result) for one, result in wanted.items()):
        return
    plain, fast = (attempt(partial(_spread, one)) for one in (sweep.plain(settings), sweep.fast(settings)))
    if isinstance(plain, Exception):
        return
    if isinstance(fast, Exception):
        sweep.failures.append(f"{name}: raised {described(fast)}")
        return
    error = (plain[1].square() + fast[1].square()).sqrt().clamp_min(1e-6)
    score = float(((plain[0] - fast[0]).abs() / error).max())
    if not score <= SPREAD:
        sweep.failures.append(f"{name}: means differ by {score:.1f} standard errors")


def _is_dropout(name: str) -> bool:
    return "drop" in name and "layer" not in name


def _dropping(settings: Settings) -> bool:
    """Set every dropout in settings; return whether there is one."""
    found = False
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= _dropping(value)
        elif _is_dropout(name):
            settings[name], found = DROPOUT, True
    return found


def _spread(one: Subject) -> tuple[Tensor, Tensor]:
    """Return the mean of outputs and of their squares over copies of a row, and their standard errors."""
    ids = one.ids(6, 1).expand(COPIES, -1)
    torch.manual_seed(0)
    one.model.train()
    with torch.no_grad():
        output = one.model(**one.call(ids, labels=False))
    one.model.eval()
    logits = output.get("logits", next(iter(output.values()))).double()
    both = torch.stack([logits, logits.square()])
    return both.mean(1), both.std(1) / COPIES**0.5
