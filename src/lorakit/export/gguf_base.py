"""The base of an adapter as a GGUF file: its weights, and whether the adapter was trained on them."""

from __future__ import annotations

import re
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
from lorakit.errors import OVERRIDE, ModelError, UsageError
from lorakit.tables import format_percent, format_some

if TYPE_CHECKING:
    import gguf
    from numpy.typing import NDArray

    from lorakit.architectures.shapes import SiteShape
    from lorakit.export.gguf import GgufLayout
    from lorakit.export.request import ExportRequest

SAMPLES = 64
"""Number of values of each weight that are compared, if the adapter does not record any."""

PLAIN = ("F32", "F16", "BF16")
"""Storage formats whose values may differ from the base's by rounding only."""

TOGETHER = re.compile(r"IQ[123].*")
"""Storage formats that choose several values together, so that a value need not have the nearest level."""

LARGEST_ERROR = {"Q8_0": 0.01}
"""Quantized format -> largest root mean square by which its values may differ from the base's, relative to theirs."""

LARGEST_QUANTIZATION_ERROR = 0.5
"""The same for all other formats: of unrelated weights, it is 1.4."""

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

RUN = 16
"""Number of neighboring values that have the same levels in every quantized format."""

LARGEST_MISSED = 0.01
"""Largest fraction of values for which another level of their run may be nearer.

Measured with llama.cpp's quantization of normal and heavy-tailed values: 0 without an importance matrix, up to 0.005
with one; 0.01 or more if the weights change by 1% (Q4_0, IQ4, Q5), 1.5% (Q4_K) or 2% (Q3_K) of their root mean square.
"""


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

    def check(self, request: ExportRequest) -> str:
        """Check that this file is the adapter's base, and return what is not certain, for the user, or "".

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
        samples = list(self._samples(request, sites))
        problem = self._differing(sites, samples)
        if problem and not request.allow_mismatch:
            self._fail(problem, override="base_mismatch")
        doubt = problem or ("" if samples else "only names and shapes were compared with the base's")
        return f"{self.path}: {doubt}; compare answers with --verify." if doubt else ""

    def _differing(self, sites: dict[str, SiteShape], samples: Sequence[tuple[str, Tensor, core.Sample]]) -> str:
        """Return which weights are not those of the base, or ""."""
        apart, missed = list[str](), list[Tensor]()
        for name, positions, sample in samples:
            form, runs = self.tensors[name].tensor_type.name, self._at(name, sites[name], positions)
            found, expected, slack = runs[:, 0], sample.values(), sample.slack()
            if form in PLAIN:
                is_apart = core.agreement(sample, core.Sample.of(found.float())) == core.APART
            else:
                bound = LARGEST_ERROR.get(form, LARGEST_QUANTIZATION_ERROR) * expected.norm()
                is_apart = not ((found - expected).abs() - slack).clamp(min=0).norm() <= bound
            apart += [name] * is_apart
            if form not in PLAIN and not TOGETHER.fullmatch(form):
                distances = (runs - expected[:, None]).abs()
                rounded = slack + expected.abs() * 2**-8  # before or after the base was quantized
                missed.append(distances[:, 0] * 0.95 > distances.min(dim=1).values + 2 * rounded)
        if apart:
            return f"values of {len(apart)} weights differ (first {format_some(apart[:3])})"
        share = float(torch.cat(missed).double().mean()) if missed else 0.0
        text = f"{format_percent(share)} of its values are not the base's after quantization"
        return text if share > LARGEST_MISSED else ""

    def _fail(self, problem: str, override: str | None = None) -> None:
        raise ModelError(
            f"{self.path}: not the base that the adapter was trained on: {problem}.",
            advice="Pass that base as --base-gguf" + (f", or {OVERRIDE}." if override else "."),
            what=problem,
            where=self.path,
            field="base_gguf",
            override=override,
        )

    def _stored(self, site: SiteShape) -> str | None:
        """Return the name of a site's weight in the file; None if it has none of its own there."""
        name = self.layout.name(site.path)
        stored = f"{name}.weight"
        return None if name is None or (site.tied_to and stored not in self.tensors) else stored

    def _samples(
        self, request: ExportRequest, sites: dict[str, SiteShape]
    ) -> Iterator[tuple[str, Tensor, core.Sample]]:
        """Yield names of weights with positions (n,) in the base's plain tensors, and the values there.

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
                yield name, torch.tensor(sampled), mark.samples[parameter]
            elif files is not None and (stored := files.under([parameter])) is not None:
                values = files.read(stored)
                if values.shape == shape and values.dtype in _FLOATS:  # others are quantized
                    positions = torch.linspace(0, values.numel() - 1, SAMPLES, dtype=torch.float64).long()
                    yield name, positions, core.Sample.of(values.flatten()[positions])

    def _at(self, name: str, site: SiteShape, positions: Tensor) -> Tensor:
        """Return the values (n, …) in fp64 that the file has for positions in the base's plain tensor of a site.

        The first value is the one at the position; those of its run follow.
        """
        if site.kind == CONV1D:  # (in, out) in the base
            columns, rows = positions // site.out_features, positions % site.out_features
        else:
            width = site.out_features if site.kind == EMBEDDING else site.in_features
            rows, columns = positions // width, positions % width
        if site.kind != EMBEDDING:
            order = self.layout.rows(name.removesuffix(".weight"), torch.arange(site.out_features))
            rows = order.argsort()[rows]
        found = torch.from_numpy(self.values(name, rows.tolist()))
        run = (columns // RUN * RUN)[:, None] + torch.arange(RUN)
        return found.gather(1, torch.cat([columns[:, None], run.clamp(max=found.shape[1] - 1)], dim=1)).double()
