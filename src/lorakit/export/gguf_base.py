"""The base of an adapter as a GGUF file: its weights, and whether the adapter was trained on them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lorakit import core, hub
from lorakit.choices import CONV1D, EMBEDDING
from lorakit.errors import ModelError, UsageError
from lorakit.tables import format_some

if TYPE_CHECKING:
    import gguf
    from numpy.typing import NDArray

    from lorakit.architectures.shapes import SiteShape
    from lorakit.export.gguf import GgufLayout
    from lorakit.export.request import ExportRequest

SAMPLES = 64
"""Number of values of each weight that are compared, if the adapter does not record any."""

LARGEST_ERROR = {**dict.fromkeys(("F32", "F16", "BF16"), 2**-8), "Q8_0": 0.01}
"""Storage format -> largest root mean square by which its values may differ from the base's, relative to theirs."""

LARGEST_QUANTIZATION_ERROR = 0.5
"""The same for all other formats: of unrelated weights, it is 1.4."""


def base_gguf(source: hub.ModelSource, given: Path | None) -> Path:
    """Return the base as a GGUF file: the given one, or the base itself.

    Raises:
        UsageError: None is given, and the base is something else.
        ModelError: The file is not a GGUF file with a whole model.
    """
    found = source if given is None else hub.resolve(given)
    if found.header is not None:
        return found.header.path
    if given is not None:
        raise ModelError(f"{given}: not a GGUF file; pass the base as one.", where=given, field="base_gguf")
    text = f"{source.given}: llama.cpp needs the base as a GGUF file (F32 for an exact comparison); pass --base-gguf."
    raise UsageError(text, where=source.given, field="base_gguf")


@dataclass(frozen=True)
class GgufBase:
    """A base's GGUF file, whose weights are read on demand, and where its layout has them."""

    path: Path
    layout: GgufLayout

    @cached_property
    def reader(self) -> gguf.GGUFReader:
        """The mapped file."""
        import gguf

        return gguf.GGUFReader(self.path)

    @cached_property
    def tensors(self) -> dict[str, gguf.ReaderTensor]:
        """Name -> stored weight."""
        return {tensor.name: tensor for tensor in self.reader.tensors}

    def values(self, name: str, rows: Sequence[int] | None = None) -> NDArray[np.float32]:
        """Return a weight, or some of its rows, in fp32; a ModelError if its format is unknown."""
        import gguf

        tensor = self.tensors[name]
        try:
            return gguf.quants.dequantize(
                tensor.data if rows is None else tensor.data[[*rows]], tensor.tensor_type
            ).astype(np.float32, copy=False)
        except NotImplementedError as cause:
            text = f"{self.path}: {name} is stored as {tensor.tensor_type.name}, which cannot be dequantized; pass F16."
            raise ModelError(text, what=name, where=self.path, field="base_gguf") from cause

    def field(self, name: str) -> Any:
        """Return a value of the metadata, such as "block_count" of the architecture, or None."""
        found = self.reader.fields.get(name) or self.reader.fields.get(f"{self.layout.architecture}.{name}")
        return None if found is None else found.contents()

    def check(self, request: ExportRequest) -> bool:
        """Check that this file is the adapter's base, and return whether its values could be compared.

        Raises:
            ModelError: It is another model.
        """
        shape = self.layout.shape
        if (found := self.field("general.architecture")) != self.layout.architecture:
            self._fail(f"its architecture is {found!r}, not {self.layout.architecture!r}")
        sizes = {"block_count": shape.layers, "embedding_length": shape.hidden, "attention.head_count": shape.heads}
        for name, size in {**sizes, "attention.head_count_kv": shape.kv_heads}.items():
            if isinstance(stored := self.field(name), int) and stored != size:
                self._fail(f"its {name} is {stored}, not {size}")
        sites = {stored: site for site in shape.sites if (stored := self._stored(site)) is not None}
        rows = {name: (s.in_features, s.out_features)[:: 1 if s.kind == EMBEDDING else -1] for name, s in sites.items()}
        if missing := [name for name in rows if name not in self.tensors]:
            self._fail(f"it lacks {format_some(missing)}")
        if other := [n for n, size in rows.items() if tuple(self.tensors[n].shape[::-1].tolist()) != size]:
            self._fail(f"{format_some(other)} have other shapes")
        apart, compared = list[str](), False
        for name, positions, expected, slack in self._samples(request, sites):
            compared = True
            bound = LARGEST_ERROR.get(self.tensors[name].tensor_type.name, LARGEST_QUANTIZATION_ERROR)
            beyond = ((self._at(name, sites[name], positions) - expected).abs() - slack).clamp(min=0)
            if not float(beyond.norm()) <= bound * float(expected.norm()):
                apart.append(name)
        if apart:
            self._fail(f"values of {len(apart)} weights differ (first {format_some(apart[:3])})")
        return compared

    def _fail(self, problem: str) -> None:
        text = f"{self.path}: not the base that the adapter was trained on: {problem}; pass that base as --base-gguf."
        raise ModelError(text, what=problem, where=self.path, field="base_gguf")

    def _stored(self, site: SiteShape) -> str | None:
        """Return the name of a site's weight in the file; None if it has none of its own there."""
        name = self.layout.name(site.path)
        stored = f"{name}.weight"
        return None if name is None or (site.tied_to and stored not in self.tensors) else stored

    def _samples(
        self, request: ExportRequest, sites: dict[str, SiteShape]
    ) -> Iterator[tuple[str, Tensor, Tensor, Tensor | float]]:
        """Yield names of weights with positions in the base's plain tensors, values there (n,), and their errors.

        They are those that the adapter records, or else those of the base's own files, if it has safetensors.
        """
        mark, source = core.read_adapter(request.adapter.folder).sidecar.base, request.known_base
        folder = hub.downloaded(source.path_or_id) if source.kind == "hub" else Path(source.path_or_id)
        files = None
        if mark is None and folder is not None and any(folder.glob("*.safetensors")):
            files = core.source_of_folder(folder)
        for name, site in sites.items():
            parameter, shape = f"{site.path}.weight", (site.out_features, site.in_features)
            shape = shape[::-1] if site.kind in (CONV1D, EMBEDDING) else shape
            if mark is not None and (sampled := core.sampled_positions(mark, parameter, shape)):
                sample = mark.samples[parameter]
                yield name, torch.tensor(sampled), sample.values(), sample.slack()
            elif files is not None and (stored := files.under([parameter])) is not None:
                values = files.read(stored).flatten()
                positions = torch.linspace(0, len(values) - 1, SAMPLES, dtype=torch.float64).long()
                yield name, positions, values[positions].double(), 0.0

    def _at(self, name: str, site: SiteShape, positions: Tensor) -> Tensor:
        """Return the values (n,) in fp64 that the file has for positions in the base's plain tensor of a site."""
        if site.kind == CONV1D:  # (in, out) in the base
            columns, rows = positions // site.out_features, positions % site.out_features
        else:
            width = site.out_features if site.kind == EMBEDDING else site.in_features
            rows, columns = positions // width, positions % width
        if site.kind != EMBEDDING:
            order = self.layout.rows(name.removesuffix(".weight"), torch.arange(site.out_features))
            rows = order.argsort()[rows]
        found = torch.from_numpy(self.values(name, rows.tolist()))
        return found.gather(1, columns[:, None])[:, 0].double()
