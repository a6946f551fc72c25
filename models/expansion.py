"""One placeholder for each image to one for each of its tokens, in ids and in the attention mask."""

from __future__ import annotations

import torch


def image_tokens(grid: torch.Tensor, merge: int) -> list[int]:
    """Decoder tokens of each image: t h w / merge^2.

    Args:
        grid: int64 `[images, 3]`, frames, rows and columns of patches.
        merge: patches of a token in each direction.
    """
    return (grid.prod(-1) // merge**2).tolist()


def expand(
    ids: torch.Tensor, mask: torch.Tensor | None, counts: list[int], placeholder: int, pad: int = 0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Repeat each image's placeholder as often as the image has tokens; ids that are expanded already stay.

    Args:
        ids: int64 `[B, T]`, images in order through the batch.
        mask: `[B, S]`, the last T columns of it for these ids; None for all ones.
        counts: tokens of each image.
        placeholder: the id that stands for an image.
        pad: the id that fills rows that get shorter than others, on the left.

    Returns:
        ids `[B, T']` and the mask `[B, S - T + T']`; None where there was none and no row needed padding.

    Raises:
        ValueError: as many placeholders as neither images nor their tokens.
    """
    here = ids == placeholder
    found = int(here.sum())
    if found == sum(counts):
        return ids, mask
    if found != len(counts):
        raise ValueError(
            f"{found} placeholders (id {placeholder}) for {len(counts)} images of {sum(counts)} tokens; give one for each image"
        )
    repeats = torch.ones_like(ids)
    repeats[here] = torch.tensor(counts, dtype=ids.dtype, device=ids.device)
    rows = [row.repeat_interleave(times) for row, times in zip(ids, repeats)]
    length = max(len(row) for row in rows)
    out = torch.stack([torch.nn.functional.pad(row, (length - len(row), 0), value=pad) for row in rows])
    if mask is None and all(len(row) == length for row in rows):
        return out, None
    mask = torch.ones_like(ids) if mask is None else mask
    new = mask[:, mask.shape[1] - ids.shape[1] :]
    parts = [part.repeat_interleave(times) for part, times in zip(new, repeats)]
    grown = torch.stack([torch.nn.functional.pad(part, (length - len(part), 0)) for part in parts])
    return out, torch.cat([mask[:, : mask.shape[1] - ids.shape[1]], grown], dim=1)


def images_of_rows(ids: torch.Tensor, counts: list[int], placeholder: int) -> list[int]:
    """How many of the images each row `[B, T]` of expanded ids holds.

    Raises:
        ValueError: the rows do not add up to whole images.
    """
    out, at = [], 0
    for tokens in (ids == placeholder).sum(1).tolist():
        first = at
        while tokens > 0 and at < len(counts):
            tokens -= counts[at]
            at += 1
        if tokens:
            raise ValueError(
                "images do not fit the placeholders of this batch; give their grids in the order of the prompts"
            )
        out.append(at - first)
    return out
