"""``streamvid memory``."""

from __future__ import annotations

import sys
import time
from collections.abc import Container, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from streamvid.budget import Limits
from streamvid.errors import BankError, SettingsError
from streamvid.memory import compact as compacting
from streamvid.memory import repair as repairing
from streamvid.memory import transfer
from streamvid.memory import verify as verifying
from streamvid.memory.bank import Bank
from streamvid.memory.place import default_folder
from streamvid.memory.records import AnswerRecord, SourceRecord
from streamvid.memory.sizes import SourceHour, source_hour
from streamvid.memory.tidy import Tidied
from streamvid.memory.tidy import tidy as tidied
from streamvid.query.evidence import clock
from streamvid_cli import options, render

app = typer.Typer(help="What is remembered: look, mend, move, forget.", no_args_is_help=True)
Which = Annotated[str, typer.Argument(help="A number from `memory list`, the start of a key, or a file name.")]
Whiches = Annotated[
    list[str] | None,
    typer.Argument(help="Numbers from `memory list`, starts of keys, or file names. Default: everything."),
]
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
"""Seconds by the letter behind a length of time."""

ENDS_OF_SPANS, ENDS_OF_OTHERS = 5, 2
"""How many of the oldest and of the newest are shown of many."""

MOST_ROWS = 1000
"""Longer lists are not in JSON unless they are asked for."""

PROGRESS_SECONDS = 2.0
"""Nothing is said about work that is done before."""


def _open(folder: Path | None, *, read_only: bool = False, create: bool = True, limits: Limits | None = None) -> Bank:
    folder = folder if folder is not None else default_folder()
    bank = Bank.open(folder, read_only=read_only, create=create, limits=limits)
    for note in bank.notes:
        render.stderr().print(f"note: {note}", markup=False)
    return bank


def _read(folder: Path | None) -> Bank:
    """To look only: makes nothing where there is nothing."""
    return _open(folder, read_only=True, create=False)


def _source(bank: Bank, which: str) -> SourceRecord:
    return bank.source(int(which) if which.isdigit() else which)


def _sources(bank: Bank, which: Sequence[str] | None) -> list[SourceRecord]:
    return [_source(bank, name) for name in which] if which else bank.sources()


@app.command("list")
def list_(memory: options.Memory = None, json: options.Json = False) -> None:
    """List the remembered videos: how long, how large, what is missing, what is kept for good."""
    folder = memory if memory is not None else default_folder()
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        if json:
            render.emit_json({"folder": str(folder), "bytes": 0, "sources": []})
        else:
            render.stderr().print(f"nothing is remembered in {folder}", markup=False)
        return
    with _read(folder) as bank:
        rows = [_row(bank, source) for source in bank.sources()]
        if json:
            render.emit_json({"folder": str(bank.folder), "bytes": bank.usage(), "sources": rows})
            return
        if not rows:
            render.stderr().print(f"nothing is remembered in {bank.folder}", markup=False)
            return
        render.show_table(
            ("id", "name", "state", "length", "tokens", "MB", "gaps", "expired", "kept", "key"),
            [
                (
                    str(r["id"]),
                    r["name"],
                    r["state"],
                    clock(r["seconds"]),
                    f"{r['tokens']:,}",
                    f"{r['bytes'] / 1e6:.2f}",
                    _stretch(r["gaps"], r["gap_seconds"]),
                    _stretch(r["expired"], r["expired_seconds"]),
                    "yes" if r["pinned"] else "",
                    r["key"],
                )
                for r in rows
            ],
        )


