"""Synthetic videos with exact answers: a seed gives a scene, its frames, and unambiguous questions about it.

Two splits. `easy`: 3 to 6 objects of distinct colours and shapes on a plain background. `stress`: up to 9 objects,
16 close colours, small and large shapes, digits and short words, repeated colours and names (so a question names two
facts), textured drifting backgrounds.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np

from mmkv.models.tiny import draw
from mmkv.models.tiny.questions import Question, all_questions
from mmkv.models.tiny.words import (
    COLUMNS,
    DIGITS,
    DRAWN_WORDS,
    EASY_COLOURS,
    EASY_SHAPES,
    MOVES,
    ROWS,
    STRESS_COLOURS,
    STRESS_SHAPES,
)

SIDE = 64  # frame side, px
FPS = 2.0  # frames per second of every video
CENTRES = (12, 32, 52)  # px: where rows and columns are
STEP = {"still": (0, 0), "leftward": (-1, 0), "rightward": (1, 0), "upward": (0, -1), "downward": (0, 1)}


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object: visible in frames [start, end), centre (x, y) + (t - start) * (vx, vy) px in frame t."""

    name: str
    colour: str
    size: str  # small or large
    radius: float  # px
    rgb: tuple[float, float, float]
    move: str  # one of MOVES
    start: int
    end: int
    x: float
    y: float
    vx: float
    vy: float

    def at(self, t: int) -> tuple[float, float]:
        """Centre in frame t, px."""
        return self.x + (t - self.start) * self.vx, self.y + (t - self.start) * self.vy

    @property
    def where(self) -> str:
        """Region of the first position, e.g. "top left"."""
        return f"{ROWS[nearest(self.y)]} {COLUMNS[nearest(self.x)]}"

    def box(self, t0: int, t1: int) -> tuple[float, float, float, float]:
        """Bounds of everything it covers in frames [t0, t1): left, top, right, bottom, px."""
        (xa, ya), (xb, yb) = self.at(t0), self.at(t1 - 1)
        half = self.radius * (1.8 if self.name in DRAWN_WORDS else 1.25) + 1
        return (
            min(xa, xb) - half,
            min(ya, yb) - self.radius * 1.25 - 1,
            max(xa, xb) + half,
            max(ya, yb) + self.radius * 1.25 + 1,
        )


@dataclasses.dataclass(frozen=True)
class Scene:
    """What happens in a video; `things` are in order of appearance."""

    seed: int
    split: str
    frames: int
    things: tuple[Thing, ...]


@dataclasses.dataclass(frozen=True)
class Video:
    """frames uint8 [T, H, W, 3], timestamps float [T] in seconds, and every question about it."""

    scene: Scene
    frames: np.ndarray
    timestamps: np.ndarray
    questions: list[Question]


def nearest(position: float) -> int:
    """Index of the row or column whose centre is closest to a coordinate in px."""
    return int(np.argmin([abs(position - c) for c in CENTRES]))


