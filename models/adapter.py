"""What an adapter answers about its model, and the list of families that have one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from mmkv.layout import IMAGE, VIDEO, TokenLayout
from mmkv.parts.calibration import Identity


class Adapter:
    """Where a family keeps its decoder, and what each of its tokens is. Knows no method.

    Args:
        model: the top-level Hugging Face model (already taken out of PEFT).
    """

    families: tuple[str, ...] = ()  # config.model_type values
    axes = 1  # rows of position ids: 1, or 3 for mrope
    next_scale = False  # whether a forward brings one scale of an image that the model makes (VAR, Infinity)

    def __init__(self, model: torch.nn.Module):
        self.model = model

    @property
    def text_model(self) -> torch.nn.Module:
        """The decoder stack: the module with `.layers` whose forward takes `past_key_values`."""
        return self.model.model.language_model

    @property
    def text_config(self):
        """The configuration that the decoder's layers read their attention implementation from."""
        return self.text_model.config

    def attention_modules(self) -> list[torch.nn.Module]:
        """The self-attention module of each decoder layer, in order."""
        return [layer.self_attn for layer in self.text_model.layers]

    def head_dims(self) -> tuple[int, int]:
        """Channels per head of keys and of values."""
        config = self.text_config
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return size, size

    def scales(self, inputs: dict) -> tuple[int, ...]:
        """Tokens of each scale of the image that is made; () where the model makes none scale by scale.

        Args:
            inputs: keywords of the model's forward.
        """
        return ()

    def is_last(self, inputs: dict) -> bool:
        """Whether nobody will ask for the keys and values of this forward again, as those of an image's last scale."""
        return False

    def calibrated(self, kind: type):
        """What `mmkv calibrate` measured on this model and left in its folder, of a kind of `Calibration`; None without."""
        folder = getattr(self.model, "name_or_path", "")
        file = Path(folder) / kind.file
        return kind.load(file, Identity.of(self.text_config)) if folder and file.is_file() else None

    def vision_tower(self):
        """Where token methods look into the vision tower: a `Tower`, a `PackedTower`, or None without one."""
        return None

    def notes_of_media(self, values, kind: int, media: list[TokenLayout]) -> list[torch.Tensor] | None:
        """What was noted of patches in one run of the tower, for the decoder's tokens: fp32 `[n]` for each image or video.

        Args:
            values: `[B, patches]` of the B tiles or frames that the tower saw, or what a `PackedTower` made of it.
            kind: IMAGE or VIDEO.
            media: layouts of the images or videos of the prompt, in order.

        Returns:
            None where the tower saw others.
        """
        return None

    def frames_reader(self, processor):
        """How pictures of a stream become frames of the decoder: a `FramesReader`.

        Raises:
            ValueError: the family cannot be streamed.
        """
        raise ValueError(
            f"{type(self.model).__name__} cannot be streamed; possible are Qwen2-VL, Qwen2.5-VL, LLaVA-OneVision, LongVA"
        )

    def modality(self, inputs: dict, batch: int, length: int) -> torch.Tensor:
        """int8 `[B, T]`: TEXT, IMAGE or VIDEO for each new token, from the keywords of the model's forward."""
        out = torch.zeros(batch, length, dtype=torch.int8)
        ids = inputs.get("input_ids")
        kinds = inputs.get("mm_token_type_ids")
        if ids is not None and ids.shape == (batch, length):
            # a placeholder that the model itself generated, with no features behind it, is text
            for kind, placeholder in zip((IMAGE, VIDEO), self.placeholder_ids()):
                pixels = inputs.get("pixel_values" if kind == IMAGE else "pixel_values_videos")
                if pixels is not None or features(inputs, kind) is not None:
                    out[(ids == placeholder).cpu()] = kind
        elif kinds is not None and kinds.shape == (batch, length):
            out = kinds.cpu().to(torch.int8).clamp(0, VIDEO)
        return out

    def placeholder_ids(self) -> tuple[int, int]:
        """Token ids that stand for image and for video features; -1 where the model has none."""
        return -1, -1

    def expanded_ids(self, ids: torch.Tensor, grid: torch.Tensor | None) -> torch.Tensor:
        """Ids `[B, T]` with one placeholder for each image, with one for each of its tokens.

        Args:
            ids: int64 `[B, t]`.
            grid: int64 `[images, 3]`, frames, rows and columns of patches, in order through the batch; None without images.

        Raises:
            ValueError: the family's images have no such grids, or there are more or fewer placeholders than images.
        """
        raise ValueError(f"{type(self.model).__name__}: its images have no grids; possible are Qwen's and OpenCUA's")

    def grids(self, inputs: dict, kind: int, chunk: TokenLayout) -> list[list[tuple]]:
        """Grid of each medium of a modality in the batch, in order: a list of (frames, rows, cols) parts of tokens each.

        Newer `generate` runs the tower itself and hands the forward features without their grid;
        an adapter then reads the grid off the features or the position ids.

        A part with rows = 0 stands for `frames` tokens that lie on no grid (a newline). A fourth value True says that a newline,
        which lies on no grid either, ends each row of a part.
        """
        return []

    def layout(self, inputs: dict, batch: int, length: int, past: TokenLayout | None) -> TokenLayout:
        """Layout of the new tokens of one forward; validity and position ids are filled in by the caller.

        Args:
            inputs: keywords of the model's forward; empty where only the decoder was called.
            batch, length: shape of the new tokens.
            past: layout of the tokens before them.
        """
        chunk = TokenLayout.text(batch, length, self.axes)
        chunk.modality = self.modality(inputs, batch, length)
        if not bool(chunk.visual.any()):
            return chunk
        counts = torch.zeros(batch, dtype=torch.int64) if past is None else past.medium.amax(1).long() + 1
        for kind in (IMAGE, VIDEO):
            _place(chunk, kind, self.grids(inputs, kind, chunk), counts)
        return chunk

    def trained_positions(self, chunk: TokenLayout, start: torch.Tensor, inputs: dict) -> torch.Tensor | None:
        """Position ids `[A, B, T]` by the rule the checkpoints were trained with, None where it equals the installed one."""
        return None