@app.command()
def show(
    which: Which,
    spans: Annotated[
        bool, typer.Option("--spans", help="List every span, gap and answer, however many there are.")
    ] = False,
    memory: options.Memory = None,
    json: options.Json = False,
) -> None:
    """Show one remembered video: its key, spans, gaps, answers, and what an hour of it takes, in each codec."""
    with _read(memory) as bank:
        source = _source(bank, which)
        row, totals = _row(bank, source), bank.totals(source.id)
        levels = bank.level_counts(source.id)
        hour = _hour(bank, source)
        hours = max(row["seconds"], 1e-9) / 3600
        row |= {
            "num_spans": source.spans,
            "levels_of_spans": {str(level): count for level, count in levels.items()},
            "megabytes_per_hour": round(row["bytes"] / 1e6 / hours, 2),
            "made_with": source.key.to_json(),
        }
        counts = {
            "spans": source.spans,
            "gap_spans": totals.gaps,
            "expired_spans": totals.expired,
            "answers": totals.answers,
        }
        if json:
            left_out = {name: count for name, count in counts.items() if count > MOST_ROWS and not spans}
            row |= _listed(bank, source, left_out) | {"hour": asdict(hour) if hour is not None else None}
            render.emit_json(row | {"left_out": left_out})
            return
        for name in (
            "id",
            "name",
            "path",
            "state",
            "pinned",
            "created",
            "seconds",
            "tokens",
            "bytes",
            "megabytes_per_hour",
            "key",
            "made_with",
        ):
            typer.echo(f"{name}: {row[name]}")
        merged = ", ".join(f"{count:,} merged {level} times" for level, count in levels.items() if level)
        typer.echo(f"{source.spans:,} spans{': ' + merged if merged else ''} (seconds, tokens):")
        _show_spans(bank, source, every=spans)
        ends = None if spans else ENDS_OF_OTHERS
        for number, gap in enumerate(bank.gaps(source.id, ends=ends)):
            _between(number, totals.gaps, ends, "gaps")
            typer.echo(f"not seen: {clock(float(gap.start))}-{clock(float(gap.stop))}  {gap.reason}")
        for number, gone in enumerate(bank.expired(source.id, ends=ends)):
            _between(number, totals.expired, ends, "stretches not remembered any more")
            typer.echo(
                f"not remembered any more: {clock(float(gone.start))}-{clock(float(gone.stop))}  "
                f"{gone.spans} spans, {gone.reason}"
            )
        for number, answer in enumerate(bank.answers(source.id, ends=ends)):
            _between(number, totals.answers, ends, "answers")
            typer.echo(f"Q: {answer.question}\nA: {answer.answer}")
        if hour is not None:
            _show_hour(hour)


@app.command()
def answers(
    which: Annotated[str | None, typer.Argument(help="Of one video only. Default: of all.")] = None,
    memory: options.Memory = None,
    json: options.Json = False,
) -> None:
    """Show what was asked and answered, with the times the model was given."""
    with _read(memory) as bank:
        sources = _sources(bank, [which] if which is not None else None)
        found = sorted(((a, s) for s in sources for a in bank.answers(s.id)), key=lambda pair: pair[0].id)
        if json:
            render.emit_json([_answer(answer, source) for answer, source in found])
            return
        if not found:
            render.stderr().print("nothing was asked yet", markup=False)
        for answer, source in found:
            given = ", ".join(f"{clock(a)}-{clock(b)}" for a, b in _given(answer))
            when = f"{answer.created.isoformat(sep=' ', timespec='seconds')}"
            typer.echo(f"{when}  {source.name}\nQ: {answer.question}\nA: {answer.answer}\nfrom: {given or 'nothing'}\n")


@app.command()
def verify(which: Whiches = None, memory: options.Memory = None, json: options.Json = False) -> None:
    """Read every byte that is remembered and compare it with its checksums; 0 if all is as written, else 1."""
    with _read(memory) as bank:
        progress = _Progress("verifying")
        seen = verifying.verify(bank, _sources(bank, which) if which else None, progress=progress)
        progress.done()
        if json:
            render.emit_json(
                {
                    "folder": str(bank.folder),
                    "sources": seen.sources,
                    "spans": seen.spans,
                    "bytes": seen.num_bytes,
                    "loose_bytes": seen.loose_bytes,
                    "num_problems": seen.num_problems,
                    "problems": [
                        {
                            "kind": p.kind.value,
                            "source": p.source_id,
                            "file": p.file,
                            "offset": p.offset,
                            "text": p.text,
                        }
                        for p in seen.problems
                    ],
                    "notes": seen.notes,
                }
            )
        else:
            for problem in seen.problems:
                typer.echo(f"{problem.kind.value}: {problem.text}")
            if seen.num_problems > len(seen.problems):
                typer.echo(f"and {seen.num_problems - len(seen.problems)} more")
            for note in seen.notes:
                typer.echo(f"note: {note}")
            result = "all as written" if not seen.num_problems else f"{seen.num_problems} problems"
            typer.echo(f"{seen.sources} videos, {seen.spans} spans, {seen.num_bytes / 1e6:.2f} MB read: {result}")
            if seen.loose_bytes:
                typer.echo(f"{seen.loose_bytes / 1e6:.2f} MB can be given back: streamvid memory compact")
            if seen.num_problems:
                render.stderr().print("next: streamvid memory repair --dry-run says what can be mended", markup=False)
        if seen.num_problems:
            raise typer.Exit(1)


