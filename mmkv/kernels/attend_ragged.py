"""Attention over dense keys of which every KV head of every batch element holds another number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ._check import (
    check_choice,
    check_device,
    check_float,
    check_numbers,
    check_rank,
    check_whole,
    group_size,
    wants_grad,
)
from ._sight import Sight, checked_positions
from .attend_dense import attend_dense_reference

_INTS = (torch.int32, torch.int64)


def attend_ragged(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Sequence[int] | Tensor,
    *,
    counts: Tensor | None = None,
    longest: int | None = None,
    scale: float,
    softcap: float | None = None,
    positions: Tensor | None = None,
    k_start: Tensor | None = None,
    q_positions: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    exact: bool | None = None,
    merged: bool = True,
) -> tuple[Tensor, Tensor]:
    """Softmax attention with logsumexp over rows of keys of any lengths; row r is batch element r // Hkv, KV head r % Hkv.

    Where each row lies is said in one of two ways. On a GPU the first copies the numbers there at each call; the second
    never looks at them on the host, so that rows may grow while a CUDA graph is replayed.

    Args:
        q: [B, Hq, Tq, D].
        k: [N, D], v: [N, Dv]: all keys and values.
        offsets: R + 1 ascending numbers on the host, R = B * Hkv: row r holds `offsets[r] ... offsets[r + 1] - 1`. With
            `counts` int [R], where q is: row r begins at `offsets[r]`; rows may have gaps, overlap and lie in any order.
        counts: int [R], where q is: tokens of each row, within k, which is checked on a CPU alone; 0 gives (0, -inf).
        longest: needed with `counts`, at least the largest of them; a row's tokens beyond it are not seen.
        scale, softcap, exact, merged: as in `attend_dense`.
        positions: int [N], logical positions of all keys; for causal and window.
        k_start: int [R] in place of them, position of each row's first key; a row's keys are consecutive.
        q_positions: int [B, Tq], needed with causal and window.
        causal: hide keys at positions > the query's.
        window: hide keys at positions <= the query's - window.

    Returns:
        out fp32 [B, Hq, Tq, Dv], lse fp32 [B, Hq, Tq] (natural log); a row that sees no key gives (0, -inf). Not merged,
        out [S, B, Hq, Tq, Dv] and lse [S, B, Hq, Tq].
    """
    check_float(q=q, k=k, v=v)
    check_rank(4, q=q)
    check_rank(2, k=k, v=v)
    check_device(q.device, k=k, v=v)
    check_numbers(scale, softcap, window)
    check_choice(exact=exact)
    if longest is not None:
        check_whole(longest=longest)
    if k.shape[0] != v.shape[0] or k.shape[1] != q.shape[-1]:
        raise ValueError(f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit together")
    if counts is None:
        _check_offsets(offsets, k, v)
    else:
        _check_device_rows(q, offsets, counts, longest)
    rows = len(offsets) - (counts is None)
    if len(q) and rows % len(q):
        raise ValueError(f"{rows} rows do not divide over a batch of {len(q)}")
    group_size(q.shape[1], rows // len(q) if len(q) else 1)
    q_positions = checked_positions(q, q_positions, causal, window)
    at = None if q_positions is None else _places(q, positions, k_start, k.shape[0], rows)
    sight = Sight(softcap, q_positions, 0 if at is None else at, causal, window)
    if q.is_cuda and not wants_grad(q, k, v):
        from .attend_ragged_triton import attend_ragged_triton

        if counts is None:
            lengths = [end - first for first, end in zip(offsets, offsets[1:])]
            longest = max(lengths, default=0)
            offsets, counts = torch.tensor([list(offsets[:-1]), lengths], device=q.device)
        places = "k_start" if at is None else "row" if positions is None else "key"
        options = {"scale": scale, "places": places, "exact": exact, "merged": merged}
        with torch.cuda.device(q.device):  # Triton launches on the current device, a split model has several
            return attend_ragged_triton(q, k, v, offsets, counts, longest, sight, **options)
    if counts is None:
        spans = [slice(first, end) for first, end in zip(offsets, offsets[1:])]
    else:
        spans = [slice(first, first + min(n, longest)) for first, n in zip(offsets.tolist(), counts.tolist())]
    out, lse = attend_ragged_reference(q, k, v, spans, sight, scale, by_row=positions is None)
    return (out, lse) if merged else (out[None], lse[None])


def _check_offsets(offsets: Sequence[int] | Tensor, k: Tensor, v: Tensor) -> None:
    if isinstance(offsets, Tensor):
        raise TypeError("offsets on a device need counts and longest; without them give a list of numbers")
    if not len(offsets) or offsets[0] != 0 or offsets[-1] != k.shape[0]:
        raise ValueError(f"offsets end at {[*offsets][-1:]}, there are {k.shape[0]} keys and {v.shape[0]} values")
    if any(end < first for first, end in zip(offsets, offsets[1:])):
        raise ValueError(f"offsets {[*offsets]} have to ascend")


def _check_device_rows(q: Tensor, start: Sequence[int] | Tensor, counts: Tensor, longest: int | None) -> None:
    if not isinstance(start, Tensor) or longest is None:
        raise TypeError("counts needs offsets as a tensor and longest as a number")
    check_device(q.device, offsets=start, counts=counts)
    if start.dtype not in _INTS or counts.dtype not in _INTS or start.dim() != 1 or start.shape != counts.shape:
        raise TypeError(
            f"offsets {start.dtype} {tuple(start.shape)} and counts {counts.dtype} {tuple(counts.shape)} must be int, one "
            "number for each row"
        )
    if longest < 0:
        raise ValueError(f"longest {longest}: possible are 0 and more")


def _places(q: Tensor, positions: Tensor | None, k_start: Tensor | None, keys: int, rows: int) -> Tensor:
    at = k_start if positions is None else positions
    if at is None or (positions is not None and k_start is not None):
        raise ValueError("causal and window needs positions of all keys, or k_start of each row's first; one of them")
    check_device(q.device, **{"k_start" if positions is None else "positions": at})
    if at.dtype not in _INTS or at.shape != (rows if positions is None else keys,):
        raise ValueError(f"positions {at.dtype} {tuple(at.shape)}: must be int, [{keys}], or k_start, [{rows}]")
    return at.contiguous()


def attend_ragged_reference(
    q: Tensor, k: Tensor, v: Tensor, spans: list[slice], sight: Sight, scale: float, by_row: bool
) -> tuple[Tensor, Tensor]:
    """`attend_ragged` in torch.

    Args:
        spans: the keys of each row.
        sight: with `at` as the kernel has it: of each row's first key where `by_row`, else of all keys.
    """
    b, hq, tq, d = q.shape
    heads, dv = len(spans) // b if b else 1, v.shape[-1]
    if any(not 0 <= s.start <= s.stop <= len(k) for s in spans):
        raise ValueError(f"a row lies at {spans} of {len(k)} keys")
    n, step = _evenly(spans)
    if n is not None:  # one length, at one distance: a view is all it takes
        if isinstance(sight.at, Tensor):
            token = torch.arange(n)
            at = (
                sight.at[:, None] + token if by_row else sight.at.as_strided((len(spans), n), (step, 1), spans[0].start)
            )
            sight = sight._replace(at=at.view(b, heads, n))
        k, v = (x[spans[0].start :].as_strided((b, heads, n, x.shape[1]), _even(x, heads, step)) for x in (k, v))
        return attend_dense_reference(q, k, v, sight, scale)
    by_head = q.reshape(len(spans), hq // heads, tq, d)
    out = q.new_zeros(len(spans), hq // heads, tq, dv, dtype=torch.float32)
    lse = q.new_full((len(spans), hq // heads, tq), -torch.inf, dtype=torch.float32)
    for row, span in enumerate(spans):
        if span.stop == span.start:
            continue
        mine = sight
        if isinstance(sight.at, Tensor):
            at = int(sight.at[row]) if by_row else sight.at[span][None, None]
            mine = sight._replace(at=at, q_positions=sight.q_positions[row // heads][None])
        part = attend_dense_reference(by_head[row : row + 1], k[span][None, None], v[span][None, None], mine, scale)
        out[row], lse[row] = part[0][0], part[1][0]
    return out.view(b, hq, tq, dv), lse.view(b, hq, tq)


def _evenly(spans: list[slice]) -> tuple[int | None, int]:
    """Length of all rows and the distance from one to the next; None where they differ."""
    if not spans or any(s.stop - s.start != spans[0].stop - spans[0].start for s in spans):
        return None, 0
    n, step = spans[0].stop - spans[0].start, spans[1].start - spans[0].start if len(spans) > 1 else 0
    even = step >= 0 and all(s.start == spans[0].start + i * step for i, s in enumerate(spans))
    return (n if even else None), step


def _even(x: Tensor, heads: int, step: int) -> tuple[int, ...]:
    """Strides of [B, Hkv, n, C] among rows of x [N, C]."""
    return heads * step * x.stride(0), step * x.stride(0), *x.stride()
