"""Alerts through 100 kills: each arrives, and duplicates can be told."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from streamvid.watch.actions import Jsonl
from streamvid.watch.alerts import Alerts
from streamvid.watch.courier import Courier

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_through_100_kills_every_promised_alert_arrives(tmp_path: Path) -> None:
    rng = random.Random(5)
    promised: list[str] = []
    for attempt in range(100):
        command = [sys.executable, "-m", "tests.watch.deliver_process", str(tmp_path), str(attempt * 10_000)]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0, 0.06))
            process.kill()
            promised += [line.strip() for line in process.stdout if line.endswith("\n")]
    files = [tmp_path / "one.jsonl", tmp_path / "two.jsonl"]
    with Alerts(tmp_path) as queue:
        interrupted = queue.counts()["waiting"]
        with Courier(queue, [Jsonl(file) for file in files]) as courier:
            while courier.step(time.time()):
                pass
        counts = queue.counts()
    assert len(promised) > 100
    assert interrupted > 0  # or no kill came between raising and delivering
    assert counts["waiting"] == counts["expired"] == counts["failed"] == 0
    for file in files:
        seen = Counter(json.loads(line)["id"] for line in file.read_text().splitlines())
        assert set(promised) <= set(seen)
        assert len(seen) == counts["done"]
        assert seen.total() - len(seen) <= 100  # a kill repeats the one delivery it fell into, no more
