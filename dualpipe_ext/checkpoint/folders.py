"""Folders of checkpoints, in which anything with the name of a checkpoint is complete.

A checkpoint is written in full to a folder whose name begins with a dot, next to its final place,
and then renamed. What an interrupted save left behind is removed by the next one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zlib import crc32

from dualpipe_ext.checkpoint.integrity import damaged, reading, write_durably

__all__ = [
    "begin",
    "commit",
    "discard",
    "find_checkpoint",
    "latest_checkpoint",
    "read_manifest",
    "remove_old",
]

MANIFEST = "checkpoint.json"  # its presence marks a checkpoint
_FORMAT = 2  # 1 had no checksums
_DRAFT = ".unfinished"
_STEP = re.compile(r"step-(\d{8,})(-\d+)?")


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """Returns the latest complete checkpoint in a folder; ``None`` if there is none.

    Raises:
        ValueError: a manifest is damaged or of a later version, so that the latest checkpoint
            cannot be determined.
    """
    return next(reversed(_checkpoints(Path(folder))), None)


def find_checkpoint(path: str | os.PathLike[str]) -> Path:
    """Returns ``path`` if it is a checkpoint, or the latest one if it is a folder of them.

    Raises:
        FileNotFoundError: there is none.
        ValueError: as for :func:`latest_checkpoint`.
    """
    if (Path(path) / MANIFEST).is_file():
        return Path(path)
    found = latest_checkpoint(path)
    if found is None:
        raise FileNotFoundError(
            f"there is no checkpoint in {os.fspath(path)}: neither {MANIFEST} of one nor folders "
            f"step-... that have it; give the folder that save_checkpoint was given, or one in it"
        )
    return found


def read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Reads a checkpoint's manifest.

    Raises:
        ValueError: it is damaged, or was written by a later version.
    """
    with reading(checkpoint):
        text = (checkpoint / MANIFEST).read_bytes()
    try:
        manifest: dict[str, Any] = json.loads(text)
        expected = manifest.pop("crc32", None)
        version = int(manifest["format"])
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise damaged(checkpoint, f"{MANIFEST} has other text than was written") from error
    if version > _FORMAT:
        raise ValueError(
            f"{checkpoint} has format {version}, and this version of dualpipe_ext reads formats up "
            f"to {_FORMAT}; use the version that wrote it"
        )
    if (version > 1 or expected is not None) and _checksum(manifest) != expected:
        raise damaged(checkpoint, f"{MANIFEST} has other text than was written")
    return manifest


def begin(folder: Path) -> Path:
    """Creates a folder to write a checkpoint to, and removes those of interrupted saves."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.glob(f".*{_DRAFT}"):
        shutil.rmtree(left, ignore_errors=True)
    draft = folder / f".{uuid.uuid4().hex}{_DRAFT}"
    draft.mkdir()
    return draft


def commit(draft: Path, step: int, facts: dict[str, Any]) -> Path:
    """Turns what was written into a checkpoint, which is now the latest one; returns its path."""
    folder = draft.parent
    others = _checkpoints(folder, intact=True).values()
    manifest = {
        "format": _FORMAT,
        "step": step,
        "serial": 1 + max((other["serial"] for other in others), default=0),
        **facts,
        "files": {file.name: file.stat().st_size for file in sorted(draft.iterdir())},
    }
    text = json.dumps({**manifest, "crc32": _checksum(manifest)}, indent=2)
    write_durably(draft / MANIFEST, text)
    _sync(draft)
    place = next(name for name in _names(folder, step) if not name.exists())
    draft.rename(place)
    _sync(folder)
    return place


def discard(draft: Path) -> None:
    """Removes an incomplete checkpoint."""
    shutil.rmtree(draft, ignore_errors=True)


def remove_old(checkpoint: Path, keep: int | None) -> None:
    """Removes all but the last ``keep`` checkpoints, and earlier ones of the latest one's step."""
    others = _checkpoints(checkpoint.parent, intact=True)  # unreadable ones are left alone
    step = others.pop(checkpoint)["step"]
    old = [other for other, manifest in others.items() if manifest["step"] == step]
    if keep is not None:
        rest = [other for other in others if other not in old]
        old += rest[: max(0, len(rest) - (keep - 1))]
    for other in old:
        # Renamed first: half a checkpoint must not look like a whole one.
        gone = other.rename(other.parent / f".{uuid.uuid4().hex}{_DRAFT}")
        shutil.rmtree(gone, ignore_errors=True)


def _checkpoints(folder: Path, *, intact: bool = False) -> dict[Path, dict[str, Any]]:
    """Returns the manifests of all checkpoints in a folder, in the order they were saved in.

    That need not be the order of their steps.

    Raises:
        ValueError: a manifest cannot be read; with ``intact``, it is left out instead.
    """
    if not folder.is_dir():
        return {}
    found: dict[Path, dict[str, Any]] = {}
    for child in folder.iterdir():
        if _STEP.fullmatch(child.name) and (child / MANIFEST).is_file():
            try:
                found[child] = read_manifest(child)
            except ValueError:
                if not intact:
                    raise
    return dict(sorted(found.items(), key=lambda entry: entry[1]["serial"]))


def _names(folder: Path, step: int) -> Iterator[Path]:
    name = f"step-{step:08d}"
    yield folder / name
    number = 2
    while True:  # a step may be saved again; its earlier checkpoint is removed afterwards
        yield folder / f"{name}-{number}"
        number += 1


def _checksum(manifest: dict[str, Any]) -> int:
    """Returns the checksum of a manifest's content, whatever its layout."""
    return crc32(json.dumps(manifest, sort_keys=True).encode())


def _sync(folder: Path) -> None:
    """Waits until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
