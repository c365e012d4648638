"""Each rule rejects bad sample sources and accepts good ones; the list of known breaches only shrinks."""

from __future__ import annotations

from pathlib import Path

import pytest

from . import known, report
from .docs import dangling_references, misplaced_tests, shapeless, undocumented, unnamed_errors
from .imports import (
    core_door_breaches,
    door_breaches,
    dynamic_imports,
    floor_breaches,
    folder_cycles,
    import_cycles,
    inner_floor_breaches,
)
from .names import loosely_typed, misnamed, name_comparisons, row_names, variant_fields
from .practices import exception_texts, fieldless, foreign_memory, incomplete_components, process_state, walks, writers
from .reading import Breach, Rule, Sources
from .rules import RULES, WARNINGS
from .sizes import long_files, many_modules, oversized, small_modules

DOC = '"""Doc."""\n'
TALL = "def f():\n" + "    x = 1\n" * 61
KINDS = {
    "core/kinds/linear.py": 'LINEAR = Kind(name="Linear")\nCONV1D = replace(LINEAR, name="Conv1D")',
    "core/variants/dora.py": 'DORA = Variant(name="dora", field="use_dora")\nnames = ("dora",)\nconfig.use_dora',
    "core/variants/kasa.py": 'KASA = Variant(name="kasa", field="use_kasa")',
}
PROTOCOL = {
    "core/layers/adapter_component.py": "class AdapterComponent(Protocol):\n    def available_adapters(self): ...\n"
    "    def remove(self): ...\n    def unload(self): ...\n"
}
CAUGHT = "def f():\n    try: g()\n    except OSError as cause:\n        "
GATED = "class Gateway:\n    def pointer(self, x, dtype, shape):\n"
CHECKS = "        if x.dtype is not dtype or x.shape != shape or not x.is_contiguous(): raise ValueError\n"

