"""The product kinds x inits x variants x bases over small models: what both libraries have is the same in each cell.

The sample of the cells that both have has every pair of entries; that of the others has one cell for every rule.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorakit.peft as ours
from lorakit.core.inits import INITS
from lorakit.core.kinds import KINDS, kind_of
from lorakit.core.quantization import WEIGHT_FORMATS, weight_format_of
from lorakit.core.variants import variant_named
from lorakit.errors import AdapterFileError

from .architectures import loss_of, model_named, outputs_of
from .cells import PLACES, STEPS, WITHOUT_A_PLACE, Cell, Place, every_cell
from .closeness import ROUNDINGS, assert_close, assert_differs
from .differences import CONFIG_OF_CONVERTED
from .refusals import BY_LORAKIT, BY_PEFT, QUANTIZED, Refusal, is_compared, refusals
from .rows import copy_adapters, quiet_peft, randomise, theirs
from .written import compare_folders

TheirAttention = pytest.importorskip("peft.tuners.lora.layer").MultiheadAttention

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*expandable_segments not supported:UserWarning"),
]


def _alone(refusal: Refusal, table: tuple[Refusal, ...], cells: list[Cell]) -> Iterator[Cell]:
    """Return the cells that exactly one rule covers."""
    return (cell for cell in cells if refusals(cell, table) == [refusal])


CELLS = every_cell()
COMPARED = [cell for cell in CELLS if is_compared(cell)]
REFUSED = [cell for cell in CELLS if not is_compared(cell)]
RULES = [(refusal, table) for table in (BY_LORAKIT, BY_PEFT) for refusal in table]
EXAMPLES = [next(_alone(refusal, table, CELLS)) for refusal, table in RULES]
"""One for each rule; StopIteration here means that a rule says nothing that the others do not say."""


def test_every_row_has_a_place() -> None:
    for table, there in ((KINDS, {p.kind for p in PLACES}), (WEIGHT_FORMATS, {p.base for p in PLACES})):
        assert {row.name for row in table} == there | (WITHOUT_A_PLACE.keys() & {row.name for row in table})
        assert not there & WITHOUT_A_PLACE.keys()
    assert {init.name for init in INITS if init.needs} == {word for word in STEPS if word != "loftq"}


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place.model}-{place.kind}")
def test_a_place_is_what_it_says(place: Place) -> None:
    pytest.importorskip(place.needs)
    model = model_named(place.model)
    for target in place.targets:
        named = [m for path, m in model.named_modules() if f".{path}".endswith(f".{target}")]
        assert named, target
        for module in named:
            kind = kind_of(type(module))
            assert kind is not None and kind.name == place.kind
            assert weight_format_of(module, kind.specs(module)[0].parameter).name == place.base
    for target in place.parameters:
        path = next(path for path, _ in model.named_parameters() if f".{path}".endswith(f".{target}"))
        module = model.get_submodule(path.rpartition(".")[0])
        assert kind_of(type(module)) is None
        assert weight_format_of(module, target.rpartition(".")[2]).name == place.base


@pytest.mark.parametrize(
    "cell", [pytest.param(c, id=str(c), marks=() if c in EXAMPLES else pytest.mark.slow) for c in REFUSED]
)
def test_what_is_not_compared_is_refused(cell: Cell) -> None:
    pytest.importorskip(cell.place.needs)
    for library, table in ((ours, BY_LORAKIT), (theirs, BY_PEFT)):
        rules = refusals(cell, table)
        text = "|".join(f"({rule.text})" for rule in rules)
        if rules and rules[0].how == "raises":
            with warnings.catch_warnings(), pytest.raises(Exception, match=text):
                warnings.simplefilter("ignore")
                model = cell.made(library)
                for _ in range(2):  # peft's DoRA on 8-bit weights fails in its second forward
                    model(**cell.inputs)
        elif rules and rules[0].how == "ignores":
            _assert_default(cell, cell.made(library))
        else:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                cell.made(library)
            assert not rules or any(re.search(text, str(warning.message)) for warning in said)


def _assert_default(cell: Cell, model: nn.Module) -> None:
    plain = dict(model_named(cell.place.model).named_parameters())
    for name, parameter in model.named_parameters():
        if name.endswith("lora_embedding_A.default"):
            assert bool(parameter.any()) == (cell.init is False)
        elif ".base_layer." in name and ".lora_" not in name and not cell.rules.changes_base:
            path = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, plain[path])


@pytest.mark.axes("cell.kind", "cell.init", "cell.variant", "cell.base", alone=("cell.place",))
@pytest.mark.parametrize("cell", COMPARED, ids=str)
def test_a_cell(cell: Cell, tmp_path: Path) -> None:
    pytest.importorskip(cell.place.needs)
    peft_model, our_model = _added_once(cell.made(theirs)), cell.made(ours)
    assert _shapes(our_model) == _shapes(peft_model)
    assert _trained(our_model) == _trained(peft_model)
    _begins_alike(cell, peft_model, our_model)
    _save_what_it_began_with(peft_model, tmp_path / "began")
    randomise(peft_model)
    copy_adapters(peft_model, our_model)
    _train(cell, peft_model, our_model)
    expected, found = (_seeded(cell, model) for model in (peft_model, our_model))
    assert_close(outputs_of(found), outputs_of(expected), rtol=_rtol(cell))
    assert_differs(outputs_of(found), outputs_of(model_named(cell.place.model)(**cell.inputs)))
    loss_of(expected).backward()
    loss_of(found).backward()
    assert_close(_gradients(our_model), _gradients(peft_model), rtol=10 * _rtol(cell))
    _equal_buffers(cell, peft_model, our_model)
    evaluated = outputs_of(peft_model.eval()(**cell.inputs))
    _save(peft_model, our_model, tmp_path / "trained")
    compare_folders(cell.row, tmp_path / "trained" / "peft", tmp_path / "trained" / "lorakit")
    for writer, reader in (("peft", ours), ("lorakit", theirs)):
        _reads(cell, reader, tmp_path / "trained" / writer, evaluated)
    if cell.rules.changes_base and cell.base not in QUANTIZED:
        _converts(cell, peft_model, our_model, tmp_path, evaluated)


def _train(cell: Cell, *models: nn.Module) -> None:
    """Put the layers of a variant whose gradients differ in training into training mode, but not the modules in them."""
    if variant_named(cell.variant).down is not None:
        for model in models:
            for module in model.modules():
                if hasattr(type(module), "get_base_layer") and hasattr(module, "lora_A"):
                    module.training = True
    if cell.variant == "monteclora":
        models[0](**cell.inputs)  # peft draws its first sample when the adapter is created, and here uses it up


def _seeded(cell: Cell, model: nn.Module) -> Any:
    """Return the output; a variant that draws random numbers draws the same ones in both libraries."""
    torch.manual_seed(13)
    return model(**cell.inputs)


def _equal_buffers(cell: Cell, peft_model: nn.Module, our_model: nn.Module) -> None:
    """Check the buffers that the forward pass computed for the adapters, and make them equal to the last bit."""
    given, found = (
        {name: buffer for name, buffer in model.named_buffers() if ".lora_" in name}
        for model in (peft_model, our_model)
    )
    assert_close(found, given, rtol=_rtol(cell))
    for name, buffer in found.items():
        buffer.copy_(given[name].detach())


def _rtol(cell: Cell) -> float:
    """Of outputs; a gradient, which sums over rows and layers, may differ ten times as much.

    A residual base and DoRA's magnitude are differences and quotients of the compared values, and round once more.
    """
    return 2 * ROUNDINGS if cell.rules.changes_base or cell.variant in ("dora", "kasa") else ROUNDINGS


def _begins_alike(cell: Cell, peft_model: nn.Module, our_model: nn.Module) -> None:
    """Check that the same factors are zero, and that new adapters have the same output."""
    given = dict(peft_model.named_parameters())
    for name, parameter in our_model.named_parameters():
        if ".lora_" in name:
            assert bool(parameter.any()) == bool(given[name].any()), name
            assert parameter.dtype == given[name].dtype
    if (
        cell.rules.is_identity
        and variant_named(cell.variant).move is None
        and not (cell.rules.changes_base and cell.base in QUANTIZED)
    ):
        plain = outputs_of(model_named(cell.place.model)(**cell.inputs))
        for model in (peft_model, our_model):
            assert_close(outputs_of(model(**cell.inputs)), plain, rtol=1e-5)


def _save_what_it_began_with(model: Any, folder: Path) -> None:
    """As PEFT's users do it, for a later conversion to plain LoRA."""
    config = model.peft_config["default"]
    config.init_lora_weights, kept = True, config.init_lora_weights
    with quiet_peft():
        model.save_pretrained(folder)
    config.init_lora_weights = kept


