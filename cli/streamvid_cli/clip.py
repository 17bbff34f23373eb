"""``streamvid clip``: a piece of what was recorded of a live stream, as a file."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from streamvid_cli import options, render


def clip(
    start: Annotated[str, typer.Argument(metavar="START", help="Wall clock: 14:02:10, or '2026-03-01 14:02:10'.")],
    stop: Annotated[str, typer.Argument(metavar="STOP", help="Likewise; not included.")],
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to: .mp4, .mov, .mkv or .ts.")],
    stream: Annotated[str | None, typer.Option(help="Name of the stream. Default: the only one recorded.")] = None,
    memory: options.Memory = None,
    pin: Annotated[
        bool, typer.Option("--pin", help="Also never give up the recording of this span when space or age asks for it.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Write what a live stream showed from one moment to another, where it was watched with --record.

    Nothing is encoded anew.  The clip begins at the last key frame at or before START, and says when that was.
    """
    from streamvid.ingest.recording import Recording
    from streamvid.ingest.ring import recording_of
    from streamvid.memory.place import default_folder

    recording = Recording(recording_of(memory or default_folder(), stream))
    first, last = recording.moment(start), recording.moment(stop)
    made = recording.export(first, last, path)
    if pin:
        recording.pin(first, last)
    begins, ends = (recording.origin + timedelta(seconds=float(moment)) for moment in (made.start, made.stop))
    seconds = float(made.stop - made.start)
    if json:
        render.emit_json(
            {
                "path": str(made.path),
                "stream": recording.folder.name,
                "start": begins.isoformat(),
                "stop": ends.isoformat(),
                "seconds": seconds,
                "bytes": made.num_bytes,
                "pinned": pin,
            }
        )
        return
    early = float(first - made.start)
    note = f"; it begins at a key frame, {early:.1f} s early" if early > 0.05 else ""
    span = f"{begins:%Y-%m-%d %H:%M:%S}-{ends:%H:%M:%S}"
    sys.stdout.write(f"{made.path}: {span} ({seconds:.1f} s, {made.num_bytes / 1e6:.1f} MB){note}\n")
