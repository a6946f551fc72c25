"""What a packed segment stores: `Side` describes keys or values, `PackFormat` both, `Packer` is one in use.

A key format may sort a head's channels into classes of different bits, and put a class into another orthonormal basis
first. Both are applied to the query instead of being undone on the keys: a permutation and an orthonormal change of
basis leave q.k as it is. Values are mapped back once, on the output. So are factors that even channels out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch

from mmkv.kernels import Spec, hadamard, pack_blocks, real_fft
from mmkv.kernels.pack import FP16_MAX
from mmkv.kernels.spec import Code

LEAST_QUERIES = 8  # that say something about a channel; a single decoded one says nothing
MOST_BALANCE = 256.0  # sqrt(FP16_MAX); a channel that was silent when its segment opened may still speak up later


@dataclass(frozen=True)
class ChannelClass:
    """A share of a head's channels and how they are stored.

    Args:
        share: fraction of the channels, in (0, 1].
        code: quantizer of these channels.
        imaginary: with basis "fft", the code of the imaginary parts; None for the same as `code`.
        basis: "none", or "fft" (the real Fourier transform over the channels of this class).
    """

    share: float
    code: Code
    basis: str = "none"
    imaginary: Code | None = None


@dataclass(frozen=True)
class Side:
    """How keys or values are stored.

    Args:
        axis: "channel" (a group is one channel over `PackFormat.group` tokens) or "token" (channels of one token).
        classes: channel classes; channels are ranked by `rank`, the widest go to the first class.
        rank: statistic over the tokens that orders the channels: "none", "range" (max - min), "std", or "score" (variance
            times the root mean square of the queries, `weighed_variance`).
        joint_rank: one order for all KV heads of a layer (VidKV), else one per head.
        basis: "none" or "hadamard" (random-sign Hadamard rotation of the head's channels).
        balance: a factor per channel that evens channels out, taken from the tokens that open a segment. They are stored divided
            by it; the query (keys) or the output (values) is multiplied. "none", "sqrt_max" (sqrt(max |x|), ZipCache's
            channel-separable tokenwise quantizer, arXiv 2405.14256) or, for keys, "query_key" (sqrt(max |k| / max |q|), MiKV's
            balancer, arXiv 2402.18096; as "sqrt_max" where fewer than 8 queries are known).
        channel_group: with axis "token", channels that share a scale; 0 for the whole head.
        scale_bits: 16 (fp16) or 8 (logarithmic bytes).
    """

    axis: str
    classes: tuple[ChannelClass, ...]
    rank: str = "none"
    joint_rank: bool = True
    basis: str = "none"
    channel_group: int = 0
    scale_bits: int = 16
    balance: str = "none"

    def __post_init__(self):
        if self.balance not in ("none", "sqrt_max", "query_key"):
            raise ValueError(f"balance {self.balance!r}: possible are 'none', 'sqrt_max', 'query_key' (keys alone)")
        if self.scale_bits not in (8, 16):
            raise ValueError(f"scale_bits {self.scale_bits!r}: possible are 8, 16")
        if not isinstance(self.channel_group, int) or self.channel_group < 0:
            raise ValueError(
                f"channel_group {self.channel_group!r}: possible are 0 (the whole head) or a divisor of the head size"
            )

    def sizes(self, channels: int) -> list[int]:
        """Channels of each class; a class that rounds to nothing is left out, the last takes the rest."""
        sizes, left = [], channels
        for cls in self.classes[:-1]:
            sizes.append(min(round(cls.share * channels), left))
            left -= sizes[-1]
        return sizes + [left]

    def spec(self, channels: int, group: int) -> Spec:
        """The storage layout of a block of `group` tokens and `channels` channels."""
        runs: list[tuple[int, Code]] = []
        for size, cls in zip(self.sizes(channels), self.classes):
            if size and cls.basis == "fft" and cls.imaginary is not None:
                real = size // 2 + 1
                runs += [(real, cls.code)] + ([(size - real, cls.imaginary)] if size > real else [])
            elif size:
                runs.append((size, cls.code))
        channel_group = (self.channel_group or channels) if self.axis == "token" else 0
        return Spec(self.axis, group, tuple(runs), channel_group, self.scale_bits)


@dataclass(frozen=True)
class PackFormat:
    """Keys, values, and the tokens per block. `name` is shown in reports."""

    name: str
    keys: Side
    values: Side
    group: int

    def __post_init__(self):
        if not isinstance(self.group, int) or not 8 <= self.group <= 4096:
            raise ValueError(f"group {self.group!r}: possible are 8 to 4096 tokens")
        if self.values.balance == "query_key":
            raise ValueError("balance 'query_key' is for keys; for values there are 'none', 'sqrt_max'")

    def check(self, head_dim: int, value_dim: int) -> None:
        """Raise ValueError where a head of this size cannot be stored in this format."""
        self.keys.spec(head_dim, self.group)
        self.values.spec(value_dim, self.group)

    def bits(self, head_dim: int, value_dim: int | None = None) -> tuple[float, float]:
        """True bits per key element and per value element of full blocks: codes, scales and zero points."""
        return self.keys.spec(head_dim, self.group).bits, self.values.spec(value_dim or head_dim, self.group).bits


@cache
def _basis(make: Callable[[int], torch.Tensor], channels: int, device: torch.device) -> torch.Tensor:
    """An orthonormal basis fp32 `[n, n]`, kept on each device that uses it."""
    return make(channels).to(device)


class Packer:
    """A `PackFormat` at work in one layer: knows channel order and balance of each (batch element, KV head).

    Args:
        form: the format.
        batch, heads: B and Hkv.
        head_dim, value_dim: channels of keys and of values.
        device: where the cache lives.
    """

    def __init__(self, form: PackFormat, batch: int, heads: int, head_dim: int, value_dim: int, device):
        self.form, self.heads = form, heads
        self.key_spec = form.keys.spec(head_dim, form.group)
        self.value_spec = form.values.spec(value_dim, form.group)
        self.order: torch.Tensor | None = None
        if form.keys.rank != "none":
            identity = torch.arange(head_dim, dtype=torch.int16, device=device)
            rows = 1 if form.keys.joint_rank else heads
            self.order = identity.expand(batch, rows, -1).clone()  # [B, 1 or Hkv, D]
        self.key_balance = self.value_balance = None  # fp32 [B, Hkv, D]
        if form.keys.balance != "none":
            self.key_balance = torch.ones(batch, heads, head_dim, device=device)
        if form.values.balance != "none":
            self.value_balance = torch.ones(batch, heads, value_dim, device=device)

    def fit(
        self, row: int, keys: torch.Tensor, values: torch.Tensor | None = None, queries: torch.Tensor | None = None
    ) -> None:
        """Balance and rank the channels of batch element `row` by the valid tokens that open its segment.

        Args:
            keys: `[Hkv, T, D]`.
            values: `[Hkv, T, Dv]`; None leaves them unbalanced.
            queries: `[Hq, Tq, D]`, None where none are known.
        """
        if self.value_balance is not None and values is not None:
            self.value_balance[row] = _evening(_peak(values))
        if self.key_balance is not None:
            asked = None
            if self.form.keys.balance == "query_key" and queries is not None and queries.shape[1] >= LEAST_QUERIES:
                asked = _peak(queries).unflatten(0, (self.heads, -1)).amax(1)
            self.key_balance[row] = _evening(_peak(keys), asked)
        if self.order is None:
            return
        keys = keys.float()
        if self.key_balance is not None:
            keys = keys / self.key_balance[row][:, None]
        if self.form.keys.rank == "range":
            low, high = keys.amin(1), keys.amax(1)  # [Hkv, D]
            spread = high.amax(0, keepdim=True) - low.amin(0, keepdim=True) if self.form.keys.joint_rank else high - low
        else:
            spread = weighed_variance(keys, queries if self.form.keys.rank == "score" else None)
            spread = spread.mean(0, keepdim=True) if self.form.keys.joint_rank else spread
        spread = torch.nan_to_num(spread, nan=0.0)
        ranked = spread.argsort(dim=-1, descending=True, stable=True)
        # the rank decides the class; within one, channels stay in the model's order, which a Fourier basis over them sees
        classes = ranked.split(self.form.keys.sizes(ranked.shape[-1]), dim=-1)
        self.order[row] = torch.cat([cls.sort(dim=-1).values for cls in classes], dim=-1).to(torch.int16)

    def rows(self, index: torch.Tensor) -> None:
        """Reorder, repeat or select batch elements."""
        held = (self.order, self.key_balance, self.value_balance)
        self.order, self.key_balance, self.value_balance = (
            None if t is None else t[index.to(t.device)] for t in held
        )  # fmt: skip

    def pack(self, row: int, keys: torch.Tensor, values: torch.Tensor, heads: torch.Tensor, count: torch.Tensor):
        """Pack blocks of batch element `row`.

        Args:
            keys, values: `[N, group, D]`, blocks of tokens.
            heads: int64 `[N]`, KV head of each block.
            count: int `[N]`, valid tokens of each block.

        Returns:
            `Blocks` of the keys and of the values, N each.
        """
        return (
            pack_blocks(self.stored_keys(keys, row, heads), count, self.key_spec),
            pack_blocks(self.stored_values(values, row, heads), count, self.value_spec),
        )

    def pack_all(self, keys: torch.Tensor, values: torch.Tensor):
        """Pack one full block of every batch element and head: `[B * Hkv, group, D]`, `[B * Hkv, group, Dv]`; as `pack`."""
        at = torch.arange(len(keys), device=keys.device)
        row, heads = at // self.heads, at % self.heads
        count = torch.full_like(at, keys.shape[1], dtype=torch.int32)
        return (
            pack_blocks(self.stored_keys(keys, row, heads), count, self.key_spec),
            pack_blocks(self.stored_values(values, row, heads), count, self.value_spec),
        )

    def stored_keys(self, x: torch.Tensor, row: int | torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Keys `[N, group, D]` as they are quantized.

        Args:
            row: batch element, or of each block its own, int64 `[N]`.
            heads: int64 `[N]`, KV head of each block.
        """
        if self.key_balance is not None:
            x = x.float() / self.key_balance[row, heads][:, None]
        if self.order is not None:
            order = self.order[row, heads if self.order.shape[1] > 1 else torch.zeros_like(heads)].long()  # [N, D]
            x = x.gather(-1, order[:, None, :].expand(x.shape))
        return self._key_basis(x)

    def query(self, q: torch.Tensor) -> torch.Tensor:
        """Queries `[B, Hq, Tq, D]` in the channels of the stored keys (fp32 where more than their order is changed)."""
        if self.key_balance is not None:
            q = q.float() * _by_query_head(self.key_balance, q.shape[1])
        if self.order is not None:
            order = self.order.long()
            if order.shape[1] != 1:
                order = order.repeat_interleave(q.shape[1] // order.shape[1], dim=1)
            q = q.gather(-1, order[:, :, None, :].expand(q.shape))
        return self._key_basis(q)

    def output(self, out: torch.Tensor) -> torch.Tensor:
        """Attention output fp32 `[B, Hq, Tq, Dv]`, or of parts `[S, B, Hq, Tq, Dv]`, back in the model's channels."""
        if self.form.values.basis == "hadamard":
            out = out @ _basis(hadamard, out.shape[-1], out.device)
        if self.value_balance is not None:
            out = out * _by_query_head(self.value_balance, out.shape[-3])
        return out

    def stored_values(self, x: torch.Tensor, row: int | torch.Tensor, heads: torch.Tensor) -> torch.Tensor:
        """Values `[N, group, Dv]`, as `stored_keys`."""
        if self.value_balance is not None:
            x = x.float() / self.value_balance[row, heads][:, None]
        if self.form.values.basis == "hadamard":
            return x.float() @ _basis(hadamard, x.shape[-1], x.device).T
        return x

    def _key_basis(self, x: torch.Tensor) -> torch.Tensor:
        side = self.form.keys
        if side.basis == "hadamard":
            x = x.float() @ _basis(hadamard, x.shape[-1], x.device).T
        if all(cls.basis == "none" for cls in side.classes):
            return x
        parts = x.float().split(side.sizes(x.shape[-1]), dim=-1)
        return torch.cat(
            [
                p @ _basis(real_fft, p.shape[-1], p.device).T if cls.basis == "fft" and p.shape[-1] else p
                for p, cls in zip(parts, side.classes)
            ],
            dim=-1,
        )

    def tensors(self) -> list[torch.Tensor]:
        """Channel orders and balances that it holds, for the count of bytes."""
        return [t for t in (self.order, self.key_balance, self.value_balance) if t is not None]


def weighed_variance(keys: torch.Tensor, queries: torch.Tensor | None) -> torch.Tensor:
    """Variance of each key channel over the tokens, times the root mean square of the queries that it is multiplied with.

    The mean square itself would give what a channel adds to the variance of the attention scores; its root, halfway to
    the keys' own variance, measured better on both models of benchmarks/low_bit.py.

    Args:
        keys: `[Hkv, T, D]`.
        queries: `[Hq, Tq, D]`; None, or too few to say anything, for the variance alone.

    Returns:
        fp32 `[Hkv, D]`.
    """
    variance = torch.nan_to_num(keys.float().var(1, unbiased=False), nan=0.0)
    if queries is None or queries.shape[1] < LEAST_QUERIES:
        return variance
    square = torch.linalg.vector_norm(queries, dim=1, dtype=torch.float32).square() / queries.shape[1]
    return variance * square.unflatten(0, (len(keys), -1)).mean(1).sqrt()


def _by_query_head(balance: torch.Tensor, query_heads: int) -> torch.Tensor:
    """`[B, Hkv, D]` as `[B, Hq, 1, D]`."""
    return balance.repeat_interleave(query_heads // balance.shape[1], dim=1)[:, :, None]


def _peak(x: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of each channel over the tokens, fp32 `[H, D]` of `[H, T, D]`.

    Numbers that fp16 cannot hold count as nothing: one of them would flatten its channel for every other token.
    """
    size = x.abs()
    return size.masked_fill(~(size <= FP16_MAX), 0.0).amax(1).float()


def _evening(peak: torch.Tensor, against: torch.Tensor | None = None) -> torch.Tensor:
    """sqrt(peak / against), or sqrt(peak), within what later tokens survive; 1 where a channel is all zeros."""
    against = torch.ones_like(peak) if against is None else against
    factor = (peak / against.clamp(min=torch.finfo(torch.float32).tiny)).sqrt()
    return torch.where((peak > 0) & (against > 0), factor.clamp(1 / MOST_BALANCE, MOST_BALANCE), 1.0)
