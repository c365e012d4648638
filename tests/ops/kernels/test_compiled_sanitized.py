"""The C code under gcc's address and undefined-behavior sanitizers, and without memory for its scratch.

CC may contain options, so the library is built as always; nothing in the package knows of these tests.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.machine import this_machine
from lorakit.ops.kernels import building
from lorakit.ops.kernels.compiled import DTYPES, CompiledKernels
from lorakit.ops.kernels.compiled_matmuls import CompiledInt8Matmuls, int8_matmuls
from lorakit.ops.kernels.gateway import Gateway

from ...sampling import of_inner_session

ROOT = Path(__file__).resolve().parents[3]
GCC = shutil.which("gcc")
needs_gcc = pytest.mark.skipif(GCC is None, reason="no gcc")
NO_TILES = "-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"
SANITIZE = "-g -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all"
PROPERTIES = [
    *(f"tests/ops/kernels/test_{name}.py" for name in ("compiled", "decoder_layer", "gateway")),
    *(
        f"tests/ops/test_{name}.py"
        for name in (
            "activation",
            "attention",
            "cache",
            "attention_compiled",
            "cross_entropy",
            "dropout",
            "int8",
            "int8_matmuls",
            "linear_few_rows",
            "linear_low_rank",
            "mlp",
            "norm",
            "rotary",
            "segments",
        )
    ),
]


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory for the kernels of all options, which are part of their keys."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def cc(cache: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Set the options with which this process's kernels are built, separate from all others."""
    monkeypatch.setenv("LORAKIT_CACHE", cache)
    monkeypatch.delenv(building.SWITCH, raising=False)
    building.built.cache_clear()
    yield lambda *options: monkeypatch.setenv("CC", shlex.join(["gcc", *options]))
    building.built.cache_clear()


NO_MEMORY = """
#include <stdlib.h>
static int calls;
static void *no_memory(size_t bytes) {
    int before;
#pragma omp atomic capture
    before = calls++;
    return before < AT_FIRST ? malloc(bytes) : 0;
}
#define malloc no_memory
"""


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.costly
@needs_gcc
@pytest.mark.parametrize("dtype", list(DTYPES), ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("name", "at_first"),
    [
        *itertools.product(("softmax", "cross_entropy", "add_per_row", "int8_few_rows", "attend_slots"), (0, 1)),
        ("linear_few_rows", 0),  # all threads share its scratch
    ],
)
def test_no_memory_for_scratch_is_a_memory_error(
    tmp_path: Path, cc: Any, name: str, dtype: torch.dtype, at_first: int
) -> None:
    (tmp_path / "memory.h").write_text(NO_MEMORY)
    cc("-include", str(tmp_path / "memory.h"), f"-DAT_FIRST={at_first}")
    library = building.built(DTYPES[dtype]).functions
    assert library is not None
    kernels, x = CompiledKernels({dtype: library}), torch.zeros(4, 32, 256, dtype=dtype)
    stack, ones = torch.zeros(1, 2, 256, dtype=dtype), torch.ones(4, 1, dtype=torch.int64)
    calls: dict[str, Any] = {
        "softmax": lambda: kernels.softmax(x, None, None),
        "cross_entropy": lambda: kernels.cross_entropy(
            x.flatten(0, 1), torch.zeros(128, dtype=torch.int64), 1.0, True, torch.empty(128)
        ),
        "add_per_row": lambda: kernels.own.add_per_row(x, stack, stack, torch.zeros(4, dtype=torch.int64), x),
        "int8_few_rows": lambda: kernels.int8_few_rows(x[0], *int8_parts(256, dtype), None),
        "linear_few_rows": lambda: kernels.linear_few_rows(x[0], x[0], None),
        "attend_slots": lambda: kernels.attend_slots(
            x[:, None], x, x, ones.expand(4, 32).contiguous(), ones.flatten(), 1.0
        ),
    }
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError, match=name):
            calls[name]()
    finally:
        torch.set_num_threads(before)


