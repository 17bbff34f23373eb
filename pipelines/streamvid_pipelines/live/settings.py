"""What can be set about watching live: on the command line, or in a TOML file.

::

    memory = "/var/lib/streamvid"
    fps = 1
    disk = 50                       # GB

    [[camera]]
    name = "front"
    source = "rtsp://192.0.2.7/stream1"

    [[camera.watch]]
    what = "a person appears"
    actions = ["webhook https://example.org/hook"]
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from streamvid.budget import Limits
from streamvid.errors import SettingsError, near
from streamvid.ingest.files import label
from streamvid.ingest.ring import KEEP_BYTES, KEEP_SECONDS
from streamvid.ingest.supervised import Patience
from streamvid.memory.codec import DEFAULT_CODEC, CodecSetting
from streamvid.memory.place import default_folder
from streamvid.temporal.methods.base import MemoryMethod, Stage
from streamvid.temporal.methods.compose import DEFAULT, Chain
from streamvid.temporal.methods.registry import build
from streamvid.watch.rules import Rule
from streamvid_pipelines.live.feed import Overload

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._ -]{0,63}")
_NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]{0,63})=(.+)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class CameraRequest:
    """One stream."""

    name: str
    """What it is called in memory, questions and alerts; the same name goes on with the same memory."""

    source: str
    """rtsp://, rtsps://, http(s)://, camera:0, lavfi:GRAPH, or a file that stands in for a camera."""

    patience: Patience = field(default_factory=Patience)
    rules: tuple[Rule, ...] = ()
    loop: bool = False
    """Whether a file begins again at its end."""

    record: bool = False
    """Whether its own packets are kept beside the memory: see docs/recording.md."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise SettingsError(
                f"a stream's name is letters, digits, spaces and ._- (64 at most), got {self.name!r}; "
                "name it yourself, as in front=rtsp://..."
            )

    @classmethod
    def parse(cls, text: str, **settings: Any) -> Self:
        """``NAME=SOURCE``, or a source, which is then called after its address without credentials."""
        named = _NAMED.fullmatch(text)
        if named and "://" not in named[1]:
            return cls(named[1], named[2], **settings)
        clean = re.sub(r"^[a-z]+://|^camera:", lambda m: "camera " if m[0] == "camera:" else "", label(text))
        name = re.sub(r"[^A-Za-z0-9._ -]+", "-", clean).strip("-. ")[:64]
        return cls(name or "stream", text, **settings)


@dataclass(frozen=True, slots=True)
class LiveRequest:
    """What holds for all streams; defaults suit a few cameras and one machine."""

    model: str = "auto"
    embedder: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    toy_allowed: bool = True
    fps: float | None = None
    reduce: str = DEFAULT
    recall: str = "hybrid"
    budget: int = Limits().answer_tokens
    max_new_tokens: int = 256
    memory: Path | None = None
    disk_bytes: int | None = 50 * 10**9
    """A camera never ends, so there is a limit unless None is asked for."""

    source_bytes: int | None = None
    keep_seconds: float | None = None
    ram_bytes: int | None = None
    vram_bytes: int | None = None
    codec: str = DEFAULT_CODEC
    overload: str = Overload.ADAPTIVE.value
    clip_frames: int = 8
    """Frames watched together: fewer are remembered sooner, more cost less each."""

    buffer_frames: int = 32
    buffer_megabytes: int = 256
    detail_frames: int = 64
    """A picture has as many tokens as one of so many frames of a film would have."""

    before_seconds: float = 10.0
    """How much of the past the clip of an alert shows."""

    after_seconds: float = 5.0
    """How much it shows of what came then; an alert is delivered when its clip is complete."""

    record_keep_seconds: float | None = KEEP_SECONDS
    """Age at which recorded packets are given up."""

    record_bytes: int | None = KEEP_BYTES
    """Most that recorded packets of one stream take."""

    alert_bytes: int = 10**9
    """What pictures and clips of all alerts may take; the oldest are deleted."""

    looks_a_minute: int = 20
    """How often a minute the model is asked about candidates of a stream's rules, at most."""

    decoder: str = "auto"
    hwaccel: str | None = None
    decode_threads: int | None = None
    threads: int | None = None

    def check(self) -> None:
        """Raise SettingsError for what can be seen to be wrong before anything is loaded."""
        Chain.parse(self.reduce)
        CodecSetting.parse(self.codec)
        self.recall_method()
        self.limits()
        if self.fps is not None and not 0 < self.fps <= 60:
            raise SettingsError(f"fps must be above 0 and at most 60, got {self.fps:g}; 1 is usual for cameras")
        if self.overload not in tuple(Overload):
            raise SettingsError(f"unknown overload policy {self.overload!r}; {near(self.overload, tuple(Overload))}")
        if self.clip_frames < 2 or self.clip_frames % 2:
            raise SettingsError(f"clip_frames must be even and at least 2, got {self.clip_frames}")
        if self.buffer_frames < 2 * self.clip_frames:
            raise SettingsError(
                f"a buffer of {self.buffer_frames} frames is too small for clips of {self.clip_frames}: "
                f"it holds one while another is filled; at least {2 * self.clip_frames}"
            )
        for name, low, high in (("before_seconds", 0, 60), ("after_seconds", 0, 30)):
            if not low <= getattr(self, name) <= high:
                raise SettingsError(f"{name} must be from {low} to {high}, got {getattr(self, name):g}")
        if self.looks_a_minute < 1:
            raise SettingsError(f"looks_a_minute must be at least 1, got {self.looks_a_minute}")

    @property
    def folder(self) -> Path:
        """Of the memory."""
        return self.memory if self.memory is not None else default_folder()

    def limits(self) -> Limits:
        """The hard limits."""
        return Limits(
            answer_tokens=self.budget,
            disk_bytes=self.disk_bytes,
            source_bytes=self.source_bytes,
            ram_bytes=self.ram_bytes,
            vram_bytes=self.vram_bytes,
            keep_seconds=self.keep_seconds,
        )

    def recall_method(self) -> MemoryMethod:
        """A fresh recall method; raises SettingsError if the name is not one."""
        method = build(self.recall)
        if not isinstance(method, MemoryMethod) or method.stage is not Stage.MEMORY:
            raise SettingsError(f"{self.recall} does not recall; it belongs into --reduce")
        return method