BAD: list[tuple[Rule, Sources, str]] = [
    (floor_breaches, {"plan/a.py": "import lorakit.core"}, "plan (floor 3) imports core (floor 4)"),
    (floor_breaches, {"plan/a.py": "from lorakit import core"}, "plan (floor 3) imports core"),
    (floor_breaches, {"data/a.py": "from ..peft import x"}, "data (floor 6) imports peft (floor 6)"),
    (floor_breaches, {"core/a.py": "def f():\n    from lorakit.hub import x"}, "core (floor 4) imports hub"),
    (floor_breaches, {"train/a.py": "from lorakit import LoraConfig"}, "LoraConfig is imported from lorakit"),
    (floor_breaches, {"__init__.py": "from lorakit.errors import nearest"}, "__init__ (floor -2) imports errors"),
    (floor_breaches, {"attic/a.py": "x = 1"}, "'attic' has no floor"),
    (floor_breaches, {"config/a.py": "importlib.import_module('lorakit.hub')"}, "config (floor 1) imports hub"),
    (floor_breaches, {"config/a.py": "import_module(f'lorakit.hub.{name}')"}, "config (floor 1) imports hub"),
    (door_breaches, {"train/a.py": "import transformers.models"}, "transformers is imported outside"),
    (door_breaches, {"report/tables.py": "import matplotlib.pyplot as plt"}, "matplotlib is imported outside"),
    (door_breaches, {"plan/a.py": "import torch"}, "torch is imported outside"),
    (door_breaches, {"architectures/a.py": "import torch"}, "torch is imported outside"),
    (door_breaches, {"core/a.py": "import numpy as np"}, "numpy is imported outside"),
    (door_breaches, {"core/layers/a.py": "import hqq"}, "hqq is imported outside"),
    (door_breaches, {"data/a.py": "def f():\n    import pandas"}, "pandas is imported outside"),
    (inner_floor_breaches, {"core/kinds/a.py": "from lorakit.core.layers.b import c"}, "core/kinds (floor 1) imports"),
    (inner_floor_breaches, {"core/kinds/a.py": "from ..quantization import c"}, "imports core/quantization (floor 1)"),
    (
        inner_floor_breaches,
        {"core/linalg.py": "from lorakit.core import model"},
        "core/linalg (floor 2) imports core/m",
    ),
    (inner_floor_breaches, {"core/merging/a.py": "def f():\n    import lorakit.core.attachment"}, "core/attachment"),
    (inner_floor_breaches, {"core/merging/a.py": "import_module('lorakit.core.operations.b')"}, "core/operations"),
    (inner_floor_breaches, {"core/files/a.py": "if TYPE_CHECKING:\n    import lorakit.core.merging"}, "core/merging"),
    (inner_floor_breaches, {"core/files/a.py": "from lorakit.core import attach"}, "imports the public names of core"),
    (inner_floor_breaches, {"core/attic/a.py": "x = 1"}, "core/attic has no inner floor"),
    (
        folder_cycles,
        {"core/kinds/a.py": "import lorakit.core.layers.b", "core/layers/b.py": "from lorakit.core.kinds import a"},
        "kinds -> layers -> kinds",
    ),
    (
        import_cycles,
        {"a.py": "from lorakit import b", "b.py": "import lorakit.a"},
        "lorakit.a -> lorakit.b -> lorakit.a",
    ),
    (
        import_cycles,
        {"a/b.py": "from .c import x", "a/c.py": "def f():\n    from . import b"},
        "lorakit.a.b -> lorakit.a.c",
    ),
    (
        import_cycles,
        {"a.py": "import_module('lorakit.b')", "b.py": "import lorakit.a"},
        "a.py:1: import_module of lorakit.b, which imports this module",
    ),
    (dynamic_imports, {"train/a.py": "from importlib import import_module\nimport_module('lorakit.core')"}, "a.py:2"),
    (dynamic_imports, {"train/a.py": "importlib.import_module(f'lorakit.core.{x}')"}, "import_module of lorakit.core:"),
    (dynamic_imports, {"peft/a.py": "OURS = 'lorakit.'\nimport_module(OURS + x)"}, "import_module of lorakit:"),
    (dynamic_imports, {"peft/a.py": "OURS = 'lorakit.'\nimport_module(f'{OURS}peft.b')"}, "of lorakit.peft.b:"),
    (
        core_door_breaches,
        {"cli/a.py": "from lorakit.core.files.b import c"},
        "lorakit.core.files.b is imported outside",
    ),
    (core_door_breaches, {"cli/a.py": "def f():\n    import lorakit.core.linalg"}, "lorakit.core.linalg is imported"),
    (core_door_breaches, {"cli/a.py": "from lorakit.core import kinds"}, "lorakit.core.kinds is imported outside"),
    (loosely_typed, {"a.py": "def f(layer: Any): ..."}, "f: layer is annotated as Any"),
    (loosely_typed, {"a.py": "def f(*, state: 'Any | None' = None): ..."}, "f: state is annotated as Any"),
    (loosely_typed, {"a.py": "class A:\n    slot: typing.Optional[typing.Any]"}, "A.slot is annotated as Any"),
    (
        loosely_typed,
        {"a.py": "class A:\n    def f(self):\n        self.route: Any = 1"},
        "self.route is annotated as Any",
    ),
    (row_names, KINDS | {"ops/a.py": "x = kind == 'Linear'"}, "ops/a.py:1: 'Linear' names a kind"),
    (row_names, KINDS | {"ops/a.py": "x = kind in ('Conv1D', 'b')"}, "'Conv1D' names a kind"),
    (row_names, KINDS | {"ops/a.py": "x = {'dora'}"}, "'dora' names a kind"),
    (row_names, KINDS | {"ops/a.py": "x = {'kasa': 1}"}, "'kasa' names a kind"),
    (row_names, KINDS | {"ops/a.py": "x = table['Linear']"}, "'Linear' names a kind"),
    (row_names, KINDS | {"ops/a.py": "match x:\n    case 'Linear': ..."}, "'Linear' names a kind"),
    (row_names, KINDS | {"cli/a.py": "x = {'Linear': 1}"}, "cli/a.py:1: 'Linear' names a kind"),
    (row_names, KINDS | {"train/loop/loop.py": "x = {'dora': 1}"}, "train/loop/loop.py:1: 'dora' names a kind"),
    (row_names, KINDS | {"core/variants/dora.py": "x = ['Linear']"}, "core/variants/dora.py:1: 'Linear' names a kind"),
    (variant_fields, {"plan/a.py": "if config.use_dora: ..."}, "use_dora belongs to core/variants/dora.py"),
    (variant_fields, {"plan/a.py": "getattr(config, 'alora_invocation_tokens')"}, "alora_invocation_tokens belongs to"),
    (
        variant_fields,
        KINDS | {"plan/a.py": "replace(config, use_kasa=True)"},
        "use_kasa belongs to core/variants/kasa.py",
    ),
    (variant_fields, {"core/layers/a.py": "class A:\n    use_dora: bool"}, "use_dora belongs to"),
    (variant_fields, {"train/loop/loop.py": "config.use_dora"}, "use_dora belongs to"),
    (name_comparisons, {"core/model/a.py": "x.kind.name != PARAMETER.name"}, "kind.name is compared"),
    (name_comparisons, {"core/model/a.py": "x == PARAMETER.name"}, "PARAMETER.name is compared"),
    (name_comparisons, {"core/model/a.py": "layer.kind_name == other"}, "layer.kind_name is compared"),
    (name_comparisons, {"core/model/a.py": "layer.kind_name in names"}, "layer.kind_name is compared"),
    (name_comparisons, {"core/model/a.py": "layer.variant[name] == other"}, "layer.variant is compared"),
    (name_comparisons, {"core/model/a.py": "layer.variant.get(name) != other"}, "layer.variant is compared"),
    (misnamed, {"core/utils.py": ""}, "a file's name says what is in it"),
    (
        misnamed,
        {"core/__init__.py": "from lorakit.core.merging.merging import merge", "core/merge.py": ""},
        "merge is also",
    ),
    (fieldless, {"errors.py": "class E: ...", "a.py": "raise E('x')"}, "E carries a message alone"),
    (fieldless, {"errors.py": "class E: ...", "a.py": "raise errors.E(f'{x}') from cause"}, "a.py:1: E carries"),
    (exception_texts, {"a.py": CAUGHT + "if 'full' in str(cause): ..."}, "f reads the text of an exception"),
    (exception_texts, {"a.py": CAUGHT + "return str(cause).startswith('x')"}, "str(cause).startswith('x')"),
    (exception_texts, {"a.py": CAUGHT + "return re.search('x', str(cause))"}, "re.search('x', str(cause))"),
    (exception_texts, {"a.py": CAUGHT + "return PATTERN.fullmatch(repr(cause).lower())"}, "PATTERN.fullmatch"),
    (exception_texts, {"a.py": CAUGHT + "return cause.args[0] == 'x'"}, "cause.args[0] == 'x'"),
    (exception_texts, {"a.py": CAUGHT + "said = str(cause)\n        return 'x' in said"}, "'x' in said"),
    (exception_texts, {"a.py": CAUGHT + "first, *_ = str(cause).split()\n        return first == 'x'"}, "first == 'x'"),
    (exception_texts, {"a.py": CAUGHT + "return str(cause.__cause__) != ''"}, "str(cause.__cause__) != ''"),
    (exception_texts, {"a.py": CAUGHT + "return str(cause).removeprefix('x: ')"}, "removeprefix"),
    (exception_texts, {"a.py": "def f(e: ConfigError | None):\n    return 'x' in f'{e}'"}, "'x' in f'{e}'"),
    (exception_texts, {"a.py": "def g(text): return 'x' in text\n" + CAUGHT + "return g(str(cause))"}, "g(str(cause))"),
    (exception_texts, {"a.py": "try: ...\nexcept E as e:\n    x = 'x' in str(e)"}, "module reads the text"),
    (walks, {"core/layers/a.py": "for path, part in model.named_modules(): ..."}, "named_modules() walks the model"),
    (walks, {"peft/a.py": "list(self.model.modules())"}, "modules() walks the model"),
    (walks, {"peft/a.py": "list(self.modules())"}, "modules() walks the model"),
    (walks, {"peft/a.py": "for name, child in part._modules.items(): ..."}, "_modules.items() walks the model"),
    (process_state, {"core/layers/a.py": "X = ContextVar('x')"}, "ContextVar outside"),
    (process_state, {"core/layers/a.py": "X = contextvars.ContextVar[int]('x')"}, "ContextVar outside"),
    (process_state, {"peft/a.py": "sys.modules['peft'] = x"}, "sys.modules outside"),
    (process_state, {"peft/a.py": "del sys.modules['peft']"}, "sys.modules outside"),
    (process_state, {"peft/a.py": "sys.modules.setdefault('peft', x)"}, "sys.modules outside"),
    (process_state, {"train/a.py": "sys.meta_path.insert(0, x)"}, "sys.meta_path outside"),
    (
        incomplete_components,
        PROTOCOL | {"a.py": "class A:\n    def available_adapters(self): ...\n    def remove(self): ..."},
        "A has available_adapters and lacks unload",
    ),
    (
        incomplete_components,
        PROTOCOL
        | {
            "a.py": "class B(AdapterComponent):\n    def available_adapters(self): ...\n    @abstractmethod\n"
            "    def remove(self): ...",
            "b.py": "class C(B):\n    def remove(self): ...",
        },
        "C has available_adapters and lacks unload",
    ),
    (writers, {"cli/a.py": "print(1)"}, "print outside terminal.py"),
    (writers, {"cli/a.py": "f(say=print)"}, "print outside"),
    (writers, {"cli/a.py": "import sys\nsys.stdout.write('a')"}, "sys.stdout outside"),
    (writers, {"cli/a.py": "import sys\ndef f():\n    yield sys.stderr"}, "sys.stderr outside"),
    (writers, {"cli/a.py": "import sys, json\njson.dump(1, sys.stdout)"}, "sys.stdout outside"),
    (writers, {"cli/a.py": "from rich.console import Console\nConsole()"}, "Console outside"),
    (writers, {"cli/a.py": "from rich.live import Live\nLive()"}, "Live outside"),
    (foreign_memory, {"train/a.py": "import ctypes"}, "ctypes outside"),
    (foreign_memory, {"core/a.py": "def f():\n    from ctypes.util import find_library"}, "ctypes outside"),
    (foreign_memory, {"ops/kernels/compiled.py": "def f(x):\n    return x.data_ptr()"}, "f reads data_ptr() before"),
    (
        foreign_memory,
        {"ops/kernels/compiled.py": "def f(x):\n    p = x.data_ptr()\n    self._pointer('x', x)"},
        "f reads data_ptr() before",
    ),
    (
        foreign_memory,
        {"ops/kernels/gateway.py": GATED + "        return x.data_ptr()"},
        "pointer reads data_ptr() before",
    ),
    (oversized, {"a.py": TALL}, "f has 62 lines"),
    (oversized, {"a.py": "class A:\n    def f(self, a, b, c, d, *, e, f, g, h): ..."}, "f takes 8 arguments"),
    (
        small_modules,
        {"ops/a.py": "x = 1\n" * 59, "ops/b.py": "from lorakit.ops.a import x"},
        "imported by lorakit.ops.b",
    ),
    (small_modules, {"ops/a.py": "", "ops/b.py": "from . import a\nimport lorakit.ops.a"}, "imported by lorakit.ops.b"),
    (undocumented, {"a.py": "x = 1"}, "the module has no docstring"),
    (undocumented, {"a.py": DOC + "def f(): ..."}, "f has no docstring"),
    (undocumented, {"a.py": DOC + "class A:\n    'Doc.'\n    def f(self): ..."}, "A.f has no docstring"),
    (shapeless, {"a.py": "def f(x: torch.Tensor | None): 'Doc of x (a tensor).'"}, "f takes or returns a Tensor"),
    (shapeless, {"a.py": "def f() -> 'tuple[int, Tensor]': 'Doc.'"}, "f takes or returns a Tensor"),
    (unnamed_errors, {"a.py": "def f():\n    'Doc.'\n    raise DataError('x')"}, "f raises DataError"),
    (unnamed_errors, {"a.py": "def f():\n    'Raises:\\n RunError: x.'\n    raise errors.DataError('x')"}, "DataError"),
    (
        dangling_references,
        {"core/a.py": "'See lorakit.core.b.'", "core/__init__.py": ""},
        "names lorakit.core.b, which",
    ),
    (
        dangling_references,
        {"core/a.py": "x = 1\n'See `lorakit.core.a.y`.'"},
        "a.py:2: a docstring names lorakit.core.a.y",
    ),
    (dangling_references, {"core/a.py": "def f():\n    'See core/layers/b.py.'"}, "names core/layers/b.py"),
    (dangling_references, {"core/a.py": "class A:\n    'See `tests/laws/test_a.py`.'"}, "names tests/laws/test_a.py"),
    (
        misplaced_tests,
        {"core/files/a.py": "", "tests/core/files/test_b.py": ""},
        "tests/core/files/test_b.py: core/fil",
    ),
    (misplaced_tests, {"core/files/a.py": "", "tests/core/test_a.py": ""}, "core/a.py does not exist"),
    (misplaced_tests, {"core/files/a.py": "", "tests/core/files/test_ab.py": ""}, "core/files/ab.py does not exist"),
    (long_files, {"a.py": "x = 1\n" * 401}, "401 lines, aim for 400"),
    (long_files, {"train/trainer.py": "x = 1\n" * 601}, "601 lines, aim for 600"),
    (many_modules, {f"a{n}.py": "" for n in range(236)}, "236 modules, aim for 235"),
]
GOOD: list[tuple[Rule, Sources]] = [
    (writers, {"terminal.py": "import sys\nprint(1, file=sys.stderr)"}),
    (
        writers,
        {"cli/a.py": "import sys\nwrite_line('a', sys.stderr)\nsys.stdout.flush()\nLive(console=drawing_console())"},
    ),
    (floor_breaches, {"train/a.py": "from lorakit import __version__, core\nfrom .loop import x"}),
    (floor_breaches, {"__init__.py": "import_module(f'lorakit.{x}')", "cli/a.py": "import_module('json')"}),
    (
        door_breaches,
        {"hub/a.py": "import transformers", "cli/a.py": "import rich, yaml", "ops/a.py": "import torch"},
    ),
    (door_breaches, {"hub.py": "import gguf, json", "data/a.py": "import numpy", "report.py": "import matplotlib"}),
    (door_breaches, {"core/quantization/hqq.py": "import hqq", "train/settings/sources.py": "import yaml"}),
    (
        inner_floor_breaches,
        {
            "core/__init__.py": "from lorakit.core.operations.a import b",
            "core/layers/a.py": "from .b import c\nfrom lorakit.core.routing.route import Route\nfrom ..factor import Factor",
            "core/optimizers.py": "from lorakit.core import kinds\nimport lorakit.config",
            "hub/a.py": "from lorakit.core.operations import b",
        },
    ),
    (
        folder_cycles,
        {
            "core/__init__.py": "import lorakit.core.kinds.a",
            "core/kinds/a.py": "from . import b",
            "core/kinds/b.py": "import lorakit.core.kinds.a",
            "core/layers/a.py": "import lorakit.core.kinds.a",
        },
    ),
    (import_cycles, {"a.py": "import lorakit.b", "b.py": "if TYPE_CHECKING:\n    import lorakit.a"}),
    (import_cycles, {"a/__init__.py": "from lorakit.a.b import x", "a/b.py": "from lorakit.a import c", "a/c.py": ""}),
    (
        dynamic_imports,
        {"__init__.py": "import_module(f'lorakit.{x}')", "peft/paths.py": "import_module('lorakit.core')"},
    ),
    (dynamic_imports, {"hub/a.py": "import_module(name)\nimport_module('lorakitten')\nx = 'lorakit.core'"}),
    (core_door_breaches, {"cli/a.py": "from lorakit.core import attach\nfrom lorakit import core\nimport lorakit.hub"}),
    (
        core_door_breaches,
        {"peft/a.py": "import lorakit.core.layers.b", "core/files/a.py": "import lorakit.core.model.b"},
    ),
    (loosely_typed, {"a.py": "def f(x: Any, layer: LoraLayer, state: dict[str, Any]):\n    kind: Any = 1"}),
    (loosely_typed, {"a.py": "class A:\n    modules: Any\n    route: 'Route | None'"}),
    (
        row_names,
        KINDS | {"peft/a.py": "x == 'dora'", "config/a.py": "{'dora'}", "targets/layer_types.py": "{'Linear'}"},
    ),
    (row_names, KINDS | {"cli/a.py": "x = {'dora': 1}", "train/settings/defaults.py": "x = {'kasa': 1}"}),
    (row_names, KINDS | {"plan/a.py": "__all__ = ['Linear']\nf('Linear')\nx == 'linear'\nisinstance(x, Linear)"}),
    (variant_fields, KINDS | {"config/a.py": "self.use_dora", "peft/b.py": "x.use_kasa", "cli/c.py": "f(use_dora=1)"}),
    (variant_fields, {"train/settings/sources.py": "{'use_dora': 1}", "plan/a.py": "'Doc on use_dora.'\nx.use_doras"}),
    (
        name_comparisons,
        {"core/model/a.py": "x.name == y\ninit.name == 'eva'\nf(kind.name)\nkind.names == y\nA.name == y"},
    ),
    (name_comparisons, {"core/kinds/a.py": "kind.name == x", "peft/a.py": "layer.kind_name == x"}),
    (
        misnamed,
        {
            "core/__init__.py": "from lorakit.core import merging\nfrom lorakit.core.merging.merging import merge",
            "core/merging/merging.py": "",
        },
    ),
    (
        exception_texts,
        {"a.py": CAUGHT + "raise RunError(f'{x}: {cause}', ' '.join(str(cause).split())[:60]) from cause"},
    ),
    (exception_texts, {"a.py": CAUGHT + "return cause.code == 'x' or isinstance(cause, E) or 'x' in str(g())"}),
    (exception_texts, {"a.py": "def g(text): return text + 'x'\n" + CAUGHT + "return g(str(cause).rstrip('.'))"}),
    (exception_texts, {"a.py": "def f(kind: type[Exception], text):\n    return 'x' in str(kind) or text == 'y'"}),
    (walks, {"core/model/index.py": "model.named_modules()", "peft/a.py": "sys.modules\nindex.modules.items()"}),
    (process_state, {"core/routing/state.py": "X = ContextVar('x')", "ops/choices.py": "X = ContextVar('x')"}),
    (process_state, {"peft/paths.py": "sys.modules['a'] = sys.meta_path", "train/a.py": "sys.modules.get('numpy')"}),
    (
        incomplete_components,
        PROTOCOL
        | {
            "a.py": "class A:\n    def available_adapters(self): ...\n    def remove(self): raise NotImplementedError",
            "b.py": "class B(A):\n    def remove(self): ...\n    def unload(self): ...\nclass C(B): ...",
            "peft/c.py": "class D:\n    def unload(self): ...",
        },
    ),
    (incomplete_components, {"a.py": "class A:\n    def available_adapters(self): ..."}),
    (
        foreign_memory,
        {"ops/kernels/building.py": "import ctypes", "durable.py": "import ctypes", "durable/a.py": "import ctypes"},
    ),
    (
        foreign_memory,
        {
            "ops/kernels/gateway.py": GATED + CHECKS + "        return x.data_ptr()",
            "ops/kernels/compiled.py": "def f(self, x):\n    self._pointer('x', x)\n    return x.data_ptr()",
            "ops/kernels/triton/a.py": "def f(x, y):\n    return x.data_ptr() == y.data_ptr()",
            "train/a.py": "x.data_ptr()",
        },
    ),
    (
        oversized,
        {"a.py": "def f():\n    '''Doc." + "\n" * 70 + "'''", "peft/a.py": "def f(a, b, c, d, e, f, g, h): ..."},
    ),
    (oversized, {"a.py": "x = 1\n" * 700}),
    (
        small_modules,
        {
            "ops/a.py": "x = 1\n" * 60,
            "ops/b.py": "from lorakit.ops import a, c",
            "ops/c.py": "import lorakit.core.kinds.d",
            "ops/__init__.py": "from lorakit.ops import c",
            "core/kinds/d.py": "",
            "__main__.py": "import lorakit.ops",
        },
    ),
    (undocumented, {"a.py": DOC + "def _f(): ...\nclass _A:\n    def f(self): ...", "b.py": ""}),
    (shapeless, {"a.py": "def f(x: Annotated[int, Parameter(help='A Tensor of no code')]): 'Doc.'"}),
    (shapeless, {"a.py": "def f(x: Tensor) -> Tensor: 'Rows, (tokens, rank).'\ndef g(x: dict[str, Tensor]): 'Doc.'"}),
    (
        fieldless,
        {"errors.py": "class E: ...", "a.py": "raise E('x', what=1)\nraise E\nraise F('x')\nraise E.of('a', 1)"},
    ),
    (
        unnamed_errors,
        {
            "a.py": "def f():\n    'Raises:\\n DataError: x.'\n    try: ...\n    except E as e: raise\n    raise DataError"
        },
    ),
    (
        dangling_references,
        {
            "core/a.py": "'See lorakit.core.b, `lorakit.core.b.C.d`, `lorakit.attach` and lorakit.json; core/b.py, x/y.py.'",
            "core/b.py": "class C: ...\n'''As tests/laws/test_a.py shows, and `lorakit.peft.tuners.lora.layer`.'''",
            "__init__.py": "_HOMES = {'attach': 'core'}",
            "peft/__init__.py": "",
            "peft/paths.py": "PATHS = {'tuners/lora/layer': 'x'}",
            "tests/laws/test_a.py": "",
        },
    ),
    (
        misplaced_tests,
        {
            "core/files/__init__.py": "",
            "core/files/a.py": "",
            "core/linalg.py": "",
            **dict.fromkeys(("tests/core/files/test_a.py", "tests/core/files/test_a_again.py"), ""),
            **dict.fromkeys(("tests/core/files/test_files.py", "tests/core/test_linalg.py"), ""),
            **dict.fromkeys(("tests/laws/test_b.py", "tests/test_c.py", "tests/core/files/made.py"), ""),
        },
    ),
    (long_files, {"a.py": "x = 1\n" * 400, "train/trainer.py": "x = 1\n" * 600}),
    (many_modules, {f"a{n}.py": "" for n in range(235)} | {"tests/a.py": ""}),
]


