"""Every model of every row in the table of architectures: one test per promise, so that a new row needs no new test."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from lorakit import core, hub
from lorakit.architectures.families import ARCHITECTURES, DEFAULT_TARGETS, architecture_of
from lorakit.architectures.layouts import Architecture, Block
from lorakit.config import LoraConfig
from lorakit.plan import Job, activations, count
from lorakit.plan.memory import logits_bytes
from lorakit.speed import accelerate

from ..plan.test_activations import _saved_bytes
from ..speed.architectures import build, inputs, small_settings

pytestmark = pytest.mark.filterwarnings("ignore")

WITH_BLOCKS = [(row, name) for row in ARCHITECTURES if row.block is not None for name in row.models]
PLANNED = [(row, name) for row, name in WITH_BLOCKS if row.is_planned]
WAYS = [(dtype, is_accelerated) for dtype in ("bfloat16", "float32") for is_accelerated in (True, False)]
"""Dtypes of a base, with and without acceleration; the first is the one for every class, the others are for one per row."""
WHOLE = ("decoder layer", "encoder layer", "sublayer")
"""Names of the fused forward methods that compute a block, or a sublayer that is a module of its own."""

LAYERS, ROWS, LENGTH = 12, 2, 48


def named(value: Any) -> str:
    """Return an id of a parameter."""
    return value.name if isinstance(value, Architecture) else str(value)


def made(name: str, layers: int | None = None) -> Any:
    """Return a small model of a class, frozen, without dropout and cache; with `layers`, rows are within the window."""
    kind = getattr(transformers, name).config_class.model_type
    settings = small_settings(kind, name)
    if layers is not None:
        settings |= {key: layers for key in ("num_hidden_layers", "n_layer", "n_layers") if key in settings}
        if "layer_types" in settings:
            settings["layer_types"] = [settings["layer_types"][index % 2] for index in range(layers)]
        if "sliding_window" in settings:
            settings["sliding_window"] = 2 * LENGTH
    model = build(kind, name, settings)
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    return model


def blocks_of(model: Any, block: Block) -> list[str]:
    """Return the paths of the modules that contain the sublayers of a block."""
    found = []
    for path, module in model.named_modules():
        held = {name for name, _ in module.named_modules()}
        parts = [block.attention, block.feed_forward] if block.is_split else [None]
        for part in parts:
            paths = {*block.linears, *block.norms} if part is None else {part.before, part.inner, part.dropout}
            if paths <= held:
                found.append(path)
    return found


def gradients(model: Any, call: dict[str, Tensor]) -> list[Tensor]:
    """Return the output of a call and the gradients of the adapter; a pooler's are zero."""
    out = model(**call)[0]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [out, *torch.autograd.grad(out.square().mean(), trained, materialize_grads=True)]


@pytest.mark.axes("row")
@pytest.mark.parametrize(("row", "name"), WITH_BLOCKS, ids=named)
def test_every_block_is_fused_and_equal(row: Architecture, name: str) -> None:
    model = made(name)
    core.attach(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False), seed=1)
    call = inputs(model, 17)
    plain = gradients(model, call)
    acceleration = accelerate(model)
    assert row.block is not None
    wanted = blocks_of(model, row.block)
    fused = [swap for kind, swap in acceleration.swaps if kind in WHOLE]
    assert wanted and len(fused) == len(wanted), acceleration
    for ours, theirs in zip(gradients(model, call), plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def planned_ways() -> list[Any]:
    """Return every class with every way; those that are not in `make test` are slow."""
    found = []
    for row, name in PLANNED:
        for dtype, is_accelerated in WAYS:
            is_usual = (dtype, is_accelerated) == WAYS[0] or name == row.models[0]
            marks = () if is_usual else (pytest.mark.slow,)
            label = f"{named(row)}-{name}-{'accelerated' if is_accelerated else 'plain'}-{dtype}"
            found.append(pytest.param(row, name, is_accelerated, dtype, id=label, marks=marks))
    return found


@pytest.mark.axes("row", "is_accelerated", "dtype")
@pytest.mark.parametrize(("row", "name", "is_accelerated", "dtype"), planned_ways())
def test_a_plan_counts_what_autograd_saves(row: Architecture, name: str, is_accelerated: bool, dtype: str) -> None:
    model = made(name, LAYERS).to(getattr(torch, dtype))
    shape = hub.shape_of_module(model, "small", "here")
    config = LoraConfig(r=4, target_modules="all-linear")
    core.attach(model, config)
    model.train()
    if is_accelerated:
        accelerate(model)
    saved = _saved_bytes(model, torch.randint(3, 57, (ROWS, LENGTH)))
    job = Job(ROWS, LENGTH, dtype=dtype, accelerated=is_accelerated)
    planned = activations.of_lora(shape, count(shape, config), 0.0, job)
    labeled = shape.head is not None and hasattr(model, "lm_head")
    head = logits_bytes(shape, job) // 3 if labeled else 0
    assert planned.is_known and planned.of_blocks == (2 * LAYERS if is_accelerated else 0) == planned.fused
    assert planned.blocks + planned.outside + head == pytest.approx(saved, rel=0.03)


@pytest.mark.axes("row")
@pytest.mark.parametrize(("row", "name"), WITH_BLOCKS, ids=named)
def test_default_targets_are_found(row: Architecture, name: str) -> None:
    model = made(name)
    if model.config.model_type not in row.model_types:
        assert model.config.model_type not in DEFAULT_TARGETS
        return
    paths = [match.path for match in core.attach(model, LoraConfig(r=2)).matches]
    ends = row.targets if isinstance(row.targets, tuple) else ()
    assert paths and all(path.rsplit(".", 1)[-1] in ends for path in paths)


def test_names() -> None:
    names = [name for row in ARCHITECTURES for name in row.models]
    types = [name for row in ARCHITECTURES for name in row.model_types]
    assert len({*names}) == len(names) and len({*types}) == len(types)
    assert all(row.title for row in ARCHITECTURES if row.is_planned)
    assert architecture_of("LlamaForCausalLM") is ARCHITECTURES[0] and architecture_of("Strange") is None
