"""Instructions per cached number of the kernels for packed attention, read off the machine code; no GPU is needed.

A GPU that reads 2-bit codes at full bandwidth has time for few instructions: an H100 issues 128 of a thread's a clock on each of
132 multiprocessors, and reads about 3 TB/s, so at 2.3 bits a number there is time for 2.8 instructions each (at 1.7 GHz).
Loops inside are counted as often as they run; a call of a division counts as one, which flatters the general kernel.

    python benchmarks/instructions.py
"""

from __future__ import annotations

import argparse

import torch
import triton
from common import environment, save
from machine_code import Compiled, Loop, compile_for, longest_loop
from rich.console import Console
from rich.table import Table as Printed

from mmkv._presets import preset
from mmkv.cache.formats import PackFormat
from mmkv.kernels import Blocks, Table, attend_packed_triton

PRESETS = ("kivi-4", "kivi-2", "vidkv", "waterfill")
HEADS, KV_HEADS, DIM = 28, 4, 128
INNER_CHANNELS = 32  # of keys, in a turn of the general kernel's inner loop


def compiled(form: PackFormat, general: bool) -> Loop:
    """The loop over blocks of the kernel that a format takes, or of the one for all formats."""
    keys, values = form.keys.spec(DIM, form.group), form.values.spec(DIM, form.group)
    empty = torch.zeros(KV_HEADS, 8, dtype=torch.int32)
    q = torch.zeros(1, HEADS, 1, DIM, dtype=torch.bfloat16)
    kernels = {name: Compiled(getattr(attend_packed_triton, name)) for name in ("_attend", "attend_planes")}
    real = {name: getattr(attend_packed_triton, name) for name in (*kernels, "fits")}
    try:
        for name, kernel in kernels.items():
            setattr(attend_packed_triton, name, kernel)
        if general:
            attend_packed_triton.fits = lambda keys, values: False
        attend_packed_triton.attend_packed_triton(
            q, Blocks.empty(keys, 4), Blocks.empty(values, 4), Table(empty, empty, empty), scale=0.1, softcap=None,
            q_positions=None, causal=False, window=None, splits=2, merged=False,
        )  # fmt: skip
    finally:
        for name, kernel in real.items():
            setattr(attend_packed_triton, name, kernel)
    (one,) = kernels["_attend"].variants + kernels["attend_planes"].variants
    return longest_loop(one)


def per_number(form: PackFormat, loop: Loop, general: bool) -> float:
    """Instructions of a thread per cached number."""
    numbers, instructions = form.group * 2 * DIM, loop.instructions
    if general:  # a turn is a tile of tokens, and the loops inside run over channels of each class
        numbers = min(64, form.group) * 2 * DIM
        widths = [width for width, code in form.keys.spec(DIM, form.group).classes if code.per_byte]
        tiles = [n for n in loop.inner if n < max(loop.inner)] or list(loop.inner)
        instructions = max(loop.inner) if len(loop.inner) > len(widths) else loop.instructions
        instructions += sum((-(-w // INNER_CHANNELS) - 1) * n for w, n in zip(widths, tiles))
    return instructions * loop.threads / numbers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", type=int, default=90, help="80 (A100), 89 (RTX 4090), 90 (H100)")
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--out", default="benchmarks/results/instructions.json")
    options = parser.parse_args()
    compile_for(options.capability)
    table = Printed(title=f"attention over packed codes, sm_{options.capability}, {HEADS}/{KV_HEADS} heads of {DIM}")
    for name in ("format", "kernel", "bits", "instructions a number", "registers", "spilled", "shared"):
        table.add_column(name, justify="left" if name in ("format", "kernel") else "right")
    rows = []
    for name in options.presets:
        (method,) = preset(name).cache
        form = method.formats()[0]
        for general in (False, True):
            loop = compiled(form, general)
            row = dict(
                format=name, kernel="general" if general else "planes", bits=sum(form.bits(DIM)) / 2,
                per_number=per_number(form, loop, general), **vars(loop),
            )  # fmt: skip
            rows.append(row)
            table.add_row(
                name, row["kernel"], f"{row['bits']:.2f}", f"{row['per_number']:.1f}", str(loop.registers),
                str(loop.stack), f"{loop.shared / 1024:.0f} KiB",
            )  # fmt: skip
    Console().print(table)
    save(options.out, dict(environment(), triton=triton.__version__, capability=options.capability, rows=rows))


if __name__ == "__main__":
    main()