@pytest.mark.parametrize(("rule", "sources", "said"), BAD)
def test_a_rule_catches_a_bad_house(rule: Rule, sources: Sources, said: str) -> None:
    assert said in "\n".join(map(str, rule(sources)))


@pytest.mark.parametrize(("rule", "sources"), GOOD)
def test_a_rule_passes_a_good_house(rule: Rule, sources: Sources) -> None:
    assert list(map(str, rule(sources))) == []


def test_every_rule_was_seen_to_fail() -> None:
    assert {rule for rule, _, _ in BAD} == {*RULES, *WARNINGS} == {rule for rule, _ in GOOD}


def breaches(*subjects: str, path: str = "a.py", line: int = 1) -> list[Breach]:
    return [Breach(path, subject, f"{subject} is bad", line + n) for n, subject in enumerate(subjects)]


def test_known_breaches_pass_wherever_they_are_in_the_file() -> None:
    entries = {"a.py: x": known.Entry(2, "why"), "a.py: y": known.Entry(1, "why")}
    assert known.differences(breaches("x", "y", "x", line=70), entries) == []


def test_new_breaches_fail() -> None:
    entries = {"a.py: x": known.Entry(1, "why")}
    assert known.differences(breaches("y"), {}) == ["a.py:1: y is bad"]
    said = known.differences(breaches("x", "x"), entries)
    assert said == ["a.py:1: x is bad  (2 of these, 1 known)", "a.py:2: x is bad  (2 of these, 1 known)"]