@app.command()
def repair(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    memory: options.Memory = None,
    json: options.Json = False,
) -> None:
    """Mend what can be mended: catalogue, rows, file starts; forget damaged spans and say which; 1 if any is left."""
    progress = _Progress("repairing")
    folder = memory if memory is not None else default_folder()
    result = repairing.repair(folder, dry_run=dry_run, progress=progress)
    progress.done()
    if json:
        render.emit_json(
            {
                "folder": str(folder),
                "dry_run": dry_run,
                "done": result.done,
                "lost": result.lost,
                "lost_spans": result.lost_spans,
                "doubtful": result.doubtful,
                "left": result.left,
            }
        )
    else:
        for title, lines in (
            ("would do" if dry_run else "done", result.done),
            ("would be lost" if dry_run else "lost", result.lost),
            ("doubtful", result.doubtful),
            ("left", result.left),
        ):
            for line in lines:
                typer.echo(f"{title}: {line}")
        if not (result.done or result.lost or result.doubtful or result.left):
            typer.echo("nothing to mend")
    if result.left:
        raise typer.Exit(1)


@app.command()
def compact(memory: options.Memory = None, json: options.Json = False) -> None:
    """Give back the disk space of what is not remembered any more."""
    with _open(memory, create=False) as bank:
        result = compacting.compact(bank)
        if json:
            render.emit_json(
                {
                    "folder": str(bank.folder),
                    "before": result.before_bytes,
                    "after": result.after_bytes,
                    "sources": result.sources,
                    "notes": result.notes,
                }
            )
            return
        for note in result.notes:
            render.stderr().print(f"note: {note}", markup=False)
        typer.echo(f"{result.before_bytes / 1e6:.2f} -> {result.after_bytes / 1e6:.2f} MB")


@app.command()
def tidy(
    keep: Annotated[
        str | None,
        typer.Option(
            help="Forget what is older than this, as in 90m, 36h, 7d or 2w; of live videos by the wall clock, else "
            "before the end of the video. Default: no limit.",
        ),
    ] = None,
    disk: options.DiskGigabytes = None,
    source_disk: options.SourceDiskGigabytes = None,
    memory: options.Memory = None,
    json: options.Json = False,
) -> None:
    """Bring videos that nobody is watching now below the limits: merge what is old, forget what is too old."""
    limits = Limits(keep_seconds=_age(keep), disk_bytes=_bytes(disk), source_bytes=_bytes(source_disk))
    if not limits.bounds_memory:
        raise SettingsError("there is no limit to bring memory below; give --keep, --disk or --source-disk")
    told = Tidied(more=True)
    notes: list[str] = []
    with _open(memory, create=False, limits=limits) as bank:
        while told.more:
            told.more = False
            now = tidied(bank)
            told.sources = max(told.sources, now.sources)
            told.merged_spans += now.merged_spans
            told.expired_spans += now.expired_spans
            told.freed_bytes += now.freed_bytes
            told.more = now.more and bool(now.merged_spans or now.expired_spans or now.freed_bytes)
            notes += [note for note in now.notes if note not in notes]
        if json:
            render.emit_json(
                {
                    "folder": str(bank.folder),
                    "merged_spans": told.merged_spans,
                    "expired_spans": told.expired_spans,
                    "freed_bytes": told.freed_bytes,
                    "bytes": bank.usage(),
                    "notes": notes,
                }
            )
            return
        for note in notes:
            render.stderr().print(f"note: {note}", markup=False)
        given = f"{told.freed_bytes / 1e6:.2f} MB given back"
        typer.echo(f"{told.merged_spans} spans merged, {told.expired_spans} expired, {given}")


