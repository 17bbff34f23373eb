"""A memory folder as the system sees it: whether it can be used, and what its errors mean."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streamvid.errors import BankError
from streamvid.memory.schema import FILE_NAME


def writable(folder: Path) -> bool:
    """Whether memory in a folder can be changed."""
    names = ("", FILE_NAME, "segments", "locks")
    return all(os.access(folder / name, os.W_OK) for name in names if (folder / name).exists())


def refuse_headless(folder: Path) -> None:
    """Keep an empty catalogue from being put over segments that lost theirs."""
    segments = folder / "segments"
    if segments.is_dir() and bool(os.listdir(segments)):
        raise BankError(
            f"{folder} holds segments and no catalogue; rebuild it with: streamvid memory repair --memory {folder}"
        )


@contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Turn the system's errors about a memory folder into one line that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "the disk is full; free some space and run the same again, it goes on after the last stored span"
        elif error.errno in (errno.EEXIST, errno.ENOTDIR):
            advice = "it is, or lies below, a file; choose a folder"
        else:
            advice = f"{error.strerror}; check permissions, or choose another folder"
        raise BankError(f"cannot use {folder} as memory: {advice}") from error
