"""`Story`: pictures of a stream of any length, made as they are wanted, with a few events that are asked about."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from mmkv.models.tiny import world
from mmkv.models.tiny.words import DIGITS, DRAWN_WORDS, EASY_COLOURS, EASY_SHAPES, STRESS_COLOURS

PIECE = 16  # pictures of one scene: 8 frames of the decoder
WORLDS = ("quiet", "busy")
OTHERS = ("cyan", "brown", "lime", "navy", "teal", "black")  # colours of what nobody asks about


class Story:
    """A long stream. An event is an object of a shape and a colour that come once, for 14 pictures, at a known time.

    Args:
        kind: "quiet", where nothing else is ever seen, or "busy", where every other scene shows a digit or a word, in colours
            of their own.
        seed: of the scenes.
        frames: of the decoder, two pictures each.
    """

    def __init__(self, kind: str, seed: int, frames: int):
        rng = np.random.default_rng([seed, frames])
        self.kind, self.seed, self.pieces = kind, seed, frames * 2 // PIECE
        shapes, colours = rng.permutation(EASY_SHAPES), rng.permutation(list(EASY_COLOURS))
        places = np.sort(rng.choice(self.pieces - 1, min(len(shapes), self.pieces - 1), replace=False))
        self.events = {int(p): (str(s), str(c)) for p, s, c in zip(places, shapes, colours)}

    def __iter__(self) -> Iterator[np.ndarray]:
        for piece in range(self.pieces):
            yield world.render(self._scene(piece))

    def questions(self) -> Iterator[tuple[str, str, set[int]]]:
        """Question, answer, and the frames of the decoder in which it is seen."""
        for piece, (shape, colour) in self.events.items():
            first = piece * PIECE // 2
            frames = set(range(first + 1, first + 7))
            yield f"what colour is the {shape}?", colour, frames
            yield f"what shape is the {colour} object?", shape, frames

    def _scene(self, piece: int) -> world.Scene:
        rng = np.random.default_rng([self.seed, piece])
        x, y = (float(v) for v in rng.choice(world.CENTRES, 2))
        things: tuple[world.Thing, ...] = ()
        if piece in self.events:
            shape, colour = self.events[piece]
            things = (self._thing(shape, colour, 8.5, x, y),)
        elif self.kind == "busy":
            name = str(rng.choice(DIGITS + DRAWN_WORDS))
            word = name in DRAWN_WORDS
            things = (self._thing(name, str(rng.choice(OTHERS)), 7.0 if word else 8.5, min(max(x, 15), 49), y),)
        return world.Scene(self.seed * 100_003 + piece, "easy", PIECE, things)

    @staticmethod
    def _thing(name: str, colour: str, radius: float, x: float, y: float) -> world.Thing:
        rgb = tuple(map(float, STRESS_COLOURS[colour]))
        return world.Thing(name, colour, "large", radius, rgb, "still", 2, 14, x, y, 0.0, 0.0)
