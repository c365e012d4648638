"""Every assumption of a kernel is checked for every pointer, and nothing is written if one does not hold."""

from __future__ import annotations

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorakit.ops import kernels
from lorakit.ops.kernels import compiled, gateway

KERNELS = compiled.kernels()
needs_kernels = pytest.mark.skipif(KERNELS is None, reason=f"no kernels: {compiled.describe()}")
OPS = Path(kernels.__file__).resolve().parent.parent


def of_ones(*shape: int) -> Tensor:
    return torch.ones(shape)


def integers(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "rms_forward": lambda: {
        "x": of_ones(3, 8),
        "w": of_ones(8),
        "eps": 1e-6,
        "offset": 0.0,
        "n": of_ones(3, 8),
        "rstd": of_ones(3, 1),
    },
    "rms_recompute": lambda: {
        "x": of_ones(3, 8),
        "w": of_ones(8),
        "offset": 0.0,
        "rstd": of_ones(3, 1),
        "n": of_ones(3, 8),
    },
    "rms_backward": lambda: {
        "dn": of_ones(3, 8),
        "x": of_ones(3, 8),
        "w": of_ones(8),
        "offset": 0.0,
        "rstd": of_ones(3, 1),
        "add": of_ones(3, 8),
        "dx": of_ones(3, 8),
    },
    "gate": lambda: {"act": "silu", "first": of_ones(3, 8), "up": of_ones(3, 8), "out": of_ones(3, 8)},
    "gate_backward": lambda: {
        "act": "silu",
        "da": of_ones(3, 8),
        "first": of_ones(3, 8),
        "up": of_ones(3, 8),
        "dfirst": of_ones(3, 8),
        "dup": of_ones(3, 8),
    },
    "rotate": lambda: {
        "x": of_ones(2, 3, 2, 8),
        "cos": of_ones(2, 3, 1, 4),
        "sin": of_ones(2, 3, 1, 4),
        "back": False,
        "out": of_ones(2, 3, 2, 8),
    },
    "drop": lambda: {
        "x": of_ones(3, 8),
        "p": 0.5,
        "seed": torch.ones(1, dtype=torch.uint64),
        "scale": 2.0,
        "out": of_ones(3, 8),
    },
    "softmax": lambda: {
        "scores": of_ones(2, 3, 8),
        "low": integers(0, 0, 3, dtype=torch.int32),
        "high": integers(1, 8, 7, dtype=torch.int32),
    },
    "softmax_backward": lambda: {"weights": of_ones(2, 3, 8), "ds": of_ones(2, 3, 8)},
    "cross_entropy": lambda: {
        "logits": of_ones(3, 8),
        "labels": integers(0, 7, 3),
        "scale": 1.0,
        "gradients": True,
        "losses": of_ones(3),
    },
    "add_per_row": lambda: {
        "x": of_ones(3, 2, 8),
        "A": of_ones(4, 2, 8),
        "Bt": of_ones(4, 2, 6),
        "index": integers(0, -1, 3),
        "y": of_ones(3, 2, 6),
    },
    "int8_quantize": lambda: {
        "x": of_ones(3, 8),
        "factors": of_ones(8),
        "kept": integers(0, 3, 7),
        "q": torch.ones(3, 8, dtype=torch.int8),
        "scale": of_ones(3),
        "columns": of_ones(3, 3),
    },
    "int8_output": lambda: {
        "sums": torch.ones(3, 8, dtype=torch.int32),
        "t": of_ones(3),
        "s": of_ones(8),
        "bias": of_ones(8),
        "left": of_ones(3, 4),
        "right": of_ones(2, 8, 2),
        "y": of_ones(3, 8),
    },
    "int8_add": lambda: {
        "sums": torch.ones(3, 8, dtype=torch.int32),
        "u": of_ones(3),
        "g": of_ones(8),
        "partial": of_ones(3, 8),
        "total": of_ones(3, 8),
    },
    "int8_input_gradient": lambda: {
        "sums": torch.ones(3, 8, dtype=torch.int32),
        "u": of_ones(3),
        "g": of_ones(8),
        "columns": of_ones(3, 3),
        "kept": integers(0, 3, 7),
        "partial": of_ones(3, 8),
        "dx": of_ones(3, 8),
    },
    "int8_few_rows": lambda: {
        "x": of_ones(3, 8),
        "g": of_ones(8),
        "kept": integers(0, 3, 7),
        "q": torch.ones(6, 8, dtype=torch.int8),
        "s": of_ones(6),
        "columns": of_ones(6, 3),
        "bias": of_ones(6),
    },
    "linear_few_rows": lambda: {"x": of_ones(3, 8), "W": of_ones(6, 8), "bias": of_ones(6)},
    "attend_slots": lambda: {
        "q": of_ones(3, 1, 4, 8),
        "keys": of_ones(6, 2, 8),
        "values": of_ones(6, 2, 8),
        "table": integers(0, 1, 2, 3, 4, 5).view(3, 2),
        "lengths": integers(1, 2, 2),
        "scale": 1.0,
    },
}
"""Return a valid call of each kernel."""

