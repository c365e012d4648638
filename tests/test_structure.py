"""Each figure of `scripts/structure.py`, on a tree so small that the right value is obvious."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from torch import nn

import lorakit

from .loading import load

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def structure() -> ModuleType:
    return load("scripts/structure.py")


@pytest.fixture(scope="module")
def runtime() -> ModuleType:
    return load("scripts/structure_runtime.py")


def measured(structure: ModuleType, files: dict[str, str]) -> dict[str, tuple[float, list[str]]]:
    sources = [structure.read_source(path, text) for path, text in sorted(files.items())]
    return {key: (row.value, list(row.locations)) for key, row in structure.measure(sources, "lorakit").items()}


def test_code_lines_leave_out_docstrings_comments_and_blank_lines(structure: ModuleType) -> None:
    text = '''"""Module.

Two lines of text.
"""

# a comment
LIMIT = 3  # counts
"""A limit."""


def f(
    x,
):
    "Doc."  # of one line
    text = """one

    three"""
    return text, x
'''
    assert structure.code_lines(structure.read_source("a.py", text)) == 1 + 3 + 2 + 1


def test_a_docstring_behind_its_def_leaves_the_line(structure: ModuleType) -> None:
    assert structure.code_lines(structure.read_source("a.py", "def f(): 'Doc.'\n")) == 1


def test_sizes(structure: ModuleType) -> None:
    rows = measured(structure, {"a.py": "x = 1\n", "b/c.py": "y = 1\n\n\n", "d.py": "z = 1\n" * 401})
    assert rows["modules"] == (3, [])
    assert rows["code_lines"] == (1 + 1 + 401, [])
    assert rows["median_file"] == (3, [])
    assert rows["median_code"] == (1, [])
    assert rows["largest_file"] == (401, ["d.py"])
    assert rows["over_400"] == (1, ["d.py: 401"])


CYCLE = {
    "core/__init__.py": "from lorakit.core.a.x import f",
    "core/a/x.py": "from lorakit.core.b.y import g",
    "core/a/z.py": "",
    "core/b/y.py": "def g():\n    from ..c import w",
    "core/c/w.py": "if TYPE_CHECKING:\n    from lorakit.core.a import z",
    "core/d/v.py": "from lorakit.core.a import x\nfrom lorakit.errors import E",
    "errors.py": "",
}


def test_folder_cycles(structure: ModuleType) -> None:
    rows = measured(structure, CYCLE)
    assert rows["cyclic_folders"] == (3, ["core/a", "core/b", "core/c"])
    assert rows["cyclic_edges"] == (3, ["core/a -> core/b", "core/b -> core/c", "core/c -> core/a"])
    assert rows["cyclic_modules"][0] == 4


@pytest.mark.parametrize(
    ("change", "folders"),
    [
        ({"core/c/w.py": ""}, []),
        ({"core/c/w.py": "import lorakit.core.e", "core/e.py": "import lorakit.core.b.y"}, ["core/b", "core/c"]),
        ({"core/c/w.py": "", "core/d/v.py": "from lorakit.core import f"}, []),
        ({"core/c/w.py": "", "core/a/z.py": "from lorakit.core import f"}, ["core/a"]),  # by way of the public names
        ({"core/c/w.py": "", "peft/a.py": "import lorakit.peft.b", "peft/b.py": "import lorakit.peft.a"}, []),
    ],
)
def test_folder_cycles_of_other_trees(structure: ModuleType, change: dict[str, str], folders: list[str]) -> None:
    assert measured(structure, CYCLE | change)["cyclic_folders"] == (len(folders), folders)


def test_types(structure: ModuleType) -> None:
    text = """
from typing import Annotated, Any, Literal, cast
import typing as t

class A:
    held: dict[str, Any] = {}

def f(x: Any, *rest: "list[Any]", y: 'Any' = None, **more: object) -> tuple[Any, Any]:
    z: Literal["Any", "object"] = cast(Any, x)  # type: ignore[assignment]
    note: Annotated[int, "a note on Any", Any] = t.cast(int, x)  # no type: ignore here
    return x.cast(Any), object()  # type:ignore
