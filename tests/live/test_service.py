"""The samples for a service are what the program takes."""

from __future__ import annotations

import configparser
import shlex
from pathlib import Path

from streamvid_cli.app import command
from streamvid_pipelines.live.settings import read_config

SAMPLES = Path(__file__).parents[2] / "samples/live"


def test_the_sample_configuration_is_taken() -> None:
    request, cameras = read_config(SAMPLES / "cameras.toml")
    request.check()
    assert request.disk_bytes == 200 * 10**9
    assert [camera.name for camera in cameras] == ["front", "yard"]
    assert cameras[0].rules[0].cool_down_seconds == 60
    assert cameras[1].patience.stall_seconds == 20


def test_the_unit_calls_options_that_exist() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read(SAMPLES / "streamvid.service")
    words = shlex.split(unit["Service"]["ExecStart"])
    assert words[1] == "live"
    known = {option for parameter in command("live").params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known
