"""Checks that a CUDA build uses torch's NCCL, and refuses a process that has two."""

from __future__ import annotations

import ctypes
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from dualpipe_ext import _C


def main() -> int:
    """The command line: 0 where all holds."""
    major, minor, patch = torch.cuda.nccl.version()
    found = _C.nccl_version()  # type: ignore[attr-defined] # the stub is that of a build without CUDA
    assert found == f"{major}.{minor}.{patch}", found
    (library,) = _C.loaded_nccls()  # type: ignore[attr-defined]
    _C.require_one_nccl()  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copy(library, Path(folder) / "libnccl.so.2.other"))
        ctypes.CDLL(str(copy))
        try:
            _C.require_one_nccl()  # type: ignore[attr-defined]
        except ValueError as error:
            assert library in str(error) and str(copy) in str(error), error
        else:
            raise AssertionError("two NCCLs in one process went unnoticed")
    print(f"NCCL {found} of {library}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
