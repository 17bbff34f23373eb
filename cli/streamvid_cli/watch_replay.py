"""``streamvid watch-replay``: a standing question rehearsed on recordings."""

from __future__ import annotations

import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Annotated

import typer

from streamvid.errors import SettingsError
from streamvid.query.evidence import clock
from streamvid.watch.truth import read_truth
from streamvid_cli import options, render
from streamvid_pipelines.ask import Request, load
from streamvid_pipelines.live.sentry import Finding
from streamvid_pipelines.live.settings import LiveRequest
from streamvid_pipelines.watch_replay import Judged, Replayed, replay, rules_of

DEFAULTS = LiveRequest()


def watch_replay(
    rule: Annotated[
        str, typer.Argument(metavar="RULE", help='A sentence like "a red circle appears", or a .toml file with rules.')
    ],
    recordings: Annotated[list[str], typer.Argument(metavar="RECORDING...", help="Videos to watch, in this order.")],
    truth: Annotated[
        list[Path] | None,
        typer.Option(
            "--truth",
            help="What is known to happen: .csv with start,stop,what, or .json/.jsonl; once for each recording.",
        ),
    ] = None,
    tolerance: Annotated[float, typer.Option(help="A hit may lie so many seconds beside its event; at least 0.")] = 1.0,
    model: options.Model = "auto",
    embedder: options.Embedder = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    fps: options.Fps = None,
    reduce: options.Reduce = DEFAULTS.reduce,
    looks_a_minute: Annotated[
        int, typer.Option(help="The model is asked about candidates so often a minute of video, at most.")
    ] = DEFAULTS.looks_a_minute,
    clip_frames: Annotated[int, typer.Option(help="Frames watched together, even.")] = DEFAULTS.clip_frames,
    decoder: options.Decoder = DEFAULTS.decoder,
    no_toy: Annotated[bool, typer.Option("--no-toy", help="Fail rather than let the toy model stand in.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads for the models. Default: all cores.")] = None,
    json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Run a rule over recordings as fast as they decode, and tell what it would have found.

    Nothing is delivered and nothing stays behind.  With the truth beside it, it also tells precision, recall,
    what was missed and what was false.
    """
    rules = rules_of(rule)
    known = [read_truth(path) for path in truth or []]
    if known and len(known) != len(recordings):
        raise SettingsError(
            f"{len(recordings)} recordings need as many --truth files, got {len(known)}; give one for each, in order"
        )
    if tolerance < 0:
        raise SettingsError(f"--tolerance must be at least 0 seconds, got {tolerance:g}")
    request = LiveRequest(
        model=model,
        fps=fps,
        reduce=reduce,
        looks_a_minute=looks_a_minute,
        clip_frames=clip_frames,
        decoder=decoder,
        threads=threads,
    )
    request.check()
    console = render.stderr()
    loaded = load(
        Request(model=model, embedder=embedder, device=device, dtype=dtype, toy_allowed=not no_toy, threads=threads),
        lambda text: console.print(text, markup=False),
    )
    for note in loaded.notes:
        console.print(note, markup=False, style="bold yellow" if note.startswith("NOTE") else None)
    results = []
    for place, recording in enumerate(recordings):
        progress = _Progress(quiet=quiet)
        result = replay(
            rules,
            recording,
            request,
            loaded,
            truth=known[place] if known else None,
            tolerance=Fraction(str(tolerance)),
            on_clip=progress,
        )
        results.append(result)
        if not json:
            _show(result, len(rules) > 1, len(recordings) > 1)
        if not quiet:
            for note in result.notes:
                sys.stderr.write(f"note: {note}\n")
            sys.stderr.write(_account(result) + "\n")
    if json:
        render.emit_json(results[0].to_dict() if len(results) == 1 else [result.to_dict() for result in results])


class _Progress:
    """A line every few seconds, with numbers."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet, self.began = quiet, time.monotonic()
        self.last = self.began

    def __call__(self, until: Fraction) -> None:
        now = time.monotonic()
        if self.quiet or now - self.last < render.PLAIN_SECONDS:
            return
        self.last = now
        sys.stderr.write(f"watched {clock(float(until))}, {float(until) / (now - self.began):.1f} s of video/s\n")
        sys.stderr.flush()


def _show(result: Replayed, several_rules: bool, several: bool) -> None:
    """Hits, then what the model refused, then the verdict."""
    if several:
        sys.stdout.write(f"{result.recording}\n")
    for finding in result.hits:
        how = "not asked" if finding.confirmed is None else f"model: {_line(finding.answer)}"
        sys.stdout.write(f"{_span(finding)} {_about(finding, several_rules)}  ({how})\n")
    if not result.hits:
        sys.stdout.write("no hits\n")
    for finding in result.refused:
        sys.stdout.write(
            f"not confirmed: {_span(finding)} {_about(finding, several_rules)}  (model: {_line(finding.answer)})\n"
        )
    for name, judged in result.judged.items():
        for line in _verdict_lines(judged):
            sys.stdout.write((f"{name}: " if several_rules else "") + line + "\n")
    sys.stdout.flush()


def _about(finding: Finding, named: bool) -> str:
    return (f"{finding.rule.name}: " if named else "") + f"{finding.reason}; score {finding.score:.2f}"


def _span(finding: Finding) -> str:
    return f"[{clock(float(finding.start))}-{clock(float(finding.stop))}]"


def _line(text: str) -> str:
    return " ".join(text.split()) or "-"


def _verdict_lines(judged: Judged) -> list[str]:
    verdict = judged.verdict
    hits, events = len(verdict.matched) + len(verdict.false), len(verdict.matched) + len(verdict.missed)
    precision = f"{verdict.precision:.1%}" if hits else "- (no hits)"
    recall = f"{verdict.recall:.1%}" if events else "- (no events)"
    lines = [f"precision {precision}, recall {recall}: {len(verdict.matched)} of {events} events found"]
    if verdict.missed:
        lines.append(
            "missed: "
            + ", ".join(
                f"[{clock(float(event.start))}-{clock(float(event.stop))}]"
                + (" (named by the trigger, refused by the model)" if event in judged.refused else "")
                for event in verdict.missed
            )
        )
    if verdict.false:
        lines.append("false: " + ", ".join(f"[{clock(float(at))}]" for at in verdict.false))
    return lines


def _account(result: Replayed) -> str:
    counts = result.counts
    speed = float(result.stop) / result.seconds if result.seconds else 0.0
    text = (
        f"{clock(float(result.stop))} watched in {result.seconds:.1f} s ({speed:.1f} times real time); "
        f"{counts.candidates} candidates, {counts.looks} looks of the model, {counts.refused} refused"
    )
    return text + (f", {counts.given_up} never looked at" if counts.given_up else "")
