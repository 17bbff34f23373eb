"""``streamvid ask``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Annotated

import typer

from streamvid.errors import SettingsError
from streamvid_cli import options, render
from streamvid_pipelines.request import Request

if TYPE_CHECKING:
    from streamvid_pipelines.ask import AskVideo

DEFAULTS = Request()


def ask(
    video: Annotated[
        str,
        typer.Argument(
            help="A video file; a folder or glob of images; - for standard input; an http(s) address of a film or "
            "playlist; lavfi:GRAPH, camera:0 or rtsp://..., these with --to.  Left out with --stream.",
            show_default=False,
        ),
    ] = "",
    questions: Annotated[
        list[str] | None, typer.Argument(help="One or several questions; none opens a prompt.", show_default=False)
    ] = None,
    stream: Annotated[
        str | None,
        typer.Option(help="Ask about what `streamvid live` watches, or watched, under this name; no video is given."),
    ] = None,
    model: options.Model = "auto",
    embedder: options.Embedder = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    sample: options.Sample = DEFAULTS.sample,
    fps: options.Fps = None,
    max_frames: options.MaxFrames = None,
    start: options.From = None,
    stop: options.To = None,
    reduce: options.Reduce = DEFAULTS.reduce,
    recall: options.Recall = DEFAULTS.recall,
    budget: options.BudgetTokens = DEFAULTS.budget,
    max_new_tokens: options.MaxNewTokens = DEFAULTS.max_new_tokens,
    memory: options.Memory = None,
    disk: options.DiskGigabytes = None,
    source_disk: options.SourceDiskGigabytes = None,
    ram: options.RamGigabytes = None,
    vram: options.VramGigabytes = None,
    keep: options.Keep = False,
    codec: options.Codec = DEFAULTS.codec,
    rate: options.Rate = None,
    decoder: options.Decoder = DEFAULTS.decoder,
    hwaccel: options.Hwaccel = None,
    stall_seconds: options.StallSeconds = DEFAULTS.stall_seconds,
    decode_threads: options.DecodeThreads = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Forget what is remembered of this video and watch it again.")
    ] = False,
    keep_kv: options.KeepKv = False,
    no_toy: Annotated[bool, typer.Option("--no-toy", help="Fail rather than let the toy model stand in.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads for the models. Default: all cores.")] = None,
    json: options.Json = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show the whole receipt: stages, spans, methods.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Ask a video one or several questions; it is watched once and remembered.

    Answers go to stdout as they are made, with the times they can be seen at; progress and the
    receipt go to stderr.
    """
    request = Request(
        model=model,
        embedder=embedder,
        device=device,
        dtype=dtype,
        sample=sample,
        fps=fps,
        max_frames=max_frames,
        start_seconds=seconds(start, "--from"),
        stop_seconds=seconds(stop, "--to"),
        reduce=reduce,
        recall=recall,
        budget=budget,
        max_new_tokens=max_new_tokens,
        memory=memory,
        disk_bytes=_bytes(disk),
        source_bytes=_bytes(source_disk),
        ram_bytes=_bytes(ram),
        vram_bytes=_bytes(vram),
        keep=keep,
        codec=codec,
        fresh=fresh,
        keep_kv=keep_kv,
        toy_allowed=not no_toy,
        rate=rate,
        decoder=decoder,
        hwaccel=hwaccel,
        stall_seconds=stall_seconds,
        decode_threads=decode_threads,
        threads=threads,
    )
    asked = list(questions or [])
    if stream is not None:
        asked = [video, *asked] if video else asked
    elif not video:
        raise typer.BadParameter('which video? as in: streamvid ask video.mp4 "what happens?"')
    for question in asked:
        if not question.strip():
            raise SettingsError('the question is empty; ask something like: streamvid ask video.mp4 "what happens?"')
    if not asked and json and sys.stdin.isatty():
        raise SettingsError("--json without a question has nothing to print; give one or pipe questions in, one a line")
    if stream is not None:
        _ask_stream(stream, request, asked, json=json, quiet=quiet)
        return
    from streamvid_pipelines.ask import open_ask  # here: who asks a process that watches need not load a model's code

    watching = render.Watching(quiet=quiet)
    console = render.stderr()
    with open_ask(video, request, lambda text: console.print(text, markup=False)) as opened:
        for note in opened.loaded.notes:
            if note.startswith("NOTE"):
                console.print(note, markup=False, style="bold yellow")
        try:
            opened.prepare(watching)
        finally:
            watching.done()
        if asked:
            answers = [
                _one(opened, question, json=json, explain=explain, quiet=quiet, many=len(asked) > 1)
                for question in asked
            ]
            if json:
                render.emit_json(answers[0] if len(answers) == 1 else answers)
            return
        _prompt(opened, json=json, explain=explain, quiet=quiet)