def _save(peft_model: Any, our_model: Any, folder: Path, **more: str) -> None:
    with quiet_peft():
        warnings.filterwarnings("ignore", "Adapter 'default' applies to a base")
        warnings.filterwarnings("ignore", ".*specified but will be ignored when `init_lora_weights` is not")
        peft_model.save_pretrained(folder / "peft", **more)
        our_model.save_pretrained(folder / "lorakit", **more)


def _reads(cell: Cell, library: Any, folder: Path, expected: dict[str, Tensor], rtol: float = 1) -> None:
    """That library reads what the other wrote."""
    needs_data = cell.rules.needs and cell.rules.changes_base and folder.parent.name == "trained"
    if needs_data and library is theirs:
        return  # it needs data that is missing, or silently uses its default
    with quiet_peft():
        if needs_data:
            with pytest.raises(AdapterFileError, match="that this init changed using data, and the file does not"):
                library.PeftModel.from_pretrained(model_named(cell.place.model), folder)
            return
        warnings.filterwarnings("ignore", ".*specified but will be ignored when `init_lora_weights` is not")
        config = None if cell.variant != "qalora" or library is ours else cell.configured(library)
        model = library.PeftModel.from_pretrained(model_named(cell.place.model), folder, config=config).eval()
    assert_close(outputs_of(_added_once(model)(**cell.inputs)), expected, rtol=rtol * _rtol(cell))


