"""Ask about one video file: watch it once, remember it, answer from memory ever after."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from streamvid.budget import Limits
from streamvid.errors import SettingsError
from streamvid.frames import Clip
from streamvid.ingest.clips import clips
from streamvid.ingest.files import check_file
from streamvid.ingest.sampling import Sampling, exact
from streamvid.ingest.source import Source, open_source
from streamvid.memory.bank import Bank, Writer, default_folder
from streamvid.memory.catalog import SourceRecord, State
from streamvid.memory.keys import MemoryKey
from streamvid.models import checkpoints
from streamvid.models.adapter import Adapter
from streamvid.receipt import Receipt
from streamvid.session import Answer, Session, peak_rss_bytes
from streamvid.temporal.methods.base import MemoryMethod
from streamvid.temporal.methods.compose import DEFAULT, Chain
from streamvid.temporal.methods.registry import build

if TYPE_CHECKING:
    from streamvid.models.embedder import Embedder

CLIP_FRAMES = 32
"""Frames encoded and reduced together; the most pictures held at any time."""

CLIP_BYTES = 256 << 20
"""Most bytes of pictures held at any time: clips of very large frames are shorter, down to 8 frames."""


@dataclass(frozen=True, slots=True)
class Request:
    """Everything that can be set about watching and answering; defaults suit one video and one question."""

    model: str = "auto"
    embedder: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    fps: float | None = None
    max_frames: int | None = None
    start_seconds: float | None = None
    stop_seconds: float | None = None
    reduce: str = DEFAULT
    recall: str = "hybrid"
    budget: int = Limits().answer_tokens
    max_new_tokens: int = 256
    memory: Path | None = None
    disk_bytes: int | None = None
    fresh: bool = False
    toy_allowed: bool = True
    decoder: str = "auto"
    threads: int | None = None

    def check(self) -> None:
        """Raise SettingsError for what can be seen to be wrong before anything is loaded."""
        Chain.parse(self.reduce)
        self.recall_method()
        self.limits()
        self.sampling(1.0, 1)
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise SettingsError(f"dtype must be auto, float32, bfloat16 or float16, got {self.dtype!r}")
        if self.max_new_tokens < 1:
            raise SettingsError(f"an answer needs at least 1 new token, got --max-new-tokens {self.max_new_tokens}")

    def limits(self) -> Limits:
        """The hard limits."""
        return Limits(answer_tokens=self.budget, disk_bytes=self.disk_bytes)

    def recall_method(self) -> MemoryMethod:
        """The recall method by name; raises SettingsError if it is not one."""
        method = build(self.recall)
        if not isinstance(method, MemoryMethod):
            raise SettingsError(f"{self.recall} does not recall; it belongs into --reduce")
        return method

    def sampling(self, default_fps: float, max_frames: int) -> Sampling:
        """The sampling, the model's own rate and limit where nothing was asked."""
        return Sampling(
            fps=self.fps if self.fps is not None else default_fps,
            max_frames=self.max_frames if self.max_frames is not None else max_frames,
            start=self.start_seconds,
            stop=self.stop_seconds,
        )


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
    """One video file, one model, any number of questions.

    ``prepare`` watches what is not yet remembered; ``ask`` answers from memory.  A second
    object, in this process or another, finds the memory complete and neither decodes nor encodes.
    """

    def __init__(self, path: str | Path, request: Request, loaded: Loaded, bank: Bank) -> None:
        """Check the file and open its memory; nothing is decoded yet."""
        self.path, self.request, self.loaded, self.bank = check_file(path), request, loaded, bank
        self.session = Session(
            loaded.adapter,
            bank,
            chain=Chain.parse(request.reduce),
            embedder=loaded.embedder,
            recall=request.recall_method(),
            limits=request.limits(),
        )
        self.sampling = request.sampling(loaded.adapter.info.default_fps, loaded.adapter.info.max_frames)
        self.source: SourceRecord | None = None
        self.receipt = Receipt(source=str(path), model=_describe(loaded.adapter))
        for note in loaded.notes:
            self.receipt.warn(note)

    def key(self) -> MemoryKey:
        """What decides whether a memory may be used: content, sampling, model, processor, methods, embedder."""
        info = self.loaded.adapter.info
        chosen = self.sampling
        return MemoryKey(
            content=self.bank.content_digest(self.path),
            sampling={
                "fps": str(exact(chosen.fps)) if chosen.fps is not None else None,
                "max_frames": chosen.max_frames,
                "start": str(exact(chosen.start)) if chosen.start is not None else None,
                "stop": str(exact(chosen.stop)) if chosen.stop is not None else None,
                "decoder": self.request.decoder,
                "clip_frames": CLIP_FRAMES,
                "clip_bytes": CLIP_BYTES,
                "span_frames": self.session.span_frames,
            },
            model=f"{info.fingerprint}/{info.dtype}",
            processor=info.processor_fingerprint,
            methods=self.session.chain.describe(ingest_only=True),
            embedder=self.loaded.embedder.fingerprint if self.loaded.embedder is not None else "none",
        )

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
        self.bank.save_answer(self.source.id, question=question, answer=answer.text, receipt=receipt.to_dict())
        self.receipt = Receipt(source=receipt.source, model=receipt.model, cache="hit", key=receipt.key)
        self.receipt.methods = receipt.methods
        self.receipt.warnings = [w for w in receipt.warnings if "was cut at" not in w]
        self._fill(self.source)
        return answer

    # --- watching ---------------------------------------------------------------------------------------------------

    def _watch(self, key: MemoryKey, on_progress: Callable[[Progress], None] | None) -> None:
        receipt, session = self.receipt, self.session
        began = time.perf_counter()
        with open_source(self.path, decoder=self.request.decoder) as source:
            plan = source.plan(self.sampling)
            fps = plan.fps if plan.fps is not None else Fraction(1)
            stop = plan.stop if plan.stop is not None else source.end
            total = max(1, round((stop - plan.start) * fps))
            with self.bank.writer(key, path=self.path, name=self.path.name) as writer:
                start = plan.start if writer.stop is None else max(plan.start, writer.stop)
                earlier = round((start - plan.start) * fps)
                session.start(height=source.info.height, width=source.info.width, num_frames=total)
                if start < stop:
                    frames = source.frames(Sampling(fps=fps, start=start, stop=stop))
                    length = clip_frames(height=source.info.height, width=source.info.width)
                    timed = _timed(clips(frames, length), receipt)
                    self._clips(timed, writer, 1 / fps, stop, plan.start, began, on_progress)
                summary = self._summary(source, plan.start, stop, fps, earlier)
                for note in (*source.info.notes, *plan.notes, *writer.notes):
                    receipt.warn(note)
                    summary["warnings"].append(note)
                writer.finish(summary, duration=stop - plan.start)

    def _clips(
        self,
        stream: Iterable[Clip],
        writer: Writer,
        interval: Fraction,
        stop: Fraction,
        start: Fraction,
        began: float,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        receipt = self.receipt
        for clip in stream:
            self.session.watch(clip, writer, receipt, interval=interval, until=stop)
            if on_progress is not None:
                on_progress(
                    Progress(
                        float(min(clip.pts[-1] + interval, stop) - start),
                        float(stop - start),
                        receipt.frames_sampled,
                        receipt.tokens_seen,
                        receipt.tokens_remembered,
                        time.perf_counter() - began,
                    )
                )

    def _summary(self, source: Source, start: Fraction, stop: Fraction, fps: Fraction, earlier: int) -> dict[str, Any]:
        """What is kept about the watching, for every later receipt."""
        receipt, report, stats = self.receipt, source.report, source.stats
        receipt.frames_decoded = stats.decoded
        frames = earlier + receipt.frames_sampled
        per_frame = receipt.tokens_seen / max(1, -(-receipt.frames_sampled // self.session.adapter.tubelet))
        seen = receipt.tokens_seen + round(earlier / self.session.adapter.tubelet * per_frame)
        warnings = []
        if stats.skipped:
            warnings.append(f"{stats.skipped} damaged pictures were skipped")
        for warning in warnings:
            receipt.warn(warning)
        return {
            "start_seconds": float(start),
            "stop_seconds": float(stop),
            "duration_seconds": float(source.info.duration) if source.info.duration is not None else None,
            "frames_remembered": frames,
            "tokens_seen": seen,
            "effective_fps": frames / float(stop - start),
            "longest_gap_seconds": float(report.longest_gap) if report is not None else float(1 / fps),
            "decoder": source.info.decoder,
            "warnings": warnings,
        }

    def _fill(self, source: SourceRecord) -> None:
        """Put what is known about the remembered video into the receipt."""
        receipt, summary = self.receipt, source.summary
        for name in (
            "start_seconds", "stop_seconds", "duration_seconds", "frames_remembered", "tokens_seen",
            "effective_fps", "longest_gap_seconds",
        ):  # fmt: skip
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
    check_file(path)
    folder = request.memory if request.memory is not None else default_folder()
    with Bank.open(folder, limits=request.limits()) as bank:
        yield AskVideo(path, request, load(request, say), bank)


def _timed(stream: Iterable[Clip], receipt: Receipt) -> Iterator[Clip]:
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
