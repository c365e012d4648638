"""Adapters to publish, and a registry."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorakit.registry import Registry

Save = Callable[..., Path]


@pytest.fixture
def one(save_adapter: Save) -> Path:
    """A small adapter."""
    return save_adapter("one", 1)


@pytest.fixture
def two(save_adapter: Save) -> Path:
    """Another adapter of the same base."""
    return save_adapter("two", 2)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A registry that does not exist yet."""
    return Registry(tmp_path / "registry")
