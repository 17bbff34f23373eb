"""Which recall policy makes most of a budget: every policy on the same memories of the toy world.

Long videos are rendered from seeds no training saw, watched once each with the bundled model, and
asked the same questions under every policy and budget; an answer counts only if it is exactly right.

``needle``    one event among distractors or in a still scene, asked for colour, way, time and presence:
              questions that point somewhere
``events``    a minute of several events, asked every kind of question, also those about all of it

``uniform`` and ``recent`` are the floors: evenly spaced spans and the last ones, at the same budget.  A
budget is a share of all tokens seen; "given" is what the policy made of it on average, the more sparing
the better at equal answers.  With ``--times`` also "what happens between A and B?", with the filter that
the words set and without it.  With ``--names`` the looking up of things by their names, as in "before the
red circle appears", in videos of their own: how many of those that are there are found, and how many with their
true times (half of both stretches is common); and how many of those that are not there are taken for
something: names that share neither colour nor shape with anything in the video, those that share one, and
shapes named without a colour.

Not measured: speed (all are a few milliseconds beside the prefill; ``attention`` adds prefills of its own,
and its seconds are given) and other worlds: the toy encoder tells colours and shapes apart far more
sharply than a real one tells scenes apart, which flatters every policy that goes by similarity.  A
model this small has hardly a reason to look at the right span before it answers, which wrongs ``attention``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from streamvid.memory.bank import Bank
from streamvid.query.evidence import clock
from streamvid.query.when import When
from streamvid.receipt import Receipt
from streamvid.recollection import Recollection
from streamvid.temporal.methods.base import Stage
from streamvid.temporal.methods.registry import methods
from streamvid.toy.questions import Question, ask_all, narrate
from streamvid.toy.video import write_video
from streamvid.toy.world import COLORS, SHAPES, Scene, needle_scene, sample_scene
from streamvid_pipelines.ask import AskVideo, Loaded, Request, load

FIRST_SEED = 700_000
TOKENS_A_SECOND = 16
"""Of the toy model at its own rate and a 128 x 128 picture."""


@dataclass
class Cell:
    """One policy at one budget."""

    right: int = 0
    asked: int = 0
    given: int = 0
    seen: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, float]:
        """Plain values."""
        return {
            "right": self.right,
            "asked": self.asked,
            "exact": round(self.right / max(1, self.asked), 4),
            "given_share": round(self.given / max(1, self.seen), 4),
            "seconds_a_question": round(self.seconds / max(1, self.asked), 4),
        }


def needle_questions(seed: int, seconds: int, distractors: str) -> tuple[Scene, list[Question]]:
    """A long video with one event that is asked about."""
    scene, event = needle_scene(seed, seconds=seconds, distractors=distractors)
    way = "it stays still" if event.action == "stays still" else event.action.removeprefix("moves ")
    article = "an" if event.name[0] in "aeiou" else "a"
    return scene, [
        Question(f"what color is the {event.shape}?", event.color, "color"),
        Question(f"which way does the {event.name} move?", way, "direction"),
        Question(f"when does the {event.name} appear?", f"{event.start_seconds} seconds", "when"),
        Question(f"is there {article} {event.name}?", "yes", "is_there"),
    ]


def timed_questions(scene: Scene) -> list[Question]:
    """One question for each event by its time, from a second before to a second after it."""
    return [
        Question(
            f"what happens between {clock(max(0, event.start_seconds - 1))} and {clock(event.end_seconds + 1)}?",
            narrate([event]),
            "between",
        )
        for event in scene.events
    ]


def videos(args: argparse.Namespace) -> Iterator[tuple[str, Scene, list[Question]]]:
    """Part, scene and questions of every video."""
    for seed in range(FIRST_SEED, FIRST_SEED + args.needles):
        for kind in ("static", "busy"):
            yield "needle", *needle_questions(seed, args.seconds, kind)
    for seed in range(FIRST_SEED, FIRST_SEED + args.events):
        scene = sample_scene(seed, seconds=64)
        yield "events", scene, ask_all(scene)


def found_names(args: argparse.Namespace, loaded: Loaded, folder: Path) -> dict[str, list[int]]:
    """By what kind of name: how many were looked up, found, and found with their true times."""
    if loaded.embedder is None:
        raise SystemExit("names are looked up with an image-text encoder and there is none")
    counts = {kind: [0, 0, 0] for kind in ("there", "shape there", "nothing alike", "something alike", "no such shape")}
    for seed in range(FIRST_SEED, FIRST_SEED + args.names):
        scene = sample_scene(seed, seconds=48)
        path = folder / f"names-{seed}.mp4"
        write_video(scene, path, height=128, width=128, fps=4)
        with Bank.open(folder / "names") as bank:
            AskVideo(path, Request(model="toy", reduce="none", threads=args.threads), loaded, bank).prepare()
            memory = Recollection(bank, bank.sources()[-1], Receipt(source=str(path), model="toy"))
            shown = scene.events
            for name in (*SHAPES, *(f"{color} {shape}" for color in COLORS for shape in SHAPES)):
                color, _, shape = name.rpartition(" ")
                meant = [e for e in shown if e.shape == shape and color in ("", e.color)]
                alike = any(color == e.color or shape == e.shape for e in shown)
                if meant:
                    kind = "there" if color else "shape there"
                else:
                    kind = ("something alike" if alike else "nothing alike") if color else "no such shape"
                if len(meant) > 1:
                    continue
                found = memory.find(f"the {name}", loaded.embedder)
                counts[kind][0] += 1
                counts[kind][1] += found is not None
                if found is not None and meant:
                    start, stop = meant[0].start_seconds, meant[0].end_seconds
                    common = min(found[1], stop) - max(found[0], start)
                    counts[kind][2] += 2 * common >= max(found[1], stop) - min(found[0], start)
        print(f"names {seed}: {time.process_time():.0f} s of CPU", file=sys.stderr, flush=True)
    return counts


def asked(video: AskVideo, question: str, *, filtered: bool = True) -> tuple[str, int, float]:
    """Answer, tokens given and seconds; without the filter the words about time are left to the model."""
    if not filtered:
        video.session._when = lambda *_: When()  # type: ignore[method-assign]
    began = time.perf_counter()
    answer = video.ask(question)
    return answer.text, answer.receipt.tokens_given, time.perf_counter() - began


def run(args: argparse.Namespace, loaded: Loaded, folder: Path) -> dict[str, dict[str, Cell]]:
    """Cells by part and then by ``policy@share``."""
    cells: dict[str, dict[str, Cell]] = defaultdict(lambda: defaultdict(Cell))
    for number, (part, scene, questions) in enumerate(videos(args)):
        path = folder / f"{number}.mp4"
        write_video(scene, path, height=128, width=128, fps=4)
        seen = scene.seconds * TOKENS_A_SECOND
        base = Request(model="toy", reduce=args.reduce, threads=args.threads)
        with Bank.open(folder / "memory") as bank:
            for share in args.budgets:
                for policy in args.policies:
                    request = replace(base, recall=policy, budget=max(1, round(seen * share)))
                    video = AskVideo(path, request, loaded, bank)
                    video.prepare()
                    for item in questions:
                        text, given, seconds = asked(video, item.question)
                        note(cells[part][f"{policy}@{share}"], text == item.answer, given, seen, seconds)
            if args.times and part == "events":
                for filtered in (True, False):
                    request = replace(base, budget=max(1, round(seen * args.budgets[0])))
                    video = AskVideo(path, request, loaded, bank)
                    video.prepare()
                    for item in timed_questions(scene):
                        text, given, seconds = asked(video, item.question, filtered=filtered)
                        name = "filtered" if filtered else "not filtered"
                        note(cells["times"][name], text == item.answer, given, seen, seconds)
        print(f"{part} {number}: {time.process_time():.0f} s of CPU", file=sys.stderr, flush=True)
    return cells


def note(cell: Cell, right: bool, given: int, seen: int, seconds: float) -> None:
    """Count one answer."""
    cell.right += right
    cell.asked += 1
    cell.given += given
    cell.seen += seen
    cell.seconds += seconds


def table(cells: dict[str, Cell], policies: list[str], budgets: list[float]) -> str:
    """Policies down, budgets across: right answers and, behind them, the share of the tokens given."""
    head = "| policy | " + " | ".join(f"budget {share:.0%}" for share in budgets) + " | s a question |"
    rows = [head, "|---|" + "---:|" * (len(budgets) + 1)]
    for policy in policies:
        line = [cells[f"{policy}@{share}"] for share in budgets]
        shown = [f"{c.right / max(1, c.asked):.0%} ({c.given / max(1, c.seen):.1%})" for c in line]
        seconds = sum(c.seconds for c in line) / max(1, sum(c.asked for c in line))
        rows.append(f"| `{policy}` | " + " | ".join(shown) + f" | {seconds:.2f} |")
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--needles", type=int, default=4, help="long videos of each kind, still and busy")
    parser.add_argument("--seconds", type=int, default=300, help="length of the long videos")
    parser.add_argument("--events", type=int, default=5, help="videos of a minute with several events")
    parser.add_argument("--names", type=int, default=36, help="videos of 48 s in which things are looked up")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.02, 0.05, 0.15], help="shares of the tokens")
    parser.add_argument("--policies", nargs="+", default=None, help="recall methods with settings; all by default")
    parser.add_argument("--reduce", default="none", help="the chain the memories are made with")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--times", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if args.policies is None:
        args.policies = [name for name, cls in methods().items() if cls.stage is Stage.MEMORY]
    began = time.time()
    loaded = load(Request(model="toy", threads=args.threads), lambda text: print(text, file=sys.stderr))
    with tempfile.TemporaryDirectory() as name:
        cells = run(args, loaded, Path(name))
        names = found_names(args, loaded, Path(name)) if args.names else {}
    for part in ("needle", "events"):
        if cells[part]:
            count = next(iter(cells[part].values())).asked
            print(f"\n{part}: {count} questions a cell; right answers (share of all tokens given)\n")
            print(table(cells[part], args.policies, args.budgets))
    if cells["times"]:
        print("\n| what happens between A and B? | right | tokens given |\n|---|---:|---:|")
        for name, cell in cells["times"].items():
            print(f"| {name} | {cell.right} of {cell.asked} | {cell.given / max(1, cell.seen):.1%} |")
    if names:
        print("\n| name | looked up | found | with its times |\n|---|---:|---:|---:|")
        for kind, (count, hits, right) in names.items():
            share = f" ({hits / max(1, count):.1%})"
            print(f"| {kind} | {count} | {hits}{share} | {right if 'there' in kind else ''} |")
    report = {
        "model": loaded.adapter.info.fingerprint,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} thread",
        "seconds": round(time.time() - began),
        "names": names,
        "cells": {part: {name: cell.to_dict() for name, cell in found.items()} for part, found in cells.items()},
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
