"""Read `.importlinter`, for tests that compare pages with its contracts and show that each contract can fail."""

from __future__ import annotations

import configparser

from .rules import ROOT

CONFIG = ROOT / ".importlinter"


def contracts() -> dict[str, dict[str, list[str]]]:
    """Return {contract: {option: its lines}}."""
    parser = configparser.ConfigParser(comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read(CONFIG, encoding="utf-8")
    sections = {name.removeprefix("importlinter:contract:"): parser[name] for name in parser.sections()[1:]}
    return {name: {key: value.split("\n") for key, value in section.items()} for name, section in sections.items()}


def layers() -> dict[str, int]:
    """Return {module or package below lorakit: its layer}, with errors in layer -1."""
    lines = [line for line in contracts()["layers"]["layers"] if line]
    numbers = range(len(lines) - 2, -2, -1)
    return {name.strip(" ()"): n for n, line in zip(numbers, lines, strict=True) for name in line.split("|")}


def importers() -> dict[str, list[str]]:
    """Return {third-party package: modules of lorakit that may import it}, without those that several layers import."""
    protected = {name: one for name, one in contracts().items() if name not in ("core-modules", "numpy")}
    of = {package: one for one in protected.values() for package in one.get("protected_modules", ()) if package}
    return {package: [line for line in one["allowed_importers"] if line] for package, one in of.items()}
