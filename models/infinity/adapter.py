"""The adapter of Infinity: what each token of a scale is."""

from __future__ import annotations

import torch

from mmkv.layout import IMAGE, TokenLayout
from mmkv.models.adapter import Adapter


class Infinity(Adapter):
    """Infinity: a forward brings one scale of an image, attended to as a whole."""

    families = ("infinity",)
    next_scale = True

    @property
    def text_model(self) -> torch.nn.Module:
        return self.model.model

    def scales(self, inputs: dict) -> tuple[int, ...]:
        return inputs["schedule"].tokens

    def is_last(self, inputs: dict) -> bool:
        return bool(inputs.get("last"))

    def layout(self, inputs: dict, batch: int, length: int, past: TokenLayout | None) -> TokenLayout:
        """All scales are media of their own, numbered from 0; their rows and columns count from 0, too."""
        chunk = TokenLayout.text(batch, length, self.axes)
        scale = inputs.get("scale")
        if scale is None:
            raise ValueError("several scales at once cannot be cached; give scale=..., or use_cache=False")
        rows, columns = inputs["schedule"].sizes[scale]
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
        chunk.modality[:], chunk.medium[:], chunk.frame[:] = IMAGE, scale, scale
        chunk.row[:], chunk.col[:] = places[:, 0].to(torch.int16), places[:, 1].to(torch.int16)
        return chunk