def test_a_listed_breach_that_is_gone_fails() -> None:
    (said,) = known.differences([], {"a.py: x": known.Entry(1, "why")})
    assert said.startswith("a.py: x: is listed and no longer there; remove it from the list")
    (said,) = known.differences(breaches("x"), {"a.py: x": known.Entry(3, "why")})
    assert said.startswith("a.py: x: 3 are listed and 1 left; remove it from the list")


def test_the_list_is_written_with_its_reasons() -> None:
    before = {
        "a.py: x": known.Entry(3, "a good reason"),
        "old.py: y": known.Entry(1, "moved along"),
        "gone.py: z": known.Entry(1, "one"),
        "gone_too.py: z": known.Entry(1, "another"),
    }
    now = [*breaches("x"), *breaches("y", path="new.py"), *breaches("z", path="new.py"), *breaches("w")]
    assert known.renewed(now, before) == {
        "a.py: w": known.Entry(1, known.NEW_REASON),
        "a.py: x": known.Entry(1, "a good reason"),
        "new.py: y": known.Entry(1, "moved along"),
        "new.py: z": known.Entry(1, known.NEW_REASON),
    }


def test_the_list_can_be_read_back(tmp_path: Path) -> None:
    entries = {"rule": {'a.py: "x" \\ é': known.Entry(1, 'it is "so"'), "b.py: y ×z": known.Entry(12, "why")}}
    file = tmp_path / "known.toml"
    file.write_text(known.as_toml(entries | {"empty": {}}), "utf-8")
    assert known.read(file) == entries


def test_the_report_counts() -> None:
    assert "known breaches:" in report.report()