WRONG: dict[str, Callable[[Tensor], Tensor]] = {
    "another float": lambda t: t.to(torch.float64 if t.is_floating_point() else torch.float32),
    "narrower": lambda t: t.to(torch.bfloat16 if t.is_floating_point() else torch.int16),
    "shorter": lambda t: t[:-1].clone(),
    "longer": lambda t: torch.cat([t, t[:1]]),
    "narrow rows": lambda t: t[..., :-1].clone(),
    "another number of axes": lambda t: t[None].clone(),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "expanded": lambda t: t.flatten()[0].expand(t.shape),
    "on another device": lambda t: t.to("meta"),
}
FREE = {  # these determine the expected shapes of the others
    ("softmax", "scores"): {"narrower", "shorter", "longer", "another number of axes"},
    ("cross_entropy", "logits"): {"narrower"},
    ("int8_quantize", "x"): {"narrower"},
    ("int8_input_gradient", "dx"): {"narrower"},
    ("int8_few_rows", "x"): {"shorter", "longer", "another number of axes"},
    ("linear_few_rows", "x"): {"shorter", "longer", "another number of axes"},
}
ARGUMENTS = [
    (name, key)
    for name, call in CALLS.items()
    for key, it in call().items()
    if isinstance(it, Tensor) and key != "seed"
]
"""The seed is read by PyTorch."""
RANGES = [
    ("cross_entropy", "labels", (-1, 8, 2**40)),
    ("add_per_row", "index", (-2, 4, 2**40)),
    ("int8_input_gradient", "kept", (-1, 8, 2**40)),
    ("int8_few_rows", "kept", (-1, 8, 2**40)),
    ("attend_slots", "table", (-1, 6, 2**40)),
    ("attend_slots", "lengths", (0, 3, 2**40)),
    ("softmax", "low", (-1, 9)),
    ("softmax", "high", (-1, 9, 2**30)),
]


def test_each_kernel_has_a_call_here() -> None:
    assert CALLS.keys() == gateway.SIGNATURES.keys()


@needs_kernels
@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right(name: str) -> None:
    arguments = CALLS[name]()
    getattr(KERNELS, name)(**arguments)
    assert all(t.isfinite().all() for t in arguments.values() if isinstance(t, Tensor) and t.dtype == torch.float32)


def is_another(wrong: Tensor, right: Tensor) -> bool:
    facts = [(t.dtype, t.shape, t.device, t.is_contiguous()) for t in (wrong, right)]
    return facts[0] != facts[1]


@needs_kernels
@pytest.mark.parametrize(
    ("name", "key", "wrong"),
    [(name, key, wrong) for name, key in ARGUMENTS for wrong in WRONG if wrong not in FREE.get((name, key), ())],
)
def test_a_tensor_that_does_not_fit_is_rejected_and_nothing_is_written(name: str, key: str, wrong: str) -> None:
    arguments = CALLS[name]()
    right = arguments[key]
    arguments[key] = WRONG[wrong](right)
    assert is_another(arguments[key], right)
    before = {k: t.clone() for k, t in arguments.items() if isinstance(t, Tensor) and not t.is_meta}
    with pytest.raises(ValueError):
        getattr(KERNELS, name)(**arguments)
    assert all(torch.equal(arguments[k], t) for k, t in before.items())


