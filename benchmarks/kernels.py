"""Each kernel beside its torch reference on the same device, and beside the time that its bytes or its products take at least.

Shapes are those of real models: decoders with 28 query and 4 KV heads, and 32 and 8, of 128 channels; vision towers of 576 to
4,096 tokens of 1,152 channels. The floor is bytes read and written over the measured copy bandwidth, or operations over the
measured speed of a large product of bf16 matrices, whichever takes longer. On a CPU the references are what runs, so there is one
time. Attention over packed codes has a benchmark of its own (`decode_attention.py`).

    python benchmarks/kernels.py --device cuda
    python benchmarks/kernels.py
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from common import environment, save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from timing import copy_bandwidth, product_speed, timer_for

from mmkv import kernels
from mmkv.kernels import Blocks, Spec, gaussian, lloyd, minmax
from mmkv.kernels._sight import Sight
from mmkv.kernels.attend_dense import attend_dense_reference
from mmkv.kernels.attend_ragged import attend_ragged_reference
from mmkv.kernels.group_mean import group_mean_reference
from mmkv.kernels.merge import merge_reference
from mmkv.kernels.most_similar import most_similar_reference
from mmkv.kernels.pack import pack_blocks_reference
from mmkv.kernels.prefill_sparse import prefill_sparse_gathered
from mmkv.kernels.probe import probe_reference
from mmkv.kernels.rotate import rotate_reference

HEADS = ((28, 4, 128), (32, 8, 128))
TAIL = 160  # tokens of a dense tail
PROBED = 64  # query rows that are probed
CHOSEN = 0.25  # share of the tokens: of a sparse prefill, of an eviction
CHANNELS, COMPARED = 1152, 72  # of a vision tower, and of one of its heads, by which tokens are matched
TOWERS = {"cpu": ((4, 576), (1, 4096)), "cuda": ((64, 576), (8, 4096))}  # (batch, tokens)
FORMATS = {
    "2 bits per channel": Spec("channel", 128, ((128, minmax(2)),)),
    "1 and 2 bits, 8-bit scales": Spec("channel", 128, ((64, lloyd(2)), (64, lloyd(1))), scale_bits=8),
    "ternary per token": Spec("token", 128, ((128, gaussian(1.58, zero="none")),), 128),
}


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Args:
        kernel: its name.
        shape: in words.
        call: by the public wrapper.
        reference: the same in torch, on any device.
        moved: bytes read and written at least once.
        flops: operations, two per multiply-add.
    """

    kernel: str
    shape: str
    call: Callable
    reference: Callable
    moved: int
    flops: float = 0.0


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def decoders(heads: tuple[int, int, int], tokens: int, device: str) -> Iterator[Case]:
    """What happens to the cache of a decoder layer, batch 1, bf16."""
    hq, hkv, d = heads
    name = f"{hq}/{hkv} heads of {d}"
    draw = lambda *size: torch.randn(*size, device=device, dtype=torch.bfloat16)  # noqa: E731
    q, k, v, scale = draw(1, hq, 1, d), draw(1, hkv, tokens, d), draw(1, hkv, tokens, d), d**-0.5

    parts = [(torch.randn(1, hq, 1, d, device=device), torch.randn(1, hq, 1, device=device)) for _ in range(3)]
    yield Case(
        "merge", f"{name}, 3 parts", lambda: kernels.merge(parts), lambda: merge_reference(parts),
        nbytes(*(t for part in parts for t in part), *parts[0]),
    )  # fmt: skip

    tail = k[:, :, :TAIL].contiguous(), v[:, :, :TAIL].contiguous()
    yield Case(
        "attend_dense", f"{name}, {TAIL} tokens", lambda: kernels.attend_dense(q, *tail, scale=scale),
        lambda: attend_dense_reference(q, *tail, Sight(), scale), nbytes(q, *tail) + 4 * q.numel(),
    )  # fmt: skip

    counts = [int(tokens * CHOSEN * (0.5 + (i + 0.5) / hkv)) for i in range(hkv)]  # heads keep different numbers
    first = [sum(counts[:i]) for i in range(hkv + 1)]
    flat = draw(first[-1], d), draw(first[-1], d)
    start, held = (torch.tensor(x, device=device) for x in (first[:-1], counts))
    spans = [slice(a, b) for a, b in zip(first, first[1:])]
    yield Case(
        "attend_ragged", f"{name}, {first[-1] // hkv:,} tokens a head",
        lambda: kernels.attend_ragged(q, *flat, start, counts=held, longest=max(counts), scale=scale),
        lambda: attend_ragged_reference(q, *flat, spans, Sight(), scale, by_row=True), nbytes(q, *flat) + 4 * q.numel(),
    )  # fmt: skip

    rows = draw(1, hq, PROBED, d)
    at = torch.arange(tokens - PROBED, tokens, device=device)
    options = dict(scale=scale, softcap=None, causal=True, window=None, k_start=0)
    yield Case(
        "probe", f"{name}, {PROBED} rows, {tokens:,} tokens",
        lambda: kernels.probe(rows, k, positions=at, **options),
        lambda: probe_reference(rows, k, mask=None, positions=at[None], **options),
        nbytes(rows, k) + 2 * 4 * hq * tokens, 2.0 * hq * PROBED * tokens * d,
    )  # fmt: skip

    whole = draw(hq, tokens, d)
    for share in (CHOSEN / 4, CHOSEN):
        index = torch.randperm(tokens, device=device)[: int(tokens * share)].sort().values
        n = len(index)
        yield Case(  # in place, against gathering for torch's own attention
            "prefill_sparse", f"{name}, {n:,} of {tokens:,} tokens",
            lambda index=index: kernels.prefill_sparse(whole, k[0], v[0], index, scale=scale, gather=False),
            lambda index=index: prefill_sparse_gathered(whole, k[0], v[0], index, scale=scale, softcap=None, sinks=None),
            2 * n * d * 2 * (hq + hkv), 2.0 * hq * n * n * d,
        )  # fmt: skip

    blocks = k[0].reshape(-1, 128, d)
    full = torch.full((len(blocks),), 128, device=device)
    for form, spec in FORMATS.items():
        yield Case(
            "pack_blocks", f"{form}, {hkv} heads, {tokens:,} tokens",
            lambda spec=spec: kernels.pack_blocks(blocks, full, spec),
            lambda spec=spec: pack_blocks_reference(blocks, full, spec), int(nbytes(blocks) * (1 + spec.bits / 16)),
        )  # fmt: skip

    cos, sin = (torch.randn(tokens, d // 2, device=device) for _ in range(2))
    for inverse in (False, True):
        how = dict(interleaved=False, inverse=inverse, inplace=False)
        yield Case(
            "rotate", f"{'back, ' * inverse}{hkv} heads of {d}, {tokens:,} tokens",
            lambda how=how: kernels.rotate(k, cos, sin, **how), lambda how=how: rotate_reference(k, cos, sin, **how),
            2 * nbytes(k) + nbytes(cos, sin),
        )  # fmt: skip


def towers(batch: int, tokens: int, device: str) -> Iterator[Case]:
    """Token merging in a vision tower, bf16: half of the tokens are offered to the others, half of those are merged."""
    metric = torch.randn(batch, tokens, COMPARED, device=device, dtype=torch.bfloat16)
    a, b, half = metric[:, ::2], metric[:, 1::2], tokens // 2
    name = f"{batch} x {tokens:,} tokens"
    yield Case(
        "most_similar", f"{name} of {COMPARED}", lambda: kernels.most_similar(a, b),
        lambda: most_similar_reference(a, b), nbytes(metric) + 12 * batch * half, 2.0 * batch * half * half * COMPARED,
    )  # fmt: skip
    x = torch.randn(batch, tokens, CHANNELS, device=device, dtype=torch.bfloat16)
    count = tokens - tokens // 4
    index = torch.arange(tokens, device=device) % count
    index, weight = index.expand(batch, -1).contiguous(), torch.rand(batch, tokens, device=device) + 0.5
    yield Case(
        "group_mean", f"{name} of {CHANNELS} to {count:,}", lambda: kernels.group_mean(x, index, count, weight),
        lambda: group_mean_reference(x, index, count, weight),
        nbytes(x, index, weight) + 2 * batch * count * CHANNELS,
    )  # fmt: skip


def cases(device: str, tokens: int) -> Iterator[Case]:
    """All of them, one after the other, so that the tensors of one go before those of the next come."""
    torch.manual_seed(0)
    for heads in HEADS:
        yield from decoders(heads, tokens, device)
    for batch, count in TOWERS[device]:
        yield from towers(batch, count, device)


def off(case: Case) -> float:
    """Relative RMS of the kernel's result against the reference's."""
    have, want = (_floats(call()) for call in (case.call, case.reference))
    return max(float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)) for a, b in zip(have, want))


