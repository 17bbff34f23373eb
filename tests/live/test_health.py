"""Health is told truly, to this machine alone, and never in halves."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from streamvid.errors import SettingsError
from streamvid_pipelines.live import health as module
from streamvid_pipelines.live.health import Health, troubles

FINE = {"stream": "front", "away": None, "failure": None, "lag_seconds": 1.0}


def status(**stream: Any) -> dict[str, Any]:
    return {"running": True, "streams": [{**FINE, **stream}]}


def get(health: Health) -> tuple[int, dict[str, Any]]:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{health.port}/", timeout=5) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as reply:
        with reply:
            return reply.code, json.load(reply)


@pytest.mark.parametrize(
    "now, said",
    [
        (status(), []),
        (status(away="no route"), ["front is away: no route"]),
        (status(lag_seconds=90.0), ["front lies 90 s behind"]),
        (status(failure="wrong password", away="x"), ["front ended: wrong password"]),
        ({"running": False, "streams": []}, ["not running"]),
    ],
)
def test_what_is_wrong_is_said(now: dict[str, Any], said: list[str]) -> None:
    assert troubles(now) == said


def test_http_tells_200_or_503() -> None:
    now = status()
    with Health("127.0.0.1:0", lambda: now) as health:
        assert get(health)[0] == 200
        now["streams"][0]["away"] = "no route"
        code, told = get(health)
        assert code == 503 and not told["healthy"] and told["troubles"] == ["front is away: no route"]
        with pytest.raises(SettingsError, match="choose another port"):
            Health(f"127.0.0.1:{health.port}", status)


def test_a_file_is_kept_up_to_date(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILE_SECONDS", 0.01)
    now = status()
    path = tmp_path / "health.json"
    with Health(str(path), lambda: now):
        assert json.loads(path.read_text())["healthy"]
        now["streams"][0]["away"] = "no route"
        until = time.monotonic() + 30
        while json.loads(path.read_text())["healthy"]:
            assert time.monotonic() < until, "the file was not written again"
        now["running"] = False
    assert "not running" in json.loads(path.read_text())["troubles"]
    assert [p.name for p in tmp_path.iterdir()] == ["health.json"]


@pytest.mark.parametrize("where", ["0.0.0.0:8080", "192.0.2.1:80", "/nowhere/at/all/health.json"])
def test_other_places_are_refused(where: str) -> None:
    with pytest.raises(SettingsError, match="this machine only|cannot write health"):
        Health(where, status)
