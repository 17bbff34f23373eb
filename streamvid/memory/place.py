"""Where memory lies when nothing is said."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs


def default_folder() -> Path:
    """``$STREAMVID_MEMORY``, else ``memory`` in the user's data folder."""
    named = os.environ.get("STREAMVID_MEMORY")
    return Path(named) if named else Path(platformdirs.user_data_dir("streamvid")) / "memory"
