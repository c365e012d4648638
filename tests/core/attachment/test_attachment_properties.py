"""Properties over drawn names, files and orders of calls; over shapes of every kind: test_kinds_any_shape.py."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import nn

from lorakit.config import LoraConfig
from lorakit.core import (
    activate,
    adapters,
    attach,
    detach,
    disable,
    load_adapter,
    merge,
    save_adapter,
    unmerge,
    use,
)
from lorakit.core.files.inspecting import delta_norm
from lorakit.core.files.tensors import encode, read_tensors
from lorakit.core.variants.dora import row_norms
from lorakit.errors import AdapterError, AdapterFileError, LorakitError

from ...laws.snapshots import bits, same_bits
from ...laws.tolerances import assert_close
from ...laws.zoo import LINEARS, base_tensors, randomise, run

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
SIZES = st.integers(1, 9)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


NAMES = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "Z"]), max_size=12) | st.text(max_size=8)


@QUICK
@given(name=NAMES)
def test_any_name_works_everywhere_or_is_refused_at_once(name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3)).eval()
    before = [id(module) for module in model.modules()]
    try:
        attach(model, LoraConfig(r=1, target_modules=["0"]), name)
    except AdapterError as error:
        assert repr(name) in str(error)
        assert [id(module) for module in model.modules()] == before
        return
    randomise(model, name, 1)
    expected = run(model, torch.ones(1, 3))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder) / "x", name)
        assert [path.name for path in Path(folder).iterdir()] == ["x"]
        detach(model, name)
        load_adapter(model, Path(folder) / "x", name)
    with use(model, name):
        assert same_bits(run(model, torch.ones(1, 3)), expected)
    merge(model, name)
    unmerge(model, name)
    detach(model, name)


@QUICK
@given(out=SIZES, size=SIZES, r=SIZES, scale=st.floats(-8, 8))
def test_norms_without_the_product(out: int, size: int, r: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(out + 10 * size + 100 * r)
    W, A, B = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((out, size), (r, size), (out, r)))
    torch.testing.assert_close(row_norms(W, A, B, scale), (W + scale * B @ A).norm(dim=1), atol=1e-6, rtol=1e-6)
    assert delta_norm(A, B) == pytest.approx((B @ A).norm().item(), rel=1e-9, abs=1e-9)


TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=10).filter(lambda name: name != "__metadata__"),
    st.tuples(st.lists(st.integers(0, 3), max_size=3), DTYPES),
    min_size=1,
    max_size=4,
)


@QUICK
@given(drawn=TENSORS, words=st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_a_tensor_file_comes_back(drawn: dict[str, Any], words: dict[str, str], tmp_path: Path) -> None:
    tensors = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in drawn.items()}
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode(tensors, words))
    read = read_tensors(path)
    assert read.metadata == words
    assert {n: bits(t) for n, t in read.tensors.items()} == {n: bits(t) for n, t in tensors.items()}


SOUND = encode({"a.lora_A.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(1)}, {"format": "pt"})


@settings(QUICK, max_examples=300)
@given(data=st.data())
def test_any_damage_to_a_file_is_refused_by_type_or_changes_its_hash(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(SOUND)
    for _ in range(data.draw(st.integers(1, 3))):
        how = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        if how == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif how == "cut":
            del content[at : at + data.draw(st.integers(1, 9))]
        else:
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    try:
        read = read_tensors(path)
    except AdapterFileError as error:
        assert "x.safetensors" in str(error)
    else:
        path.write_bytes(SOUND)
        assert bytes(content) == SOUND or read.sha256 != read_tensors(path).sha256


class Life(RuleBasedStateMachine):
    """Any order of calls: the answer is always that of base + Σ of the active adapters, computed apart in fp64."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LINEARS.model(torch.float64)
        self.base = {name: bits(tensor) for name, tensor in self.model.state_dict().items()}
        self.plain = LINEARS.model(torch.float64)
        self.x = LINEARS.given(torch.float64)
        self.numbers: dict[str, dict[str, tuple[torch.Tensor, float]]] = {}
        self.merged: set[str] = set()
        self.joined: set[str] = set()  # in the default because they were merged
        self.default: tuple[str, ...] = ()
        self.seeds = itertools.count()
        self.folder = tempfile.TemporaryDirectory()
        self.saved: dict[str, Any] = {}

    def teardown(self) -> None:
        self.folder.cleanup()

    def read(self, name: str) -> None:
        self.numbers[name] = {}
        for path in ("up", "square"):
            layer = getattr(self.model, path)
            A, B = layer.lora_A[name].weight.detach().clone(), layer.lora_B[name].weight.detach().clone()
            self.numbers[name][path] = (B @ A, layer.scaling[name])

    def expected(self, names: tuple[str, ...]) -> torch.Tensor:
        weights = {name: tensor.clone() for name, tensor in self.plain.state_dict().items()}
        for name in names:
            for path, (product, scale) in self.numbers[name].items():
                weights[f"{path}.weight"] += scale * product
        return torch.func.functional_call(self.plain, weights, (self.x,)).detach()

    @rule(name=st.sampled_from("abc"), r=st.integers(1, 3))
    def attach(self, name: str, r: int) -> None:
        try:
            attach(self.model, LINEARS.config(r=r), name)
        except AdapterError:
            assert name in self.numbers
            return
        assert name not in self.numbers
        randomise(self.model, name, next(self.seeds))
        if not self.numbers:
            self.default = (name,)
        self.read(name)

    @precondition(lambda self: self.numbers)
    @rule(data=st.data())
    def detach(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.numbers)))
        detach(self.model, name)
        del self.numbers[name]
        self.merged.discard(name)
        self.joined.discard(name)
        self.default = tuple(n for n in self.default if n != name)

    @precondition(lambda self: self.numbers)
    @rule(data=st.data())
    def activate(self, data: st.DataObject) -> None:
        self.default = tuple(data.draw(st.lists(st.sampled_from(sorted(self.numbers)), unique=True)))
        self.joined = set()
        activate(self.model, *self.default)

    @precondition(lambda self: self.numbers)
    @rule(data=st.data())
    def train(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(set(self.numbers) - self.merged) or [""]))
        if name:
            randomise(self.model, name, next(self.seeds))
            self.read(name)

    @precondition(lambda self: self.numbers)
    @rule(data=st.data(), keep_base=st.sampled_from([True, "cpu"]))
    def merge(self, data: st.DataObject, keep_base: Any) -> None:
        names = data.draw(st.lists(st.sampled_from(sorted(self.numbers)), unique=True, min_size=1))
        try:
            merge(self.model, *names, keep_base=keep_base)
        except LorakitError:
            assert self.merged & set(names)
            return
        assert not self.merged & set(names)
        self.merged |= set(names)
        joined = tuple(n for n in names if n not in self.default)
        self.default, self.joined = (*self.default, *joined), self.joined | set(joined)

    @precondition(lambda self: self.merged)
    @rule(data=st.data())
    def unmerge(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.merged)))
        unmerge(self.model, name)
        self.merged.discard(name)
        if name in self.joined:
            self.default = tuple(n for n in self.default if n != name)
            self.joined.discard(name)

    @precondition(lambda self: self.numbers)
    @rule(data=st.data())
    def save(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.numbers)))
        save_adapter(self.model, self.folder.name, name)
        self.saved = self.numbers[name]

    @precondition(lambda self: self.saved)
    @rule(name=st.sampled_from("abc"))
    def load(self, name: str) -> None:
        if name in self.numbers:
            return
        load_adapter(self.model, self.folder.name, name)
        if not self.numbers:
            self.default = (name,)
        self.numbers[name] = self.saved

    @invariant()
    def the_answers_are_right(self) -> None:
        assert list(adapters(self.model)) == list(self.numbers)
        assert_close(run(self.model, self.x), self.expected(self.default), torch.float64)
        if not self.numbers:
            return
        with disable(self.model):
            assert same_bits(run(self.model, self.x), run(self.plain, self.x))
        for names in [(name,) for name in self.numbers] + [tuple(self.numbers)]:
            with use(self.model, *names):
                assert_close(run(self.model, self.x), self.expected(names), torch.float64)

    @invariant()
    def the_base_is_the_base(self) -> None:
        if not self.merged:
            present = {name: bits(tensor) for name, tensor in base_tensors(self.model).items()}
            assert present == self.base


Life.TestCase.settings = settings(max_examples=30, stateful_step_count=15, deadline=None)
TestLife = Life.TestCase