def make_scene(seed: int, frames: int = 128, split: str = "easy", crowded: bool = False) -> Scene:
    """Draw a scene. `crowded`: all objects at once, for training the vision tower."""
    if split not in ("easy", "stress"):
        raise ValueError(f"split must be 'easy' or 'stress', not {split!r}")
    rng = np.random.default_rng([seed, frames, split == "stress", crowded])
    low, high = {True: (3, 6), False: (4, 9)}[split == "easy"]
    if crowded:
        low, high = 3, 5
    count = int(rng.integers(low, 1 + max(low, min(high, frames // 4))))
    colours = list(EASY_COLOURS if split == "easy" else STRESS_COLOURS)
    names = list(EASY_SHAPES if split == "easy" else STRESS_SHAPES)
    if split == "easy":
        colours, names = rng.permutation(colours)[:count], rng.permutation(names)[:count]
    else:  # few of each, drawn with repeats: one fact does not identify an object
        names = [*names, *DIGITS, *DRAWN_WORDS]
        weights = np.array([3.0] * len(STRESS_SHAPES) + [1.2] * len(DIGITS) + [1.2] * len(DRAWN_WORDS))
        pool_n = rng.choice(names, max(3, count - 1), replace=False, p=weights / weights.sum())
        pool_c = rng.permutation(colours)[: max(3, count - 1)]
        pairs = [(c, n) for c in pool_c for n in pool_n]
        pairs = [pairs[i] for i in rng.permutation(len(pairs))[:count]]
        colours, names = [p[0] for p in pairs], [p[1] for p in pairs]
    starts = _starts(count, frames, rng) if not crowded else [int(v) for v in rng.choice([0, 0, 0, 1, 3], count)]
    things: list[Thing] = []
    for i in range(count):
        for _ in range(40):
            thing = _thing(str(names[i]), str(colours[i]), starts[i], frames, count, split, crowded, rng)
            if all(_apart(thing, other) for other in things):
                things.append(thing)
                break
    return Scene(seed, split, frames, tuple(sorted(things, key=lambda o: o.start)))


def _starts(count, frames, rng):
    """First frames of the objects: increasing, at least 3 frames apart, the last one leaves time to be seen."""
    gap, spare = 3, frames - 4 - 3 * (count - 1)
    return (np.sort(rng.integers(0, max(1, spare), count)) + gap * np.arange(count)).tolist()


def _thing(name, colour, start, frames, count, split, crowded, rng):
    size = "large" if split == "easy" or name in DRAWN_WORDS else str(rng.choice(["small", "large"]))
    radius = float(rng.uniform(8.0, 9.2) if size == "large" else rng.uniform(4.8, 5.6))
    if name in DRAWN_WORDS:
        radius = float(rng.uniform(6.5, 7.5))
    rgb = STRESS_COLOURS[colour]
    rgb = tuple(float(np.clip(v + rng.uniform(-8, 8), 0, 255)) for v in rgb)
    share = frames / count
    last = frames - start
    span = frames if crowded else int(np.clip(rng.uniform(0.7, 1.7) * share, 4, last))
    end = start + min(span, last)
    move = str(rng.choice(MOVES[1:])) if rng.random() < 0.4 and end - start >= 5 else "still"
    x, y = (float(rng.choice(CENTRES) + rng.uniform(-3, 3)) for _ in range(2))
    if name in DRAWN_WORDS:  # wider than the rest: keep the whole word on screen
        x = float(np.clip(x, 15, 49))
    dx, dy = STEP[move]
    if move != "still":
        speed = float(rng.uniform(0.8, 2.0))
        end = min(end, start + max(5, int(40 / speed)))
        travel = speed * (end - start - 1)
        if travel > 42:
            speed, travel = 42 / (end - start - 1), 42
        edge = 15 if name in DRAWN_WORDS else 11
        travel_room = min(travel, 64 - 2 * edge)
        speed *= travel_room / travel
        low, high = edge, 64 - edge - travel_room
        first = rng.uniform(low, high) + (travel_room if dx + dy < 0 else 0)
        x, y = (float(first), y) if dx else (x, float(first))
        dx, dy = dx * speed, dy * speed
    return Thing(name, colour, size, radius, rgb, move, start, end, x, y, dx, dy)


def _apart(a: Thing, b: Thing) -> bool:
    """True if the two never overlap on screen."""
    t0, t1 = max(a.start, b.start), min(a.end, b.end)
    if t0 >= t1:
        return True
    p, q = a.box(t0, t1), b.box(t0, t1)
    return p[2] < q[0] or q[2] < p[0] or p[3] < q[1] or q[3] < p[1]


def render(scene: Scene, labels: bool = False):
    """Frames uint8 [T, SIDE, SIDE, 3]; with `labels` also coverage float32 [things, T, SIDE, SIDE]."""
    rng = np.random.default_rng([scene.seed, 7])
    kind = "plain" if scene.split == "easy" else "texture"
    frames = np.array(draw.background(kind, SIDE, scene.frames, rng))
    cover = np.zeros((len(scene.things), scene.frames, SIDE, SIDE), np.float32) if labels else None
    for i, thing in enumerate(scene.things):
        alpha, rgb, mask = draw.sprite(thing.name, round(thing.radius, 1)), np.float32(thing.rgb), None
        for t in range(thing.start, thing.end):
            if mask is None or thing.move != "still":
                mask = draw.place(alpha, *thing.at(t), SIDE)
                ys, xs = (slice(max(0, int(p) - 18), int(p) + 20) for p in reversed(thing.at(t)))
                near = mask[ys, xs, None]
            frames[t, ys, xs] += near * (rgb - frames[t, ys, xs])
            if labels:
                cover[i, t] = mask
    frames = np.clip(frames, 0, 255).astype(np.uint8)
    return (frames, cover) if labels else frames


def make_video(seed: int, frames: int = 128, split: str = "easy") -> Video:
    """The video of a seed: same seed, frames and split give the same video on every machine."""
    scene = make_scene(seed, frames, split)
    return Video(scene, render(scene), np.arange(frames) / FPS, all_questions(scene))


def write_mp4(frames: np.ndarray, path, fps: float = FPS, scale: int = 4) -> None:
    """Write frames uint8 [T, H, W, 3] as H.264, each pixel enlarged `scale` times so that a person can watch it."""
    import av

    big = frames.repeat(scale, axis=1).repeat(scale, axis=2)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width, stream.pix_fmt = big.shape[1], big.shape[2], "yuv420p"
        stream.options = {"crf": "18", "preset": "veryfast"}
        for frame in big:
            for packet in stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)


def read_mp4(path) -> np.ndarray:
    """All frames of a file, uint8 [T, H, W, 3]."""
    import av

    with av.open(str(path)) as source:
        return np.stack([f.to_ndarray(format="rgb24") for f in source.decode(video=0)])
