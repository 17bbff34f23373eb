"""Standard input as a source: what cannot be jumped in is written to a temporary file first."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import BinaryIO, Self

from streamvid.errors import SourceError
from streamvid.ingest.files import check_file, label

NAME = "standard input"
"""What messages call it."""

MAX_BYTES = 16 << 30

_PIECE_BYTES = 1 << 20
_HEAD_BYTES = 4096
_SPARE_BYTES = 256 << 20
"""What is left free on the disk for everybody else."""


class Spool:
    """A temporary file that is deleted when this object is closed or gone, or the program ends.

    A context manager.  Only the process that wrote the file deletes it; one that is killed
    leaves it behind.
    """

    name = NAME

    def __init__(self, folder: Path) -> None:
        handle, path = tempfile.mkstemp(prefix="streamvid-", dir=folder)
        os.close(handle)
        self.path = Path(path)
        self._remove = weakref.finalize(self, _delete, self.path, os.getpid())

    def close(self) -> None:
        """Delete the file; closing twice is allowed."""
        self._remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def spool_stdin(stream: BinaryIO, *, max_bytes: int = MAX_BYTES, folder: str | os.PathLike[str] | None = None) -> Spool:
    """All of a binary stream in a temporary file, such as ``sys.stdin.buffer``; read 1 MiB at a time.

    Args:
        stream: what to read, to its end.
        max_bytes: never more than this, >= 1.
        folder: where the file goes; None is the system's folder for temporary files.

    Raises:
        SourceError: if the stream is a terminal, empty, text, too long for ``max_bytes`` or for
            the disk, of which 256 MiB stay free, or cannot be read.  Nothing is left on disk.
    """
    if stream.isatty():
        raise SourceError(
            f"{NAME} is a terminal; pipe a video in, as in: cat video.mp4 | streamvid ask - 'What happens?'"
        )
    where = Path(folder if folder is not None else tempfile.gettempdir())
    try:
        spool = Spool(where)
    except OSError as reason:
        raise SourceError(f"{label(where)} takes no temporary file: {reason.strerror}; set TMPDIR to another") from None
    try:
        _fill(spool.path, stream, max_bytes)
    except BaseException:
        spool.close()
        raise
    return spool


def _fill(path: Path, stream: BinaryIO, max_bytes: int) -> None:
    written = 0
    checked = False
    try:
        with path.open("wb") as file:
            while piece := _read(stream):
                if written + len(piece) > max_bytes:
                    raise SourceError(
                        f"{NAME} holds more than {max_bytes:,} bytes; save it to a file and give its name"
                    )
                if shutil.disk_usage(path.parent).free < len(piece) + _SPARE_BYTES:
                    raise SourceError(_full(path.parent, written))
                written += file.write(piece)
                if not checked and written >= _HEAD_BYTES:
                    file.flush()
                    _refuse_text(path)  # before the rest of it is read
                    checked = True
    except OSError as reason:
        raise SourceError(f"{_full(path.parent, written)} ({reason.strerror})") from None
    if not written:
        raise SourceError(f"{NAME} is empty (0 bytes); the program before the | gave nothing, look at its messages")
    if not checked:
        _refuse_text(path)


def _read(stream: BinaryIO) -> bytes:
    try:
        piece: bytes | None = stream.read(_PIECE_BYTES)
    except OSError as reason:
        raise SourceError(f"{NAME} cannot be read: {reason.strerror}; save the video to a file") from None
    if piece is None:
        raise SourceError(f"{NAME} is set not to wait for data; put cat before it: ... | cat | streamvid ask - ...")
    return piece


def _full(folder: Path, written: int) -> str:
    spare = _SPARE_BYTES >> 20
    return (
        f"{label(folder)} has no room for {NAME} after {written:,} bytes, with {spare} MiB to be left free; "
        "set TMPDIR to a folder on a larger disk"
    )


def _refuse_text(path: Path) -> None:
    """Raise what a file of the same content would raise, in the words for standard input."""
    try:
        check_file(path)
    except SourceError as reason:
        raise SourceError(str(reason).replace(label(path), NAME)) from None


def _delete(path: Path, process: int) -> None:
    if os.getpid() == process:  # a fork ends too, and the file is not its own
        path.unlink(missing_ok=True)
