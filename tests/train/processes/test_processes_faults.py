"""`lorakit train` in two processes when one fails or gets bad input: each ends, and the first one says why, once.

The processes are started without a launcher, which would end the others.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lorakit.train.files import checkpoint
from lorakit.train.settings.sources import gather
from lorakit.train.trainer import run

from .processes import begin, end, free_port

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


@pytest.fixture
def flags(short_run: dict[str, Any]) -> list[str]:
    """Arguments of a run of six steps with a checkpoint after every second one."""
    plain = {name: value for name, value in short_run.items() if name != "data"}
    more = {"eval-fraction": 0, "save-steps": 2, "max-steps": 6}
    named = [f"--{name.replace('_', '-')}={value}" for name, value in {**plain, **more}.items()]
    return [*named, *(f"--data={path}" for path in short_run["data"]), "--no-tuning", "--no-token-cache"]


def trained(flags: list[str], *own: dict[str, str], fault: str = "", where: Any = ()) -> list[tuple[int, str, str]]:
    """Return the exit code, the output and the messages of two processes."""
    variables = [{"FAULT": fault, **one} for one in (own or ({}, {}))]
    return end(begin(["-m", "lorakit", "train", *flags], 2, variables, where))


def said_once(ends: list[tuple[int, str, str]], *words: str, by: int = 0) -> str:
    """Check that both processes failed and one of them said why; return the message."""
    (code, _, message), (other, out, silence) = (ends[by], ends[1 - by])
    assert code in (1, 2) and other != 0, ends
    assert message.count("error:") == 1 and message.count("\n") == 1, message
    assert silence == "" and (by == 1 or out == ""), silence
    assert all(word in message for word in words), message
    return message


def test_variables_without_a_rendezvous(flags: list[str], tmp_path: Path) -> None:
    nowhere = {"MASTER_ADDR": "", "MASTER_PORT": ""}
    said_once(trained(flags, nowhere, nowhere), "WORLD_SIZE is 2", "MASTER_ADDR, MASTER_PORT")
    assert not (tmp_path / "run").exists()


def test_a_command_line_that_is_wrong(flags: list[str], tmp_path: Path) -> None:
    said_once(trained([*flags, "--learning-rate=fast"]), "fast")
    said_once(trained([*flags, "--process-timeout=0"]), "process_timeout is 0")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_process_that_never_arrives(flags: list[str], tmp_path: Path) -> None:
    apart = [{"MASTER_PORT": str(free_port())} for _ in range(2)]
    ends = trained([*flags, "--process-timeout=2"], *apart)
    for (code, _, message), words in zip(ends, ("0 of 2 cannot reach the others", "reach process 0 at"), strict=True):
        assert (code, message.count("error:"), message.count("\n")) == (1, 1, 1), message
        assert words in message
    assert not (tmp_path / "run").exists()


@pytest.fixture
def used_port() -> Iterator[str]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield str(other.getsockname()[1])


@pytest.mark.slow
def test_a_port_in_use(flags: list[str], tmp_path: Path, used_port: str) -> None:
    port = {"MASTER_PORT": used_port}
    said_once(trained(flags, port, port), f"127.0.0.1:{used_port}", "port is free")
    assert not (tmp_path / "run").exists()


@pytest.mark.costly(cases=0)
def test_a_killed_process(flags: list[str], tmp_path: Path) -> None:
    said_once(trained(flags, fault="kill 1"), "another process ended")
    folder = tmp_path / "run"
    assert checkpoint.newest_valid(folder) == folder / "checkpoint-2"
    assert json.loads((folder / "run.json").read_text())["status"] == "failed"
    result = run(gather({"output_dir": str(folder), "resume": True}))
    assert (result.ending, result.steps) == ("finished", 6)


@pytest.mark.slow
def test_the_first_process_is_killed(flags: list[str], tmp_path: Path) -> None:
    said_once(trained(flags, fault="kill 0"), "another process ended", by=1)
    assert checkpoint.newest_valid(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


@pytest.mark.slow
def test_a_stopped_process(flags: list[str], tmp_path: Path) -> None:
    first, second = begin(["-m", "lorakit", "train", *flags, "--process-timeout=20"], 2, [{}, {"FAULT": "stop 1"}])
    try:
        ((code, _, message),) = end([first])
    finally:
        second.kill()
        end([second])
    assert (code, message.count("error:")) == (1, 1)
    assert "another process ended or can no longer be reached" in message
    assert checkpoint.newest_valid(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


@pytest.mark.slow
def test_nan_in_one_process(flags: list[str], tmp_path: Path) -> None:
    said_once(trained(flags, fault="nan 1"), "step 3", "checkpoint-2")
    assert checkpoint.newest_valid(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


@pytest.mark.slow
def test_an_unexpected_error_in_one_process(flags: list[str], tmp_path: Path) -> None:
    said_once(trained(flags, fault="crash 1"), "process 1", "RuntimeError", "the device is lost")
    assert checkpoint.newest_valid(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


@pytest.mark.slow
def test_an_error_in_one_process_that_shares_the_base(flags: list[str], tmp_path: Path) -> None:
    ends = trained([*flags, "--parallel=fsdp"], fault="crash 1")
    said_once([(code, "", message) for code, _, message in ends], "process 1", "RuntimeError", "the device is lost")
    assert checkpoint.newest_valid(tmp_path / "run") == tmp_path / "run" / "checkpoint-2"


@pytest.mark.slow
def test_another_version_in_one_process(flags: list[str], tmp_path: Path) -> None:
    said_once(trained(flags, fault="version 1"), "version of transformers", "5.0.0 in process 1")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_directory_that_one_process_sees(flags: list[str], tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    own = ["--output-dir=runs/here" if flag.startswith("--output-dir") else flag for flag in flags]
    said_once(trained(own, where=folders), "process 1", "all processes share")
    assert not any(list(folder.iterdir()) for folder in folders)


@pytest.mark.slow
def test_the_first_process_alone_writes(flags: list[str], tmp_path: Path) -> None:
    where = {"FAULT_FOLDER": str(tmp_path)}
    (code, out, message), second = trained(flags, where, where, fault="writes 1")
    assert (code, message, second) == (0, "", (0, "", ""))
    (_, _, made), _ = trained([*flags, "--overwrite"], where, where, fault="writes 0")
    assert "run.json" in made
    assert "step 6/6" in out
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
