"""lorakit.machine: properties parsed from texts of the operating system."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from lorakit import machine
from lorakit.errors import DiskError

CPUINFO = "processor\t: 0\nmodel name\t: A CPU @ 2GHz\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16\n"


def test_cpu_facts_come_from_cpuinfo() -> None:
    assert machine.cpu_name(CPUINFO) == "A CPU @ 2GHz"
    assert machine.cpu_features(CPUINFO) == ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    assert machine.cpu_features("Features\t: fp asimd bf16 sve\n") == ("bf16", "sve")
    assert machine.cpu_features("") == ()


@pytest.mark.parametrize(
    ("cpu_max", "cores"), [("", 8), ("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("250000 50000", 5)]
)
def test_a_containers_quota_counts(monkeypatch: pytest.MonkeyPatch, cpu_max: str, cores: int) -> None:
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert machine.usable_cores(cpu_max) == cores


@pytest.mark.parametrize(
    ("maps", "environment", "name"),
    [
        ("/lib/libjemalloc.so.2 /lib/libc.so.6", {}, "jemalloc"),
        ("/lib/libc.so.6", {}, "glibc"),
        ("/lib/libc.so.6", {"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1"}, "glibc, tuned"),
        ("", {}, "unknown"),
    ],
)
def test_allocator(maps: str, environment: dict[str, str], name: str) -> None:
    assert machine.allocator(maps, environment) == name


def test_this_machine_has_cores_and_a_name() -> None:
    here = machine.this_machine()
    assert here.cores >= 1
    assert here.cpu
    assert here.memory_bytes is None or 0 < (here.available_bytes or 1) <= here.memory_bytes


@pytest.fixture
def _no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: object) -> None:
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME", "LORAKIT_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("_no_home")
def test_without_a_home_the_cache_is_an_error_that_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert machine.home_directory() is None
    with pytest.raises(DiskError, match="LORAKIT_CACHE"):
        machine.cache_directory()
    monkeypatch.setenv("LORAKIT_CACHE", "~/x")
    with pytest.raises(DiskError, match="LORAKIT_CACHE"):
        machine.cache_directory()
    monkeypatch.setenv("LORAKIT_CACHE", "/x")
    assert machine.cache_directory() == Path("/x")
    monkeypatch.delenv("LORAKIT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/y")
    assert machine.cache_directory() == Path("/y/lorakit")


@pytest.mark.usefixtures("_no_home")
def test_without_a_home_nothing_is_kept_and_nothing_fails() -> None:
    from lorakit.speed import tuning

    assert tuning.read() == {}
    assert "LORAKIT_CACHE" in tuning.save({"a shape": 1})


@pytest.mark.usefixtures("_no_home")
def test_without_a_home_the_doctor_reports(capsys: pytest.CaptureFixture[str]) -> None:
    from lorakit.cli import main

    assert main(["doctor", "--quick"]) == 0
    assert "kernels    " in capsys.readouterr().out


def test_names_of_devices() -> None:
    assert all(map(machine.is_device_name, ("auto", "cpu", "cpu:0", "cuda", "cuda:3", "mps", "mps:0")))
    assert not any(map(machine.is_device_name, ("", "tpu", "auto:0", "cuda:", "cuda:x", "cuda:-1", "cuda:0 ")))
