"""VidKV: 1.x-bit keys and values for video."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmkv.cache.formats import ChannelClass, PackFormat, Side
from mmkv.cache.method import CacheMethod, check_numbers
from mmkv.kernels import code, sign, ternary
from mmkv.kernels.spec import Code
from mmkv.layout import TokenLayout
from mmkv.parts.registry import register

# The paper's easy-channel alphabet is {0, s} on all 2n columns of the complex transform. The real transform keeps one of
# each conjugate pair, and the pair's antisymmetric half of {0, s} is +-s/2.
_OFFICIAL_REAL = Code("fft {0,s}", (0.0, 1.0), (0.0,), unit="mean_abs")
_OFFICIAL_IMAGINARY = Code("fft +-s/2", (-0.5, 0.5), (0.0,), unit="mean_abs")


@register("cache", "VidKV, arXiv 2503.16257")
@dataclass(frozen=True)
class VidKV(CacheMethod):
    """Keys at 1.x bits by channel class, ternary values, and protected tokens that the question's text resembles.

    Channels with a wide range over the tokens get 2 bits, the others 1 bit per Fourier coefficient; values are ternary
    per channel. With `stp`, that share of the vision tokens (most similar to the text) keeps 2-bit values.

    Paper: Plug-and-Play 1.x-Bit KV Cache Quantization for Video Large Language Models (arXiv 2503.16257).

    Args:
        key_bits: 1 to 2; the fraction is the share of 2-bit channels (1.5: half of them).
        value_bits: 1.58 (ternary), 2, 4 or 8.
        stp: share of vision tokens whose values keep 2 bits, 0 to below 1 (the paper: 0 or 0.2).
        group: tokens per group, default 128 (paper 32, which costs 1 bit of metadata per key element).
        residual: newest tokens kept dense, at least 32.
        codebook: of keys and 2-bit values: "lloyd" (zero point and scale fitted to each group), "gaussian" (mean and standard
            deviation, Lloyd-Max levels) or "minmax" (the paper's; its easy channels are mean and mean deviation here).
        fft: Fourier basis on the 1-bit channels.
        value_basis: "channel" (a group is one channel over the tokens, the paper's) or "rotated" (random-sign Hadamard over
            the head, a group is one token).
        order: channels are ranked per "head", or once per "layer" for all heads (the paper's).
        scale_bits: 16 (fp16), or 8 for logarithmic bytes (at most 2.2 % off).
        sinks: first tokens kept dense (attention sinks have outlier keys).
        gamma: threshold of the ternary code in units of mean |v|, with codebook "minmax" (paper 0.7, its code 0.5).
        official: the paper's code to the letter where it can be: codebook "minmax", {0, s} easy keys, ternary values decoded
            without a scale, gamma 0.5, one channel order for all heads. Only sane when values have unit magnitude.

    The defaults are what measured best (`benchmarks/results/*-study.json`): dense sinks and fitted scales matter most.

    Where we differ: true 1.x-bit storage (the released layout takes 3.25 bits); tokens that leave the residual window are
    appended, never requantized, and keep the channel order of their segment; protected tokens form groups of their own
    for keys too; padding enters no statistic; the newest `residual` tokens stay dense (the paper: N mod 32).
    """

    key_bits: float = 1.5
    value_bits: float = 1.58
    stp: float = 0.0
    group: int = 128
    residual: int = 64
    codebook: str = "lloyd"
    fft: bool = True
    value_basis: str = "rotated"
    order: str = "layer"
    scale_bits: int = 16
    sinks: int = 4
    gamma: float = 0.7
    official: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_numbers(key_bits=self.key_bits, value_bits=self.value_bits, stp=self.stp, gamma=self.gamma)
        if not 1 <= self.key_bits <= 2:
            raise ValueError(
                f"key_bits {self.key_bits}: possible are 1 to 2 (the fraction is the share of 2-bit channels)"
            )
        if not 0 <= self.stp < 1:
            raise ValueError(f"stp {self.stp}: possible are 0 to below 1 (share of vision tokens with 2-bit values)")
        if self.codebook not in ("lloyd", "gaussian", "minmax"):
            raise ValueError(f"codebook {self.codebook!r}: possible are 'lloyd', 'gaussian', 'minmax'")
        if self.value_basis not in ("channel", "rotated"):
            raise ValueError(f"value_basis {self.value_basis!r}: possible are 'channel', 'rotated'")
        if self.order not in ("layer", "head"):
            raise ValueError(f"order {self.order!r}: possible are 'layer', 'head'")
        if self.value_bits not in (1.58, 2, 4, 8):
            raise ValueError(f"value_bits {self.value_bits!r}: possible are 1.58, 2, 4, 8")
        self.formats()

    @property
    def dense_sinks(self) -> int:
        return 0 if self.official else self.sinks

    def formats(self) -> tuple[PackFormat, ...]:
        keys = self._keys()
        main = PackFormat(
            f"vidkv-{self.key_bits:g}/{self.value_bits:g}", keys, self._values(self.value_bits), self.group
        )
        if not self.stp:
            return (main,)
        return main, PackFormat(f"vidkv-{self.key_bits:g}/2 protected", keys, self._values(2), self.group)

    def _keys(self) -> Side:
        hard = code("minmax" if self.official else self.codebook, 2)
        if self.official:
            easy, imaginary = _OFFICIAL_REAL, _OFFICIAL_IMAGINARY
        else:
            easy, imaginary = (sign(zero=True) if self.codebook == "minmax" else code(self.codebook, 1)), None
        fft = self.fft or self.official
        share = self.key_bits - 1
        classes = [ChannelClass(share, hard)] if share else []
        if share < 1:
            classes.append(ChannelClass(1 - share, easy, "fft" if fft else "none", imaginary if fft else None))
        joint = self.order == "layer" or self.official
        rank = "range" if 0 < share < 1 else "none"
        return Side("channel", tuple(classes), rank=rank, joint_rank=joint, scale_bits=self.scale_bits)

    def _values(self, bits: float) -> Side:
        rotated = self.value_basis == "rotated" and not self.official
        if bits == 1.58 and (self.official or self.codebook == "minmax"):
            gamma = 0.5 if self.official else self.gamma
            quantizer = ternary(gamma, scale="one" if self.official else "fit")
        elif rotated and self.codebook != "minmax" and bits <= 4:
            quantizer = code("rotated", bits)  # a rotated head has no mean to speak of
        else:
            kind = "gaussian" if bits == 1.58 else self.codebook
            quantizer = code("minmax" if self.official or bits > 4 else kind, bits)
        classes = (ChannelClass(1.0, quantizer),)
        basis = "hadamard" if rotated else "none"
        return Side("token" if rotated else "channel", classes, basis=basis, scale_bits=self.scale_bits)

    @property
    def reads_embeddings(self) -> bool:
        return bool(self.stp)

    def mark(self, embeds: torch.Tensor, chunk: TokenLayout) -> torch.Tensor | None:
        """STP: score_i = mean over text tokens of the dot product of embeddings (paper eq. 8), the top share is protected."""
        if not self.stp:
            return None
        marks = torch.zeros(chunk.batch, len(chunk), dtype=torch.int8)
        for row in range(chunk.batch):
            visual = (chunk.visual[row] & chunk.valid[row]).nonzero()[:, 0]
            text = (~chunk.visual[row] & chunk.valid[row]).nonzero()[:, 0]
            keep = int(visual.numel() * self.stp)
            if keep and text.numel():
                at = visual.to(embeds.device)
                score = embeds[row, at].float() @ embeds[row, text.to(embeds.device)].float().mean(0)
                marks[row, visual[score.topk(keep).indices.sort().values.cpu()]] = 1
        return marks
