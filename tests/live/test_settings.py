"""Settings of live watching: names, files, and what is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from streamvid.errors import SettingsError
from streamvid_pipelines.live.settings import CameraRequest, LiveRequest, read_config


@pytest.mark.parametrize(
    "text, name, source",
    [
        ("front=rtsp://192.0.2.7/stream1", "front", "rtsp://192.0.2.7/stream1"),
        (
            "rtsp://user:secret@192.0.2.7:554/stream1",
            "192.0.2.7-554-stream1",
            "rtsp://user:secret@192.0.2.7:554/stream1",
        ),
        ("camera:0", "camera 0", "camera:0"),
        ("http://example.org/a?b=c", "example.org-a", "http://example.org/a?b=c"),
        ("lavfi:testsrc=size=64x64", "lavfi-testsrc-size-64x64", "lavfi:testsrc=size=64x64"),
        ("gate.1=camera:1", "gate.1", "camera:1"),
    ],
)
def test_a_stream_has_a_name_without_credentials(text: str, name: str, source: str) -> None:
    camera = CameraRequest.parse(text)
    assert camera.source == source
    assert "secret" not in camera.name
    assert camera.name == name


@pytest.mark.parametrize("name", ["", "-front", "a/b", "x" * 65, "front:1", "ü"])
def test_names_that_would_not_do_as_files_are_refused(name: str) -> None:
    with pytest.raises(SettingsError, match="name"):
        CameraRequest(name, "camera:0")


CONFIG = """
memory = "/var/lib/streamvid"
fps = 1
disk = 12.5
overload = "latest"

[[camera]]
name = "front"
source = "rtsp://192.0.2.7/stream1"
stall_seconds = 5
give_up_after = 3600

[[camera.watch]]
what = "a person appears"
actions = ["jsonl alerts.jsonl"]

[[camera]]
source = "camera:0"
"""


def test_a_file_sets_cameras_and_everything(tmp_path: Path) -> None:
    path = tmp_path / "cameras.toml"
    path.write_text(CONFIG)
    request, cameras = read_config(path, LiveRequest(model="toy", fps=4))
    assert (request.model, request.fps, request.disk_bytes) == ("toy", 1.0, 12_500_000_000)
    assert request.folder == Path("/var/lib/streamvid")
    request.check()
    front, webcam = cameras
    assert (front.name, front.patience.stall_seconds, front.patience.give_up_after) == ("front", 5, 3600)
    assert [rule.what for rule in front.rules] == ["person"]
    assert (webcam.name, webcam.rules) == ("camera 0", ())


@pytest.mark.parametrize(
    "text, said",
    [
        ("fsp = 1", "did you mean fps"),
        ("fps = 'fast'", "fps must be a number"),
        ("[[camera]]\nname = 'a'", "no source"),
        ("[[camera]]\nsource = 'camera:0'\nstall = 3", "did you mean stall_seconds"),
        ("[[camera]]\nsource = 'camera:0'\nstall_seconds = 0", "stall_seconds must be above 0"),
        ("[[camera]]\nsource = 'camera:0'\nwatch = 'a dog'", "tables"),
        ("[camera]\nsource = 'camera:0'", r"\[\[camera\]\]"),
        ("[[camera]]\nsource = 7", "source must be a text"),
        ("fps = ", "not TOML"),
        ("disk = true", "disk must be a number"),
    ],
)
def test_slips_are_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "cameras.toml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=said):
        read_config(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="No such file"):
        read_config(tmp_path / "none.toml")


@pytest.mark.parametrize(
    "settings",
    [
        {"fps": 0},
        {"fps": 100},
        {"overload": "all of it"},
        {"clip_frames": 3},
        {"clip_frames": 32},
        {"before_seconds": -1},
        {"recall": "rlt"},
        {"reduce": "nothing of the kind"},
        {"codec": "sq7"},
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(settings: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        LiveRequest(**settings).check()  # type: ignore[arg-type]
