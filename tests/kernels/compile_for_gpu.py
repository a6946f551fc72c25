"""Compiles the Triton kernels for NVIDIA GPUs, on any machine: `python tests/kernels/compile_for_gpu.py`.

The interpreter accepts much that the compiler refuses. Launches on CPU tensors are caught and compiled instead; what the
tensors hold does not matter.
"""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmkv.kernels import Spec, Table, attend_packed_triton, gaussian, mean_only, minmax, pack_triton, symmetric, ternary

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16",
    torch.uint8: "*u8", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


class Compile:
    """Stands in for a kernel: `kernel[grid](*args)` compiles instead of running."""

    def __init__(self, kernel: triton.JITFunction, target: GPUTarget):
        self.kernel, self.target, self.shared = kernel, target, []

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *args):
        signature, constants = {}, {}
        assert len(args) == len(self.kernel.params)
        for i, (parameter, value) in enumerate(zip(self.kernel.params, args)):
            if parameter.is_constexpr:
                signature[parameter.name], constants[(i,)] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            else:
                signature[parameter.name] = {int: "i32", float: "fp32"}[type(value)]
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=self.target)
        assert compiled.asm["ptx"]
        self.shared.append(compiled.metadata.shared)


def formats(d: int, group: int):
    """Pairs of (keys, values) that between them use each branch of the kernels."""
    mixed = ((16, gaussian(2)), (16, minmax(4)), (d - 48, gaussian(1)), (16, mean_only()))
    yield Spec("channel", group, mixed, scale_bits=8), Spec("token", group, ((d, gaussian(1.58, zero="none")),), d)
    yield Spec("channel", group, ((d, minmax(2)),)), Spec("token", group, ((d, minmax(2)),), d // 2)
    codes = ((16, symmetric(8)), (16, ternary(0.5, scale="one")), (d - 32, gaussian(4, scale="fit")))
    yield Spec("token", group, ((d, gaussian(4)),), d, scale_bits=8), Spec("channel", group, codes, scale_bits=8)


def main() -> None:
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        names = [(attend_packed_triton, "_attend"), (attend_packed_triton, "_merge")]
        names += [(pack_triton, "_measure"), (pack_triton, "_encode")]
        kernels = [Compile(getattr(module, name), target) for module, name in names]
        for (module, name), kernel in zip(names, kernels):
            setattr(module, name, kernel)
        for dtype, d in ((torch.bfloat16, 128), (torch.float32, 80)):
            for spec_k, spec_v in formats(d, 128):
                x = torch.zeros(4, 128, d, dtype=dtype)
                count = torch.full((4,), 128)
                keys, values = (pack_triton.pack_blocks_triton(x, count, s) for s in (spec_k, spec_v))
                i = torch.zeros(2, 2, dtype=torch.int32)
                for masked in (False, True):
                    attend_packed_triton.attend_packed_triton(
                        torch.zeros(1, 14, 1, d, dtype=dtype), keys, values, Table(i, i, i), scale=0.1,
                        softcap=5.0 if masked else None, q_positions=torch.zeros(1, 1).long() if masked else None,
                        causal=masked, window=7 if masked else None, splits=2,
                    )  # fmt: skip
        for (module, name), kernel in zip(names, kernels):
            setattr(module, name, kernel.kernel)
            assert kernel.shared, f"{name} was not launched"
            assert max(kernel.shared) <= 99 * 1024, f"{name} needs {max(kernel.shared)} bytes of shared memory"
            print(f"sm_{capability} {name}: {len(kernel.shared)} variants, shared <= {max(kernel.shared)} bytes")


if __name__ == "__main__":
    sys.exit(main())
