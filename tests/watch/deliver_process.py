"""Raises alerts and delivers them until killed: ``python -m tests.watch.deliver_process FOLDER FIRST``.

Prints the id of each alert once the queue has promised to keep it.
"""

from __future__ import annotations

import sys
import time
from fractions import Fraction
from pathlib import Path

from streamvid.watch.actions import Jsonl
from streamvid.watch.alerts import Alert, Alerts
from streamvid.watch.courier import Courier


def main() -> None:
    folder, number = Path(sys.argv[1]), int(sys.argv[2])
    with Alerts(folder) as queue, Courier(queue, [Jsonl(folder / "one.jsonl"), Jsonl(folder / "two.jsonl")]) as courier:
        print("ready", flush=True)
        while True:
            made = Alert(
                rule="r", stream="s", start=Fraction(number), stop=Fraction(number), wall=float(number), score=1.0,
                reason="seen",
            )  # fmt: skip
            print(queue.raise_(made), flush=True)
            courier.step(time.time())
            number += 1


if __name__ == "__main__":
    main()