"""
    rows = measured(structure, {"a.py": text, "b.py": "from torch import cast\ncast(1)"})
    assert rows["any"] == (6, ["a.py:6", "a.py:8", "a.py:8", "a.py:8", "a.py:8", "a.py:8"])
    assert rows["any_alone"] == (2, ["a.py:8", "a.py:8"])
    assert rows["object"] == (1, ["a.py:8"])
    assert rows["cast"] == (2, ["a.py:9", "a.py:10"])
    assert rows["type_ignore"] == (2, ["a.py:9", "a.py:11"])


ROWS = {
    "core/variants/__init__.py": "from lorakit.core.variants.dora import DORA",
    "core/variants/plain.py": "PLAIN = Variant(name='plain')",
    "core/variants/dora.py": "DORA = Variant(name='dora', field='use_dora')",
    "core/variants/alora.py": "ALORA = Variant(name='alora', field='invocations')\nx = 'dora'",
}


def test_lines_that_name_a_variant(structure: ModuleType) -> None:
    used = '''"""A docstring about DoRA."""

if config.use_dora or kind == "DoRA":  # one line
    isDora = f"of {aLoRA}"
data_lora = datalora = metalora = "a LoRA adapter"  # none of these is aLoRA; dora only in this comment
text = """first
an aLoRA adapter
"""
config.invocations
'''
    homes = dict.fromkeys(
        ("config/a.py", "peft/b/c.py", "cli/a.py", "train/settings/x.py", "train/settings/defaults.py"), used
    )
    rows = measured(structure, {**ROWS, **homes, "core/a.py": used, "train/loop/loop.py": "plain = 'lora'"})
    assert rows["variants"] == (
        5,
        ["core/a.py:3", "core/a.py:4", "core/a.py:7", "core/a.py:9", "core/variants/alora.py:2"],
    )
    assert rows["variant_files"] == (2, ["core/a.py", "core/variants/alora.py"])


def test_modules_with_one_importer(structure: ModuleType) -> None:
    lazy = 'HOMES = {"f": "once"}\ndef __getattr__(name):\n    return import_module(f"lorakit.train.{HOMES[name]}")'
    files = {
        "a.py": "import lorakit.b\nfrom lorakit import c\nfrom . import c, d",
        "b.py": "from lorakit import c",
        "c.py": "",
        "d.py": "",
        "train/__init__.py": lazy,
        "train/once.py": "HOME = {'train.late': 'g'}",
        "train/late.py": "f'import {lorakit}.d'",
    }
    assert measured(structure, files)["one_importer"] == (
        4,
        ["b.py <- a.py", "d.py <- a.py", "train/late.py <- train/once.py", "train/once.py <- train/__init__.py"],
    )


def test_calls_that_walk_a_model(structure: ModuleType) -> None:
    text = '''"""model.modules() in a docstring"""
for module in model.modules(): ...
names = dict(model.named_modules(remove_duplicate=False))
children = module._modules.items()
def named_modules(self): ...
module._modules["x"], sys.modules, models.modules("x"), other.items()
'''
    rows = measured(structure, {"a.py": text, "b.py": "x.modules()"})
    assert rows["walks"] == (4, ["a.py:2", "a.py:3", "a.py:4", "b.py:1"])
    assert rows["walk_files"] == (2, ["a.py", "b.py"])


def test_the_command(structure: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    package = tmp_path / "lorakit"
    package.mkdir()
    with pytest.raises(SystemExit):
        structure.main(["--src", str(package)])
    assert "it has no __init__.py" in capsys.readouterr().err
    (package / "__init__.py").write_text("x: Any = 1\n", encoding="utf-8")
    assert structure.main(["--src", str(package)]) == 0
    assert "| modules | 1 |\n" in capsys.readouterr().out
    assert structure.main(["--src", str(package), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["any"] == 1
    assert structure.main(["--src", str(package), "--list", "any"]) == 0
    assert capsys.readouterr().out == "__init__.py:1\n"
    with pytest.raises(SystemExit):
        structure.main(["--src", str(package), "--list", "words"])


def test_the_source_is_measured_without_packages(tmp_path: Path) -> None:
    (tmp_path / "__init__.py").write_text("import torch\n", encoding="utf-8")
    command = [sys.executable, "-S", str(ROOT / "scripts" / "structure.py"), "--json", "--src", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["modules"] == 1


class TestWalks:
    def test_each_walk_is_counted_once(self, runtime: ModuleType) -> None:
        model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
        walks, inner = runtime.Walks(model), model[0]
        with walks.counting():
            assert len(list(model.modules())) == 4  # which calls named_modules for itself and each child
            assert len(list(inner.named_modules())) == 2
            list(model.parameters())
            assert (walks.walks, walks.listed) == (3, 2)
            list(model.children())
            assert [name for name, _ in model._modules.items()] == ["0", "1"]
            assert (walks.walks, walks.listed) == (3, 4)
        list(model.modules())
        assert (walks.walks, walks.listed) == (3, 4)

    def test_the_model_and_torch_are_put_back(self, runtime: ModuleType) -> None:
        model, before = nn.Sequential(nn.Linear(2, 2)), nn.Module.named_modules
        children, new = model._modules, nn.ReLU()
        with pytest.raises(ValueError, match="raised"), runtime.Walks(model).counting():
            model[0] = new
            raise ValueError("raised")
        assert nn.Module.named_modules is before
        assert model._modules is children
        assert type(children) is dict
        assert model[0] is new


def test_a_trace_records_modules_whose_functions_are_called(runtime: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "traced"
    (folder / "inner").mkdir(parents=True)
    (folder / "called.py").write_text("from traced.inner import deep\ndef f(): return deep.g()\n", encoding="utf-8")
    (folder / "inner" / "deep.py").write_text("def g(): return 1\n", encoding="utf-8")
    (folder / "imported.py").write_text("x = 1\n", encoding="utf-8")
    code = f"""
import sys, threading
sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT / "scripts")!r}]
from pathlib import Path
import structure_runtime
trace = structure_runtime.Trace(Path({str(folder)!r}))
with trace.recording():
    import traced.imported
    from traced import called
    thread = threading.Thread(target=called.f)
    thread.start()
    thread.join()
called.f()
print(*sorted(trace.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["called.py", "inner/deep.py"]


def test_public_calls(runtime: ModuleType) -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4))
    calls = runtime.public_calls(model, Path(lorakit.__file__).parent)
    assert tuple(calls) == runtime.CALLS
    assert all(call.listed >= 1 and "core/__init__.py" not in call.modules for call in calls.values())
    assert any(path.endswith("loading.py") for path in calls["load_adapter"].modules)
    lines = runtime.table({**calls, "training set-up": runtime.Call(("a.py",))}).splitlines()
    assert len(lines) == 2 + len(calls) + 1
    assert lines[-1] == "| training set-up | – | – | 1 |"
