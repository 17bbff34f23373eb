"""A session: one stream watched through one model, remembered, and asked about."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from streamvid.budget import Limits
from streamvid.errors import BankError, SettingsError, UnsupportedError, Vanished
from streamvid.frames import Clip
from streamvid.memory.bank import Bank
from streamvid.memory.bounds import fitting_tokens
from streamvid.memory.kv import KeptKv
from streamvid.memory.records import GapRecord, SourceRecord, SpanRecord
from streamvid.memory.writer import Writer
from streamvid.models.adapter import Adapter, GenerationStats
from streamvid.models.pixels import tubelet_times
from streamvid.models.prefix import Prefix
from streamvid.query.evidence import Clock, Moment, cite
from streamvid.query.looking import Looking, Seen
from streamvid.query.when import Range, When, understand
from streamvid.receipt import GivenSpan, Receipt, TimeFilter
from streamvid.recollection import Recollection
from streamvid.signals import Signal, Signals
from streamvid.temporal.methods.base import MemoryMethod
from streamvid.temporal.methods.compose import DEFAULT, Chain
from streamvid.temporal.methods.memory.hybrid import Hybrid
from streamvid.temporal.methods.registry import method_id
from streamvid.tokens import VideoTokens

if TYPE_CHECKING:
    from streamvid.models.embedder import Embedder

HOST_SIGNALS = frozenset({Signal.RECEIVED_ATTENTION, Signal.FRAME_FEATURES})
"""Signals every adapter can give."""

LOOKED_AT_TOKENS = 512
"""Visual tokens in one pass when the model is asked which spans it looks at: bounds what that pass holds."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said, where it can be seen, and how it came about."""

    question: str
    text: str
    spans: tuple[tuple[float, float], ...]
    """[start, stop) in seconds, only of moments the model was given."""

    receipt: Receipt
    origin: datetime | None = None
    """Of a live source the time on the wall at second 0."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; of a live source the spans also by the clock on the wall."""
        told: dict[str, Any] = {
            "question": self.question,
            "answer": self.text,
            "spans": [[round(start, 3), round(stop, 3)] for start, stop in self.spans],
        }
        if self.origin is not None:
            told["wall"] = [[self._wall(start), self._wall(stop)] for start, stop in self.spans]
        return {**told, "receipt": self.receipt.to_dict()}

    def _wall(self, seconds: float) -> str:
        assert self.origin is not None
        return (self.origin + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")


@dataclass(frozen=True, slots=True)
class Watched:
    """What came of one clip, T temporal patches in time order."""

    times: list[tuple[Fraction, Fraction]]
    """[start, stop) of each, in seconds, exact."""

    keys: Tensor
    """(T, Dk) unit vectors of the pictures; zeros, or of width 0, where there is no embedder."""

    changed: Tensor
    """(T,) 0..1 share of the cells that were encoded: 0 where a picture is like the one before."""

    tokens: int
    """Remembered."""


class Session:
    """One stream: ``start``, ``watch`` clip after clip, ``finish``; ``ask`` whenever there is a memory.

    Args:
        adapter: the loaded model.
        bank: where tokens are remembered.
        chain: methods that reduce tokens; those between decoder layers act when a question is asked.
        embedder: finds moments that fit a question; None recalls by time alone.
        recall: how an answer's budget is spent on the memory.
        limits: hard limits.
        span_frames: temporal patches remembered together; smaller finds moments more finely and
            costs more rows in the catalogue.
        keep_kv: keep what the language model computed for the video beside the memory, for the next question in
            any process; methods inside the language model are left out, as what they leave depends on the question.

    Raises:
        SettingsError: if a method needs a signal this model cannot give.
    """

    def __init__(
        self,
        adapter: Adapter,
        bank: Bank,
        *,
        chain: Chain | None = None,
        embedder: Embedder | None = None,
        recall: MemoryMethod | None = None,
        limits: Limits | None = None,
        span_frames: int = 4,
        keep_kv: bool = False,
    ) -> None:
        self.adapter, self.bank, self.embedder = adapter, bank, embedder
        self.chain = (chain if chain is not None else Chain.parse(DEFAULT)).spawn()
        self.recall = recall if recall is not None else Hybrid()
        self.limits = limits if limits is not None else Limits()
        self.span_frames = span_frames
        self.keep_kv = keep_kv
        self._prefix: tuple[int, Prefix] | None = None
        for method in self.chain.methods:
            lacking = method.needs - HOST_SIGNALS - ({Signal.QUESTION} if embedder else set())
            if lacking:
                raise SettingsError(
                    f"{method_id(method)} needs {', '.join(sorted(lacking))}, which {adapter.info.name} does not give"
                )
        if Signal.QUESTION in self.recall.needs and embedder is None:
            raise SettingsError(
                f"{method_id(self.recall)} recalls by how well pictures fit the question and no image-text encoder is "
                "at hand; use --recall coverage, or see `streamvid doctor` for how to get one"
            )
        self._size: tuple[int, int] | None = None
        self._last_key: Tensor | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) in which the model sees the frames of the stream that was started."""
        return self._size

    # --- watching ---------------------------------------------------------------------------------------------------

    def start(self, *, height: int, width: int, num_frames: int) -> None:
        """Begin a stream of frames of this size.

        Args:
            height: of the frames, in pixels.
            width: of the frames, in pixels.
            num_frames: how many frames will be sampled in all, as far as is known.
        """
        self._size = self.adapter.frame_size(height=height, width=width, num_frames=num_frames)
        self._last_key = None
        self.adapter.reset()
        for method in self.chain.methods:
            method.reset()

    @torch.inference_mode()
    def watch(
        self, clip: Clip, writer: Writer, receipt: Receipt, *, interval: Fraction, until: Fraction | None = None
    ) -> Watched:
        """Encode, reduce and remember one clip.

        Args:
            clip: the next frames of the stream.
            writer: the memory it goes to.
            receipt: gets counts and seconds of the stages.
            interval: time from one sampled frame to the next; how long the last frame counts.
            until: end of the video, if known: no span reaches beyond it.
        """
        if self._size is None:
            raise ValueError("start the stream before watching clips")
        times = tubelet_times(clip.pts, interval, self.adapter.tubelet)
        if until is not None and times[-1][0] < until < times[-1][1]:
            times[-1] = (times[-1][0], until)
        began = time.perf_counter()
        view = self.adapter.view(clip, size=self._size)
        frames, rows, columns = view.grid
        total = frames * rows * columns
        keep: Tensor | None = None
        for pixel in self.chain.pixel:
            plan = pixel.select(view, Signals())
            if plan is not None:
                chosen = torch.zeros(total, dtype=torch.bool)
                chosen[plan.leader().cpu()] = True
                keep = chosen if keep is None else keep & chosen
        index = None if keep is None else keep.nonzero().squeeze(1)
        _spent(receipt, "pixel", began, total, total if index is None else len(index))

        began = time.perf_counter()
        seconds = [(float(a), float(b)) for a, b in times]
        encoded = self.adapter.encode(view, seconds, keep=index)
        _spent(receipt, "encode", began, len(encoded.tokens), len(encoded.tokens))

        began = time.perf_counter()
        signals = Signals(received_attention=encoded.received_attention, frame_features=encoded.frame_features)
        tokens = replace(encoded.tokens, score=importance(encoded.tokens.features))
        for method in self.chain.embedding:
            plan = method.reduce(tokens, signals)
            if plan is None:
                continue
            plan = plan.sorted()
            tokens = tokens.reduce(plan)
            assert signals.received_attention is not None
            signals = replace(signals, received_attention=plan.locate(signals.received_attention))
        _spent(receipt, "reduce", began, len(encoded.tokens), len(tokens))

        began = time.perf_counter()
        cells = encoded.tokens.position[:, 0].bincount(minlength=frames)
        fresh = cells > 0
        keys = self._keys(clip, fresh)
        _spent(receipt, "embed", began, int(fresh.sum()), frames)

        began = time.perf_counter()
        for first in range(0, frames, self.span_frames):
            last = min(first + self.span_frames, frames)
            here = (tokens.position[:, 0] >= first) & (tokens.position[:, 0] < last)
            part = tokens.select(here)
            part = replace(
                part,
                position=part.position - torch.tensor([first, 0, 0]),
                grid=(last - first, rows, columns),
            )
            if len(part):
                writer.append(part, start=times[first][0], stop=times[last - 1][1], keys=keys[first:last])
        _spent(receipt, "store", began, len(tokens), len(tokens))
        receipt.tokens_seen += total
        receipt.tokens_encoded += len(encoded.tokens)
        receipt.tokens_remembered += len(tokens)
        receipt.frames_sampled += len(clip)
        receipt.frames_encoded += min(int(fresh.sum()) * self.adapter.tubelet, len(clip))
        return Watched(times, keys, cells.float() / (rows * columns), len(tokens))

    def _keys(self, clip: Clip, fresh: Tensor) -> Tensor:
        """(T, Dk) one key per temporal patch; a patch in which nothing changed has the key of the one before."""
        if self.embedder is None:
            return torch.zeros(len(fresh), 0)
        tubelet = self.adapter.tubelet
        wanted = fresh.nonzero().squeeze(1)
        found = torch.zeros(len(fresh), self.embedder.width)
        if len(wanted):
            found[wanted] = self.embedder.frames(clip.pixels[wanted * tubelet])
        for index in range(len(fresh)):
            if not fresh[index]:
                previous = found[index - 1] if index else self._last_key
                found[index] = previous if previous is not None else 0
        self._last_key = found[-1].clone()
        return found

    # --- asking -----------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def ask(
        self,
        question: str,
        source: SourceRecord,
        receipt: Receipt,
        *,
        max_new_tokens: int = 256,
        on_text: Callable[[str], None] | None = None,
        origin: datetime | None = None,
        now: float | None = None,
        within: Range | None = None,
        lost: Sequence[GapRecord] = (),
    ) -> Answer:
        """Answer a question from what is remembered of a source.

        A question that names a time ("between 1:00 and 2:00", "before the dog appears"; see
        `query.when.understand`) is answered from that time alone.  If nothing is remembered of it, the
        answer says so, in our words and not the model's: the search is never widened.

        Args:
            question: anything but blank.
            source: whose memory to read.
            receipt: gets what was recalled and spent.
            max_new_tokens: longest answer.
            on_text: called with each piece of the answer as it becomes certain.
            origin: the time on the wall at second 0 of a live source; None leaves such times alone.
            now: seconds of a live source up to which it was watched: what "the last minute" ends with.
            within: [start, stop) in seconds to answer from, whatever the question says of time.
            lost: gaps that are not on record, such as the time since nobody watches.

        Raises:
            SettingsError: if the question is blank.
            UnsupportedError: if the question alone does not fit the model.
        """
        if not question.strip():
            raise SettingsError('the question is empty; ask something like: streamvid ask video.mp4 "what happens?"')
        began = time.perf_counter()
        for left in (2, 1, 0):  # a stream that is watched meanwhile may merge what was just looked up
            memory = Recollection(self.bank, source, receipt, until=now, lost=lost)
            try:
                recalled = self._recall(question, memory, receipt, origin, within)
                break
            except Vanished:
                if not left:
                    raise
        if isinstance(recalled, When):
            return _nothing_remembered(question, recalled, memory, Clock(origin, now), receipt, on_text)
        rows, spans, parts, put = recalled
        tokens = VideoTokens.cat(parts) if parts else None
        receipt.tokens_given = 0 if tokens is None else len(tokens)
        _spent(receipt, "recall", began, int(memory.view.tokens.sum()), receipt.tokens_given)

        methods = [method.spawn() for method in self.chain.llm]
        if methods and self.keep_kv:
            left_out = ", ".join(method_id(method) for method in methods)
            receipt.warn(f"{left_out} left out: keys and values that are kept must not depend on the question")
            methods = []
        prefix = None if methods else self._prefix_of(source)
        prompt = self.adapter.prompt(tokens, put)
        stats = GenerationStats()
        pieces: list[str] = []
        for piece in self.adapter.generate(
            prompt, max_new_tokens=max_new_tokens, methods=methods, stats=stats, prefix=prefix
        ):
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)
        text = "".join(pieces).strip()
        if prefix is not None and self.keep_kv and stats.reused_tokens < prefix.length:
            try:
                self.bank.keep_kv(source, KeptKv(prefix.blocks, prefix.layers))
            except BankError as reason:
                receipt.warn(str(reason))
        receipt.reused_tokens = stats.reused_tokens
        receipt.prompt_tokens, receipt.new_tokens, receipt.stopped = (
            stats.prompt_tokens,
            stats.new_tokens,
            stats.stopped,
        )
        receipt.tokens_last_layer = stats.visual_tokens_last_layer
        prefill, decode = receipt.stage("prefill"), receipt.stage("decode")
        prefill.seconds += stats.prefill_seconds
        prefill.tokens_in, prefill.tokens_out = stats.visual_tokens, stats.visual_tokens_last_layer
        decode.seconds += stats.decode_seconds
        decode.tokens_out = stats.new_tokens
        if stats.stopped == "length":
            receipt.warn(
                f"the answer was cut at {max_new_tokens} tokens; raise --max-new-tokens for the rest", passing=True
            )
        embed = self.embedder.texts if self.embedder is not None else None
        moments = _moments(spans, parts, memory.keys(rows))
        cited = cite(text, question, moments, embed)
        receipt.peak_rss_bytes = peak_rss_bytes()
        return Answer(question, text, tuple(cited), receipt, origin)

    def _prefix_of(self, source: SourceRecord) -> Prefix:
        """Keys and values of the latest prompt about a source, from this session or kept on disk."""
        if self._prefix is None or self._prefix[0] != source.id:
            kept = self.bank.kept_kv(source) if self.keep_kv else None
            found = Prefix() if kept is None else Prefix(kept.blocks, kept.layers)
            self._prefix = source.id, found
        return self._prefix[1]

    def _recall(
        self, question: str, memory: Recollection, receipt: Receipt, origin: datetime | None, within: Range | None
    ) -> tuple[Tensor, list[SpanRecord], list[VideoTokens], str] | When:
        """What is given: rows (M,), spans, their tokens and the question; or the time nothing is remembered of.

        Of a live source the question is put without its words of time: the model is shown that time and no other,
        and its own stamps, which count from the beginning, know neither "now" nor 14:05.
        """
        budget = self._fitting_budget(question, int(memory.view.tokens.sum()), receipt)
        when = self._when(question, memory, origin) if within is None else When((within,))
        sought = when.without(question) or question
        asked = self.embedder.texts([sought])[0] if self.embedder else None
        if asked is not None:
            memory.ask_for(asked)
        rows = memory.inside(when)
        receipt.budget, receipt.recall = budget, method_id(self.recall)
        receipt.recall_settings = self.recall.settings()
        put = question if origin is None else when.put(question)
        notes = [*when.notes, *([f"the model was asked: {put}"] if put != question else [])]
        receipt.time = TimeFilter(list(when.ranges), list(when.words), notes, len(rows)) if when else None
        for note in when.unused:
            receipt.warn(note, passing=True)
        if when and not len(rows):
            return when
        tell = Clock(origin, memory.seen[1])
        for gap in memory.gaps(when):
            receipt.warn(f"no video {tell.span(float(gap.start), float(gap.stop))}: {gap.reason}", passing=True)
        looked: dict[int, float] = {}
        view = replace(memory.view, attention=lambda *wanted: self._attention(question, memory, looked, *wanted))
        counts = self.recall.recall(view.select(rows) if when else view, budget, Signals(question=asked))
        rows, counts = rows[counts > 0], counts[counts > 0]
        spans = memory.records(rows)
        parts = self.bank.read(list(zip(spans, counts.tolist(), strict=True)))
        if when:
            rows, parts = memory.shown(when, rows, parts, budget)
            if not parts:
                return when
            spans, counts = memory.records(rows), torch.tensor([len(part) for part in parts])
        similar = view.similarity
        receipt.spans = [
            GivenSpan(
                float(span.start), float(span.stop),
                None if similar is None else float(similar[row]), count, span.tokens, looked.get(row),
            )
            for row, count, span in zip(rows.tolist(), counts.tolist(), spans, strict=True)
        ]  # fmt: skip
        return rows, spans, parts, put

    def _when(self, question: str, memory: Recollection, origin: datetime | None) -> When:
        """The time a question speaks of; an event in it is looked for among the memory's keys."""
        if not len(memory):
            return When()
        embedder = self.embedder
        find = None if embedder is None or not memory.view.key_width else lambda name: memory.find(name, embedder)
        return understand(question, start=memory.seen[0], stop=memory.seen[1], origin=origin, find=find)

    def _attention(
        self,
        question: str,
        memory: Recollection,
        looked: dict[int, float],
        rows: Tensor,
        tokens_each: int,
        depth: float,
    ) -> Tensor:
        """(M,) what the model pays spans when it reads the question; see ``MemoryView.attention``."""
        together = max(1, LOOKED_AT_TOKENS // tokens_each)
        out = []
        for some in torch.split(rows, together):
            parts = self.bank.read([(span, min(tokens_each, span.tokens)) for span in memory.records(some)])
            out.append(self._looks(question, parts, depth))
        score = torch.cat(out) if out else torch.zeros(0)
        looked.update(zip(rows.tolist(), score.tolist(), strict=True))
        return score

    def _looks(self, question: str, parts: list[VideoTokens], depth: float) -> Tensor:
        """(M,) the best-looked-at token of each part, in one pass over them all."""
        prompt = self.adapter.prompt(VideoTokens.cat(parts), question)
        asking = len(prompt.visual) - 2 - int(prompt.visual.nonzero()[-1])  # without the mark that closes the frame
        probe = Looking(depth=depth, question=asking)
        with suppress(Seen):
            for _ in self.adapter.generate(prompt, max_new_tokens=1, methods=[probe]):
                pass
        assert probe.scores is not None
        of = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor([len(part) for part in parts]))
        return torch.zeros(len(parts)).scatter_reduce_(0, of, probe.scores, "amax")

    def _fitting_budget(self, question: str, remembered: int, receipt: Receipt) -> int:
        """The answer's token budget, stepped down to what the model's context leaves room for."""
        room = self.adapter.info.context_tokens
        fixed = self.adapter.prompt(None, question).input_ids.shape[1] + 256
        if fixed >= room:
            raise UnsupportedError(
                f"the question takes {fixed} tokens and {self.adapter.info.name} reads {room}; shorten the question"
            )
        # a frame with a single token left costs its time stamp too: count on one stamp per eight tokens
        share = 1 + self.adapter.prompt_overhead(1) / 8
        most = max(1, int((room - fixed) / share))
        if min(self.limits.answer_tokens, remembered) > most:
            receipt.warn(
                f"the budget of {self.limits.answer_tokens} tokens was lowered to {most}, what the model can read"
            )
        device = self.adapter.info.device
        fitting = fitting_tokens(self.limits, self.adapter.token_bytes, used_bytes(device), device=device)
        fitting = max(1, int(fitting / share) - fixed) if fitting < self.limits.answer_tokens else fitting
        if fitting < min(self.limits.answer_tokens, remembered, most):
            receipt.warn(f"the budget was lowered to {fitting} tokens, what the limit on memory leaves room for")
        most = min(most, fitting)
        return min(self.limits.answer_tokens, most)


