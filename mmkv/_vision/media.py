"""`Media`: the images and videos of one prompt between the projector and the decoder, and what was noted about them."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from mmkv.layout import IMAGE, VIDEO, TokenLayout
from mmkv.models import Adapter
from mmkv.tokens.method import TokenMethod, Vision


class Media:
    """Asks the methods that act before the decoder, one image or video at a time.

    Args:
        adapter: of the model.
        methods: in the order in which they are asked.
    """

    def __init__(self, adapter: Adapter, methods: tuple[TokenMethod, ...]):
        self.adapter, self.methods = adapter, methods
        self.keep: torch.Tensor | None = None  # bool [B, T], tokens that enter the decoder; None for all
        # by run of the vision tower: weak reference to its output, what was noted
        self._noted: list[tuple[Any, dict]] = []
        self._runs = 0  # how many of them were there before the forward in progress
        self._reading = False  # a forward of the whole model is in progress
        self._notes: list[dict[str, torch.Tensor]] = []  # by batch element: fp32 [T] by name

    def begin(self) -> None:
        """A forward of the whole model begins."""
        self._clear()
        self._reading = True

    def forget(self) -> None:
        """The forward has ended. Notes stay as long as the features that they belong to."""
        self.keep, self._notes, self._reading = None, [], False
        self._clear()

    def _clear(self) -> None:
        """Let go of what was noted of features that nobody holds any more."""
        self._noted = [(ref, notes) for ref, notes in self._noted if ref() is not None]
        self._runs = len(self._noted)

    def noted_in_tower(self, output, notes: dict) -> None:
        """The vision tower has run; what was noted waits for the prompt that holds its output."""
        if not self._reading:  # in a forward, notes wait for the prompt even where the model has let go of the output
            self._clear()
        self._noted.append((weakref.ref(output[0] if isinstance(output, tuple) else output), notes))

    def notes_of(self, row: int, columns: torch.Tensor) -> dict[str, torch.Tensor]:
        """What was noted of some tokens of a batch element, fp32 `[n]` by name."""
        if not self._notes:
            return {}
        return {name: values[columns.to(values.device)] for name, values in self._notes[row].items()}

    def add_notes(self, row: int, columns: torch.Tensor, notes: dict[str, torch.Tensor]) -> None:
        """Note more of them."""
        for name, values in notes.items():
            kept = self._notes[row].setdefault(name, torch.zeros(self._length, device=values.device))
            kept[columns.to(kept.device)] = values.float().to(kept.device)

    @torch.no_grad()
    def choose(self, chunk: TokenLayout, embeds: torch.Tensor, inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask about every image and video of the new tokens.

        Args:
            chunk: layout of the T new tokens.
            embeds: `[B, T, C]`.
            inputs: keywords of the whole model's forward.

        Returns:
            their embeddings, merged ones in place, and int64 `[B, T]`: the token that each became part of, -1 where dropped.
        """
        self._length, self._notes = len(chunk), [{} for _ in range(chunk.batch)]
        media = _media(chunk)
        self._bring(chunk, media, inputs.get("mm_encoder_outputs") or {})
        into = torch.arange(len(chunk)).repeat(chunk.batch, 1)
        keep = torch.ones(chunk.batch, len(chunk), dtype=torch.bool)
        for row, columns in media:
            text = embeds[row, (chunk.valid[row] & ~chunk.visual[row]).to(embeds.device)]
            for method in self.methods:
                at = columns.to(embeds.device)
                vision = Vision(
                    features=embeds[row, at],
                    layout=_layout(chunk, row, columns),
                    text=text,
                    notes=self.notes_of(row, columns),
                )
                choice = method.before_decoder(vision)
                if choice is None:
                    continue
                if choice.features is not None:
                    embeds = embeds.clone()
                    embeds[row, at] = choice.features.to(embeds.dtype)
                self.add_notes(row, columns, choice.notes)
                moved = torch.arange(len(chunk))
                moved[columns] = choice.went(columns)
                into[row] = torch.where(into[row] >= 0, moved[into[row].clamp(min=0)], -1)
                kept = choice.keep.cpu()
                keep[row, columns[~kept]] = False
                columns = columns[kept]
        self.keep = None if bool(keep.all()) else keep
        return embeds, into

    def _bring(self, chunk: TokenLayout, media: list, features: dict) -> None:
        """Bring what was noted in the vision tower to the decoder's tokens; nothing where features came from elsewhere."""
        runs = [notes for _, notes in self._noted[self._runs :]]  # of this very forward, images first
        for kind in (IMAGE, VIDEO):
            mine = [(row, columns) for row, columns in media if int(chunk.modality[row, columns[0]]) == kind]
            if not mine:
                continue
            given = features.get("image" if kind == IMAGE else "video")
            if given is None:
                noted = runs.pop(0) if runs else {}
            else:  # encoded before, by `generate` or by a caller
                noted = next((notes for ref, notes in self._noted if ref() is given), {})
            for name, values in noted.items():
                for (row, columns), part in zip(mine, self._of_media(values, kind, chunk, mine)):
                    self.add_notes(row, columns, {name: part})

    def _of_media(self, values, kind: int, chunk: TokenLayout, media: list) -> list[torch.Tensor]:
        """Values fp32 `[n]` of each medium, also where `generate` has repeated batch elements for beams or several answers.

        Raises:
            ValueError: the tower saw other images than the prompt holds.
        """
        of_row = [[columns for r, columns in media if r == row] for row in range(chunk.batch)]
        for times in (t for t in range(1, chunk.batch + 1) if chunk.batch % t == 0):
            groups = [of_row[i : i + times] for i in range(0, chunk.batch, times)]
            if any(list(map(len, row)) != list(map(len, group[0])) for group in groups for row in group):
                continue
            layouts = [_layout(chunk, i * times, columns) for i, group in enumerate(groups) for columns in group[0]]
            parts = self.adapter.notes_of_media(values, kind, layouts)
            if parts is None:
                continue
            out, at = [], 0
            for group in groups:
                out += parts[at : at + len(group[0])] * times
                at += len(group[0])
            return out
        raise ValueError(
            f"what the vision tower saw last are not the {len(media)} images or videos of this prompt; pass pixels and prompt "
            "in one call"
        )


def _layout(chunk: TokenLayout, row: int, columns: torch.Tensor) -> TokenLayout:
    """Of some tokens of a batch element, a batch of one."""
    return chunk.rows(torch.tensor([row])).take(columns)


def _media(chunk: TokenLayout) -> list[tuple[int, torch.Tensor]]:
    """(batch element, int64 columns) of each image and video, in order."""
    out = []
    for row in range(chunk.batch):
        visual = chunk.visual[row] & chunk.valid[row]
        for medium in chunk.medium[row, visual].unique().tolist():
            out.append((row, ((chunk.medium[row] == medium) & visual).nonzero()[:, 0]))
    return out
