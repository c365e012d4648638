"""A dictionary of buffers, as torch has one of parameters; PEFT's layers of other methods hold theirs in it."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

from torch import Tensor, nn


class BufferDict(nn.Module):
    """Name -> buffer, moved and saved with the module that holds it.

    Attributes:
        persistent: Buffers are part of the state dict.
    """

    def __init__(
        self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | None = None, persistent: bool = False
    ) -> None:
        super().__init__()
        self.persistent = persistent
        if buffers is not None:
            self.update(buffers)

    def __getitem__(self, key: str) -> Tensor:
        return self._buffers[key]  # type: ignore[return-value]

    def __setitem__(self, key: str, buffer: Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: str) -> bool:
        return key in self._buffers

    def clear(self) -> None:
        """Drop every buffer."""
        self._buffers.clear()

    def pop(self, key: str) -> Tensor:
        """Take a buffer (…,) out."""
        buffer = self[key]
        del self[key]
        return buffer

    def keys(self) -> KeysView[str]:
        """The names."""
        return self._buffers.keys()

    def items(self) -> ItemsView[str, Any]:
        """Names and buffers."""
        return self._buffers.items()

    def values(self) -> ValuesView[Any]:
        """The buffers."""
        return self._buffers.values()

    def update(self, buffers: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> None:
        """Add buffers.

        Args:
            buffers: Name -> tensor (…), or pairs of them.

        Raises:
            TypeError: They are neither.
        """
        if not isinstance(buffers, (Mapping, Iterable, BufferDict)):
            raise TypeError(f"BuffersDict.update should be called with an iterable of pairs, got {type(buffers)}.")
        for key, buffer in buffers.items() if isinstance(buffers, (Mapping, BufferDict)) else buffers:
            self[key] = buffer

    def extra_repr(self) -> str:
        """One line per buffer."""
        return "\n".join(
            f"  ({key}): Buffer containing: [{type(buffer).__name__} of size {'x'.join(map(str, buffer.shape))}]"
            for key, buffer in self.items()
        )
