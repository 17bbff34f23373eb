"""A session: one stream watched through one model, remembered, and asked about."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamvid.budget import Limits
from streamvid.errors import BankError, SettingsError, UnsupportedError
from streamvid.frames import Clip
from streamvid.memory.bank import Bank, Writer
from streamvid.memory.bounds import fitting_tokens
from streamvid.memory.catalog import SourceRecord, SpanRecord
from streamvid.memory.kv import KeptKv
from streamvid.models.adapter import Adapter, GenerationStats
from streamvid.models.pixels import tubelet_times
from streamvid.models.prefix import Prefix
from streamvid.query.evidence import Moment, cite, clock
from streamvid.query.looking import Looking, Seen
from streamvid.query.when import Range, When, understand
from streamvid.receipt import GivenSpan, Receipt, TimeFilter
from streamvid.signals import Signal, Signals
from streamvid.temporal.methods.base import MemoryMethod, MemoryView
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
    ) -> None:
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
        fresh = encoded.tokens.position[:, 0].bincount(minlength=frames) > 0
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

        Raises:
            SettingsError: if the question is blank.
            UnsupportedError: if the question alone does not fit the model.
        """
        if not question.strip():
            raise SettingsError('the question is empty; ask something like: streamvid ask video.mp4 "what happens?"')
        began = time.perf_counter()
        spans = self.bank.spans(source.id)
        memory = self.bank.view(source.id)
        budget = self._fitting_budget(question, int(memory.tokens.sum()), receipt)
        seen = _seen(source, memory)
        when = self._when(question, memory, seen, origin)
        sought = when.without(question) or question
        asked = self.embedder.texts([sought])[0] if self.embedder else None
        if asked is not None and memory.keys.shape[-1]:
            memory = replace(
                memory, similarity=self._similarity(asked, source.id, [span.id for span in spans], receipt)
            )
        rows = self._inside(when, memory, seen, source) if when else torch.arange(len(spans))
        receipt.budget, receipt.recall = budget, method_id(self.recall)
        receipt.recall_settings = self.recall.settings()
        receipt.time = TimeFilter(list(when.ranges), list(when.words), list(when.notes), len(rows)) if when else None
        for note in when.unused:
            receipt.warn(note, passing=True)
        if when and not len(rows):
            return _nothing_remembered(question, when, seen, receipt, on_text)
        looked: dict[int, float] = {}
        memory = replace(memory, attention=lambda *wanted: self._attention(question, spans, looked, *wanted))
        part_of = memory.select(rows) if when else memory
        counts = torch.zeros_like(memory.tokens)
        counts[rows] = self.recall.recall(part_of, budget, Signals(question=asked))
        read = counts.nonzero().squeeze(1).tolist()
        chosen = [(spans[i], int(counts[i])) for i in read]
        parts = self.bank.read(chosen)
        tokens = VideoTokens.cat(parts) if parts else None
        given = 0 if tokens is None else len(tokens)
        similarity = memory.similarity
        receipt.spans = [
            GivenSpan(
                float(spans[i].start), float(spans[i].stop),
                None if similarity is None else float(similarity[i]), int(counts[i]), spans[i].tokens, looked.get(i),
            )
            for i in read
        ]  # fmt: skip
        receipt.tokens_given = given
        _spent(receipt, "recall", began, int(memory.tokens.sum()), given)

        methods = [method.spawn() for method in self.chain.llm]
        if methods and self.keep_kv:
            left_out = ", ".join(method_id(method) for method in methods)
            receipt.warn(f"{left_out} left out: keys and values that are kept must not depend on the question")
            methods = []
        prefix = None if methods else self._prefix_of(source)
        prompt = self.adapter.prompt(tokens, question)
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
        moments = _moments([span for span, _ in chosen], parts, [memory.keys[i] for i in read])
        cited = cite(text, question, moments, embed)
        receipt.peak_rss_bytes = peak_rss_bytes()
        return Answer(question, text, tuple(cited), receipt)

    def _prefix_of(self, source: SourceRecord) -> Prefix:
        """Keys and values of the latest prompt about a source, from this session or kept on disk."""
        if self._prefix is None or self._prefix[0] != source.id:
            kept = self.bank.kept_kv(source) if self.keep_kv else None
            found = Prefix() if kept is None else Prefix(kept.blocks, kept.layers)
            self._prefix = source.id, found
        return self._prefix[1]

    def _similarity(self, asked: Tensor, source_id: int, span_ids: Sequence[int], receipt: Receipt) -> Tensor:
        """(S,) similarity of every span to the question, by the memory's index."""
        index = self.bank.index(source_id)
        if index.note:
            receipt.warn(index.note)
        receipt.index = index.said
        ids, similarity = index.search(asked, len(span_ids))
        known, row_of = torch.tensor(span_ids).sort()
        out = torch.full((len(span_ids),), -1.0)
        out[row_of[torch.searchsorted(known, ids)]] = similarity
        return out

    def _when(self, question: str, memory: MemoryView, seen: Range, origin: datetime | None) -> When:
        """The time a question speaks of; an event in it is looked for among the memory's keys."""
        if not len(memory.tokens):
            return When()
        embedder = self.embedder
        find = None if embedder is None or not memory.keys.shape[-1] else lambda name: _find(name, memory, embedder)
        return understand(question, start=seen[0], stop=seen[1], origin=origin, find=find)

    def _inside(self, when: When, memory: MemoryView, seen: Range, source: SourceRecord) -> Tensor:
        """(M,) rows of the spans that show what a question speaks of.

        Where nothing changed nothing was stored: a watched range without spans is shown by the span before it,
        unless it was not seen or is forgotten.
        """
        inside = torch.zeros(len(memory.tokens), dtype=torch.bool)
        lost = [(gap.start, gap.stop) for gap in self.bank.gaps(source.id)]
        lost += [(past.start, past.stop) for past in self.bank.expired(source.id)]
        for start, stop in when.ranges:
            here = (memory.start_seconds < stop) & (memory.stop_seconds > start)
            before = (memory.start_seconds < start).nonzero()
            watched = seen[0] <= start < seen[1] and not any(a < stop and b > start for a, b in lost)
            if watched and len(before) and not here.any():
                here[before[-1]] = True
            inside |= here
        return inside.nonzero().squeeze(1)

    def _attention(
        self,
        question: str,
        spans: Sequence[SpanRecord],
        looked: dict[int, float],
        rows: Tensor,
        tokens_each: int,
        depth: float,
    ) -> Tensor:
        """(M,) what the model pays spans when it reads the question; see ``MemoryView.attention``."""
        together = max(1, LOOKED_AT_TOKENS // tokens_each)
        out = []
        for some in torch.split(rows, together):
            wanted = [spans[i] for i in some.tolist()]
            parts = self.bank.read([(span, min(tokens_each, span.tokens)) for span in wanted])
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


def _seen(source: SourceRecord, memory: MemoryView) -> Range:
    """What of a source was watched, [start, stop) in seconds; of one still open, as far as it is stored."""
    if not len(memory.tokens):
        return 0.0, 0.0
    stored = float(memory.start_seconds[0]), float(memory.stop_seconds.max())
    told = source.summary.get("start_seconds", stored[0]), source.summary.get("stop_seconds", stored[1])
    return min(stored[0], told[0]), max(stored[1], told[1])


def _nothing_remembered(
    question: str, when: When, seen: Range, receipt: Receipt, on_text: Callable[[str], None] | None
) -> Answer:
    """The program's own answer where memory holds nothing of the time that was asked about."""
    text = f"nothing is remembered of {when.describe()}; the memory covers {clock(seen[0])}-{clock(seen[1])}"
    receipt.warn(f"{text}; the model was not asked", passing=True)
    receipt.spans, receipt.tokens_given, receipt.stopped = [], 0, "time"
    receipt.peak_rss_bytes = peak_rss_bytes()
    if on_text is not None:
        on_text(text)
    return Answer(question, text, (), receipt)


def _find(name: str, memory: MemoryView, embedder: Embedder) -> Range | None:
    """The stretch in which a named thing is seen: moments that stand clear of the others, around the best.

    Clear means: the mean of the moments nearer to the best than to the median is three standard deviations
    of the others away from them, and they are less than half of all.  Of several stretches about as good
    as the best, the first.
    """
    keys = memory.keys
    there = keys.norm(dim=2) > 0
    vector = embedder.texts([name.split(maxsplit=1)[1]])[0]  # without its article
    similarity = (keys @ vector)[there]
    count = there.sum(1)
    step = (memory.stop_seconds - memory.start_seconds) / count.clamp(min=1)
    starts = (memory.start_seconds[:, None] + step[:, None] * torch.arange(keys.shape[1]))[there]
    steps = step.repeat_interleave(count)
    if len(similarity) < 4:
        return None
    best, middle = float(similarity.max()), float(similarity.median())
    clear = similarity >= (best + middle) / 2
    if best - middle < 0.05 or 2 * int(clear.sum()) >= len(clear):
        return None
    others = similarity[~clear]
    if float(similarity[clear].mean() - others.mean()) < 3 * float(others.std(correction=0)):
        return None
    peak = int((similarity >= best - 0.1 * (best - middle)).nonzero()[0])
    low = (~clear[:peak]).nonzero()
    high = (~clear[peak:]).nonzero()
    first = int(low[-1]) + 1 if len(low) else 0
    last = peak + int(high[0]) - 1 if len(high) else len(clear) - 1
    return float(starts[first]), float(starts[last] + steps[last])


def _moments(spans: Sequence[SpanRecord], parts: Sequence[VideoTokens], keys: Sequence[Tensor]) -> list[Moment]:
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
