"""Features in the places of their placeholders, and what stands for them in token ids."""

from __future__ import annotations

import torch

SENTINEL = -200  # the public code's mark for an image or video in token ids; no row of any embedding


def expanded(ids: list[int], blocks: list[tuple[int, int]]) -> list[int]:
    """Token ids in which each sentinel has become a block of placeholders.

    Args:
        ids: with one `SENTINEL` for each image or video.
        blocks: (placeholder id, number of tokens) of each, in order.

    Raises:
        ValueError: another number of sentinels than of blocks.
    """
    if ids.count(SENTINEL) != len(blocks):
        raise ValueError(f"{ids.count(SENTINEL)} places for {len(blocks)} images and videos; give each one place")
    rest = iter(blocks)
    out: list[int] = []
    for token in ids:
        if token == SENTINEL:
            placeholder, count = next(rest)
            out += [placeholder] * count
        else:
            out.append(token)
    return out


def check_ids(ids: torch.Tensor) -> None:
    """Refuse sentinels, which would be looked up in the embedding. Only prompts hold them."""
    if ids.shape[1] > 1 and bool((ids < 0).any()):
        raise ValueError(
            f"input_ids hold {int(ids.min())}, a mark for an image or video; expand it with "
            "mmkv.models.longva.splicing.expanded, or let the processor make input_ids"
        )


def spliced(embeds: torch.Tensor, ids: torch.Tensor | None, placeholder: int, features, kind: str) -> torch.Tensor:
    """Embeddings `[B, T, C]` with features in the places of a kind's placeholders, in order through the batch.

    Args:
        embeds: `[B, T, C]`.
        ids: int64 `[B, T]`.
        placeholder: the token id that stands for a feature.
        features: `[n, C]` of each image or video.
        kind: "image" or "video", for the message.

    Raises:
        ValueError: no token ids, or another number of placeholders than of features.
    """
    if ids is None:
        raise ValueError("pixels or features with inputs_embeds; give input_ids, which say where they belong")
    there = ids == placeholder
    rows = torch.cat(list(features)).to(embeds.device, embeds.dtype)
    if int(there.sum()) != len(rows):
        raise ValueError(f"{int(there.sum())} {kind} placeholders (id {placeholder}) for {len(rows)} features")
    return embeds.masked_scatter(there[..., None], rows)


def repeated(media: dict, ids: torch.Tensor, config, times: int) -> dict:
    """Pixels and counts of a batch whose prompts are each repeated `times` times: all media of a prompt, then again.

    Args:
        media: any of `pixel_values` with `image_tiles`, `pixel_values_videos` with `video_frames`.
        ids: int64 `[B, T]` before they were repeated.
        config: of the model.
        times: copies of each prompt.
    """
    out: dict = {}
    for pixels, counts, placeholder, side in (
        ("pixel_values", "image_tiles", config.image_token_id, config.image_side),
        ("pixel_values_videos", "video_frames", config.video_token_id, config.video_side),
    ):
        if pixels not in media:
            continue
        each = media.get(counts)
        each = torch.tensor([len(media[pixels])]) if each is None else torch.as_tensor(each).cpu()
        of_prompt = ((ids == placeholder).sum(1) // side**2).tolist()  # pictures
        ends = each.cumsum(0).tolist()
        media_of = [sum(e <= end for e in ends) for end in torch.tensor(of_prompt).cumsum(0).tolist()]
        many = [b - a for a, b in zip([0, *media_of], media_of)]
        out[pixels] = torch.cat([part.repeat(times, 1, 1, 1) for part in media[pixels].split(of_prompt)])
        out[counts] = torch.cat([part.repeat(times) for part in each.split(many)])
    return out
