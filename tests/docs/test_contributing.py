"""CONTRIBUTING.md: the files that it names exist, and a made-up weight format and command need no other file."""

from __future__ import annotations

import json
import re
import sys
import types
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:src|tests|docs|scripts)/[\w./]+)`", PAGE))))
def test_paths_of_the_page_exist(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(lorakit(?:\.\w+)+)`", PAGE))))
def test_names_of_the_page_exist(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    assert hasattr(import_module(module), attribute)


def test_a_made_up_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from lorakit import cli
    from lorakit.cli import console

    def run(name: str, *, json: console.JsonFlag = False) -> None:
        """Greet.

        Args:
            name: Whom to greet.
            json: Print one JSON document instead of text.
        """
        if json:
            console.emit_json({"name": name})
        else:
            console.say(f"hello {name}")

    run.__annotations__["json"] = console.JsonFlag
    run.__annotations__["name"] = str
    module = types.ModuleType("lorakit.cli.hello")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lorakit.cli.hello", module)
    monkeypatch.setitem(cli.COMMANDS, "hello", "Greet someone.")
    assert cli.main(["hello", "you"]) == 0
    assert capsys.readouterr().out == "hello you\n"
    assert cli.main(["hello", "you", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"name": "you"}
    assert cli.main(["hello"]) == 2
    assert "lorakit hello --help" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0
    assert "Greet someone." in capsys.readouterr().out


def test_a_made_up_weight_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Linear that stores half of its weight: an adapter is merged and unmerged through the entry alone."""
    import torch
    from torch import Tensor, nn

    import lorakit
    from lorakit.core import quantization
    from lorakit.core.quantization.weight_format import PlainFormat

    class Halved(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(x, 2 * self.weight, self.bias)

    class HalvedFormat(PlainFormat):
        def read(self, module: nn.Module, stored: Tensor) -> Tensor:
            return 2 * super().read(module, stored)

        def write(self, module: nn.Module, like: Tensor, canonical: Tensor) -> Tensor:
            return super().write(module, like, canonical / 2)

    made_up = HalvedFormat("halved", (f"{Halved.__module__}.{Halved.__qualname__}",))
    monkeypatch.setattr(quantization, "WEIGHT_FORMATS", (made_up, *quantization.WEIGHT_FORMATS))
    torch.manual_seed(0)
    model = nn.Sequential(Halved(8, 6))
    assert quantization.weight_format_of(model[0]).name == "halved"
    x, before = torch.randn(3, 8), model[0].weight.detach().clone()
    lorakit.attach(model, lorakit.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False), "a")
    adapted = model(x).detach()
    lorakit.merge(model, "a")
    torch.testing.assert_close(model(x).detach(), adapted)
    lorakit.unmerge(model)
    lorakit.detach(model, "a")
    assert torch.equal(model[0].weight, before)
