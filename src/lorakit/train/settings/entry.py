"""`Setting`: what is known of a training setting apart from its name and type; `defaults.py` has the entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.errors import ConfigError


@dataclass(frozen=True)
class Conflict:
    """Another setting that excludes a setting, unless the latter has its default.

    Attributes:
        other: Name of the other setting.
        excludes: Function that returns whether a value of the other setting excludes this one.
        text: What the error says after the name of the setting; {value} stands for the value of the other setting.
    """

    other: str
    excludes: Callable[[Any], bool]
    text: str


@dataclass(frozen=True)
class Setting:
    """A training setting: its meaning, its default, the reason for the default, its range, and what it excludes.

    Attributes:
        meaning: What the setting does, as shown in `--help-all`.
        value: The default; `...` if the setting is required, None if it is off or depends on other settings.
        reason: Reason for the default, as shown in `--help-all`; empty if the setting is required.
        shown: Text that stands for the default; None means `str(value)`, or "off" for False.
        brief: The meaning in a few words, for the settings that people change most; `--help` shows only these.
        group: Title of the group that the setting belongs to.
        alias: A shorter name, or "".
        is_changeable: Whether a resumed run may change the setting.
        is_for_new: Whether it applies only to a new adapter, not to one that is trained further.
        conflict: Another setting that excludes it, or None.
        ge, gt, le, lt: Bounds of the value, as in pydantic; None if there is none.
    """

    meaning: str
    value: Any
    reason: str = ""
    shown: str | None = None
    brief: str = ""
    group: str = ""
    alias: str = ""
    is_changeable: bool = False
    is_for_new: bool = False
    conflict: Conflict | None = None
    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    @property
    def default(self) -> str:
        """The text that stands for the default."""
        return self.shown if self.shown is not None else "off" if self.value is False else str(self.value)

    @property
    def bounds(self) -> dict[str, float]:
        """The bounds that are given, by their names in pydantic."""
        bounds = {"ge": self.ge, "gt": self.gt, "le": self.le, "lt": self.lt}
        return {name: bound for name, bound in bounds.items() if bound is not None}

    def check_conflict(self, name: str, given: Mapping[str, Any]) -> None:
        """Check the value of a setting with this entry against the `given` settings, which include it.

        Raises:
            ConfigError: The value of another setting excludes this one, which does not have its default.
        """
        conflict = self.conflict
        if conflict is None or given[name] == self.value or not conflict.excludes(given[conflict.other]):
            return
        text = conflict.text.format(value=given[conflict.other])
        raise ConfigError(f"{name} {text}", what=given[name], field=name)

    def help(self) -> str:
        """Return the help text of the setting: its meaning, its default and the reason for the default."""
        if self.value is ...:
            return f"{self.meaning}."
        return f"{self.meaning}. Default {self.default}: {self.reason}."
