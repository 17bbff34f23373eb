"""Public names are sorted, there, and cheap to import."""

from __future__ import annotations

import subprocess
import sys

import streamvid


def test_public_names_are_sorted_and_exist() -> None:
    assert streamvid.__all__ == sorted(streamvid.__all__)
    assert all(hasattr(streamvid, name) for name in streamvid.__all__)


def test_importing_the_library_or_the_commands_does_not_load_the_model_libraries() -> None:
    """transformers takes seconds to import; `streamvid --help` must not."""
    code = "import sys, streamvid, streamvid_cli.app; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
