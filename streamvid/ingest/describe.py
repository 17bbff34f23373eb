"""What a container says of itself, in words: streams and colours."""

from __future__ import annotations

from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream

_MATRICES = {0: "rgb", 1: "bt709", 2: "?", 5: "bt470bg", 6: "smpte170m", 8: "ycgco", 9: "bt2020nc", 10: "bt2020c"}
"""Matrix coefficients (ISO/IEC 23091-2) by their usual names; PyAV has other names for some and none for others."""


def streams_of(container: InputContainer, chosen: VideoStream) -> tuple[str, ...]:
    """One phrase a stream, such as ``*0 video h264 854x480 yuv420p 24 fps``; the star marks the chosen one."""
    return tuple(_stream(stream, stream.index == chosen.index) for stream in container.streams)


def colour_of(frame: VideoFrame) -> str:
    """Pixel format and what the frame says of matrix, range, primaries and transfer; "?" where it says nothing."""
    return ", ".join(
        (
            frame.format.name,
            f"matrix {_name(Colorspace, frame.colorspace)}",
            f"range {_name(ColorRange, frame.color_range)}",
            f"primaries {_name(ColorPrimaries, frame.color_primaries)}",
            f"transfer {_name(ColorTrc, frame.color_trc)}",
        )
    )


def _stream(stream: Stream, chosen: bool) -> str:
    words = [f"{'*' if chosen else ''}{stream.index} {stream.type}"]
    codec = stream.codec_context
    if codec is None:
        words.append("of an unknown kind")
    else:
        words.append(codec.name)
        if isinstance(stream, VideoStream):
            words.append(f"{stream.width}x{stream.height}")
            if stream.codec_context.pix_fmt:
                words.append(stream.codec_context.pix_fmt)
            if stream.average_rate:
                words.append(f"{float(stream.average_rate):g} fps")
    if stream.disposition & Disposition.attached_pic:
        words.append("(cover picture)")
    if stream.language and stream.language != "und":
        words.append(f"[{stream.language}]")
    return " ".join(words)


def _name(kind: type[Colorspace] | type[ColorRange] | type[ColorPrimaries] | type[ColorTrc], value: int) -> str:
    if kind is Colorspace and value in _MATRICES:
        return _MATRICES[value]
    try:
        name = kind(value).name.lower()
    except ValueError:
        return str(value)
    return "?" if name in ("unspecified", "reserved") else name
