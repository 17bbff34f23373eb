"""Ask about one video file: watch it once, remember it, answer from memory ever after."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import torch

from streamvid.errors import SettingsError
from streamvid.frames import Clip
from streamvid.ingest.clips import followed
from streamvid.ingest.named import Named, find
from streamvid.ingest.sampling import Plan, Sampling, exact
from streamvid.ingest.source import Source, open_source
from streamvid.ingest.spool import spool_stdin
from streamvid.memory.bank import Bank
from streamvid.memory.keys import MemoryKey
from streamvid.memory.place import default_folder
from streamvid.memory.records import SourceRecord, State
from streamvid.memory.writer import Writer
from streamvid.models import checkpoints
from streamvid.models.adapter import Adapter
from streamvid.receipt import Receipt
from streamvid.session import Answer, Session, peak_rss_bytes
from streamvid.temporal.methods.compose import Chain
from streamvid_pipelines.request import Request

__all__ = ["AskVideo", "Loaded", "Progress", "Request", "ask", "clip_frames", "expected_frames", "load", "open_ask"]

if TYPE_CHECKING:
    from streamvid.models.embedder import Embedder

CLIP_FRAMES = 32
"""Frames encoded and reduced together; the most pictures held at any time."""

CLIP_BYTES = 256 << 20
"""Most bytes of pictures held at any time: clips of very large frames are shorter, down to 8 frames."""


FULL_PIXELS = 1920 * 1088
"""Frames of up to so many pixels reach the model's own, exact resize; larger ones are scaled to its size as they
are decoded, so that no memory is spent on what it would throw away."""


@dataclass(slots=True)
class Progress:
    """How far the watching is."""

    seconds_done: float
    seconds_total: float | None
    frames: int
    tokens_seen: int
    tokens_remembered: int
    wall_seconds: float

    @property
    def speed(self) -> float:
        """Video seconds a wall-clock second."""
        return self.seconds_done / self.wall_seconds if self.wall_seconds > 0 else 0.0

    @property
    def eta_seconds(self) -> float | None:
        """Wall-clock seconds still to go; None where the length is not known."""
        if self.seconds_total is None or self.speed <= 0:
            return None
        return max(0.0, self.seconds_total - self.seconds_done) / self.speed


@dataclass(slots=True)
class Loaded:
    """A model, its embedder and what was said while finding them."""

    adapter: Adapter
    embedder: Embedder | None
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0


def load(request: Request, say: Callable[[str], None]) -> Loaded:
    """Find and load the model a request asks for."""
    began = time.perf_counter()
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    device = checkpoints.pick_device(request.device)
    found = checkpoints.find(request.model, device=device, say=say, toy_allowed=request.toy_allowed)
    notes = list(found.notes)
    adapter = checkpoints.load(found, device=device, dtype=request.dtype)
    embedder = checkpoints.find_embedder(request.embedder, model=found.name, device=device)
    if embedder is None:
        notes.append("no image-text encoder is at hand, so recall goes by time alone (see `streamvid doctor`)")
    return Loaded(adapter, embedder, notes, time.perf_counter() - began)


class AskVideo:
    """One video, one model, any number of questions.

    ``prepare`` watches what is not yet remembered; ``ask`` answers from memory.  A second
    object, in this process or another, finds the memory complete and neither decodes nor encodes.
    """

    def __init__(self, source: str | Path | Named, request: Request, loaded: Loaded, bank: Bank) -> None:
        """Recognise what is to be watched and open its memory; nothing is decoded yet."""
        self.named = named = source if isinstance(source, Named) else find(source, rate=request.rate)
        self.request, self.loaded, self.bank = request, loaded, bank
        self.session = Session(
            loaded.adapter,
            bank,
            chain=Chain.parse(request.reduce),
            embedder=loaded.embedder,
            recall=request.recall_method(),
            limits=request.limits(),
            keep_kv=request.keep_kv,
        )
        self.sampling = request.sampling(loaded.adapter.info.default_fps, loaded.adapter.info.max_frames)
        self.source: SourceRecord | None = None
        self.receipt = Receipt(source=named.name, model=_describe(loaded.adapter))
        for note in (*loaded.notes, *bank.notes):
            self.receipt.warn(note)

    def key(self) -> MemoryKey:
        """What decides whether a memory may be used: content, sampling, model, processor, methods, embedder."""
        info = self.loaded.adapter.info
        chosen = self.sampling
        return MemoryKey(
            content=self._content(),
            sampling={
                "mode": self.request.sample,
                "adaptive": {k: str(v) for k, v in asdict(chosen.adaptive).items()} if chosen.adaptive else None,
                "rate": str(self.named.rate) if self.named.rate is not None else None,
                "fps": str(exact(chosen.fps)) if chosen.fps is not None else None,
                "max_frames": chosen.max_frames,
                "start": str(exact(chosen.start)) if chosen.start is not None else None,
                "stop": str(exact(chosen.stop)) if chosen.stop is not None else None,
                "decoder": self.request.decoder,
                "hwaccel": self.request.hwaccel,
                "clip_frames": CLIP_FRAMES,
                "clip_bytes": CLIP_BYTES,
                "full_pixels": FULL_PIXELS,
                "span_frames": self.session.span_frames,
            },
            model=f"{info.fingerprint}/{info.dtype}",
            processor=info.processor_fingerprint,
            methods=self.session.chain.describe(ingest_only=True),
            embedder=self.loaded.embedder.fingerprint if self.loaded.embedder is not None else "none",
        )

    def _content(self) -> str:
        """What names the bytes; made up, so that it is never found again, where nothing does."""
        if self.named.file is not None:
            return self.bank.content_digest(self.named.file)
        told = self.named.identity()
        if told is None:
            self.receipt.warn(
                f"nothing tells whether {self.named.name} will be the same tomorrow: its memory is kept, but another "
                "run watches it again"
            )
        return f"{self.named.kind}:{told if told is not None else uuid4().hex}"

    def prepare(self, on_progress: Callable[[Progress], None] | None = None) -> None:
        """Make sure the video is remembered, watching what is missing."""
        began = time.perf_counter()
        key = self.key()
        receipt = self.receipt
        receipt.key = key.short
        receipt.methods = self.session.chain.describe()
        found = self.bank.find(key)
        if found is not None and self.request.fresh:
            self.bank.remove(found)
            found = None
        receipt.stage("look up").seconds += time.perf_counter() - began
        if found is not None and found.state is State.COMPLETE:
            receipt.cache = "hit"
        else:
            receipt.cache = "miss" if found is None or not found.spans else "partial"
            self._watch(key, on_progress)
            found = self.bank.find(key)
            assert found is not None
        if self.request.keep and not found.pinned and not self.bank.read_only:
            found = self.bank.pin(found)
        self.source = found
        self._fill(found)

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """Answer one question; its receipt is the account of this question.

        The first answer's receipt includes the watching; later ones are hits.
        """
        if self.source is None:
            self.prepare()
        assert self.source is not None
        receipt = self.receipt
        answer = self.session.ask(
            question, self.source, receipt, max_new_tokens=self.request.max_new_tokens, on_text=on_text
        )
        if self.bank.read_only:
            receipt.warn("the answer is not kept: memory is open for reading only", passing=True)
        else:
            self.bank.save_answer(self.source.id, question=question, answer=answer.text, receipt=receipt.to_dict())
        self.receipt = Receipt(source=receipt.source, model=receipt.model, cache="hit", key=receipt.key)
        self.receipt.methods = receipt.methods
        self.receipt.warnings = [w for w in receipt.warnings if w not in receipt.passing]
        self._fill(self.source)
        return answer

    # --- watching ---------------------------------------------------------------------------------------------------

    def _watch(self, key: MemoryKey, on_progress: Callable[[Progress], None] | None) -> None:
        receipt, session = self.receipt, self.session
        began = time.perf_counter()
        settings = self.request.decoding()
        with open_source(
            self.named,
            decoder=settings.decoder,
            threads=settings.threads,
            hwaccel=settings.hwaccel,
            stall_seconds=settings.stall_seconds,
        ) as source:
            plan = source.plan(self.sampling)
            stop = plan.stop if plan.stop is not None else source.end
            total = expected_frames(plan, stop)
            name = self.named.path.name if self.named.path is not None else self.named.name
            with self.bank.writer(key, path=self.named.path or Path(self.named.name), name=name) as writer:
                start = plan.start if writer.stop is None else max(plan.start, writer.stop)
                earlier = self._frames_of(key) if start > plan.start else 0
                session.start(height=source.info.height, width=source.info.width, num_frames=total)
                height, width = source.info.height, source.info.width
                size = session.size if height * width > FULL_PIXELS else None
                if size is not None:
                    height, width = size
                if start < stop:
                    frames = source.frames(self._rest(plan, start, stop, earlier), size=size)
                    length = clip_frames(height=height, width=width)
                    timed = _timed(followed(frames, length), receipt)
                    interval = 1 / plan.fps if plan.mode == "rate" and plan.fps is not None else None
                    self._clips(timed, writer, interval, stop, plan.start, began, on_progress)
                summary = self._summary(source, plan, stop, earlier)
                report = source.report
                seen = report.notes if report is not None else plan.notes
                for note in dict.fromkeys((*source.info.notes, *plan.notes, *seen, *writer.notes)):
                    receipt.warn(note)
                    summary["warnings"].append(note)
                writer.finish(summary, duration=stop - plan.start)

    def _rest(self, plan: Plan, start: Fraction, stop: Fraction, earlier: int) -> Sampling:
        """What is still to be sampled of a plan, from ``start`` on."""
        if plan.mode == "rate":
            return Sampling(fps=plan.fps, start=start, stop=stop)
        most = self.sampling.max_frames
        return replace(
            self.sampling, start=start, stop=stop, max_frames=max(1, most - earlier) if most is not None else None
        )

    def _frames_of(self, key: MemoryKey) -> int:
        """Frames that an unfinished memory is made of."""
        found = self.bank.find(key)
        spans = self.bank.spans(found.id) if found is not None else []
        return sum(span.grid[0] for span in spans) * self.session.adapter.tubelet

    def _clips(
        self,
        stream: Iterable[tuple[Clip, Fraction | None]],
        writer: Writer,
        interval: Fraction | None,
        stop: Fraction,
        start: Fraction,
        began: float,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        receipt = self.receipt
        for clip, following in stream:
            # At a rate the last frame counts for one interval, else until the next one comes.
            gone = clip.pts[-1] + interval if interval is not None else following if following is not None else stop
            self.session.watch(clip, writer, receipt, interval=gone - clip.pts[-1], until=stop)
            if on_progress is not None:
                on_progress(
                    Progress(
                        float(min(gone, stop) - start),
                        float(stop - start),
                        receipt.frames_sampled,
                        receipt.tokens_seen,
                        receipt.tokens_remembered,
                        time.perf_counter() - began,
                    )
                )

    def _summary(self, source: Source, plan: Plan, stop: Fraction, earlier: int) -> dict[str, Any]:
        """What is kept about the watching, for every later receipt."""
        receipt, report, stats, start = self.receipt, source.report, source.stats, plan.start
        receipt.frames_decoded = stats.decoded
        frames = earlier + receipt.frames_sampled
        per_frame = receipt.tokens_seen / max(1, -(-receipt.frames_sampled // self.session.adapter.tubelet))
        seen = receipt.tokens_seen + round(earlier / self.session.adapter.tubelet * per_frame)
        warnings = list(stats.warnings())
        for warning in warnings:
            receipt.warn(warning)
        return {
            "start_seconds": float(start),
            "stop_seconds": float(stop),
            "duration_seconds": float(source.info.duration) if source.info.duration is not None else None,
            "frames_remembered": frames,
            "tokens_seen": seen,
            "effective_fps": frames / float(stop - start),
            "longest_gap_seconds": float(report.longest_gap) if report is not None else 0.0,
            "sampling": plan.mode,
            "frames_looked_at": report.looked if report is not None else 0,
            "decoder": source.info.decoder,
            "decoder_reason": source.info.chosen,
            "decoding": {name: count for name, count in stats.as_dict().items() if count},
            "warnings": warnings,
        }

    def _fill(self, source: SourceRecord) -> None:
        """Put what is known about the remembered video into the receipt."""
        receipt, summary = self.receipt, source.summary
        for name in (
            "start_seconds", "stop_seconds", "duration_seconds", "frames_remembered", "tokens_seen",
            "effective_fps", "longest_gap_seconds", "sampling", "frames_looked_at", "decoder", "decoder_reason",
            "decoding",
        ):  # fmt: skip
            if name in summary:
                setattr(receipt, name, summary[name])
        receipt.tokens_remembered = source.tokens
        receipt.memory_bytes = source.num_bytes
        receipt.peak_rss_bytes = peak_rss_bytes()
        for warning in summary.get("warnings", ()):
            receipt.warn(warning)


def clip_frames(*, height: int, width: int) -> int:
    """Frames of this size in one clip: even, so that temporal patches come out whole."""
    return max(min(CLIP_FRAMES, 8), min(CLIP_FRAMES, CLIP_BYTES // (height * width * 3) // 2 * 2))


def ask(
    path: str | Path,
    questions: str | Sequence[str],
    *,
    on_text: Callable[[str], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
    **settings: Any,
) -> list[Answer]:
    """Ask one or several questions about a video file.

    Args:
        path: the video.
        questions: one question or several.
        on_text: gets pieces of the answers as they become certain.
        on_progress: called after each watched clip.
        say: told before anything large happens (a download).
        **settings: fields of ``Request``.

    Raises:
        StreamvidError: with one line that says what to do.
    """
    asked = [questions] if isinstance(questions, str) else list(questions)
    with open_ask(path, Request(**settings), say) as video:
        video.prepare(on_progress)
        return [video.ask(question, on_text) for question in asked]


@contextmanager
def open_ask(path: str | Path, request: Request, say: Callable[[str], None]) -> Iterator[AskVideo]:
    """An ``AskVideo`` over the memory folder of the request, closed in the end.

    Everything that can be seen to be wrong is found before a model is loaded.
    """
    request.check()
    with ExitStack() as stack:
        if str(path) == "-":
            spool = stack.enter_context(spool_stdin(sys.stdin.buffer))
            named = replace(find(spool.path, rate=request.rate), name=spool.name)
        else:
            named = find(path, rate=request.rate)
        if named.endless and request.stop_seconds is None:
            raise SettingsError(f"{named.name} has no end; say how long to watch, as in --to 30")
        folder = request.memory if request.memory is not None else default_folder()
        bank = stack.enter_context(Bank.open(folder, codec=request.codec, limits=request.limits()))
        yield AskVideo(named, request, load(request, say), bank)


def expected_frames(plan: Plan, stop: Fraction) -> int:
    """How many frames a plan will give, as far as can be told; never more than it allows."""
    rate = plan.fps if plan.fps is not None else Fraction(1)
    expected = max(1, round((stop - plan.start) * rate))
    return expected if plan.max_frames is None else min(expected, plan.max_frames)


def _timed(stream: Iterable[tuple[Clip, Fraction | None]], receipt: Receipt) -> Iterator[tuple[Clip, Fraction | None]]:
    """The same clips, with the time each took to decode noted."""
    iterator = iter(stream)
    for _ in itertools.count():
        began = time.perf_counter()
        clip = next(iterator, None)
        cost = receipt.stage("decode video")
        cost.seconds += time.perf_counter() - began
        if clip is None:
            return
        yield clip


def _describe(adapter: Adapter) -> str:
    info = adapter.info
    size = f"{info.parameters / 1e9:.1f}B" if info.parameters >= 1e8 else f"{info.parameters / 1e6:.1f}M"
    return f"{info.name} ({size} parameters, {info.dtype} on {info.device})"
