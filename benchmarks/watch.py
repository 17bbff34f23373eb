"""What a standing question finds and how often it is wrong, on toy streams whose events are known.

Streams of ``--minutes``: ``camera`` is one background over which a shape comes and goes every 12 s on average;
``cuts`` another background every 15 s.  Every colour-shape pair is a rule, so each stream serves ``--rules`` rules:
what is an event to one is a distractor to the others, and false alarms are counted per hour that a rule watched.
A tenth of the pairs were held out of the encoder's training and are counted apart.

``fixed``     the plain thing: similarity of the picture to the rule's sentence above one number.  The ladder shows
              what each number gives; which is right is known in hindsight only and differs between encoders.
              ``asked`` takes the question "is there a red circle?", a wording the encoder was trained on
``trigger``   `Trigger` alone, at several sensitivities; ``unlike`` gives each rule the other shapes of its colour
``judged``    the trigger with a second stage that never errs: what is lost before the model is asked
``whole``     with ``--real``: streams as H.264 files through the whole program, memory and toy model included; 2 fps,
              one background of each kind.  ``lost`` tells where missed events were lost: the trigger never named
              them, or the model refused them.  The language model never saw the held-out pairs either

A hit counts if it lies within an event or a second after it; each event once.  Delay is from the beginning of the
event to the picture that decided.  ``leaves`` is the same for the end of events.  Real encoders and real pictures
are not measured here.  The last line is one JSON object.

::

    python benchmarks/watch.py --minutes 60 --real
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from streamvid.models.embedder import Embedder
from streamvid.temporal.methods.compose import DEFAULT
from streamvid.toy.video import write_video
from streamvid.toy.world import COLORS, HELD_OUT_PAIRS, SHAPES, Scene, sample_scene
from streamvid.watch.rules import Rule, When, with_article
from streamvid.watch.trigger import Candidate, Trigger
from streamvid.watch.truth import Known, Verdict, expected, match
from streamvid_pipelines.ask import Loaded, Request, load
from streamvid_pipelines.live.settings import LiveRequest
from streamvid_pipelines.watch_replay import Replayed, replay

FIRST_SEED = 700_000
SIDE = 96
CUT_SECONDS = 15
CHANGED_LEVELS = 12
LATE = Fraction(1)
FIXED = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)


@dataclass
class Stream:
    """Pictures at a fixed rate as vectors, and what is known of them."""

    name: str
    keys: Tensor  # (F, Dk)
    kept: list[float]
    times: list[Fraction]
    scenes: list[tuple[int, Scene]]
    """Each with the second it begins at."""

    @property
    def events(self) -> list[Known]:
        """All of all scenes, by name."""
        return [
            Known(Fraction(first + e.start_seconds), Fraction(first + e.end_seconds), e.name)
            for first, scene in self.scenes
            for e in scene.events
        ]


@dataclass
class Tally:
    """Over all rules and streams of one way to watch."""

    hits: int = 0
    events: int = 0
    false: int = 0
    rule_hours: float = 0.0
    held_out: list[int] = field(default_factory=lambda: [0, 0])
    """Hits and events among the pairs the encoder never saw."""

    delays: list[float] = field(default_factory=list)
    candidates: list[tuple[int, str, Candidate, bool]] = field(default_factory=list)
    """Stream, name, candidate and whether it is true, where they were kept."""

    def add(self, verdict: Verdict, name: str, hours: float) -> None:
        """One rule over one stream."""
        hits, events = len(verdict.matched), len(verdict.matched) + len(verdict.missed)
        self.hits, self.events, self.false = self.hits + hits, self.events + events, self.false + len(verdict.false)
        self.rule_hours += hours
        self.delays += verdict.delays_seconds
        if tuple(name.split()) in HELD_OUT_PAIRS:
            self.held_out[0] += hits
            self.held_out[1] += events

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        seen_hits, seen_events = self.hits - self.held_out[0], self.events - self.held_out[1]
        delays = sorted(self.delays) or [float("nan")]
        return {
            "recall": round(self.hits / max(1, self.events), 4),
            "recall_of_pairs_the_encoder_saw": round(seen_hits / max(1, seen_events), 4),
            "recall_of_held_out_pairs": round(self.held_out[0] / max(1, self.held_out[1]), 4),
            "precision": round(self.hits / max(1, self.hits + self.false), 4),
            "false_alarms_per_hour": round(self.false / self.rule_hours, 3),
            "candidates_per_hour": round((self.hits + self.false) / self.rule_hours, 2),
            "delay_seconds_median": round(statistics.median(delays), 2),
            "delay_seconds_95": round(delays[int(0.95 * (len(delays) - 1))], 2),
            "events": self.events,
            "rule_hours": round(self.rule_hours, 2),
        }


def camera(seed: int, seconds: int, background: str) -> list[tuple[int, Scene]]:
    """One background, an event every 12 s on average."""
    return [(0, sample_scene(seed, seconds=seconds, events=seconds // 12, background=background))]


def cuts(seed: int, seconds: int) -> list[tuple[int, Scene]]:
    """Another scene every 15 s, with one to three events each."""
    return [(t, sample_scene(seed + t, seconds=CUT_SECONDS)) for t in range(0, seconds - CUT_SECONDS + 1, CUT_SECONDS)]


def embed(name: str, scenes: list[tuple[int, Scene]], embedder: Embedder, fps: int) -> Stream:
    """Draw and embed a stream; pictures lie in the middle of their intervals, as sampled ones do."""
    keys, kept, times = [], list[float](), list[Fraction]()
    before: Tensor | None = None
    for first, scene in scenes:
        local = [Fraction(2 * i + 1, 2 * fps) for i in range(scene.seconds * fps)]
        times += [first + t for t in local]
        for i in range(0, len(local), 64):
            pixels = torch.from_numpy(scene.draw([float(t) for t in local[i : i + 64]], height=SIDE, width=SIDE))
            keys.append(embedder.frames(pixels))
            cells = torch.nn.functional.avg_pool2d(pixels.permute(0, 3, 1, 2).float(), 12)
            together = torch.cat([cells[:1] if before is None else before, cells])
            moved = (together[1:] - together[:-1]).abs().amax(1) > CHANGED_LEVELS
            kept += moved.float().mean((1, 2)).tolist()
            before = cells[-1:]
    return Stream(name, torch.cat(keys), kept, times, scenes)


def fixed(stream: Stream, similar: list[float], bar: float) -> list[Fraction]:
    """The plain thing: every time the similarity comes over one number."""
    hits, above = [], True
    for at, value in zip(stream.times, similar, strict=True):
        if value >= bar and not above:
            hits.append(at)
        above = value >= bar
    return hits


def watch(
    stream: Stream, rule: Rule, embedder: Embedder, judge: Callable[[Candidate], bool] | None = None
) -> list[Candidate]:
    """All candidates of one rule; what the judge refuses is told to the trigger and left out."""
    trigger, found = Trigger(rule, embedder), []
    for at, key, kept in zip(stream.times, stream.keys, stream.kept, strict=True):
        candidate = trigger.update(at=at, key=key, kept=kept)
        if candidate is None:
            continue
        good = judge is None or judge(candidate)
        trigger.judge(candidate, confirmed=good)
        if good:
            found.append(candidate)
    return found


def rule_of(name: str, when: When, sensitivity: float, unlike: bool) -> Rule:
    """A rule for a colour-shape pair."""
    color, shape = name.split()
    others = tuple(f"{color} {other}" for other in SHAPES if other != shape) if unlike else ()
    return Rule(name=name, what=name, when=when, sensitivity=sensitivity, unlike=others)


def truth_of(stream: Stream, rule: Rule) -> list[Known]:
    """What the rule must find; empty where its pair does not occur."""
    own = [event for event in stream.events if event.what == rule.name]
    # What shows on the very first picture was there before anybody watched.
    return [event for event in expected(own, rule) if event.start > 0 or rule.when is When.LEAVES]


def judged(stream: Stream, rule: Rule, found: Sequence[Candidate]) -> Verdict:
    """Hits against the truth: none before its event, and at most a second after it."""
    events = [Known(e.start, e.stop + LATE, e.what) for e in truth_of(stream, rule)]
    return match([candidate.at for candidate in found], events, tolerance=Fraction(0))


def always_right(stream: Stream, rule: Rule) -> Callable[[Candidate], bool]:
    """A judge that knows the truth."""
    spans = [(event.start, event.stop + LATE) for event in truth_of(stream, rule)]
    return lambda candidate: any(start <= candidate.at <= stop for start, stop in spans)


def really(
    scene: Scene, names: Sequence[str], when: When, unlike: bool, loaded: Loaded, args: argparse.Namespace
) -> dict[str, Any]:
    """All rules over one stream through the whole program, as `watch-replay` runs it: H.264, memory, model."""
    rules = [rule_of(name, when, 0.5, unlike) for name in names]
    truth = [Known(Fraction(e.start_seconds), Fraction(e.end_seconds), e.name) for e in scene.events]
    request = LiveRequest(model="toy", fps=2, threads=args.threads, looks_a_minute=100_000, reduce=args.reduce)
    with tempfile.TemporaryDirectory() as folder:
        path = write_video(scene, Path(folder) / "stream.mp4", height=128, width=128, fps=4)
        result = replay(rules, str(path), request, loaded)
    tally, hours = Tally(), scene.seconds / 3600
    lost = {"trigger": 0, "model": 0, "held_out_trigger": 0, "held_out_model": 0}
    early = 0
    for rule in rules:
        own = [e for e in truth if e.what == rule.name]
        wanted = [e for e in expected(own, rule) if e.start > 0 or when is When.LEAVES] if own else []
        events = [Known(e.start, e.stop + LATE, e.what) for e in wanted]
        hits = [f.at for f in result.hits if f.rule.name == rule.name]
        verdict = match(hits, events, tolerance=Fraction(0))
        tally.add(verdict, rule.name, hours)
        refused = [f.at for f in result.refused if f.rule.name == rule.name]
        named = len(match(refused, verdict.missed, tolerance=Fraction(0)).matched)
        kind = "held_out_" if tuple(rule.name.split()) in HELD_OUT_PAIRS else ""
        lost[f"{kind}model"] += named
        lost[f"{kind}trigger"] += len(verdict.missed) - named
        early += sum(any(e.start - 3 <= at < e.start for e in own) for at in verdict.false)
    return tally.to_dict() | {
        "lost": lost,
        "false": tally.false,
        "false_just_before_their_event": early,
        "rules_without_any_false": len(rules) - len({f.rule.name for f in result.hits} & _wrong(result, truth)),
        "rules": len(rules),
        "looks_per_rule_hour": round(result.counts.looks / tally.rule_hours, 1),
        "times_real_time": round(scene.seconds / result.seconds, 1),
    }


def _wrong(result: Replayed, truth: Sequence[Known]) -> set[str]:
    """Names of rules with a hit far from all their events."""
    return {
        f.rule.name
        for f in result.hits
        if not any(e.what == f.rule.name and e.start <= f.at <= e.stop + LATE for e in truth)
    }


REAL = ("lost", "false", "false_just_before_their_event", "rules_without_any_false", "looks_per_rule_hour",
        "times_real_time")  # fmt: skip


def real_runs(minutes: int) -> list[tuple[str, Scene, When, bool]]:
    """What is run through the whole program: title, scene, when, and whether rules know what they are unlike."""
    runs = []
    for background in ("gradient", "busy"):
        [(_, scene)] = camera(FIRST_SEED + 1, minutes * 60, background)
        runs.append((f"whole, camera, {background}", scene, When.APPEARS, False))
        runs.append((f"whole, camera, {background}, unlike", scene, When.APPEARS, True))
    [(_, scene)] = camera(FIRST_SEED + 1, minutes * 60, "gradient")
    runs.append(("whole, camera, gradient, leaves, unlike", scene, When.LEAVES, True))
    return runs


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    return (
        f"| {name} | {found['recall']:.1%} | {found['recall_of_pairs_the_encoder_saw']:.1%} | "
        f"{found['recall_of_held_out_pairs']:.1%} | {found['precision']:.1%} | {found['false_alarms_per_hour']:.2f} | "
        f"{found['delay_seconds_median']:.1f} / {found['delay_seconds_95']:.1f} |"
    )


def without_the_model(
    names: Sequence[str], embedder: Embedder, args: argparse.Namespace, began: float
) -> dict[str, dict[str, Any]]:
    """The plain thing, and the triggers alone and with a judge that never errs."""
    seconds = args.minutes * 60
    with torch.inference_mode():
        streams = [
            embed("camera", camera(FIRST_SEED + 1, seconds, "gradient"), embedder, args.fps),
            embed("cuts", cuts(FIRST_SEED + 1000, seconds), embedder, args.fps),
        ]
    hours = seconds / 3600
    ways: dict[str, Tally] = {}

    for wording, text in (("", "{a} appears"), (", asked", "is there {a}?")):
        for bar in FIXED:
            tally = ways[f"fixed at {bar:.2f}{wording}"] = Tally()
            for stream in streams:
                for name in names:
                    with torch.inference_mode():
                        vector = embedder.texts([text.replace("{a}", with_article(name))])[0]
                        hits = fixed(stream, (stream.keys @ vector).tolist(), bar)
                    events = truth_of(stream, rule_of(name, When.APPEARS, 0.5, False))
                    late = [Known(e.start, e.stop + LATE, e.what) for e in events]
                    tally.add(match(hits, late, tolerance=Fraction(0)), name, hours)

    def run(title: str, when: When, sensitivity: float, unlike: bool, oracle: bool) -> None:
        tally = ways[title] = Tally()
        for place, stream in enumerate(streams):
            for name in names:
                rule = rule_of(name, when, sensitivity, unlike)
                right = always_right(stream, rule)
                found = watch(stream, rule, embedder, right if oracle else None)
                tally.add(judged(stream, rule, found), name, hours)
                tally.candidates += [(place, name, candidate, right(candidate)) for candidate in found]
        print(f"{title} after {time.time() - began:.0f} s", file=sys.stderr, flush=True)

    for sensitivity in args.sensitivities:
        run(f"trigger {sensitivity}", When.APPEARS, sensitivity, False, False)
    for sensitivity in args.sensitivities:
        run(f"trigger {sensitivity}, unlike", When.APPEARS, sensitivity, True, False)
    run("judged 0.5", When.APPEARS, 0.5, False, True)
    run("judged 0.5, unlike", When.APPEARS, 0.5, True, True)
    run("trigger 0.5, leaves", When.LEAVES, 0.5, True, False)

    results = {name: tally.to_dict() for name, tally in ways.items()}
    print(f"{len(names)} rules, {len(streams)} streams of {args.minutes} min at {args.fps} fps\n")
    print("| way | recall | pairs seen | held out | precision | false alarms an hour | delay s, median / 95 % |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, found in results.items():
        print(row(name, found))
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=int, default=60, help="length of each stream")
    parser.add_argument("--fps", type=int, default=1, help="pictures a second")
    parser.add_argument("--rules", type=int, default=48, help="how many of the 48 pairs, evenly taken")
    parser.add_argument("--real", action="store_true", help="also run the whole program, with the model")
    parser.add_argument("--only-real", action="store_true", help="run nothing else")
    parser.add_argument("--reduce", default=DEFAULT, help="methods of the whole program")
    parser.add_argument(
        "--sensitivities", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0], help="0.5 is needed"
    )
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    began = time.time()
    loaded = load(Request(model="toy", threads=args.threads), lambda text: print(text, file=sys.stderr))
    embedder = loaded.embedder
    assert embedder is not None
    every = [f"{color} {shape}" for color in COLORS for shape in SHAPES]
    names = every[:: max(1, len(every) // args.rules)][: args.rules]
    results = {} if args.only_real else without_the_model(names, embedder, args, began)
    real = real_runs(args.minutes) if args.real or args.only_real else []
    if real:
        print(f"\n{len(names)} rules through the whole program, streams of {args.minutes} min at 2 fps\n")
    for title, scene, when, unlike in real:
        found = results[title] = really(scene, names, when, unlike, loaded, args)
        print(row(title, found))
        print(f"  {json.dumps({name: found[name] for name in REAL})}", flush=True)
    report = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {args.threads} thread",
        "minutes": args.minutes,
        "fps": args.fps,
        "rules": len(names),
        "seconds": round(time.time() - began),
        "ways": results,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
