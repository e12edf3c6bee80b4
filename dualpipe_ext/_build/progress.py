"""One line of progress: rewritten in place on a terminal, an occasional new line elsewhere."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

SPARSE_INTERVAL_S = 10.0


class Progress:
    """Shows how far a build is; not thread-safe."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._live = self._stream.isatty()
        self._start = time.monotonic()
        self._shown_at = self._start

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def line(self, text: str) -> None:
        """Shows a line that stays."""
        self._clear()
        self._write(f"dualpipe_ext: {text}\n")

    def step(self, done: int, total: int, text: str) -> None:
        """Shows that ``done`` of ``total`` steps are done, the last of them ``text``."""
        width = len(str(total))
        line = f"[{done:>{width}}/{total}] {text}"
        if self._live:
            columns = shutil.get_terminal_size().columns - 1
            self._write("\r\x1b[K" + f"dualpipe_ext: {line} ({self.elapsed_s:.0f} s)"[:columns])
        elif done == total or time.monotonic() - self._shown_at >= SPARSE_INTERVAL_S:
            self._shown_at = time.monotonic()
            self.line(f"{line} ({self.elapsed_s:.0f} s)")

    def finish(self) -> None:
        """Clears the line on a terminal."""
        self._clear()

    def _clear(self) -> None:
        if self._live:
            self._write("\r\x1b[K")

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()
