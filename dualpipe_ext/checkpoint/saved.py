"""The contents of a checkpoint."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualpipe_ext.checkpoint.folders import read_manifest
from dualpipe_ext.checkpoint.holdings import Shapes
from dualpipe_ext.checkpoint.integrity import Checksums, reading
from dualpipe_ext.checkpoint.storage import (
    DESCRIPTION,
    read_metadata,
    read_values,
    records,
    shape_of,
)

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

__all__ = ["Saved"]


@dataclass(frozen=True)
class Saved:
    """A complete checkpoint.

    Attributes:
        place: its folder.
        manifest: the contents of its ``checkpoint.json``.
        metadata: the metadata of ``torch.distributed.checkpoint``. Keys begin with a section:
            ``model``, ``optimizer`` or ``random``; some consist of only a section.
        checksums: the checksums of its values; ``None`` in checkpoints of earlier versions.
    """

    place: Path
    manifest: dict[str, Any]
    metadata: Metadata
    checksums: Checksums | None

    @classmethod
    def at(cls, place: Path) -> Saved:
        """Opens the checkpoint in a folder.

        Raises:
            ValueError: it is damaged.
        """
        manifest = read_manifest(place)
        checksums = None
        if "checksums" in manifest:
            checksums = Checksums.read(place, manifest["checksums"])
            checksums.check(place, [(DESCRIPTION, 0, manifest["files"][DESCRIPTION])])
        with reading(place):
            return cls(place, manifest, read_metadata(place), checksums)

    def has(self, key: str) -> bool:
        """Whether there is such a key."""
        return key in self.metadata.state_dict_metadata

    def keys(self, section: str) -> list[str]:
        """Returns the keys of a section, without the section's name."""
        prefix = f"{section}."
        keys = self.metadata.state_dict_metadata
        return [key.removeprefix(prefix) for key in keys if key.startswith(prefix)]

    def shapes(self) -> Shapes:
        """Returns the shapes of the model's tensors, by name."""
        return {name: shape_of(self.metadata, f"model.{name}") for name in self.keys("model")}

    def read(self, section: str, keys: Iterable[str]) -> dict[str, Any]:
        """Reads values of a section.

        Raises:
            ValueError: they are damaged.
        """
        prefix = f"{section}."
        values = self._read([f"{prefix}{key}" for key in keys])
        return {key.removeprefix(prefix): value for key, value in values.items()}

    def read_one(self, key: str) -> Any:
        """Reads the value of a key.

        Raises:
            ValueError: there is no such key, or its value is damaged.
        """
        if not self.has(key):
            raise ValueError(
                f"{self.place} was saved without {key}; load it without {key}=, or save with it"
            )
        return self._read([key])[key]

    def _read(self, keys: Sequence[str]) -> dict[str, Any]:
        if self.checksums is not None:
            self.checksums.check(self.place, records(self.metadata, keys))
        return read_values(self.place, self.metadata, keys)