def _one(opened: AskVideo, question: str, *, json: bool, explain: bool, quiet: bool, many: bool) -> dict[str, object]:
    if many and not json:
        sys.stdout.write(f"> {question}\n")
    answer = opened.ask(question, None if json else _write)
    if not json:
        render.finish_answer(answer)
    if not quiet:
        render.show_receipt(
            answer.receipt, explain=explain, said=[n for n in opened.loaded.notes if n.startswith("NOTE")]
        )
    else:
        for warning in answer.receipt.warnings:
            sys.stderr.write(f"warning: {warning}\n")
    return answer.to_dict()


OF_WATCHING = ("memory", "max_new_tokens")
"""What of a request counts for a process that watches; the rest was decided when it began."""


def _ask_stream(stream: str, request: Request, asked: list[str], *, json: bool, quiet: bool) -> None:
    from streamvid.memory.place import default_folder
    from streamvid_pipelines.live import local

    folder = request.memory if request.memory is not None else default_folder()
    given = [f.name for f in fields(Request) if getattr(request, f.name) != getattr(DEFAULTS, f.name)]
    unused = [name for name in given if name not in OF_WATCHING]
    past = None
    told = []
    for question in asked or _lines():
        say = None if json else _write
        answer = None
        if past is None:
            answer = local.ask(folder, stream, question, max_new_tokens=request.max_new_tokens, on_text=say)
            if answer is not None and unused:
                answer["receipt"]["warnings"].append(
                    f"{', '.join(unused)} not used: the process that watches {stream} answers as it was started"
                )
        if answer is None:
            if past is None:
                from streamvid_pipelines.live.past import Past

                past = Past(stream, request, render.say)
            answer = past.ask(question, say)
        if json and not asked:
            render.emit_json(answer)
        told.append(answer)
        if not json:
            render.finish_told(answer, quiet=quiet)
    if json and asked:
        render.emit_json(told[0] if len(told) == 1 else told)


def _lines() -> Iterator[str]:
    """Questions line by line until the input ends; an empty line ends a terminal's."""
    terminal = sys.stdin.isatty()
    if terminal:
        sys.stderr.write("ask away; an empty line or Ctrl-D leaves\n")
    while True:
        if terminal:
            sys.stderr.write("> ")
            sys.stderr.flush()
        line = sys.stdin.readline()
        if not line or (terminal and not line.strip()):
            return
        if line.strip():
            yield line.strip()


def _prompt(opened: AskVideo, *, json: bool, explain: bool, quiet: bool) -> None:
    """Questions line by line until the input ends."""
    for line in _lines():
        answer = _one(opened, line, json=json, explain=explain, quiet=quiet, many=False)
        if json:
            render.emit_json(answer)


def _bytes(gigabytes: float | None) -> int | None:
    return None if gigabytes is None else int(gigabytes * 1e9)


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def seconds(text: str | None, option: str) -> float | None:
    """A time as seconds: ``90``, ``1:30``, ``0:01:30.5``.

    Raises:
        SettingsError: if it is none of these.
    """
    if text is None:
        return None
    parts = text.split(":")
    try:
        values = [float(part) for part in parts]
    except ValueError:
        values = []
    if not values or len(values) > 3 or any(v < 0 for v in values) or any(v >= 60 for v in values[1:]):
        raise SettingsError(f"{option} must be seconds or [h:]mm:ss, got {text!r}; as in 90 or 1:30")
    total = 0.0
    for value in values:
        total = total * 60 + value
    return total
