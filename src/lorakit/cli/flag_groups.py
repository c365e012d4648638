"""Groups of flags that several commands share, with their checks: how rows are read, and how the base is loaded.

A command includes a group as a field of its own flags. The method `check` needs neither torch nor a model, like the
checks in `lorakit.cli.early`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lorakit.choices import DTYPES, LabelType
from lorakit.cli import early
from lorakit.errors import ConfigError
from lorakit.plan.quantized import stored_as
from lorakit.train.settings.defaults import DEFAULTS, choices_of
from lorakit.train.settings.types import PAIRS

if TYPE_CHECKING:
    from lorakit.data import Request
    from lorakit.plan.quantized import Quantization
    from lorakit.session import SessionOptions
    from lorakit.tasks import LabelOptions


RevisionFlag = Annotated[str | None, Parameter(help=DEFAULTS["revision"].help())]
"""Flag for the revision of a base on the Hub."""

DtypeFlag = Annotated[
    str, Parameter(help="Precision of the base: auto (as in its files), bfloat16, float16 or float32.")
]
"""Flag for the dtype in which a base generates."""

DeviceFlag = Annotated[str, Parameter(help="cpu, cuda, cuda:N, mps or auto.")]
"""Flag for where a base runs."""

TagSchemeFlag = Annotated[str, Parameter(help=DEFAULTS["tag_scheme"].help())]
"""Flag for the scheme of tags."""


@dataclass(frozen=True)
class RowFlags:
    """Flags about how the rows of data are read."""

    format: Annotated[str | None, Parameter(help=DEFAULTS["format"].help())] = None
    columns: Annotated[list[str] | None, Parameter(help=DEFAULTS["columns"].help())] = None
    on_bad_row: Annotated[str, Parameter(help=DEFAULTS["on_bad_row"].help())] = DEFAULTS["on_bad_row"].value

    def check(self) -> None:
        """Raise ConfigError if a flag has a value that is not allowed; `request` checks the name of the shape."""
        early.check_choice("on_bad_row", self.on_bad_row, choices_of("on_bad_row"))
        _pairs("columns", self.columns)

    def request(self, allowed: tuple[str, ...] = (), group: str | None = None, needs_label: bool = True) -> Request:
        """Return the choices about how rows are read; this imports torch.

        `allowed` has the names of the shapes that may be recognized (empty allows all); equal values of the column
        `group` keep rows together.

        Raises:
            ConfigError: The shape is unknown or not allowed, or no shape has these fields.
        """
        from lorakit.data import Request

        columns = _pairs("columns", self.columns)
        return Request(self.format, columns, self.on_bad_row == "skip", group, allowed, needs_label)


@dataclass(frozen=True)
class LabelFlags:
    """Flags about how the labels of data are read."""

    label_map: Annotated[list[str] | None, Parameter(help=DEFAULTS["label_map"].help())] = None
    tag_scheme: TagSchemeFlag = "auto"

    def check(self) -> None:
        """Raise ConfigError if a flag has a value that is not allowed; names in the label map are checked later."""
        early.check_choice("tag_scheme", self.tag_scheme, choices_of("tag_scheme"))
        _pairs("label_map", self.label_map)

    def options(self, label_type: LabelType = "auto", *, is_evaluation_given: bool = False) -> LabelOptions:
        """Return the choices about how labels are read, or raise ConfigError; this imports torch."""
        from lorakit.tasks import LabelOptions

        label_map = _pairs("label_map", self.label_map)
        return LabelOptions(label_type, is_evaluation_given, label_map=label_map, tag_scheme=self.tag_scheme)


def _pairs(name: str, given: list[str] | None) -> dict[str, str]:
    """Return the pairs of a flag as a dict; an invalid one raises ConfigError."""
    if not given:
        return {}
    try:
        return PAIRS[name](given)
    except ValueError as cause:
        raise ConfigError(f"{name} is {given}; {cause}.", what=given, field=name) from None


@dataclass(frozen=True)
class BaseFlags:
    """Flags about how the base of an adapter is loaded, to measure it or to predict with it."""

    revision: RevisionFlag = None
    dtype: Annotated[str, Parameter(help="Precision of the base: auto, bfloat16, float16 or float32.")] = "auto"
    device: DeviceFlag = "auto"
    quantization: Annotated[str | None, Parameter(help=DEFAULTS["quantization"].help())] = None
    double_quantization: Annotated[bool, Parameter(help=DEFAULTS["double_quantization"].help())] = True
    allow_base_mismatch: Annotated[bool, Parameter(negative=(), help="Accept an adapter trained on another base.")] = (
        False
    )

    def check(self) -> None:
        """Raise ConfigError if a flag has a value that is not allowed."""
        self.stored_as()
        early.check_choice("dtype", self.dtype, DTYPES)
        early.check_device(self.device)

    def stored_as(self) -> Quantization | None:
        """Return the requested quantization of the base, or None; raise ConfigError if its name is unknown."""
        return stored_as(self.quantization, self.double_quantization)

    def options(self, model: str | None) -> SessionOptions:
        """Return how the base is loaded; `model` is None if the adapters name it. This imports torch."""
        from lorakit.session import SessionOptions

        return SessionOptions(
            self.dtype,
            self.device,
            self.stored_as(),
            allow=("base_mismatch",) if self.allow_base_mismatch else (),
            revision=self.revision if model is None else None,
        )


ROWS, LABELS, BASE = RowFlags(), LabelFlags(), BaseFlags()
"""The groups without any flag given."""
