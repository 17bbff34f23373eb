"""What a person sees: answers on stdout, everything else on stderr, plain where there is no terminal."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from streamvid.query.evidence import Clock, citation, clock

if TYPE_CHECKING:
    from streamvid.receipt import Receipt
    from streamvid.session import Answer
    from streamvid_pipelines.ask import Progress

PLAIN_SECONDS = 5.0
"""Time between two progress lines where there is no terminal to redraw."""


def stderr() -> Console:
    """The console for everything that is not an answer."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def say(text: str) -> None:
    """One line beside the answers."""
    stderr().print(text, markup=False)


def emit_json(value: Any) -> None:
    """One JSON value on stdout."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=None if not sys.stdout.isatty() else 2) + "\n")
    sys.stdout.flush()


def emit_json_line(value: Any) -> None:
    """One JSON value on one line of stdout, whatever reads it."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def lasting(seconds: float) -> str:
    """``2 d 03:04:05``, ``3:04:05``, ``04:05``."""
    days, rest = divmod(int(seconds), 86400)
    return f"{days} d {rest // 3600:02}:{rest % 3600 // 60:02}:{rest % 60:02}" if days else clock(rest)


class Watching:
    """Progress with numbers: a line redrawn on a terminal, a line every few seconds elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        self.quiet = quiet
        self.terminal = sys.stderr.isatty()
        self.drawn = False
        self.last = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        """Show how far the watching is."""
        now = time.monotonic()
        if self.quiet or (not self.terminal and now - self.last < PLAIN_SECONDS):
            return
        self.last = now
        total = f"/{clock(progress.seconds_total)}" if progress.seconds_total is not None else ""
        eta = progress.eta_seconds
        text = (
            f"watching {clock(progress.seconds_done)}{total}  {progress.frames} frames  "
            f"{progress.tokens_seen:,} -> {progress.tokens_remembered:,} tokens  {progress.speed:.1f} s of video/s"
            + (f"  {eta:.0f} s left" if eta is not None else "")
        )
        sys.stderr.write(f"\r\x1b[2K{text}" if self.terminal else text + "\n")
        sys.stderr.flush()
        self.drawn = True

    def done(self) -> None:
        """Leave the terminal's line clean for what follows."""
        if self.terminal and self.drawn:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self.drawn = False


def finish_answer(answer: Answer) -> None:
    """End the streamed answer with the times it can be seen at."""
    cited = citation(answer.spans, Clock(answer.origin))
    sys.stdout.write((f"  {cited}" if cited else "") + "\n")
    sys.stdout.flush()


def finish_told(answer: Mapping[str, Any], *, quiet: bool) -> None:
    """End an answer that came as JSON values from a stream: the times it can be seen at, and its short account."""
    if "wall" in answer:
        day = datetime.now().astimezone().date()
        shown = []
        for span in answer["wall"]:
            start, stop = (datetime.fromisoformat(end).astimezone() for end in span)
            date = "" if start.date() == day else f"{start:%Y-%m-%d} "
            shown.append(f"[{date}{start:%H:%M:%S}-{stop:%H:%M:%S}]")
        cited = " ".join(shown)
    else:
        cited = citation([(start, stop) for start, stop in answer["spans"]])
    sys.stdout.write((f"  {cited}" if cited else "") + "\n")
    sys.stdout.flush()
    receipt = answer["receipt"]
    lines = [f"warning: {text}" for text in receipt["warnings"]]
    if not quiet:
        seconds = sum(stage["seconds"] for stage in receipt["stages"])
        lines.insert(
            0,
            f"cache: {receipt['cache']}, key {receipt['key']}; {receipt['model']}; {receipt['tokens_given']:,} of "
            f"{receipt['tokens_remembered']:,} remembered tokens given; {seconds:.2f} s",
        )
    for line in lines:
        sys.stderr.write(line + "\n")


def show_receipt(receipt: Receipt, *, explain: bool, said: Sequence[str] = ()) -> None:
    """The short receipt, or the whole one; warnings that were already said are not said again."""
    console = stderr()
    lines = [line for line in receipt.short().splitlines() if line.removeprefix("warning: ") not in said]
    console.print("\n".join(lines), markup=False, style="dim")
    if not explain:
        return
    table = Table("stage", "seconds", "tokens in", "tokens out", title="stages", title_justify="left")
    for cost in receipt.stages:
        table.add_row(cost.name, f"{cost.seconds:.3f}", f"{cost.tokens_in:,}", f"{cost.tokens_out:,}")
    console.print(table)
    spans = Table(
        "span", "similarity", "attention", "tokens given", "of stored", "",
        title="what the model read", title_justify="left",
    )  # fmt: skip
    for span in receipt.spans:
        spans.add_row(
            f"{clock(span.start_seconds)}-{clock(span.stop_seconds)}",
            "-" if span.similarity is None else f"{span.similarity:.3f}",
            "-" if span.attention is None else f"{span.attention:.3f}",
            str(span.tokens),
            str(span.stored),
            "#" * max(1, round(20 * span.tokens / max(1, max(s.tokens for s in receipt.spans)))),
        )
    console.print(spans)
    if receipt.index:
        console.print(f"searched by {receipt.index}", markup=False)
    for method in receipt.methods:
        settings = ", ".join(f"{k}={v}" for k, v in method.items() if k != "method")
        console.print(f"method {method['method']}: {settings}", markup=False)
    counts = ", ".join(f"{count} {name}" for name, count in receipt.decoding.items())
    looked = f", {receipt.frames_looked_at} pictures looked at" if receipt.frames_looked_at else ""
    console.print(
        f"decoded by {receipt.decoder} ({receipt.decoder_reason}): {counts}; "
        f"frames chosen by {receipt.sampling}{looked}",
        markup=False,
    )
    console.print(
        f"{receipt.frames_decoded} pictures decoded, {receipt.frames_encoded} of {receipt.frames_sampled} sampled "
        f"frames encoded in this run; prompt {receipt.prompt_tokens} tokens, answer {receipt.new_tokens}; "
        f"{receipt.tokens_last_layer} visual tokens in the last layer; memory {receipt.memory_bytes / 1e6:.2f} MB; "
        f"peak RSS {receipt.peak_rss_bytes / 1e6:.0f} MB",
        markup=False,
    )


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout; tab-separated lines where there is no terminal."""
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            sys.stdout.write("\t".join(row) + "\n")
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
