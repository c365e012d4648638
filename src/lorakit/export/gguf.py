"""The common form as a GGUF adapter for llama.cpp, and the layout of weights in GGUF files.

llama.cpp rotates pairs of neighboring rows of q and k in the architecture "llama", where transformers rotates the two
halves of a head; so the rows of B at those sites are permuted, as the weights are.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lorakit.choices import EMBEDDING
from lorakit.errors import AdapterError, UsageError, require_packages
from lorakit.export.request import Exported, ExportRequest, versioned
from lorakit.export.sites import MERGE, check_sites, tested_base
from lorakit.tables import format_some

if TYPE_CHECKING:
    import gguf

    from lorakit.architectures.shapes import ModelShape

ARCHITECTURES: Mapping[str, str] = {
    **{name: name for name in ("llama", "qwen2", "qwen3", "phi3", "gemma2", "gpt2")},
    "mistral": "llama",
    "gemma3_text": "gemma3",
}
"""`model_type` of an architecture that was tested in llama.cpp -> its name in GGUF files."""

PERMUTED = {"llama": {"attn_q": "heads", "attn_k": "kv_heads"}}
"""Architecture in GGUF files -> its tensors with permuted rows, and the field of `ModelShape` with their heads."""

TOKENS = "token_embd"
_BLOCK = re.compile(r"blk\.\d+\.")


@dataclass(frozen=True)
class GgufLayout:
    """Names and order of a base's weights in GGUF files; `architecture` is its name there."""

    architecture: str
    shape: ModelShape

    @cached_property
    def _names(self) -> gguf.TensorNameMap:
        import gguf

        number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == self.architecture)
        return gguf.get_tensor_name_map(number, self.shape.layers)

    def name(self, path: str) -> str | None:
        """Return the name of a module's weight in GGUF files, without `.weight`; None if they have none."""
        found = self._names.get_name(path)
        return None if found is None else str(found)

    def rows(self, name: str, B: Tensor) -> Tensor:
        """Return the rows of B (out, …), of the weight with this name, in the order of GGUF files."""
        heads = PERMUTED.get(self.architecture, {}).get(_BLOCK.sub("", name))
        if heads is None:
            return B
        halves = B.reshape(getattr(self.shape, heads), 2, -1, *B.shape[1:])
        return halves.transpose(1, 2).reshape(B.shape)


def layout_of(request: ExportRequest) -> GgufLayout:
    """Return how GGUF files hold the weights of a request's base.

    Raises:
        UsageError: The architecture was not tested in llama.cpp, or is unknown to it.
        MissingExtra: The package gguf is not installed.
    """
    require_packages("Writing GGUF files", "gguf", ["gguf"])
    import gguf

    base = tested_base(request, ARCHITECTURES, "llama.cpp")
    architecture = ARCHITECTURES.get(base.model_type, base.model_type)
    if architecture not in gguf.MODEL_ARCH_NAMES.values():
        given = request.known_base.given
        text = f"{given}: the name of the architecture {base.model_type!r} in GGUF files is not known. {MERGE}"
        raise UsageError(text, what=base.model_type, where=given)
    return GgufLayout(architecture, base.shape)


def write_gguf(request: ExportRequest, folder: Path) -> Exported:
    """Write an adapter as one GGUF file to an empty directory.

    Raises:
        AdapterError: llama.cpp cannot adapt a site.
        UsageError: The architecture was not tested.

    Source:
        llama.cpp: src/llama-adapter.cpp (names, shapes and scale), src/llama-graph.cpp (build_inp_embd).
    """
    layout, adapter = layout_of(request), request.adapter
    import gguf

    names = adapted_names(request, layout)
    file = folder / "adapter.gguf"
    writer = gguf.GGUFWriter(file, layout.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # llama.cpp then multiplies by 1
    if adapter.invocation:
        writer.add_array(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, list(adapter.invocation))
    for path, name in names.items():
        factor = adapter.weights.factors[path]
        A = factor.A.T if name == TOKENS else factor.A  # rows of A are looked up by token id
        writer.add_tensor(f"{name}.weight.lora_a", _array(A))
        writer.add_tensor(f"{name}.weight.lora_b", _array(layout.rows(name, factor.B)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    named = versioned(request.name, folder)
    file.rename(folder / f"{named}.gguf")
    return Exported(named, request.known_base.recorded_name)


def llama_commands(name: str, base: str, rank: int, output: str) -> Mapping[str, str]:
    """Return how llama.cpp serves an exported adapter on the base as a GGUF file: title -> command."""
    lora = shlex.quote(f"{output}/{name}.gguf")
    # without the list in each request, the server reuses what the last request's adapter computed (llama.cpp#26207)
    return {
        "llama.cpp": f"llama-cli -m BASE.gguf --lora {lora} -p 'PROMPT'",
        "llama.cpp, server": f"llama-server -m BASE.gguf --host 127.0.0.1 --lora {lora} --lora-init-without-apply\n"
        '# each request: "lora": [{"id": 0, "scale": 1.0}], and with scale 0 for the base',
    }


def adapted_names(
    request: ExportRequest, layout: GgufLayout, if_tied: str = "Merge it: lorakit export gguf --merged."
) -> dict[str, str]:
    """Return the name in GGUF files of each adapted weight, by site; `if_tied` as in `check_sites`.

    Raises:
        AdapterError: Sites have none, or are not those of the base; it names all of them.
    """
    adapter = request.adapter
    check_sites(adapter, layout.shape, "llama.cpp", if_tied)
    kinds = {site.path: site.kind for site in layout.shape.sites}
    names = {path: layout.name(path) for path in adapter.weights.factors}
    lacking = [path for path, name in names.items() if name is None or (kinds[path] == EMBEDDING and name != TOKENS)]
    if lacking:
        text = f"{adapter.folder}: llama.cpp cannot adapt {format_some(lacking)}. {MERGE}"
        raise AdapterError(text, what=lacking[0], where=adapter.folder)
    return {path: name for path, name in names.items() if name is not None}


def _array(tensor: Tensor) -> Any:
    return tensor.contiguous().numpy()