def low_rank_operands() -> tuple[torch.Tensor, ...]:
    """Return dy, B, columns and h for `low_rank_gradients`."""
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*shape, generator=g).bfloat16() for shape in ((300, 96), (96, 16), (96, 5), (300, 16)))


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.costly
@needs_gcc
@pytest.mark.skipif("avx512_bf16" not in this_machine().features, reason="no bf16 dot products")
@pytest.mark.parametrize("at_first", [0, 1, 2], ids=["at all", "in any thread", "in one thread"])
def test_no_memory_for_low_rank_matmuls_is_a_memory_error(tmp_path: Path, cc: Any, at_first: int) -> None:
    (tmp_path / "memory.h").write_text(NO_MEMORY)
    cc("-include", str(tmp_path / "memory.h"), f"-DAT_FIRST={at_first}")
    library = building.built("BF16").functions
    assert library is not None
    kernel, before = CompiledKernels({torch.bfloat16: library}).low_rank, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError, match="low_rank_gradients"):
            kernel.low_rank_gradients(*low_rank_operands())
    finally:
        torch.set_num_threads(before)


@pytest.mark.costly(cases=0)
@needs_gcc
@pytest.mark.skipif("avx512_bf16" not in this_machine().features, reason="no bf16 dot products")
def test_low_rank_matmuls_without_tile_registers(cc: Any) -> None:
    """Dot products of vectors compute the same, up to the order of additions, also for a rank that fills no tile."""
    dy, B, columns, h = low_rank_operands()
    found: list[list[torch.Tensor]] = []
    for options in ((), NO_TILES):
        cc(*options)
        building.built.cache_clear()
        library = building.built("BF16").functions
        assert library is not None
        kernel, made = CompiledKernels({torch.bfloat16: library}).low_rank, []
        for r in (16, 5):
            made += kernel.low_rank_gradients(dy, B[:, :r].contiguous(), columns, h[:, :r])
        found.append(made)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=2**-12)