def _floats(result) -> list[torch.Tensor]:
    if isinstance(result, Blocks):
        return [kernels.unpack_blocks(result)]
    some = [result] if isinstance(result, torch.Tensor) else list(result)
    return [t for t in some if t.is_floating_point()]


def measure(case: Case, timer, copy: float, product: float) -> dict:
    """One row."""
    calls = {"kernel": case.call} | ({"reference": case.reference} if timer.device == "cuda" else {})
    taken = timer.medians(calls)
    mine, floor = taken["kernel"], max(case.moved / copy, case.flops / product)
    row = dict(
        kernel=case.kernel, shape=case.shape, us=mine.seconds * 1e6, launch_us=mine.launch * 1e6, captured=mine.captured,
        floor_us=floor * 1e6, bound="bytes" if case.moved / copy >= case.flops / product else "products",
        share_of_floor=floor / mine.seconds, moved=case.moved, flops=case.flops, reference_us=None, faster=None, off=None,
    )  # fmt: skip
    if "reference" in taken:
        row |= dict(
            reference_us=taken["reference"].seconds * 1e6,
            faster=taken["reference"].seconds / mine.seconds,
            off=off(case),
        )
    return row


def show(rows: list[dict], copy: float, product: float) -> None:
    title = f"copying runs at {copy / 1e9:.0f} GB/s, products at {product / 1e12:.1f} TFLOP/s"
    table = Table(title=title, header_style="bold")
    for name in ("kernel", "shape", "us", "launch us", "floor us", "of floor", "torch us", "faster", "off"):
        table.add_column(name, justify="left" if name in ("kernel", "shape") else "right")
    for row in rows:
        told = ["-"] * 3
        if row["faster"] is not None:
            told = [f"{row['reference_us']:,.0f}", f"{row['faster']:.1f}x", f"{row['off']:.0e}"]
        table.add_row(
            row["kernel"], row["shape"], f"{row['us']:,.0f}", f"{row['launch_us']:,.0f}",
            f"{row['floor_us']:,.0f} ({row['bound']})", f"{row['share_of_floor']:.0%}", *told,
        )  # fmt: skip
    console = Console()
    console = console if console.is_terminal else Console(width=140)  # wide enough for the table
    console.print(table)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, help="of a prompt (4,096 on a CPU, 32,768 on a GPU)")
    parser.add_argument("--only", nargs="+", help="kernels")
    parser.add_argument("--rounds", type=int, help="measurements of each")
    parser.add_argument("--out")
    options = parser.parse_args(argv)
    cuda = options.device == "cuda"
    timer = timer_for(options.device, options.rounds or (20 if cuda else 7))
    load = dict(before=os.getloadavg(), cores=os.cpu_count())
    copy, product = copy_bandwidth(options.device), product_speed(options.device)
    wanted = cases(options.device, options.tokens or (32768 if cuda else 4096))
    rows = [
        measure(case, timer, copy, product)
        for case in track(wanted, "kernels", total=None)
        if not options.only or case.kernel in options.only
    ]
    show(rows, copy, product)
    load["after"] = os.getloadavg()
    save(
        options.out or f"benchmarks/results/kernels-{options.device}.json",
        dict(environment=environment(), dtype="bfloat16", threads=torch.get_num_threads(), rounds=timer.rounds, load_average=load,
             copy_gb_per_s=copy / 1e9, product_tflop_per_s=product / 1e12, rows=rows),
    )  # fmt: skip


if __name__ == "__main__":
    main()
