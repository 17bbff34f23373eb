"""Watches a live source for a test that cannot do it itself: ``python -m tests.ingest.watching URL SECONDS``.

Prints one JSON object: what was given and how long nothing was.
"""

from __future__ import annotations

import json
import sys
import time

from streamvid.frames import Frame
from streamvid.ingest import Gap, Notice, Patience, Supervised
from tests.ingest.synthetic import number


def main(address: str, seconds: float) -> None:
    """Watch."""
    told: dict[str, list[object]] = {"frames": [], "gaps": [], "notices": []}
    patience = Patience(stall_seconds=5, first_delay=0.1, longest_delay=0.3)
    with Supervised(address, patience=patience) as watched:
        begun, end, quiet, last = time.monotonic(), 0.0, 0.0, 0.0
        for item in watched:
            now = time.monotonic()
            if isinstance(item, Frame):
                end = end or now + seconds
                quiet = max(quiet, now - last) if last else quiet
                last = now
                told["frames"].append([float(item.pts), float(item.duration), number(item.pixels)])
            elif isinstance(item, Gap):
                told["gaps"].append([float(item.start), float(item.stop), item.reason])
            elif isinstance(item, Notice) and item.kind != "alive":
                told["notices"].append([item.kind, item.text])
            if (end and now > end) or now - begun > seconds + 30:
                break
        sums = {"connects": watched.connects, "damaged": watched.damaged, "dropped": watched.dropped, "quiet": quiet}
    print(json.dumps({**told, **sums, "accuracy": watched.accuracy_seconds}))


if __name__ == "__main__":
    main(sys.argv[1], float(sys.argv[2]))
