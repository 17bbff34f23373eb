"""Qwen3-VL on transformers, through public arguments only.

Precomputed visual features enter by ``mm_encoder_outputs`` with explicit positions, so that a
kept token keeps the place it had and nothing of the model's code is copied or patched.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoTokenizer, DynamicCache
from transformers.models.qwen3_vl.modeling_qwen3_vl import (
    BaseModelOutputWithDeepstackFeatures,
    apply_rotary_pos_emb,
)
from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

from streamvid.errors import UnsupportedError
from streamvid.frames import Clip
from streamvid.models.adapter import Adapter, Encoded, GenerationStats, ModelInfo, Prompt
from streamvid.models.fingerprint import fingerprint
from streamvid.models.pixels import PixelSettings
from streamvid.models.positions import interleaved
from streamvid.models.prefix import Prefix
from streamvid.temporal.hosts.llm import LayerHost
from streamvid.temporal.hosts.vision import run_tower
from streamvid.temporal.methods.base import LlmMethod, PixelView
from streamvid.tokens import VideoTokens

PATCHES_AT_ONCE = 16384
"""Patches encoded in one go: bounds the tower's activations whatever the clip."""

PROMPT_VERSION = 1
"""Raised when prompts or pixels are prepared differently: part of the processor fingerprint."""


