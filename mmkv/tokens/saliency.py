"""How salient the vision tower finds each patch: CLS attention where there is a CLS token, received attention where not.

A method notes it in a block of the tower and reads it behind the projector, where it has come down to the decoder's tokens.
"""

from __future__ import annotations

import torch

from mmkv.tokens.method import TowerFacts, TowerView, Vision

SCORES = ("auto", "cls", "received")


def check_scores(scores: str) -> None:
    """Raise ValueError for a name of no score."""
    if scores not in SCORES:
        raise ValueError(f"scores={scores!r}; possible are {', '.join(map(repr, SCORES))}")


def check_tower(method: str, scores: str, facts: TowerFacts) -> None:
    """Raise ValueError where a model's tower cannot give the score that a method asks for."""
    if facts.depth == 0:
        raise ValueError(
            f"{method} needs a vision tower and this model has none; pass a model that sees, or drop {method}"
        )
    if scores == "cls" and not facts.has_cls:
        raise ValueError(f"{method}(scores='cls') on a vision tower without CLS token; possible are 'auto', 'received'")


def tower_score(view: TowerView, scores: str = "auto") -> torch.Tensor:
    """fp32 `[B, N]`: saliency of each token in this block, mean over heads.

    Args:
        view: the block.
        scores: "cls" (attention paid by the CLS token; VisionZip, PruMerge, MustDrop), "received" (mean attention over all
            queries of the image), or "auto": "cls" where the tower has a CLS token, else "received".

    Raises:
        ValueError: "cls" on a tower without CLS token.
    """
    if scores == "cls" or (scores == "auto" and view.has_cls):
        return view.cls_attention()
    return view.received_attention()


def note_score(view: TowerView, scores: str, name: str) -> None:
    """Notes each patch's saliency under `name`, for `before_decoder` and `in_decoder`; arguments as for `tower_score`."""
    view.notes[name] = view.of_patches(tower_score(view, scores))


def noted(vision: Vision, name: str) -> torch.Tensor:
    """fp32 `[n]`: what was noted under `name`.

    Raises:
        ValueError: nothing was: the tower did not run in this forward.
    """
    if name not in vision.notes:
        raise ValueError(
            f"{name!r} was not noted in the vision tower; pass pixels, not features, or use EVS or Uniform"
        )
    return vision.notes[name]
