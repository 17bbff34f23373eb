"""What reading each of the shared videos gives; ``python -m tests.ingest.outcomes`` writes the table anew.

A row was checked by hand against what is known of the file before it went in; a change of the table
is a change of what users see.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from streamvid.errors import SourceError
from streamvid.ingest.probe import survey
from streamvid.ingest.source import open_source

VIDEOS = Path(__file__).parents[3] / "shared" / "videos"
TABLE = Path(__file__).with_name("outcomes.json")


def files() -> list[Path]:
    """All shared videos."""
    found = (path for folder in ("natural", "odd") for path in (VIDEOS / folder).glob("*"))
    return sorted(path for path in found if path.suffix not in (".txt", ".json"))


def outcome(path: Path) -> dict[str, Any]:
    """What reading a file from end to end gives, in plain values."""
    try:
        with open_source(path, stall_seconds=60) as source:
            info, found = source.info, source.call(survey)
    except SourceError as reason:
        return {"refused": str(reason).replace(str(path), "FILE")}
    lost = found.stats.skipped + found.stats.damaged + found.stats.misplaced
    out: dict[str, Any] = {
        "frames": found.frames,
        "first": str(found.first),
        "last": str(found.last),
        "end": str(found.end),
        "duration": None if info.duration is None else str(info.duration),
        "size": f"{info.width}x{info.height}",
    }
    more = {"rotation": info.rotation, "lost": lost, "gaps": found.gap_count, "notes": list(info.notes)}
    return {**out, **{name: value for name, value in more.items() if value}}


def main() -> None:
    """Write the table."""
    table = {path.name: outcome(path) for path in files()}
    rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(table.items()))
    TABLE.write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    main()
