"""`Budget`: how many tokens may stay, over all of them or by modality."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from mmkv.layout import MODALITIES

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
Amount = float | int | str


@dataclass(frozen=True)
class Budget:
    """Tokens that may stay in a layer's cache, of those that one prompt (or later turn with new media) brings.

    Each amount is a ratio of the real tokens (a float in (0, 1]; padding never counts), a number of tokens per KV head (an
    int) or bytes of the whole cache, all layers and the whole batch ("64MiB").

    Args:
        total: one amount over all tokens, which then compete with one another.
        text, image, video: an amount for each modality instead, each competing within its own; what is left out stays
            whole.
    """

    total: Amount | None = None
    text: Amount | None = None
    image: Amount | None = None
    video: Amount | None = None

    def __post_init__(self):
        given = [self.total, self.text, self.image, self.video]
        if all(amount is None for amount in given):
            raise ValueError("an empty budget: give a total, or an amount for text, image or video")
        if self.total is not None and any(amount is not None for amount in given[1:]):
            raise ValueError(f"budget {self}: give a total or amounts by modality, not both")
        for amount in given:
            if amount is not None:
                check_amount(amount)

    @classmethod
    def of(cls, value: Amount | dict | Budget) -> Budget:
        """A budget from what a method's `budget=` takes: an amount, a dict by modality, or a budget.

        Raises:
            ValueError: an impossible amount, or an unknown modality.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, dict):
            unknown = sorted(set(value) - set(MODALITIES))
            if unknown:
                raise ValueError(f"budget for {', '.join(map(repr, unknown))}: possible are {', '.join(MODALITIES)}")
            return cls(**value)
        return cls(total=value)

    @property
    def everything(self) -> bool:
        """Whether nothing can ever be dropped."""
        amounts = [a for a in (self.total, self.text, self.image, self.video) if a is not None]
        return all(isinstance(a, float) and a == 1.0 for a in amounts)

    def smallest_count(self) -> int | None:
        """The least number of tokens that is given as such, None where there is none."""
        counts = [a for a in (self.total, self.text, self.image, self.video) if isinstance(a, int)]
        return min(counts, default=None)

    def pools(
        self, modality: torch.Tensor, present: torch.Tensor, bytes_per_token: float = 1.0, bytes_beyond: float = 0.0,
        whole: int | None = None,
    ) -> list[tuple[torch.Tensor, int]]:  # fmt: skip
        """Which tokens compete, and how many of them may stay.

        Args:
            modality: int8 `[n]` or `[H, n]`, of the real tokens.
            present: fp32, the same shape: share of the KV heads that still hold each, 1 where none was dropped; ratios
                count these.
            bytes_per_token: of one token over all layers, KV heads and batch elements, as it will be stored.
            bytes_beyond: what some of them take beyond that.
            whole: tokens of the one modality there is that ratios count in place of those present; None without.

        Returns:
            list of (bool as `modality`, count): once for all tokens, or one modality after the other.
        """
        rows = modality.shape[0] if modality.dim() > 1 else 1
        if self.total is not None:
            every = torch.ones_like(modality, dtype=torch.bool)
            count = float(present.sum()) / rows if whole is None else whole
            kept = tokens_of(self.total, count, bytes_per_token, bytes_beyond)
            if whole is not None:
                check_some(kept, self.total, whole)
            return [(every, kept)]
        out = []
        for kind, name in enumerate(MODALITIES):
            mine, amount = modality == kind, getattr(self, name)
            count = float(present[mine].sum()) / rows
            count = count if whole is None or not count else whole
            out.append(
                (mine, round(count) if amount is None else tokens_of(amount, count, bytes_per_token, bytes_beyond))
            )
        return out


def check_some(kept: int, amount: Amount, whole: int) -> None:
    """Raise ValueError where an amount of `whole` tokens is not even one."""
    if kept < 1:
        raise ValueError(f"budget {amount!r} of {whole} tokens is not one token; give {1 / whole:.2g} or more")


def check_amount(amount: Amount) -> None:
    """Raise ValueError for what is no ratio, number of tokens or number of bytes."""
    possible = "possible are a ratio in (0, 1] (a float), tokens from 1 (an int) or bytes (such as '64MiB')"
    if isinstance(amount, bool) or not isinstance(amount, float | int | str):
        raise ValueError(f"budget {amount!r}: {possible}")
    if isinstance(amount, str):
        bytes_of(amount)
    elif isinstance(amount, int) and amount < 1:
        raise ValueError(f"budget {amount!r} tokens: {possible}")
    elif isinstance(amount, float) and not 0 < amount <= 1:
        raise ValueError(f"budget {amount!r}: {possible}")


def tokens_of(amount: Amount, count: float, bytes_per_token: float, bytes_beyond: float = 0.0) -> int:
    """How many of `count` tokens an amount lets stay."""
    if isinstance(amount, float):
        return int(amount * count + 1e-6)
    if isinstance(amount, int):
        return min(amount, round(count))
    return min(max(int((bytes_of(amount) - bytes_beyond) / bytes_per_token), 0), round(count))


def bytes_of(text: str | int, option: str = "budget") -> int:
    """Bytes from a number or from text such as '64MiB' or '1.5 GB'.

    Args:
        text: the number or the text.
        option: what it was given for, named in the error.

    Raises:
        ValueError: neither, or less than one byte.
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]+)\s*", text) if isinstance(text, str) else None
    count = int(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else 0
    if count < 1:
        raise ValueError(
            f"{option} {text!r}: needed is a whole number of bytes above 0, or text such as '64MiB' (a number and one of "
            f"{', '.join(UNITS)})"
        )
    return count