class Qwen3VL(Adapter):
    """Qwen3-VL checkpoints of any size."""

    def __init__(self, model: Any, tokenizer: Any, pixels: PixelSettings, *, name: str, fingerprint: str) -> None:
        """Wrap a loaded model; ``load`` is the usual way in."""
        self.model, self.tokenizer, self.pixels = model.eval(), tokenizer, pixels
        config = model.config
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        template = str(getattr(tokenizer, "chat_template", ""))
        processor = json.dumps([repr(pixels), template, PROMPT_VERSION])
        self.info = ModelInfo(
            name=name,
            family="qwen3_vl",
            parameters=sum(p.numel() for p in model.parameters()),
            hidden_size=config.text_config.hidden_size,
            num_layers=config.text_config.num_hidden_layers,
            device=str(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            fingerprint=fingerprint,
            processor_fingerprint=hashlib.sha256(processor.encode()).hexdigest()[:16],
            default_fps=pixels.fps,
            max_frames=pixels.max_frames,
            context_tokens=config.text_config.max_position_embeddings,
        )
        self.tubelet = pixels.temporal_patch_size
        text, taps = config.text_config, len(config.vision_config.deepstack_visual_indexes)
        # Keys and values twice, as they grow by copying; features and taps; what a layer's two halves hold at a time.
        numbers = 4 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
        numbers += (8 + taps) * text.hidden_size + 3 * text.intermediate_size
        self.token_bytes = numbers * self.dtype.itemsize
        self._last: Tensor | None = None
        self._tower = model.model.visual

    @classmethod
    def load(cls, folder: Path, *, name: str, device: str, dtype: str) -> Qwen3VL:
        """Load a checkpoint folder in the Hugging Face layout.

        Args:
            folder: holds config.json, safetensors, tokenizer and processor JSON.
            name: how the user calls it.
            device: "cpu", "cuda", "cuda:1", "mps".
            dtype: "auto" (as the checkpoint says; float32 on CPU), "float32", "bfloat16" or "float16".
        """
        wanted: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
        if dtype == "auto" and device == "cpu":
            wanted = torch.float32
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype=wanted, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        pixels = PixelSettings.load(folder)
        model = cast(Any, model).to(device)
        return cls(model, tokenizer, pixels, name=name, fingerprint=fingerprint(folder))

    def frame_size(self, *, height: int, width: int, num_frames: int) -> tuple[int, int]:
        """Size in pixels that frames of this size will be scaled to."""
        return self.pixels.frame_size(height=height, width=width, num_frames=num_frames)

    def view(self, clip: Clip, *, size: tuple[int, int]) -> PixelView:
        """The clip as the vision tower will see it."""
        pixels = self.pixels.normalise(clip.pixels.to(self.device), size)
        std = torch.tensor(self.pixels.std)
        return PixelView(pixels, std, self.pixels.temporal_patch_size, self.pixels.cell)

    def reset(self) -> None:
        """Forget the last clip's features: the next clip starts a new stream."""
        self._last = None

    def encode(self, view: PixelView, times: Sequence[tuple[float, float]], *, keep: Tensor | None) -> Encoded:
        """Run the vision tower over the kept cells; the others never enter it."""
        frames, rows, columns = view.grid
        cells = rows * columns
        keep = torch.arange(frames * cells) if keep is None else keep.cpu()
        unit = self.pixels.merge_size**2
        patches = self.pixels.patchify(view.pixels).view(frames * cells, unit, -1)
        grid = torch.tensor([[1, rows * self.pixels.merge_size, columns * self.pixels.merge_size]], device=self.device)
        tower = self._tower
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=self.pixels.merge_size,
            kwargs={},
        )
        places = get_vision_position_ids(grid, self.pixels.merge_size, kwargs={})
        indices, weights, places = (t.view(cells, unit, -1) for t in (indices, weights, places))
        per_frame = torch.bincount(keep // cells, minlength=frames)
        features, received = [], []
        layers: list[list[Tensor]] = []
        for part, lengths in _chunks(keep, per_frame, PATCHES_AT_ONCE // unit):
            cell = (part % cells).to(self.device)
            out = run_tower(
                tower,
                patches[part.to(self.device)].flatten(0, 1).to(self.dtype),
                interp_indices=indices[cell].flatten(0, 1),
                interp_weights=weights[cell].flatten(0, 1).to(self.dtype),
                position_ids=places[cell].flatten(0, 1),
                lengths=[length * unit for length in lengths],
                with_received=True,
            )
            assert out.received is not None
            # from here on tokens are looked at, reduced and stored: a few megabytes a clip, on the CPU
            features.append(out.features.cpu())
            received.append(out.received.cpu())
            layers.append([rows.cpu() for rows in out.layers])
        rows_of = torch.cat(features) if features else torch.zeros(0, self.info.hidden_size)
        attention = torch.cat(received) if received else torch.zeros(0)
        frame, cell = keep // cells, keep % cells
        start = torch.tensor([t[0] for t in times], dtype=torch.float64)
        length = torch.tensor([t[1] - t[0] for t in times], dtype=torch.float64)
        tokens = VideoTokens(
            features=rows_of,
            grid=(frames, rows, columns),
            position=torch.stack([frame, cell // columns, cell % columns], dim=1),
            pts_seconds=start[frame],
            duration_seconds=length[frame],
            size=torch.ones(len(keep)),
            score=torch.zeros(len(keep)),
            layers=tuple(torch.cat(parts) for parts in zip(*layers, strict=True)) if layers else (),
        )
        return Encoded(tokens, attention, self._frame_features(rows_of, frame, cell, frames, cells))

    def _frame_features(self, rows: Tensor, frame: Tensor, cell: Tensor, frames: int, cells: int) -> Tensor:
        """(T, D): each frame's mean token, a cell that was left out standing in with its last features."""
        state = self._last
        if state is None or state.shape != (cells, rows.shape[1]):
            state = rows.new_zeros(cells, rows.shape[1])
        else:
            state = state.clone()
        out = rows.new_zeros(frames, rows.shape[1])
        for index in range(frames):
            here = (frame == index).nonzero().squeeze(1)
            state[cell[here].to(rows.device)] = rows[here.to(rows.device)]
            out[index] = state.mean(0)
        self._last = state
        return out

    def stamp(self, pts_seconds: float, duration_seconds: float) -> str:
        """The text before a frame: the mean time of the pictures in its temporal patch."""
        tubelet = self.pixels.temporal_patch_size
        return f"<{pts_seconds + duration_seconds * (tubelet - 1) / (2 * tubelet):.1f} seconds>"

    def prompt_overhead(self, num_frames: int) -> int:
        """Text tokens that the time stamps of this many frames cost."""
        stamp = self.tokenizer("<1000.0 seconds>", add_special_tokens=False).input_ids
        return num_frames * (len(stamp) + 2)

    def prompt(self, tokens: VideoTokens | None, question: str) -> Prompt:
        """Lay out frames with their time stamps, then the question."""
        marks = [self.tokenizer.decode([i]) for i in self._marks()]
        opening, pad, closing = marks
        parts: list[str] = []
        frame = torch.zeros(0, dtype=torch.int64)
        if tokens is not None and len(tokens):
            order = torch.argsort(tokens.pts_seconds, stable=True)
            times, frame = torch.unique_consecutive(tokens.pts_seconds[order], return_inverse=True)
            counts = torch.bincount(frame)
            firsts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
            lengths = tokens.duration_seconds[order][firsts]
            for time_, length, count in zip(times.tolist(), lengths.tolist(), counts.tolist(), strict=True):
                parts.append(self.stamp(time_, length) + opening + pad * count + closing)
            tokens = tokens.select(order)
        content: list[dict[str, str]] = [{"type": "video"}] if parts else []
        content.append({"type": "text", "text": question})
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        slot = opening + pad + closing
        if parts:
            if slot not in text:
                raise UnsupportedError(f"the chat template of {self.info.name} has no place for a video ({slot})")
            text = text.replace(slot, "".join(parts), 1)
        ids = torch.tensor(self.tokenizer(text, add_special_tokens=False).input_ids)
        visual = ids == self.model.config.video_token_id
        count = 0 if tokens is None else len(tokens)
        if int(visual.sum()) != count:
            raise UnsupportedError(
                f"the prompt holds {int(visual.sum())} places for {count} visual tokens; "
                "does the question contain the model's own video marker?"
            )
        cell = torch.full((len(ids),), -1)
        row = column = torch.zeros(0, dtype=torch.int64)
        extent = 1
        if tokens is not None and count:
            row, column = tokens.position[:, 1].cpu(), tokens.position[:, 2].cpu()
            cell[visual] = row * tokens.grid[2] + column
            extent = max(tokens.grid[1:])
        positions, after = interleaved(visual, frame, row, column, extent)
        text_row = torch.arange(len(ids))[None]
        return Prompt(
            input_ids=ids[None].to(self.device),
            position_ids=torch.cat([text_row, positions])[:, None].to(self.device),
            visual=visual,
            cell=cell,
            features=tokens.features if tokens is not None else torch.zeros(0, self.info.hidden_size),
            layers=tokens.layers if tokens is not None else (),
            next_position=after,
        )

    def _marks(self) -> tuple[int, int, int]:
        config = self.model.config
        return config.vision_start_token_id, config.video_token_id, config.vision_end_token_id

    def prefill(
        self, prompt: Prompt, cache: DynamicCache, methods: Sequence[LlmMethod] = ()
    ) -> tuple[Tensor, LayerHost | None]:
        """Logits (V,) after the prompt; the cache is filled.  With methods, also the host that carried them out."""
        host = None
        deepstack: list[tuple[Tensor, ...]] = [(rows.to(self.device, self.dtype),) for rows in prompt.layers]
        if methods:
            host = LayerHost(
                self.model.model.language_model.layers,
                methods,
                cell=prompt.cell,
                deepstack=[rows[0] for rows in deepstack],
                rotate=apply_rotary_pos_emb,
            )
            deepstack = []
        outputs = None
        if bool(prompt.visual.any()):
            features = prompt.features.to(self.device, self.dtype)
            outputs = {
                "video": BaseModelOutputWithDeepstackFeatures(
                    pooler_output=(features,),  # type: ignore[arg-type]
                    deepstack_features=deepstack,  # type: ignore[arg-type]
                )
            }
        with host.installed() if host else nullcontext():
            out = self.model(
                input_ids=prompt.input_ids,
                position_ids=prompt.position_ids,
                mm_encoder_outputs=outputs,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[0, -1], host

    def step(self, token: int, *, index: int, position: int, cache: DynamicCache) -> Tensor:
        """Logits (V,) after one more token.

        Args:
            token: its id.
            index: its place in the original prompt plus answer.
            position: its M-RoPE position (the same for time, height and width).
            cache: keys and values of everything before; layers may hold different lengths.
        """
        places = torch.tensor([index, position, position, position], device=self.device).view(4, 1, 1)
        ids = torch.tensor([[token]], device=self.device)
        out = self.model(input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True)
        logits: Tensor = out.logits[0, -1]
        return logits

    def ends(self) -> set[int]:
        """Token ids that end an answer."""
        config = self.model.generation_config
        ends = config.eos_token_id if config.eos_token_id is not None else self.tokenizer.eos_token_id
        return set(ends) if isinstance(ends, list | tuple) else {ends}

    def generate(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int,
        methods: Sequence[LlmMethod] = (),
        stats: GenerationStats | None = None,
        prefix: Prefix | None = None,
    ) -> Iterator[str]:
        """Answer greedily, piece by piece as text becomes certain."""
        if prefix is not None and methods:
            raise ValueError("what methods leave of a prompt depends on its question and cannot serve another one")
        stats = stats if stats is not None else GenerationStats()
        stats.prompt_tokens = prompt.input_ids.shape[1]
        stats.visual_tokens = stats.visual_tokens_last_layer = int(prompt.visual.sum())
        cache = DynamicCache(config=self.model.config.text_config)
        began = time.perf_counter()
        rest = prompt if prefix is None else prefix.take(prompt, cache)
        logits, host = self.prefill(rest, cache, methods)
        stats.reused_tokens = prefix.reused if prefix is not None else 0
        if host is not None:
            stats.visual_tokens_last_layer = host.visual_alive
        stats.prefill_seconds = time.perf_counter() - began
        began = time.perf_counter()
        try:
            yield from self._decode(logits, prompt, cache, max_new_tokens, stats)
        finally:
            stats.decode_seconds = time.perf_counter() - began
            if prefix is not None:
                prefix.keep(prompt, cache)

    def _decode(
        self, logits: Tensor, prompt: Prompt, cache: DynamicCache, max_new_tokens: int, stats: GenerationStats
    ) -> Iterator[str]:
        ends = self.ends()
        produced: list[int] = []
        shown = ""
        stats.stopped = "length"
        for count in range(max_new_tokens):
            token = int(logits.argmax())
            if token in ends:
                stats.stopped = "end"
                break
            produced.append(token)
            text = self.tokenizer.decode(produced, skip_special_tokens=True)
            # an unfinished multi-byte character decodes to U+FFFD; a subword may still change the blank before it
            if not text.endswith("\ufffd") and text.startswith(shown):
                if len(text) > len(shown):
                    yield text[len(shown) :]
                shown = text
            stats.new_tokens = count + 1
            logits = self.step(
                token,
                index=prompt.input_ids.shape[1] + count,
                position=prompt.next_position + count,
                cache=cache,
            )
        text = self.tokenizer.decode(produced, skip_special_tokens=True)
        if len(text) > len(shown) and text.startswith(shown):
            yield text[len(shown) :]


def _chunks(keep: Tensor, per_frame: Tensor, most: int) -> Iterator[tuple[Tensor, list[int]]]:
    """Whole frames' worth of kept cells, at most ``most`` cells at a time (one frame at least)."""
    start = 0
    lengths: list[int] = []
    total = 0
    for length in per_frame.tolist():
        if lengths and total + length > most:
            yield keep[start : start + total], [n for n in lengths if n]
            start, total, lengths = start + total, 0, []
        lengths.append(length)
        total += length
    if total:
        yield keep[start : start + total], [n for n in lengths if n]
