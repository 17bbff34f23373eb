"""Measures the toy model through the whole program: ``python -m streamvid_pipelines.measure_toy``.

Every clip is rendered as H.264 from a seed the model was never trained on, watched, remembered
and asked through the same path a user takes; an answer counts only if it is exactly right.
Three parts: all question kinds at keep-all and with the default chain at a quarter of the
tokens; colour-shape pairs that were held out of training; and a needle event in ten minutes of
static or distracting scenes at a budget of 5 % of the tokens, beside uniform and recent at the
same budget.  The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from streamvid.memory.bank import Bank
from streamvid.toy.questions import KINDS, Question, ask_all
from streamvid.toy.video import parse_size, write_video
from streamvid.toy.world import Scene, needle_scene, sample_scene
from streamvid_pipelines.ask import AskVideo, Loaded, Request, load

FIRST_SEED = 500_000
"""Evaluation seeds start here; training seeds start at a million, tests and samples use small ones."""

QUARTER = "rlt,fastvid:keep_ratio=0.25"


@dataclass
class Score:
    """Right answers by question kind."""

    right: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    asked: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    tokens_seen: int = 0
    tokens_remembered: int = 0
    tokens_given: int = 0
    cited: int = 0
    citable: int = 0
    wrong: list[tuple[int, str, str, str]] = field(default_factory=list)

    def note(self, seed: int, item: Question, answer: str, spans: Sequence[tuple[float, float]]) -> None:
        """Count one answer, and whether its citation touches the evidence."""
        self.asked[item.kind] += 1
        if answer == item.answer:
            self.right[item.kind] += 1
            if item.spans:
                self.citable += 1
                self.cited += any(a < stop and start < b for a, b in spans for start, stop in item.spans)
        else:
            self.wrong.append((seed, item.question, item.answer, answer))

    def share(self, kind: str | None = None) -> float:
        """Exact answers, of one kind or of all."""
        if kind is not None:
            return self.right[kind] / self.asked[kind] if self.asked[kind] else float("nan")
        return sum(self.right.values()) / max(1, sum(self.asked.values()))

    def to_dict(self) -> dict[str, object]:
        """Plain values."""
        return {
            "exact": round(self.share(), 4),
            "questions": sum(self.asked.values()),
            "kinds": {kind: round(self.share(kind), 4) for kind in KINDS if self.asked[kind]},
            "tokens_kept": round(self.tokens_remembered / max(1, self.tokens_seen), 4),
            "tokens_given": round(self.tokens_given / max(1, self.tokens_seen), 4),
            "citations_that_touch_the_evidence": round(self.cited / max(1, self.citable), 4),
        }


def run(
    scenes: Iterable[tuple[Scene, list[Question]]],
    request: Request,
    loaded: Loaded,
    folder: Path,
    *,
    size: int,
    fps: int,
) -> Score:
    """Render, watch and ask every scene."""
    score = Score()
    for scene, questions in scenes:
        path = folder / f"{scene.seed}-{scene.seconds}-{size}.mp4"
        if not path.exists():
            height, width = parse_size(size)
            write_video(scene, path, height=height, width=width, fps=fps)
        with Bank.open(folder / f"memory-{abs(hash(request))}") as bank:
            video = AskVideo(path, request, loaded, bank)
            video.prepare()
            for item in questions:
                answer = video.ask(item.question)
                score.note(scene.seed, item, answer.text, answer.spans)
            score.tokens_seen += answer.receipt.tokens_seen
            score.tokens_remembered += answer.receipt.tokens_remembered
            score.tokens_given += answer.receipt.tokens_given
            assert video.source is not None
            bank.remove(video.source)
    return score


def needle(
    seeds: Sequence[int], kind: str, recall: str, loaded: Loaded, folder: Path, request: Request, seconds: int
) -> Score:
    """One event in a long video, asked at 5 % of its tokens."""
    score = Score()
    for seed in seeds:
        scene, event = needle_scene(seed, seconds=seconds, distractors=kind)
        path = folder / f"needle-{kind}-{seed}-{seconds}.mp4"
        if not path.exists():
            write_video(scene, path, height=128, width=128, fps=4)
        span = ((event.start_seconds, event.end_seconds),)
        way = "it stays still" if event.action == "stays still" else event.action.removeprefix("moves ")
        questions = [
            Question(f"what color is the {event.shape}?", event.color, "color", span),
            Question(f"which way does the {event.name} move?", way, "direction", span),
            Question(f"when does the {event.name} appear?", f"{event.start_seconds} seconds", "when", span),
            Question(f"is there a {event.name}?".replace("a orange", "an orange"), "yes", "is_there", span),
        ]
        tokens = seconds * 16
        asked = replace(request, recall=recall, budget=max(1, tokens // 20))
        with Bank.open(folder / f"memory-{kind}") as bank:
            video = AskVideo(path, asked, loaded, bank)
            video.prepare()
            for item in questions:
                answer = video.ask(item.question)
                score.note(seed, item, answer.text, answer.spans)
            score.tokens_seen += answer.receipt.tokens_seen
            score.tokens_remembered += answer.receipt.tokens_remembered
            score.tokens_given += answer.receipt.tokens_given
    return score


def asked_scenes(seeds: Iterable[int], *, held_out: bool, seconds: int = 16) -> Iterable[tuple[Scene, list[Question]]]:
    """Scenes of the given seeds with every question that has one right answer."""
    for seed in seeds:
        scene = sample_scene(seed, seconds=seconds, held_out=held_out)
        yield scene, ask_all(scene)


def table(columns: dict[str, Score]) -> str:
    """A Markdown table, question kinds down, runs across."""
    head = "| question kind | " + " | ".join(columns) + " |\n|---|" + "---:|" * len(columns)
    rows = [head]
    for kind in KINDS:
        cells = [f"{score.share(kind) * 100:.1f} %" if score.asked[kind] else "-" for score in columns.values()]
        rows.append(f"| {kind} | " + " | ".join(cells) + " |")
    rows.append("| **all** | " + " | ".join(f"**{s.share() * 100:.1f} %**" for s in columns.values()) + " |")
    rows.append(
        "| tokens given, of all | "
        + " | ".join(f"{s.tokens_given / max(1, s.tokens_seen) * 100:.1f} %" for s in columns.values())
        + " |"
    )
    return "\n".join(rows)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=300, help="clips of 16 s, held-out pairs get a third of that")
    parser.add_argument("--seconds", type=int, default=16, help="length of the clips")
    parser.add_argument("--needles", type=int, default=10, help="long videos of each kind; 0 leaves them out")
    parser.add_argument("--minutes", type=int, default=10, help="length of the long videos")
    parser.add_argument("--model", default="toy")
    parser.add_argument("--parts", default="all,quarter,held-out,needle")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--size", default="128", help="of the clips, as in 128 or 160x120")
    parser.add_argument("--wrong", type=int, default=0, help="print this many wrong answers of each part")
    args = parser.parse_args()
    parts = args.parts.split(",")
    request = Request(model=args.model, reduce="none", threads=args.threads)
    loaded = load(request, lambda text: print(text, file=sys.stderr))
    report: dict[str, object] = {"model": loaded.adapter.info.fingerprint, "clips": args.clips}
    began = time.time()
    columns: dict[str, Score] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seeds = range(FIRST_SEED, FIRST_SEED + args.clips)
        jobs = {
            "all": ("keep all", request, seeds, False),
            "quarter": ("rlt, fastvid at 25 %", replace(request, reduce=QUARTER), seeds, False),
            "held-out": (
                "held-out pairs, keep all",
                request,
                range(FIRST_SEED, FIRST_SEED + max(1, args.clips // 3)),
                True,
            ),
        }
        for part, (title, asked, chosen, held_out) in jobs.items():
            if part in parts:
                scenes = asked_scenes(chosen, held_out=held_out, seconds=args.seconds)
                columns[title] = run(scenes, asked, loaded, folder, size=args.size, fps=10)
                report[part] = columns[title].to_dict()
                print(f"{title}: {columns[title].share():.3f} after {time.time() - began:.0f} s", file=sys.stderr)
                for wrong in columns[title].wrong[: args.wrong]:
                    print("  ", wrong, file=sys.stderr)
        print(table(columns))
        if "needle" in parts and args.needles:
            found: dict[str, dict[str, object]] = {}
            print("\n| needle in 10 minutes, 5 % of the tokens | hybrid | uniform | recent |\n|---|---:|---:|---:|")
            for kind in ("static", "busy"):
                cells = []
                for recall in ("hybrid", "uniform", "recent"):
                    asked = replace(request, reduce=request.reduce if recall != "hybrid" else Request().reduce)
                    score = needle(
                        range(FIRST_SEED, FIRST_SEED + args.needles),
                        kind,
                        recall,
                        loaded,
                        folder,
                        asked,
                        args.minutes * 60,
                    )
                    found[f"{kind}/{recall}"] = score.to_dict()
                    cells.append(f"{score.share() * 100:.1f} %")
                    for wrong in score.wrong[: args.wrong]:
                        print("  ", kind, recall, wrong, file=sys.stderr)
                print(f"| {kind} | " + " | ".join(cells) + " |", flush=True)
            report["needle"] = found
    report["seconds"] = round(time.time() - began)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
