"""What benchmarks/token_accuracy.py measures: every token method that works on a video-language model, at several shares.

A method that is registered and stands in none of the lists makes tests/test_benchmarks_tokens.py fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mmkv
from mmkv.cache import KIVI, CacheMethod, VidKV, WaterfillKV
from mmkv.tokens import EVS, DyCoke, FastV, MustDrop, PruMerge, SparseVLM, VisionZip
from mmkv.tokens.at_ratio import BY_THRESHOLD, RATED, at_ratio
from mmkv.tokens.method import TokenMethod

KEEPS = (0.5, 0.25, 0.1)
LEAST = {"dycoke": 0.25}  # one of each four frames stays whole
ELSEWHERE = {
    "ToMe": "in towers with absolute positions: benchmarks/tokens.py",
    "DiffRate": "in towers with absolute positions: benchmarks/tokens.py",
    "ToC3D": "in the backbone of a 3D detector",
}
STORED = dict(group=64, residual=32, sinks=4)  # a quarter of these prompts is some 270 tokens


@dataclass(frozen=True)
class TokenPoint:
    """One setting.

    Args:
        family: the method's name; one line in the plot.
        setting: what tells it from others of its family.
        tokens, cache: what `mmkv.wrap(model, tokens=..., cache=...)` takes.
        against: the setting of its family of which this is a variant, None where it is no variant.
    """

    family: str
    setting: str
    tokens: tuple[TokenMethod, ...] = ()
    cache: tuple[CacheMethod, ...] = ()
    against: str | None = None

    @property
    def blind(self) -> bool:
        """Whether it never looks at the text, so that the question may come later."""
        return all(type(m).in_decoder is TokenMethod.in_decoder for m in self.tokens)

    @property
    def place(self) -> str:
        """ "dense", "before the decoder", "between layers" or "both"."""
        if not self.tokens:
            return "dense"
        kinds = [type(m) for m in self.tokens]
        before = any(kind.before_decoder is not TokenMethod.before_decoder for kind in kinds)
        return "before the decoder" if self.blind else "both" if before else "between layers"


DENSE = TokenPoint("dense", "")


def share(keep: float) -> str:
    """ "25 %"."""
    return f"{100 * keep:.3g} %"


def named(name: str) -> str:
    """The class's name of a method in lower case."""
    return next(m.name for m in mmkv.methods() if m.kind == "tokens" and m.name.lower() == name)


def rated() -> list[TokenPoint]:
    """Methods with a ratio."""
    out = []
    for name in RATED:
        if name not in BY_THRESHOLD:
            keeps = [keep for keep in KEEPS if keep >= LEAST.get(name, 0)]
            out += [TokenPoint(named(name), share(keep), (at_ratio(name, keep),)) for keep in keeps]
    return out


def must_drop(tokens: int, **options) -> TokenPoint:
    return TokenPoint("MustDrop", f"{tokens} of 576", (MustDrop.for_tokens(tokens, **options),))


def adaptive() -> list[TokenPoint]:
    """Methods that decide themselves how much stays."""
    return [
        *(must_drop(tokens) for tokens in (192, 128, 64)),
        TokenPoint("PruMerge", "PruMerge", (PruMerge(),)),
        TokenPoint("PruMerge", "PruMerge+", (PruMerge(plus=True),)),
    ]


def varied(point: TokenPoint, about: str, **options) -> TokenPoint:
    """The same with other options."""
    return replace(
        point,
        setting=f"{point.setting}, {about}",
        tokens=(replace(point.tokens[0], **options),),
        against=point.setting,
    )


def variants(points: Sequence[TokenPoint]) -> list[TokenPoint]:
    """Settings whose defaults are to be settled, and later layers: the papers' were found in 32 of them, here are six."""
    out = []
    for point in points:
        method = point.tokens[0]
        if isinstance(method, VisionZip):
            out.append(varied(point, "official merge", contextual_merge="official"))
            keep = round(method.dominant + method.contextual, 6)
            for part in (0.0, 0.5):
                out.append(
                    varied(point, f"{part:.0%} contextual", dominant=keep * (1 - part), contextual=keep * part or 0)
                )
        elif isinstance(method, PruMerge):
            out.append(varied(point, "normalized", weights="normalized"))
        elif isinstance(method, EVS):
            out.append(varied(point, "paper's budget", budget="paper"))
        elif isinstance(method, DyCoke):
            out.append(varied(point, "mean", redundant="mean"))
        elif isinstance(method, MustDrop):
            out.append(varied(point, "no merging", tau=1.01))
        elif isinstance(method, FastV):
            out.append(varied(point, "layer 3", layer=3))
        elif isinstance(method, SparseVLM):
            out.append(varied(point, "layers 2, 3, 4", layers=(2, 3, 4)))
    return out


def settings() -> list[TokenPoint]:
    """All methods, dense first, and the variants of their options.

    Raises:
        KeyError: a registered method is in no list.
    """
    points = rated() + adaptive()
    listed = {point.family for point in points} | set(ELSEWHERE)
    missing = sorted({m.name for m in mmkv.methods() if m.kind == "tokens"} - listed)
    if missing:
        raise KeyError(f"no settings for {', '.join(missing)}; add them to benchmarks/token_points.py")
    return [DENSE, *points, *variants(points)]


def mixes() -> list[TokenPoint]:
    """Tokens and cache: a quarter of the tokens, stored in few bits; each alone as well."""
    tokens = {
        "all tokens": (),
        "VisionZip 25 %": (at_ratio("visionzip", 0.25),),
        "FastV 25 %": (FastV(ratio=0.75),),
        "MustDrop 128 of 576": (MustDrop.for_tokens(128),),
    }
    caches = {
        "dense": (),
        "VidKV 1.5 / 1.58 bits": (VidKV(key_bits=1.5, value_bits=1.58, **STORED),),
        "WaterfillKV 1.5 / 1.58 bits": (WaterfillKV(key_bits=1.5, value_bits=1.58, **STORED),),
        "KIVI 2 bits": (KIVI(bits=2, **STORED),),
    }
    return [TokenPoint(some, how, tokens[some], caches[how]) for some in tokens for how in caches]
