"""``streamvid live``."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from streamvid.errors import SettingsError, StreamvidError
from streamvid.ingest.ring import KEEP_BYTES, KEEP_SECONDS
from streamvid.watch.rules import Rule, parse_duration
from streamvid_cli import options, render
from streamvid_pipelines.ask import Request, load
from streamvid_pipelines.live.engine import Live, Said
from streamvid_pipelines.live.guard import Guard
from streamvid_pipelines.live.health import Health
from streamvid_pipelines.live.local import Door
from streamvid_pipelines.live.settings import CameraRequest, LiveRequest, read_config

DEFAULTS = LiveRequest()

PLAIN_SECONDS = 10.0
"""Time between two status lines where there is no terminal."""


def live(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            help="What to watch, one or several, each as SOURCE or NAME=SOURCE: rtsp://..., rtsps://..., "
            "http(s)://..., camera:0, lavfi:GRAPH, or a file that stands in for a camera.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Cameras and settings in a TOML file; see docs/live.md.")
    ] = None,
    model: options.Model = "auto",
    embedder: options.Embedder = "auto",
    device: options.Device = "auto",
    dtype: options.Dtype = "auto",
    fps: options.Fps = None,
    reduce: options.Reduce = DEFAULTS.reduce,
    recall: options.Recall = DEFAULTS.recall,
    budget: options.BudgetTokens = DEFAULTS.budget,
    max_new_tokens: options.MaxNewTokens = DEFAULTS.max_new_tokens,
    memory: options.Memory = None,
    disk: Annotated[
        float,
        typer.Option(
            "--disk",
            help="Most the memory folder may hold, in GB; old memory is made smaller to stay below. 0: no limit.",
        ),
    ] = (DEFAULTS.disk_bytes or 0) / 1e9,
    source_disk: options.SourceDiskGigabytes = None,
    keep_days: Annotated[
        float | None, typer.Option(help="Forget what is older than so many days. Default: only space decides.")
    ] = None,
    codec: options.Codec = DEFAULTS.codec,
    watch: Annotated[
        list[str] | None,
        typer.Option(
            "--watch",
            help='Wait for this on every stream that is given here, as in "a red circle appears", "the dog leaves", '
            '"no guard", "anything changes"; may be repeated.',
        ),
    ] = None,
    then: Annotated[
        list[str] | None,
        typer.Option(
            "--then",
            help="What an alert does: 'jsonl FILE', 'webhook ADDRESS' or 'command notify-send {rule} {clip}'; may be "
            "repeated, holds for every --watch. Default: alerts are printed.",
        ),
    ] = None,
    overload: Annotated[
        str,
        typer.Option(
            help="When the model is slower than the camera: adaptive (fewer frames, evenly), latest (the oldest are "
            "thrown away) or all (nothing is, and watching falls behind)."
        ),
    ] = DEFAULTS.overload,
    clip_frames: Annotated[
        int, typer.Option(help="Frames watched together, even; fewer are remembered sooner.")
    ] = DEFAULTS.clip_frames,
    stall_seconds: Annotated[
        float, typer.Option(help="Connect anew when no picture comes for so long, in seconds; above 0.")
    ] = 10.0,
    give_up_after: Annotated[
        float | None, typer.Option(help="Fail when no picture came for so long, in seconds. Default: never.")
    ] = None,
    insist: Annotated[
        bool, typer.Option("--insist", help="Try again even if the first attempt says: wrong password, no such stream.")
    ] = False,
    record: Annotated[
        bool,
        typer.Option("--record", help="Keep the cameras' own packets, too, to look at again: `streamvid clip`."),
    ] = False,
    record_keep: Annotated[
        str, typer.Option(help="Give recorded packets up at this age: 90m, 24h, 7d.")
    ] = f"{KEEP_SECONDS / 3600:g}h",
    record_disk: Annotated[
        float, typer.Option(help="Most that recorded packets of one stream take, in GB. 0: no limit.")
    ] = KEEP_BYTES / 1e9,
    loop: Annotated[bool, typer.Option("--loop", help="Begin a file again at its end.")] = False,
    decoder: options.Decoder = DEFAULTS.decoder,
    hwaccel: options.Hwaccel = None,
    decode_threads: options.DecodeThreads = None,
    no_toy: Annotated[bool, typer.Option("--no-toy", help="Fail rather than let the toy model stand in.")] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads for the models. Default: all cores.")] = None,
    duration: Annotated[
        float | None, typer.Option("--for", help="Stop after so many seconds. Default: never.", metavar="SECONDS")
    ] = None,
    health: Annotated[
        str | None,
        typer.Option(
            help="Tell whether all is well: HOST:PORT of this machine (GET gives 200 or 503 and JSON), or a file that "
            "is kept up to date."
        ),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON value a line on stdout: status, events and answers.")
    ] = False,
    quiet: options.Quiet = False,
) -> None:
    """Watch cameras, remember what they show, and answer questions about now and about the past.

    Questions are typed while it watches, piped in one a line, or asked from another terminal with
    `streamvid ask --stream NAME "..."`.  With several streams a question begins with a name: `front: who came?`.
    Ctrl-C or SIGTERM ends it; what was seen stays remembered, and the same command goes on with it.
    """
    request = LiveRequest(
        model=model,
        embedder=embedder,
        device=device,
        dtype=dtype,
        toy_allowed=not no_toy,
        fps=fps,
        reduce=reduce,
        recall=recall,
        budget=budget,
        max_new_tokens=max_new_tokens,
        memory=memory,
        disk_bytes=int(disk * 1e9) or None,
        source_bytes=None if source_disk is None else int(source_disk * 1e9),
        keep_seconds=None if keep_days is None else keep_days * 86400,
        codec=codec,
        overload=overload,
        clip_frames=clip_frames,
        decoder=decoder,
        hwaccel=hwaccel,
        decode_threads=decode_threads,
        threads=threads,
        record_keep_seconds=parse_duration(record_keep, name="--record-keep"),
        record_bytes=int(record_disk * 1e9) or None,
    )
    cameras: list[CameraRequest] = []
    if config is not None:
        request, cameras = read_config(config, request)
    if then and not watch and not any(camera.rules for camera in cameras):
        raise SettingsError("--then says what an alert does, and nothing is watched for; add --watch 'a dog appears'")
    rules = tuple(Rule.parse(text) for text in watch or [])
    given = [CameraRequest.parse(source, rules=rules) for source in sources or []]
    if rules and not given:
        cameras = [replace(camera, rules=(*camera.rules, *rules)) for camera in cameras]
    cameras += [
        replace(
            camera,
            loop=loop,
            record=record,
            patience=replace(camera.patience, stall_seconds=stall_seconds, give_up_after=give_up_after, insist=insist),
        )
        for camera in given
    ]
    if not cameras:
        raise SettingsError("there is nothing to watch; name a camera, as in: streamvid live rtsp://...")
    request.check()
    console = render.stderr()
    loaded = load(_as_ask(request), lambda text: console.print(text, markup=False))
    for note in loaded.notes:
        console.print(note, markup=False, style="bold yellow" if note.startswith("NOTE") else None)
    screen = Screen(json=json, quiet=quiet)
    with ExitStack() as stack:
        guard = Guard(cameras, request, loaded, then=then or (), tell=screen.alert, say=screen.said)
        stack.enter_context(guard)
        watching = stack.enter_context(_until_told(Live(cameras, request, loaded, say=screen.said, **guard.hooks)))
        names = [camera.name for camera in cameras]
        stack.enter_context(Door(request.folder, names, _answer_for(watching)))
        if health is not None:
            stack.enter_context(Health(health, watching.status))
        screen.hello(names, request)
        screen.run(watching, duration)
    screen.goodbye(watching)


class Screen:
    """What a person sees while cameras are watched: a status line, what happens, questions and answers."""

    def __init__(self, *, json: bool, quiet: bool) -> None:
        self.json, self.quiet = json, quiet
        self.terminal = sys.stdin.isatty() and sys.stderr.isatty() and not json
        self._lock = threading.Lock()

    def hello(self, names: list[str], request: LiveRequest) -> None:
        """Say what is watched and how to ask."""
        if not self.quiet and not self.json:
            self.line(f"watching {', '.join(names)} into {request.folder}; ask away, Ctrl-C ends")

    def said(self, said: Said) -> None:
        """Something happened to a stream."""
        if self.json:
            self.emit({"event": said.kind, "stream": said.stream, "text": said.text, "at": said.at.isoformat()})
        elif not self.quiet or said.kind in ("lost", "retry", "rules", "delivery"):
            self.line(f"{said.at:%H:%M:%S} {said.stream}: {said.text}")

    def alert(self, message: Mapping[str, Any]) -> None:
        """What was waited for happened."""
        if self.json:
            self.emit({"event": "alert", **message})
            return
        wall = datetime.fromisoformat(message["wall"]).astimezone()
        files = "".join(f"\n  {message[name]}" for name in ("frame", "clip") if message[name])
        self.line(f"ALERT {wall:%H:%M:%S} {message['stream']}: {message['rule']} ({message['reason']}){files}")

    def line(self, text: str) -> None:
        """One line for people."""
        with self._lock:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def emit(self, value: dict[str, Any]) -> None:
        """One line of JSON for programs."""
        with self._lock:
            render.emit_json_line(value)

    def run(self, live: Live, duration: float | None) -> None:
        """Watch until the end, taking questions."""
        until = None if duration is None else time.monotonic() + duration
        if self.terminal:
            self._prompt(live, until)
            return
        asking = threading.Thread(target=self._read_lines, args=(live,), name="questions", daemon=True)
        asking.start()
        told = time.monotonic()
        while not live.wait(0.2):
            now = time.monotonic()
            if until is not None and now >= until:
                live.stop()
            if now - told >= PLAIN_SECONDS:
                told = now
                self._status(live)
        asking.join(0.2)

    def goodbye(self, live: Live) -> None:
        """Say how it went."""
        self._status(live, last=True)

    def ask(self, live: Live, line: str) -> None:
        """Ask and print the answer; errors are a line."""
        stream, question = split_stream(line, [camera.name for camera in live.requests])
        try:
            if self.json:
                self.emit({"event": "answer", "stream": stream, **live.ask(question, stream=stream).result().to_dict()})
                return
            answer = live.ask(question, stream=stream, on_text=_write).result()
            render.finish_answer(answer)
            if self.quiet:
                for warning in answer.receipt.warnings:
                    self.line(f"warning: {warning}")
            else:
                self.line(answer.receipt.short())
        except StreamvidError as reason:
            if self.json:
                self.emit({"event": "error", "stream": stream, "text": str(reason)})
            else:
                self.line(f"error: {reason}")

    def _read_lines(self, live: Live) -> None:
        for line in sys.stdin:
            if line.strip() and live.running:
                self.ask(live, line.strip())

    def _status(self, live: Live, *, last: bool = False) -> None:
        status = live.status()
        if self.json:
            self.emit({"event": "ended" if last else "status", **status})
        elif not self.quiet:
            for text in status_lines(status):
                self.line(text)

    def _prompt(self, live: Live, until: float | None) -> None:
        """A prompt below a status that is kept up to date."""
        from prompt_toolkit import PromptSession
        from prompt_toolkit.patch_stdout import patch_stdout

        prompt: PromptSession[str] = PromptSession()

        def leave() -> None:
            while not live.wait(0.2):
                if until is not None and time.monotonic() >= until:
                    live.stop()
            if prompt.app.is_running and prompt.app.loop is not None:
                prompt.app.loop.call_soon_threadsafe(lambda: prompt.app.exit(exception=EOFError))

        threading.Thread(target=leave, name="leave", daemon=True).start()
        while live.running:
            try:
                with patch_stdout():
                    line = prompt.prompt(
                        "> ", bottom_toolbar=lambda: "\n".join(status_lines(live.status())), refresh_interval=0.5
                    )
            except (EOFError, KeyboardInterrupt):
                break
            if line.strip():
                self.ask(live, line.strip())
        live.stop()


def split_stream(line: str, names: list[str]) -> tuple[str | None, str]:
    """``front: who came?`` as a stream and a question; without a known name there is no stream."""
    head, mark, rest = line.partition(":")
    if mark and head.strip() in names and rest.strip():
        return head.strip(), rest.strip()
    return None, line


def status_lines(status: dict[str, Any]) -> list[str]:
    """The state of each stream in a line, and of the whole in one more."""
    out = []
    for stream in status["streams"]:
        out.append(
            f"{stream['stream']}: {stream['now'][11:19]}  lag {stream['lag_seconds']:.1f} s  "
            f"{stream['fps_now']:g} of {stream['fps_wanted']:g} fps  {stream['frames_watched']} frames"
            + (f" ({stream['frames_dropped']} dropped)" if stream["frames_dropped"] else "")
            + f"  {stream['tokens_seen']:,} -> {stream['tokens_remembered']:,} tokens"
            + (f"  {stream['gaps']} gaps" if stream["gaps"] else "")
            + (f"  AWAY: {stream['away']}" if stream["away"] else "")
            + ("  frozen" if stream["frozen"] else "")
            + ("  black" if stream["black"] else "")
            + (f"  ENDED: {stream['failure']}" if stream["failure"] else "  ended" if stream["ended"] else "")
        )
    limit = status["disk_limit_bytes"]
    out.append(
        f"{render.lasting(status['uptime_seconds'])}  RSS {status['rss_bytes'] / 1e6:.0f} MB  "
        f"disk {status['disk_bytes'] / 1e6:.1f} MB" + (f" of {limit / 1e9:g} GB" if limit else "")
    )
    return out


def _answer_for(live: Live) -> Callable[[str, str, int | None, Callable[[str], None]], dict[str, Any]]:
    def answer(stream: str, question: str, most: int | None, on_text: Callable[[str], None]) -> dict[str, Any]:
        return live.ask(question, stream=stream, max_new_tokens=most, on_text=on_text).result().to_dict()

    return answer


@contextmanager
def _until_told(live: Live) -> Iterator[Live]:
    """Watch; SIGTERM and Ctrl-C end it in order."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for number in before:
            signal.signal(number, lambda *_: live.stop())
        with live:
            yield live
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _as_ask(request: LiveRequest) -> Request:
    return Request(
        model=request.model,
        embedder=request.embedder,
        device=request.device,
        dtype=request.dtype,
        toy_allowed=request.toy_allowed,
        threads=request.threads,
    )


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
