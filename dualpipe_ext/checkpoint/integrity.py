"""Whether a checkpoint has the bytes that were written."""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO
from zipfile import BadZipFile, ZipFile

from torch.serialization import get_crc32_options

__all__ = [
    "Record",
    "check_description",
    "check_files",
    "check_records",
    "checksums",
    "telling_damage",
]

_REMEDY = "copy it again, or load an older checkpoint"
_DESCRIPTION = ".metadata"  # torch.distributed.checkpoint's: what is where in the other files
_BY_NONSENSE = (RuntimeError, ValueError, EOFError, KeyError, UnpicklingError)  # of torch's reader
Record = tuple[str, int, int]  # (file, offset in bytes, length in bytes) of a value in it


def checksums(checkpoint: Path) -> dict[str, Any]:
    """What is written down of a new checkpoint, for :func:`check_description`.

    Values have their checksums beside them: they are records in the zip format of ``torch.save``.
    """
    return {"description": _checksum(checkpoint), "records": get_crc32_options()}


def check_files(checkpoint: Path, sizes: dict[str, int]) -> None:
    """Raises ValueError where a file is missing or has another size than was written."""
    for name, size in sizes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise _damaged(checkpoint, f"{name} {state}, and {size} bytes were written")


def check_description(checkpoint: Path, written: dict[str, Any]) -> None:
    """Raises ValueError where values would be looked for in wrong places."""
    if _checksum(checkpoint) != written["description"]:
        raise _damaged(checkpoint, f"{_DESCRIPTION} has other bytes than were written")


def check_records(checkpoint: Path, records: Iterable[Record]) -> None:
    """Raises ValueError where a value has other bytes than were written."""
    for name, offset, length in sorted(set(records)):
        with (checkpoint / name).open("rb") as file:
            if not _is_intact(_Part(file, offset, length)):
                place = f"{length} bytes from byte {offset} on"
                raise _damaged(checkpoint, f"{name} has other bytes than were written, in the {place}")


@contextmanager
def telling_damage(checkpoint: Path) -> Iterator[None]:
    """Around reading values: headers that mislead torch may look well to :func:`check_records`."""
    try:
        yield
    except _BY_NONSENSE as error:
        raise ValueError(
            f"values of {checkpoint} cannot be read ({type(error).__name__}: {error}); it may be "
            f"damaged: {_REMEDY}"
        ) from error


def _checksum(checkpoint: Path) -> int:
    return zlib.crc32((checkpoint / _DESCRIPTION).read_bytes())


def _is_intact(record: io.RawIOBase) -> bool:
    try:
        with ZipFile(record) as archive:
            return archive.testzip() is None
    except (BadZipFile, zlib.error, EOFError, OverflowError, RuntimeError, ValueError):
        return False  # as zipfile puts it where it can make nothing of a header


def _damaged(checkpoint: Path, how: str) -> ValueError:
    return ValueError(f"{checkpoint} is damaged: {how}; {_REMEDY}")


class _Part(io.RawIOBase):
    """Some bytes of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._length, self._place = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        place = (0, self._place, self._length)[whence] + offset
        if place < 0:
            raise ValueError(f"{place} is before the start")
        self._place = place
        return place

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), max(0, self._length - self._place))
        self._file.seek(self._start + self._place)
        count = int(self._file.readinto(memoryview(buffer)[:size]))  # type: ignore[attr-defined]
        self._place += count
        return count
