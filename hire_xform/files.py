"""Files that are written as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from pathlib import Path


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file in one move: who reads it sees what was there or all of this, and a failure leaves what was there.

    Each call writes to a file of its own beside it, which is new, so that calls at once do not meet and no link that
    somebody put there is followed. A file that is replaced keeps its mode.

    Raises:
      OSError: the file can't be written, as of ``open``.
    """
    if path.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else None
    if mode is not None and not os.access(path, os.W_OK):
        raise PermissionError(13, "Permission denied", str(path))
    # Opened as any new file, not by ``tempfile``: its mode is then what the process gives to new files.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    number = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        with open(number, "wb") as file:
            file.write(content)
        if mode is not None:
            os.chmod(partial, mode)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
