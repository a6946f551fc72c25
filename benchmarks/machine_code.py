"""Triton kernels compiled for a GPU that need not be there, and what their machine code says."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);")
_BACKWARDS = re.compile(r"\bBRA(?:\.\w+)*\s.*?0x([0-9a-f]+)")


class Driver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")


def compile_for(capability: int) -> None:
    """From now on kernels are compiled for this compute capability, and CPU tensors count as a GPU's."""
    triton.runtime.driver.set_active(Driver(capability))
    torch.Tensor.is_cuda = property(lambda tensor: True)  # type: ignore[assignment,method-assign]


class Compiled:
    """Stands in for a kernel: `kernel[grid](*args)` compiles as a launch would, and launches nothing.

    Args:
        kernel: the kernel.
    """

    def __init__(self, kernel: triton.JITFunction):
        self.kernel, self.variants = kernel, []

    def __getitem__(self, grid):
        def compile_only(*args, **options):
            self.kernel.device_caches.clear()  # they know no capabilities: what was compiled for another would be found
            self.variants.append(self.kernel.warmup(*args, grid=grid, **options))

        return compile_only


@dataclass(frozen=True)
class Usage:
    """What a program of a compiled kernel takes.

    Args:
        registers: of a thread.
        stack: bytes of a thread that are spilled.
        shared: bytes of shared memory.
        warps: of a program.
    """

    registers: int
    stack: int
    shared: int
    warps: int


def usage(compiled) -> Usage:
    """Registers and memory of a compiled kernel."""
    found = _cuobjdump(compiled, "-res-usage")
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", found).groups())  # type: ignore[union-attr]
    return Usage(registers, stack, compiled.metadata.shared, compiled.metadata.num_warps)


@dataclass(frozen=True)
class Loop:
    """The longest loop of a kernel.

    Args:
        instructions: of one turn, each thread; loops inside count once.
        inner: instructions of the loops inside.
        calls: of subroutines (divisions).
        kinds: instructions by name, the most frequent first.
        registers, stack: of a thread; bytes of stack are spilled registers.
        shared: bytes of shared memory.
        threads: of a program.
    """

    instructions: int
    inner: tuple[int, ...]
    calls: int
    kinds: tuple[tuple[str, int], ...]
    registers: int
    stack: int
    shared: int
    threads: int


def longest_loop(compiled) -> Loop:
    """What the machine code of a compiled kernel does most."""
    code, taken = _cuobjdump(compiled, "-sass"), usage(compiled)
    lines = [(int(at, 16), text) for at, text in _INSTRUCTION.findall(code)]
    index = {at: i for i, (at, _) in enumerate(lines)}
    loops = []
    for i, (at, text) in enumerate(lines):
        target = _BACKWARDS.search(text)
        if target and int(target[1], 16) < at:
            loops.append((index[int(target[1], 16)], i))
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    kinds = Counter(re.sub(r"^@!?U?P\w+ ", "", text).split()[0].split(".")[0] for _, text in lines[first : last + 1])
    return Loop(
        instructions=last - first + 1,
        inner=tuple(b - a + 1 for a, b in loops if first < a and b < last),
        calls=kinds["CALL"],
        kinds=tuple(kinds.most_common(12)),
        registers=taken.registers,
        stack=taken.stack,
        shared=taken.shared,
        threads=32 * taken.warps,
    )


def _cuobjdump(compiled, what: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        return subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout
