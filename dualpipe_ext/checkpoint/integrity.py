"""Checks that a checkpoint has the bytes that were written.

Each rank records a CRC-32 of the bytes of each value that it writes, and compares it for each value
that it reads. (Torch does not check those of its own zip records, which leave out headers.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import BinaryIO
from zlib import crc32

from dualpipe_ext.checkpoint.storage import Record

__all__ = ["Checksums", "check_files", "checksums_of", "damaged", "reading", "write_durably"]

_FILE = "checksums.json"
_PIECE_BYTES = 1 << 22


def damaged(checkpoint: Path, how: str) -> ValueError:
    """Returns the error for a checkpoint that differs from what was written."""
    return ValueError(
        f"{checkpoint} is damaged: {how}; copy it again, to a file system that all ranks share, or "
        f"load an older checkpoint"
    )


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """Turns errors in reading a checkpoint's files into :func:`damaged`."""
    try:
        yield
    except OSError as error:
        raise damaged(checkpoint, f"a file cannot be read on this rank ({error})") from error


def check_files(checkpoint: Path, sizes: dict[str, int]) -> None:
    """Raises ValueError if a file is missing or has another size than was written."""
    for name, size in sizes.items():
        file = checkpoint / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise damaged(checkpoint, f"{name} {state}, and {size} bytes were written")


@dataclass(frozen=True)
class Checksums:
    """The checksums of all values of a checkpoint."""

    by_record: dict[Record, int]

    @classmethod
    def read(cls, checkpoint: Path, expected: int) -> Checksums:
        """Reads the checksums that were written.

        Args:
            checkpoint: the folder of the checkpoint.
            expected: what :meth:`write` returned.

        Raises:
            ValueError: the file of checksums is damaged itself.
        """
        with reading(checkpoint):
            text = (checkpoint / _FILE).read_bytes()
        if crc32(text) != expected:
            raise damaged(checkpoint, f"{_FILE} has other bytes than were written")
        return cls({(name, start, size): crc for name, start, size, crc in json.loads(text)})

    def write(self, folder: Path) -> int:
        """Writes the checksums into the folder; returns the checksum of their file."""
        text = json.dumps([(*record, crc) for record, crc in self.by_record.items()])
        write_durably(folder / _FILE, text)
        return crc32(text.encode())

    def check(self, checkpoint: Path, records: Iterable[Record]) -> None:
        """Raises ValueError if the bytes of a record are not those that were written."""
        with reading(checkpoint):
            found = checksums_of(checkpoint, records)
        for record, checksum in found.items():
            if checksum != self.by_record.get(record):
                name, start, size = record
                raise damaged(
                    checkpoint,
                    f"{name} has other bytes than were written, among {size} from byte {start} on",
                )


def checksums_of(folder: Path, records: Iterable[Record]) -> dict[Record, int]:
    """Returns the checksums of what the files contain now, by record."""
    found: dict[Record, int] = {}
    for name, of_file in groupby(sorted(set(records)), key=lambda record: record[0]):
        with (folder / name).open("rb") as file:
            found |= {record: _checksum(file, *record[1:]) for record in of_file}
    return found


def _checksum(file: BinaryIO, start: int, size: int) -> int:
    file.seek(start)
    checksum = 0
    while size > 0 and (piece := file.read(min(size, _PIECE_BYTES))):
        checksum = crc32(piece, checksum)
        size -= len(piece)
    return checksum


def write_durably(file: Path, text: str) -> None:
    """Writes a file; returns when it is on disk."""
    with file.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
