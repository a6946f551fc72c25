"""A `DecoderView` of given attention, and layouts such as `T T I I I T`, for tests of methods between decoder layers."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from mmkv.layout import IMAGE, TEXT, VIDEO, TokenLayout
from mmkv.tokens.method import DecoderView

MODALITY = {"T": TEXT, "I": IMAGE, "V": VIDEO}


def layout(kinds: str) -> TokenLayout:
    """Of a string of T, I and V; each run of I or V is a medium of one row."""
    out = TokenLayout.text(1, len(kinds))
    medium = -1
    for place, kind in enumerate(kinds):
        if kind == "T":
            continue
        starts = place == 0 or kinds[place - 1] != kind
        medium += starts
        out.modality[0, place], out.medium[0, place] = MODALITY[kind], medium
        out.frame[0, place], out.row[0, place] = 0, 0
        out.col[0, place] = 0 if starts else out.col[0, place - 1] + 1
    return out


def random_attention(heads: int, length: int, seed: int = 0, sharp: float = 1.0) -> torch.Tensor:
    """Causal attention [H, m, m]; the larger `sharp`, the less even."""
    generator = torch.Generator().manual_seed(seed)
    score = sharp * torch.randn(heads, length, length, generator=generator)
    return score.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)


def view(kinds: str, attention=None, hidden=None, embeds=None, notes=None, layer=2, layers=32) -> DecoderView:
    """One prompt of these kinds of tokens with attention [H, m, m]."""
    m = len(kinds)
    attention = random_attention(4, m) if attention is None else attention
    hidden = torch.randn(m, 8, generator=torch.Generator().manual_seed(1)) if hidden is None else hidden
    return DecoderView(
        layer=layer,
        layers=layers,
        hidden=hidden,
        embeds=hidden if embeds is None else embeds,
        layout=layout(kinds),
        mass=lambda rows: SimpleNamespace(sum=attention[:, rows].sum(1), max=attention[:, rows].amax(1)),
        head_mean=lambda rows: attention[:, rows].mean(0),
        notes=notes or {},
    )


def after(seen: DecoderView, choice, attention, layer: int) -> DecoderView:
    """The view behind a later layer, of what a choice left."""
    keep = choice.keep
    hidden = seen.hidden if choice.features is None else choice.features
    notes = {name: note[keep] for name, note in {**seen.notes, **choice.notes}.items()}
    return DecoderView(
        layer=layer,
        layers=seen.layers,
        hidden=hidden[keep],
        embeds=seen.embeds[keep],
        layout=seen.layout.take(keep),
        mass=lambda rows: SimpleNamespace(sum=attention[:, rows].sum(1), max=attention[:, rows].amax(1)),
        head_mean=lambda rows: attention[:, rows].mean(0),
        notes=notes,
    )