def importance(features: Tensor) -> Tensor:
    """(N,) how far each token is from the mean token of its clip, 1 on average: what stands out comes first."""
    if not len(features):
        return torch.zeros(0)
    rows = features.float()
    away = (rows - rows.mean(0)).norm(dim=1).cpu()
    share: Tensor = away / away.mean().clamp_min(1e-12)
    return share


def used_bytes(device: str) -> int:
    """Memory in use now: of the accelerator, else of this process."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # a system without it: at most what it was at its peak
        return peak_rss_bytes()
    return pages * resource.getpagesize()


def peak_rss_bytes() -> int:
    """Most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _nothing_remembered(
    question: str,
    when: When,
    memory: Recollection,
    tell: Clock,
    receipt: Receipt,
    on_text: Callable[[str], None] | None,
) -> Answer:
    """The program's own answer where memory holds nothing of the time that was asked about."""
    text = f"nothing is remembered of {when.describe(tell)}"
    gaps = memory.gaps(when)
    if gaps:
        told = [f"no video {tell.span(float(gap.start), float(gap.stop))}: {gap.reason}" for gap in gaps[:3]]
        more = [f"{len(gaps) - 3} more such gaps"] if len(gaps) > 3 else []
        text += f" ({'; '.join(told + more)})"
    text += f"; the memory covers {tell.span(*memory.seen)}"
    receipt.warn(f"{text}; the model was not asked", passing=True)
    receipt.spans, receipt.tokens_given, receipt.stopped = [], 0, "time"
    receipt.peak_rss_bytes = peak_rss_bytes()
    if on_text is not None:
        on_text(text)
    return Answer(question, text, (), receipt, tell.origin)


