"""What does not fit is refused by the wrapper, in one line, before anything runs; what is odd but right is computed right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mmkv.kernels import (
    Spec,
    Table,
    attend_dense,
    attend_packed,
    attend_ragged,
    group_mean,
    group_total,
    merge,
    merge_sinks,
    minmax,
    most_similar,
    pack_blocks,
    prefill_sparse,
    probe,
    rotary_tables,
    rotate,
    unpack_blocks,
)

from .naive import case, close

KEYS = Spec("channel", 16, ((8, minmax(2)),))
VALUES = Spec("token", 16, ((8, minmax(4)),), 4)


def _packed() -> dict:
    c = case(KEYS, VALUES, tq=3)
    return dict(q=c.q, keys=c.keys, values=c.values, table=c.table, scale=0.3)


def _dense() -> dict:
    return dict(q=torch.randn(2, 4, 3, 8), k=torch.randn(2, 2, 9, 8), v=torch.randn(2, 2, 9, 6), scale=0.3)


def _ragged() -> dict:
    return dict(
        q=torch.randn(2, 4, 3, 8), k=torch.randn(20, 8), v=torch.randn(20, 6), offsets=[0, 5, 5, 12, 20], scale=0.3
    )


def _merge() -> dict:
    return dict(parts=[(torch.randn(2, 4, 3, 8), torch.randn(2, 4, 3)) for _ in range(2)])


def _sinks() -> dict:
    return dict(out=torch.randn(2, 4, 3, 8), lse=torch.randn(2, 4, 3), sinks=torch.randn(4))


def _probe() -> dict:
    return dict(q=torch.randn(2, 4, 3, 8), k=torch.randn(2, 2, 9, 8), scale=0.3)


def _sparse() -> dict:
    return dict(
        q=torch.randn(4, 9, 8),
        k=torch.randn(2, 9, 8),
        v=torch.randn(2, 9, 6),
        index=torch.tensor([0, 3, 4, 8]),
        scale=0.3,
    )


def _pack() -> dict:
    return dict(x=torch.randn(3, 16, 8), count=torch.tensor([16, 7, 0]), spec=KEYS)


def _similar() -> dict:
    return dict(a=torch.randn(2, 7, 8), b=torch.randn(2, 5, 8))


def _mean() -> dict:
    return dict(x=torch.randn(2, 7, 8), index=torch.randint(-1, 3, (2, 7)), count=3, weight=torch.rand(2, 7))


def _total() -> dict:
    return dict(values=torch.rand(2, 7), index=torch.randint(-1, 3, (2, 7)), count=3)


def _rotate() -> dict:
    return dict(x=torch.randn(2, 4, 7, 8), cos=torch.randn(7, 4), sin=torch.randn(7, 4))


# of each wrapper: arguments that are right, and which of them are floating-point tensors that another dtype may spoil
GOOD: dict[Callable, tuple[Callable[[], dict], tuple[str, ...]]] = {
    attend_packed: (_packed, ("q",)),
    attend_dense: (_dense, ("q", "k", "v")),
    attend_ragged: (_ragged, ("q", "k", "v")),
    merge_sinks: (_sinks, ("out", "lse", "sinks")),
    probe: (_probe, ("q", "k")),
    prefill_sparse: (_sparse, ("q", "k", "v")),
    pack_blocks: (_pack, ("x",)),
    most_similar: (_similar, ("a", "b")),
    group_mean: (_mean, ("x", "weight")),
    group_total: (_total, ("values",)),
    rotate: (_rotate, ("x", "cos", "sin")),
}
FLOATS = [(wrapper, name) for wrapper, (_, names) in GOOD.items() for name in names]
SCORED = [attend_packed, attend_dense, attend_ragged, probe, prefill_sparse]
OTHERS = [  # tensors that have to lie where the first one does, beside the floating-point ones
    (attend_packed, "table"), (attend_packed, "keys"), (attend_packed, "values"), (prefill_sparse, "index"),
    (pack_blocks, "count"), (group_mean, "index"), (group_total, "index"),
]  # fmt: skip


def refuses(wrapper: Callable, error: type[Exception] | tuple, match: str | None = None, **changed) -> None:
    """Asserts that the wrapper refuses its good arguments with some of them changed, in one line."""
    make = GOOD[wrapper][0] if wrapper in GOOD else _merge
    with pytest.raises(error, match=match) as caught:
        wrapper(**make() | changed)
    said = str(caught.value)
    assert said and "\n" not in said and len(said) < 250, said


def name_of(wrapper) -> str:
    return getattr(wrapper, "__name__", str(wrapper))


# dtypes


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("wrapper", "name"), FLOATS, ids=name_of)
def test_dtypes_that_are_no_numbers_of_ours(wrapper, name, dtype):
    refuses(wrapper, TypeError, str(dtype).removeprefix("torch."), **{name: GOOD[wrapper][0]()[name].to(dtype)})


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64], ids=str)
@pytest.mark.parametrize("place", [0, 1])
def test_merge_of_what_are_no_floats(place, dtype):
    parts = _merge()["parts"]
    parts[1] = tuple(t.to(dtype) if i == place else t for i, t in enumerate(parts[1]))
    refuses(merge, TypeError, str(dtype).removeprefix("torch."), parts=parts)


@pytest.mark.parametrize(
    ("wrapper", "changed"),
    [
        (attend_dense, dict(mask=torch.ones(3, 9))),
        (attend_dense, dict(causal=True, q_positions=torch.rand(2, 3))),
        (attend_packed, dict(causal=True, q_positions=torch.rand(2, 3))),
        (attend_ragged, dict(window=3, q_positions=torch.rand(2, 3), positions=torch.zeros(20).int())),
        (attend_ragged, dict(window=3, q_positions=torch.zeros(2, 3).int(), positions=torch.rand(20))),
        (probe, dict(mask=torch.ones(3, 9))),
        (prefill_sparse, dict(index=torch.rand(4))),
        (prefill_sparse, dict(index=torch.ones(9).bool())),
        (pack_blocks, dict(count=torch.rand(3))),
        (pack_blocks, dict(count=torch.ones(3).cfloat())),
        (group_mean, dict(index=torch.zeros(2, 7))),
        (group_total, dict(index=torch.zeros(2, 7).int())),
    ],
    ids=lambda v: name_of(v) if callable(v) else "-".join(v),
)
def test_dtypes_of_masks_and_indices(wrapper, changed):
    refuses(wrapper, (TypeError, ValueError), **changed)


# devices; a meta tensor counts as one of another device


@pytest.mark.parametrize(("wrapper", "name"), FLOATS + OTHERS, ids=name_of)
def test_devices_that_differ(wrapper, name):
    refuses(wrapper, ValueError, "meta", **{name: GOOD[wrapper][0]()[name].to("meta")})


@pytest.mark.parametrize(
    ("wrapper", "changed"),
    [
        (attend_dense, dict(mask=torch.ones(3, 9).bool())),
        (attend_dense, dict(causal=True, q_positions=torch.zeros(2, 3).int())),
        (attend_packed, dict(causal=True, q_positions=torch.zeros(2, 3).int())),
        (probe, dict(mask=torch.ones(3, 9).bool())),
        (prefill_sparse, dict(sinks=torch.zeros(4))),
    ],
    ids=lambda v: name_of(v) if callable(v) else "-".join(v),
)
def test_options_on_another_device(wrapper, changed):
    moved = {name: value.to("meta") if isinstance(value, torch.Tensor) else value for name, value in changed.items()}
    refuses(wrapper, ValueError, "meta", **moved)


def test_merge_on_two_devices():
    parts = _merge()["parts"]
    refuses(merge, ValueError, "meta", parts=[parts[0], tuple(t.to("meta") for t in parts[1])])
    refuses(merge, ValueError, "meta", parts=[parts[0], (parts[1][0], parts[1][1].to("meta"))])


# shapes


@pytest.mark.parametrize(("wrapper", "name"), FLOATS, ids=name_of)
def test_one_dimension_too_few(wrapper, name):
    if (wrapper, name) == (rotate, "x"):
        pytest.skip("fewer dimensions of x are possible")
    refuses(wrapper, ValueError, **{name: GOOD[wrapper][0]()[name][0]})


@pytest.mark.parametrize(
    ("wrapper", "changed"),
    [
        (attend_dense, dict(k=torch.randn(2, 2, 9, 6))),  # head size
        (attend_dense, dict(v=torch.randn(2, 2, 8, 6))),  # tokens
        (attend_dense, dict(k=torch.randn(2, 3, 9, 8), v=torch.randn(2, 3, 9, 6))),  # 4 query heads, 3 KV heads
        (attend_dense, dict(k=torch.randn(2, 0, 9, 8), v=torch.randn(2, 0, 9, 6))),
        (attend_dense, dict(k=torch.randn(1, 2, 9, 8))),  # batch: nothing broadcasts
        (attend_dense, dict(mask=torch.ones(2, 9).bool())),
        (attend_dense, dict(mask=torch.ones(1, 1, 1, 1, 3, 9).bool())),
        (attend_dense, dict(causal=True)),
        (attend_dense, dict(causal=True, q_positions=torch.zeros(2, 5).int())),
        (attend_packed, dict(q=torch.randn(2, 4, 3, 6))),
        (attend_packed, dict(q=torch.randn(2, 5, 3, 8))),
        (attend_packed, dict(q=torch.randn(3, 4, 3, 8))),
        (attend_packed, dict(causal=True)),
        (attend_packed, dict(causal=True, q_positions=torch.zeros(3, 3).int())),
        (attend_packed, dict(causal=True, q_positions=torch.zeros(5).int())),
        (attend_ragged, dict(k=torch.randn(20, 6))),
        (attend_ragged, dict(v=torch.randn(19, 6))),
        (attend_ragged, dict(offsets=[0, 5, 5, 12, 19])),
        (attend_ragged, dict(offsets=[1, 5, 5, 12, 20])),
        (attend_ragged, dict(offsets=[0, 12, 5, 5, 20])),  # not ascending
        (attend_ragged, dict(offsets=[0, -5, 5, 12, 20])),
        (attend_ragged, dict(offsets=[0, 2**40, 5, 12, 20])),
        (attend_ragged, dict(offsets=[])),
        (attend_ragged, dict(offsets=[0, 5, 12, 20])),  # 3 rows, batch 2
        (attend_ragged, dict(window=3)),
        (attend_ragged, dict(window=3, q_positions=torch.zeros(2, 3).int(), positions=torch.zeros(19).int())),
        (attend_ragged, dict(window=3, q_positions=torch.zeros(2, 4).int(), positions=torch.zeros(20).int())),
        (merge_sinks, dict(sinks=torch.randn(3))),
        (merge_sinks, dict(lse=torch.randn(2, 4, 2))),
        (probe, dict(k=torch.randn(2, 2, 9, 6))),
        (probe, dict(k=torch.randn(2, 3, 9, 8))),
        (probe, dict(k=torch.randn(1, 2, 9, 8))),
        (probe, dict(mask=torch.ones(2, 9).bool())),
        (prefill_sparse, dict(k=torch.randn(2, 9, 6))),
        (prefill_sparse, dict(v=torch.randn(2, 8, 6))),
        (prefill_sparse, dict(q=torch.randn(3, 9, 8))),
        (prefill_sparse, dict(index=torch.zeros(2, 2).long())),
        (prefill_sparse, dict(sinks=torch.zeros(3))),
        (pack_blocks, dict(x=torch.randn(3, 15, 8))),  # no multiple of the group
        (pack_blocks, dict(x=torch.randn(3, 16, 9))),
        (pack_blocks, dict(count=torch.tensor([16, 7]))),
        (most_similar, dict(b=torch.randn(2, 5, 6))),
        (most_similar, dict(b=torch.randn(1, 5, 8))),
        (most_similar, dict(b=torch.randn(2, 0, 8))),
        (group_mean, dict(index=torch.zeros(2, 6).long())),
        (group_mean, dict(weight=torch.rand(2, 6))),
        (group_mean, dict(count=-1)),
        (group_total, dict(values=torch.rand(2, 6))),
        (rotate, dict(cos=torch.randn(6, 4), sin=torch.randn(6, 4))),
        (rotate, dict(sin=torch.randn(7, 3))),
        (rotate, dict(cos=torch.randn(7, 5), sin=torch.randn(7, 5))),  # tables of whole heads
        (rotate, dict(x=torch.randn(8))),
    ],
    ids=lambda v: name_of(v) if callable(v) else "-".join(v),
)  # fmt: skip
def test_what_does_not_fit_together(wrapper, changed):
    refuses(wrapper, ValueError, **changed)


ROWS = dict(offsets=torch.tensor([0, 5, 5, 12]), counts=torch.tensor([5, 0, 7, 8]), longest=8)  # on the queries' device


@pytest.mark.parametrize(
    ("wrapper", "changed"),
    [
        (attend_dense, dict(weight=torch.ones(2, 2, 8))),
        (attend_dense, dict(weight=torch.ones(2, 2, 9).double())),
        (attend_dense, dict(weight=torch.ones(2, 2, 9, device="meta"))),
        (attend_ragged, ROWS | dict(longest=None)),
        (attend_ragged, ROWS | dict(longest=-1)),
        (attend_ragged, ROWS | dict(counts=torch.tensor([5.0, 0, 7, 8]))),
        (attend_ragged, ROWS | dict(counts=torch.tensor([5, 0, 7]))),
        (attend_ragged, ROWS | dict(counts=torch.tensor([5, 0, 7, 8], device="meta"))),
        (attend_ragged, ROWS | dict(counts=torch.tensor([5, 0, 7, 9]), longest=9)),  # behind the last key
        (attend_ragged, ROWS | dict(offsets=torch.tensor([-1, 5, 5, 12]))),
        (attend_ragged, ROWS | dict(offsets=torch.tensor([0, 5, 5, 2**40]))),
        (attend_ragged, ROWS | dict(offsets=[0, 5, 5, 12])),
        (attend_ragged, dict(offsets=torch.tensor([0, 5, 5, 12, 20]))),
        (probe, dict(causal=True)),
        (probe, dict(window=3)),
        (probe, dict(causal=True, positions=torch.zeros(2))),
        (probe, dict(causal=True, positions=torch.rand(3))),
        (probe, dict(causal=True, positions=torch.zeros(3, device="meta").int())),
        (merge, dict(sinks=torch.zeros(3))),
        (merge, dict(sinks=torch.zeros(4, device="meta"))),
        (prefill_sparse, dict(index=torch.tensor([0, 3, -1]))),
        (prefill_sparse, dict(index=torch.tensor([0, 3, 9]))),
        (prefill_sparse, dict(index=torch.tensor([3, 0, 4]))),
        (prefill_sparse, dict(index=torch.tensor([3, 3, 4]))),
    ],
    ids=lambda v: name_of(v) if callable(v) else "-".join(v),
)
def test_options_that_do_not_fit(wrapper, changed):
    refuses(wrapper, (TypeError, ValueError), **changed)


def test_parts_that_only_broadcast_do_not_merge():
    (out, lse), other = _merge()["parts"]
    for part in ((out[:1], lse[:1]), (out[:, :, :1], lse[:, :, :1]), (out, lse[..., None]), (out[..., :4], lse)):
        refuses(merge, ValueError, parts=[other, part])
    refuses(merge, ValueError, parts=[])


def test_pools_and_tables_that_do_not_fit():
    given = _packed()
    pool = given["values"].select(torch.arange(3))
    refuses(attend_packed, ValueError, "blocks", values=pool)
    other = pack_blocks(torch.randn(12, 8, 8), torch.full((12,), 8), replace(VALUES, group=8))
    refuses(attend_packed, ValueError, "tokens", values=other)
    refuses(attend_packed, ValueError, "rows", table=given["table"].select(torch.arange(3)))
    table = given["table"]
    with pytest.raises(TypeError, match="int32"):
        Table(table.block.long(), table.count, table.start)
    with pytest.raises(ValueError, match="slots"):
        Table(table.block, table.count[:, :1], table.start)
    with pytest.raises(ValueError, match="wants"):
        unpack_blocks(replace(pool, codes=pool.codes[:, 1:]))


def test_tables_of_positions_that_do_not_fit():
    with pytest.raises(ValueError, match="positions"):
        rotary_tables(torch.zeros(2, 3, 4), torch.zeros(4))
    with pytest.raises(ValueError, match="sections"):
        rotary_tables(torch.zeros(3, 5), torch.zeros(4), sections=(1, 1))


# numbers


@pytest.mark.parametrize("wrapper", SCORED, ids=name_of)
def test_numbers_that_make_no_scores(wrapper):
    refuses(wrapper, ValueError, "scale is nan", scale=float("nan"))
    refuses(wrapper, ValueError, "scale is inf", scale=float("inf"))
    refuses(wrapper, TypeError, "Tensor", scale=torch.ones(()))
    for softcap in (0.0, -5.0, float("nan"), float("inf")):
        refuses(wrapper, ValueError, f"softcap is {softcap}", softcap=softcap)


@pytest.mark.parametrize("wrapper", [attend_packed, attend_dense, attend_ragged, probe], ids=name_of)
@pytest.mark.parametrize("window", [0, -3])
def test_windows_that_see_nothing(wrapper, window):
    refuses(wrapper, ValueError, f"window is {window}", window=window)


# what is odd and right


def _apart(t: torch.Tensor) -> torch.Tensor:
    """The same numbers with gaps between them, dimensions in memory the other way round."""
    wide = torch.full([2 * n for n in reversed(t.shape)], torch.nan).to(t.dtype)
    view = wide.permute(*reversed(range(t.dim())))[tuple(slice(None, None, 2) for _ in t.shape)]
    return view.copy_(t)


@pytest.mark.parametrize("wrapper", GOOD, ids=name_of)
def test_strides_play_no_role(wrapper):
    given = GOOD[wrapper][0]()
    strided = {n: _apart(v) if isinstance(v, torch.Tensor) else v for n, v in given.items()}
    assert not all(v.is_contiguous() for v in strided.values() if isinstance(v, torch.Tensor))
    want, have = wrapper(**given), wrapper(**strided)
    if wrapper is pack_blocks:
        want, have = want.tensors(), have.tensors()
    want, have = ([t] if isinstance(t, torch.Tensor) else t for t in (want, have))
    for a, b in zip(want, have, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(b, a)


def test_strides_of_pools_and_tables_play_no_role():
    given = _packed()
    pools = {name: given[name]._map(_apart) for name in ("keys", "values")}
    table = Table(*(_apart(t) for t in given["table"].tensors()))
    assert not table.block.is_contiguous() and not pools["keys"].codes.is_contiguous()
    close(attend_packed(**given | pools | dict(table=table)), attend_packed(**given), tol=1e-6)
    torch.testing.assert_close(unpack_blocks(pools["keys"]), unpack_blocks(given["keys"]))


def test_strides_of_parts_play_no_role():
    parts = _merge()["parts"]
    close(merge([tuple(_apart(t) for t in part) for part in parts]), merge(parts), tol=1e-6)


def test_nothing_at_all():
    """No tokens, no queries, no batch: the neutral result."""
    given = _dense()
    close(attend_dense(**given | dict(k=given["k"][:, :, :0], v=given["v"][:, :, :0])), _neutral(2, 4, 3, 6))
    assert attend_dense(**given | dict(q=given["q"][:, :, :0]))[0].shape == (2, 4, 0, 6)
    assert attend_dense(**{n: v if n == "scale" else v[:0] for n, v in given.items()})[1].shape == (0, 4, 3)
    given = _ragged()
    close(attend_ragged(**given | dict(k=given["k"][:0], v=given["v"][:0], offsets=[0] * 5)), _neutral(2, 4, 3, 6))
    given = _packed()
    table = given["table"]
    empty = Table(table.block, torch.zeros_like(table.count), table.start)
    slotless = Table(*(t[:, :0] for t in (table.block, table.count, table.start)))
    for none in (empty, slotless):
        close(attend_packed(**given | dict(table=none)), _neutral(2, 4, 3, 8))
    given = _probe()
    assert probe(**given | dict(k=given["k"][:, :, :0])).sum.shape == (2, 4, 0)
    assert not probe(**given | dict(q=given["q"][:, :, :0])).sum.any()
    assert not prefill_sparse(**_sparse() | dict(index=torch.zeros(0).long())).any()
    packed = pack_blocks(torch.zeros(0, 16, 8), torch.zeros(0).long(), KEYS)
    assert unpack_blocks(packed).shape == (0, 16, 8)
    assert most_similar(torch.zeros(2, 0, 8), torch.zeros(2, 0, 8))[1].shape == (2, 0)
    assert group_mean(torch.zeros(2, 0, 8), torch.zeros(2, 0).long(), 0).shape == (2, 0, 8)
    assert not group_mean(torch.zeros(2, 0, 8), torch.zeros(2, 0).long(), 3).any()
    assert rotate(torch.zeros(2, 0, 8), torch.zeros(0, 4), torch.zeros(0, 4)).shape == (2, 0, 8)


def _neutral(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(*shape), torch.full(shape[:-1], -torch.inf)


def test_rows_that_see_nothing():
    given = _dense()
    mask = torch.ones(2, 1, 3, 9, dtype=torch.bool)
    mask[0, 0, 1] = False
    out, lse = attend_dense(**given, mask=mask)
    close((out[0, :, 1], lse[0, :, 1]), _neutral(4, 6))
    assert lse[1].isfinite().all()
    early = torch.full((2, 3), -1)  # before every key
    close(attend_packed(**_packed(), causal=True, q_positions=early), _neutral(2, 4, 3, 8))
    close(attend_dense(**given, causal=True, q_positions=early), _neutral(2, 4, 3, 6))
    late = torch.full((2, 3), 1 << 30)  # a window behind every key
    close(attend_packed(**_packed(), window=5, q_positions=late), _neutral(2, 4, 3, 8))
    ragged = _ragged()
    close(attend_ragged(**ragged, window=5, q_positions=late, positions=torch.arange(20).int()), _neutral(2, 4, 3, 6))
    found = probe(**_probe(), mask=torch.zeros(2, 1, 3, 9, dtype=torch.bool))
    assert not found.sum.any() and not found.max.any() and not found.count.any()
    out, lse = merge([_neutral(2, 4, 3, 8)] * 2)
    close((out, lse), _neutral(2, 4, 3, 8))


def test_counts_beyond_a_block_are_clamped():
    """A block cannot hold less than nothing or more than it has places."""
    given = _pack()
    odd = pack_blocks(**given | dict(count=torch.tensor([99, 7, -4])))
    for a, b in zip(odd.tensors(), pack_blocks(**given).tensors(), strict=True):
        assert torch.equal(a, b)


WRONG = [
    (lambda: attend_packed(torch.randn(4, 1, 16), *PACKED, scale=1.0), ValueError, "q has 3 dimensions"),
    (lambda: attend_packed(torch.randn(1, 0, 1, 16), *PACKED, scale=1.0), ValueError, "0 query heads"),
    (lambda: attend_packed(torch.randn(0, 4, 1, 16), *PACKED, scale=1.0), ValueError, "not divide over a batch of 0"),
    (lambda: attend_packed(Q, *PACKED[:2], table(count=33), scale=1.0), ValueError, "counts 33 tokens in a block of 32"),
    (lambda: attend_packed(Q, *PACKED[:2], table(block=9), scale=1.0), ValueError, "names blocks 0 ... 9, there are 2"),
    (lambda: attend_packed(Q, *PACKED, scale=1.0, exact="x"), TypeError, "exact is 'x'; possible are True, False and None"),
    (lambda: attend_packed([1.0], *PACKED, scale=1.0), TypeError, "q is a list; it has to be a tensor"),
    (lambda: attend_dense(Q, K, K, scale=1.0, window=2.5, causal=True), TypeError, "window is 2.5; it has to be a whole number"),
    (lambda: attend_dense(Q, K, K, scale=1.0, window=True), TypeError, "window is True"),
    (lambda: attend_dense(Q, K, K, scale=1.0, k_start=torch.tensor(3)), TypeError, "k_start is tensor"),
    (lambda: probe(Q, K, scale=1.0, k_start=0.5), TypeError, "k_start is 0.5"),
    (lambda: prefill_sparse(K[0], K[0], K[0], torch.tensor([0]), scale=1.0, gather="x"), TypeError, "gather is 'x'"),
    (lambda: merge([(Q, Q[..., 0])], dtype=torch.int32), TypeError, "dtype torch.int32"),
    (lambda: Spec("row", 32, ((16, minmax(2)),)), ValueError, "axis 'row': possible are 'channel', 'token'"),
]  # fmt: skip
Q, K = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 5, 16)
FORM = Spec("channel", 32, ((16, minmax(2)),))
POOL = pack_blocks(torch.randn(2, 32, 16), torch.tensor([32, 32]), FORM)


def table(count=32, block=1):
    """Two rows of one block each."""
    return Table(*(torch.tensor([[a], [b]], dtype=torch.int32) for a, b in ((0, block), (32, count), (0, 0))))


PACKED = (POOL, POOL, table())


@pytest.mark.parametrize(("call", "kind", "says"), WRONG, ids=[says for _, _, says in WRONG])
def test_said_in_words_of_ones_own(call, kind, says):
    with pytest.raises(kind) as caught:
        call()
    assert says in str(caught.value) and "\n" not in str(caught.value)
