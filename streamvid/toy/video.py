"""Toy scenes as real H.264 files, with the truth about them beside."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter
from numpy.typing import NDArray

from streamvid.errors import SettingsError, SourceError
from streamvid.toy.questions import ask_all
from streamvid.toy.world import BACKGROUNDS, Event, Scene, sample_scene

_CHUNK = 32
"""Frames drawn at a time: bounds memory, and a backdrop is painted once a chunk."""

_AVCOL_SPC_BT709 = 1


def parse_size(size: str | int) -> tuple[int, int]:
    """Height and width from "256" (a square) or "320x240" (width x height).

    Raises:
        SettingsError: if it reads otherwise, or a side is odd, below 32 or above 4096.
    """
    found = re.fullmatch(r"\s*(\d{1,5})(?:\s*[xX]\s*(\d{1,5}))?\s*", str(size))
    if found is None:
        raise SettingsError(f"size must read like 256 or 320x240 (width x height), got {size!r}")
    width = int(found[1])
    height = int(found[2]) if found[2] else width
    _check_size(height, width)
    return height, width


def write_video(
    scene: Scene, path: str | os.PathLike[str], *, height: int = 256, width: int = 256, fps: int = 10
) -> Path:
    """Draw the scene into an H.264 MP4 file: frame ``k`` shows the moment ``k / fps``.

    Frames go from the drawing to the encoder in small chunks, so any length fits in memory.
    Without noise and camera shake, moments at which nothing has changed are drawn once.
    The file appears under its name only when it is complete; the same arguments give the
    same bytes.

    Args:
        scene: what to draw.
        path: where to; an existing file is replaced.
        height: even, 32 to 4096 pixels.
        width: even, 32 to 4096 pixels.
        fps: frames a second, a whole number, >= 1.

    Raises:
        SettingsError: if a size or rate is out of range.
        SourceError: if the file cannot be written.
    """
    _check_size(height, width)
    if fps < 1:
        raise SettingsError(f"fps must be a whole number of at least 1, got {fps}")
    with _whole_file(Path(path)) as unfinished:
        # One thread and no version strings in the file: the same scene gives the same bytes.
        with av.open(str(unfinished), "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
            options = {"crf": "18", "preset": "veryfast", "g": str(fps * 2), "threads": "1"}
            stream = container.add_stream("libx264", rate=fps, options=options)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.time_base = stream.codec_context.time_base = Fraction(1, fps)
            context = stream.codec_context
            context.color_range, context.colorspace = ColorRange.MPEG, _AVCOL_SPC_BT709
            context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
            for k, frame in enumerate(_frames(scene, height, width, fps)):
                frame.pts, frame.duration, frame.time_base = k, 1, Fraction(1, fps)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return Path(path)


def write_truth(scene: Scene, path: str | os.PathLike[str]) -> Path:
    """Write what happens in the scene, and questions with their answers, as JSON.

    Raises:
        SourceError: if the file cannot be written.
    """
    truth = {
        "events": [event_truth(event) for event in scene.events],
        "questions": [{"question": q.question, "answer": q.answer, "kind": q.kind} for q in ask_all(scene)],
        "seed": scene.seed,
        "seconds": scene.seconds,
        "background": scene.background,
    }
    with _whole_file(Path(path)) as unfinished:
        unfinished.write_text(json.dumps(truth, indent=2) + "\n", encoding="utf-8")
    return Path(path)


def event_truth(event: Event) -> dict[str, str | int]:
    """One event as it stands in the JSON; it is on screen during ``[start_seconds, end_seconds)``."""
    return {
        "shape": event.shape,
        "color": event.color,
        "action": event.action,
        "start_seconds": event.start_seconds,
        "end_seconds": event.end_seconds,
    }


def render(
    seed: int,
    out: str | os.PathLike[str],
    *,
    seconds: int = 16,
    size: str | int = 256,
    events: int | None = None,
    background: str | None = None,
    fps: int = 10,
    held_out: bool = False,
) -> tuple[Path, Path]:
    """Write the scene of a seed as ``x.mp4`` and its truth as ``x.json``; returns both paths.

    Args:
        seed: any non-negative integer; the same seed gives the same files.
        out: path of the video; must end in .mp4.
        seconds: length, at least 4.
        size: "256" for a square or "320x240" for width x height, even numbers.
        events: how many shapes come and go; None lets the seed decide.
        background: one of ``BACKGROUNDS``; None lets the seed decide.
        fps: frames a second.
        held_out: draw only colour-shape pairs the toy model has never seen, instead of none of them.

    Raises:
        SettingsError: if a value is out of range or the events do not fit.
        SourceError: if a file cannot be written.
    """
    video = Path(out)
    if video.suffix.lower() != ".mp4":
        raise SettingsError(f"the video is written as MP4: give a name that ends in .mp4, got {video.name!r}")
    if seed < 0:
        raise SettingsError(f"seed must be 0 or more, got {seed}")
    if background is not None and background not in BACKGROUNDS:
        raise SettingsError(f"background must be one of {', '.join(BACKGROUNDS)}, got {background!r}")
    height, width = parse_size(size)
    if events is None and 4 <= seconds < 12:
        events = 1 + seed % (seconds // 4)  # a seed may draw three, for which so short a scene has no room
    try:
        scene = sample_scene(seed, seconds=seconds, events=events, background=background, held_out=held_out)
    except ValueError as reason:
        raise SettingsError(str(reason)) from None
    write_video(scene, video, height=height, width=width, fps=fps)
    return video, write_truth(scene, video.with_suffix(".json"))


def _frames(scene: Scene, height: int, width: int, fps: int) -> Iterator[VideoFrame]:
    """All frames of the scene in YUV; the same object again while nothing changes."""
    reformatter = VideoReformatter()
    moments = ((k, _look(scene, k / fps, k)) for k in range(scene.seconds * fps))
    shown: tuple[object, ...] | None = None
    frame: VideoFrame | None = None
    while chunk := list(islice(moments, _CHUNK)):
        looks = [look for _, look in chunk]
        fresh = [i for i, look in enumerate(looks) if look != (looks[i - 1] if i else shown)]
        pictures = iter(scene.draw([chunk[i][0] / fps for i in fresh], height=height, width=width) if fresh else ())
        for i, look in enumerate(looks):
            if i in fresh:
                frame = _to_yuv(next(pictures), reformatter)
            shown = look
            assert frame is not None
            yield frame


def _look(scene: Scene, second: float, k: int) -> tuple[object, ...]:
    """What a moment's picture depends on: equal looks are equal pictures."""
    if scene.noise or scene.shake:
        return (k,)
    time = np.asarray([second])
    seen = []
    for index, event in enumerate(scene.events):
        if event.visible(time)[0]:
            x, y = event.place(time)
            seen.append((index, float(x[0]), float(y[0])))
    return tuple(seen)


def _to_yuv(image: NDArray[np.uint8], reformatter: VideoReformatter) -> VideoFrame:
    frame = VideoFrame.from_ndarray(image, format="rgb24")
    yuv = reformatter.reformat(
        frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG, threads=1
    )
    return yuv


def _check_size(height: int, width: int) -> None:
    for name, side in (("width", width), ("height", height)):
        if not 32 <= side <= 4096:
            raise SettingsError(f"{name} must be 32 to 4096 pixels, got {side}")
        if side % 2:
            raise SettingsError(f"{name} must be even for H.264, got {side}; take {side - 1} or {side + 1}")


@contextmanager
def _whole_file(path: Path) -> Iterator[Path]:
    """A file beside ``path`` that takes its name once it is complete and is removed if it never is."""
    unfinished: Path | None = None
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        os.close(handle)
        unfinished = Path(name)
        yield unfinished
        umask = os.umask(0)
        os.umask(umask)
        unfinished.chmod(0o666 & ~umask)
        unfinished.replace(path)
    except OSError as reason:
        raise SourceError(f"{path} cannot be written: {reason.strerror or reason}") from None
    finally:
        if unfinished is not None:
            unfinished.unlink(missing_ok=True)