def _converts(cell: Cell, peft_model: Any, our_model: Any, folder: Path, expected: dict[str, Tensor]) -> None:
    """An adapter that changed the base is saved as plain LoRA for the original base; the other library reads it."""
    _save(peft_model, our_model, folder / "plain", path_initial_model_for_weight_conversion=str(folder / "began"))
    _reads(cell, theirs, folder / "plain" / "lorakit", expected, rtol=2)  # what began is added and taken away again
    if cell.variant == "plain":  # test_where_peft_is_wrong.py::test_a_converted_dora_keeps_its_magnitude
        compare_folders(cell.converted, folder / "plain" / "peft", folder / "plain" / "lorakit", CONFIG_OF_CONVERTED)
        _reads(cell, ours, folder / "plain" / "peft", expected, rtol=2)


def _added_once(model: Any) -> Any:
    """A model in which peft's attention adds what the out-projection learned twice (docs/from-peft.md, 1): half of it."""
    for module in model.modules():
        if isinstance(module, TheirAttention):
            scales = module.base_layer.out_proj.scaling
            scales.update({name: scale / 2 for name, scale in scales.items()})
    return model


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if isinstance(tensor, Tensor) and ".quant_linear_module." not in name  # a second name of the base in peft
    }


def _trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    twice = {f"{p}.base_layer.out_proj." for p, module in model.named_modules() if isinstance(module, TheirAttention)}
    return {
        name: parameter.grad * (2 if any(name.startswith(prefix) for prefix in twice) else 1)  # the second bears none
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
