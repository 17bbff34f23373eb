"""``python -m tests.goldens [DIR] [--json]``: a row for every case; exit code 1 if any differs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import torch

from tests.goldens import HERE, Outcome, run


def main(arguments: list[str] | None = None) -> int:
    """Run the cases of a folder and print what became of them."""
    parser = argparse.ArgumentParser(prog="python -m tests.goldens", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=HERE, help="holds <method id>/*.npz; ours by default")
    parser.add_argument("--json", action="store_true", help="end with one line that holds everything as JSON")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"there is no folder {options.folder}")
    torch.set_num_threads(1)
    outcomes: list[Outcome] = []
    for outcome in run(options.folder):
        outcomes.append(outcome)
        if outcome.ok is not None:  # cases of methods that do not exist here are only counted
            word = "ok" if outcome.ok else "DIFFERS"
            print(f"{outcome.method:<16} {outcome.case:<32} {word:<8} {outcome.detail}".rstrip(), flush=True)
    counts = {
        "passed": sum(o.ok is True for o in outcomes),
        "failed": sum(o.ok is False for o in outcomes),
        "skipped": sum(o.ok is None for o in outcomes),
    }
    print(", ".join(f"{number} {name}" for name, number in counts.items()))
    if not outcomes:
        print(f"{options.folder} holds no cases; expected <method id>/*.npz", file=sys.stderr)
    if options.json:
        print(json.dumps({"cases": [dataclasses.asdict(o) for o in outcomes if o.ok is not None], **counts}))
    return 1 if counts["failed"] or not outcomes else 0


if __name__ == "__main__":
    sys.exit(main())
