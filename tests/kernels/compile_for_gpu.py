"""Compiles the Triton kernels for NVIDIA GPUs, on any machine: `python tests/kernels/compile_for_gpu.py [packed ...]`.

The interpreter accepts much that the compiler refuses. Launches on CPU tensors are caught and compiled instead; what
the tensors hold does not matter.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[2] / "benchmarks")]
ROOMS = ("packed", "attention", "masses", "merging")


def main(rooms: list[str]) -> None:
    for room in rooms or ROOMS:
        importlib.import_module(f"compile_{room}").run()


if __name__ == "__main__":
    main(sys.argv[1:])