@app.command()
def export(
    file: Annotated[Path, typer.Argument(help="The archive to write, or - for stdout.", metavar="FILE")],
    which: Whiches = None,
    memory: options.Memory = None,
    json: options.Json = False,
) -> None:
    """Write remembered videos into one archive that `memory import` takes anywhere."""
    if str(file) == "-" and json:
        raise typer.BadParameter("stdout is taken by the archive; name a file to get JSON")
    with _read(memory) as bank:
        sources = _sources(bank, which)
        if not sources:
            raise BankError(f"nothing is remembered in {bank.folder}; there is nothing to export")
        if str(file) == "-":
            transfer.export_archive(bank, sources, sys.stdout.buffer)
            sys.stdout.buffer.flush()
            return
        _moved(transfer.export_file(bank, sources, file), "wrote", json=json)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="The archive to read, or - for stdin.", metavar="FILE")],
    memory: options.Memory = None,
    json: options.Json = False,
) -> None:
    """Remember what an archive holds; each video comes wholly or not at all, known ones are skipped."""
    with _open(memory) as bank:
        if str(file) == "-":
            result = transfer.import_archive(bank, sys.stdin.buffer, name="stdin")
        else:
            with _archive(file) as source:
                result = transfer.import_archive(bank, source, name=str(file))
        _moved(result, "remembered", json=json)


@app.command()
def merge(
    other: Annotated[Path, typer.Argument(help="Another memory folder; it is only read.", metavar="OTHER_FOLDER")],
    memory: options.Memory = None,
    json: options.Json = False,
) -> None:
    """Remember what another memory folder holds; known videos are skipped."""
    with _read(other) as source, _open(memory) as bank:
        _moved(transfer.merge(bank, source), "remembered", json=json)


@app.command()
def rm(which: Which, memory: options.Memory = None, json: options.Json = False) -> None:
    """Forget one remembered video."""
    with _open(memory, create=False) as bank:
        row = _row(bank, _source(bank, which))
        gone = bank.remove(row["id"])
        if json:
            render.emit_json(row)
        else:
            typer.echo(f"forgot {gone.name} ({gone.num_bytes / 1e6:.2f} MB)")


@app.command()
def keep(which: Which, memory: options.Memory = None, json: options.Json = False) -> None:
    """Keep one remembered video when space is made."""
    _pin(which, memory, pinned=True, json=json)


@app.command()
def unkeep(which: Which, memory: options.Memory = None, json: options.Json = False) -> None:
    """Let one remembered video go when space is made."""
    _pin(which, memory, pinned=False, json=json)


def _pin(which: str, memory: Path | None, *, pinned: bool, json: bool) -> None:
    with _open(memory, create=False) as bank:
        source = bank.pin(_source(bank, which), pinned=pinned)
        if json:
            render.emit_json(_row(bank, source))
        else:
            typer.echo(f"{source.name} is {'kept' if pinned else 'not kept'} when space is made")


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)


def _age(text: str | None) -> float | None:
    """A length of time in seconds: a number and s, m, h, d or w; without a letter seconds."""
    if text is None:
        return None
    number, unit = (text[:-1], text[-1]) if text[-1:] in UNITS else (text, "s")
    try:
        return float(number) * UNITS[unit]
    except ValueError:
        raise SettingsError(
            f"--keep must be a number with s, m, h, d or w behind it, got {text!r}; as in 90m or 7d"
        ) from None


def _archive(path: Path) -> BinaryIO:
    try:
        return open(path, "rb")
    except OSError as error:
        raise BankError(f"cannot read {path}: {error.strerror}; check the name and its permissions") from error


def _moved(result: transfer.Moved, verb: str, *, json: bool) -> None:
    if json:
        render.emit_json(
            {
                "sources": result.sources,
                "skipped": result.skipped,
                "spans": result.spans,
                "bytes": result.num_bytes,
            }
        )
        return
    for line in result.skipped:
        render.stderr().print(f"note: {line}", markup=False)
    typer.echo(f"{verb} {len(result.sources)} videos, {result.spans} spans, {result.num_bytes / 1e6:.2f} MB")


def _hour(bank: Bank, source: SourceRecord) -> SourceHour | None:
    """What an hour of a video takes; a damaged video is shown without it, and a note says why."""
    try:
        return source_hour(bank, source)
    except BankError as error:
        render.stderr().print(f"note: what an hour takes in each codec is not known: {error}", markup=False)
        return None


