"""`at_ratio`: a method by name, set so that a share of the vision tokens comes out of it."""

from __future__ import annotations

import math
from collections.abc import Callable

from mmkv.parts.registry import nearest
from mmkv.tokens.dycoke import DyCoke
from mmkv.tokens.evs import EVS
from mmkv.tokens.fastv import FastV
from mmkv.tokens.method import TokenMethod
from mmkv.tokens.mustdrop import THRESHOLDS, MustDrop
from mmkv.tokens.sparsevlm import SparseVLM
from mmkv.tokens.uniform import Uniform
from mmkv.tokens.vidcom2 import VidCom2
from mmkv.tokens.visionzip import VisionZip

LLAVA_TOKENS = 576  # that MustDrop's presets are given for
CONTEXTUAL = 10 / 64  # of VisionZip's tokens, in the paper's smallest setting
BY_THRESHOLD = ("mustdrop",)  # of `RATED`: the ratio only chooses the nearest official setting


def at_ratio(name: str, keep: float) -> TokenMethod:
    """A token method whose last decoder layer reads the share `keep` of a prompt's vision tokens.

    Rounding apart (at most a token of each frame, and of each stage of SparseVLM's). What the layers before read differs:

    * Uniform, VisionZip, EVS, DyCoke and VidCom2 act before the decoder, so every layer reads that share. VisionZip's merged
      tokens count (27 dominant to 5 contextual, the paper's); EVS, DyCoke and VidCom2 leave images alone. EVS never keeps
      less than the first frame, DyCoke keeps more where the last group has fewer than four frames.
    * FastV lets the first two layers read everything.
    * SparseVLM's stages fall geometrically to that share behind the last (layer 15 of 32; its recycled tokens count). The
      papers state the mean over layers, which is more.
    * MustDrop has thresholds, which no ratio follows from: its official setting for the nearest of 192, 128 and 64 of 576
      tokens (a mean over layers), whatever it keeps of this prompt.

    Args:
        name: of the class, in any case: one of `RATED`.
        keep: share of the vision tokens, above 0, at most 1, which is the method's `keeping_everything`.

    Raises:
        ValueError: unknown name, a method without such a setting, or a share out of its range.
    """
    key = check_rated(name)
    if isinstance(keep, bool) or not isinstance(keep, int | float) or not 0 < keep <= 1:
        raise ValueError(f"keep={keep!r}; possible are shares of the vision tokens above 0, at most 1")
    if keep == 1:
        return _MADE[key](0.5).keeping_everything()
    return _MADE[key](float(keep))


def check_rated(name: str) -> str:
    """The method's name in lower case.

    Raises:
        ValueError: there is none of that name, or it has no setting that says how many tokens stay.
    """
    key = str(name).lower()
    if key in _UNRATED:
        raise ValueError(f"{name} {_UNRATED[key]}; a keep ratio takes one of {', '.join(RATED)}")
    if key not in _MADE:
        raise ValueError(
            f"no token method {name!r}{nearest(key, (*_MADE, *_UNRATED))}; possible are {', '.join(RATED)}"
        )
    return key


def _dycoke(keep: float) -> DyCoke:
    if keep < 0.25:
        raise ValueError(f"keep={keep}: DyCoke keeps one of each four frames whole; possible are shares from 0.25")
    return DyCoke(ratio=min((1 - keep) * 4 / 3, math.nextafter(1, 0)))


def _mustdrop(keep: float) -> MustDrop:
    return MustDrop.for_tokens(min(THRESHOLDS, key=lambda tokens: abs(tokens - keep * LLAVA_TOKENS)))


def _sparsevlm(keep: float) -> SparseVLM:
    """Stage i leaves keep^(i/3), of which clusters are `share` of what goes: k + share (before - k) = after."""
    share = SparseVLM.recycled / SparseVLM.per_cluster
    left = [keep ** (stage / 3) for stage in range(4)]
    own = [(after - share * before) / (1 - share) for before, after in zip(left, left[1:])]
    return SparseVLM(keep=tuple(max(amount, keep / 2) for amount in own))


_MADE: dict[str, Callable[[float], TokenMethod]] = {
    "dycoke": _dycoke,
    "evs": lambda keep: EVS(ratio=1 - keep),
    "fastv": lambda keep: FastV(ratio=1 - keep),
    "mustdrop": _mustdrop,
    "sparsevlm": _sparsevlm,
    "uniform": lambda keep: Uniform(keep=keep),
    "vidcom2": lambda keep: VidCom2(keep=keep),
    "visionzip": lambda keep: VisionZip(dominant=keep * (1 - CONTEXTUAL), contextual=keep * CONTEXTUAL),
}
_UNRATED = {
    "diffrate": "has learned numbers of tokens for each block of the tower, no keep ratio",
    "prumerge": "adapts to each frame how many tokens stay, it has no keep ratio",
    "toc3d": "is for the backbone of a 3D detector, not for language models",
    "tome": "merges r tokens in each block of the tower, and the decoder reads them all",
}
RATED = tuple(_MADE)
