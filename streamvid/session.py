"""A session: one stream watched through one model, remembered, and asked about."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from streamvid.budget import Limits
from streamvid.errors import SettingsError, UnsupportedError
from streamvid.frames import Clip
from streamvid.memory.bank import Bank, Writer
from streamvid.memory.catalog import SourceRecord, SpanRecord
from streamvid.models.adapter import Adapter, GenerationStats
from streamvid.models.pixels import tubelet_times
from streamvid.query.evidence import Moment, cite
from streamvid.receipt import GivenSpan, Receipt
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
    ) -> None:
        self.adapter, self.bank, self.embedder = adapter, bank, embedder
        self.chain = (chain if chain is not None else Chain.parse(DEFAULT)).spawn()
        self.recall = recall if recall is not None else Hybrid()
        self.limits = limits if limits is not None else Limits()
        self.span_frames = span_frames
        for method in self.chain.methods:
            lacking = method.needs - HOST_SIGNALS - ({Signal.QUESTION} if embedder else set())
            if lacking:
                raise SettingsError(
                    f"{method_id(method)} needs {', '.join(sorted(lacking))}, which {adapter.info.name} does not give"
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
    ) -> Answer:
        """Answer a question from what is remembered of a source.

        Args:
            question: anything but blank.
            source: whose memory to read.
            receipt: gets what was recalled and spent.
            max_new_tokens: longest answer.
            on_text: called with each piece of the answer as it becomes certain.

        Raises:
            SettingsError: if the question is blank.
            UnsupportedError: if the question alone does not fit the model.
        """
        if not question.strip():
            raise SettingsError('the question is empty; ask something like: streamvid ask video.mp4 "what happens?"')
        began = time.perf_counter()
        spans = self.bank.spans(source.id)
        memory = self.bank.view(source.id)
        asked = self.embedder.texts([question])[0] if self.embedder else None
        budget = self._fitting_budget(question, int(memory.tokens.sum()), receipt)
        if asked is not None and memory.keys.shape[-1]:
            memory = replace(
                memory, similarity=self._similarity(asked, source.id, [span.id for span in spans], receipt)
            )
        similarity = memory.similarity
        counts = self.recall.recall(memory, budget, Signals(question=asked))
        chosen = [(span, int(count)) for span, count in zip(spans, counts.tolist(), strict=True) if count]
        parts = self.bank.read(chosen)
        tokens = VideoTokens.cat(parts) if parts else None
        given = 0 if tokens is None else len(tokens)
        receipt.spans = [
            GivenSpan(
                float(span.start), float(span.stop),
                None if similarity is None else float(similarity[i]), int(counts[i]), span.tokens,
            )
            for i, span in enumerate(spans)
            if counts[i]
        ]  # fmt: skip
        receipt.budget, receipt.recall = budget, method_id(self.recall)
        receipt.tokens_given = given
        _spent(receipt, "recall", began, int(memory.tokens.sum()), given)

        methods = [method.spawn() for method in self.chain.llm]
        prompt = self.adapter.prompt(tokens, question)
        stats = GenerationStats()
        pieces: list[str] = []
        for piece in self.adapter.generate(prompt, max_new_tokens=max_new_tokens, methods=methods, stats=stats):
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)
        text = "".join(pieces).strip()
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
            receipt.warn(f"the answer was cut at {max_new_tokens} tokens; raise --max-new-tokens for the rest")
        embed = self.embedder.texts if self.embedder is not None else None
        rows = [memory.keys[i] for i in range(len(spans)) if counts[i]]
        moments = _moments([span for span, _ in chosen], parts, rows)
        cited = cite(text, question, moments, embed)
        receipt.peak_rss_bytes = peak_rss_bytes()
        return Answer(question, text, tuple(cited), receipt)

    def _similarity(self, asked: Tensor, source_id: int, span_ids: Sequence[int], receipt: Receipt) -> Tensor:
        """(S,) similarity of every span to the question, by the memory's index."""
        index = self.bank.index(source_id)
        if index.note:
            receipt.warn(index.note)
        ids, similarity = index.search(asked, len(span_ids))
        row_of = {span_id: row for row, span_id in enumerate(span_ids)}
        out = torch.full((len(span_ids),), -1.0)
        out[[row_of[span_id] for span_id in ids.tolist()]] = similarity
        return out

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
        return min(self.limits.answer_tokens, most)


def importance(features: Tensor) -> Tensor:
    """(N,) how far each token is from the mean token of its clip, 1 on average: what stands out comes first."""
    if not len(features):
        return torch.zeros(0)
    rows = features.float()
    away = (rows - rows.mean(0)).norm(dim=1).cpu()
    share: Tensor = away / away.mean().clamp_min(1e-12)
    return share


def peak_rss_bytes() -> int:
    """Most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


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