def _listed(bank: Bank, source: SourceRecord, left_out: Container[str]) -> dict[str, Any]:
    """The lists of a video; those that are left out are empty, and nothing of them is read."""
    lists: dict[str, list[Any]] = {name: [] for name in ("spans", "levels", "gap_spans", "expired_spans", "answers")}
    if "spans" not in left_out:
        for span in bank.each_span(source.id):
            lists["spans"].append([float(span.start), float(span.stop), span.tokens])
            lists["levels"].append(span.level)
    if "gap_spans" not in left_out:
        lists["gap_spans"] = [
            {"start": float(g.start), "stop": float(g.stop), "reason": g.reason} for g in bank.gaps(source.id)
        ]
    if "expired_spans" not in left_out:
        lists["expired_spans"] = [
            {"start": float(e.start), "stop": float(e.stop), "spans": e.spans, "reason": e.reason}
            for e in bank.expired(source.id)
        ]
    if "answers" not in left_out:
        lists["answers"] = [{"question": a.question, "answer": a.answer} for a in bank.answers(source.id)]
    return lists


def _show_spans(bank: Bank, source: SourceRecord, *, every: bool) -> None:
    ends = None if every else ENDS_OF_SPANS
    for number, span in enumerate(bank.each_span(source.id) if every else bank.spans(source.id, ends=ends)):
        _between(number, source.spans, ends, "spans")
        merged = f"  merged {span.level} times" if span.level else ""
        typer.echo(f"  {clock(float(span.start))}-{clock(float(span.stop))}  {span.tokens}{merged}")


def _between(number: int, total: int, ends: int | None, what: str) -> None:
    """Before the first of the newest: how many are not shown."""
    if ends is not None and number == ends and total > 2 * ends:
        typer.echo(f"  ... {total - 2 * ends:,} {what} between; --spans shows all")


def _show_hour(hour: SourceHour) -> None:
    stored = ", ".join(f"{count} as {codec}" for codec, count in hour.stored_as.items())
    typer.echo(
        f"an hour of it: {hour.tokens:,.0f} tokens of width {hour.width} with {hour.layers} further layers, in "
        f"{hour.spans:,.0f} spans: {hour.megabytes:.2f} MB of segments; features of its spans: {stored}"
    )
    typer.echo("the same tokens in each codec, ranges learned:")
    render.show_table(
        ("codec", "MB an hour", ""),
        [(codec, f"{size:.2f}", "in use" if codec == hour.codec else "") for codec, size in hour.by_codec.items()],
    )


def _stretch(count: int, seconds: float) -> str:
    return f"{count} ({clock(seconds)})" if count else ""


def _answer(answer: AnswerRecord, source: SourceRecord) -> dict[str, Any]:
    return {
        "id": answer.id,
        "source": source.id,
        "name": source.name,
        "question": answer.question,
        "answer": answer.answer,
        "spans": _given(answer),
        "created": answer.created.isoformat(timespec="seconds"),
    }


def _given(answer: AnswerRecord) -> list[list[float]]:
    """Times of what the model read, as the receipt says it."""
    spans = answer.receipt.get("spans", [])
    return [[s["start_seconds"], s["stop_seconds"]] for s in spans if "start_seconds" in s]


def _row(bank: Bank, source: SourceRecord) -> dict[str, Any]:
    totals = bank.totals(source.id)
    return {
        "id": source.id,
        "name": source.name,
        "path": source.path,
        "state": source.state.value,
        "seconds": float(source.duration if source.duration is not None else source.stop or 0),
        "tokens": source.tokens,
        "bytes": source.num_bytes,
        "gaps": totals.gaps,
        "gap_seconds": totals.gap_seconds,
        "expired": totals.expired_spans,
        "expired_seconds": totals.expired_seconds,
        "pinned": source.pinned,
        "key": source.key.short,
        "created": source.created.isoformat(timespec="seconds"),
    }


class _Progress:
    """How far a long reading is, on stderr, at most every two seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._began = self._last = time.monotonic()
        self._drawn = False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._last < PROGRESS_SECONDS:
            return
        self._last = now
        speed = done / (now - self._began)
        left = (total - done) / speed if speed else 0
        text = f"{self._what} {done / 1e6:,.0f}/{total / 1e6:,.0f} MB  {speed / 1e6:.0f} MB/s  {left:.0f} s left"
        self._drawn = sys.stderr.isatty()
        sys.stderr.write(f"\r\x1b[2K{text}" if self._drawn else f"{text}\n")
        sys.stderr.flush()

    def done(self) -> None:
        """Leave the terminal's line clean."""
        if self._drawn:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
