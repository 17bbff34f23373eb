"""The toy world: scenes of coloured shapes whose events are known exactly.

This module samples scenes and draws them at any size and time.  It knows nothing of
questions, models or memory; ``video.py`` beside it writes the drawings as H.264.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLORS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 225, 50),
    "purple": (160, 50, 200),
    "orange": (245, 140, 30),
    "cyan": (50, 210, 225),
    "white": (245, 245, 245),
}
ACTIONS = ("moves left", "moves right", "moves up", "moves down", "stays still")
BACKGROUNDS = ("plain", "gradient", "busy")

HELD_OUT_PAIRS = frozenset(
    {
        ("orange", "circle"),
        ("cyan", "square"),
        ("purple", "triangle"),
        ("green", "star"),
        ("white", "ring"),
    }
)
"""A tenth of all colour-shape pairs: never drawn while the toy model is trained."""

_STEP = {
    "moves left": (-1.0, 0.0),
    "moves right": (1.0, 0.0),
    "moves up": (0.0, -1.0),
    "moves down": (0.0, 1.0),
    "stays still": (0.0, 0.0),
}


@dataclass(frozen=True, slots=True)
class Event:
    """One shape that appears, does one thing and leaves.

    Places are fractions of the frame (x to the right, y down); the radius is a
    fraction of the shorter side.  The shape is visible during
    ``[start_seconds, end_seconds)``, both whole seconds.
    """

    shape: str
    color: str
    action: str
    start_seconds: int
    end_seconds: int
    x: float
    y: float
    travel: float
    radius: float

    @property
    def name(self) -> str:
        """Colour and shape, as in "red circle"."""
        return f"{self.color} {self.shape}"

    def place(self, seconds: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centre at the given times, as two ``(F,)`` arrays of frame fractions."""
        share = (seconds - self.start_seconds) / (self.end_seconds - self.start_seconds)
        step_x, step_y = _STEP[self.action]
        return self.x + step_x * self.travel * share, self.y + step_y * self.travel * share

    def visible(self, seconds: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which of the times ``(F,)`` fall inside the event."""
        return (seconds >= self.start_seconds) & (seconds < self.end_seconds)


@dataclass(frozen=True, slots=True)
class Scene:
    """A background, camera behaviour and the events over it; a pure function of its fields.

    ``noise`` is the standard deviation of the sensor noise in grey levels;
    ``shake`` the largest camera offset as a fraction of the shorter side.
    """

    seed: int
    seconds: int
    background: str
    events: tuple[Event, ...]
    noise: float = 0.0
    shake: float = 0.0
    blobs: tuple[tuple[float, ...], ...] = field(default=(), repr=False)
    tones: tuple[tuple[float, float, float], ...] = field(default=(), repr=False)

    def backdrop(self, height: int, width: int) -> NDArray[np.float32]:
        """The empty background, ``(height, width, 3)`` in grey levels."""
        y, x = np.meshgrid(
            (np.arange(height, dtype=np.float32) + 0.5) / height,
            (np.arange(width, dtype=np.float32) + 0.5) / width,
            indexing="ij",
        )
        first = np.asarray(self.tones[0], dtype=np.float32)
        image = np.broadcast_to(first, (height, width, 3)).copy()
        if self.background != "plain":
            angle = self.blobs[0][0]
            ramp = np.clip(0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), 0, 1)
            image += ramp[..., None] * (np.asarray(self.tones[1], dtype=np.float32) - first)
        if self.background == "busy":
            for (_, cx, cy, w, h), tone in zip(self.blobs[1:], self.tones[2:], strict=True):
                inside = (np.abs(x - cx) < w) & (np.abs(y - cy) < h)
                image[inside] = tone
        return image

    def draw(self, seconds: Sequence[float], *, height: int, width: int) -> NDArray[np.uint8]:
        """Frames at the given times.

        Returns:
            ``(F, height, width, 3)`` uint8 RGB.  The same time always gives the same frame.
        """
        times = np.asarray(seconds, dtype=np.float64)
        short = min(height, width)
        pad = int(np.ceil(self.shake * short)) + 1 if self.shake else 0
        wide = self.backdrop(height + 2 * pad, width + 2 * pad)
        out = np.empty((len(times), height, width, 3), dtype=np.uint8)
        ys = np.arange(height, dtype=np.float32) + 0.5
        xs = np.arange(width, dtype=np.float32) + 0.5
        seen = [(event, event.visible(times), *event.place(times)) for event in self.events]
        for i, time in enumerate(times):
            rng = np.random.default_rng((self.seed, round(time * 1000)))
            dx, dy = rng.integers(-pad + 1, pad, size=2) if pad else (0, 0)
            image = wide[pad + dy : pad + dy + height, pad + dx : pad + dx + width].copy()
            for event, visible, px, py in seen:
                if visible[i]:
                    _paint(image, ys, xs, event, px[i] * width - dx, py[i] * height - dy, short)
            if self.noise:
                image += rng.standard_normal(image.shape, dtype=np.float32) * self.noise
            out[i] = np.clip(image + 0.5, 0, 255).astype(np.uint8)
        return out

    def cells(
        self, seconds: Sequence[float], *, rows: int, columns: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Which event covers each cell of a coarse grid, and how much of the cell.

        Returns:
            ``owner (F, rows, columns)``: index of the event that covers most of the cell, -1 for none;
            ``share (F, rows, columns)``: the covered part of it, 0..1.
        """
        times = np.asarray(seconds, dtype=np.float64)
        fine = 5
        ys = (np.arange(rows * fine, dtype=np.float32) + 0.5) / (rows * fine)
        xs = (np.arange(columns * fine, dtype=np.float32) + 0.5) / (columns * fine)
        owner = np.full((len(times), rows, columns), -1, dtype=np.int64)
        share = np.zeros((len(times), rows, columns), dtype=np.float32)
        short = min(rows, columns)
        for index, event in enumerate(self.events):
            alive = np.flatnonzero(event.visible(times))
            if not len(alive):
                continue
            px, py = event.place(times[alive])
            radius_y, radius_x = event.radius * short / rows, event.radius * short / columns
            v = (ys[None, :, None] - py[:, None, None]) / radius_y
            u = (xs[None, None, :] - px[:, None, None]) / radius_x
            inside = distance(event.shape, u, v) < 0
            part = inside.reshape(len(alive), rows, fine, columns, fine).mean(axis=(2, 4), dtype=np.float32)
            better = part > share[alive]
            owner[alive] = np.where(better, index, owner[alive])
            share[alive] = np.where(better, part, share[alive])
        return owner, share


def distance(shape: str, u: NDArray[np.floating], v: NDArray[np.floating]) -> NDArray[np.floating]:
    """Signed distance (roughly, in radii) to the outline of a unit shape: negative inside.

    ``u`` runs right and ``v`` down from the centre; the two broadcast.
    """
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.85
    if shape == "triangle":
        return np.maximum(v - 0.75, 0.87 * np.abs(u) - 0.5 * v - 0.5)
    if shape == "cross":
        return np.minimum(np.maximum(np.abs(u) - 1.0, np.abs(v) - 0.33), np.maximum(np.abs(u) - 0.33, np.abs(v) - 1.0))
    radius = np.sqrt(u * u + v * v)
    if shape == "circle":
        return radius - 0.95
    if shape == "ring":
        return np.abs(radius - 0.75) - 0.24
    if shape == "star":
        turn = np.arctan2(u, -v) * (5 / (2 * np.pi))
        arm = np.abs(turn - np.round(turn)) * 2
        return radius - (1.12 - 0.7 * arm)
    raise ValueError(f"unknown shape {shape!r}; known: {', '.join(SHAPES)}")


def _paint(
    image: NDArray[np.float32],
    ys: NDArray[np.float32],
    xs: NDArray[np.float32],
    event: Event,
    cx: float,
    cy: float,
    short: int,
) -> None:
    """Blend one antialiased shape into the image, touching only its bounding box."""
    radius = event.radius * short
    reach = radius * 1.2 + 1
    top, bottom = max(0, int(cy - reach)), min(len(ys), int(cy + reach) + 1)
    left, right = max(0, int(cx - reach)), min(len(xs), int(cx + reach) + 1)
    if top >= bottom or left >= right:
        return
    v = (ys[top:bottom, None] - cy) / radius
    u = (xs[None, left:right] - cx) / radius
    cover = np.clip(0.5 - distance(event.shape, u, v) * radius, 0, 1)[..., None].astype(np.float32)
    box = image[top:bottom, left:right]
    box += cover * (np.asarray(COLORS[event.color], dtype=np.float32) - box)


def sample_scene(
    seed: int,
    *,
    seconds: int = 16,
    events: int | None = None,
    background: str | None = None,
    held_out: bool | None = None,
    clean: bool = False,
) -> Scene:
    """A random scene, the same for the same arguments.

    Events follow one another without overlap, at least one second apart, in whole seconds.

    Args:
        seed: any non-negative integer.
        seconds: length of the scene, at least 4.
        events: how many shapes come and go; None draws 1 to 3.
        background: one of ``BACKGROUNDS``; None draws one.
        held_out: True draws only held-out colour-shape pairs, False none of them, None any.
        clean: leave noise and camera shake out.

    Raises:
        ValueError: if the events cannot fit into the seconds.
    """
    if seconds < 4:
        raise ValueError(f"seconds must be at least 4, got {seconds}; one event takes 3 seconds and a lead")
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 4)) if events is None else events
    if count < 0 or count * 4 > seconds:
        raise ValueError(f"events must be between 0 and seconds // 4 = {seconds // 4}, got {count}")
    chosen = background if background is not None else str(rng.choice(BACKGROUNDS))
    if chosen not in BACKGROUNDS:
        raise ValueError(f"background must be one of {', '.join(BACKGROUNDS)}, got {chosen!r}")
    longest = max(3, min(5, seconds // max(count, 1) - 1))
    lengths = rng.integers(3, longest + 1, size=count)
    slack = seconds - int(lengths.sum()) - count
    gaps = np.bincount(rng.integers(0, count + 1, size=slack), minlength=count + 1)
    pairs = _draw_pairs(rng, count, held_out)
    made: list[Event] = []
    clock = 0
    for index, (color, shape) in enumerate(pairs):
        clock += int(gaps[index]) + (1 if index else 0)
        made.append(_draw_event(rng, color, shape, clock, clock + int(lengths[index])))
        clock += int(lengths[index])
    tones = tuple(_tone(rng) for _ in range(2))
    blobs: tuple[tuple[float, ...], ...] = ((float(rng.uniform(0, 2 * np.pi)),),)
    if chosen == "busy":
        number = int(rng.integers(5, 12))
        blobs += tuple(
            (0.0, *(float(p) for p in rng.uniform(0, 1, 2)), *(float(s) for s in rng.uniform(0.04, 0.22, 2)))
            for _ in range(number)
        )
        tones += tuple(_tone(rng) for _ in range(number))
    noise = 0.0 if clean or rng.random() < 0.4 else float(rng.uniform(0.5, 5.0))
    shake = 0.0 if clean or rng.random() < 0.75 else float(rng.uniform(0.005, 0.02))
    return Scene(seed, seconds, chosen, tuple(made), noise, shake, blobs, tones)


def _draw_pairs(rng: np.random.Generator, count: int, held_out: bool | None) -> list[tuple[str, str]]:
    """Distinct colour-shape pairs; most scenes share neither colour nor shape between events."""
    pool = [
        (color, shape)
        for color in COLORS
        for shape in SHAPES
        if held_out is None or ((color, shape) in HELD_OUT_PAIRS) == held_out
    ]
    loose = rng.random() < 0.3
    pairs: list[tuple[str, str]] = []
    for _ in range(count):
        free = [p for p in pool if p not in pairs] or pool
        apart = [p for p in free if all(p[0] != c and p[1] != s for c, s in pairs)]
        choices = free if loose or not apart else apart
        pairs.append(choices[int(rng.integers(len(choices)))])
    return pairs


def _draw_event(rng: np.random.Generator, color: str, shape: str, start: int, end: int) -> Event:
    action = ACTIONS[int(rng.integers(len(ACTIONS)))]
    radius = float(rng.uniform(0.15, 0.21))
    low, high = radius + 0.02, 1 - radius - 0.02
    step_x, step_y = _STEP[action]
    travel = float(rng.uniform(0.42, high - low)) if action != "stays still" else 0.0
    place = rng.uniform(low, high, 2)
    for axis, step in enumerate((step_x, step_y)):
        if step:
            lead = float(rng.uniform(0, high - low - travel))
            place[axis] = low + lead if step > 0 else high - lead
    return Event(shape, color, action, start, end, float(place[0]), float(place[1]), travel, radius)


def _tone(rng: np.random.Generator) -> tuple[float, float, float]:
    """A muted, fairly dark colour that no shape has."""
    grey = rng.uniform(20, 125)
    tint = grey * (1 + rng.uniform(-0.22, 0.22, 3))
    return float(tint[0]), float(tint[1]), float(tint[2])


def needle_scene(
    seed: int, *, seconds: int = 600, distractors: str = "static", held_out: bool | None = False
) -> tuple[Scene, Event]:
    """A long scene with one event to find, and that event, the needle.

    Neither the needle's shape nor its colour occurs in any other event, so questions about it
    have one answer.  There is no noise and no shake: a static scene is still but for the needle.

    Args:
        seed: any non-negative integer.
        seconds: length, at least 30.
        distractors: "static" has no other event; "busy" has one of another shape and colour
            every 10 to 20 seconds.
        held_out: True draws the needle from the held-out pairs, False from the others, None
            from all.  Distractors are never held out.

    Raises:
        ValueError: if ``seconds`` is too short or ``distractors`` is neither word.
    """
    if seconds < 30:
        raise ValueError(f"seconds must be at least 30, got {seconds}; use sample_scene for short scenes")
    if distractors not in ("static", "busy"):
        raise ValueError(f"distractors must be static or busy, got {distractors!r}")
    empty = sample_scene(seed, seconds=4, events=0, clean=True)
    rng = np.random.default_rng((seed, 1))
    color, shape = _draw_pairs(rng, 1, held_out)[0]
    start = int(rng.integers(1, seconds - 6))
    needle = _draw_event(rng, color, shape, start, start + int(rng.integers(3, 6)))
    others: list[Event] = []
    if distractors == "busy":
        pool = [(c, s) for c in COLORS for s in SHAPES if c != color and s != shape and (c, s) not in HELD_OUT_PAIRS]
        clock = int(rng.integers(2, 11))
        while clock + 6 < seconds:
            other_color, other_shape = pool[int(rng.integers(len(pool)))]
            other = _draw_event(rng, other_color, other_shape, clock, clock + int(rng.integers(3, 6)))
            if other.end_seconds < needle.start_seconds or other.start_seconds > needle.end_seconds:
                others.append(other)
            clock += int(rng.integers(10, 21))
    events = sorted([needle, *others], key=lambda event: event.start_seconds)
    return Scene(seed, seconds, empty.background, tuple(events), 0.0, 0.0, empty.blobs, empty.tones), needle