@needs_kernels
@pytest.mark.parametrize(("name", "key"), ARGUMENTS)
def test_a_tensor_without_storage_is_rejected(name: str, key: str) -> None:
    """Sharding frees the storage of a parameter and leaves its shape."""
    arguments = CALLS[name]()
    arguments[key] = arguments[key].clone()
    arguments[key].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="no storage"):
        getattr(KERNELS, name)(**arguments)


@needs_kernels
@pytest.mark.parametrize(("name", "key", "value"), [(name, key, value) for name, key, all_ in RANGES for value in all_])
@pytest.mark.parametrize("position", [0, 2])
def test_an_integer_out_of_range_is_rejected_and_nothing_is_written(
    name: str, key: str, value: int, position: int
) -> None:
    arguments = CALLS[name]()
    arguments[key][position] = value
    before = {k: t.clone() for k, t in arguments.items() if isinstance(t, Tensor)}
    with pytest.raises(ValueError, match=rf"^{key}: integers .*{value}"):
        getattr(KERNELS, name)(**arguments)
    assert all(torch.equal(arguments[k], t) for k, t in before.items())


@needs_kernels
def test_what_only_makes_sense_together() -> None:
    def call(name: str, **changes: Any) -> None:
        getattr(KERNELS, name)(**{**CALLS[name](), **changes})

    with pytest.raises(ValueError, match="after its last"):
        call("softmax", low=integers(0, 5, 0, dtype=torch.int32), high=integers(8, 4, 8, dtype=torch.int32))
    nothing = integers(dtype=torch.int32)
    with pytest.raises(ValueError, match=r"bounds \(0,\): neither may be empty"):
        call("softmax", low=nothing, high=nothing)
    with pytest.raises(ValueError, match="both or neither"):
        call("gate_backward", dup=None)
    with pytest.raises(ValueError, match="even"):
        call("int8_output", left=of_ones(3, 3))
    with pytest.raises(ValueError, match=f"at most {compiled.MOST_ROWS} rows"):
        call("int8_few_rows", x=of_ones(compiled.MOST_ROWS + 1, 8))
    with pytest.raises(ValueError, match="p must"):
        call("drop", p=0.0)
    with pytest.raises(ValueError, match="p must"):
        call("drop", p=float("nan"))
    for rot in (3, 10):
        with pytest.raises(ValueError, match="cos"):
            call("rotate", cos=of_ones(2, 3, 1, rot), sin=of_ones(2, 3, 1, rot))
    with pytest.raises(ValueError, match="float64"):
        doubled = {k: t.double() for k, t in CALLS["softmax_backward"]().items()}
        call("softmax_backward", **doubled)


@needs_kernels
def test_heads_of_one_token_may_come_from_a_transposed_tensor() -> None:
    arguments = CALLS["rotate"]()
    x, cos, sin = of_ones(1, 2, 1, 8).transpose(1, 2), of_ones(1, 1, 1, 4), of_ones(1, 1, 1, 4)
    assert x.stride(1) < 16
    out = of_ones(1, 1, 2, 8)
    KERNELS.rotate(**{**arguments, "x": x, "cos": cos, "sin": sin, "out": out})
    assert out[0, 0, :, :2].tolist() == [[0.0, 0.0]] * 2


def test_addresses_are_taken_in_the_gateway_alone() -> None:
    found = []
    for path in sorted(OPS.rglob("*.py")):
        if "triton" in path.relative_to(OPS).parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                inner = [n for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr == "data_ptr"]
                found += [(path.name, node.name)] * len(inner)
    assert found == [("gateway.py", "pointer")]
    strings = [path.name for path in OPS.rglob("*.py") if '"data_ptr"' in path.read_text()]
    assert strings == []


def test_every_pointer_of_every_call_comes_from_the_gateway() -> None:
    """Each pointer argument of a C call is made by `pointer` or `optional`."""
    tree = ast.parse((OPS / "kernels" / "compiled.py").read_text())
    (kernels_class,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "CompiledKernels")
    made = {
        method.name: sum(
            isinstance(n, ast.Call) and isinstance(n.func, ast.Attribute) and n.func.attr in ("_pointer", "_optional")
            for n in ast.walk(method)
        )
        for method in kernels_class.body
        if isinstance(method, ast.FunctionDef)
    }
    pointers = {name: sum(kind is gateway.c_void_p for kind in types) for name, types in gateway.SIGNATURES.items()}
    assert {name: made[name] for name in pointers} == pointers
