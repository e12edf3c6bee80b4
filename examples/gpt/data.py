"""Text that is on every machine: the Python standard library's own sources, as bytes."""

import sysconfig
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Corpus:
    """Bytes to learn from and bytes to be judged by, from different files.

    Attributes:
        train: uint8 vector.
        held_out: uint8 vector.
    """

    train: Tensor
    held_out: Tensor

    def fingerprint(self) -> int:
        """Return a checksum; two machines may train together only if theirs agree."""
        return zlib.crc32(bytes(self.held_out.numpy()), zlib.crc32(bytes(self.train.numpy())))


def load_corpus(folder: Path | None = None, pattern: str = "*.py") -> Corpus:
    """Read the files below ``folder``, one file in twenty held out.

    A file is held out by the hash of its name, so the split is the same in every process.

    Args:
        folder: Where to look; the standard library by default, without tests and packages.
        pattern: Names of the files to read.

    Raises:
        ValueError: If there is too little text to train on.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    ignored = set() if folder is not None else {"site-packages", "dist-packages", "test", "tests"}
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for path in sorted(root.rglob(pattern)):
        name = path.relative_to(root)
        if not ignored.intersection(name.parts) and path.is_file():
            is_held_out = zlib.crc32(name.as_posix().encode()) % 20 == 0
            parts[is_held_out].append(path.read_bytes())
    train, held_out = (b"\n".join(texts) for texts in parts)
    if min(len(train), len(held_out)) < 10_000:
        raise ValueError(
            f"{root} holds {len(train)} training and {len(held_out)} held-out bytes in files named "
            f"{pattern}; at least 10000 each are needed: give another --data folder"
        )
    return Corpus(
        *(torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in (train, held_out))
    )


def draw_batch(text: Tensor, rows: int, context: int, seed: int) -> tuple[Tensor, Tensor]:
    """Cut ``rows`` random windows of ``context`` bytes out of ``text``.

    The same seed gives the same batch on every rank, so nobody has to send data.

    Returns:
        Tokens and the tokens that follow them, both int64 of shape (rows, context).
    """
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(text) - context, (rows, 1), generator=generator)
    windows = text[starts + torch.arange(context + 1)].long()
    return windows[:, :-1], windows[:, 1:]
