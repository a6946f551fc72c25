"""A model that makes an image scale by scale, reduced to the attention of its heads, whose kinds are known.

Contextual heads: all queries look at the same few keys. Structural heads: queries look at the keys near their own place, in
every scale. What attention over everything would have given is worked out beside, in fp64.
"""

from __future__ import annotations

import torch
from cache_reference import Bare, held_by_head

from mmkv.layout import IMAGE, TokenLayout

SIDES = (1, 2, 3, 4, 6, 8, 10, 13, 16)
SIZES = tuple(side * side for side in SIDES)  # 655 tokens, 399 of them before the last scale
HALF = ((1, 3), (0, 1), (2, 3))  # structural heads of three layers of four heads


def layout(scale: int, rows: int, cols: int, batch: int = 1) -> TokenLayout:
    """Of one scale."""
    chunk = TokenLayout.text(batch, rows * cols)
    chunk.modality[:], chunk.medium[:], chunk.frame[:] = IMAGE, scale, scale
    place = torch.cartesian_prod(torch.arange(rows), torch.arange(cols)).view(-1, 2)
    chunk.row[:], chunk.col[:] = place[:, 0], place[:, 1]
    return chunk


def plain(module, query, keys, values, mask, *, scaling=None, is_causal=None, **kwargs):
    """Attention as the model has it: not causal, grouped."""
    keys, values = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (keys, values))
    out = torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


class Painter(Bare):
    """Layers of attention heads of two kinds, over scales.

    Args:
        method: cache method or None.
        structural: for each layer its structural heads, all others are contextual.
        sides: (rows, cols) of each scale, or one number for both.
        sample: which image; the heads stay what they are.
        sharp: scale of the queries of each layer, or of all; 0 looks at everything alike.
        chunk: another layout for each scale.
    """

    def __init__(
        self, method, structural=HALF, heads=4, dim=32, sides=SIDES, group=1, batch=1, sample=0, sharp=14.0, chunk=None
    ):
        super().__init__(method, batch=batch, heads=heads, dim=dim, layers=len(structural), group=group, seed=sample)
        self.structural = structural
        self.chunk = chunk
        self.sharp = sharp if isinstance(sharp, tuple) else (sharp,) * len(structural)
        self.sides = [side if isinstance(side, tuple) else (side, side) for side in sides]
        self.sizes = [rows * cols for rows, cols in self.sides]
        self.outputs: list[list[torch.Tensor]] = []  # of each scale, by layer: [B, T, Hq, D]
        self.exact: list[list[torch.Tensor]] = []
        self.queries: list[list[torch.Tensor]] = []
        self.lengths: list[list[list[int]]] = []  # of each scale, by layer: tokens of each head of batch element 0
        kinds = torch.Generator().manual_seed(7)
        self.waves = torch.randn(len(structural), heads, 2, dim, generator=kinds) * 6
        self.phases = torch.rand(len(structural), heads, dim, generator=kinds) * 6.283
        self.common = torch.nn.functional.normalize(torch.randn(len(structural), heads, dim, generator=kinds), dim=-1)

    def heads_of(self, layer: int, rows: int, cols: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries `[B, Hq, T, D]`, keys and values `[B, Hkv, T, D]` of a scale."""
        draw = lambda *shape: torch.randn(*shape, generator=self.generator)  # noqa: E731
        n = rows * cols
        place = torch.cartesian_prod((torch.arange(rows) + 0.5) / rows, (torch.arange(cols) + 0.5) / cols).view(-1, 2)
        near = (place @ self.waves[layer] + self.phases[layer][:, None]).cos() * (2 / self.dim) ** 0.5  # [H, T, D]
        strong = (torch.rand(self.batch, self.heads, n, 1, generator=self.generator) < 0.05).float()
        mine = torch.zeros(self.heads, 1, 1)
        mine[list(self.structural[layer])] = 1.0
        noise = 0.3 * draw(self.batch, self.heads, n, self.dim) / self.dim**0.5
        common = self.common[layer][:, None]
        keys = mine * near + (1 - mine) * strong * common + noise
        queries = self.sharp[layer] * (mine * near + (1 - mine) * 0.6 * common)
        queries = queries.expand(self.batch, -1, -1, -1).repeat_interleave(self.group, 1)
        return queries + draw(*queries.shape) / self.dim**0.5, keys, draw(*keys.shape)

    def scale(self, scale: int) -> Painter:
        """Make the next scale."""
        rows, cols = self.sides[scale]
        self.state.extend(layout(scale, rows, cols, self.batch) if self.chunk is None else self.chunk, None)
        outputs, exact, queries = [], [], []
        for i, layer in enumerate(self.layers):
            q, k, v = self.heads_of(i, rows, cols)
            self.keys[i], self.values[i] = torch.cat([self.keys[i], k], 2), torch.cat([self.values[i], v], 2)
            view, _ = layer.update(k, v)
            out, _ = view.attend(plain, "plain", None, q, None, scaling=1.0, is_causal=False)
            outputs.append(out)
            queries.append(q)
            exact.append(plain(None, q.double(), self.keys[i].double(), self.values[i].double(), None, scaling=1.0)[0])
        self.outputs.append(outputs)
        self.exact.append(exact)
        self.queries.append(queries)
        self.lengths.append(
            [[self.held(i, head).numel() for head in range(self.heads)] for i in range(len(self.layers))]
        )
        return self

    def paint(self, count: int | None = None) -> Painter:
        """Make all scales, or the first `count`."""
        for scale in range(len(self.outputs), len(self.sides) if count is None else count):
            self.scale(scale)
        return self

    def held(self, layer: int, head: int, row: int = 0) -> torch.Tensor:
        """Logical positions of the tokens that a head holds, ascending."""
        return held_by_head(self.layers[layer], row, head)[0]

    @property
    def error(self) -> float:
        """RMS of all outputs against exact attention, relative."""
        pairs = [(a, b) for scale in zip(self.outputs, self.exact) for a, b in zip(*scale)]
        wrong = sum(float((a.double() - b).square().sum()) for a, b in pairs)
        return (wrong / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5

    @property
    def bytes(self) -> int:
        """That the layers hold."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.tensors())
