"""lorakit.cli: commands, flags, errors and exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import lorakit
from lorakit.cli import COMMANDS, main
from lorakit.errors import AdapterFileError, ConfigError


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Any]], None]:
    """Replace the command `plan` by a function."""

    def stand_in(run: Callable[..., Any]) -> None:
        module = types.ModuleType("lorakit.cli.plan")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "lorakit.cli.plan", module)

    return stand_in


def fails(error: BaseException) -> Callable[..., Any]:
    def run() -> None:
        raise error

    return run


def test_help_names_every_verb_and_loads_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"lorakit {lorakit.__version__}\n"


def test_python_m_lorakit_is_the_same_program() -> None:
    done = subprocess.run([sys.executable, "-m", "lorakit", "pln"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown command 'pln'")
    assert done.stderr.endswith("Did you mean plan?\n")


def test_an_unknown_verb_names_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serv", "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"error: unknown command 'serv'; choose from {', '.join(COMMANDS)}.")
    assert json.loads(captured.out)["error"]["code"] == "LORA-E011"


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (0, 0), (3, 3)])
def test_what_a_verb_returns_is_the_exit_code(verb: Any, returned: int | None, code: int) -> None:
    def run() -> int | None:
        return returned

    verb(run)
    assert main(["plan"]) == code


@pytest.mark.parametrize("flag", ["--target-modules", "--target_modules"])
@pytest.mark.parametrize("is_repeated", [False, True])
def test_list_flags_take_several_values_or_are_repeated(verb: Any, flag: str, is_repeated: bool) -> None:
    seen: list[Any] = []

    def run(model: str, *, target_modules: list[str] | None = None, max_length: int = 1) -> None:
        seen.extend([model, target_modules, max_length])

    verb(run)
    words = [flag, "a", flag, "b"] if is_repeated else [flag, "a", "b"]
    assert main(["plan", "gpt2", *words, "--max_length=7"]) == 0
    assert seen == ["gpt2", ["a", "b"], 7]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--max-length", "3", "--max-lenght", "3"],
            "Unknown option: --max-lenght. Did you mean --max-length? See `lorakit plan --help`.",
        ),
        (["--max-length", "x"], 'Invalid value for --max-length: unable to convert "x" into int.'),
        ([], 'Command "plan" parameter --max-length requires an argument. See `lorakit plan --help`.'),
    ],
)
def test_wrong_use_is_said_and_exits_2(
    verb: Any, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    def run(*, max_length: int) -> None: ...

    verb(run)
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert said in captured.err


@pytest.mark.parametrize(("kind", "code"), [(AdapterFileError, 1), (ConfigError, 2)])
def test_an_error_of_ours_is_its_message_and_its_exit_code(
    verb: Any, capsys: pytest.CaptureFixture[str], kind: type[Exception], code: int
) -> None:
    verb(fails(kind("this went wrong; do that")))
    assert main(["plan"]) == code
    assert capsys.readouterr() == ("", "error: this went wrong; do that\n")


def test_an_error_is_json_too_where_a_program_reads(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*, json: bool = False) -> None:
        raise AdapterFileError("bad file")

    verb(run)
    assert main(["plan", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"error": {"message": "bad file", "code": "LORA-E060", "exit_code": 1}}
    assert captured.err == "error: bad file\n"


def test_an_unexpected_error_is_one_line_and_says_how_to_see_more(
    verb: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    verb(fails(KeyError("a\nb")))
    assert main(["plan"]) == 1
    said = capsys.readouterr().err
    assert said == "error: unexpected KeyError: 'a\\nb' (rerun with --traceback to see where)\n"
    assert main(["plan", "--traceback"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err
    monkeypatch.setenv("LORAKIT_TRACEBACK", "1")
    assert main(["plan"]) == 1
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interrupt_exits_130(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    verb(fails(KeyboardInterrupt()))
    assert main(["plan"]) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


def test_a_warning_is_one_line_on_stderr(verb: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        warnings.simplefilter("always")
        warnings.warn("r is larger than a site", UserWarning, stacklevel=1)

    verb(run)
    before = warnings.showwarning
    assert main(["plan"]) == 0
    assert capsys.readouterr() == ("", "warning: r is larger than a site\n")
    assert warnings.showwarning is before


def test_a_closed_pipe_is_no_error() -> None:
    code = (
        "import sys, time, types; from lorakit.cli import main; m = types.ModuleType('m'); "
        "m.run = lambda: (time.sleep(0.3), print('x' * 10**6))[0]; sys.modules['lorakit.cli.plan'] = m; "
        "sys.exit(main(['plan']))"
    )
    line = f'"{sys.executable}" -c "{code}" | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.returncode == 141
