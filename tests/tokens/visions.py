"""Images and videos as methods behind the projector are told of them, and blocks of a tower."""

from __future__ import annotations

import torch

from mmkv.layout import IMAGE, VIDEO, TokenLayout
from mmkv.tokens.method import TowerView, Vision


def vision(features, frame, row, col, kind=VIDEO, notes=None) -> Vision:
    """A medium of tokens with these features `[n, C]` at these places, -1 for those on no grid."""
    layout = TokenLayout.text(1, len(features))
    layout.modality[:] = kind
    layout.medium[:] = 0
    for name, value in (("frame", frame), ("row", row), ("col", col)):
        getattr(layout, name)[0] = torch.as_tensor(value)
    return Vision(features, layout, torch.zeros(0, features.shape[1]), notes or {})


def video(features, kind=VIDEO, newline=False, **notes) -> Vision:
    """Frames `[F, rows, cols, C]`, a newline behind them if wanted; each note is `[F, rows, cols]` or longer by the newline."""
    frames, rows, cols, channels = features.shape
    cells = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(cols))
    features = features.reshape(-1, channels)
    notes = {name: torch.as_tensor(value).float().flatten() for name, value in notes.items()}
    if newline:
        cells = torch.cat([cells, torch.tensor([[frames - 1, -1, -1]])])
        features = torch.cat([features, features.new_full((1, channels), 7.0)])
        notes = {name: torch.cat([value, torch.zeros(1)]) for name, value in notes.items()}
    return vision(features, *cells.T, kind=kind, notes=notes)


def image(features, **notes) -> Vision:
    """A grid `[rows, cols, C]`."""
    return video(features[None], kind=IMAGE, **notes)


def tower(images=2, tokens=6, prefix=1, block=2, depth=4) -> TowerView:
    """A block of a tower with random attention, CLS in front where there is a prefix."""
    q, k = torch.randn(2, images, 3, tokens, 5).unbind(0)
    place = torch.arange(tokens).expand(images, -1).clone()
    size = torch.ones(images, tokens)
    return TowerView(block, depth, torch.randn(images, tokens, 15), q, k, 0.4, size, place, prefix, prefix > 0)


def attention(view: TowerView, image: int) -> torch.Tensor:
    """fp64 `[N, N]`: mean over heads, the plain way."""
    q, k = view.queries[image].double(), view.keys[image].double()
    return torch.stack([((a @ b.T) * view.scale).softmax(-1) for a, b in zip(q, k)]).mean(0)