_GIGABYTES = {
    "alert_disk": "alert_bytes",
    "record_disk": "record_bytes",
    "disk": "disk_bytes",
    "source_disk": "source_bytes",
    "ram": "ram_bytes",
    "vram": "vram_bytes",
}
_PATIENCE = tuple(f.name for f in fields(Patience))


def read_config(path: Path, request: LiveRequest | None = None) -> tuple[LiveRequest, list[CameraRequest]]:
    """A configuration file; what it sets goes over ``request``.

    Raises:
        SettingsError: if it cannot be read, or holds an unknown name or an impossible value.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not TOML: {error}") from error
    cameras = table.pop("camera", [])
    known = {f.name for f in fields(LiveRequest)} - set(_GIGABYTES.values()) | set(_GIGABYTES)
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in known:
            raise SettingsError(f"{path}: there is no setting {name!r}; {near(name, [*known, 'camera'])}")
        if name in _GIGABYTES:
            number = _checked(path, name, value, float)
            values[_GIGABYTES[name]] = int(number * 1e9)
        else:
            values[name] = Path(value).expanduser() if name == "memory" else _checked(path, name, value, _kind(name))
    if not isinstance(cameras, list) or not all(isinstance(camera, dict) for camera in cameras):
        raise SettingsError(f"{path}: cameras are tables, each under its own [[camera]]")
    return replace(request or LiveRequest(), **values), [_camera(path, camera) for camera in cameras]


def _camera(path: Path, table: Mapping[str, Any]) -> CameraRequest:
    known = ("name", "source", "loop", "record", "watch", *_PATIENCE)
    for name in table:
        if name not in known:
            raise SettingsError(f"{path}: a camera has no {name!r}; {near(name, known)}")
    if "source" not in table:
        raise SettingsError(f"{path}: a camera has no source; write source = 'rtsp://...'")
    source = _checked(path, "source", table["source"], str)
    patience = Patience(**{name: table[name] for name in _PATIENCE if name in table})
    watch = table.get("watch", [])
    if not isinstance(watch, Sequence) or isinstance(watch, str):
        raise SettingsError(f"{path}: what is watched for are tables, each under its own [[camera.watch]]")
    settings: dict[str, Any] = {
        "patience": patience,
        "rules": tuple(Rule.parse(rule) for rule in watch),
        "loop": _checked(path, "loop", table.get("loop", False), bool),
        "record": _checked(path, "record", table.get("record", False), bool),
    }
    if "name" in table:
        return CameraRequest(_checked(path, "name", table["name"], str), source, **settings)
    return CameraRequest.parse(source, **settings)


def _kind(name: str) -> type:
    default = getattr(LiveRequest(), name)
    if name in ("fps", "keep_seconds", "before_seconds", "after_seconds", "record_keep_seconds"):
        return float
    if name in ("decode_threads", "threads"):
        return int
    return str if default is None else type(default)


def _checked(path: Path, name: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
        raise SettingsError(f"{path}: {name} must be {words[kind]}, got {value!r}")
    return value