def int8_parts(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return g, K, Q, s and W_K of an int8 weight (80, width) for `int8_few_rows`."""
    g = torch.Generator().manual_seed(0)
    q = torch.randint(-127, 128, (80, width), generator=g).to(torch.int8)
    gain, scale, columns = (torch.rand(*shape, generator=g) for shape in ((width,), (80,), (80, 3)))
    return gain, torch.tensor([0, 5, width - 1]), q, scale, columns.to(dtype)


@pytest.mark.costly(cases=0)
@needs_gcc
@pytest.mark.skipif("avx512_vnni" not in this_machine().features, reason="no int8 dot products")
@pytest.mark.parametrize("dtype", list(DTYPES), ids=["fp32", "bf16"])
def test_few_rows_without_int8_dot_products(cc: Any, dtype: torch.dtype) -> None:
    """The plain loop computes the same, and is not used, because it is slow."""
    parts, x = int8_parts(70, dtype), torch.rand(7, 70, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = []
    for options in ((), ("-mno-avx512vnni",)):
        cc(*options)
        building.built.cache_clear()
        library = building.built(DTYPES[dtype]).functions
        assert library is not None
        kernels = CompiledKernels({dtype: library})
        found.append((kernels.few_rows > 0, kernels.int8_few_rows(x, *parts, None)))
    assert [fast for fast, _ in found] == [True, False]
    assert torch.equal(found[0][1], found[1][1])


WITHOUT_BF16 = ("-mno-avx512bf16", *NO_TILES)


@pytest.mark.costly
@needs_gcc
@pytest.mark.skipif("avx512_bf16" not in this_machine().features, reason="not a processor with all instructions")
@pytest.mark.parametrize("dtype", list(DTYPES), ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "options", [NO_TILES, WITHOUT_BF16, ("-mno-avx512f",), ("-mno-avx512f", "-mno-fma")], ids=" ".join
)
def test_rows_of_linear_layers_are_independent_on_other_processors(
    cc: Any, options: tuple[str, ...], dtype: torch.dtype
) -> None:
    cc(*options)
    library = building.built(DTYPES[dtype]).functions
    assert library is not None
    kernels, g = CompiledKernels({dtype: library}), torch.Generator().manual_seed(0)
    is_fast = dtype == torch.bfloat16 or "-mno-avx512f" not in options
    assert kernels.linear_rows == {dtype: 32 if is_fast else 0}
    for out, width in ((37, 577), (5, 3), (16, 64)):
        x, W, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((21, width), (out, width), (out,)))
        y = kernels.linear_few_rows(x, W, bias)
        wide = x.double(), W.double(), bias.double()
        exact, terms = (a @ b.t() + c for a, b, c in (wide, [each.abs() for each in wide]))
        bound = torch.finfo(dtype).eps / 2 * exact.abs() + (width + 1) * 2.0**-24 * terms
        assert bool(((y.double() - exact).abs() <= bound).all())
        for rows in range(1, 21):
            assert torch.equal(kernels.linear_few_rows(x[:rows], W, bias), y[:rows])
            assert torch.equal(kernels.linear_few_rows(x[rows:], W, bias), y[rows:])


HAS_INT8_MATMULS = {"avx512_vnni", "avx512_bf16"} <= set(this_machine().features)


def gateway_of(cc: Any, *options: str) -> Gateway:
    """Return the functions of a library for bf16 that is built with these options."""
    cc(*options)
    building.built.cache_clear()
    library = building.built(DTYPES[torch.bfloat16]).functions
    assert library is not None
    return Gateway({torch.bfloat16: library})


def int8_results(matmuls: CompiledInt8Matmuls) -> list[torch.Tensor]:
    """Return an output and a gradient for random integers, scales and low-rank terms."""
    g = torch.Generator().manual_seed(3)
    q, dq, Q = (torch.randint(-127, 128, s, generator=g).to(torch.int8) for s in ((70, 128), (70, 64), (64, 128)))
    t, s, gain = (torch.rand(n, generator=g) for n in (70, 64, 128))
    h, B, kept_x, W_K = (torch.randn(*s, generator=g).bfloat16() for s in ((70, 15), (64, 15), (70, 16), (64, 16)))
    y, dx = torch.empty(70, 64, dtype=torch.bfloat16), torch.ones(70, 128, dtype=torch.bfloat16)
    matmuls.int8_matmul_output(q, Q, (t, s), None, ((h, B), (kept_x, W_K)), y)
    columns, kept = torch.rand(70, 2, generator=g), torch.tensor([0, 127])
    matmuls.int8_matmul_input_gradient(dq, Q, (t, gain), columns, kept, None, dx)
    return [y, dx]


@needs_gcc
@pytest.mark.skipif(not HAS_INT8_MATMULS, reason="no int8 or bf16 dot products")
def test_int8_matmuls_of_a_library_without_tiles(cc: Any) -> None:
    """A processor without AMX gets the bits that a library with AMX computes without tiles."""
    usual = gateway_of(cc)
    options = NO_TILES if "amx_int8" in this_machine().features else ()
    without = gateway_of(cc, *options)
    assert without.int8_matmuls and not without.tiles
    chosen = int8_matmuls(without)
    assert chosen is not None
    expected = int8_results(CompiledInt8Matmuls(usual, tiles=False))
    assert all(torch.equal(one, other) for one, other in zip(int8_results(chosen), expected, strict=True))


@pytest.mark.usefixtures("unoptimized")
@needs_gcc
@pytest.mark.skipif(not HAS_INT8_MATMULS, reason="no int8 or bf16 dot products")
@pytest.mark.parametrize("option", ["-mno-avx512vnni", "-mno-avx512bf16"])
def test_a_processor_without_dot_products_has_no_int8_matmuls(cc: Any, option: str) -> None:
    assert int8_matmuls(gateway_of(cc, option)) is None


@pytest.mark.usefixtures("unoptimized")
@needs_gcc
@pytest.mark.skipif(not HAS_INT8_MATMULS, reason="no int8 or bf16 dot products")
@pytest.mark.parametrize("at_first", [0, 1], ids=["in no thread", "in one thread"])
def test_no_memory_for_panels_is_a_memory_error(tmp_path: Path, cc: Any, at_first: int) -> None:
    (tmp_path / "memory.h").write_text(NO_MEMORY)
    gateway = gateway_of(cc, "-include", str(tmp_path / "memory.h"), f"-DAT_FIRST={at_first}")
    q, Q = (torch.ones(*shape, dtype=torch.int8) for shape in ((192, 128), (128, 128)))
    total, scales = torch.empty(192, 128), (torch.ones(192), torch.ones(128))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError, match="int8_matmul_input_gradient"):
            CompiledInt8Matmuls(gateway, tiles=False).int8_matmul_add(q, Q, scales, None, total)
    finally:
        torch.set_num_threads(before)


def preloaded() -> str:
    """Return the sanitizer's library, which must be loaded first, and C++'s, whose exceptions it needs."""
    if GCC is None:
        pytest.skip("no gcc")
    found = []
    for name in ("libasan.so", "libstdc++.so.6"):
        asked = [GCC, f"-print-file-name={name}"]
        path = Path(subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()).resolve()
        if not path.is_file():
            pytest.skip(f"gcc comes without {name}")
        found.append(str(path))
    return " ".join(found)


def sanitized(tmp_path: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "CC": f"gcc {SANITIZE}",
        "LORAKIT_CACHE": str(tmp_path / "cache"),
        "LD_PRELOAD": preloaded(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
    }
    environment.pop(building.SWITCH, None)
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500, check=False
    )


CONTROL = """
import ctypes, sys, torch
from lorakit.ops.kernels.building import built
library = built(sys.argv[1])
assert library.functions is not None, library.why
numbers = torch.zeros(64, dtype=torch.int32)
where, count = numbers.data_ptr() + int(sys.argv[2]), int(sys.argv[3])
within = library.functions.all_within_32(
    ctypes.c_void_p(where), ctypes.c_int64(count), ctypes.c_int64(0), ctypes.c_int64(0)
)
print("within", within)
"""


@pytest.mark.slow
@pytest.mark.parametrize("define", list(DTYPES.values()), ids=["fp32", "bf16"])
def test_the_sanitizers_see_what_is_wrong(tmp_path: Path, define: str) -> None:
    """Otherwise the next test would pass whatever the code does."""
    well, beyond, askew = (
        sanitized(tmp_path, "-c", CONTROL, define, *at) for at in (("0", "64"), ("0", "65"), ("1", "1"))
    )
    assert (well.returncode, well.stdout) == (0, "within 1\n"), well.stderr[-2000:]
    assert beyond.returncode != 0
    assert "AddressSanitizer: heap-buffer-overflow" in beyond.stderr
    assert askew.returncode != 0
    assert "runtime error: load of misaligned address" in askew.stderr


@pytest.mark.slow
def test_the_properties_hold_under_the_sanitizers(tmp_path: Path, pytestconfig: pytest.Config) -> None:
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider"]  # -s: the report is the last output of the process
    chosen = ["-m", "not slow and not gpu", "-k", "not gradcheck and not the_mean and not probability"]
    done = sanitized(tmp_path, "-m", "pytest", *options, *of_inner_session(pytestconfig), *chosen, *PROPERTIES)
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[:3000])
    made = list((tmp_path / "cache" / "kernels").glob("*.so"))
    assert len(made) == len(DTYPES)
    assert all(b"__asan_report" in library.read_bytes() for library in made)
    assert " passed" in done.stdout
    assert "no kernels" not in done.stdout
