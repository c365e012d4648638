"""Each contract and rule rejects a bad sample, and each rule accepts a good one; ruff and mypy have the other rules."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections import Counter

import grimp
import pytest
from importlinter import Contract, configuration
from importlinter.contracts.forbidden import ForbiddenContract
from importlinter.contracts.layers import LayersContract
from importlinter.contracts.protected import ProtectedContract

from .contracts import contracts
from .rules import (
    ROOT,
    RULES,
    Rule,
    Sources,
    dangling_references,
    entry_names,
    exception_texts,
    fieldless,
    imports_by_name,
    lazy_names,
    long_functions,
    loosely_typed,
    misnamed,
    misplaced_tests,
    module_table,
    shapeless,
    small_modules,
    unchecked_addresses,
    unnamed_errors,
    variant_fields,
    walks,
    writers,
)

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
    (lazy_names, {"train/a.py": "from lorakit import LoraConfig"}, "LoraConfig is imported from lorakit"),
    (imports_by_name, {"train/a.py": "from importlib import import_module\nimport_module('lorakit.core')"}, "a.py:2"),
    (imports_by_name, {"train/a.py": "importlib.import_module(f'lorakit.core.{x}')"}, "import_module of lorakit.core"),
    (imports_by_name, {"peft/a.py": "OURS = 'lorakit.'\nimport_module(OURS + x)"}, "import_module of lorakit"),
    (imports_by_name, {"peft/a.py": "OURS = 'lorakit.'\nimport_module(f'{OURS}peft.b')"}, "import_module of lorakit"),
    (loosely_typed, {"a.py": "def f(layer: Any): ..."}, "layer is annotated as Any"),
    (loosely_typed, {"a.py": "def f(*, state: 'Any | None' = None): ..."}, "state is annotated as Any"),
    (loosely_typed, {"a.py": "class A:\n    slot: typing.Optional[typing.Any]"}, "slot is annotated as Any"),
    (
        loosely_typed,
        {"a.py": "class A:\n    def f(self):\n        self.route: Any = 1"},
        "route is annotated as Any",
    ),
    (entry_names, KINDS | {"ops/a.py": "x = kind == 'Linear'"}, "ops/a.py:1: 'Linear' names a kind"),
    (entry_names, KINDS | {"ops/a.py": "x = kind in ('Conv1D', 'b')"}, "'Conv1D' names a kind"),
    (entry_names, KINDS | {"ops/a.py": "x = {'dora'}"}, "'dora' names a kind"),
    (entry_names, KINDS | {"ops/a.py": "x = {'kasa': 1}"}, "'kasa' names a kind"),
    (entry_names, KINDS | {"ops/a.py": "x = table['Linear']"}, "'Linear' names a kind"),
    (entry_names, KINDS | {"ops/a.py": "match x:\n    case 'Linear': ..."}, "'Linear' names a kind"),
    (entry_names, KINDS | {"cli/a.py": "x = {'Linear': 1}"}, "cli/a.py:1: 'Linear' names a kind"),
    (entry_names, KINDS | {"train/loop/loop.py": "x = {'dora': 1}"}, "train/loop/loop.py:1: 'dora' names a kind"),
    (
        entry_names,
        KINDS | {"core/variants/dora.py": "x = ['Linear']"},
        "core/variants/dora.py:1: 'Linear' names a kind",
    ),
    (variant_fields, {"plan/a.py": "if config.use_dora: ..."}, "use_dora belongs to core/variants/dora.py"),
    (variant_fields, {"plan/a.py": "getattr(config, 'alora_invocation_tokens')"}, "alora_invocation_tokens belongs to"),
    (
        variant_fields,
        KINDS | {"plan/a.py": "replace(config, use_kasa=True)"},
        "use_kasa belongs to core/variants/kasa.py",
    ),
    (variant_fields, {"core/layers/a.py": "class A:\n    use_dora: bool"}, "use_dora belongs to"),
    (variant_fields, {"train/loop/loop.py": "config.use_dora"}, "use_dora belongs to"),
    (entry_names, {"core/model/a.py": "x.kind.name != PARAMETER.name"}, "kind.name is compared"),
    (entry_names, {"core/model/a.py": "x == PARAMETER.name"}, "PARAMETER.name is compared"),
    (entry_names, {"core/model/a.py": "layer.kind_name == other"}, "layer.kind_name is compared"),
    (entry_names, {"core/model/a.py": "layer.kind_name in names"}, "layer.kind_name is compared"),
    (entry_names, {"core/model/a.py": "layer.variant[name] == other"}, "is compared"),
    (entry_names, {"core/model/a.py": "layer.variant.get(name) != other"}, "is compared"),
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
    (exception_texts, {"a.py": "try: ...\nexcept E as e:\n    x = 'x' in str(e)"}, "module reads the text"),
    (walks, {"core/layers/a.py": "for path, part in model.named_modules(): ..."}, "named_modules() walks the model"),
    (walks, {"peft/a.py": "list(self.model.modules())"}, "modules() walks the model"),
    (walks, {"peft/a.py": "list(self.modules())"}, "modules() walks the model"),
    (walks, {"peft/a.py": "for name, child in part._modules.items(): ..."}, "_modules.items() walks the model"),
    (module_table, {"peft/a.py": "sys.modules['peft'] = x"}, "writes to sys.modules"),
    (module_table, {"peft/a.py": "del sys.modules['peft']"}, "writes to sys.modules"),
    (module_table, {"peft/a.py": "sys.modules.setdefault('peft', x)"}, "writes to sys.modules"),
    (writers, {"cli/a.py": "import sys\nsys.stdout.write('a')"}, "sys.stdout outside"),
    (writers, {"cli/a.py": "import sys\ndef f():\n    yield sys.stderr"}, "sys.stderr outside"),
    (writers, {"cli/a.py": "import sys, json\njson.dump(1, sys.stdout)"}, "sys.stdout outside"),
    (writers, {"cli/a.py": "from rich.console import Console\nConsole()"}, "Console outside"),
    (writers, {"cli/a.py": "from rich.live import Live\nLive()"}, "Live outside"),
    (
        unchecked_addresses,
        {"ops/kernels/compiled.py": "def f(x):\n    return x.data_ptr()"},
        "f reads data_ptr() before",
    ),
    (
        unchecked_addresses,
        {"ops/kernels/compiled.py": "def f(x):\n    p = x.data_ptr()\n    self._pointer('x', x)"},
        "f reads data_ptr() before",
    ),
    (
        unchecked_addresses,
        {"ops/kernels/gateway.py": GATED + "        return x.data_ptr()"},
        "pointer reads data_ptr() before",
    ),
    (long_functions, {"a.py": TALL}, "f has 62 lines"),
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
        "core/files/b.py does not exist",
    ),
    (misplaced_tests, {"core/files/a.py": "", "tests/core/test_a.py": ""}, "core/a.py does not exist"),
    (misplaced_tests, {"core/files/a.py": "", "tests/core/files/test_ab.py": ""}, "core/files/ab.py does not exist"),
]
GOOD: list[tuple[Rule, Sources]] = [
    (writers, {"terminal.py": "import sys\nprint(1, file=sys.stderr)"}),
    (
        writers,
        {"cli/a.py": "import sys\nwrite_line('a', sys.stderr)\nsys.stdout.flush()\nLive(console=drawing_console())"},
    ),
    (lazy_names, {"train/a.py": "from lorakit import __version__, core", "core/__init__.py": ""}),
    (
        imports_by_name,
        {"__init__.py": "import_module(f'lorakit.{x}')", "peft/paths.py": "import_module('lorakit.core')"},
    ),
    (imports_by_name, {"hub/a.py": "import_module(name)\nimport_module('lorakitten')\nx = 'lorakit.core'"}),
    (loosely_typed, {"a.py": "def f(x: Any, layer: LoraLayer, state: dict[str, Any]):\n    kind: Any = 1"}),
    (loosely_typed, {"a.py": "class A:\n    modules: Any\n    route: 'Route | None'"}),
    (
        entry_names,
        KINDS | {"peft/a.py": "x == 'dora'", "config/a.py": "{'dora'}", "choices.py": "{'Linear'}"},
    ),
    (entry_names, KINDS | {"cli/a.py": "x = {'dora': 1}", "train/settings/defaults.py": "x = {'kasa': 1}"}),
    (entry_names, KINDS | {"plan/a.py": "__all__ = ['Linear']\nf('Linear')\nx == 'linear'\nisinstance(x, Linear)"}),
    (variant_fields, KINDS | {"config/a.py": "self.use_dora", "peft/b.py": "x.use_kasa", "cli/c.py": "f(use_dora=1)"}),
    (variant_fields, {"train/settings/defaults.py": "{'use_dora': 1}", "plan/a.py": "'Doc on use_dora.'\nx.use_doras"}),
    (
        entry_names,
        {"core/model/a.py": "x.name == y\ninit.name == 'eva'\nf(kind.name)\nkind.names == y\nA.name == y"},
    ),
    (entry_names, {"core/kinds/a.py": "kind.name == x", "peft/a.py": "layer.kind_name == x"}),
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
    (module_table, {"peft/paths.py": "sys.modules['a'] = sys.meta_path", "train/a.py": "sys.modules.get('numpy')"}),
    (
        unchecked_addresses,
        {
            "ops/kernels/gateway.py": GATED + CHECKS + "        return x.data_ptr()",
            "ops/kernels/compiled.py": "def f(self, x):\n    self._pointer('x', x)\n    return x.data_ptr()",
            "ops/kernels/triton/a.py": "def f(x, y):\n    return x.data_ptr() == y.data_ptr()",
            "train/a.py": "x.data_ptr()",
        },
    ),
    (
        long_functions,
        {"a.py": "def f():\n    '''Doc." + "\n" * 70 + "'''", "peft/a.py": "def f(a, b, c, d, e, f, g, h): ..."},
    ),
    (long_functions, {"a.py": "x = 1\n" * 700}),
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
            "core/b.py": "class C: ...\n'''As tests/laws/test_a.py shows.'''",
            "__init__.py": "_HOMES = {'attach': 'core'}",
            "peft/__init__.py": "",
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
]


@pytest.mark.parametrize(("rule", "sources", "said"), BAD)
def test_a_rule_catches_a_bad_sample(rule: Rule, sources: Sources, said: str) -> None:
    assert said in "\n".join(map(str, rule(sources)))


@pytest.mark.parametrize(("rule", "sources"), GOOD)
def test_a_rule_passes_a_good_sample(rule: Rule, sources: Sources) -> None:
    assert list(map(str, rule(sources))) == []


def test_every_rule_was_seen_to_fail() -> None:
    assert {rule for rule, _, _ in BAD} == set(RULES) == {rule for rule, _ in GOOD}


@pytest.mark.parametrize(
    ("lines", "importers", "is_small"),
    [(59, ["b"], True), (60, ["b"], False), (59, ["b", "c"], False), (59, [], False)],
)
def test_small_modules(lines: int, importers: list[str], is_small: bool) -> None:
    graph = grimp.ImportGraph()
    for module in ("lorakit.ops.a", "lorakit.core.kinds.a", "lorakit.ops"):
        graph.add_module(module)
        for importer in importers:
            graph.add_import(importer=f"lorakit.{importer}", imported=module)
    paths = ("ops/a.py", "core/kinds/a.py", "ops/__init__.py", "tests/ops/a.py")
    found = [breach.path for breach in small_modules(graph, dict.fromkeys(paths, "x = 1\n" * lines))]
    assert found == ["ops/a.py"] * is_small


configuration.configure()
KINDS_OF_CONTRACTS: dict[str, type[Contract]] = {
    "layers": LayersContract,
    "forbidden": ForbiddenContract,
    "protected": ProtectedContract,
}


@functools.cache
def graph_of_lorakit() -> grimp.ImportGraph:
    return grimp.build_graph("lorakit", cache_dir=None, include_external_packages=True)


IMPORTS = [
    ("layers", "plan.params", "lorakit.core"),
    ("layers", "data.loader", "lorakit.peft.config"),
    ("layers", "core.linalg", "lorakit.hub"),
    ("layers", "plan.params", "lorakit.ops"),
    ("layers", "errors", "lorakit.tables"),
    ("layers", "attic", "lorakit.errors"),
    ("core", "core.kinds.kind", "lorakit.core.layers.bias"),
    ("core", "core.kinds.kind", "lorakit.core.quantization"),
    ("core", "core.linalg", "lorakit.core.model"),
    ("core", "core.merging", "lorakit.core.attachment"),
    ("core", "core.attic", "lorakit.errors"),
    ("core-names", "core.operations.combining", "lorakit.core"),
    ("train", "train.settings.types", "lorakit.train.spec"),
    ("train", "train.loop.step", "lorakit.train.setup.run_data"),
    ("peft", "peft.loaded", "lorakit.peft.model"),
    ("peft", "peft.matching", "lorakit.peft.tuner"),
    ("core-modules", "cli.merge", "lorakit.core.linalg"),
    ("core-modules", "tasks.task", "lorakit.core.kinds"),
    ("lazy", "", "lorakit.errors"),
    ("torch-free", "plan.params", "torch"),
    ("torch-free", "architectures.families", "torch"),
    ("numpy", "core.linalg", "numpy"),
    ("transformers", "train.trainer", "transformers"),
    ("hqq", "core.layers.bias", "hqq"),
    ("matplotlib", "cli.plan", "matplotlib"),
    ("yaml", "train.settings.types", "yaml"),
]


@pytest.mark.parametrize(("name", "importer", "imported"), IMPORTS)
def test_a_contract_catches_an_import(name: str, importer: str, imported: str) -> None:
    options = contracts()[name]
    (kind,) = options["type"]
    given = {
        key: [line for line in lines if line] if len(lines) > 1 or "modules" in key else lines[0]
        for key, lines in options.items()
    }
    contract = KINDS_OF_CONTRACTS[kind](
        name, {"root_packages": ["lorakit"], "include_external_packages": "True"}, given
    )
    for is_kept in (True, False):
        graph = graph_of_lorakit().__deepcopy__({})
        if not is_kept:
            graph.add_import(importer=f"lorakit.{importer}".rstrip("."), imported=imported)
        assert contract.check(graph, verbose=False).kept is is_kept


def test_every_contract_of_layers_was_seen_to_fail() -> None:
    assert {name for name, one in contracts().items() if one["type"] != ["protected"]} <= {
        name for name, _, _ in IMPORTS
    }


BAD_FOR_RUFF = """
import ctypes
import sys
from contextvars import ContextVar
from numpy import _core

sys.meta_path.clear()
def f(a, b, c, d, e, f, g, h): print(1)
class A:
    def f(self): ...
"""


def test_ruff_has_the_other_rules() -> None:
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--output-format=json",
        "--stdin-filename=src/lorakit/train/a.py",
        "-",
    ]
    done = subprocess.run(command, input=BAD_FOR_RUFF, capture_output=True, text=True, check=False, cwd=ROOT)
    codes = Counter(found["code"] for found in json.loads(done.stdout))
    expected = {"TID251": 3, "PLC2701": 1, "PLR0913": 1, "T201": 1, "D100": 1, "D101": 1, "D102": 1, "D103": 1}
    assert expected.items() <= codes.items()