def features(inputs: dict, kind: int) -> list[torch.Tensor] | None:
    """Precomputed features of each medium of a modality, `[tokens, C]` each, from `mm_encoder_outputs`; None without."""
    outputs = (inputs.get("mm_encoder_outputs") or {}).get("image" if kind == IMAGE else "video")
    return None if outputs is None else list(outputs.pooler_output)


def _place(chunk: TokenLayout, kind: int, grids: list[list[tuple]], counts: torch.Tensor) -> None:
    """Write medium, frame, row and col of the tokens of one modality; media follow one another through the batch."""
    rows, columns = (chunk.modality == kind).nonzero(as_tuple=True)
    frame, row, col, medium_length = [], [], [], []
    for parts in grids:
        first = 0
        for frames, height, width, *newlines in parts:
            if height == 0:
                frame.append(torch.full((frames,), max(first - 1, 0)))
                row.append(torch.full((frames,), -1))
                col.append(torch.full((frames,), -1))
                continue
            across = torch.arange(width + len(newlines))
            cells = torch.cartesian_prod(torch.arange(frames), torch.arange(height), across).view(-1, 3)
            cells[cells[:, 2] >= width, 1:] = -1
            frame.append(cells[:, 0] + first)
            row.append(cells[:, 1])
            col.append(cells[:, 2])
            first += frames
        medium_length.append(sum(max(h * (w + len(more)), 1) * f for f, h, w, *more in parts))
    if sum(medium_length) != rows.numel():
        # features given without their grid (precomputed, or a chunk of one): each row's tokens count as one medium
        chunk.medium[rows, columns] = counts[rows].to(torch.int32)
        counts += (chunk.modality == kind).any(1).long()
        return
    if not medium_length:
        return
    chunk.frame[rows, columns] = torch.cat(frame).to(torch.int32)
    chunk.row[rows, columns] = torch.cat(row).to(torch.int16)
    chunk.col[rows, columns] = torch.cat(col).to(torch.int16)
    at = 0
    for length in medium_length:
        batch_row = int(rows[at])
        chunk.medium[batch_row, columns[at : at + length]] = int(counts[batch_row])
        counts[batch_row] += 1
        at += length


def supported(adapters: Iterable[type[Adapter]]) -> str:
    """The supported model types, for error messages."""
    return ", ".join(sorted({family for adapter in adapters for family in adapter.families}))
