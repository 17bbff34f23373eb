"""``streamvid probe``: what files and addresses hold, before anybody relies on them."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from streamvid.errors import SettingsError, StreamvidError
from streamvid.ingest.named import Decoding
from streamvid_cli import options, render
from streamvid_pipelines.probe import probe_one

DEFAULTS = Decoding()


def probe(
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="Files, folders of images or addresses.")],
    decode: Annotated[
        bool, typer.Option("--decode", help="Read everything: frames, first and last time, gaps, damage.")
    ] = False,
    rate: options.Rate = None,
    decoder: options.Decoder = DEFAULTS.decoder,
    hwaccel: options.Hwaccel = None,
    stall_seconds: options.StallSeconds = DEFAULTS.stall_seconds,
    decode_threads: options.DecodeThreads = None,
    json: options.Json = False,
) -> int:
    """Tell what each source is: container, codec, size, exact times, colour, streams, decoder.

    Leaves with 0 if all of them can be used and with 1 if one was refused; the others are shown all the same.
    """
    decoding = Decoding(decoder, decode_threads, hwaccel, stall_seconds)
    results = []
    for path in paths:
        result = _one(path, decoding, rate, decode)
        results.append(result)
        if json:
            continue
        if result["usable"]:
            sys.stdout.write(_text(result))
            sys.stdout.flush()
        else:
            sys.stderr.write(f"refused: {result['reason']}\n")
    if json:
        render.emit_json(results[0] if len(results) == 1 else results)
    return 0 if all(result["usable"] for result in results) else 1


def _one(path: str, decoding: Decoding, rate: float | None, decode: bool) -> dict[str, Any]:
    try:
        return {"usable": True, **probe_one(path, decoding, rate=rate, decode=decode)}
    except SettingsError:
        raise
    except StreamvidError as reason:
        from streamvid.ingest.files import label

        return {"usable": False, "name": label(path), "reason": " ".join(str(reason).split())}


def _text(result: dict[str, Any]) -> str:
    """The result for a person."""
    end = "no end" if result["live"] else "unknown (read everything to tell: --decode)"
    seconds = result["duration_seconds"]
    duration = end if seconds is None else f"{seconds:g} s ({result['duration']})"
    average = f", {result['average_fps']:g} fps on average" if result["average_fps"] else ""
    frames = f", {result['frames']} pictures" if result["frames"] is not None else ""
    lines = [
        str(result["name"]),
        f"  {result['container']}, {result['codec']}, {result['width']}x{result['height']}"
        + (f" (turned by {result['rotation']} degrees)" if result["rotation"] else ""),
        f"  {duration} from {result['start_seconds']:g} s{frames}{average}; clock ticks of {result['time_base']} s",
        f"  colour: {result['color']}",
        *(f"  stream {stream}" for stream in result["streams"]),
        f"  decoder: {result['decoder']}" + (f": {result['decoder_reason']}" if result["decoder_reason"] else ""),
        *(f"  note: {note}" for note in result["notes"]),
    ]
    read = result.get("decoded")
    if read is not None:
        lines.append(
            f"  read: {read['frames']} pictures from {read['first_pts_seconds']} to {read['last_pts_seconds']} s, "
            f"gone at {read['end_seconds']} s; one stays {read['longest_stay_seconds']:g} s at most"
        )
        shown = ", ".join(f"{a:g}-{b:g} s" for a, b in read["gaps"][:5])
        more = f" and {read['gap_count'] - 5} more" if read["gap_count"] > 5 else ""
        lines.append(f"  gaps: {shown}{more}" if shown else "  gaps: none")
        damage = {name: count for name, count in read["damage"].items() if count and name != "decoded"}
        lines.append("  damage: " + (", ".join(f"{count} {name}" for name, count in damage.items()) or "none"))
    return "\n".join(lines) + "\n"
