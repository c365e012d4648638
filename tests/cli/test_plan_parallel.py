"""`lorakit plan --nproc N --gpu SIZE`: what each process holds and sends, and how the processes share the base."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lorakit.cli import main

LLAMA = ["plan", "Llama-3.1-8B"]


def parallel(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*words, "--json"]) == 0
    values: dict[str, Any] = json.loads(capsys.readouterr().out)["parallel"]
    return values


def test_eight_gpus_of_24_gb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LLAMA, "--nproc", "8", "--gpu", "24GB"]) == 0
    out = capsys.readouterr().out
    assert "processes    8: 8 per node (pcie4), 24.0 GB each" in out
    assert "parallel     fsdp: needs " in out and "ddp needs" in out
    for words in ("each process holds at the peak", "gathered", "each process sends per step", "not measured"):
        assert words in out
    assert max(map(len, out.splitlines())) <= 80


def test_json_has_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*LLAMA, "--nproc", "8", "--gpu", "24GB"]
    values = parallel(words, capsys)
    assert values["parallel"] == "fsdp" and values["limit_bytes"] == 24_000_000_000
    ranks = {rank["way"]: rank for rank in values["ranks"]}
    assert [ranks[way]["fits"] for way in ("ddp", "fsdp")] == [False, True]
    assert ranks["fsdp"]["held"]["process"] == 0  # the memory is the GPU's
    assert ranks["fsdp"]["traffic"]["sent_bytes"] > ranks["ddp"]["traffic"]["sent_bytes"]
    assert main([*LLAMA, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parallel"] is None


def test_a_speed_gives_the_scaling(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*LLAMA, "--nproc", "64", "--gpu", "24GB", "--tokens-per-second", "4000", "--tokens", "1000000"]
    values = parallel([*words, "--link", "nvlink4", "--network", "50GB/s"], capsys)
    assert values["parallel"] == "hsdp" and values["nodes"] == 8
    assert values["network"]["bytes_per_second"] == 50e9
    assert values["step_tokens"] == 64 * 4 * 512
    assert all(0 < rank["expected_scaling"] < 1 for rank in values["ranks"])
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "8 per node (pcie4), 8 nodes (100gbe)" in out
    assert "expected scaling" in out and "for 8 steps" in out  # of all processes together


def test_what_is_requested_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    assert parallel([*LLAMA, "--nproc", "2"], capsys)["parallel"] == "ddp"
    assert parallel([*LLAMA, "--nproc", "2", "--parallel", "fsdp"], capsys)["parallel"] == "fsdp"
    assert parallel([*LLAMA, "--gpu", "80GB"], capsys)["parallel"] == "ddp"
    values = parallel([*LLAMA, "--nproc", "4", "--gpus-per-node", "2", "--parallel", "hsdp"], capsys)
    assert values["parallel"] == "hsdp" and values["nodes"] == 2
    assert main([*LLAMA, "--gpu", "80GB"]) == 0
    assert "each process sends" not in capsys.readouterr().out


def test_nothing_is_measured_for_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*LLAMA, "--gpu", "80GB", "--max-steps", "5"]) == 0
    assert "no estimate" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc", "0"], "nproc is 0"),
        (["--nproc", "-2"], "nproc is -2"),
        (["--nproc", "12"], "nproc is 12, which does not fill nodes of 8 GPUs"),
        (["--nproc", "8", "--gpus-per-node", "0"], "gpus_per_node is 0"),
        (["--nproc", "8", "--gpu", "big"], "gpu: 'big' is not a size"),
        (["--nproc", "8", "--gpu", "0GB"], "gpu: '0GB' is not a size"),
        (["--nproc", "8", "--parallel", "fdsp"], "Did you mean fsdp?"),
        (["--nproc", "1", "--parallel", "hsdp"], "needs at least 2 processes"),
        (["--parallel", "fsdp"], "needs at least 2 processes"),
        (["--nproc", "8", "--link", "usb"], "link is 'usb'"),
        (["--nproc", "8", "--network", "fast"], "network is 'fast'"),
        (["--gpu", "24GB", "--calibrate"], "--tokens-per-second"),
        (["--nproc", "2", "--gpu", "4GB"], "does not fit into 4.00 GB on each of 2 GPUs"),
    ],
)
def test_bad_values_are_errors_that_name_them(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*LLAMA, *words]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