def _moments(spans: Sequence[SpanRecord], parts: Sequence[VideoTokens], keys: Tensor) -> list[Moment]:
    """The frames the given tokens belong to, each with its key and for as long as nothing changed.

    A frame in which nothing changed was not encoded and has the very key of the frame before it: the
    tokens given of that one stand for it too.
    """
    out: list[Moment] = []
    for span, part, rows in zip(spans, parts, keys, strict=True):
        frames = span.grid[0]
        step = float(span.stop - span.start) / frames
        first_rows = {int(f): row for row, f in reversed(list(enumerate(part.position[:, 0].tolist())))}
        for frame in range(frames):
            key = rows[frame] if frame < len(rows) and bool(rows[frame].any()) else None
            begin = float(span.start) + frame * step
            if frame in first_rows:
                row = first_rows[frame]
                start = float(part.pts_seconds[row])
                out.append(Moment(start, start + float(part.duration_seconds[row]), key))
            elif out and key is not None and out[-1].key is not None:
                unchanged = torch.equal(key, out[-1].key)
                if unchanged and abs(out[-1].stop_seconds - begin) < step / 2:
                    out[-1] = replace(out[-1], stop_seconds=begin + step)
    return out


def _spent(receipt: Receipt, name: str, began: float, tokens_in: int, tokens_out: int) -> None:
    cost = receipt.stage(name)
    cost.seconds += time.perf_counter() - began
    cost.tokens_in += tokens_in
    cost.tokens_out += tokens_out
